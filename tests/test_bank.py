"""Lookup, feedback and reload of a bank, compared with scalar implementations of the design."""

from __future__ import annotations

import copy
import logging
import math
import pickle
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from conftest import OBJECTIVE, TIERS, A, B, make_bank, queries_near, trajectory

from rb_gpu import batch
from rb_gpu.bank import ReasoningBank
from rb_gpu.bank_data import BankData
from rb_gpu.errors import ArtifactError
from rb_gpu.evidence import OUTCOMES
from rb_gpu.params import ConfigTable, SearchParams
from rb_gpu.prometheus import bank_metrics
from rb_gpu.publish import write_artifact
from rb_gpu.registry import Registry
from rb_gpu.trajectory_file import read_batches
from rb_gpu.trajectory_log import TrajectoryLog
from rb_gpu.types import ParamSource, Tradeoff, UserFeedback
from rb_gpu.usage import REMEMBERED_TRAJECTORIES

PARAMETERS = ("ef_search", "n_probes", "model_tier", "context_tokens", "temperature")


def nearest_leaves(data: BankData, query: np.ndarray) -> list[tuple[float, int]]:
    """(cosine, row) of the top_k nearest leaves, best first, in float64."""
    unit = query.astype(np.float64) / np.linalg.norm(query.astype(np.float64))
    leaves = data.arrays["centroids"][: data.leaves].astype(np.float64)
    cosines = [(float(unit @ leaf / np.linalg.norm(leaf)), row) for row, leaf in enumerate(leaves)]
    return sorted(cosines, key=lambda pair: -pair[0])[: data.lookup.top_k]


def scalar_vote(data: BankData, query: np.ndarray) -> dict[str, Any]:
    """The vote of design section 7, Lookup, computed one number at a time."""
    near = [(cosine, row) for cosine, row in nearest_leaves(data, query) if cosine >= data.lookup.floor]
    if near:
        weights = [math.exp(data.lookup.beta * cosine) for cosine, _ in near]
        voters = [(weight / sum(weights), row) for weight, (_, row) in zip(weights, near, strict=True)]
    else:
        voters = [(1.0, data.leaves)]  # the row for queries near no pattern

    def mixed(name: str, config: int) -> float:
        return sum(weight * float(data.arrays[name][row, config]) for weight, row in voters)

    chosen, best = data.default, -math.inf
    for config in range(len(data.configs)):
        if mixed("probability", config) >= data.lookup.min_probability and mixed("score", config) > best:
            chosen, best = config, mixed("score", config)
    if best == -math.inf and data.lookup.likeliest:
        chosen = max(range(len(data.configs)), key=lambda config: mixed("expected_quality", config))
    default = chosen == data.default
    return {
        "config_id": chosen,
        "confidence": 0.0 if default else mixed("probability", chosen),
        "expected_quality": mixed("expected_quality", chosen),
        "expected_gain": 0.0 if default else mixed("gain", chosen),
        "pattern_id": -1 if default or not near else int(data.arrays["pattern_id"][near[0][1]]),
    }


def assert_same(left: dict[str, np.ndarray], right: dict[str, np.ndarray], rtol: float = 1e-4) -> None:
    assert left.keys() == right.keys()
    for name, column in left.items():
        if column.dtype.kind == "f":
            np.testing.assert_allclose(column, right[name], rtol=rtol, atol=1e-6, err_msg=name)
        else:
            np.testing.assert_array_equal(column, right[name], err_msg=name)


# Vote


@pytest.mark.parametrize(("seed", "likeliest"), [(0, False), (1, False), (2, False), (0, True)])
def test_vote_equals_its_scalar_reading(seed: int, likeliest: bool) -> None:
    data = make_bank(seed=seed)
    data = replace(data, lookup=replace(data.lookup, likeliest=likeliest))
    queries, bank = queries_near(data, 200, seed), ReasoningBank(data)
    batch = bank.optimized_params_batch(queries)
    expected = [scalar_vote(data, query) for query in queries]
    for name in expected[0]:
        np.testing.assert_allclose(batch[name], [row[name] for row in expected], rtol=1e-4, atol=1e-6, err_msg=name)
    assert [bank.optimized_params(query).config_id for query in queries] == batch["config_id"].tolist()
    # the test covers all kinds of answers
    assert likeliest or (set(batch["config_id"]) >= {data.default} and len(set(batch["config_id"])) >= 4)
    none_near = [nearest_leaves(data, query)[0][0] < data.lookup.floor for query in queries]
    assert 5 < sum(none_near) < 150


def test_a_query_that_is_near_nothing_is_answered_by_what_is_known_of_all(data: BankData) -> None:
    arrays = {name: array.copy() for name, array in data.arrays.items()}
    arrays["probability"][-1, 4], arrays["score"][-1, 4], arrays["gain"][-1, 4] = 0.9, 0.5, 0.25
    far = replace(data, arrays=arrays, lookup=replace(data.lookup, floor=1.5))
    answer = ReasoningBank(far).optimized_params(queries_near(data, 1)[0])
    assert answer.config_id == 4 and answer.confidence == pytest.approx(0.9)
    assert answer.expected_gain == 0.25 and answer.source.pattern_id is None
    assert answer.reason.endswith("as none is near")


def test_probability_has_to_reach_the_least_one_asked_for(data: BankData) -> None:
    arrays = {name: array.copy() for name, array in data.arrays.items()}
    arrays["probability"][:] = 0.75
    arrays["probability"][:, data.default] = 0
    query = data.arrays["centroids"][0]
    for least, default in ((0.75, False), (0.7501, True)):
        lookup = replace(data.lookup, min_probability=least)
        answer = ReasoningBank(replace(data, arrays=arrays, lookup=lookup)).optimized_params(query)
        assert (answer.config_id == data.default) == default != answer.source.has_pattern
        assert answer.confidence == pytest.approx(0 if default else 0.75)


def test_what_is_sure_is_no_more_than_sure_and_what_is_just_at_the_floor_is_near(data: BankData) -> None:
    arrays = {name: array.copy() for name, array in data.arrays.items()}
    arrays["centroids"][: data.leaves] = np.eye(data.dim, dtype=np.float32)[: data.leaves]
    arrays["probability"][:] = 1.0
    arrays["score"][:, 4] = 9.0
    wide, exact = (
        ReasoningBank(replace(data, arrays=arrays, lookup=replace(data.lookup, floor=floor, top_k=12)))
        for floor in (-1.0, 1.0)
    )
    queries = np.random.default_rng(0).normal(size=(200, data.dim)).astype(np.float32)
    # float32 shares can add up to slightly more than 1
    assert max(wide.optimized_params(query).confidence for query in queries) == 1.0
    assert wide.optimized_params_batch(queries)["confidence"].max() == 1.0
    alike = 2.0 * arrays["centroids"][: data.leaves]
    nearest = [exact.optimized_params(query).source.pattern_id for query in alike]
    assert nearest == exact.optimized_params_batch(alike)["pattern_id"].tolist() == list(range(100, 112))


@pytest.mark.parametrize(("told", "expected"), [(1.25, 1.0), (-0.25, 0.0), (0.75, 0.75)])
def test_expected_quality_is_a_share(data: BankData, told: float, expected: float) -> None:
    # regression: the leaf's quality plus the field's shift exceeded 1; 415 of the sample's 8,000 queries got such
    # qualities, up to 1.113
    arrays = {name: array.copy() for name, array in data.arrays.items()}
    arrays["expected_quality"][:] = told
    bank, queries = ReasoningBank(replace(data, arrays=arrays)), queries_near(data, 60)
    answers = [bank.optimized_params(query) for query in queries]
    assert len({answer.reason for answer in answers}) > 2
    answers += [bank.optimized_params(np.zeros(bank.dim), on_error="default")]
    found = [answer.expected_quality for answer in answers]
    for column in (np.array(found), bank.optimized_params_batch(queries)["expected_quality"]):
        np.testing.assert_allclose(column, expected, atol=1e-6)
        assert column.min() >= 0 and column.max() <= 1
    for query in queries:
        answer = bank.optimized_params(query, mode="interpolate")
        assert 0 <= answer.expected_quality <= 1


@pytest.mark.parametrize("length", [1e-25, 1e-9, 0.3, 7.0, 1e9, 1e25])
def test_the_length_of_a_query_changes_nothing(data: BankData, length: float) -> None:
    # both for queries near a pattern and for queries that the floor declares near none
    bank = ReasoningBank(replace(data, lookup=replace(data.lookup, floor=0.5)))
    for query in np.concatenate([queries_near(data, 50), np.random.default_rng(0).normal(size=(50, data.dim))]):
        unit = (query / np.linalg.norm(query)).astype(np.float32)
        expected, found = bank.optimized_params(unit), bank.optimized_params(unit * np.float32(length))
        assert found.config_id == expected.config_id and found.source == expected.source
        assert found.reason == expected.reason
        for name in ("confidence", "expected_quality", "expected_gain"):
            assert getattr(found, name) == pytest.approx(getattr(expected, name), rel=1e-4, abs=1e-6)
        for one, other in zip(*(bank.find_similar_patterns(q, 3) for q in (unit, unit * length)), strict=True):
            assert one.pattern.id == other.pattern.id and one.similarity == pytest.approx(other.similarity, abs=1e-6)


def test_a_batch_answers_as_single_lookups_do(bank: ReasoningBank) -> None:
    queries = queries_near(bank.data, 500)
    batch = bank.optimized_params_batch(queries)
    assert {len(column) for column in batch.values()} == {500}
    for i, query in enumerate(queries):
        answer = bank.optimized_params(query)
        assert answer.config_id == batch["config_id"][i]
        assert answer.source == ParamSource(None if batch["pattern_id"][i] < 0 else int(batch["pattern_id"][i]))
        assert answer.params == SearchParams(**{name: batch[name][i].item() for name in PARAMETERS})
        assert answer.params == bank.configs[answer.config_id]
        for name in ("confidence", "expected_quality", "expected_gain"):
            assert getattr(answer, name) == pytest.approx(float(batch[name][i]), rel=1e-4, abs=1e-6)


def test_a_batch_of_many_configs_is_answered_in_small_blocks(bank: ReasoningBank, monkeypatch: Any) -> None:
    queries, taken = queries_near(bank.data, 300), []
    whole = bank.optimized_params_batch(queries)
    weigh = batch.weigh
    monkeypatch.setattr(batch, "weigh", lambda rows, *rest: taken.append(len(rows)) or weigh(rows, *rest))
    monkeypatch.setattr(batch, "VOTE_CELLS", 130 * bank.data.lookup.top_k * 2 * len(bank.configs))
    assert_same(bank.optimized_params_batch(queries), whole)
    assert taken == [130, 130, 40]


def test_a_batch_may_be_empty_or_larger_than_one_block(bank: ReasoningBank) -> None:
    queries = queries_near(bank.data, 5000)
    empty, whole = bank.optimized_params_batch(queries[:0]), bank.optimized_params_batch(queries)
    assert {len(column) for column in empty.values()} == {0}
    assert {name: column.dtype for name, column in empty.items()} == {name: c.dtype for name, c in whole.items()}
    assert_same({name: column[4090:4110] for name, column in whole.items()},
                bank.optimized_params_batch(queries[4090:4110]))  # fmt: skip


def test_confidence_is_0_exactly_where_the_default_is_returned(bank: ReasoningBank) -> None:
    batch = bank.optimized_params_batch(queries_near(bank.data, 500))
    default = batch["config_id"] == bank.data.default
    assert default.any() and not default.all()
    assert (batch["confidence"][default] == 0).all() and (batch["expected_gain"][default] == 0).all()
    assert (batch["confidence"][~default] >= bank.data.lookup.min_probability).all()
    assert (batch["pattern_id"][default] == -1).all()


def test_a_default_that_reaches_a_floor_has_no_confidence(data: BankData) -> None:
    arrays = {name: array.copy() for name, array in data.arrays.items()}
    arrays["probability"][:, data.default], arrays["score"][:, data.default] = 0.9, 9.0
    arrays["gain"][:, data.default] = 0.5
    answer = ReasoningBank(replace(data, arrays=arrays)).optimized_params(arrays["centroids"][0])
    assert (answer.config_id, answer.confidence, answer.expected_gain) == (data.default, 0.0, 0.0)
    assert not answer.source.has_pattern


def test_similar_patterns_come_best_first(bank: ReasoningBank) -> None:
    data = bank.data
    for query in queries_near(data, 20):
        matches = bank.find_similar_patterns(query, k=3)
        expected = nearest_leaves(data, query)
        assert [m.pattern.id for m in matches] == [int(data.arrays["pattern_id"][row]) for _, row in expected]
        np.testing.assert_allclose([m.similarity for m in matches], [cosine for cosine, _ in expected], atol=1e-6)
    assert len(bank.find_similar_patterns(query, k=99)) == data.leaves  # and no pattern of a higher level


def test_similarity_is_at_most_1(bank: ReasoningBank) -> None:
    # regression: rounding gave 1.0000001
    best = [bank.find_similar_patterns(c * scale, 1)[0] for c in bank.data.arrays["centroids"][:12] for scale in (1, 3)]
    assert max(match.similarity for match in best) <= 1.0
    assert min(match.similarity for match in best) > 0.999999


# Interpolation


def test_interpolation_equals_the_oracle(data: BankData) -> None:
    pytest.importorskip("scipy")
    import oracles

    data = replace(data, lookup=replace(data.lookup, floor=0.2))
    bank, compared = ReasoningBank(data), 0
    for query in queries_near(data, 300, noise=0.6):
        rows = [row for cosine, row in nearest_leaves(data, query) if cosine >= data.lookup.floor]
        matches = [
            (
                oracles.Params(
                    int(data.arrays["optimal_ef_search"][row]),
                    int(data.arrays["optimal_n_probes"][row]),
                    TIERS[data.arrays["optimal_tier"][row]],
                    int(data.arrays["optimal_context_tokens"][row]),
                    float(data.arrays["optimal_temperature"][row]),
                ),
                oracles.cosine(query, data.arrays["centroids"][row]),
                float(data.arrays["quality"][row]),
            )
            for row in rows
        ]
        expected = oracles.interpolate(matches, TIERS, data.configs.context_tokens.tolist())
        answer = bank.optimized_params(query, mode="interpolate")
        if expected is None:
            assert answer == bank.optimized_params(query)
            continue
        compared += len(rows) > 1
        params = expected[0]._replace(temperature=pytest.approx(expected[0].temperature, abs=1e-5))
        assert tuple(answer.params.as_dict().values()) == params
        assert answer.source.pattern_id == int(data.arrays["pattern_id"][rows[0]])
        assert answer.config_id is None and answer.confidence == 0 and math.isnan(answer.expected_gain)
    assert compared > 100


def test_interpolation_that_meets_a_tried_config_knows_what_it_is_worth(data: BankData) -> None:
    arrays = {name: array.copy() for name, array in data.arrays.items()}
    columns = ("ef_search", "n_probes", "tier", "context_tokens", "temperature")
    arrays["probability"][:12] = 0.875
    for config in (4, data.default):
        for name in columns:
            arrays[f"optimal_{name}"][:] = arrays[f"config_{name}"][config]
        answer = ReasoningBank(replace(data, arrays=arrays)).optimized_params(
            arrays["centroids"][0], mode="interpolate"
        )
        assert answer.config_id == config
        # regression: its confidence was the default's own probability
        assert answer.confidence == (0 if config == data.default else 0.875)
    arrays["probability"][:] = 1.0
    for name in columns:
        arrays[f"optimal_{name}"][:] = arrays[f"config_{name}"][4]
    wide = ReasoningBank(replace(data, arrays=arrays, lookup=replace(data.lookup, floor=-1.0, top_k=12)))
    queries = np.random.default_rng(0).normal(size=(200, data.dim))
    # regression: shares that add up to just over 1 gave a confidence of 1.0000000000000002
    assert max(wide.optimized_params(query, mode="interpolate").confidence for query in queries) == 1.0


# Trade-off


def test_tradeoff_equals_training_with_those_weights(learned: SimpleNamespace) -> None:
    from rb_gpu.learn import learn
    from rb_gpu.learn.config import JudgeConfig
    from rb_gpu.learn.stages import Stages

    bank, queries = learned.bank.bank(), learned.trajectories.x_QD[:300]
    stages = Stages(sharing=True)  # stages of its own, so that those of the bank are not reused
    usual = bank.optimized_params_batch(queries)
    assert (usual["config_id"] == bank.optimized_params_batch(queries, Tradeoff(0.02, 0.2))["config_id"]).all()
    for tradeoff, weights in ((1.5, (0.0, 1.5)), (Tradeoff(0.3, 0.1), (0.3, 0.1)), (0, (0.0, 0.0))):
        judge = JudgeConfig(latency_weight=weights[0], cost_weight=weights[1])
        other = learn(learned.trajectories, replace(learned.config, judge=judge), stages=stages).bank()
        answers = bank.optimized_params_batch(queries, tradeoff)
        assert_same(answers, other.optimized_params_batch(queries))
        assert bank.optimized_params(queries[0], tradeoff).config_id == answers["config_id"][0]
        if tradeoff:
            assert (answers["config_id"] != usual["config_id"]).mean() > 0.1


def test_a_margin_that_was_given_stays_under_another_tradeoff(learned: SimpleNamespace) -> None:
    from rb_gpu.learn import learn
    from rb_gpu.learn.config import JudgeConfig
    from rb_gpu.learn.stages import Stages

    stages = Stages(sharing=True)

    def judged(cost_weight: float) -> ReasoningBank:
        judge = JudgeConfig(latency_weight=0.0, cost_weight=cost_weight, margin=0.1)
        return learn(learned.trajectories, replace(learned.config, judge=judge), stages=stages).bank()

    queries = learned.trajectories.x_QD[:300]
    assert_same(judged(0.0).optimized_params_batch(queries, 0.2), judged(0.2).optimized_params_batch(queries))


@pytest.mark.parametrize(("cost", "meant"), [
    (0.1, Tradeoff(0.0, 0.5)),  # any cost, however small, although some config has none
    (0.0, Tradeoff(0.5, 0.0)),
])  # fmt: skip
def test_a_number_weighs_cost_where_any_was_logged_else_latency(data: BankData, cost: float, meant: Tradeoff) -> None:
    mean = data.arrays["evidence_mean"].copy()
    mean[..., OUTCOMES.index("cost")] = cost * (np.arange(mean.shape[1]) > 0)
    bank = ReasoningBank(replace(data, arrays=data.arrays | {"evidence_mean": mean}))
    bank.optimized_params(queries_near(data, 1)[0], 0.5)
    assert list(bank._state.tradeoffs) == [meant]


def test_the_default_of_a_query_that_cannot_be_read_promises_nothing(bank: ReasoningBank) -> None:
    answer = bank.optimized_params(np.zeros(bank.dim), on_error="default")
    assert (answer.confidence, answer.expected_gain, answer.config_id) == (0.0, 0.0, bank.data.default)


def test_tradeoffs_are_worked_out_once_and_forgotten_some_day(bank: ReasoningBank, monkeypatch: Any) -> None:
    from rb_gpu import posterior, vote

    believe, calls = posterior.believe, []
    monkeypatch.setattr(posterior, "believe", lambda *args: calls.append(args) or believe(*args))
    query = queries_near(bank.data, 1)[0]
    for tradeoff in (0.5, 0.5, Tradeoff(0.0, 0.5), 0.25, 0.5):
        bank.optimized_params(query, tradeoff)
    assert len(calls) == 2
    for i in range(100):
        bank.optimized_params(query, i / 100)
    assert len(bank._state.tradeoffs) <= vote.REMEMBERED_TRADEOFFS


# regression: 1e300 overflowed with warnings, and was answered
@pytest.mark.parametrize("tradeoff", [-1, math.nan, math.inf, 1e300, 1.1e6, "cost", [0.5], True])
def test_a_tradeoff_that_is_no_weight_is_refused(bank: ReasoningBank, tradeoff: Any) -> None:
    with pytest.raises(ValueError, match="give"):
        bank.optimized_params(np.ones(bank.dim), tradeoff)
    with pytest.raises(ValueError, match="give"):
        bank.optimized_params_batch(np.ones((2, bank.dim)), tradeoff)


def test_a_tradeoff_needs_evidence_judged_for_a_utility(data: BankData) -> None:
    for change in ({"method": "welch"}, {"objective": replace(OBJECTIVE, kind="floor")}):
        with pytest.raises(ValueError, match=r"judge\.method=eb"):
            ReasoningBank(replace(data, **change)).optimized_params(np.ones(16), 0.5)


# Queries


NO_NUMBERS, NOT_FINITE = "not an array of numbers", "NaN or infinity"
BAD_QUERIES: list[tuple[Any, str]] = [
    (np.ones(15), "shape"), (np.ones(17), "shape"), ([], "shape"), (np.float32(1), "shape"), (None, NO_NUMBERS),
    (np.ones((1, 16)), "shape"), (np.ones((2, 16)), "shape"), (np.ones((0, 16)), "shape"), ({}, NO_NUMBERS),
    (np.array([None] * 16), NO_NUMBERS), (np.ones(16, object), NO_NUMBERS), (["1"] * 16, NO_NUMBERS),
    ("text", NO_NUMBERS), (np.ones(16, complex), NO_NUMBERS), (np.ones(16, "datetime64[s]"), NO_NUMBERS),
    ([[1.0], [1.0, 2.0]], NO_NUMBERS), (np.full(16, np.nan), NOT_FINITE), (np.full(16, np.inf), NOT_FINITE),
    (np.full(16, 1e300), NOT_FINITE), (np.diag(np.full(16, np.nan))[0], NOT_FINITE), (np.zeros(16), "norm 0"),
    (np.full(16, 1e-300), "norm 0"),
]  # fmt: skip


@pytest.mark.parametrize(("query", "reason"), BAD_QUERIES, ids=lambda x: repr(x)[:24])
@pytest.mark.filterwarnings("error")
def test_a_bad_query_is_a_value_error_that_says_why(bank: ReasoningBank, query: Any, reason: str) -> None:
    # regression: strings were read as numbers, and imaginary parts were dropped
    lookups = [bank.optimized_params, bank.find_similar_patterns, lambda q: bank.optimized_params(q, 0.5)]
    lookups += [
        lambda q: bank.optimized_params(q, mode="interpolate"),
        lambda q: bank.record_trajectory(trajectory(1, q)),
    ]
    for lookup in lookups:
        with pytest.raises(ValueError, match=reason):
            lookup(query)


@pytest.mark.parametrize("queries", [np.ones(16), [], np.ones((2, 15)), np.ones((1, 1, 16)), np.eye(16) * np.nan])
def test_a_bad_batch_is_a_value_error(bank: ReasoningBank, queries: Any) -> None:
    with pytest.raises(ValueError, match="query"):
        bank.optimized_params_batch(queries)


@pytest.mark.parametrize("row", [5, 2500])
def test_one_bad_row_refuses_the_batch(bank: ReasoningBank, row: int) -> None:
    queries = queries_near(bank.data, 3000)
    queries[row, 3] = np.nan
    with pytest.raises(ValueError, match="NaN"):
        bank.optimized_params_batch(queries)


def test_a_query_of_a_batch_does_not_change_the_answers_of_others(bank: ReasoningBank) -> None:
    # float32 cannot square the long queries, so that their tile is scaled differently
    queries = queries_near(bank.data, 3000)
    expected = bank.optimized_params_batch(queries)
    queries[[7, 2500]] *= 1e25
    assert_same(bank.optimized_params_batch(queries), expected)


@pytest.mark.parametrize("k", [0, -1, 1.5, "3", None, True])
def test_k_is_a_positive_integer(bank: ReasoningBank, k: Any) -> None:
    with pytest.raises(ValueError, match="k="):
        bank.find_similar_patterns(np.ones(bank.dim), k)


def test_unknown_words_are_refused(data: BankData) -> None:
    with pytest.raises(ValueError, match="mode='mean' is not one of vote, interpolate"):
        ReasoningBank(data).optimized_params(np.ones(16), mode="mean")
    with pytest.raises(ValueError, match="search='fast' is not one of"):
        ReasoningBank(data, search="fast")


def test_any_array_of_numbers_will_do(bank: ReasoningBank) -> None:
    query = np.round(queries_near(bank.data, 4)[3] * 100)
    answer = bank.optimized_params(query)
    spaced = np.zeros((3, 2 * bank.dim))
    spaced[1, ::2] = query
    forms = [query.tolist(), tuple(query), *(query.astype(kind) for kind in ("f8", "f2", "i8")), spaced[1, ::2],
             query[::-1].copy()[::-1], query * 1e30, query * 1e-30, np.asfortranarray(query)]  # fmt: skip
    for form in forms:
        before = np.array(form)
        same = bank.optimized_params(form)
        assert same.config_id == answer.config_id and same.source == answer.source
        np.testing.assert_array_equal(form, before)
    batch = queries_near(bank.data, 32)
    for form in (batch.tolist(), np.asfortranarray(batch), np.repeat(batch, 2, axis=0)[::2], batch.astype(np.float64)):
        assert_same(bank.optimized_params_batch(form), bank.optimized_params_batch(batch))


def test_an_l2_bank_of_large_centroids_answers_by_cosine(data: BankData) -> None:
    # regression: norms overflowed float32, and every cosine was 0
    queries = queries_near(data, 50)
    for scale in (np.float32(1e30), np.float32(1e-30)):
        arrays = data.arrays | {"centroids": data.arrays["centroids"] * scale}
        scaled = ReasoningBank(replace(data, arrays=arrays, metric="l2"))
        assert_same(scaled.optimized_params_batch(queries), ReasoningBank(data).optimized_params_batch(queries), 1e-3)


# Views


@pytest.mark.parametrize("which", ["made", "learned"])
def test_patterns_and_verdicts_are_whole(data: BankData, which: str, request: Any) -> None:
    bank = ReasoningBank(data) if which == "made" else request.getfixturevalue("learned").bank.bank()
    patterns, verdicts = bank.patterns, bank.verdicts
    assert set(patterns) == set(bank.data.arrays["pattern_id"].tolist()) and len(patterns) == len(set(patterns))
    top = max(p.abstraction_level for p in patterns.values())
    parents: dict[int, int] = {}
    for pattern_id, pattern in patterns.items():
        assert pattern.id == pattern_id and (pattern.children == ()) == (pattern.abstraction_level == 0)
        for child in pattern.children:
            assert patterns[child].abstraction_level == pattern.abstraction_level - 1
            assert child not in parents
            parents[child] = pattern_id
    assert {i for i, p in patterns.items() if p.abstraction_level < top} == set(parents)
    assert set(verdicts) == {i for i, p in patterns.items() if p.abstraction_level == 0}
    for pattern_id, verdict in verdicts.items():
        assert verdict.pattern_id == pattern_id
        assert verdict.recommended_params == bank.configs[verdict.config_id] in list(bank.configs)
        assert verdict.default_stands == (verdict.config_id == bank.data.default)
        tried = bank.data.evidence.rows[patterns_row(bank, pattern_id), verdict.config_id]
        assert tried > 0 and verdict.evidence.support_count == tried
    assert bank.next_pattern_id == max(patterns) + 1 and bank.default == bank.configs[bank.data.default]


def patterns_row(bank: ReasoningBank, pattern_id: int) -> int:
    return bank.data.arrays["pattern_id"].tolist().index(pattern_id)


def test_a_bank_says_what_it_is_and_is_not_pickled(bank: ReasoningBank) -> None:
    patterns = f"<{len(bank.patterns)} patterns of {bank.dim} dims>"
    assert repr(bank) == f"<ReasoningBank of no version: {patterns}, {len(bank.configs)} configs>"
    assert repr(bank.verdicts) == f"<{len(bank.verdicts)} verdicts>"
    for attempt in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match="load its artifact in each process"):
            attempt(bank)


def test_temperatures_come_back_as_they_were_asked_for(bank: ReasoningBank) -> None:
    # regression: float32's 0.7 was answered as 0.699999988079071
    params = SearchParams(64, 8, "auto", 2048, 0.7)
    assert ConfigTable.from_params([params], ["auto"], 0)[0] == params
    answers = bank.optimized_params_batch(bank.data.arrays["centroids"][:5])
    assert answers["temperature"].tolist() == [bank.configs[i].temperature for i in answers["config_id"]]


def test_unknown_patterns_are_key_errors(bank: ReasoningBank) -> None:
    for lookup in (bank.patterns.__getitem__, bank.verdicts.__getitem__, bank.satisfaction):
        with pytest.raises(KeyError):
            lookup(5)
    assert 5 not in bank.patterns
    with pytest.raises(KeyError):
        bank.verdicts[115]  # not a leaf


def test_a_pattern_cannot_be_changed(bank: ReasoningBank) -> None:
    # regression: the centroid was a writable view into the bank
    with pytest.raises(ValueError, match="read-only"):
        bank.patterns[100].centroid[0] = 7


def test_what_was_planted_is_recommended(learned: SimpleNamespace) -> None:
    bank = learned.bank.bank()
    np.testing.assert_array_equal(bank.optimized_params_batch(learned.centres)["config_id"], learned.best)
    for centre, best in zip(learned.centres, learned.best, strict=True):
        verdict = bank.verdicts[bank.find_similar_patterns(centre, 1)[0].pattern.id]
        assert verdict.recommended_params == bank.configs[best]


# Trajectories and feedback


@pytest.mark.parametrize("rating", [5.0, np.float32(3), 0, 6, True, "5", None])
def test_a_rating_is_an_integer(rating: Any) -> None:
    # regression: 5.0 was accepted, which the interface does not allow
    with pytest.raises(ValueError, match=r"is not an integer in \[1, 5\]"):
        UserFeedback(rating)
    assert UserFeedback(np.int64(5)).score == 1


@pytest.mark.parametrize("comment", [5, b"fine", ["fine"]])
def test_a_comment_is_text(comment: Any) -> None:
    # regression: anything was accepted, and the log then said that an int has no attribute encode
    with pytest.raises(ValueError, match=r"comment=.* is not a string; give text, or leave it out"):
        UserFeedback(3, comment)


@pytest.mark.parametrize("weight", ["0.1", None, [0.1], True, float("nan")])
def test_a_weight_of_a_tradeoff_is_a_number(weight: Any) -> None:
    # regression: TypeError: '<=' not supported between instances of 'int' and 'str'
    with pytest.raises(ValueError, match=r"cost_weight=.* is not a number in \[0, 1e\+06\]; give one within"):
        Tradeoff(0.0, weight)


@pytest.mark.parametrize(
    ("fields", "error", "says"),
    [
        ({"search_params": {"ef_search": 64}}, TypeError, "search_params=.* is not a SearchParams; give"),
        ({"feedback": 5}, TypeError, r"feedback=5 is not a UserFeedback; give UserFeedback\(rating\)"),
        ({"id": "q7"}, TypeError, "id='q7' is not an integer"),
        ({"id": [7]}, TypeError, r"id=\[7\] is not an integer"),
        ({"id": -1}, ValueError, "id=-1 is outside"),
    ],
)
def test_a_wrong_field_is_told_before_anything_is_counted(
    bank: ReasoningBank, fields: dict[str, Any], error: type[Exception], says: str
) -> None:
    # regression: a dict of parameters went unnoticed without a log and was an AttributeError with one, and a bare
    # rating was an AttributeError after the trajectory had been counted
    before = bank.stats().total_trajectories
    with pytest.raises(error, match=f"^{says}"):
        bank.record_trajectory(trajectory(1, bank.data.arrays["centroids"][0])._replace(**fields))
    with pytest.raises(TypeError, match=r"^trajectory is of type dict, not QueryTrajectory; give"):
        bank.record_trajectory({"id": 1})  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"^trajectory_id=None is not an integer"):
        bank.record_feedback(None, UserFeedback(5))  # type: ignore[arg-type]
    assert bank.stats().total_trajectories == before


def test_a_bank_is_made_of_bank_data(artifact: Path) -> None:
    # regression: AttributeError: 'PosixPath' object has no attribute 'objective'
    with pytest.raises(TypeError, match=r"not BankData; ReasoningBank\.load opens an artifact"):
        ReasoningBank(artifact)  # type: ignore[arg-type]


def test_one_vote_per_trajectory(bank: ReasoningBank) -> None:
    with pytest.raises(TypeError, match=r"feedback=5 is not a UserFeedback; give UserFeedback\(rating\)"):
        bank.record_feedback(1, 5)  # type: ignore[arg-type]
    centroid, pattern = bank.data.arrays["centroids"][3], 103
    alpha, beta = bank.satisfaction(pattern)
    bank.record_trajectory(trajectory(7, centroid))
    assert bank.record_feedback(7, UserFeedback(5)) is True
    assert bank.satisfaction(pattern) == (alpha + 1, beta)
    for rating in (5, 1, 3):
        assert bank.record_feedback(7, UserFeedback(rating)) is False
    assert bank.record_feedback(8, UserFeedback(1)) is False  # a trajectory that another process recorded
    bank.record_trajectory(trajectory(7, centroid))
    assert bank.record_feedback(7, UserFeedback(1)) is False
    assert bank.satisfaction(pattern) == (alpha + 1, beta)
    assert bank.stats().total_feedback == 1


def test_satisfaction_is_a_beta_posterior_of_old_and_new_votes(bank: ReasoningBank) -> None:
    arrays, row = bank.data.arrays, 5
    old_count, old_score = int(arrays["rating_count"][row]), float(arrays["rating_score"][row])
    for i, rating in enumerate((1, 2, 3, 4, 5, 5)):
        bank.record_trajectory(trajectory(i, arrays["centroids"][row], feedback=UserFeedback(rating)))
    score = 0 + 0.25 + 0.5 + 0.75 + 1 + 1
    assert bank.satisfaction(105) == (1 + old_score + score, 1 + (old_count - old_score) + (6 - score))
    assert bank.satisfaction(104) == (1 + arrays["rating_score"][4], 1 + arrays["rating_score"][4])


def test_old_trajectories_are_forgotten(bank: ReasoningBank, monkeypatch: Any) -> None:
    assert REMEMBERED_TRAJECTORIES >= 10_000
    monkeypatch.setattr("rb_gpu.usage.REMEMBERED_TRAJECTORIES", 3)
    for i in range(5):
        bank.record_trajectory(trajectory(i, bank.data.arrays["centroids"][0]))
        assert bank.record_feedback(i, UserFeedback(4))
    assert len(bank._state.ratings._pattern_of) == len(bank._state.ratings._rated) == 3
    assert not bank.record_feedback(0, UserFeedback(4))


def test_a_search_that_finds_nothing_votes_for_no_pattern(bank: ReasoningBank) -> None:
    # regression: row -1 was read as the last pattern of the highest level
    class Nothing:
        name = "nothing"

        def nearest_one(self, unit_D: np.ndarray, k: int) -> tuple[list[int], list[float]]:
            return [], []

        def nearest(self, unit_BD: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
            return np.full((len(unit_BD), k), -1), np.full((len(unit_BD), k), -1, np.float32)

    bank._state.search = Nothing()
    bank.record_trajectory(trajectory(1, np.ones(bank.dim)))
    assert bank.record_feedback(1, UserFeedback(1)) is False
    assert bank.find_similar_patterns(np.ones(bank.dim), 3) == []
    single, batch = bank.optimized_params(np.ones(bank.dim)), bank.optimized_params_batch(np.ones((2, bank.dim)))
    assert not single.source.has_pattern and batch["config_id"].tolist() == [single.config_id] * 2


def test_the_log_keeps_trajectories_and_votes(data: BankData, tmp_path: Path) -> None:
    bank = ReasoningBank(data, log=tmp_path / "log.sqlite")
    bank.record_trajectory(trajectory(1, data.arrays["centroids"][0], feedback=UserFeedback(2)))
    bank.record_trajectory(trajectory(2, data.arrays["centroids"][1]))
    bank.record_feedback(2, UserFeedback(5))
    bank.record_feedback(2, UserFeedback(1))
    bank.record_feedback(99, UserFeedback(3))  # recorded by another process: the vote is kept for its trajectory
    bank.close()
    with TrajectoryLog(tmp_path / "log.sqlite") as other:
        other.record(trajectory(99, data.arrays["centroids"][2]))
    (batch,) = read_batches(tmp_path / "log.sqlite")
    assert batch["id"].tolist() == [1, 2, 99] and batch["rating"].tolist() == [2, 5, 3]
    np.testing.assert_array_equal(batch["query_embedding"], data.arrays["centroids"][:3])


def test_what_the_log_refused_is_counted_nowhere(data: BankData, tmp_path: Path) -> None:
    # regression: a vote that the log refused was counted here but lost there, and so was a trajectory's rating
    bank = ReasoningBank(data, log=tmp_path / "log.db")
    assert bank.record_trajectory(trajectory(1, data.arrays["centroids"][0]))
    before, pattern_id = bank.stats(), int(data.arrays["pattern_id"][0])
    votes = bank.satisfaction(pattern_id)
    bank.close()
    assert not bank.record_trajectory(trajectory(2, data.arrays["centroids"][0], feedback=UserFeedback(5)))
    assert bank.record_feedback(1, UserFeedback(5)) is None
    assert bank.stats() == before and bank.satisfaction(pattern_id) == votes


def test_stats_count_what_happened(bank: ReasoningBank) -> None:
    start = bank.stats()
    stands = bank.data.arrays["verdict_stands"]
    assert (start.total_patterns, start.total_verdicts) == (16, int((stands == 0).sum()))
    assert start.total_trajectories == bank.data.facts["counts"]["trajectories"] > 0
    assert start.avg_improvement_percent == 12.5
    assert (start.total_lookups, start.total_feedback, start.pattern_hit_rate) == (0, 0, 0.0)
    queries = queries_near(bank.data, 40)
    answers = [bank.optimized_params(query) for query in queries[:20]]
    batch = bank.optimized_params_batch(queries[20:])
    bank.record_trajectory(trajectory(1, queries[0], feedback=UserFeedback(3)))
    hits = sum(a.source.has_pattern for a in answers) + int((batch["pattern_id"] >= 0).sum())
    confidence = sum(a.confidence for a in answers) + float(batch["confidence"].sum())
    stats = bank.stats()
    assert (stats.total_lookups, stats.total_feedback) == (40, 1) and 0 < hits < 40
    assert stats.total_trajectories == start.total_trajectories + 1
    assert stats.pattern_hit_rate == pytest.approx(hits / 40)
    assert stats.avg_recommendation_confidence == pytest.approx(confidence / 40)
    gain = sum(a.expected_gain for a in answers) + float(batch["expected_gain"].sum())
    assert gain > 0 and stats.avg_expected_gain == pytest.approx(gain / 40)
    # an answer that was never tried has no known expected gain, and does not change the mean
    bank.optimized_params(queries[0], mode="interpolate")
    assert bank.stats().avg_expected_gain * 41 == pytest.approx(gain)
    unmeasured = ReasoningBank(replace(bank.data, facts={}))
    assert math.isnan(unmeasured.stats().avg_improvement_percent)
    assert "rb_gpu_improvement_percent NaN\n" in bank_metrics(unmeasured)


def test_a_refused_query_is_not_counted(bank: ReasoningBank) -> None:
    before = bank.stats()
    for act in (bank.optimized_params, bank.optimized_params_batch, lambda q: bank.record_trajectory(trajectory(1, q))):
        with pytest.raises(ValueError, match="query"):
            act(np.zeros(3))
    assert bank.stats() == before


def test_the_quality_of_a_default_that_never_ran_is_unknown(data: BankData) -> None:
    # regression: it was reported as 0, and with a field as 0.04
    arrays = {name: array.copy() for name, array in data.arrays.items()}
    arrays["evidence_rows"][:, data.default] = 0
    arrays["probability"][: data.leaves // 2] = 0
    bank, queries = ReasoningBank(replace(data, arrays=arrays)), queries_near(data, 60)
    stands = []
    for params, answer in ((bank.default, bank.optimized_params(query)) for query in queries):
        stands.append(answer.params == params)
        assert math.isnan(answer.expected_quality) == stands[-1]
    assert 0 < sum(stands) < 60
    batch = bank.optimized_params_batch(queries)
    assert np.array_equal(np.isnan(batch["expected_quality"]), stands)
    assert math.isnan(bank.optimized_params(np.zeros(bank.dim), on_error="default").expected_quality)
    gain = bank.optimized_params_batch(queries, tradeoff=0.5)["expected_gain"]
    assert np.isfinite(gain).all()


# Reload


def version(bank: ReasoningBank) -> str:
    return str(bank.data.facts["version"])


def test_reload_follows_the_champion(registry: Registry) -> None:
    bank = ReasoningBank.load(registry.path / "champion")
    assert version(bank) == A and not bank.reload_if_changed()
    registry.promote(B, "")
    assert version(bank) == A
    assert bank.reload_if_changed() and version(bank) == B
    assert not bank.reload_if_changed()
    registry.rollback()
    assert bank.reload_if_changed() and version(bank) == A
    assert not ReasoningBank(bank.data).reload_if_changed()


@pytest.mark.parametrize("damage", ["flipped", "missing", "another dim", "gone"])
def test_reload_keeps_the_old_artifact_where_the_new_one_is_bad(registry: Registry, damage: str, caplog: Any) -> None:
    bank = ReasoningBank.load(registry.path / "champion")
    registry.promote(B, "")
    content = bytearray((registry.path / B / "bank.safetensors").read_bytes())
    if damage == "flipped":
        content[-1] ^= 1
        (registry.path / B / "bank.safetensors").write_bytes(content)
    elif damage == "missing":
        (registry.path / B / "bank.safetensors").unlink()
    elif damage == "another dim":
        write_artifact(registry.path / "20260103T000000-000000", make_bank(dim=8), {})
        registry.promote("20260103T000000-000000", "")
    else:
        (registry.path / "champion").unlink()
    answer = bank.optimized_params(np.ones(bank.dim))
    with caplog.at_level(logging.ERROR):
        assert not bank.reload_if_changed()
    assert "kept the artifact in use" in caplog.text
    assert version(bank) == A and bank.optimized_params(np.ones(bank.dim)) == answer
    registry.promote(A, "")
    bank.reload_if_changed()
    assert version(bank) == A


def test_a_mended_artifact_is_taken(registry: Registry, monkeypatch: Any) -> None:
    monkeypatch.setattr("rb_gpu.source.RETRY_S", 0.0)
    bank = ReasoningBank.load(registry.path / "champion")
    registry.promote(B, "")
    path = registry.path / B / "bank.safetensors"
    path.rename(path.with_name("away"))
    assert not bank.reload_if_changed()
    path.with_name("away").rename(path)
    assert bank.reload_if_changed() and version(bank) == B


def test_votes_end_with_the_artifact_that_they_were_for(registry: Registry) -> None:
    # regression: they counted for any pattern of the new artifact that had the same id
    bank = ReasoningBank.load(registry.path / "champion")
    bank.record_trajectory(trajectory(1, bank.data.arrays["centroids"][0]))
    bank.record_trajectory(trajectory(2, bank.data.arrays["centroids"][0]))
    assert bank.record_feedback(1, UserFeedback(5))
    registry.promote(B, "")
    bank.reload_if_changed()
    assert not bank.record_feedback(2, UserFeedback(5))
    score = bank.data.arrays["rating_score"][0]
    assert bank.satisfaction(100) == (1 + score, 1 + score)


def test_a_switch_while_an_artifact_is_read_mixes_nothing(tmp_path: Path, monkeypatch: Any) -> None:
    # regression: the index was read through the link a second time, so that the new version's index stood beside the
    # old version's bank
    from rb_gpu import source as module

    registry, load_artifact = Registry(tmp_path), module.load_artifact
    for name in (A, B):
        write_artifact(tmp_path / name, make_bank(), {"index.faiss": name.encode()})
    registry.promote(A, "")

    def slow(path: str | Path, hmac_key: bytes | None) -> Any:
        loaded = load_artifact(path, hmac_key)
        registry.promote(B, "")
        return loaded

    monkeypatch.setattr(module, "load_artifact", slow)
    bank = ReasoningBank.load(tmp_path / "champion")
    assert version(bank) == A
    monkeypatch.undo()
    assert bank.reload_if_changed() and version(bank) == B


def test_load_names_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"holds no manifest\.json .*run jobs\.train"):
        ReasoningBank.load(tmp_path / "nowhere")
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(ArtifactError):
        ReasoningBank.load(tmp_path / "loop")


def test_lookups_during_reloads_see_whole_artifacts_only(registry: Registry) -> None:
    queries = queries_near(make_bank(), 24)
    expected = {}
    for name in (A, B):
        bank = ReasoningBank.load(registry.path / name)
        expected[name] = bank.optimized_params_batch(queries)["config_id"], [bank.optimized_params(q) for q in queries]
    assert (expected[A][0] != expected[B][0]).any()
    bank = ReasoningBank.load(registry.path / "champion")
    stop, errors, seen = threading.Event(), [], set()

    def look_up(seed: int) -> None:
        i = seed
        try:
            while not stop.is_set():
                config_id = bank.optimized_params_batch(queries)["config_id"]
                fits = {name for name in (A, B) if (config_id == expected[name][0]).all()}
                i = (i + 1) % len(queries)
                answer = bank.optimized_params(queries[i])
                if not fits or answer not in (expected[A][1][i], expected[B][1][i]):
                    errors.append((config_id, answer))
                seen.update(fits)
                bank.find_similar_patterns(queries[i])
                bank.record_trajectory(trajectory(1000 * seed + i, queries[i], feedback=UserFeedback(4)))
                bank.satisfaction(100)
                bank.stats()
                bank.optimized_params(queries[i], 0.5)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=look_up, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for i in range(50):
        registry.promote((B, A)[i % 2], "")
        assert bank.reload_if_changed()
    stop.set()
    for thread in threads:
        thread.join()
    assert errors == [] and seen == {A, B}


def test_a_slow_reload_does_not_bring_back_what_a_later_one_replaced(registry: Registry, monkeypatch: Any) -> None:
    # regression: reloads ran concurrently, and the last one to end won
    from rb_gpu import bank as module

    bank, state = ReasoningBank.load(registry.path / "champion"), module.BankState
    later = threading.Thread(target=bank.reload_if_changed)

    def slow(*args: Any) -> Any:
        monkeypatch.undo()
        registry.promote(A, "")
        later.start()
        later.join(0.3)
        return state(*args)

    monkeypatch.setattr(module, "BankState", slow)
    registry.promote(B, "")
    assert bank.reload_if_changed()
    later.join()
    assert version(bank) == B  # the later reload did not wait
    assert bank.reload_if_changed() and version(bank) == A
