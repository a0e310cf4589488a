"""Every name of the reference document has a counterpart here; corrected formulas agree with their scalar oracles."""

from __future__ import annotations

from inspect import signature

import numpy as np
import oracles
import pytest
import torch

import rb_gpu
from rb_gpu.errors import DataError
from rb_gpu.learn import PatternExtractor, VerdictJudge, hierarchy, learn
from rb_gpu.learn.config import JudgeConfig, ParamsConfig, TrainConfig
from rb_gpu.learn.evidence import f1_score
from rb_gpu.learn.recorded import from_trajectories
from rb_gpu.types import LearnedPattern, QueryTrajectory

FIELDS = {
    rb_gpu.QueryTrajectory: "id query_embedding search_params retrieved_ids precision recall latency_us "
    "feedback timestamp",
    rb_gpu.SearchParams: "ef_search n_probes model_tier context_tokens temperature",
    rb_gpu.LearnedPattern: "id centroid optimal_params confidence support_count avg_precision avg_recall "
    "avg_latency_us created_at updated_at abstraction_level children",
    rb_gpu.Verdict: "pattern_id recommended_params confidence evidence",
    rb_gpu.VerdictEvidence: "support_count avg_improvement p_value consistency",
    rb_gpu.PatternMatch: "pattern similarity",
    rb_gpu.OptimizedParams: "params confidence source",
    rb_gpu.ReasoningBankStats: "total_trajectories total_patterns total_verdicts pattern_hit_rate "
    "avg_recommendation_confidence avg_improvement_percent",
    PatternExtractor: "k max_iter epsilon",
    VerdictJudge: "min_samples alpha",
    rb_gpu.RouterDecision: "params reasoning_confidence reasoning_pattern_id",
}
CALLS = {
    rb_gpu.ReasoningBank: "record_trajectory find_similar_patterns optimized_params record_feedback stats "
    "export from_export",
    PatternExtractor: "extract",
    VerdictJudge: "judge",
    rb_gpu.FastGRNNRouter: "forward forward_with_reasoning",
    hierarchy: "consolidate prune build_hierarchy",
}


@pytest.mark.parametrize("kind", FIELDS, ids=lambda kind: kind.__name__)
def test_every_field_of_the_document_is_there(kind):
    assert set(FIELDS[kind].split()) <= set(signature(kind).parameters)


@pytest.mark.parametrize("owner", CALLS, ids=lambda owner: owner.__name__)
def test_every_call_of_the_document_is_there(owner):
    assert all(callable(getattr(owner, name)) for name in CALLS[owner].split())


def cluster_of(seed: int, n: int, good: bool = True) -> list[QueryTrajectory]:
    rng = np.random.default_rng(seed)
    centre = rng.normal(size=6)
    out = []
    for i in range(n):
        params = rb_gpu.SearchParams(
            ef_search=int(rng.choice([16, 33, 64])), n_probes=int(rng.choice([1, 4])),
            model_tier=str(rng.choice(["small", "large"])), context_tokens=int(rng.choice([1000, 3000])),
            temperature=float(rng.choice([0.0, 0.35, 1.0])),
        )  # fmt: skip
        p, r = rng.random(2) * good
        embedding = (centre + 0.01 * rng.normal(size=6)).astype(np.float32)
        out.append(QueryTrajectory(i, embedding, params, p, r, int(rng.integers(500, 900)), i))
    return out


@pytest.mark.parametrize(("seed", "good"), [(0, True), (1, True), (2, True), (3, False)])
def test_a_pattern_is_the_documents_with_its_corrections(seed, good):
    trajectories = cluster_of(seed, 57, good)
    [pattern] = PatternExtractor(k=1).extract(trajectories)
    latency = {"small": [], "large": []}
    for t in trajectories:
        latency[t.search_params.model_tier].append(t.latency_us)
    tiers = sorted(latency, key=lambda tier: np.mean(latency[tier]))
    rows = []
    for t in trajectories:
        s = t.search_params
        rows.append(oracles.Trajectory(
            t.id, t.query_embedding, s.ef_search, s.n_probes, s.model_tier, s.context_tokens, s.temperature,
            t.precision, t.recall, t.latency_us, t.timestamp,
        ))  # fmt: skip
    expected = oracles.create_pattern_corrected(rows, tiers)
    best, wanted = pattern.optimal_params, expected["optimal_params"]
    assert (best.ef_search, best.n_probes) == (wanted.ef_search, wanted.n_probes)
    assert (best.model_tier, best.context_tokens) == (wanted.model_tier, wanted.context_tokens)
    assert best.temperature == pytest.approx(wanted.temperature, abs=1e-6)
    assert pattern.quality == pytest.approx(expected["quality"], rel=1e-5, abs=1e-9)
    assert pattern.avg_precision == pytest.approx(expected["avg_precision"], rel=1e-5)
    assert pattern.avg_recall == pytest.approx(expected["avg_recall"], rel=1e-5)
    assert pattern.avg_latency_us == pytest.approx(expected["avg_latency_us"], abs=1)
    assert pattern.support_count == 57
    assert pattern.children == ()


def test_small_clusters_are_left_out_and_k_over_n_still_clusters():
    far = QueryTrajectory(900, -np.ones(6, np.float32), rb_gpu.SearchParams(), 1.0, 1.0, 1, 1)
    trajectories = [*cluster_of(5, 40), far]
    patterns = PatternExtractor(k=2).extract(trajectories)
    assert [p.support_count for p in patterns] == [40]
    repeated = [t for _ in range(4) for t in cluster_of(6, 5)]
    repeated = [t._replace(id=i) for i, t in enumerate(repeated)]
    assert sorted(p.support_count for p in PatternExtractor(k=500).extract(repeated)) == [4] * 5


def test_queries_that_are_all_alike_are_one_pattern():
    # regression: DataError, although one cluster of one embedding is what the document makes of them
    alike = [t._replace(query_embedding=np.ones(6, np.float32)) for t in cluster_of(8, 30)]
    [pattern] = PatternExtractor(k=3).extract(alike)
    mean = np.mean([t.precision * t.recall for t in alike])
    assert pattern.support_count == 30 and pattern.quality == pytest.approx(mean)


def test_opposite_queries_of_one_pattern_have_a_centroid():
    # regression: one-dimensional embeddings of both signs cancel out, and training ended in "a centroid has norm 0; the
    # artifact is damaged"
    signs = [t._replace(query_embedding=np.float32([(-1) ** i])) for i, t in enumerate(cluster_of(9, 30))]
    [pattern] = PatternExtractor(k=1).extract(signs)
    assert pattern.support_count == 30 and np.linalg.norm(pattern.centroid) == pytest.approx(1)


def test_trajectories_are_learned_from_as_a_table_of_them():
    # regression: AttributeError: 'list' object has no attribute 'x_QD'
    config = TrainConfig(judge=JudgeConfig(latency_weight=0.0), params=ParamsConfig(temperature_step=0.01))
    trajectories = cluster_of(3, 60)
    ours, of_table = learn(trajectories, config), learn(from_trajectories(trajectories, config.params), config)
    for name, array in of_table.data.arrays.items():
        np.testing.assert_array_equal(ours.data.arrays[name], array)
    with pytest.raises(DataError, match=r"^trajectories\[0\]: trajectory is of type int, not QueryTrajectory"):
        learn([7], config)


def test_quality_is_one_function():
    for p, r in ((0.0, 0.0), (1.0, 1.0), (0.3, 0.9)):
        ours = float(f1_score(torch.tensor([p]).double(), torch.tensor([r]).double())[0])
        assert ours == pytest.approx(oracles.f1_exact(p, r))


def test_a_pattern_has_the_declared_types():
    [pattern] = PatternExtractor(k=1).extract(cluster_of(7, 30))
    assert isinstance(pattern, LearnedPattern)
    assert pattern.centroid.dtype == np.float32
