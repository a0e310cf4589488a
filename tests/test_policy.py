"""Values of policies against brute force, and the gate."""

from __future__ import annotations

import math
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from test_verdicts import table

from rb_gpu.errors import DataError
from rb_gpu.learn.config import EvalConfig
from rb_gpu.learn.drift import EmbeddingDrift
from rb_gpu.learn.evaluation import check_cost, doubts
from rb_gpu.learn.evidence import gather_evidence, row_weights
from rb_gpu.learn.gate import decide
from rb_gpu.learn.harm import UNKNOWN_HARM, Harm
from rb_gpu.learn.policy import SINGLE, Evaluation, Gain, PolicyValue, best_single, evaluate, oracle, value_bank
from rb_gpu.learn.report.worth import policy_tables
from rb_gpu.learn.requirements import broken
from rb_gpu.learn.valuation import held_out_outcomes
from rb_gpu.learn.version_config import GateConfig
from rb_gpu.objective import Objective
from rb_gpu.publish import without_nan

QUALITY = Objective("utility", "f1", 0.0, 0.0, 1.0, 1.0, 0.95, None, None)
CALM = EmbeddingDrift(0.5, 1.0)


def policies(rows, bank):
    n = len(rows.query_id)
    return {"default": np.zeros(n, int), SINGLE: np.full(n, 1), "bank": np.asarray(bank)}


def test_a_full_table_is_valued_exactly():
    table_ = table(seed=1, n=600, configs=3, effect=[0, 0.05, 0.02], full=True)
    rows = held_out_outcomes(table_, QUALITY)
    choice = np.arange(200) % 3
    chosen = policies(table_, choice)
    chosen["oracle"] = oracle(rows)
    result = evaluate(rows, chosen, 300, 0)
    by_query = rows.utility.reshape(200, 3)
    assert result.grade == "exact"
    assert result.value("bank").utility == pytest.approx(by_query[np.arange(200), choice].mean())
    assert result.value("oracle").utility == pytest.approx(by_query.max(1).mean())
    assert result.value("bank").acted == pytest.approx((choice != 0).mean())
    gap = by_query.max(1).mean() - by_query[:, 1].mean()
    expected = (result.value("bank").utility - by_query[:, 1].mean()) / gap
    assert result.value("bank").captured == pytest.approx(expected)
    assert result.bank_gains["default"].gain == pytest.approx(result.value("bank").utility - by_query[:, 0].mean())


def test_intervals_are_paired():
    # queries differ far more than configs: an unpaired interval would be ten times as wide
    table_ = table(seed=2, n=900, configs=3, effect=[0, 0.1, 0], full=True)
    rows = held_out_outcomes(table_, QUALITY)
    result = evaluate(rows, policies(table_, np.ones(300, int)), 500, 0)
    gain = result.bank_gains["default"]
    difference = rows.utility.reshape(300, 3)[:, 1] - rows.utility.reshape(300, 3)[:, 0]
    half = 1.96 * difference.std() / math.sqrt(300)
    assert gain.high - gain.low == pytest.approx(2 * half, rel=0.15)
    assert result.bank_gains[SINGLE].gain == 0.0


def test_logged_propensities_make_a_skewed_log_fair():
    # the log tries config 1 mostly on hard queries, so that its plain mean looks bad
    rng = np.random.default_rng(3)
    n = 20_000
    table_ = table(seed=3, n=n, configs=2)
    hard = rng.random(n) < 0.5
    p_one = np.where(hard, 0.9, 0.1)
    config = (rng.random(n) < p_one).astype(np.int64)
    quality = np.clip(0.7 - 0.4 * hard + 0.1 * config + 0.05 * rng.normal(size=n), 0, 1).astype(np.float32)
    propensity = np.where(config == 1, p_one, 1 - p_one).astype(np.float32)
    logged = {"config_id": config, "precision": quality, "recall": quality, "propensity": propensity}
    table_ = table_.__class__(**{**table_.__dict__, **logged})
    result = evaluate(held_out_outcomes(table_, QUALITY), policies(table_, np.ones(n, int)), 200, 0)
    gain = result.bank_gains["default"]
    assert result.grade == "dr"
    assert gain.gain == pytest.approx(0.1, abs=0.02)
    assert quality[config == 1].mean() < quality[config == 0].mean()
    unlogged = table_.__class__(**{**table_.__dict__, "propensity": None})
    assert evaluate(held_out_outcomes(unlogged, QUALITY), policies(unlogged, np.ones(n, int)), 200, 0).grade == (
        "associational"
    )


def test_a_choice_that_no_row_tried_has_no_value():
    table_ = table(seed=4, n=300, configs=3, full=True)
    result = evaluate(held_out_outcomes(table_, QUALITY), policies(table_, np.full(100, -1)), 100, 0)
    assert math.isnan(result.value("bank").utility)
    assert result.value("bank").matched == 0
    assert math.isnan(result.bank_gains["default"].low)


def test_best_single_is_the_best_mean():
    table_ = table(seed=5, n=3000, configs=4, effect=[0, 0.02, 0.1, 0.01])
    evidence = gather_evidence(table_, torch.zeros(3000, dtype=int), 1, row_weights(table_, None), torch.device("cpu"))
    assert best_single(evidence, QUALITY) == 2


def test_a_few_lucky_rows_are_no_best_single_config():
    # regression: three rows of quality 1 made a config that no held-out row tried the baseline of the whole report
    table_ = table(seed=5, n=3000, configs=4, effect=[0, 0.02, 0.1, 0.01])
    lucky = table_.config_id.copy()
    lucky[lucky == 3] = 0
    lucky[:3] = 3
    quality = table_.precision.copy()
    quality[:3] = 1.0
    table_ = replace(table_, config_id=lucky, precision=quality, recall=quality)
    evidence = gather_evidence(table_, torch.zeros(3000, dtype=int), 1, row_weights(table_, None), torch.device("cpu"))
    assert best_single(evidence, QUALITY) == 2
    few = table_.select_queries(np.arange(3000) < 3)
    evidence = gather_evidence(few, torch.zeros(3, dtype=int), 1, row_weights(few, None), torch.device("cpu"))
    assert best_single(evidence, QUALITY) == 3


@pytest.mark.parametrize(
    ("over_default", "over_champion", "promoted"),
    [
        (Gain(-0.3, -0.35, -0.25), Gain(0.0, -0.001, 0.001), False),
        (Gain(-0.3, -0.35, -0.25), Gain(0.1, 0.05, 0.15), True),
        (Gain(-0.3, -0.65, 0.05), Gain(0.0, -0.001, 0.001), True),
    ],
)
def test_a_champion_that_is_surely_worse_than_the_default_lets_nothing_as_bad_pass(
    over_default, over_champion, promoted
):
    evaluation = replace(judged({}, {}), bank_gains={"default": over_default, "champion": over_champion})
    decision = decide(evaluation, GateConfig(), CALM, [])
    assert decision.promote is promoted
    assert promoted or "surely worse, and not surely better than the champion; serve the default" in decision.reason


def test_what_is_surely_worse_than_the_default_is_not_the_first_to_be_served():
    # regression: gate.min_gain=-0.005 let a bank pass that significantly lost .0015, although nothing was served before
    for gain, promoted in ((Gain(-0.0015, -0.0027, -0.0005), False), (Gain(-0.0015, -0.0032, 0.0002), True)):
        decision = decide(replace(judged({}, {}), bank_gains={"default": gain}), GateConfig(), CALM, [])
        assert decision.promote is promoted
        assert promoted or "surely worse; serve the default" in decision.reason


def test_what_a_gain_over_the_default_says_little_of_is_told():
    # regression: it said "promoted: held-out gain over the default +0.0000", for a default that nobody runs
    nothing = replace(judged({"acted": 0.0}), bank_gains={"default": Gain(0.0, 0.0, 0.0)})
    reason = decide(nothing, GateConfig(), CALM, [], experiment=True).reason
    said = "; the bank answers all held-out queries with the default; params.default=auto took the default from"
    assert f"{said} an experiment: set params.default to what runs today" in reason
    assert decide(judged({}), GateConfig(), CALM, []).reason.endswith("above gate.min_gain=-0.005")
    # if there is a champion, the default does not matter
    assert decide(judged({"acted": 0.0}, {}), GateConfig(), CALM, [], experiment=True).reason.endswith("=-0.005")


def test_a_default_that_breaks_the_objective_is_nothing_to_be_worse_than():
    # regression: a default that breaks the bound or floor spends what is not allowed, and every later candidate was
    # refused
    gains = {"default": Gain(-0.3, -0.35, -0.25), "champion": Gain(0.0, -0.001, 0.001)}
    evaluation = replace(judged({}, {}), bank_gains=gains, broken={"default": "held-out cost 10 is over it"})
    assert decide(evaluation, GateConfig(), CALM, []).promote


@pytest.mark.parametrize(
    ("kind", "value", "without_cost", "direction"),
    [
        ("utility", [0.8 - 0.1 * 2 - 0.2 * 0.5, 0.8 - 0.1 * 2], 0.8 - 0.1 * 2, [1.0, 0.0, -0.1, -0.05]),
        ("bound", [0.8, 0.8], 0.8, [1.0, 0.0, 0.0, 0.0]),
        ("floor", [-0.5, 0.0], -2.0, [1.0, 0.0, 0.0, 0.0]),  # a free config does not hide what the others cost
    ],
)
def test_what_an_objective_counts(kind, value, without_cost, direction):
    objective = Objective(kind, "f1", 0.1, 0.2, 1000.0, 4.0, 0.95, None, None)
    quality, latency_us = np.array([0.8, 0.8]), np.array([4000.0, 4000.0])
    assert objective.utility(quality, latency_us, np.array([2.0, 0.0])) == pytest.approx(value)
    assert objective.utility(quality, latency_us, np.zeros(2)) == pytest.approx([without_cost] * 2)
    assert objective.direction == pytest.approx(direction)  # of f1, product, log2_latency and cost


@pytest.mark.parametrize(
    ("effect", "gate", "refusal", "promoted", "says"),
    [
        (0.1, GateConfig(), None, True, "above gate.min_gain"),
        (-0.1, GateConfig(), None, False, "not above gate.min_gain=-0.005; keep what is served, or log more rows"),
        (0.1, GateConfig(min_gain=0.5), None, False, "not above"),
        (
            0.1,
            GateConfig(min_rows=10_000),
            None,
            False,
            "under gate.min_rows=10000; log more rows, or let the service try fewer",
        ),
        (0.1, GateConfig(), "the champion's dim is 3", False, "dim is 3"),
    ],
)
def test_the_gate_promotes_only_what_is_better(effect, gate, refusal, promoted, says):
    table_ = table(seed=6, n=900, configs=2, effect=[0, effect], full=True)
    evaluation = evaluate(held_out_outcomes(table_, QUALITY), policies(table_, np.ones(450, int)), 200, 0)
    decision = decide(evaluation, gate, CALM, [refusal] if refusal else [])
    assert decision.promote is promoted
    assert says in decision.reason


def test_a_log_of_one_config_per_query_is_advised_to_explore():
    # regression: nights of a service that explored 5 % were told to log more rows only, which would have taken months
    unsure = replace(judged({}), bank_gains={"default": Gain(0.001, -0.02, 0.02)})
    assert "about 13 times the queries would narrow it enough" in decide(unsure, GateConfig(), CALM, []).reason
    logged = decide(replace(unsure, grade="dr"), GateConfig(), CALM, []).reason
    assert "about 13 times the queries, or about 13 times the exploration, would narrow it enough" in logged
    # an interval 13 times as narrow by its square has its lower bound above gate.min_gain, one of 12 times has not
    assert 0.001 - 0.021 / 13**0.5 > -0.005 > 0.001 - 0.021 / 12**0.5
    hopeless = replace(unsure, bank_gains={"default": Gain(-0.0049, -0.02, 0.01)})
    assert "more than 100 times the queries" in decide(hopeless, GateConfig(), CALM, []).reason
    unknown = replace(unsure, bank_gains={"default": Gain(0.1, math.nan, math.nan)})
    assert "keep what is served, or log more rows" in decide(unknown, GateConfig(), CALM, []).reason
    worse = replace(unsure, grade="dr", bank_gains={"default": Gain(-0.01, -0.02, 0.0)})
    assert "keep what is served, or log more rows with more exploration" in decide(worse, GateConfig(), CALM, []).reason


def judged(bank: dict, champion: dict | None = None, coverage: float = 1.0) -> Evaluation:
    """An evaluation with a significant gain; the arguments replace values of otherwise faultless policies."""
    base = PolicyValue("", *(0.5,) * 4, 500.0, 1000.0, 2000.0, *(1.0,) * 5, 1000, 1000.0, Harm(20, 0.5, 0.0), {}, None)
    values = [replace(base, name="default"), replace(base, name="bank", **bank)]
    gains = {"default": Gain(0.1, 0.05, 0.15)}
    if champion is not None:
        values.append(replace(base, name="champion", **champion))
        gains["champion"] = Gain(0.1, 0.05, 0.15)
    return Evaluation("exact", 1000, 1000, values, gains, coverage=coverage)


@pytest.mark.parametrize(
    ("evaluation", "drift", "says"),
    [
        (judged({}), CALM, None),
        (judged({"latency_p95_us": 5000.0}), CALM, None),
        (judged({"latency_p95_us": 5100.0}), CALM, "5.1 times that of the default, over gate.max_p95_latency_ratio=5"),
        # regression: for a floor it advised a setting that a floor does not use
        (judged({"latency_p95_us": 5100.0}), CALM, "(with judge.objective=floor: lower judge.target)"),
        (judged({"latency_p95_us": 5100.0}, {"latency_p95_us": 5000.0}), CALM, None),
        (judged({"latency_p95_us": 5100.0, "matched": 120}, {"matched": 99}), CALM, None),  # the p95 of too few rows
        (judged({"latency_p95_us": math.nan}), CALM, None),
        (judged({"harm": Harm(20, 0.9, 0.2)}), CALM, None),
        (judged({"harm": Harm(20, 0.9, 0.25)}), CALM, "of 20 patterns in which the bank acts, 25 % are surely harmed"),
        (judged({"harm": Harm(20, 0.9, 0.25)}, {"harm": Harm(20, 0.9, 0.25)}), CALM, None),
        (judged({"harm": Harm(20, 0.9, 0.25)}, {}), CALM, "over gate.max_harm_rate=0.2"),
        (judged({"harm": UNKNOWN_HARM}), CALM, None),
        (judged({}, coverage=0.5), CALM, None),
        (judged({}, coverage=0.49), CALM, "49 % of the held-out queries are near a pattern, under gate.min_coverage"),
        (judged({}, coverage=math.nan), CALM, None),
        (judged({}), EmbeddingDrift(0.99, 1e-9), "with AUC 0.99, over gate.max_drift=0.95"),
        (judged({}), EmbeddingDrift(0.99, 0.5), None),
        (judged({}), EmbeddingDrift(math.nan, math.nan), None),
    ],
)
def test_every_guardrail_refuses_what_breaks_it_and_nothing_else(evaluation, drift, says):
    decision = decide(evaluation, GateConfig(), drift, [])
    assert decision.promote == (says is None) == (not decision.refusals)
    assert says is None or says in decision.reason


def test_every_reason_is_told():
    harmful = {"latency_p95_us": 9000.0, "harm": Harm(4, 1.0, 1.0), "matched": 200, "unknown": "few rows"}
    evaluation = judged(harmful, {}, coverage=0.1)
    decision = decide(evaluation, GateConfig(min_rows=201), EmbeddingDrift(1.0, 0.0), [])
    named = ("min_rows", "has no held-out value: few rows", "max_harm_rate", "min_coverage", "max_drift")
    assert len(decision.refusals) == len(named)
    assert all(name in refusal for name, refusal in zip(named, decision.refusals, strict=True))
    assert decision.reason == "; ".join(decision.refusals)
    decision = decide(evaluation, GateConfig(), CALM, ["the champion's dim is 3, not 4 as the candidate's", "and more"])
    assert [refusal.split(";")[0].split(",")[0] for refusal in decision.refusals[:2]] == [
        "the champion's dim is 3", "and more"]  # fmt: skip
    assert any("max_p95_latency_ratio" in refusal for refusal in decision.refusals)


def test_a_cost_that_was_not_logged_is_not_known(learned):
    bank = learned.bank.bank()
    single = best_single(bank.data.evidence, bank.data.objective)
    table = replace(learned.trajectories, cost=None)
    values = value_bank(bank, table, single, EvalConfig(bootstrap=100), 0, brief=True).values
    assert all(np.isnan(value.cost) for value in values), "0 would be an amount"
    assert np.isfinite([value.quality for value in values]).all()
    logged = value_bank(bank, learned.trajectories, single, EvalConfig(bootstrap=100), 0, champion=bank, brief=True)
    assert np.isfinite([value.cost for value in logged.values]).all()
    served = logged.value("champion")
    assert (served.utility, served.acted) == (logged.value("bank").utility, logged.value("bank").acted)
    assert logged.bank_gains["champion"].gain == 0.0


def test_a_table_without_the_cost_that_a_utility_counts_is_refused(learned):
    # regression: its cost was taken as 0, and the gain over the default was printed twice too large
    bank, table = learned.bank.bank(), learned.trajectories
    check_cost(bank, table, "artifacts/champion")
    with pytest.raises(
        DataError, match=r"has no column cost, which the utility .* subtracts by judge\.cost_weight=0\.2"
    ):
        check_cost(bank, replace(table, cost=None), "artifacts/champion")


def test_what_of_a_table_does_not_fit_the_artifact_is_said(learned):
    bank, table = learned.bank.bank(), learned.trajectories
    [old] = doubts(bank, table)
    assert old.startswith("4,000 of 4,000 queries are no newer than the artifact's newest training query")
    newer = replace(table, query_time=table.query_time + 10_000)
    assert doubts(bank, newer) == []
    # all rows have one ef_search, as if the column were missing; regression: it said "log some" about unnamed configs
    configs = replace(table.configs, ef_search=np.full(5, 64, np.uint32))
    [missing] = doubts(bank, replace(newer, configs=configs))
    assert missing.startswith("no row tried ef_search=16 n_probes=1 ") and "and 1 more, so a policy that" in missing
    assert missing.endswith("; all rows have ef_search=64: is that column missing?")


def rows_at(quality, cost, n=300):
    """A full table of n queries: configs with these mean qualities and costs, and latencies of 1 ms, 2 ms and so on."""
    configs = len(quality)
    table_ = table(seed=8, n=n * configs, configs=configs, full=True)
    right = np.random.default_rng(8).random((n, 1)) < np.array(quality)
    flat = right.astype(np.float32).ravel()
    latency_us = np.tile(1000 * (1 + np.arange(configs)), n)
    cost = np.tile(np.float32(cost), n)
    return replace(table_, precision=flat, recall=flat, cost=cost, latency_us=latency_us)


FLOOR = Objective("floor", "f1", 0.0, 0.0, 1000.0, 10.0, 0.8, None, None)
BOUND = Objective("bound", "f1", 0.0, 0.0, 1000.0, 10.0, 0.95, 2500.0, 4.5)


def test_the_best_single_config_keeps_what_the_objective_asks():
    # regression: it was the config of highest quality, which costs most, as the baseline of a bank that has to spend
    # less
    table_ = rows_at([0.5, 0.85, 0.9, 0.95], [1.0, 2.0, 4.0, 10.0])
    evidence = gather_evidence(table_, torch.zeros(300, dtype=int), 1, row_weights(table_, None), torch.device("cpu"))
    assert best_single(evidence, FLOOR) == 1
    assert best_single(evidence, replace(FLOOR, target=0.999)) == 3
    assert best_single(evidence, BOUND) == 1
    assert best_single(evidence, replace(BOUND, max_latency_us=None)) == 2
    assert best_single(evidence, replace(BOUND, max_cost=0.5)) == 3


@pytest.mark.parametrize(
    ("objective", "default", "bank", "promoted", "says"),
    [
        (FLOOR, 3, 1, True, "gain over the default +0.8"),  # regression: refused, because quality falls, as intended
        (FLOOR, 1, 3, False, "gain over the default -0.8"),
        (FLOOR, 3, 0, False, "the bank's held-out quality 0.5"),
        (FLOOR, 0, 1, True, "no gain over the default is required, as its held-out quality 0.5"),
        # regression: it said only "surely worse; serve the default" of a default whose quality was under the target
        (replace(FLOOR, target=0.88), 1, 3, False, "surely worse; yet the default's held-out quality 0.8"),
        (BOUND, 0, 1, True, "gain over the default +0.3"),
        (BOUND, 1, 3, False, "the bank's held-out cost 10 is over judge.max_cost=4.5"),
        (BOUND, 1, 2, False, "the bank's held-out p95 latency 3000 us is over judge.max_latency_us=2500"),
        (BOUND, 3, 1, True, "over the default is required, as its held-out cost 10 is over judge.max_cost=4.5"),
        (BOUND, 1, 0, False, "gain over the default -0.3"),
    ],
)
def test_the_gate_asks_for_what_the_objective_asks(objective, default, bank, promoted, says):
    table_ = rows_at([0.5, 0.85, 0.9, 0.95], [1.0, 2.0, 4.0, 10.0])
    rows = held_out_outcomes(table_, objective)
    chosen = {"default": np.full(300, default), SINGLE: np.full(300, 1), "bank": np.full(300, bank)}
    evaluation = evaluate(rows, chosen, 200, 0)
    breaks, doubts = broken(objective, evaluation, rows, lambda other: evaluate(other, chosen, 200, 0))
    decision = decide(replace(evaluation, broken=breaks, doubtful=doubts), GateConfig(), CALM, [])
    assert decision.promote is promoted and says in decision.reason


def test_a_report_of_a_default_that_has_no_value_is_drawn():
    # regression: if no held-out row tried the default, every training ended in a traceback after all the learning
    table_ = table(seed=4, n=300, configs=3, full=True)
    chosen = policies(table_, np.full(100, 2)) | {"default": np.full(100, -1)}
    evaluation = evaluate(held_out_outcomes(table_, QUALITY), chosen, 100, 0)
    worth = policy_tables(without_nan(asdict(evaluation)))[0]
    assert len(worth.rows) == 3 and not any("class=zero" in row[2] for row in worth.rows)
    assert any("class=whisker" in row[2] for row in worth.rows)
