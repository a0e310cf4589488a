"""When a choice has a value, its grade, and the message if it has none."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats
from simulate_logs import CONFIGS, QUALITY, choices, world

from jobs.tables import evaluation_tables
from rb_gpu.bench.decisions import draw
from rb_gpu.learn import valuation as valuation_module
from rb_gpu.learn.drift import EmbeddingDrift
from rb_gpu.learn.estimators import effective_size, rare_error
from rb_gpu.learn.gate import decide
from rb_gpu.learn.harm import measure_harm, telling_rows
from rb_gpu.learn.policy import evaluate, oracle
from rb_gpu.learn.valuation import Outcomes, Valuation, held_out_outcomes
from rb_gpu.learn.verdicts import holm
from rb_gpu.learn.version_config import GateConfig

PER_ROW = ("query_row", "config_id", "propensity", "utility", "quality", "latency_us", "cost")


def rows_of(log: str = "uniform", queries: int = 600, seed: int = 0) -> Outcomes:
    return held_out_outcomes(
        draw(world(queries, np.random.default_rng(seed)), log, 0, np.random.default_rng(seed)), QUALITY
    )


def full(queries: int = 300, seed: int = 0) -> Outcomes:
    return held_out_outcomes(world(queries, np.random.default_rng(seed)), QUALITY)


def test_a_full_table_is_exact_whatever_propensities_it_logs():
    # regression: rows were weighted by 1 / propensity although each query was tried under every config
    plain = full()
    skewed = replace(plain, propensity=np.random.default_rng(0).uniform(0.01, 1.0, len(plain.config_id)))
    picked = choices(plain.x_QD)
    expected = plain.utility.reshape(-1, CONFIGS)[np.arange(300), picked["bank"]].mean()
    for rows in (plain, skewed):
        result = evaluate(rows, picked | {"oracle": oracle(rows)}, 100, 0)
        assert result.grade == "exact" and result.warnings == []
        assert result.value("bank").utility == pytest.approx(expected)
        assert result.value("bank").ess == pytest.approx(300)
        best = plain.utility.reshape(-1, CONFIGS).max(1).mean()
        assert result.value("bank").regret == pytest.approx(best - expected)
        assert result.value("default").abstained == 1.0
        assert result.value("bank").estimates == {}


def test_a_query_that_tried_a_pick_twice_counts_once():
    one = full(queries=40)
    again = np.flatnonzero(one.query_row < 10)  # the first ten queries, with other outcomes
    both = np.concatenate([np.arange(len(one.query_row)), again])
    rows = replace(one, **{name: getattr(one, name)[both] for name in PER_ROW if getattr(one, name) is not None})
    rows.utility[len(one.query_row) :] += 0.1
    choice = np.full(40, 2)
    valuation = Valuation(rows, [choice])
    assert valuation.grade == "exact"
    expected = one.utility.reshape(-1, CONFIGS)[:, 2] + np.where(np.arange(40) < 10, 0.05, 0.0)
    assert valuation.estimate("utility", choice).value == pytest.approx(expected.mean())


def test_quality_that_never_fails_may_though_latency_spreads_the_utility():
    # latency makes the utility look normal, without rare events; but quality's failures stay possible
    rows = full()
    rng = np.random.default_rng(0)
    same = np.ones(len(rows.utility))
    sure = replace(rows, quality=same, utility=same + 0.1 * rng.normal(size=len(same)))
    valuation = Valuation(sure, [np.zeros(300, int)])
    assert valuation.rare(np.zeros(300, int)) == pytest.approx(rare_error(np.ones(300), 1.0))


def test_a_log_is_valued_doubly_robust_beside_the_plainer_estimators():
    rows = rows_of()
    result = evaluate(rows, choices(rows.x_QD), 100, 0)
    bank = result.value("bank")
    assert result.grade == "dr" and result.warnings == []
    assert set(bank.estimates) == {"dr, not normalised", "snips", "ips", "direct method"}
    assert bank.low < bank.utility < bank.high and math.isnan(bank.regret)
    assert bank.ess == pytest.approx(bank.matched)


def test_the_best_in_hindsight_of_a_log_is_no_oracle():
    # a query logged twice: the better of its two rows is picked only because it was lucky
    one = rows_of(queries=200)
    twice = replace(
        one,
        config_id=np.concatenate([[c, (c + 1) % CONFIGS] for c in one.config_id]),
        **{name: np.repeat(getattr(one, name), 2) for name in PER_ROW if name != "config_id"},
    )
    result = evaluate(twice, choices(one.x_QD) | {"oracle": oracle(twice)}, 100, 0)
    assert result.grade == "dr" and [value.name for value in result.values][-1] == "bank"


@pytest.mark.parametrize("tries", [1, 2])
def test_hindsight_takes_two_tries_of_every_query(tries):
    rows = full(queries=50)
    kept = (rows.config_id < 2) | (rows.query_row > 0)
    kept[rows.query_row == 0] = rows.config_id[rows.query_row == 0] < tries
    some = replace(rows, **{name: getattr(rows, name)[kept] for name in PER_ROW if getattr(rows, name) is not None})
    best = oracle(some)
    assert (best is None) == (tries == 1)
    if best is not None:
        assert best[0] == rows.utility[:2].argmax()
        assert (best[1:] == rows.utility.reshape(50, CONFIGS)[1:].argmax(1)).all()


def test_hindsight_weighs_a_configs_tries_together():
    # the luckiest of all rows decided, so that a config that was tried often seemed best; nor are its tries two configs
    rows = full(queries=2)
    kept = np.array([0, 0, 1, CONFIGS, CONFIGS])
    some = replace(rows, **{name: getattr(rows, name)[kept] for name in PER_ROW if getattr(rows, name) is not None})
    assert oracle(some) is None
    kept[-1] = CONFIGS + 1
    some = replace(rows, **{name: getattr(rows, name)[kept] for name in PER_ROW if getattr(rows, name) is not None})
    some = replace(some, utility=np.array([0.0, 1.0, 0.6, 0.2, 0.3]))
    assert oracle(some).tolist() == [1, 1]


def test_a_config_that_no_row_tried_leaves_its_policy_without_a_value():
    rows = rows_of()
    kept = rows.config_id != 3
    rows = replace(rows, **{name: getattr(rows, name)[kept] for name in PER_ROW})
    picked = choices(rows.x_QD)
    share = 100 * (picked["bank"] == 3).mean()
    result = evaluate(rows, picked, 100, 0, np.zeros(600, int))
    bank = result.value("bank")
    assert bank.unknown == f"no held-out row tried ef_search=128, picked on {share:.3g} % of queries; log rows with it"
    unknown = (bank.utility, bank.low, bank.quality, bank.cost, bank.latency_p50_us, bank.harm.negative)
    assert all(math.isnan(value) for value in (*unknown, result.bank_gains["default"].low))
    untried = replace(rows, **{name: getattr(rows, name)[rows.config_id != 0] for name in PER_ROW})
    assert "row tried ef_search=16, picked" in Valuation(untried, []).refusal(np.zeros(600, int))
    assert result.value("default").unknown is None and math.isfinite(result.value("default").utility)
    decision = decide(result, GateConfig(min_rows=1), EmbeddingDrift(0.5, 1.0), [])
    assert (
        not decision.promote
        and "the bank has no held-out value: no held-out row tried ef_search=128" in decision.reason
    )


def test_one_policy_that_cannot_be_valued_does_not_make_a_full_table_a_log():
    rows = full()
    result = evaluate(rows, choices(rows.x_QD) | {"champion": np.full(300, -1)}, 100, 0)
    assert result.grade == "exact"
    assert "a config that the table does not have, picked on 100 %" in result.value("champion").unknown


def test_too_few_effective_rows_give_no_value():
    rows = rows_of(queries=60)
    heavy = replace(rows, propensity=np.where(np.arange(60) < 6, 1e-4, 0.5))
    result = evaluate(heavy, choices(rows.x_QD), 100, 0)
    assert "count as much as" in result.value("bank").unknown
    unlogged = evaluate(replace(rows, propensity=None), choices(rows.x_QD), 100, 0)
    assert unlogged.grade == "associational" and unlogged.warnings == []
    few = replace(rows_of(queries=30), propensity=None)
    assert "under 10" in evaluate(few, choices(few.x_QD), 100, 0).value("bank").unknown


def test_the_same_choices_gain_nothing_and_few_differences_gain_little():
    rows = rows_of()
    picked = choices(rows.x_QD)
    nearly = picked["bank"].copy()
    nearly[:3] = 0
    result = evaluate(rows, picked | {"champion": picked["bank"], "reference": nearly}, 100, 0)
    same, few = result.bank_gains["champion"], result.bank_gains["reference"]
    assert (same.gain, same.low, same.high) == (0.0, 0.0, 0.0)
    reach = 3 / 600 * np.ptp(rows.utility)
    assert (few.low, few.high) == pytest.approx((-reach, reach))


def test_propensities_that_cannot_be_true_are_named():
    rows = rows_of("skewed", queries=2000)
    wrong = replace(rows, propensity=np.full(2000, 1 / CONFIGS))
    [warning] = evaluate(wrong, choices(rows.x_QD), 100, 0).warnings
    assert warning.startswith(f"propensity: 1/propensity of {CONFIGS} configs does not add up to the number of")
    assert warning.count("ef_search=") == 3 and "leave the column out" in warning


def test_a_few_floored_propensities_and_configs_tried_too_seldom_have_advice_of_their_own():
    # regression: the advice was "log more queries, or explore more evenly" for two rows with a propensity of 1e-6, and
    # "leave the column out" for a true propensity so low that the config was hardly chosen
    rows = rows_of(queries=2000)
    few = replace(rows, propensity=np.where(np.arange(2000) < 2, 1e-6, rows.propensity))
    found = evaluate(few, choices(rows.x_QD) | {"bank": np.full(2000, rows.config_id[0])}, 100, 0)
    [warning] = found.warnings
    assert found.value("bank").unknown.endswith("or correct the propensities that a warning names")
    assert warning.startswith("propensity: 2 held-out rows have 1e-06 or less, at most 0.012 are expected; log")
    assert warning.endswith("counts as 1,000,000 rows")
    # config 3 is hardly ever chosen in four fifths of the rounds, where config 4 has its share
    later = np.arange(2000) >= 400
    config = np.where(later & (rows.config_id == 3), 4, rows.config_id)
    seldom = np.where(later & (config == 4), 2 / CONFIGS, rows.propensity)
    for least, advice in ((0.001, "raise the least propensity"), (0.1, "leave the column out")):
        seldom[np.flatnonzero(config == 0)[0]] = least
        [warning] = evaluate(replace(rows, config_id=config, propensity=seldom), choices(rows.x_QD), 100, 0).warnings
        assert "of 1 config does not add up" in warning and advice in warning


def test_the_printed_table_fits_a_terminal_and_says_what_is_unknown():
    rows = rows_of()
    log = evaluate(rows, choices(rows.x_QD) | {"logistic per config": np.full(600, -1)}, 100, 0)
    text = evaluation_tables(log)
    assert "ess" in text.splitlines()[0] and "regret" not in text and "self-normalised dr [95 %]" in text
    assert "\nlogistic per config: no held-out row tried a config that the table does not have" in text
    table = full()
    exact = evaluate(table, choices(table.x_QD) | {"oracle": oracle(table)}, 100, 0)
    wide = evaluation_tables(exact)
    assert "regret" in wide.splitlines()[0] and "sure harm" in wide and "snips" not in wide
    assert max(map(len, f"{text}\n{wide}".splitlines())) <= 130


def test_amounts_are_printed_as_the_report_writes_them():
    rows = full()
    slow = replace(rows, latency_us=2.76e6 + 0 * rows.latency_us, cost=16_408.0 + 0 * rows.utility)
    default = evaluation_tables(evaluate(slow, choices(rows.x_QD), 100, 0)).splitlines()[1].split()
    assert default[3:5] == ["16,408", "2,760"]
    # regression: a mean of zeros, estimated up to rounding, was printed as -0.0000
    nothing = 0 * rows.utility - 1e-9
    table = evaluation_tables(evaluate(replace(rows, utility=nothing, quality=nothing), choices(rows.x_QD), 100, 0))
    assert table.splitlines()[1].split()[1:3] == ["0.0000", "0.0000"]


def test_harm_tells_sure_losses_from_noise():
    rows = full(2000, seed=3)
    leaf = np.arange(2000) % 40
    by_config = rows.utility.reshape(-1, CONFIGS).copy()
    # config 1 equals the default, except in 4 of 40 patterns, where it loses
    by_config[:, 1] = by_config[:, 0] + 0.1 * np.random.default_rng(0).normal(size=2000) - 0.3 * (leaf < 4)
    rows = replace(rows, utility=by_config.ravel())
    bank, default = np.where(leaf < 30, 1, 0), np.zeros(2000, int)
    harm = measure_harm(Valuation(rows, [bank, default]), bank, default, leaf)
    assert harm.patterns == 30
    assert harm.sure == pytest.approx(4 / 30)
    assert 0.35 < harm.negative < 0.85
    idle = measure_harm(Valuation(rows, [default]), default, default, leaf)
    assert idle.patterns == 0 and math.isnan(idle.negative)
    unlogged = replace(rows_of(queries=2000), propensity=None)
    assert math.isnan(measure_harm(Valuation(unlogged, [bank, default]), bank, default, leaf).negative)


def test_sure_harm_is_holms_of_one_sided_t_tests():
    # losses rise from pattern to pattern, and patterns differ in size, so that some tests are near the level
    rows, rng = full(2000, seed=4), np.random.default_rng(4)
    leaf = np.repeat(np.arange(40), 11 + np.arange(40) * 2)[:2000]
    by_config = rows.utility.reshape(-1, CONFIGS).copy()
    by_config[:, 1] = by_config[:, 0] + 0.1 * rng.normal(size=2000) - 0.0015 * leaf
    rows = replace(rows, utility=by_config.ravel())
    bank, default = np.ones(2000, int), np.zeros(2000, int)
    gain = by_config[:, 1] - by_config[:, 0]
    p = np.array([stats.ttest_1samp(gain[leaf == one], 0.0, alternative="less").pvalue for one in np.unique(leaf)])
    sure, tenth = ((holm(p) < level).mean() for level in (0.05, 0.1))
    assert 0.1 < sure < tenth
    assert measure_harm(Valuation(rows, [bank, default]), bank, default, leaf).sure == pytest.approx(sure)


def test_sure_harm_is_rare_where_nothing_differs():
    sure = 0
    for seed in range(20):
        rows = rows_of(queries=1500, seed=seed)
        rows = replace(rows, utility=np.random.default_rng(seed).normal(size=1500))
        bank, default = np.ones(1500, int), np.zeros(1500, int)
        sure += measure_harm(Valuation(rows, [bank, default]), bank, default, np.arange(1500) % 10).sure > 0
    # there is any in at most 5 % of worlds: 5 of 20 has a probability of 0.3 %
    assert sure < 5


def test_sure_harm_is_rare_where_what_a_session_asks_is_alike():
    # regression: each query counted as a witness of its own; 15 of 20 such tables showed patterns surely harmed
    sure = 0
    for seed in range(20):
        rows, rng = full(1200, seed=seed), np.random.default_rng(seed)
        session = rng.integers(1, 101, 1200).astype(np.uint64)
        by_config = rows.utility.reshape(-1, CONFIGS).copy()
        by_config[:, 1] = by_config[:, 0] + rng.normal(size=101)[session] + 0.5 * rng.normal(size=1200)
        rows = replace(rows, utility=by_config.ravel(), session_Q=session)
        bank, default, leaf = np.ones(1200, int), np.zeros(1200, int), session.astype(int) % 5
        sure += measure_harm(Valuation(rows, [bank, default]), bank, default, leaf).sure > 0
    # there is any in at most 5 % of worlds: 5 of 20 has a probability of 0.3 %
    assert sure < 5


@pytest.mark.parametrize("lead", [0.0, 0.1], ids=["nothing differs", "the bank is better"])
def test_sure_harm_is_rare_where_the_service_explores_little(lead: float):
    # regression: rows of the default alone made a pattern "judged", so half of its gain was a model's prediction whose
    # error no row showed. A pattern was called surely harmed in 20 of 20 such logs, which kept better banks from
    # promotion
    sure = 0
    for seed in range(20):
        rng = np.random.default_rng(seed)
        rows, leaf = rows_of(queries=1600, seed=seed), np.arange(1600) % 36
        propensity = np.array([0.95 + 0.05 / CONFIGS] + [0.05 / CONFIGS] * (CONFIGS - 1))
        config = rng.choice(CONFIGS, 1600, p=propensity)
        quality = rng.uniform(0.15, 0.75, 36)[leaf] + lead * (config > 0)
        rows = replace(rows, config_id=config, propensity=propensity[config], utility=rng.binomial(10, quality) / 10)
        bank, default = 1 + leaf % (CONFIGS - 1), np.zeros(1600, int)
        sure += measure_harm(Valuation(rows, [bank, default]), bank, default, leaf).sure > 0
    # there is any in at most 5 % of worlds: 5 of 20 has a probability of 0.3 %
    assert sure < 5


def test_rows_of_the_default_alone_tell_nothing_about_what_is_picked():
    rows = rows_of(queries=12)
    config = np.array([0, 0, 0, 0, 1, 0, 0, 1, 1, 2, 0, 0])
    rows = replace(rows, config_id=config, propensity=np.full(12, 0.5))
    bank, default, leaf = np.full(12, 1), np.zeros(12, int), np.repeat([0, 1, 2], 4)
    bank[10:] = 0  # rows that match both picks
    assert telling_rows(Valuation(rows, [bank, default]), bank, default, leaf).tolist() == [0, 2, 0]
    one = np.where(np.arange(12) == 4, 0, config)  # of the pick that the second pattern tried twice, one row is left
    for ran, judged in ((config, 1), (one, 0)):
        tried = replace(rows, config_id=ran)
        assert measure_harm(Valuation(tried, [bank, default]), bank, default, leaf).patterns == judged
    table = full(12)
    assert telling_rows(Valuation(table, [bank, default]), bank, default, leaf).tolist() == [8, 8, 4]


def right_or_wrong(seed: int, queries: int = 200, log: bool = False) -> Outcomes:
    """Outcomes of 1 or 0 of two configs that fail on 1 % and 3 % of the queries, correlated through the same random
    numbers.
    """
    rng = np.random.default_rng(seed)
    rows, luck = rows_of(queries=queries), rng.random(queries)
    query_row, config_id = np.repeat(np.arange(queries), 2), np.tile([0, 1], queries)
    if log:
        query_row, config_id = np.arange(queries), rng.integers(2, size=queries)
    right = (luck[query_row] >= np.array([0.01, 0.03])[config_id]).astype(float)
    ones = np.ones(len(right))
    columns = {"query_row": query_row, "config_id": config_id, "utility": right, "quality": right, "cost": ones}
    return replace(rows, propensity=0.5 * ones if log else None, latency_us=ones, **columns)


@pytest.mark.parametrize("log", [False, True])
def test_failures_that_did_not_come_up_are_not_taken_for_impossible(log):
    # the bank uses the worse config for half of the queries and loses .01. Regression: if none of its failures occurred
    # in the sample, the interval was [0, 0], and the gate promoted 14 % of such banks
    half = (np.arange(200) % 2).astype(int)
    picked = {"default": np.zeros(200, int), "best single config": np.ones(200, int), "bank": half}
    low, covered = [], 0
    for seed in range(60):
        result = evaluate(right_or_wrong(seed, log=log), picked, 200, 0)
        gain = result.bank_gains["default"]
        low.append(gain.low)
        covered += gain.low <= -0.01 <= gain.high
    assert max(low) < -0.005 and covered >= 55


def test_an_interval_holds_what_the_log_had_next_to_no_chance_to_try():
    # on 8 % of the queries the pick has a propensity of .001 and is far worse. Regression: the other queries' weights
    # add up to almost the whole, so that nothing seemed to be missing: only 42 of 58 such intervals contained the truth
    queries, covered, known, plain = 800, 0, 0, rows_of(queries=800)
    picked = np.ones(queries, int)
    for seed in range(60):
        rng = np.random.default_rng(seed)
        hard = rng.random(queries) < 0.08
        propensity, truth = np.where(hard, 0.001, 0.5), np.where(hard, 0.2, 0.8)
        config = (rng.random(queries) < propensity).astype(int)
        right = (rng.random(queries) < np.where(config == 0, 0.7, truth)).astype(float)
        columns = {"query_row": np.arange(queries), "config_id": config, "utility": right, "quality": right}
        logged = np.where(config == 1, propensity, 1 - propensity)
        valuation = Valuation(replace(plain, propensity=logged, cost=right, latency_us=1 + right, **columns), [picked])
        if valuation.refusal(picked) is None:
            low, high = valuation.interval(picked)
            known += 1
            covered += low <= truth.mean() <= high
    assert known >= 50 and covered >= 0.91 * known


def test_what_may_be_missing_counts_for_the_share_of_queries_on_which_two_choices_differ(monkeypatch):
    # all utilities are equal, so that a missing one may differ by 1
    one, other = (np.arange(300) % 2), np.zeros(300, int)
    for rows in (full(), rows_of(queries=300)):
        same = replace(rows, utility=0 * rows.utility + 0.5, quality=0 * rows.quality + 0.5)
        valuation, differs = Valuation(same, [one, other]), (one != other)[rows.query_row]
        if valuation.grade == "exact":
            expected = 0.5 * rare_error(np.ones(150), 1.0)
        else:
            expected = 0.5 * math.hypot(*(rare_error(valuation.weights(c)[differs], 1.0) for c in (one, other)))
        assert valuation.rare(one, other) == pytest.approx(expected)
    # likewise for what no row represents: here a standard error of 3 for each
    monkeypatch.setattr(valuation_module, "unseen_error", lambda *_: 3.0)
    valuation = Valuation(rows, [])
    size = min(effective_size(valuation.weights(c)[differs]) for c in (one, other))
    more = math.hypot(1.5, 1.5, valuation.rare(one, other))
    difference = valuation.estimate("utility", one).over(valuation.estimate("utility", other))
    assert valuation.interval(one, other) == pytest.approx(difference.interval(rows.query_row, size, more))


@pytest.mark.parametrize("first", [True, False])
def test_a_difference_to_what_hardly_ran_is_not_estimated_whichever_is_the_other(first):
    rows = rows_of(queries=600)
    rows.config_id[:] = np.where(np.arange(600) < 5, 5, rows.config_id % 5)
    one, other = np.full(600, 0), np.full(600, 5)
    assert Valuation(rows, []).refusal(one) is None and Valuation(rows, []).refusal(other) is not None
    low, high = Valuation(rows, []).interval(*((one, other) if first else (other, one)))
    assert (low, high) == (-np.ptp(rows.utility), np.ptp(rows.utility))


def test_a_row_that_did_not_match_had_the_chance_that_its_own_choice_left():
    # unless another row of its query matched; computed row by row
    rows = rows_of(queries=40)
    rows = replace(rows, query_row=np.arange(40) // 2, query_id=rows.query_id[:20], x_QD=rows.x_QD[:20])
    rows.propensity[:] = np.random.default_rng(0).uniform(0.1, 0.9, 40)
    valuation = Valuation(rows, [])
    weight = valuation.weights(np.full(20, rows.config_id[0]))
    expected = []
    for n in range(40):
        other = weight[n + 1 - 2 * (n % 2)] > 0
        p = rows.propensity[n]
        expected.append(p if weight[n] > 0 else np.inf if other else 1 - p)
    assert np.isinf(expected).any() and valuation._most(weight).tolist() == expected


def test_without_propensities_a_row_is_held_against_its_configs_mean():
    rows = replace(rows_of(queries=60), propensity=None)
    left = Valuation(rows, [])._unexplained
    for n, (config, utility) in enumerate(zip(rows.config_id, rows.utility, strict=True)):
        assert left[n] == pytest.approx(utility - rows.utility[rows.config_id == config].mean())


def test_choices_whose_quality_never_differs_are_known_as_well_as_wilson_knows():
    rows = right_or_wrong(0)
    rows = replace(rows, quality=(rows.query_row % 2).astype(float))
    rows = replace(rows, utility=rows.quality - 0.1 * rows.config_id)
    picked = {"default": np.ones(200, int), "best single config": np.ones(200, int), "bank": np.zeros(200, int)}
    gain = evaluate(rows, picked, 200, 0).bank_gains["default"]
    assert gain.gain == pytest.approx(0.1)
    assert gain.high - gain.gain == pytest.approx(1.96 * math.sqrt(2) / 200, rel=0.01)


def test_a_value_that_rests_on_propensities_that_contradict_the_log_is_not_promoted():
    # regression: only a warning said that the value is wrong
    rows = rows_of(queries=2000)
    lied = replace(rows, propensity=np.where(rows.config_id == 3, 1.0, rows.propensity))
    picked = choices(rows.x_QD) | {"bank": np.full(2000, 3)}
    for one, misled in ((rows, []), (lied, ["bank"])):
        result = replace(evaluate(one, picked, 100, 0), coverage=1.0)
        assert result.misled == misled
        refusals = decide(result, GateConfig(min_gain=-10.0, min_rows=1), EmbeddingDrift(0.5, 1.0), []).refusals
        assert [("the bank picks do not fit the log" in one) for one in refusals] == [True] * len(misled)


def test_the_queries_of_a_session_count_together():
    # regression: with sessions of 20 queries, most of them of one kind, 95 % intervals of gains from full tables held
    # the truth in 43 % of 200 logs, and those of values in 42 % (with one config per query: 44 %)
    one, asked = full(queries=200), np.repeat(np.arange(200), 4)
    row = (CONFIGS * asked[:, None] + np.arange(CONFIGS)).ravel()
    four = replace(
        one, x_QD=one.x_QD[asked], query_id=np.arange(800, dtype=np.uint64),
        **{name: getattr(one, name)[row] for name in PER_ROW if getattr(one, name) is not None},
    )  # fmt: skip
    four = replace(four, query_row=np.repeat(np.arange(800), CONFIGS))
    session_Q = 7 + asked.astype(np.uint64)

    def gain(rows: Outcomes) -> tuple[float, float]:
        found = evaluate(rows, choices(rows.x_QD), 400, 0).bank_gains["default"]
        return found.gain, found.high - found.low

    assert gain(replace(four, session_Q=session_Q)) == pytest.approx(gain(one), rel=0.05)
    # queries without a session stand alone, also beside one whose number is their row
    assert gain(replace(four, session_Q=np.zeros(800, np.uint64))) == gain(four)
    assert gain(four)[1] == pytest.approx(gain(one)[1] / 2, rel=0.1)
    assert replace(one, session_Q=np.array([0, 1, 2, 1, *196 * [0]], np.uint64)).cluster.max() == 198


def test_a_log_of_few_sessions_is_as_uncertain_as_these_are():
    rows, rng = rows_of(queries=600), np.random.default_rng(0)
    picked = choices(rows.x_QD)

    def gain(session_Q: np.ndarray | None) -> tuple[float, float]:
        found = evaluate(replace(rows, session_Q=session_Q), picked, 100, 0).bank_gains["default"]
        return found.gain, found.high - found.low

    value, width = gain(None)
    # sessions that say nothing: the spread of five sums is right on average, and Student's t allows for its error
    dealt = [gain(1 + rng.permutation(600).astype(np.uint64) % 5) for _ in range(10)]
    assert {found for found, _ in dealt} == {value}
    assert np.mean([wide for _, wide in dealt]) / width == pytest.approx(2.776 / 1.96 * 0.94, rel=0.15)
    assert math.isnan(gain(np.ones(600, np.uint64))[1])
