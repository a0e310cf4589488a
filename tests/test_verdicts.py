"""Judging compared with SciPy, statsmodels and the scalar version of the reference document."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from statsmodels.stats.multitest import multipletests

from rb_gpu.errors import ConfigError, DataError
from rb_gpu.learn import learn
from rb_gpu.learn.assemble import grade
from rb_gpu.learn.config import ClusterConfig, IndexConfig, JudgeConfig, PruneConfig, QualityConfig, TrainConfig
from rb_gpu.learn.evidence import gather_evidence, row_weights
from rb_gpu.learn.extractor import VerdictJudge
from rb_gpu.learn.trajectories import Trajectories
from rb_gpu.learn.verdicts import benjamini_hochberg, compare, holm, judge, resolve_objective
from rb_gpu.params import ConfigTable, SearchParams
from rb_gpu.posterior import believe
from rb_gpu.types import LearnedPattern, QueryTrajectory


def table(
    seed: int = 0, n: int = 300, configs: int = 3, effect=None, full: bool = False, propensity: float | None = None
) -> Trajectories:
    """n rows with Beta-distributed quality; config 0 is the default; `full` tries every query under every config."""
    rng = np.random.default_rng(seed)
    queries = n // configs if full else n
    query_row = np.repeat(np.arange(queries), configs) if full else np.arange(n)
    n = len(query_row)
    config_id = np.tile(np.arange(configs), queries) if full else rng.integers(configs, size=n)
    base = rng.beta(5, 5, queries)[query_row] if full else 0.5
    gain = np.zeros(configs) if effect is None else np.asarray(effect)
    quality = np.clip(base + gain[config_id] + 0.1 * rng.normal(size=n), 0.01, 1)
    params = [SearchParams(ef_search=16 * 2**c) for c in range(configs)]
    return Trajectories(
        x_QD=rng.normal(size=(queries, 4)).astype(np.float32),
        query_row=query_row,
        query_id=np.arange(queries, dtype=np.uint64),
        query_time=np.arange(queries),
        config_id=config_id,
        precision=quality.astype(np.float32),
        recall=np.clip(quality + 0.05 * rng.normal(size=n), 0.01, 1).astype(np.float32),
        latency_us=(1000 * np.exp(0.3 * rng.normal(size=n))).astype(np.int64),
        cost=None,
        rating=np.zeros(n, np.int8),
        timestamp=query_row.astype(np.int64),
        propensity=None if propensity is None else np.full(n, propensity, np.float32),
        id=np.arange(n, dtype=np.uint64),
        configs=ConfigTable.from_params(params, ("auto",), 0),
    )


def judged(rows: Trajectories, label_Q, patterns: int, **settings_):
    evidence = gather_evidence(rows, torch.as_tensor(label_Q), patterns, row_weights(rows, None), torch.device("cpu"))
    config = JudgeConfig(**{"latency_weight": 0.0, "cost_weight": 0.0, "min_probability": 0.8, **settings_})
    objective = resolve_objective(config, QualityConfig(), rows, evidence)
    beliefs = believe(evidence, [], objective, rows.configs.default, config.margin)
    return judge(evidence, rows.configs, objective, beliefs, config), evidence, objective


def quality_of(rows: Trajectories) -> np.ndarray:
    p, r = rows.precision.astype(float), rows.recall.astype(float)
    return 2 * p * r / (p + r)


def test_the_test_is_scipys_one_sided_welch():
    rows = table(seed=1, effect=[0, 0.03, -0.02])
    _, evidence, objective = judged(rows, np.zeros(len(rows.query_id), int), 1)
    result, quality = compare(evidence, objective.direction, 0, 3), quality_of(rows)
    for c in (1, 2):
        theirs = stats.ttest_ind(
            quality[rows.config_id == c], quality[rows.config_id == 0], equal_var=False, alternative="greater"
        )
        assert result.p_value[0, c] == pytest.approx(theirs.pvalue, rel=1e-6)
        assert result.freedom[0, c] == pytest.approx(theirs.df, rel=1e-6)
    assert np.isnan(result.p_value[0, 0])


def test_a_full_table_is_tested_in_pairs():
    rows = table(seed=2, n=240, effect=[0, 0.02, 0], full=True)
    _, evidence, objective = judged(rows, np.zeros(len(rows.query_id), int), 1)
    result, quality = compare(evidence, objective.direction, 0, 3), quality_of(rows).reshape(-1, 3)
    theirs = stats.ttest_rel(quality[:, 1], quality[:, 0], alternative="greater")
    assert result.p_value[0, 1] == pytest.approx(theirs.pvalue, rel=1e-6)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0, 1, allow_subnormal=False), min_size=1, max_size=12), st.integers(0, 5))
def test_corrections_are_those_of_statsmodels(p, unknown):
    values = np.array(p + [np.nan] * unknown)
    np.random.default_rng(0).shuffle(values)
    known = ~np.isnan(values)
    for ours, method in ((holm(values[None])[0], "holm"), (benjamini_hochberg(values), "fdr_bh")):
        np.testing.assert_allclose(ours[known], multipletests(values[known], method=method)[1], rtol=1e-9, atol=1e-12)
        assert np.isnan(ours[~known]).all()


def random_trajectories(rng: np.random.Generator, n: int, spread: float) -> list[QueryTrajectory]:
    choices = [SearchParams(ef_search=int(e), temperature=float(t)) for e in (50, 100, 200) for t in (0.0, 0.7)][
        : rng.integers(1, 7)
    ]
    out = []
    for i in range(n):
        params = choices[rng.integers(len(choices))]
        centre = 0.5 + spread * (params.ef_search - 100) / 100
        p, r = np.clip(centre + 0.15 * rng.normal(size=2), 0.0, 1.0).astype(np.float32)
        out.append(QueryTrajectory(i, np.ones(3, np.float32), params, float(p), float(r), 1000, i))
    return out


def as_oracle(t: QueryTrajectory) -> oracles.Trajectory:
    s = t.search_params
    return oracles.Trajectory(
        t.id, [1.0] * 3, s.ef_search, s.n_probes, s.model_tier, s.context_tokens, round(s.temperature, 6),
        t.precision, t.recall, t.latency_us, t.timestamp,
    )  # fmt: skip


PATTERN = LearnedPattern(7, np.ones(3, np.float32), SearchParams(), 0, 0, 0, 0, 0, 0, 0, 0, 0)


def test_the_judge_tells_what_it_was_given():
    # regression: AttributeErrors of the pattern, the default and the trajectories
    some = random_trajectories(np.random.default_rng(0), 12, 0.1)
    with pytest.raises(TypeError, match="pattern=7 is not a LearnedPattern; give one"):
        VerdictJudge().judge(7, some)
    with pytest.raises(TypeError, match=r"default=.* is not a SearchParams; give one"):
        VerdictJudge(default={"ef_search": 64}).judge(PATTERN, some)
    with pytest.raises(DataError, match="trajectory is of type str"):
        VerdictJudge().judge(PATTERN, ["x"])
    with pytest.raises(ConfigError, match=r"^judge\.alpha=0\.05 is not in \(0, 1\)"):
        VerdictJudge(alpha="0.05").judge(PATTERN, some)


@pytest.mark.parametrize("seed", range(40))
def test_the_reference_method_reads_as_the_document(seed):
    rng = np.random.default_rng(seed)
    trajectories = random_trajectories(rng, int(rng.integers(5, 120)), float(rng.choice([0.0, 0.1, 0.3])))
    expected = oracles.judge_reference([as_oracle(t) for t in trajectories], 10, 0.05, 100)
    verdict = VerdictJudge(min_samples=10, alpha=0.05, method="reference").judge(PATTERN, trajectories)
    if expected is None:
        assert verdict is None
        return
    assert verdict is not None
    assert verdict.pattern_id == 7
    assert verdict.recommended_params.ef_search == expected["config"].ef_search
    assert verdict.recommended_params.temperature == pytest.approx(expected["config"].temperature)
    # the reference's F1 has 1e-6 in its denominator, ours does not
    assert verdict.confidence == pytest.approx(expected["confidence"], rel=1e-4)
    assert verdict.evidence.p_value == pytest.approx(expected["p_value"], rel=1e-5)
    assert verdict.evidence.consistency == pytest.approx(expected["consistency"], rel=1e-5)
    assert verdict.evidence.avg_improvement == pytest.approx(expected["avg_improvement"], rel=1e-4, abs=1e-6)
    assert verdict.evidence.support_count == expected["support_count"]


def test_the_reference_seeds_hold_verdicts_of_both_kinds():
    # the test above would be empty if no seed, or every seed, gave a verdict
    given_ = []
    for seed in range(40):
        rng = np.random.default_rng(seed)
        trajectories = random_trajectories(rng, int(rng.integers(5, 120)), float(rng.choice([0.0, 0.1, 0.3])))
        given_.append(oracles.judge_reference([as_oracle(t) for t in trajectories], 10, 0.05, 100) is not None)
    assert 5 <= sum(given_) <= 35


@pytest.mark.parametrize("method", ["eb", "welch"])
def test_each_pattern_gets_its_best_config(method):
    rows = table(seed=3, n=6000, configs=4)
    label_Q = np.arange(len(rows.query_id)) % 12
    best = np.arange(12) % 4
    quality = np.clip(rows.precision + 0.1 * (rows.config_id == best[label_Q[rows.query_row]]), 0, 1)
    rows = Trajectories(**{**rows.__dict__, "precision": quality, "recall": quality})
    verdicts, evidence, objective = judged(rows, label_Q, 12, method=method)
    assert np.array_equal(verdicts.config_id, best)
    assert np.array_equal(verdicts.stands, best == 0)
    acted = ~verdicts.stands
    assert (verdicts.p_adjusted[acted] >= verdicts.p_value[acted]).all()
    assert (verdicts.p_sequential[acted] < 0.001).all() and np.isnan(verdicts.p_sequential[~acted]).all()
    assert ((verdicts.effect_low[acted] < 0.1) & (verdicts.effect_high[acted] > 0.1)).mean() > 0.8
    beliefs, each = believe(evidence, [], objective, 0, JudgeConfig().margin), np.arange(12)
    np.testing.assert_array_equal(verdicts.probability, beliefs.probability[each, best])
    base = beliefs.quality[:-1, 0]
    np.testing.assert_allclose(verdicts.improvement, (beliefs.quality[each, best] - base) / base)
    assert verdicts.support[0] == ((label_Q[rows.query_row] == 0) & (rows.config_id == 0)).sum()


@pytest.mark.parametrize("method", ["eb", "welch"])
@pytest.mark.parametrize("full", [False, True])
def test_equal_configs_get_no_verdict(method, full):
    false = []
    for seed in range(12):
        rows = table(seed=100 + seed, n=6000, configs=6, full=full)
        label_Q = np.random.default_rng(seed).integers(0, 30, len(rows.query_id))
        verdicts, *_ = judged(rows, label_Q, 30, method=method)
        false.append((~verdicts.stands).mean())
    assert np.mean(false) < 0.05


@pytest.mark.parametrize("method", ["eb", "welch", "reference"])
def test_a_constant_outcome_has_no_test_and_is_believed_by_its_rows(method):
    rows = table(seed=5, n=60, configs=3)
    constant = np.where(rows.config_id == 1, 0.9, 0.5).astype(np.float32)
    rows = Trajectories(**{**rows.__dict__, "precision": constant, "recall": constant})
    label_Q = np.where(np.arange(60) < 40, 0, 1)
    verdicts, *_ = judged(rows, label_Q, 3, method=method)
    if method == "reference":
        # its test is against all rows, which do vary; the empty pattern still has no verdict
        assert verdicts.stands[2]
    elif method == "welch":
        assert verdicts.stands.all()
    else:
        # no spread was taken for not knowing: thousands of such rows said nothing
        assert verdicts.config_id.tolist() == [1, 1, 1]
        assert np.isnan(verdicts.p_value).all()


def test_improvement_is_unknown_without_the_default():
    rows = table(seed=6, n=600, configs=3, effect=[0, 0.2, 0])
    kept = rows.config_id != 0
    per_row = ("query_row", "config_id", "precision", "recall", "latency_us", "rating", "timestamp", "id")
    rows = Trajectories(**{k: v[kept] if k in per_row else v for k, v in rows.__dict__.items()})
    verdicts, *_ = judged(rows, np.zeros(len(rows.query_id), int), 1)
    assert np.isnan(verdicts.improvement).all()
    assert verdicts.stands.all()


def test_latency_and_cost_weigh_against_quality():
    rows = table(seed=7, n=3000, configs=2, effect=[0, 0.05])
    slow = np.where(rows.config_id == 1, rows.latency_us * 8, rows.latency_us)
    rows = Trajectories(**{**rows.__dict__, "latency_us": slow})
    label_Q = np.zeros(len(rows.query_id), int)
    free, *_ = judged(rows, label_Q, 1, latency_weight=0.0)
    dear, *_ = judged(rows, label_Q, 1, latency_weight=0.05)
    assert free.config_id[0] == 1
    assert dear.stands[0]


def test_a_bound_is_kept():
    rows = table(seed=8, n=4000, configs=3, effect=[0, 0.1, 0.2])
    latency = rows.latency_us * np.array([1, 2, 8])[rows.config_id]
    rows = Trajectories(**{**rows.__dict__, "latency_us": latency})
    verdicts, *_ = judged(rows, np.zeros(len(rows.query_id), int), 1, objective="bound", max_latency_us=6000.0)
    assert verdicts.config_id[0] == 1


def test_a_floor_takes_the_cheapest_that_clears_it():
    rows = table(seed=9, n=4000, configs=4, effect=[0, 0.2, 0.3, 0.35])
    cost = (rows.config_id + 1).astype(np.float32)
    rows = Trajectories(**{**rows.__dict__, "cost": cost})
    label_Q = np.zeros(len(rows.query_id), int)
    assert judged(rows, label_Q, 1, objective="floor", target=0.65)[0].config_id[0] == 1
    # no config reaches it: the most likely one is chosen, not the cheap default
    assert judged(rows, label_Q, 1, objective="floor", target=0.99)[0].config_id[0] == 3


def repeated(share: float, kept: str, queries: int = 200) -> Trajectories:
    """Each query ran under the default (0), or under any one config if kept is "any"; a share of them, the hardest,
    also ran under 1 and 2. If kept is "half", they ran under 1, and all others under 2.
    """
    rng = np.random.default_rng(3)
    hard_Q = np.arange(queries) < share * queries
    first_Q = rng.integers(3, size=queries) if kept == "any" else np.zeros(queries, int)
    more = (1,) if kept == "half" else (1, 2)
    pairs = [(q, first_Q[q]) for q in range(queries)] + [(q, c) for q in range(queries) if hard_Q[q] for c in more]
    if kept == "half":
        pairs += [(q, 2) for q in range(queries) if not hard_Q[q]]
    query_N, config_N = np.unique(np.array(pairs), axis=0).T
    rows = len(query_N)
    quality = rng.random(rows).astype(np.float32)
    configs = ConfigTable.from_params([SearchParams(ef_search=10 * (c + 1)) for c in range(3)], ("auto",), 0)
    return Trajectories(
        x_QD=rng.normal(size=(queries, 4)).astype(np.float32), query_row=query_N, query_id=np.arange(queries),
        query_time=np.arange(queries), config_id=config_N, precision=quality, recall=quality,
        latency_us=np.full(rows, 1000), cost=None, rating=np.zeros(rows, np.int8), timestamp=np.arange(rows),
        propensity=None, id=np.arange(rows, dtype=np.uint64), configs=configs,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("share", "kept", "expected"),
    [
        # regression: a hundredth of the queries ran under both, the hardest, and verdicts for all were "randomized"
        (0.01, "default", "adjusted"), (0.1, "default", "adjusted"), (0.5, "default", "adjusted"),
        (0.5, "half", "adjusted"), (1.0, "default", "randomized"), (1.0, "half", "randomized"),
        (0.01, "any", "associational"), (0.1, "any", "associational"), (0.5, "any", "associational"),
    ],
)  # fmt: skip
def test_a_grade_claims_no_more_than_the_repeated_queries_show(share, kept, expected):
    rows = repeated(share, kept)
    evidence = gather_evidence(
        rows, torch.zeros(len(rows.query_id), dtype=torch.int64), 1, row_weights(rows, None), torch.device("cpu")
    )
    assert grade(False, evidence, 0) == expected and grade(True, evidence, 0) == "randomized"


def one_good_pattern_in_ten(seed: int = 0) -> Trajectories:
    """In the first of ten patterns, config 1 is slightly better than the default with little noise, and config 2 is
    much better with much noise.
    """
    rng = np.random.default_rng(seed)
    rows = table(seed, n=1800)
    pattern = np.arange(1800) % 10
    gain = np.where(rows.config_id == 1, 0.02, np.where(rows.config_id == 2, 0.12, 0.0)) * (pattern == 0)
    spread = np.where((rows.config_id == 2) & (pattern == 0), 0.3, 0.01)
    quality = np.clip(0.5 + gain + spread * rng.normal(size=1800), 0.01, 1).astype(np.float32)
    x = np.eye(10, dtype=np.float32)[pattern] + 0.02 * rng.normal(size=(1800, 10)).astype(np.float32)
    return replace(rows, x_QD=x, precision=quality, recall=quality)


@pytest.mark.parametrize("method", ["welch", "reference", "eb"])
def test_pruning_goes_by_the_confidence_that_is_published(method):
    """Regression: tests were pruned by the posterior of another method, and corrected for the remaining
    patterns only.
    """
    rows = one_good_pattern_in_ten()
    config = TrainConfig(cluster=ClusterConfig(k=10, n_init=4), index=IndexConfig(kind="off"),
                         judge=JudgeConfig(method=method, latency_weight=0.0, cost_weight=0.0))  # fmt: skip
    whole = learn(rows, config).data
    least = np.sort(whole.arrays["confidence"][: whole.leaves])[-2] + 1e-3
    pruned = learn(rows, replace(config, prune=PruneConfig(min_confidence=float(least)))).data
    kept = np.flatnonzero(whole.arrays["confidence"][: whole.leaves] >= least)
    assert whole.leaves == 10 and 1 <= len(kept) < 10
    assert pruned.leaves == len(kept) and (pruned.arrays["confidence"][: pruned.leaves] >= least).all()
    np.testing.assert_array_equal(pruned.arrays["support"][: len(kept)], whole.arrays["support"][kept])
    if method == "eb":
        # its verdicts are judged again, but the correction still counts the pruned patterns
        again, before = pruned.arrays["verdict_p_adjusted"], whole.arrays["verdict_p_adjusted"][kept]
        tested = ~np.isnan(again)
        assert tested.any()
        np.testing.assert_allclose(again[tested], before[tested])
    else:
        for name in ("config", "stands", "p_value", "p_adjusted", "confidence"):
            np.testing.assert_array_equal(pruned.arrays[f"verdict_{name}"], whole.arrays[f"verdict_{name}"][kept])


def some(rows: Trajectories, kept_N: np.ndarray) -> Trajectories:
    """The same table without some of its rows."""
    per_row = ("query_row", "config_id", "precision", "recall", "latency_us", "rating", "timestamp", "id")
    return Trajectories(**{k: v[kept_N] if k in per_row else v for k, v in rows.__dict__.items()})


def first_of_each(rows: Trajectories, counts: tuple[int, ...]) -> Trajectories:
    """The first counts[c] rows of each config c."""
    place_N = np.zeros(len(rows.config_id), int)
    for c in range(len(rows.configs)):
        place_N[rows.config_id == c] = np.arange((rows.config_id == c).sum())
    return some(rows, place_N < np.array(counts)[rows.config_id])


@pytest.mark.parametrize("default_rows", [4, 5])
def test_cells_of_min_samples_rows_are_tested_and_smaller_ones_are_not(default_rows):
    rows = first_of_each(table(seed=11), (default_rows, 5, 4))
    _, evidence, objective = judged(rows, np.zeros(len(rows.query_id), int), 1)
    known = ~np.isnan(compare(evidence, objective.direction, 0, 5).p_value[0])
    assert known.tolist() == [False, default_rows == 5, False]


def test_the_null_error_is_of_both_samples_about_their_common_mean():
    rows = first_of_each(table(seed=12, effect=[0, 0.4, 0]), (40, 25, 30))
    _, evidence, objective = judged(rows, np.zeros(len(rows.query_id), int), 1)
    result, quality = compare(evidence, objective.direction, 0, 3), quality_of(rows)
    default = quality[rows.config_id == 0]
    for c in (1, 2):
        mine = quality[rows.config_id == c]
        common = np.var(np.r_[mine, default], ddof=1) * (1 / len(mine) + 1 / len(default))
        welch = np.var(mine, ddof=1) / len(mine) + np.var(default, ddof=1) / len(default)
        assert result.error[0, c] == pytest.approx(np.sqrt(welch), rel=1e-6)
        assert result.null_error[0, c] == pytest.approx(np.sqrt(max(common, welch)), rel=1e-6)
    assert result.null_error[0, 1] > 1.2 * result.error[0, 1]  # the null spread includes the effect


def test_the_references_interval_is_welchs():
    rows = table(seed=13, effect=[0, 0.2, 0])
    verdicts, *_ = judged(rows, np.zeros(len(rows.query_id), int), 1, method="reference")
    quality = quality_of(rows)
    theirs = stats.ttest_ind(quality[rows.config_id == 1], quality[rows.config_id == 0], equal_var=False)
    low, high = theirs.confidence_interval(0.95)
    assert (verdicts.effect_low[0], verdicts.effect_high[0]) == pytest.approx((low, high), rel=1e-6)


@pytest.mark.parametrize("best_rows", [2, 3])
def test_the_reference_needs_three_rows_of_the_best_and_takes_an_unknown_default_for_a_half(best_rows):
    rows = first_of_each(table(seed=14, effect=[0, 0.4, 0]), (0, best_rows, 60))
    verdicts, *_ = judged(rows, np.zeros(len(rows.query_id), int), 1, method="reference")
    trajectories = [
        oracles.Trajectory(i, [1.0], 16 * 2 ** int(c), 8, "auto", 2048, 0.7, float(p), float(r), 1, i)
        for i, (c, p, r) in enumerate(zip(rows.config_id, rows.precision, rows.recall, strict=True))
    ]
    expected = oracles.judge_reference(trajectories, 3, 0.05, 16)
    assert (expected is None) == (best_rows == 2) == bool(verdicts.stands[0]) == (verdicts.config_id[0] == 0)
    if expected is not None:
        assert verdicts.improvement[0] == pytest.approx(expected["avg_improvement"], rel=1e-4)


def test_references_of_the_utility_are_the_dearest_configs_cost_and_the_defaults_latency():
    rows = table(seed=15)
    cost = np.array([0.1, 0.2, 0.05], np.float32)[rows.config_id]
    latency = 1000 * 2**rows.config_id
    for costs, expected in ((cost, 0.2), (None, 1.0)):
        known = replace(rows, cost=costs, latency_us=latency)
        *_, objective = judged(known, np.zeros(len(rows.query_id), int), 1)
        assert objective.cost_ref == pytest.approx(expected)
        assert objective.latency_ref_us == pytest.approx(1000)
