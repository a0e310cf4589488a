"""The oracles compared with scipy, statsmodels and scikit-learn where these have the same function, else by hand."""

import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import (
    Params,
    Trajectory,
    assign,
    benjamini_hochberg,
    blend,
    blend_ramped,
    complete_linkage,
    cosine,
    create_pattern,
    create_pattern_corrected,
    empirical_bayes_posterior,
    f1,
    f1_exact,
    fastgrnn_cell,
    holm,
    inertia,
    interpolate,
    judge_reference,
    kmeans_plus_plus,
    lloyd,
    paule_mandel,
    product,
    round_half_away,
    snap,
    vote,
    ward,
    weighted_moments,
    welch,
    welch_one_sided,
    welch_two_sided,
)
from scipy import stats
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import pdist
from sklearn.cluster import KMeans
from sklearn.metrics import f1_score
from statsmodels.stats.meta_analysis import combine_effects
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.weightstats import DescrStatsW

SEEDS = range(8)
TIERS = ("small", "large")


def same_partition(a, b):
    return len(set(zip(a, b, strict=True))) == len(set(a)) == len(set(b))


def arm(n, quality, spread=0.0, **params):
    """n trajectories with precision = recall = quality, alternating by +-spread."""
    rows = []
    for i in range(n):
        value = quality + (spread if i % 2 else -spread)
        rows.append(Trajectory(id=i, embedding=[1.0, 0.0], precision=value, recall=value, **params))
    return rows


# Quality and small helpers


def test_f1_is_sklearns_and_the_documents_is_just_below():
    truth, guess = [1, 1, 1, 0, 0, 1], [1, 0, 1, 1, 0, 1]
    p, r = 3 / 4, 3 / 4
    assert f1_exact(p, r) == pytest.approx(f1_score(truth, guess))
    assert f1_exact(p, r) - 1e-6 < f1(p, r) < f1_exact(p, r)
    assert f1(0.0, 0.0) == f1_exact(0.0, 0.0) == 0.0
    assert product(0.5, 0.5) == 0.25


@pytest.mark.parametrize(
    ("value", "rounded"), [(0.5, 1), (1.5, 2), (2.5, 3), (-0.5, -1), (-2.5, -3), (2.4, 2), (0.49999999999999994, 0)]
)
def test_halves_round_away_from_zero(value, rounded):
    assert round_half_away(value) == rounded


def test_snap_and_vote_break_ties_downwards():
    assert snap(1536, [2048, 1024]) == 1024
    assert snap(1537, [2048, 1024]) == 2048
    assert vote(["large", "small"], [0.5, 0.5], TIERS) == "small"
    assert vote(["large", "small"], [0.75, 0.5], TIERS) == "large"
    assert vote(["large"], [0.0], TIERS) == "large"  # never a tier without a vote
    with pytest.raises(KeyError):
        vote(["unknown"], [1.0], TIERS)


# Clustering


def test_seeding_takes_the_point_where_the_cumulative_sum_reaches_the_threshold():
    points = [[0.0], [1.0], [3.0]]  # from point 0 the squared distances are 0, 1, 9
    assert kmeans_plus_plus(points, 2, [0.0, 0.05])[1] == [0, 1]
    assert kmeans_plus_plus(points, 2, [0.0, 0.1])[1] == [0, 1]  # reaching the threshold is enough
    assert kmeans_plus_plus(points, 2, [0.0, 0.11])[1] == [0, 2]
    assert kmeans_plus_plus(points, 2, [0.99, 0.7]) == ([[3.0], [1.0]], [2, 1])  # squared distances 9, 4, 0
    assert kmeans_plus_plus([[1.0], [1.0]], 2, [0.6, 0.9])[1] == [1, 0]  # as in the reference, all zeros select point 0


def test_seeding_frequencies_are_proportional_to_squared_distance():
    points = np.random.default_rng(0).normal(size=(6, 2))
    squares = ((points - points[2]) ** 2).sum(axis=1)
    grid = (np.arange(4000) + 0.5) / 4000
    counts = Counter(kmeans_plus_plus(points, 2, [2.5 / 6, u])[1][1] for u in grid)
    expected = squares / squares.sum() * 4000
    assert all(abs(counts[i] - expected[i]) <= 1.0 for i in range(6))


def test_seeding_reaches_the_threshold_for_the_largest_uniform():
    points = np.random.default_rng(1).normal(size=(500, 3))
    _, indices = kmeans_plus_plus(points, 3, [0.0, math.nextafter(1.0, 0.0), math.nextafter(1.0, 0.0)])
    assert indices[1] == 499 and indices[2] in (498, 499)


@pytest.mark.parametrize("seed", SEEDS)
def test_lloyd_is_sklearns(seed):
    rng = np.random.default_rng(seed)
    points = np.concatenate([rng.normal(c, 0.6, size=(15, 3)) for c in (-2.0, 0.0, 2.0, 4.0)])
    start, _ = kmeans_plus_plus(points, 4, rng.random(4))
    centroids, labels, n_iter = lloyd(points, start, 300)
    theirs = KMeans(4, init=np.array(start), n_init=1, max_iter=300, tol=0.0, algorithm="lloyd").fit(points)
    assert labels == theirs.labels_.tolist() == assign(points, centroids)
    np.testing.assert_allclose(centroids, theirs.cluster_centers_, rtol=1e-10, atol=1e-12)
    assert inertia(points, centroids, labels) == pytest.approx(theirs.inertia_, rel=1e-10)
    assert n_iter >= 2
    assert lloyd(points, start, 300, to_the_letter=True) == (centroids, labels, n_iter)


def test_lloyd_of_one_cluster_is_the_mean_but_not_to_the_letter():
    points = [[0.0], [1.0], [5.0]]
    assert lloyd(points, [[0.0]], 10) == ([[2.0]], [0, 0, 0], 2)
    assert lloyd(points, [[0.0]], 10, to_the_letter=True) == ([[0.0]], [0, 0, 0], 1)


def test_lloyd_keeps_an_empty_cluster_and_stops_at_max_iter():
    points = [[0.0], [1.0]]
    assert lloyd(points, [[0.0], [50.0]], 10)[0] == [[0.5], [50.0]]
    centroids, labels, n_iter = lloyd([[0.0], [2.0], [3.0], [10.0]], [[0.0], [2.0]], 1)
    assert (centroids, labels, n_iter) == ([[0.0], [5.0]], [0, 1, 1, 1], 1)
    assert assign([[0.0], [2.0], [3.0], [10.0]], centroids) == [0, 0, 1, 1]  # labels don't match these centroids


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("threshold", [0.95, 0.5, -0.2])
def test_complete_linkage_is_scipys(seed, threshold):
    points = np.random.default_rng(seed).normal(size=(25, 3))
    theirs = fcluster(linkage(pdist(points, "cosine"), "complete"), 1.0 - threshold, "distance")
    labels = complete_linkage(points, threshold)
    assert same_partition(labels, theirs)
    assert [labels.index(c) for c in range(max(labels) + 1)] == sorted(labels.index(c) for c in set(labels))
    for i in range(25):
        for j in range(i):
            assert labels[i] != labels[j] or cosine(points[i], points[j]) > threshold


def test_complete_linkage_makes_no_chain_and_is_strict():
    angles = np.radians([0.0, 15.0, 30.0])  # neighbours are over 0.95, the ends are not
    chain = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    assert len(set(complete_linkage(chain, 0.95))) == 2
    assert complete_linkage([[1.0, 0.0], [2.0, 0.0]], 1.0) == [0, 1]
    assert cosine([0.0, 0.0], [1.0, 0.0]) == 0.0


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("n_clusters", [1, 2, 5, 11, 20])
def test_ward_with_equal_weights_is_scipys(seed, n_clusters):
    points = np.random.default_rng(seed).normal(size=(20, 4))
    theirs = fcluster(linkage(points, "ward"), n_clusters, "maxclust")
    assert same_partition(ward(points, [3.0] * 20, n_clusters), theirs)


@pytest.mark.parametrize("seed", SEEDS)
def test_ward_with_weights_is_scipys_on_repeated_points(seed):
    rng = np.random.default_rng(seed)
    points, weights = rng.normal(size=(12, 3)), rng.integers(1, 6, size=12)
    owner = np.repeat(np.arange(12), weights)
    for n_clusters in (2, 4, 7):
        theirs = fcluster(linkage(points[owner], "ward"), n_clusters, "maxclust")
        assert same_partition([ward(points, weights, n_clusters)[i] for i in owner], theirs)


# Patterns


def test_pattern_by_the_document():
    rows = [
        Trajectory(0, [1.0, 0.0], ef_search=10, n_probes=1, temperature=0.0, precision=1.0, recall=0.5, latency_us=100),
        Trajectory(1, [0.0, 1.0], ef_search=21, n_probes=4, temperature=1.0, precision=0.5, recall=1.0, latency_us=101),
        Trajectory(
            2, [0.5, 0.5], ef_search=999, n_probes=9, temperature=2.0, precision=0.0, recall=1.0, latency_us=102
        ),
    ]
    pattern = create_pattern([*rows, replace(rows[2], latency_us=103)], pattern_id=7, now=5)
    assert pattern["centroid"] == [0.5, 0.5]
    assert pattern["optimal_params"] == Params(16, 3, "auto", 2048, 0.5)  # rounded from 15.5 and 2.5
    assert pattern["confidence"] == 0.25
    assert (pattern["avg_precision"], pattern["avg_recall"]) == (0.375, 0.875)
    assert (pattern["avg_latency_us"], pattern["support_count"]) == (101, 4)
    assert (pattern["id"], pattern["created_at"], pattern["abstraction_level"], pattern["children"]) == (7, 5, 0, [])


@pytest.mark.parametrize("seed", SEEDS)
def test_pattern_means_are_numpys(seed):
    rng = np.random.default_rng(seed)
    p, r, ef, probes, t = (
        rng.random(30),
        rng.random(30),
        rng.integers(1, 500, 30),
        rng.integers(1, 64, 30),
        rng.random(30),
    )
    rows = [
        Trajectory(i, [1.0], int(ef[i]), int(probes[i]), temperature=t[i], precision=p[i], recall=r[i])
        for i in range(30)
    ]
    params = create_pattern(rows)["optimal_params"]
    assert params.ef_search == round(np.average(ef, weights=p * r))
    assert params.n_probes == round(np.average(probes, weights=p * r))
    assert params.temperature == pytest.approx(np.average(t, weights=p * r))
    assert create_pattern_corrected(rows, ["auto"], f1_exact)["optimal_params"].temperature == pytest.approx(
        np.average(t, weights=2 * p * r / (p + r))
    )


def test_pattern_without_weight_takes_the_unweighted_mean():
    rows = [replace(t, ef_search=ef) for t, ef in zip(arm(3, 0.0, model_tier="large"), (10, 20, 60), strict=True)]
    assert create_pattern(rows)["optimal_params"].ef_search == 30
    corrected = create_pattern_corrected([*rows, replace(rows[0], model_tier="small")], TIERS)
    assert corrected["optimal_params"].model_tier == "large"
    assert corrected["quality"] == 0.0


def test_corrected_pattern_votes_the_tier_and_snaps_the_context():
    rows = [
        *arm(1, 1.0, model_tier="large", context_tokens=1024),
        *arm(4, 0.5, model_tier="small", context_tokens=4096),
    ]
    pattern = create_pattern_corrected(rows, TIERS)  # weights 1 and 4 * 0.25: a tie, and 2560 is half-way
    assert pattern["optimal_params"].model_tier == "small"
    assert pattern["optimal_params"].context_tokens == 1024
    assert "confidence" not in pattern and pattern["quality"] == 0.4


# Verdicts


def test_weighted_moments_are_statsmodels():
    rng = np.random.default_rng(0)
    x, w = rng.normal(3.0, 2.0, 40), rng.random(40)
    theirs, ours = DescrStatsW(x, weights=w, ddof=0), weighted_moments(x, w)
    assert (ours.n, ours.sum_w) == (40, pytest.approx(theirs.sum_weights))
    assert (ours.mean, ours.m2) == (pytest.approx(theirs.mean), pytest.approx(theirs.sumsquares))
    assert ours.sum_w2 == pytest.approx(np.square(w).sum())
    assert weighted_moments([1.0, 2.0], [0.0, 0.0]) == (2, 0.0, 0.0, 0.0, 0.0)


@pytest.mark.parametrize("seed", SEEDS)
def test_welch_is_scipys(seed):
    rng = np.random.default_rng(seed)
    a, b = rng.normal(0.3, 1.0, 5 + seed), rng.normal(0.0, 2.0, 30)
    two = stats.ttest_ind(a, b, equal_var=False)
    assert welch(a, b) == (pytest.approx(two.statistic), pytest.approx(two.df))
    assert welch_two_sided(a, b) == pytest.approx(two.pvalue)
    for margin in (0.0, 0.25):
        one = stats.ttest_ind(a, b + margin, equal_var=False, alternative="greater")
        assert welch_one_sided(a, b, margin) == pytest.approx(one.pvalue)


def test_welch_without_spread_is_nan_and_rounding_is_no_spread():
    assert math.isnan(welch_one_sided([1.0], [0.0, 0.5]))
    assert math.isnan(welch_one_sided([1.0, 1.0], [0.0, 0.0]))
    assert math.isnan(welch_two_sided([0.1] * 3, [0.1] * 10))  # the float mean of 0.1s isn't 0.1
    assert welch([1.0, 1.0], [0.0, 0.5]) == (3.0, 1.0)  # zero variance on one side only is allowed


@settings(max_examples=20, deadline=None)  # statsmodels collects garbage in every call, 0.1 s each
@given(st.lists(st.floats(0.0, 1.0), min_size=1, max_size=20))
def test_corrections_are_statsmodels(p):
    np.testing.assert_allclose(holm(p), multipletests(p, method="holm")[1], atol=1e-12)
    np.testing.assert_allclose(benjamini_hochberg(p), multipletests(p, method="fdr_bh")[1], atol=1e-12)


@pytest.mark.parametrize("correct", [holm, benjamini_hochberg])
def test_corrections_leave_nan_out(correct):
    assert correct([]) == []
    adjusted = correct([0.01, math.nan, 0.02])
    assert math.isnan(adjusted[1]) and [adjusted[0], adjusted[2]] == correct([0.01, 0.02])


def test_reference_verdict_by_hand():
    rows = [*arm(40, 0.5, 0.05), *arm(20, 0.8, 0.05, ef_search=200), *arm(2, 1.0, ef_search=400)]
    verdict = judge_reference(rows, 10, 0.05, default_ef_search=100)
    quality = np.array([2 * t.precision**2 / (2 * t.precision + 1e-6) for t in rows[40:60]])
    products, baseline = np.array([t.precision**2 for t in rows]), np.mean([t.precision**2 for t in rows[:40]])
    consistency = 1.0 / (1.0 + quality.std() / quality.mean())
    assert verdict["config"] == rows[40].params and verdict["support_count"] == 20  # the group of 2 is skipped
    assert verdict["p_value"] == pytest.approx(stats.ttest_ind(products[40:60], products, equal_var=False).pvalue)
    assert verdict["consistency"] == pytest.approx(consistency)
    assert verdict["confidence"] == pytest.approx(quality.mean() * consistency)
    assert verdict["avg_improvement"] == pytest.approx((quality.mean() - baseline) / baseline)
    absent = judge_reference(rows, 10, 0.05, default_ef_search=1)
    assert absent["avg_improvement"] == pytest.approx((quality.mean() - 0.5) / 0.5)


def test_reference_verdict_is_none_where_it_must_be():
    rows = [*arm(40, 0.5, 0.05), *arm(20, 0.8, 0.05, ef_search=200)]
    assert judge_reference(rows, 61, 0.05, 100) is None
    assert judge_reference(rows, 60, 1e-30, 100) is None
    assert judge_reference(rows[:40], 3, 0.05, 100) is None  # with one config p is 1
    assert judge_reference(arm(9, 0.7), 3, 1.0, 100) is None  # without variance p is NaN
    assert judge_reference(arm(2, 0.7), 1, 1.0, 100) is None  # no group has 3 rows
    assert judge_reference([], 0, 1.0, 100) is None
    zeros = [*arm(3, 0.0), *(replace(t, ef_search=300 + i) for i, t in enumerate(arm(30, 0.9, 0.05)))]
    assert judge_reference(zeros, 3, 0.05, 100) is None  # significant, but its consistency is 0 / 0


def test_reference_verdict_with_a_worthless_default_has_no_improvement():
    rows = [*arm(20, 0.0), *arm(20, 0.8, 0.05, ef_search=200)]
    verdict = judge_reference(rows, 3, 0.05, 100)
    assert verdict["config"].ef_search == 200 and verdict["avg_improvement"] is None


def test_reference_verdict_shows_the_documents_flaws():
    same = [*arm(200, 0.7, 0.02), *arm(10, 0.71, 0.02, ef_search=200)]
    assert judge_reference(same, 3, 1.0, 100)["avg_improvement"] > 0.4  # F1 is compared with p * r
    worse = [*arm(4, 0.3, 0.01), *(replace(t, ef_search=300 + i) for i, t in enumerate(arm(30, 0.9, 0.05)))]
    assert judge_reference(worse, 3, 0.05, 1)["config"].ef_search == 100  # significantly worse than the whole
    tied = [*arm(4, 0.75, 0.25, ef_search=7), *arm(4, 0.75, 0.25, ef_search=3)]
    assert judge_reference(tied, 3, 1.0, 100)["config"].ef_search == 7  # the first one seen


@pytest.mark.parametrize("seed", SEEDS)
def test_paule_mandel_is_statsmodels(seed):
    rng = np.random.default_rng(seed)
    variances = rng.uniform(0.01, 0.3, 4 + 3 * seed)
    effects = rng.normal(0.2, np.sqrt(variances + (0.0 if seed % 3 == 0 else 0.5)))
    # statsmodels returns 0 if its last step overshoots by rounding, hence a looser atol
    theirs = combine_effects(effects, variances, method_re="pm", atol=1e-8, maxiter=500).tau2
    assert paule_mandel(effects, variances) == pytest.approx(theirs, abs=1e-7)
    assert theirs > 0.0 or seed % 3 == 0


def test_paule_mandel_with_equal_variances_is_dersimonian_laird_and_closed_form():
    effects = np.array([0.1, 0.9, -0.4, 1.3])
    theirs = combine_effects(effects, np.full(4, 0.1), method_re="dl").tau2
    assert paule_mandel(effects, [0.1] * 4) == pytest.approx(theirs) == pytest.approx(effects.var(ddof=1) - 0.1)
    assert paule_mandel([0.5, 0.5, 0.5], [0.1, 0.2, 0.3]) == 0.0
    assert paule_mandel([0.5], [0.1]) == paule_mandel([], []) == 0.0
    assert paule_mandel(effects * 1e6, [1e-6] * 4) == pytest.approx(effects.var(ddof=1) * 1e12)


def test_posterior_is_the_precision_weighted_mean():
    mean, variance = empirical_bayes_posterior(1.0, 0.5, 0.2, 0.25)
    grid = np.linspace(-10.0, 10.0, 200_001)
    density = stats.norm.pdf(grid, 0.2, 0.5) * stats.norm.pdf(1.0, grid, math.sqrt(0.5))
    density /= density.sum()
    assert mean == pytest.approx(density @ grid)
    assert variance == pytest.approx(density @ (grid - mean) ** 2)
    assert empirical_bayes_posterior(1.0, 0.5, 0.2, 0.0) == (0.2, 0.0)
    assert empirical_bayes_posterior(1.0, math.inf, 0.2, 0.25) == (0.2, 0.25)
    assert empirical_bayes_posterior(1.0, 0.5, 0.2, math.inf) == (1.0, 0.5)
    assert all(math.isnan(v) for v in empirical_bayes_posterior(1.0, 0.0, 0.2, 0.0))


# Lookup


def test_interpolation_by_hand():
    matches = [
        (Params(10, 1, "large", 1024, 0.0), 1.0, 0.5),
        (Params(21, 4, "small", 4096, 1.0), 0.5, 1.0),
        (Params(9999, 99, "large", 9999, 2.0), -0.9, 1.0),  # a negative similarity has weight 0
    ]
    params, confidence = interpolate(matches, TIERS, [1024, 4096])
    assert params == Params(16, 3, "small", 1024, 0.5)
    assert confidence == pytest.approx(1.0 / 3.0)
    assert interpolate(matches[2:], TIERS, [1024]) is None
    assert interpolate([], TIERS, [1024]) is None
    assert interpolate(matches[:1], TIERS, [1024, 4096])[0] == matches[0][0]


def test_blend_jumps_and_the_ramp_does_not():
    router, bank = Params(1, 1, "small", 1000, 0.0), Params(9, 9, "large", 2000, 1.0)
    assert blend(router, bank, 0.5) == blend_ramped(router, bank, 0.5, [1000, 2000]) == router
    assert blend(router, bank, math.nan) == router
    assert blend(router, bank, 0.50001).temperature == pytest.approx(0.15, abs=1e-4)
    assert blend_ramped(router, bank, 0.50001, [1000, 2000]).temperature == pytest.approx(0.0, abs=1e-4)
    assert blend(router, bank, 0.9) == router._replace(temperature=pytest.approx(0.27), context_tokens=1270)
    assert blend_ramped(router, bank, 0.75, [1000, 1100, 2000]) == router._replace(
        temperature=pytest.approx(0.1125), context_tokens=1100
    )
    assert blend_ramped(router, bank, 1.0, [1000]).temperature == pytest.approx(0.3)


def test_the_documents_blend_can_lose_a_token():
    same = Params(1, 1, "small", 6000, 0.5)
    confidences = [0.5 + i / 1000 for i in range(1, 501)]
    assert {blend(same, same, c).context_tokens for c in confidences} == {5999, 6000}
    assert {blend_ramped(same, same, c, [6000]).context_tokens for c in confidences} == {6000}


def test_fastgrnn_cell_is_the_matrix_form():
    rng = np.random.default_rng(0)
    x, h, W, U = rng.normal(size=3), rng.normal(size=4), rng.normal(size=(4, 3)), rng.normal(size=(4, 4))
    b_gate, b_candidate, zeta, nu = rng.normal(size=4), rng.normal(size=4), 1.0, -4.0
    sigmoid = stats.logistic.cdf
    z, c = sigmoid(W @ x + U @ h + b_gate), np.tanh(W @ x + U @ h + b_candidate)
    expected = z * h + (sigmoid(zeta) * (1 - z) + sigmoid(nu)) * c
    np.testing.assert_allclose(fastgrnn_cell(x, h, W, U, b_gate, b_candidate, zeta, nu), expected, rtol=1e-12)
    saturated = fastgrnn_cell([1e4], [0.5], [[1.0]], [[0.0]], [0.0], [0.0], 0.0, -1e4)
    assert saturated == [0.5]
