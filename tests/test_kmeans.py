"""k-means against brute force and the reference document's algorithm, and its promises about seeds, weights and edge
cases.
"""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score
from test_assign import brute_force

from rb_gpu.learn import assign, choice, devices, lloyd, seeding, starts
from rb_gpu.learn.assign import Assignment
from rb_gpu.learn.assign_device import DeviceAssignment
from rb_gpu.learn.distributed import Ranks
from rb_gpu.learn.kmeans import kmeans, kmeans_plus_plus, nearest
from rb_gpu.learn.seeding import seed_plus_plus
from rb_gpu.learn.shard import Shard
from rb_gpu.learn.workers import workers


def blobs(clusters: int, per: int, dim: int, spread: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(clusters, dim)) * 3
    label = np.repeat(np.arange(clusters), per)
    return (centres[label] + spread * rng.normal(size=(len(label), dim))).astype(np.float32), label


def brute_force_labels(x: np.ndarray, centroids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    d2 = ((x[:, None].astype(np.float64) - centroids[None].astype(np.float64)) ** 2).sum(2)
    return d2.argmin(1), d2


@pytest.mark.parametrize("metric", ["l2", "cosine"])
@pytest.mark.parametrize(("n", "dim", "k"), [(500, 16, 7), (300, 1, 5), (64, 200, 64), (1000, 3, 40)])
def test_labels_are_the_exact_assignment_to_the_final_centroids(metric, n, dim, k):
    x = np.random.default_rng(1).normal(size=(n, dim)).astype(np.float32) + (10 if metric == "l2" else 0)
    result = kmeans(x, k, metric=metric, seed=3)
    points = x / np.linalg.norm(x, axis=1, keepdims=True) if metric == "cosine" else x
    _, d2 = brute_force_labels(points, result.centroids)
    chosen = d2[np.arange(n), result.labels]
    assert np.all(chosen <= d2.min(1) + 1e-5 * (1 + d2.min(1)))
    assert result.inertia == pytest.approx(chosen.sum(), rel=1e-5, abs=1e-6)


def test_from_the_same_start_it_ends_where_the_document_ends():
    x, _ = blobs(6, 40, 5, 1.5)
    start, _ = oracles.kmeans_plus_plus(x.astype(float).tolist(), 6, np.random.default_rng(0).random(6).tolist())
    centroids, labels, _ = oracles.lloyd(x.astype(float).tolist(), start, 200)
    result = kmeans(x, 6, init=np.array(start, np.float32), max_iter=200, epsilon=0.0)
    assert np.array_equal(result.labels, labels)
    np.testing.assert_allclose(result.centroids, centroids, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("seed", range(8))
def test_all_well_separated_clusters_are_found(seed):
    # without the exchange step, plain k-means++ finds 90 to 97 of 100
    x, label = blobs(100, 60, 16, 0.5)
    assert adjusted_rand_score(label, kmeans(x, 100, seed=seed).labels) > 0.999


@pytest.mark.parametrize("seed", range(8))
def test_two_centroids_in_one_cluster_are_parted_before_lloyd_divides_it(seed):
    # regression: Lloyd took up to 100 updates to divide an even cluster between two centroids, and none were left for
    # repairs
    x, label = blobs(10, 2000, 32, 1.0)
    result = kmeans(x, 10, seed=seed, max_iter=10)
    assert adjusted_rand_score(label, result.labels) > 0.999
    assert result.n_iter < 10


@pytest.mark.parametrize("share", [0.005, 0.01, 0.05])
@pytest.mark.parametrize("seed", range(5))
def test_all_clusters_are_found_among_outliers(seed, share):
    # regression: an outlier took a centroid, and the repair split off outliers instead of two clusters that shared one
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(20, 32)) * 3.5
    x = centres[rng.integers(20, size=8000)] + 0.3 * rng.normal(size=(8000, 32))
    far = rng.choice(len(x), int(share * len(x)), replace=False)
    x[far] = rng.uniform(-np.abs(centres).max(), np.abs(centres).max(), size=(len(far), 32))
    result = kmeans(x.astype(np.float32), 20, seed=seed)
    assert np.linalg.norm(centres[:, None] - result.centroids[None], axis=2).min(1).max() < 1.5
    best = kmeans(x.astype(np.float32), 20, init=centres.astype(np.float32)).inertia
    assert result.inertia <= 1.001 * best


@pytest.mark.parametrize(("clusters", "dims", "far", "outliers"), [(10, 2, 100, 4), (10, 2, 200, 20)])
def test_outliers_that_weigh_more_than_clusters_are_parted_from_them(clusters, dims, far, outliers):
    # no split parted them, nor did an exchange where the cluster to split was the lighter of those to merge: inertia
    # ended up to twice the best
    rng = np.random.default_rng(5)
    x = 6 * rng.normal(size=(clusters, dims))[rng.integers(clusters, size=2000)] + rng.normal(size=(2000, dims))
    x = np.concatenate([x, rng.uniform(-far, far, (outliers, dims))]).astype(np.float32)
    best = KMeans(clusters, n_init=30, random_state=0).fit(x).inertia_
    found = np.array([kmeans(x, clusters, seed=seed).inertia for seed in range(10)])
    assert np.mean(found) < 1.03 * best and np.max(found) < 1.06 * best


def test_inertia_is_no_worse_than_scikit_learns():
    x = np.random.default_rng(0).normal(size=(3000, 12)).astype(np.float32)
    ours = np.median([kmeans(x, 30, seed=s).inertia for s in range(5)])
    theirs = np.median([KMeans(30, n_init=1, random_state=s).fit(x).inertia_ for s in range(5)])
    assert ours <= 1.005 * theirs


def seeds_of(
    x: torch.Tensor, k: int, generator: torch.Generator, crew, weight: torch.Tensor | None = None
) -> np.ndarray:
    """The rows of x (distinct values, D = 1) that one seeding draws."""
    points = Assignment(x, torch.zeros(1), crew, 0)
    weight = torch.ones(len(x)) if weight is None else weight
    seeds = seed_plus_plus(points, Shard(x, weight, Ranks()), k, generator)
    return np.array([int((x[:, 0] == s).nonzero()[0]) for s in seeds[:, 0]])


def test_seeds_are_distributed_as_d_squared_sampling():
    # five weighted points on a line and two seeds: the joint distribution of (first, second) is known in closed form
    x, weight = torch.tensor([[0.0], [1.0], [3.0], [7.0], [7.5]]), torch.tensor([1.0, 3.0, 0.5, 2.0, 1.0])
    mass, share = (x - x.T).square().double().numpy() * weight.numpy(), weight.double().numpy() / float(weight.sum())
    law = mass / mass.sum(1, keepdims=True) * share[:, None]
    generator = torch.Generator().manual_seed(0)
    counts = np.zeros((5, 5))
    with workers() as crew:
        for _ in range(6000):
            first, second = seeds_of(x, 2, generator, crew, weight)
            counts[first, second] += 1
    possible = law > 0
    assert counts[~possible].sum() == 0
    assert stats.chisquare(counts[possible], law[possible] * counts.sum()).pvalue > 1e-4


def test_a_block_of_seeds_is_distributed_as_one_after_the_other():
    # the third and fourth seed come from one block of candidates, which are accepted with probability D²_now /
    # D²_before
    x = torch.tensor([[0.0], [1.0], [4.0], [9.0], [10.0], [30.0]])
    generator = torch.Generator().manual_seed(1)
    rng = np.random.default_rng(1)
    ours, theirs = np.zeros(6), np.zeros(6)
    with workers() as crew:
        for _ in range(4000):
            ours[seeds_of(x, 4, generator, crew)] += 1
    for _ in range(4000):
        _, indices = oracles.kmeans_plus_plus(x.double().tolist(), 4, rng.random(4).tolist())
        theirs[indices] += 1
    assert stats.chi2_contingency(np.stack([ours, theirs])).pvalue > 1e-4


def test_weights_count_as_repeated_points():
    x, _ = blobs(4, 25, 3, 1.0)
    weight = np.random.default_rng(0).integers(1, 5, len(x))
    repeated = np.repeat(x, weight, axis=0)
    start = x[[0, 30, 60, 90]]
    weighted, plain = kmeans(x, 4, init=start, weight=weight), kmeans(repeated, 4, init=start)
    np.testing.assert_allclose(weighted.centroids, plain.centroids, rtol=1e-4, atol=1e-5)
    assert weighted.inertia == pytest.approx(plain.inertia, rel=1e-5)


def test_points_of_weight_zero_are_never_seeds():
    x = np.array([[0.0, 0], [1, 0], [50, 50]], np.float32)
    for seed in range(20):
        result = kmeans(x, 3, weight=np.array([1.0, 1.0, 0.0]), seed=seed)
        assert len(result.centroids) == 2


def test_no_more_clusters_than_distinct_points(caplog):
    x = np.repeat(np.random.default_rng(0).normal(size=(7, 5)), 30, axis=0).astype(np.float32)
    with caplog.at_level(logging.WARNING):
        result = kmeans(x, 20)
    assert len(result.centroids) == 7
    assert result.inertia == pytest.approx(0, abs=1e-6)
    assert "7 distinct" in caplog.text


def test_k_equal_to_n_gives_every_point_its_own_cluster():
    x = np.random.default_rng(0).normal(size=(40, 4)).astype(np.float32)
    result = kmeans(x, 40)
    assert sorted(result.labels) == list(range(40))


def test_one_cluster_is_the_mean():
    x = np.random.default_rng(0).normal(size=(50, 4)).astype(np.float32) + 1000
    np.testing.assert_allclose(kmeans(x, 1).centroids[0], x.mean(0, dtype=np.float64), rtol=1e-6)


def test_an_empty_cluster_takes_the_group_that_has_none():
    # two of three starts are equal, so that one of them gets no point; it must take the far group
    x = np.array([[0.0], [0.1], [10.0], [10.1], [50.0]], np.float32)
    result = kmeans(x, 3, init=np.array([[0.05], [0.05], [10.05]], np.float32))
    assert len(set(result.labels)) == 3
    assert result.inertia < 0.05


def test_a_centroid_after_a_copy_keeps_its_points():
    # the second copy is drawn again, from the group without a centroid
    x = np.repeat([[-5.0], [5.0], [300.0]], 20, axis=0) + np.linspace(-0.1, 0.1, 60)[:, None]
    for seed in range(3):
        result = kmeans(x, 3, init=np.array([[-5.0], [-5.0], [300.0]]), max_iter=1, seed=seed)
        assert result.centroids[[0, 2], 0] == pytest.approx([-5.0, 300.0], abs=0.2)


@pytest.mark.parametrize("seed", range(3))
def test_outliers_do_not_take_all_empty_clusters(seed):
    # regression: the farthest points took them, and as centroids kept only themselves: ten groups had no centroid of
    # their own
    x, _ = blobs(20, 200, 8, 0.3)
    outliers = 12 * np.random.default_rng(1).normal(size=(40, 8)).astype(np.float32)
    start = np.concatenate([x[:2000:200], np.repeat(x[:1], 12, axis=0)])
    result = kmeans(np.concatenate([x, outliers]), 22, init=start, seed=seed)
    assert len(np.unique(result.labels[: len(x)])) >= 16
    assert (np.bincount(result.labels, minlength=22) > 0).all()


def test_copies_of_a_centroid_are_compared_once_and_drawn_anew_at_once(monkeypatch):
    # regression: 60 empty clusters took 60 passes over all points, and a point equally near to 60 copies was compared
    # with each in float64: 200,000 image patches took 40 s instead of 2 s
    x, _ = blobs(20, 50, 8, 0.3)
    assigned, lowered = [], []
    real_assign, real_lower = Assignment.assign, Assignment.lower
    monkeypatch.setattr(
        Assignment, "assign", lambda self, c, *rest: (assigned.append(len(c)), real_assign(self, c, *rest))[1]
    )
    monkeypatch.setattr(
        Assignment, "lower", lambda self, c, first: (lowered.append(first), real_lower(self, c, first))[1]
    )
    start = np.concatenate([x[:4], np.repeat(x[3:4], 60, axis=0), x[100:104]])
    result = kmeans(x, 68, init=start, max_iter=1)
    assert assigned == [8, 68]
    assert 1 <= len(lowered) <= 10 and min(lowered) >= 68
    assert (np.bincount(result.labels, minlength=68) > 0).all()
    labels, _ = brute_force_labels(x, result.centroids)
    assert np.array_equal(result.labels, labels)


def test_same_seed_same_bits_and_another_seed_another_start():
    x = np.random.default_rng(0).normal(size=(2000, 8)).astype(np.float32)
    first, again, other = (kmeans(x, 25, seed=s, max_iter=3) for s in (5, 5, 6))
    assert first.centroids.tobytes() == again.centroids.tobytes()
    assert first.centroids.tobytes() != other.centroids.tobytes()


def test_restarts_keep_the_lowest_inertia():
    x = np.random.default_rng(0).normal(size=(600, 4)).astype(np.float32)
    assert kmeans(x, 30, n_init=6, seed=1).inertia <= kmeans(x, 30, n_init=1, seed=1).inertia


def test_labels_are_those_of_the_best_restart_and_not_of_the_last(monkeypatch):
    x, ends = np.random.default_rng(0).normal(size=(300, 3)).astype(np.float32), []
    repaired = lloyd.Solver._repaired
    monkeypatch.setattr(lloyd.Solver, "_repaired", lambda *given: ends.append(repaired(*given)) or ends[-1])
    for seed in range(6):
        result = kmeans(x, 12, n_init=3, seed=seed)
        runs = ends[-3:]
        assert result.inertia == min(run.inertia for run in runs)
        assert np.array_equal(result.labels, brute_force_labels(x, result.centroids)[0])
    assert any(ends[i + 2].inertia > min(ends[i].inertia, ends[i + 1].inertia) for i in range(0, len(ends), 3))


def test_a_repair_that_ends_higher_is_undone(monkeypatch):
    (x, _), runs, iterate = blobs(12, 40, 4, 1.0), [], lloyd.Solver._lloyd
    monkeypatch.setattr(lloyd.Solver, "_lloyd", lambda *given: runs.append(iterate(*given)) or runs[-1])
    heaped = torch.from_numpy(x[:12] + np.arange(12, dtype=np.float32)[:, None])
    monkeypatch.setattr(lloyd, "exchange", lambda *_: heaped.clone())
    higher = 0
    for seed in range(4):
        result = kmeans(x, 12, seed=seed)
        assert result.inertia <= runs[-1].inertia
        higher += result.inertia < runs[-1].inertia
        labels, d2 = brute_force_labels(x, result.centroids)
        assert np.array_equal(result.labels, labels) and result.inertia == pytest.approx(d2.min(1).sum(), rel=1e-5)
    assert higher > 0


def test_what_has_converged_is_repaired_as_long_as_what_has_not():
    # an exchange was judged after two updates and the search ended where the run before it had converged: small tables
    # of many clusters ended 1 % higher
    gains = []
    for seed in range(12):
        x = np.random.default_rng(seed).random((150, 4)).astype(np.float32)
        settled = kmeans(x, 15, init=x[:15], max_iter=300)
        gains.append(1 - kmeans(x, 15, warm=settled.centroids, max_iter=300).inertia / settled.inertia)
    assert min(gains) > 0 and np.mean(gains) > 0.06


def test_repairs_are_no_more_than_allowed(monkeypatch):
    x, tried, exchange = blobs(80, 20, 3, 0.2)[0], [], lloyd.exchange
    monkeypatch.setattr(lloyd, "exchange", lambda *given: tried.append(1) or exchange(*given))
    monkeypatch.setattr(starts, "SMALL_WORK", 0)
    kmeans(x, 80, seed=1)
    assert len(tried) > 2
    tried.clear()
    monkeypatch.setattr(lloyd, "MAX_REPAIRS", 1)
    kmeans(x, 80, seed=1)
    assert len(tried) == 2  # one in the early rounds, and one after convergence


def test_codes_threads_and_row_blocks_do_not_change_a_bit(monkeypatch):
    # sums are integers and every assignment is exact, so that what changes only time or memory cannot change the result
    x, _ = blobs(40, 100, 40, 1.5)
    monkeypatch.setattr(choice, "SMALL_WORK", 0)
    whole = kmeans(x, 60, seed=2)
    threads = torch.get_num_threads()
    for count, budget in ((1, None), (threads, 0), (3, 0)):
        torch.set_num_threads(count)
        try:
            other = kmeans(x, 60, seed=2, code_budget=budget)
        finally:
            torch.set_num_threads(threads)
        assert whole.centroids.tobytes() == other.centroids.tobytes()
        assert np.array_equal(whole.labels, other.labels)
        assert (whole.inertia, whole.n_iter) == (other.inertia, other.n_iter)


def test_rows_in_another_order_come_to_the_same_centroids():
    x, _ = blobs(9, 150, 6, 1.0)
    order = np.random.default_rng(0).permutation(len(x))
    start = x[::150]
    here, there = kmeans(x, 9, init=start), kmeans(x[order], 9, init=start)
    assert here.centroids.tobytes() == there.centroids.tobytes()
    assert np.array_equal(here.labels[order], there.labels)


def test_directions_of_rows_whose_squares_leave_float32():
    # such rows pass the loader; regression: normalised, they became rows of zeros or of arbitrary length
    x, _ = blobs(6, 50, 8, 0.3)
    scaled = x.copy()
    scaled[::3] *= np.float32(1e30)
    scaled[1::3] *= np.float32(1e-30)
    base, far = kmeans(x, 6, metric="cosine", seed=1), kmeans(scaled, 6, metric="cosine", seed=1)
    assert np.array_equal(base.labels, far.labels)
    np.testing.assert_allclose(far.centroids, base.centroids, atol=1e-5)


def test_tiles_do_not_change_the_result(monkeypatch):
    x, _ = blobs(9, 150, 6, 1.0)
    whole = kmeans(x, 9, seed=2)
    monkeypatch.setitem(devices.TILE_SCORES, "cpu", 1)
    monkeypatch.setattr(assign, "LARGEST_TILE", 7)
    monkeypatch.setattr(assign, "LEAST_TURN", 1)
    tiled = kmeans(x, 9, seed=2)
    assert np.array_equal(whole.labels, tiled.labels)
    assert whole.centroids.tobytes() == tiled.centroids.tobytes()
    assert whole.inertia == tiled.inertia


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.01, 100), st.floats(-50, 50))
def test_scale_and_place_do_not_matter(seed, scale, shift):
    x, _ = blobs(5, 30, 4, 0.5, seed=seed % 7)
    base, moved = kmeans(x, 5, seed=seed), kmeans(x * np.float32(scale) + np.float32(shift), 5, seed=seed)
    assert adjusted_rand_score(base.labels, moved.labels) > 0.99


def test_cosine_ignores_lengths_and_keeps_centroids_on_the_sphere():
    x, _ = blobs(6, 50, 8, 0.3)
    lengths = np.random.default_rng(0).uniform(0.1, 10, (len(x), 1)).astype(np.float32)
    base, scaled = kmeans(x, 6, metric="cosine", seed=1), kmeans(x * lengths, 6, metric="cosine", seed=1)
    assert np.array_equal(base.labels, scaled.labels)
    np.testing.assert_allclose(np.linalg.norm(scaled.centroids, axis=1), 1, rtol=1e-6)


def test_points_are_compared_with_no_centroid_off_the_sphere(monkeypatch):
    # neither with one extrapolated beyond its mean, nor with one that an exchange has made
    asked, exchanged, assign, exchange = [], [], Assignment.assign, lloyd.exchange
    monkeypatch.setattr(
        Assignment, "assign", lambda self, c, *rest: (asked.append(c.norm(dim=1)), assign(self, c, *rest))[1]
    )
    monkeypatch.setattr(lloyd, "exchange", lambda *given: exchanged.append(exchange(*given)) or exchanged[-1])
    for x, k in ((blobs(60, 20, 4, 0.3)[0], 60), (np.random.default_rng(0).normal(size=(3000, 8)), 30)):
        kmeans(x, k, metric="cosine", seed=1)
    assert any(one is not None for one in exchanged)
    np.testing.assert_allclose(torch.cat(asked), 1.0, rtol=1e-5)


def test_one_huge_outlier_does_not_swallow_the_rest():
    x, label = blobs(5, 50, 4, 0.1)
    x = np.vstack([x, np.full((1, 4), 1e6, np.float32)])
    assert adjusted_rand_score(np.append(label, 5), kmeans(x, 6, seed=0).labels) > 0.99


def test_torch_in_torch_out_and_the_input_is_left_alone():
    x = torch.randn(100, 5, generator=torch.Generator().manual_seed(0))
    before = x.clone()
    result = kmeans(x, 4, metric="cosine")
    assert isinstance(result.centroids, torch.Tensor)
    assert torch.equal(x, before)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: kmeans(np.zeros((0, 3)), 2), "shape"),
        (lambda: kmeans(np.zeros(5), 2), "shape"),
        (lambda: kmeans(np.ones((5, 2)), 0), "k=0"),
        (lambda: kmeans_plus_plus(np.ones((5, 2)), 0), "k=0"),
        (lambda: kmeans(np.ones((5, 2)), 2, metric="l1"), "metric"),
        (lambda: kmeans(np.ones((5, 2)), 2, init="random"), "init"),
        (lambda: kmeans(np.ones((5, 2)), 2, init=np.ones((2, 3))), "init"),
        (lambda: kmeans(np.full((5, 2), np.nan), 2), "NaN"),
        (lambda: kmeans(np.zeros((5, 2)), 2, metric="cosine"), "norm 0"),
        (lambda: kmeans(np.ones((5, 2)), 2, weight=np.ones(4)), "weight"),
        (lambda: kmeans(np.ones((5, 2)), 2, weight=-np.ones(5)), "weight"),
    ],
)
def test_a_bad_argument_is_named(call, says):
    with pytest.raises(ValueError, match=says):
        call()


def test_cuda_without_a_device_says_what_to_do():
    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    with pytest.raises(ValueError, match=r"device=cuda.*install.*device=cpu"):
        kmeans(np.ones((5, 2)), 1, device="cuda")


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and pytest -m cuda")


@pytest.mark.cuda
@needs_gpu
@pytest.mark.parametrize("precision", ["tf32", "bf16", "ieee"])
def test_labels_of_a_gpu_are_those_of_float64_in_every_block_shape(precision, monkeypatch):
    # tuning would try only the fastest shape of each size; and one shape per case takes a third of the time to compile
    interpreted, triton = pytest.importorskip("interpreted"), pytest.importorskip("triton")
    triton_assign = pytest.importorskip("rb_gpu.learn.triton_assign")

    def labels(x: torch.Tensor, centroids: torch.Tensor) -> torch.Tensor:
        points = DeviceAssignment(x.cuda(), x[::7].mean(0).cuda(), engine="triton", precision=precision)
        points.assign(centroids.cuda())
        return points.labels_N.cpu()

    def shapes(dims: int) -> list[Any]:
        width = triton_assign.width_of(dims)
        return triton_assign._fitting(triton_assign.block_shapes(), {}, WIDTH=width, PRECISION=precision)

    def only(shape: Any) -> Any:
        return triton.autotune([shape], [])(triton_assign.kernels.nearest_kernel)

    # enough points to keep the tensor cores busy, and one tuned call
    for dims in (128, 384):
        x = torch.randn(200_000, dims, generator=torch.Generator().manual_seed(0))
        truth = nearest(x, x[:1000], torch.device("cpu"))[0]
        if dims == 128:
            assert torch.equal(labels(x, x[:1000]), truth)
        for shape in shapes(dims):
            with monkeypatch.context() as patch:
                patch.setattr(triton_assign, "nearest_kernel", only(shape))
                assert torch.equal(labels(x, x[:1000]), truth), shape
    # the inputs of the tests in Triton's interpreter, and as there a few of them for the other precisions
    for i, (name, (x, centroids)) in enumerate(interpreted.cases().items()):
        if precision == "tf32" or name in interpreted.FEW:
            fitting = shapes(x.shape[1])
            monkeypatch.setattr(triton_assign, "nearest_kernel", only(fitting[i % len(fitting)]))
            assert torch.equal(labels(x, centroids), brute_force(x, centroids).argmin(1)), name


@pytest.mark.cuda
@needs_gpu
def test_a_gpu_comes_to_the_same_bits_whether_points_lie_there_or_are_sent():
    x, _ = blobs(20, 5000, 32, 0.5)
    runs = [kmeans(x, 20, device="cuda", memory_budget=budget, epsilon=0.0) for budget in (None, 2**20)]
    assert runs[0].centroids.tobytes() == runs[1].centroids.tobytes()
    assert np.array_equal(runs[0].labels, runs[1].labels)


@pytest.mark.cuda
@needs_gpu
def test_cuda_agrees_with_the_cpu():
    x, _ = blobs(20, 500, 32, 0.5)
    start = x[:: len(x) // 20][:20]
    on_gpu, on_cpu = kmeans(x, 20, init=start, device="cuda"), kmeans(x, 20, init=start, device="cpu")
    assert on_gpu.inertia == pytest.approx(on_cpu.inertia, rel=1e-4)


@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_a_warm_start_goes_on_where_the_last_clustering_ended(metric):
    x, _ = blobs(20, 60, 8, 0.8)
    whole = kmeans(x, 20, metric=metric, epsilon=0.0)
    again = kmeans(x, 20, metric=metric, epsilon=0.0, seed=9, warm=whole.centroids)
    assert again.n_iter == 1 and again.inertia <= whole.inertia * (1 + 1e-6)
    assert np.array_equal(again.labels, whole.labels)  # and in the same order of clusters


@pytest.mark.parametrize("seed", range(5))
def test_a_stale_start_finds_all_clusters(seed):
    # of 60 clusters 20 are gone and 20 are new, and 10 centroids are duplicated
    x, label = blobs(60, 40, 16, 0.5, seed)
    old = np.stack([x[label == one].mean(0) for one in range(40)])
    now, now_label = x[label >= 20], label[label >= 20]
    start = np.concatenate([old, old[20:30] + 0.01])
    result = kmeans(now, 40, seed=seed, warm=start[10:50])
    assert adjusted_rand_score(now_label, result.labels) > 0.999
    assert kmeans(now, 40, seed=seed, warm=start[30:33]).inertia == pytest.approx(result.inertia, rel=1e-4)


def test_further_restarts_are_drawn_and_the_best_is_kept(monkeypatch):
    x, _ = blobs(30, 40, 8, 1.5)
    stale = np.repeat(x[:1], 30, axis=0)
    one, more = (kmeans(x, 30, seed=1, warm=stale, n_init=n).inertia for n in (1, 4))
    assert more <= one
    monkeypatch.setattr(starts, "SMALL_WORK", 0)
    given, seed = [], lloyd.seed_plus_plus
    monkeypatch.setattr(lloyd, "seed_plus_plus", lambda *args: given.append(args[-1] is not None) or seed(*args))
    kmeans(x, 30, seed=1, warm=stale, n_init=3)
    assert given == [True, False, False]


@pytest.mark.parametrize("warm", [np.ones((6, 5), np.float32), np.ones((3, 4), np.float32), np.full((3, 5), np.nan)])
def test_a_warm_start_of_another_shape_is_refused(warm):
    x, _ = blobs(5, 20, 5, 1.0)
    with pytest.raises(ValueError, match="warm has"):
        kmeans(x, 5, warm=warm)
    with pytest.raises(ValueError, match="warm has 5 rows; give at most k=5 of them, and no init"):
        kmeans(x, 5, init=x[:5], warm=x[:5])


ALIVE_AND_DEAD = np.array([[0, 0], [10, 0], [0, 10], [100, 100], [101, 100.0]])


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("dead", [0.0, 2.0**-70, 2.0**-200])
def test_starts_among_points_without_weight_are_drawn_anew(dead, seed):
    # regression: the mean of two clusters without mass was 0 / 0: NaN among the centroids, and an error from the next
    # sums
    rng = np.random.default_rng(seed)
    x = np.repeat(ALIVE_AND_DEAD, 200, axis=0) + 0.1 * rng.standard_normal((1000, 2))
    weight = np.repeat([1, 1, 1, dead, dead], 200)
    result = kmeans(x, 4, weight=weight, warm=ALIVE_AND_DEAD[3:], seed=seed)
    assert np.linalg.norm(ALIVE_AND_DEAD[:3, None] - result.centroids, axis=2).min(1).max() < 0.1
    assert np.array_equal(result.labels, brute_force_labels(x.astype(np.float32), result.centroids)[0])


def test_a_start_that_keeps_points_without_weight_alone_is_drawn_anew():
    # regression: points were counted instead of their weight; such a cluster stayed, and a group had no centroid
    rng = np.random.default_rng(0)
    x = (np.repeat(ALIVE_AND_DEAD, 200, axis=0) + 0.1 * rng.standard_normal((1000, 2))).astype(np.float32)
    result = kmeans(x, 3, weight=np.repeat([1, 1, 1, 0, 0], 200), init=ALIVE_AND_DEAD[[0, 1, 3]])
    assert len(np.unique(result.labels[:600])) == 3
    assert np.array_equal(result.labels, brute_force_labels(x, result.centroids)[0])


@pytest.mark.parametrize("offset", [0, 3e3, 1e4])
def test_the_repair_works_far_from_the_origin(offset):
    # regression: torch.cdist computes by products from 26 rows on, so that costs of merges were noise; at an offset of
    # 1e4 the inertia was a quarter higher
    x, _ = blobs(40, 40, 2, 0.1)
    moved = (x + np.float32(offset)).astype(np.float32)
    found = np.mean([kmeans(moved, 40, seed=s).inertia for s in range(6)])
    near = np.mean([kmeans(moved - np.float32(offset), 40, seed=s).inertia for s in range(6)])
    assert found <= 1.03 * near


def test_the_repair_works_beside_a_point_that_is_very_far_off():
    # it moved the middle about which merges were chosen: of 40 runs 13 left two centroids in one cluster
    x, _ = blobs(6, 100, 3, 0.3)
    x = np.concatenate([x, np.full((1, 3), 1e12, np.float32)])
    found = [kmeans(x, 7, seed=seed).inertia for seed in range(30)]
    assert max(found) < 1.001 * min(found)


@pytest.mark.parametrize("k", [5, 300])
def test_torchs_default_dtype_and_autocast_change_no_bit(k):
    # regression: factories without a dtype made arrays that the kernels read as float64: silently wrong labels, and a
    # TypeError for bfloat16
    x = np.random.default_rng(0).normal(size=(6000, 64)).astype(np.float32)
    expected = kmeans(x, k, max_iter=4, weight=np.ones(len(x)))
    for dtype in (torch.float64, torch.bfloat16):
        torch.set_default_dtype(dtype)
        try:
            found = kmeans(x, k, max_iter=4)
        finally:
            torch.set_default_dtype(torch.float32)
        assert found.centroids.tobytes() == expected.centroids.tobytes()
        assert np.array_equal(found.labels, expected.labels)
    points, centroids = torch.from_numpy(x), torch.from_numpy(expected.centroids)
    labels, _ = nearest(points, centroids, torch.device("cpu"))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = kmeans(x, k, max_iter=4)
        assert torch.equal(nearest(points, centroids, torch.device("cpu"))[0], labels)
    assert found.centroids.tobytes() == expected.centroids.tobytes()


def test_many_seeds_take_little_memory():
    # regression: a block had up to K/2 candidates, and all distances between them were held: 32,768 seeds took 6.4 GiB
    x = np.random.default_rng(0).normal(size=(20_000, 2)).astype(np.float32)
    largest = 0
    real = seeding._accept

    def accept(candidates_MD, *rest):
        nonlocal largest
        largest = max(largest, len(candidates_MD))
        return real(candidates_MD, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(seeding, "_accept", accept)
        seeds, _ = kmeans_plus_plus(x, 10_000)
    assert len(np.unique(seeds, axis=0)) == 10_000
    assert largest == seeding.MOST_CANDIDATES


@pytest.mark.parametrize("exponent", [-60, 60])
def test_inertia_is_in_units_of_x_whatever_frame_held_it(exponent):
    # beyond 2^40, points are scaled by a power of two, which changes no bit
    x = np.random.default_rng(0).normal(size=(500, 3)).astype(np.float32)
    plain, far = (kmeans(points, 7, seed=3) for points in (x, np.ldexp(x, exponent)))
    assert np.array_equal(far.labels, plain.labels)
    assert far.inertia == pytest.approx(plain.inertia * 2.0 ** (2 * exponent), rel=1e-6)
    away = np.ldexp(x, exponent).astype(np.float64) - far.centroids[far.labels]
    assert far.inertia == pytest.approx(float((away**2).sum()), rel=1e-5)


def test_bounds_rule_distances_out_and_the_share_that_is_left_is_told():
    rng = np.random.default_rng(1)
    x = (4 * rng.normal(size=(50, 16))[rng.integers(50, size=5000)] + rng.normal(size=(5000, 16))).astype(np.float32)
    assert 0 < kmeans(x, 50).computed_share < 0.9


@pytest.mark.parametrize("epsilon", ["small", None, [1e-4]])
def test_epsilon_is_a_number(epsilon):
    # regression: a bare TypeError of float()
    with pytest.raises(ValueError, match=r"epsilon=.* is not a number; give 0 or more"):
        kmeans(np.eye(4, dtype=np.float32), 2, epsilon=epsilon)


def test_epsilon_is_of_the_centroids_shift_over_the_points_in_median_distances():
    # Lloyd's iterations in float64, and the first of them after which the root mean square shift is at most epsilon
    rng = np.random.default_rng(2)
    x = np.concatenate([rng.normal(size=(n, 3)) + place for n, place in ((400, 0), (120, 2), (60, -2), (20, 4))])
    x = x.astype(np.float32)
    weight = rng.uniform(0.5, 2.0, len(x)).astype(np.float32)
    centroids, shifts = x[[0, 1, 2, 3, 450]].astype(np.float64), []
    typical = np.median(np.linalg.norm(x - np.median(x, axis=0), axis=1))
    for _ in range(30):
        label = ((x[:, None] - centroids) ** 2).sum(2).argmin(1)
        mass = np.bincount(label, weight, 5)
        means = np.stack([np.bincount(label, weight * x[:, d], 5) / mass for d in range(3)], axis=1)
        shifts.append(np.sqrt(mass @ ((means - centroids) ** 2).sum(1) / mass.sum()) / typical)
        centroids = means
    asked = 0
    for t in (1, 3, 6):
        if shifts[t] < 0.98 * min(shifts[:t]):
            epsilon = 0.99 * min(shifts[:t]) if t == 1 else np.sqrt(shifts[t] * min(shifts[:t]))
            found = kmeans(x, 5, init=x[[0, 1, 2, 3, 450]], epsilon=float(epsilon), weight=weight)
            assert found.n_iter == 1 + next(i for i, shift in enumerate(shifts) if shift <= epsilon)
            asked += 1
    assert asked >= 2


@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_momentum_ends_lower_and_is_not_slower(metric, monkeypatch):
    x = np.random.default_rng(4).normal(size=(4000, 10)).astype(np.float32)
    carried = [kmeans(x, 40, seed=seed, metric=metric, max_iter=300) for seed in range(5)]
    for name in ("MOMENTUM", "LEAST_MOMENTUM"):
        monkeypatch.setattr(lloyd, name, 0.0)
    plain = [kmeans(x, 40, seed=seed, metric=metric, max_iter=300) for seed in range(5)]
    assert np.mean([run.inertia for run in carried]) < 0.998 * np.mean([run.inertia for run in plain])
    assert np.mean([run.n_iter for run in carried]) <= np.mean([run.n_iter for run in plain])


def test_small_repairs_are_left_to_momentum_which_ends_no_higher(monkeypatch):
    x = np.random.default_rng(4).normal(size=(4000, 24)).astype(np.float32)
    tried, exchange = [], lloyd.exchange
    monkeypatch.setattr(lloyd, "exchange", lambda *given: tried.append(1) or exchange(*given))

    def mean_inertia() -> float:
        return float(np.mean([kmeans(x, 60, seed=seed, metric="cosine").inertia for seed in range(3)]))

    few, rounds = mean_inertia(), len(tried)
    monkeypatch.setattr(lloyd, "WORTH_A_ROUND", 0.0)
    assert few < mean_inertia()
    assert 3 <= rounds < 0.8 * (len(tried) - rounds)


@pytest.mark.parametrize("max_iter", [25, 300])
def test_the_last_update_goes_to_the_means_alone(max_iter, monkeypatch):
    # a centroid that is still extrapolated when updates are cut off, or when nothing changes, would be no mean
    x = np.random.default_rng(4).normal(size=(4000, 10)).astype(np.float32)
    held, assigned = [], Assignment.assign

    def assign(points: Assignment, centroids_KD: torch.Tensor, moved_K: torch.Tensor | None = None) -> None:
        held.append(points.labels_N.clone())
        assigned(points, centroids_KD, moved_K)

    monkeypatch.setattr(Assignment, "assign", assign)
    monkeypatch.setattr(lloyd, "MAX_REPAIRS", 0)
    result = kmeans(x, 40, max_iter=max_iter, epsilon=0.0)
    label = held[-1].numpy()
    means = np.stack([x[label == j].mean(0, dtype=np.float64) for j in range(40)])
    np.testing.assert_allclose(result.centroids, means, rtol=1e-6, atol=1e-7)
    assert (result.n_iter == max_iter) == (max_iter == 25)
    assert np.array_equal(result.labels, label) == (max_iter > 25)


@pytest.mark.parametrize("exponent", [-20, 20])
def test_a_power_of_two_changes_no_label_where_doubled_centroids_are_repaired(exponent):
    # exchanges are drawn by squared distances, which are far from 1 here
    rng = np.random.default_rng(3)
    x = (6 * rng.normal(size=(60, 4))[rng.integers(60, size=3000)] + rng.normal(size=(3000, 4))).astype(np.float32)
    plain, scaled = kmeans(x, 60, seed=1), kmeans(np.ldexp(x, exponent), 60, seed=1)
    assert np.array_equal(scaled.labels, plain.labels)
    assert scaled.inertia == plain.inertia * 2.0 ** (2 * exponent) and scaled.n_iter == plain.n_iter


def test_a_cluster_whose_members_cancel_out_on_the_sphere_stays_where_it_was():
    x = np.array([[1.0, 0.0], [-1.0, 0.0], [0.1, -1.0], [-0.1, -1.0]], np.float32)
    start = np.array([[0.0, 1.0], [0.0, -1.0]], np.float32)
    found = kmeans(x, 2, start, metric="cosine", max_iter=5)
    assert found.labels.tolist() == [0, 0, 1, 1]
    assert found.centroids[0].tolist() == [0.0, 1.0]


def test_what_a_cluster_is_divided_at_is_drawn_by_weight_times_squared_distance(monkeypatch):
    rng = np.random.default_rng(0)
    x = (np.repeat([[0.0, 0.0], [90.0, 0.0], [0.0, 90.0]], 4, axis=0) + rng.normal(size=(12, 2))).astype(np.float32)
    weight, drawn = rng.uniform(0.2, 3.0, 12).astype(np.float32), []
    monkeypatch.setattr(lloyd, "exchange", lambda points, centroids, mass, drawn_KD, *rest: drawn.append(drawn_KD))
    for seed in range(120):
        kmeans(x, 3, metric="l2", seed=seed, weight=weight)
    found = torch.cat(drawn).numpy()
    assert len(found) >= 360
    for first in (0, 4, 8):
        mine, w = x[first : first + 4].astype(float), weight[first : first + 4]
        share = w * ((mine - np.average(mine, axis=0, weights=w)) ** 2).sum(1)
        times = np.array([(np.abs(found - point).max(1) < 1e-3).sum() for point in mine])
        assert stats.chisquare(times, times.sum() * share / share.sum()).pvalue > 0.001
