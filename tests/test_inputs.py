"""How k-means treats its arguments: scales and offsets beyond float32, dtypes, layouts, and what it refuses."""

from __future__ import annotations

import multiprocessing
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from scipy import sparse

from rb_gpu.learn.checkpoint import Checkpoint
from rb_gpu.learn.inputs import median_of
from rb_gpu.learn.kmeans import KMeansResult, kmeans, kmeans_plus_plus

RNG = np.random.default_rng(0)
X = RNG.standard_normal((2000, 8)).astype(np.float32)
CENTRES = 10 * RNG.standard_normal((6, 8))
BLOBS = CENTRES[RNG.integers(6, size=1500)] + 0.1 * RNG.standard_normal((1500, 8))


def same_clusters(found: KMeansResult, expected: KMeansResult) -> None:
    assert np.array_equal(found.labels, expected.labels)
    assert found.n_iter == expected.n_iter


@pytest.mark.parametrize("exponent", [-140, -73, 64, 120])
@pytest.mark.parametrize("start", ["k-means++", "init", "warm"])
def test_a_scale_that_float32_cannot_square_changes_nothing_else(exponent, start):
    # regression: squares that underflowed gave wrong labels or one cluster, and those that overflowed an endless loop
    scale, given = 2.0**exponent, {} if start == "k-means++" else {start: CENTRES}
    expected = kmeans(BLOBS, 6, **given)
    for dtype in (np.float32, np.float64):
        found = kmeans((BLOBS * scale).astype(dtype), 6, **{name: c * scale for name, c in given.items()})
        same_clusters(found, expected)
        if exponent == -140 and dtype == np.float32:  # float32 holds only about two digits of these numbers
            continue
        assert found.inertia / scale**2 == pytest.approx(expected.inertia, rel=1e-5)
        np.testing.assert_allclose(found.centroids.astype(float) / scale, expected.centroids, atol=1e-4)


def test_a_scaled_table_comes_to_the_bits_of_the_one_it_is_scaled_from():
    expected = kmeans(X, 6)
    scaled = kmeans(X * np.float32(2.0**80), 6)
    same_clusters(scaled, expected)
    assert np.array_equal(scaled.centroids, expected.centroids * np.float32(2.0**80))
    assert scaled.inertia == expected.inertia * 2.0**160


def test_two_points_at_the_ends_of_float32_are_two_clusters():
    # regression: squared distances were infinite, and exchanges went on for ever
    for far in (1.5e19, 3e38):
        found = kmeans(np.array([[far], [-far]] * 50, np.float32), 2)
        assert len(found.centroids) == 2 and found.inertia == 0


@pytest.mark.parametrize("name", ["init", "warm"])
@pytest.mark.parametrize("far", [1e20, 1e30])
def test_a_start_whose_distances_overflow_is_refused(name, far):
    with pytest.raises(
        ValueError, match=rf"{name} reaches .* overflow from 4.61e\+18 on; give centroids near the points"
    ):
        kmeans(X, 6, **{name: np.full((6, 8), far)})


def test_codes_hold_where_norms_are_large():
    # regression: with norms over 1.5e18 the axes of codes were NaN, a trial found them fastest, and 10,986 labels were
    # wrong
    centres = RNG.standard_normal((400, 128))
    x = (centres[RNG.integers(400, size=12_000)] + 0.3 * RNG.standard_normal((12_000, 128))).astype(np.float32)
    x *= np.float32(5e18) / np.linalg.norm(x, axis=1).max()
    found = kmeans(x, 700, max_iter=2)
    x64, c64 = x.astype(np.float64), found.centroids.astype(np.float64)
    d2 = (x64**2).sum(1)[:, None] + (c64**2).sum(1) - 2 * x64 @ c64.T
    assert (d2[np.arange(len(x)), found.labels] <= d2.min(1) * (1 + 1e-6) + 1e-10 * 5e18**2).all()


@pytest.mark.parametrize("offset", [1e4, 1e7, 1e9])
def test_what_float32_would_round_is_clustered_about_its_middle(offset):
    # regression: x was rounded before it was centred; at an offset of 1e7 the inertia was 1.8 times as large, at 1e9
    # there was one cluster
    expected, found = kmeans(BLOBS, 6), kmeans(BLOBS + offset, 6)
    same_clusters(found, expected)
    assert found.inertia == pytest.approx(expected.inertia, rel=1e-5)
    assert found.centroids.dtype == np.float64
    np.testing.assert_allclose(found.centroids - offset, expected.centroids, atol=1e-5)
    again = kmeans(BLOBS + offset, 6, warm=found.centroids)
    assert again.n_iter == 1 and np.array_equal(again.labels, found.labels)
    start = kmeans(BLOBS + offset, 6, init=CENTRES + offset)
    assert start.inertia == pytest.approx(expected.inertia, rel=1e-5)
    seeds, _ = kmeans_plus_plus(BLOBS + offset, 6)
    assert np.abs(seeds[:, None] - (BLOBS + offset)[None]).max(2).min(1).max() < 1e-5


@pytest.mark.parametrize(
    ("dtype", "result"),
    [
        (np.int8, np.float32), (np.uint16, np.float32), (np.float16, np.float32), (np.int32, np.float64),
        (np.uint64, np.float64), (np.int64, np.float64), (">f4", np.float32), (">f8", np.float64),
        (np.longdouble, np.float64),
    ],
)  # fmt: skip
def test_numbers_of_every_kind_are_taken(dtype, result):
    # regression: torch raised a TypeError for the other byte order and for long doubles
    x = np.abs(np.rint(3 * BLOBS)).astype(dtype)
    found, expected = kmeans(x, 6), kmeans(x.astype(np.float64).astype(np.float32), 6)
    assert found.centroids.dtype == result
    assert found.inertia == pytest.approx(expected.inertia, rel=1e-6)


def test_arguments_as_numpy_gives_them(tmp_path):
    # NumPy integers and floats, reversed views and read-only memory; regression: TypeErrors, and a warning of torch
    expected = kmeans(X, 6, seed=3, init=X[:6], epsilon=0.5)
    locked = X.copy()
    locked.setflags(write=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = kmeans(
            locked, np.int64(6), seed=np.int64(3), init=X[5::-1][::-1], epsilon=np.float32(0.5),
            weight=np.ones(len(X))[::-1], checkpoint=Checkpoint(tmp_path / "checkpoint", 1),
        )  # fmt: skip
    assert found.centroids.tobytes() == expected.centroids.tobytes()
    backward = kmeans(X[::-1], 6, init=X[5::-1])
    assert np.array_equal(backward.labels, kmeans(X[::-1].copy(), 6, init=X[5::-1].copy()).labels)
    # regression: NumPy takes one row of negative stride for contiguous, and torch refused it
    assert np.array_equal(kmeans(X, 1, init=X[:1][::-1]).centroids, kmeans(X, 1, init=X[:1]).centroids)


def test_weights_that_float32_cannot_hold_count_by_their_shares():
    # regression: 1e-50 is 0 in float32, and the error asked for one positive weight although they were positive
    weight = RNG.integers(1, 5, len(X)).astype(np.float64)
    expected = kmeans(X, 6, weight=weight)
    for scale in (2.0**-160, 2.0**160):
        found = kmeans(X, 6, weight=weight * scale)
        assert np.array_equal(found.centroids, expected.centroids)
        assert found.inertia == expected.inertia * scale


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"x": sparse.csr_matrix(X)}, r"x is sparse \(csr_matrix\); give x.toarray"),
        ({"x": torch.from_numpy(X).to_sparse()}, "x is sparse .* give x.to_dense"),
        ({"x": X.astype(complex)}, "x is of dtype complex128; give real numbers"),
        ({"x": torch.from_numpy(X).to(torch.complex64)}, "x is of dtype torch.complex64; give real numbers"),
        ({"x": X.astype(object)}, "x is of dtype object; give real numbers"),
        ({"init": X[:3]}, "init has 3 rows; give k=6 of them, or some as warm"),
        ({"seed": None}, "seed=None is not an integer"),
        ({"seed": 2**64}, "seed=18446744073709551616 is not an integer from"),
        ({"x": np.array([[1e160], [-1e160]] * 9), "k": 1}, "more than float64; scale x down"),
        ({"weight": np.zeros(len(X))}, "one of them positive"),
    ],
)
def test_what_cannot_be_clustered_is_refused_in_words(given: dict[str, Any], says: str):
    with pytest.raises(ValueError, match=says):
        kmeans(**({"x": X, "k": 6} | given))


def _clustered(x: np.ndarray, answers: Any) -> None:
    answers.put(kmeans(x, 8).inertia)


def test_a_process_forked_after_a_call_can_cluster_too():
    # regression: torch's own threads converted float64 input, and a forked process, which lacks them, waited for ever
    x = RNG.standard_normal((20_000, 64))
    expected = kmeans(x, 8).inertia
    float(torch.from_numpy(x).float().sum())
    fork = multiprocessing.get_context("fork")
    answers = fork.SimpleQueue()
    child = fork.Process(target=_clustered, args=(x, answers))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        child.start()
    child.join(60)
    try:
        assert child.exitcode == 0
        assert answers.get() == expected
    finally:
        child.kill()


@pytest.mark.parametrize("zeros", [0.0, 0.4, 0.9])
@pytest.mark.parametrize("rows", [1, 2, 401, 1024])
def test_medians_are_the_lower_of_the_middle_two(rows, zeros):
    rng = np.random.default_rng(rows)
    sample = np.where(rng.random((rows, 50)) < zeros, 0.0, rng.normal(size=(rows, 50))).astype(np.float32)
    lower = np.quantile(sample, 0.5, axis=0, method="lower")
    np.testing.assert_array_equal(median_of(torch.from_numpy(sample)), lower)
