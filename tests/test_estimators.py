"""Off-policy estimators against loops and the Open Bandit Pipeline, and their intervals against simulated logs."""

from __future__ import annotations

import math

import numpy as np
import pytest
import simulate_logs
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from rb_gpu.learn.estimators import (
    direct_method,
    doubly_robust,
    effective_size,
    floored,
    ips,
    mean_of,
    odd_propensities,
    rare_error,
    rare_size,
    self_normalised_doubly_robust,
    snips,
    too_seldom,
    unseen_error,
)
from rb_gpu.learn.outcome_model import FOLDS, cross_fitted, folds


def logged(seed: int, rounds: int = 60, configs: int = 4) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    propensity = rng.dirichlet(np.full(configs, 0.7), rounds).clip(1e-3)
    propensity /= propensity.sum(1, keepdims=True)
    chosen = np.array([rng.choice(configs, p=p) for p in propensity])
    chosen[:configs] = choice = rng.integers(configs, size=configs)
    choice = np.concatenate([choice, rng.integers(configs, size=rounds - configs)])
    return {
        "reward_N": rng.random(rounds),
        "chosen_N": chosen,
        "choice_N": choice,
        "pscore_N": propensity[np.arange(rounds), chosen],
        "predicted_NC": rng.random((rounds, configs)),
    }


def estimates(log: dict[str, np.ndarray]) -> dict:
    plain = {name: log[name] for name in ("reward_N", "chosen_N", "choice_N", "pscore_N")}
    return {
        "ips": ips(**plain),
        "snips": snips(**plain),
        "dm": direct_method(log["predicted_NC"], log["choice_N"]),
        "dr": doubly_robust(**log),
        "sndr": self_normalised_doubly_robust(**log),
    }


def by_loop(log: dict[str, np.ndarray]) -> dict[str, float]:
    """The papers' formulas, one round at a time."""
    rounds, weights, paid, said, left = len(log["reward_N"]), 0.0, 0.0, 0.0, 0.0
    for n in range(rounds):
        weight = 1.0 / log["pscore_N"][n] if log["chosen_N"][n] == log["choice_N"][n] else 0.0
        weights += weight
        paid += weight * log["reward_N"][n]
        said += log["predicted_NC"][n, log["choice_N"][n]]
        left += weight * (log["reward_N"][n] - log["predicted_NC"][n, log["chosen_N"][n]])
    return {
        "ips": paid / rounds,
        "snips": paid / weights,
        "dm": said / rounds,
        "dr": said / rounds + left / rounds,
        "sndr": said / rounds + left / weights,
    }


@pytest.mark.parametrize("seed", range(3))
def test_estimators_are_their_papers_formulas(seed: int):
    found = estimates(logged(seed))
    assert {name: one.value for name, one in found.items()} == pytest.approx(by_loop(logged(seed)))
    for one in found.values():
        assert one.score_N.mean() == pytest.approx(one.value)


def by_open_bandit_pipeline(log: dict[str, np.ndarray]) -> dict[str, float]:
    """The estimates of obp 0.4.1; skips if it is missing: it pins old versions of packages that the
    tests need newer.
    """
    theirs = pytest.importorskip("obp.ope", exc_type=ImportError)
    given_ = {"reward": log["reward_N"], "action": log["chosen_N"], "pscore": log["pscore_N"]}
    given_ |= {
        "action_dist": np.eye(4)[log["choice_N"]][:, :, None],
        "estimated_rewards_by_reg_model": log["predicted_NC"][:, :, None],
    }
    same = {
        "ips": theirs.InverseProbabilityWeighting(),
        "snips": theirs.SelfNormalizedInverseProbabilityWeighting(),
        "dm": theirs.DirectMethod(),
        "dr": theirs.DoublyRobust(),
        "sndr": theirs.SelfNormalizedDoublyRobust(),
    }
    return {name: float(one.estimate_policy_value(**given_)) for name, one in same.items()}


def countable() -> dict[str, np.ndarray]:
    """A log with rational numbers only, so that every version of NumPy draws the same."""
    n, config = np.arange(60), np.arange(4)
    return {
        "reward_N": 37 * n % 61 / 61,
        "chosen_N": (n * n + n // 4) % 4,
        "choice_N": n // 3 % 4,
        "pscore_N": (1 + 13 * n % 17) / 20,
        "predicted_NC": (29 * n[:, None] + 11 * config) % 53 / 53,
    }


# results of by_open_bandit_pipeline(countable()), with `pip install --no-deps obp==0.4.1 seaborn` next to the extra
# `test`
OPEN_BANDIT_PIPELINE = {
    "ips": 1.0523957211758561,
    "snips": 0.49240456646688363,
    "dm": 0.5028301886792453,
    "dr": 0.7234108279706523,
    "sndr": 0.6060374821675886,
}


def test_estimators_say_what_open_bandit_pipeline_said():
    found = {name: one.value for name, one in estimates(countable()).items()}
    assert found == pytest.approx(OPEN_BANDIT_PIPELINE, rel=1e-12)


def test_what_open_bandit_pipeline_said_is_what_it_says():
    assert by_open_bandit_pipeline(countable()) == pytest.approx(OPEN_BANDIT_PIPELINE, rel=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_estimators_agree_with_open_bandit_pipeline(seed: int):
    theirs = by_open_bandit_pipeline(logged(seed))
    assert {name: one.value for name, one in estimates(logged(seed)).items()} == pytest.approx(theirs)


@pytest.mark.parametrize("name", ["ips", "snips", "dm", "dr", "sndr"])
def test_influences_are_what_leaving_a_round_out_takes(name: str):
    log = logged(4, rounds=400)
    whole = estimates(log)[name]
    for n in range(0, 400, 37):
        rest = {key: np.delete(value, n, axis=0) for key, value in log.items()}
        taken = whole.value - estimates(rest)[name].value
        assert whole.influence_N[n] / 400 == pytest.approx(taken, rel=0.02, abs=2e-5)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), rounds=st.integers(8, 80))
def test_the_order_of_rounds_does_not_matter(seed: int, rounds: int):
    log = logged(seed, rounds)
    order = np.random.default_rng(seed).permutation(rounds)
    query = np.arange(rounds) // 2
    shuffled = estimates({name: value[order] for name, value in log.items()})
    for name, one in estimates(log).items():
        assert shuffled[name].value == pytest.approx(one.value)
        expected = one.interval(query, 12.0, 0.0)
        assert shuffled[name].interval(query[order], 12.0, 0.0) == pytest.approx(expected, nan_ok=True)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_the_order_of_a_table_does_not_matter_to_the_outcome_model(seed: int):
    rng = np.random.default_rng(seed)
    x, ids, config = rng.normal(size=(90, 5)).astype(np.float32), rng.permutation(900)[:90], rng.integers(3, size=90)
    y, weight, order = rng.random((90, 2)), 1.0 + rng.random(90), rng.permutation(90)
    each = np.arange(90)
    one = cross_fitted(x, folds(ids.astype(np.uint64)), each, config, weight, y, 3)
    moved = ids[order].astype(np.uint64)
    other = cross_fitted(x[order], folds(moved), each, config[order], weight[order], y[order], 3)
    assert other == pytest.approx(one[:, order], abs=1e-7)


def test_the_outcome_model_never_saw_the_query_that_it_predicts():
    rng = np.random.default_rng(0)
    x, config, y = rng.normal(size=(200, 4)).astype(np.float32), rng.integers(2, size=200), rng.random((200, 1))
    fold, each, weight = folds(np.arange(200, dtype=np.uint64)), np.arange(200), np.ones(200)
    assert np.bincount(fold, minlength=FOLDS).min() > 20
    before = cross_fitted(x, fold, each, config, weight, y, 2)
    y[7] = 100.0
    after = cross_fitted(x, fold, each, config, weight, y, 2)
    assert after[:, fold == fold[7]] == pytest.approx(before[:, fold == fold[7]])
    assert abs(after - before)[:, fold != fold[7], config[7]].min() > 0.01


def test_the_outcome_model_finds_what_is_linear_and_stays_at_the_mean_elsewhere():
    rng = np.random.default_rng(1)
    x = rng.normal(size=(1000, 6)).astype(np.float32)
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    # config 2 has too few rows for a regression, config 3 has none
    config = np.where(np.arange(1000) < 10, 2, np.arange(1000) % 2)
    y = 0.5 + np.where(config == 0, unit[:, 0], 0.0) + 0.05 * rng.normal(size=1000)
    [said] = cross_fitted(
        x, folds(np.arange(1000, dtype=np.uint64)), np.arange(1000), config, np.ones(1000), y[:, None], 4
    )
    assert np.abs(said[:, 0] - 0.5 - unit[:, 0]).mean() < 0.02
    assert said[:, 1:] == pytest.approx(np.full((1000, 3), 0.5), abs=0.1)


def test_kish_by_hand():
    assert effective_size(np.array([1.0, 1.0, 1.0, 0.0])) == 3.0
    assert effective_size(np.array([9.0, 1.0])) == pytest.approx(100 / 82)
    assert effective_size(np.zeros(3)) == 0.0


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"pscore_N": np.zeros(60)}, r"outside \(0, 1\]"),
        ({"pscore_N": np.full(60, np.nan)}, r"outside \(0, 1\]"),
        ({"choice_N": np.zeros(3, int)}, "choice_N has shape"),
        ({"choice_N": np.full(60, -1)}, r"outside \[0, 4\)"),
        # -1 would be read as the last config
        ({"choice_N": np.append(np.zeros(59, int), -1)}, r"outside \[0, 4\)"),
        ({"choice_N": np.append(np.zeros(59, int), 4)}, r"outside \[0, 4\)"),
        ({"pscore_N": np.append(np.ones(59), 1.001)}, r"outside \(0, 1\]"),
    ],
)
def test_bad_arrays_are_refused(wrong: dict[str, np.ndarray], says: str):
    with pytest.raises(ValueError, match=says):
        doubly_robust(**(logged(0) | wrong))


def test_a_log_without_chance_is_the_plain_mean():
    log = logged(0) | {"pscore_N": np.ones(60)}
    matched = log["chosen_N"] == log["choice_N"]
    assert estimates(log)["snips"].value == pytest.approx(log["reward_N"][matched].mean())


def test_one_effective_round_or_one_query_has_no_interval():
    found = estimates(logged(0))["dr"]
    each, one = np.arange(60), np.zeros(60, int)
    assert all(map(math.isfinite, found.interval(each, 1.01, 0.0)))
    for query, size in ((each, 1.0), (one, 30.0)):
        assert all(map(math.isnan, found.interval(query, size, 0.0)))


def test_nothing_matched_is_not_a_number():
    log = logged(0)
    log["choice_N"] = (log["chosen_N"] + 1) % 4
    found = estimates(log)
    assert math.isnan(found["snips"].value) and math.isnan(found["sndr"].value)
    assert all(math.isnan(end) for end in found["sndr"].interval(np.arange(60), 30.0, 0.0))


def test_one_round_of_a_tiny_propensity_makes_a_value_unsure():
    rng = np.random.default_rng(2)
    chosen = np.arange(400) % 2
    pscore, reward = np.full(400, 0.5), 0.5 + 0.1 * rng.normal(size=400)
    calm = snips(reward, chosen, np.ones(400, int), pscore)
    low, high = calm.interval(np.arange(400), 200.0, 0.0)
    pscore[1], reward[1] = 1e-6, 1.0
    weight = np.where(chosen == 1, 1.0 / pscore, 0.0)
    wild = snips(reward, chosen, np.ones(400, int), pscore)
    assert wild.value == pytest.approx(1.0, abs=1e-3) and effective_size(weight) < 1.01
    wild_low, wild_high = wild.interval(np.arange(400), effective_size(weight), 0.0)
    assert wild_high - wild_low > 100 * (high - low)


def test_rounds_of_one_query_count_together():
    log = logged(3, rounds=200)
    one = estimates(log)["dr"]
    twice = estimates({name: np.repeat(value, 2, axis=0) for name, value in log.items()})["dr"]
    once = one.interval(np.arange(200), 50.0, 0.0)
    assert twice.interval(np.repeat(np.arange(200), 2), 50.0, 0.0) == pytest.approx(once)


def test_wrong_propensities_are_noticed():
    rng = np.random.default_rng(4)
    true = np.array([0.6, 0.3, 0.1])
    chosen = rng.choice(3, size=3000, p=true)
    assert odd_propensities(chosen, true[chosen], 4) == {}
    wrong = odd_propensities(chosen, np.full(3000, 1 / 3), 4)
    assert set(wrong) == {0, 2} and wrong[0] == pytest.approx(1.8, abs=0.1)
    assert set(odd_propensities(chosen, np.ones(3000), 4)) == {0, 1, 2}


@pytest.mark.parametrize(("configs", "rounds", "main"), [(40, 400, 1 / 40), (6, 600, 0.95)])
def test_propensities_of_configs_that_ran_by_chance_too_seldom_are_not_called_wrong(configs, rounds, main):
    # regression: the error was taken from the few rounds alone, which made it small where they were few: two rounds
    # where ten were expected contradicted true propensities in 7 to 11 % of such logs
    rng, called = np.random.default_rng(0), 0
    p_C = np.array([main, *(configs - 1) * [(1.0 - main) / (configs - 1)]])
    for _ in range(300):
        chosen = rng.choice(configs, size=rounds, p=p_C)
        called += bool(odd_propensities(chosen, p_C[chosen], configs))
    assert called <= 1


def test_a_share_that_no_row_stands_for_widens_the_interval():
    rng = np.random.default_rng(5)
    left = rng.normal(size=4000)
    everywhere, even = np.where(rng.random(4000) < 0.5, 2.0, 0.0), np.full(4000, 0.5)
    assert unseen_error(everywhere, left, even) < 0.1
    # 1 % of the rounds are missing, and 1.6 % could be chance
    assert unseen_error(np.where(np.arange(4000) < 1980, 2.0, 0.0), left, even) == 0.0
    # without chance, whatever is missing counts: 1 % of the standard deviation of the rest
    alone = np.where(np.arange(4000) < 3960, 1.0, 0.0)
    assert unseen_error(alone, left, even) == pytest.approx(0.01 * left[:3960].std())
    half = np.where(np.arange(4000) < 2000, everywhere, 0.0)
    assert unseen_error(half, left, even) == pytest.approx(0.5, rel=0.1)
    assert unseen_error(np.zeros(4000), left, even) == 0.0


def test_rounds_of_tiny_propensity_count_as_unseen_though_the_weights_hardly_miss_them():
    rng = np.random.default_rng(6)
    left, hard = rng.normal(size=4000), np.arange(4000) < 80
    weight = np.where((rng.random(4000) < 0.5) & ~hard, 2.0, 0.0)
    most = np.where(hard, 0.001, 0.5)
    # of 80 such rounds 0.08 are expected to match; and of the others, five rounds' worth counts as unseen
    assert unseen_error(weight, left, most) == pytest.approx(85 / 4000, rel=0.1)
    weight[0] = 1000.0  # the one round that matched represents all of them
    assert unseen_error(weight, left, most) == 0.0


@pytest.mark.parametrize("log", simulate_logs.LOGS)
def test_intervals_hold_the_truth_as_often_as_they_say(log: str):
    """The full check is 500 logs, `python -m tests.simulate_logs`; 60 logs show that coverage is not far off."""
    for name, one in simulate_logs.coverage(log, 600, 60, seed=3).items():
        assert one.known >= 55, name
        assert one.plausible(0.95, 0.999), (name, one)


def test_the_size_of_what_is_rare():
    few = np.zeros(10_000)
    few[:50] = np.tile([1, -1], 25)
    assert rare_size(few) == pytest.approx(1.0, rel=0.02)
    rng = np.random.default_rng(0)
    assert rare_size(rng.normal(size=200_000)) < 0.2 and rare_size(rng.random(1000) - 0.5) == 0.0
    assert rare_size(np.zeros(3)) == 0.0


def test_what_never_failed_may_fail_as_often_as_wilsons_bound_says():
    # 0 failures in n: 1.96 standard errors are 2.8 / n; Wilson's bound is 3.8 / (n + 3.8)
    for n in (20, 200):
        assert 1.96 * rare_error(np.ones(n), 1.0) == pytest.approx(1.96 * math.sqrt(2) / n)
    assert rare_error(np.full(20, 50.0), 1.0) == pytest.approx(rare_error(np.ones(20), 1.0))
    assert rare_error(np.zeros(3), 1.0) == 0.0
    uneven = np.ones(20)
    uneven[0] = 100.0
    assert rare_error(uneven, 1.0) > 5 * rare_error(np.ones(20), 1.0)


@pytest.mark.parametrize("most", [1, 200, 380])
def test_a_query_that_holds_most_rounds_is_as_unsure_as_its_rounds(most):
    """Influence values add up to 0, so that the sum over a query with 19 of 20 rounds equals minus that of the few
    others. Regression: 95 % intervals contained the truth in only 43 % of the logs.
    """
    query_N = np.concatenate([np.zeros(most, np.int64), np.arange(1, 401 - most)])
    held = 0
    for seed in range(400):
        low, high = mean_of(np.random.default_rng(seed).normal(size=400)).interval(query_N, 400.0, 0.0)
        held += low <= 0.0 <= high
    assert stats.binomtest(held, 400, 0.95).pvalue > 0.01


def policy(rng, kind: str, rounds: int = 2000, configs: int = 6) -> np.ndarray:
    """Propensities (rounds, configs) as several real policies would log them."""
    if kind == "mostly one":
        return np.tile(np.r_[0.999, np.full(configs - 1, 0.001 / (configs - 1))], (rounds, 1))
    if kind == "softmax":
        exponent = np.exp(3.0 * rng.normal(size=(rounds, configs)))
        return exponent / exponent.sum(1, keepdims=True)
    return rng.dirichlet(np.full(configs, 0.05), size=rounds).clip(1e-12)  # as Thompson sampling: most are nearly 0


@pytest.mark.parametrize("kind", ["mostly one", "softmax", "dirichlet"])
def test_low_propensities_that_are_true_are_not_called_floored(kind):
    rng, called = np.random.default_rng(8), 0
    for _ in range(200):
        true_NC = policy(rng, kind)
        true_NC /= true_NC.sum(1, keepdims=True)
        chosen = np.minimum((true_NC.cumsum(1) < rng.random(2000)[:, None]).sum(1), 5)
        called += floored(true_NC[np.arange(2000), chosen], 6) is not None
    assert called <= 1
    # one in a thousand rounds was chosen with a floored propensity
    few = np.where(np.arange(2000) < 2, 1e-6, true_NC[np.arange(2000), chosen])
    assert floored(few, 6) == (2, 1e-6, pytest.approx(0.012))


def test_a_config_may_be_missing_for_it_was_chosen_too_seldom():
    # 1,900 of 2,000 rounds are not explained; at a propensity of 3 / 1,900, one log in twenty would have none of them
    assert too_seldom(0.05, np.array([0.0015, *[0.5] * 1999]))
    assert not too_seldom(0.05, np.array([0.0017, *[0.5] * 1999]))
    assert not too_seldom(5.0, np.array([1e-6, *[0.5] * 1999]))  # too many rows are not a lack of rows
