"""Off-policy values against loops, known truths and their own promises; what a log cannot bear is refused."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from simulate_logs import QUALITY, choices, coverage, truths, world  # noqa: E402

from rb_gpu.bench.decisions import draw  # noqa: E402
from rb_gpu.learn import estimators  # noqa: E402
from rb_gpu.learn.calibration import Promise, compare, measure_calibration  # noqa: E402
from rb_gpu.learn.harm import measure_harm  # noqa: E402
from rb_gpu.learn.outcome_model import folds  # noqa: E402
from rb_gpu.learn.policy import evaluate  # noqa: E402
from rb_gpu.learn.tradeoffs import Point, area, hull  # noqa: E402
from rb_gpu.learn.valuation import Valuation, held_out_outcomes  # noqa: E402


def rounds(seed: int, n: int = 50, configs: int = 4):
    rng = np.random.default_rng(seed)
    return (
        rng.random(n), rng.integers(configs, size=n), rng.integers(configs, size=n), rng.uniform(0.05, 1, n),
        rng.random((n, configs)),
    )  # fmt: skip


@pytest.mark.parametrize("seed", range(3))
def test_estimators_are_their_formulas_read_as_loops(seed: int):
    # on these arrays Open Bandit Pipeline 0.4.1 gives the same five numbers, to the last bit
    reward, chosen, choice, pscore, predicted = rounds(seed)
    total = weight_total = direct = robust = left = 0.0
    for r, a, c, p, said in zip(reward, chosen, choice, pscore, predicted, strict=True):
        w = 1.0 / p if a == c else 0.0
        total, weight_total, direct = total + w * r, weight_total + w, direct + said[c]
        robust, left = robust + said[c] + w * (r - said[a]), left + w * (r - said[a])
    log = (reward, chosen, choice, pscore)
    assert estimators.ips(*log).value == pytest.approx(total / 50)
    assert estimators.snips(*log).value == pytest.approx(total / weight_total)
    assert estimators.direct_method(predicted, choice).value == pytest.approx(direct / 50)
    assert estimators.doubly_robust(*log, predicted).value == pytest.approx(robust / 50)
    expected = direct / 50 + left / weight_total
    assert estimators.self_normalised_doubly_robust(*log, predicted).value == pytest.approx(expected)


def test_influences_are_what_leaving_a_round_out_takes():
    reward, chosen, choice, pscore, predicted = rounds(7, n=400)
    for estimate in (estimators.snips, estimators.ips):
        whole = estimate(reward, chosen, choice, pscore)
        for out in range(20):
            keep = np.arange(400) != out
            taken = whole.value - estimate(reward[keep], chosen[keep], choice[keep], pscore[keep]).value
            assert whole.influence_N[out] / 400 == pytest.approx(taken, abs=1e-5)
    assert estimators.self_normalised_doubly_robust(
        reward, chosen, choice, pscore, predicted
    ).influence_N.mean() == pytest.approx(0, abs=0.05)


def test_arrays_that_cannot_be_are_refused():
    reward, chosen, choice, pscore, predicted = rounds(0)
    with pytest.raises(ValueError, match=r"outside \(0, 1\]"):
        estimators.ips(reward, chosen, choice, pscore - 1.0)
    with pytest.raises(ValueError, match="has shape"):
        estimators.ips(reward, chosen, choice[:-1], pscore)
    with pytest.raises(ValueError, match=r"outside \[0, 4\)"):
        estimators.direct_method(predicted, choice - 9)


def test_nothing_matched_has_no_value():
    reward, chosen, _, pscore, predicted = rounds(0)
    away = (chosen + 1) % 4
    assert np.isnan(estimators.snips(reward, chosen, away, pscore).value)
    assert np.isnan(estimators.self_normalised_doubly_robust(reward, chosen, away, pscore, predicted).value)
    assert estimators.effective_size(np.zeros(4)) == 0.0


@pytest.mark.parametrize("log", ["uniform", "skewed", "confounded"])
def test_intervals_hold_the_truth_as_often_as_they_say(log: str):
    # of 500 logs: python -m tests.simulate_logs
    for name, found in coverage(log, 500, 30).items():
        assert found.known >= 0.9 * found.logs, name
        assert found.held >= 25, f"{name}: {found.held} of {found.known}"  # 95 % gives fewer once in 60 times


def test_a_confounded_log_is_biased_and_its_propensities_mend_it():
    truth = truths()
    rng = np.random.default_rng(0)
    drawn = draw(world(6000, rng)[0], "confounded", 0, rng)
    picks = choices(drawn.x_QD)
    fair = evaluate(held_out_outcomes(drawn, QUALITY), picks, 200, 0)
    naive = evaluate(held_out_outcomes(replace(drawn, propensity=None), QUALITY), picks, 200, 0)
    assert (fair.grade, naive.grade) == ("dr", "associational")
    gain = truth["bank"] - truth["default"]
    assert abs(naive.bank_gains["default"].gain - gain) > 3 * abs(fair.bank_gains["default"].gain - gain)
    assert fair.bank_gains["default"].low < gain < fair.bank_gains["default"].high
    assert naive.value("bank").harm.patterns == 0


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 2**31 - 1))
def test_the_order_of_a_table_does_not_matter(seed: int):
    rng = np.random.default_rng(1)
    drawn = draw(world(200, rng)[0], "uniform", 0, rng)
    order = np.random.default_rng(seed).permutation(len(drawn))
    moved = {
        name: getattr(drawn, name)[order]
        for name in ("config_id", "precision", "recall", "latency_us", "cost", "propensity", "timestamp", "id")
    }
    other = replace(drawn, **moved, query_row=drawn.query_row[order])
    first, second = (
        evaluate(held_out_outcomes(t, QUALITY), choices(t.x_QD), 100, 0, np.arange(200) % 5) for t in (drawn, other)
    )
    assert first.value("bank").utility == pytest.approx(second.value("bank").utility, abs=1e-9)
    assert first.value("bank").harm == second.value("bank").harm
    assert folds(drawn.query_id[order]).tolist() == folds(drawn.query_id)[order].tolist()


def test_what_the_log_never_tried_is_refused_and_named():
    rng = np.random.default_rng(2)
    drawn = draw(world(800, rng)[0], "uniform", 0, rng)
    keep = drawn.config_id != 3
    columns = ("config_id", "precision", "recall", "latency_us", "cost", "propensity", "timestamp", "id", "query_row")
    seen = replace(drawn, rating=drawn.rating[keep], **{name: getattr(drawn, name)[keep] for name in columns})
    picks = choices(seen.x_QD)
    rows = held_out_outcomes(seen, QUALITY)
    result = evaluate(rows, picks, 100, 0)
    share = 100 * (picks["bank"] == 3).mean()
    assert np.isnan(result.value("bank").utility) and np.isnan(result.bank_gains["default"].gain)
    assert f"no held-out row tried ef_search=128, picked on {share:.3g} % of queries" in str(
        result.value("bank").unknown
    )
    assert result.value("default").unknown is None


def test_few_matching_rows_are_no_value():
    rng = np.random.default_rng(3)
    drawn = draw(world(60, rng)[0], "skewed", 0, rng)
    rare = int(np.bincount(drawn.config_id, minlength=6).argmin())
    rows = held_out_outcomes(drawn, QUALITY)
    refusal = Valuation(rows, [np.full(60, rare)]).refusal(np.full(60, rare))
    assert refusal is not None and ("under 10" in refusal or "no held-out row tried" in refusal)


def test_propensities_that_cannot_be_are_told():
    rng = np.random.default_rng(4)
    drawn = draw(world(3000, rng)[0], "uniform", 0, rng)
    assert drawn.propensity is not None
    rows = held_out_outcomes(drawn, QUALITY)
    assert Valuation(rows, [rows.config_id * 0]).warnings() == []
    halved = held_out_outcomes(replace(drawn, propensity=drawn.propensity / 2), QUALITY)
    warnings = Valuation(halved, [rows.config_id * 0]).warnings()
    assert len(warnings) == 6 and "adds up to 2" in warnings[0]


def test_harm_is_found_where_it_was_planted():
    table, expected = world(3000, np.random.default_rng(5))
    rows = held_out_outcomes(table, QUALITY)
    leaf = np.arange(3000) % 10
    default = np.zeros(3000, int)
    best, worst = expected.argmax(1), expected.argmin(1)
    choice = np.where(leaf < 3, worst, np.where(leaf < 8, best, default))
    harm = measure_harm(Valuation(rows, [choice, default]), choice, default, leaf)
    # the worst config of a query is the default itself on most: in one of the three patterns the loss is not sure
    assert (harm.patterns, harm.negative) == (8, 3 / 8) and harm.sure in (2 / 8, 3 / 8)


def test_the_area_under_two_models_is_routellms():
    weak, strong = Point("weak", 1.0, 0.4, False), Point("strong", 3.0, 0.8, False)
    even = area([weak, strong], weak, strong)
    assert (even.aiq, even.apgr) == (pytest.approx(0.6), pytest.approx(0.5))
    better = Point("bank", 2.0, 0.75, False)
    cost, quality = hull([strong, better, Point("poor", 2.0, 0.5, False), weak])
    assert cost.tolist() == [1.0, 2.0, 3.0] and quality.tolist() == [0.4, 0.75, 0.8]
    found = area([weak, strong, better], weak, strong)
    assert found.aiq == pytest.approx((0.4 + 0.75) / 4 + (0.75 + 0.8) / 4)
    steps = np.interp(1 + 2 * (np.arange(10) + 0.5) / 10, cost, quality)
    assert found.apgr == pytest.approx(((steps - 0.4) / 0.4).mean())


def test_a_right_confidence_is_called_calibrated_and_a_boast_is_not():
    rng = np.random.default_rng(6)
    foretold = rng.uniform(0.5, 1, 600)
    right = compare(foretold, rng.random(600) < foretold, 0)
    assert right.ece <= right.chance < 0.1 and right.patterns == 600
    boast = compare(foretold, rng.random(600) < 0.5, 0)
    assert boast.ece > 2 * boast.chance and boast.brier > right.brier
    assert np.mean(boast.foretold) - np.mean(boast.seen) == pytest.approx(boast.ece, abs=0.05)


@pytest.mark.parametrize("boast", [1.0, 20.0], ids=["right", "boasting"])
def test_confidence_is_held_against_held_out_means(boast: float):
    # 200 patterns of 30 queries; each pattern's gain is known up to .05, or claimed to be known 20 times as well
    rng = np.random.default_rng(7)
    table, _ = world(6000, rng)
    leaf = np.arange(6000) % 200
    expected = rng.normal(0.03, 0.05, 200)
    true = expected + 0.05 * rng.normal(size=200)
    quality = np.full((6000, 6), 0.5)
    quality[:, 1] += true[leaf]
    quality = (quality + 0.1 * rng.normal(size=(6000, 6))).ravel().astype(np.float32)
    rows = held_out_outcomes(replace(table, precision=quality, recall=quality), QUALITY)
    acts = (expected > 0)[leaf]
    choice = acts.astype(int)
    from scipy.stats import norm

    sd = 0.05 / boast
    promise = Promise(norm.cdf(expected / sd)[leaf] * acts, expected[leaf] * acts, np.zeros(6000))
    found = measure_calibration(Valuation(rows, [choice]), choice, np.zeros(6000, int), leaf, promise, 0)
    assert found is not None and found.patterns == (expected > 0).sum()
    assert (found.ece <= found.chance) == (boast == 1.0)
