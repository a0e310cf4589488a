"""The starts of k-means on small tables: against NumPy, and what they promise about quality, work and seeds."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn import datasets

from rb_gpu.learn import starts
from rb_gpu.learn.distributed import Ranks
from rb_gpu.learn.kmeans import kmeans
from rb_gpu.learn.shard import Shard

MOMENTUM = (0.9, 0.01, 0.5)


def normalised(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def one_run(
    x: np.ndarray, weight: np.ndarray, uniform: np.ndarray, max_iter: int, least_shift: float, on_sphere: bool
) -> tuple[np.ndarray, float]:
    def drawn(mass: np.ndarray, number: float) -> int:
        return int(np.searchsorted(np.cumsum(mass), number * mass.sum(), side="right"))

    def squares(rows: list[int]) -> np.ndarray:
        return ((x[:, None] - x[rows]) ** 2).sum(2).min(1)

    rows = [drawn(weight, uniform[0, 0])]
    for numbers in uniform[1:]:
        candidates = [drawn(weight * squares(rows), number) for number in numbers]
        rows.append(min(candidates, key=lambda row: weight @ squares([*rows, row])))
    centroids, still = x[rows], False
    previous, k = centroids, len(rows)
    for update in range(max_iter):
        plain = still or update == max_iter - 1
        label = ((x[:, None] - centroids) ** 2).sum(2).argmin(1)
        mass = np.bincount(label, weight, k)
        assert (mass > 0).all()
        mean = np.stack([weight[label == j] @ x[label == j] / mass[j] for j in range(k)])
        mean = normalised(mean) if on_sphere else mean
        shift2 = mass @ ((mean - centroids) ** 2).sum(1) / mass.sum()
        moved = mean + (0 if plain else max(0.5, 0.9 - 0.01 * update)) * (centroids - previous)
        centroids, previous = (normalised(moved) if on_sphere else moved), centroids
        if shift2 <= least_shift**2:
            if plain:
                break
            still = True
    return centroids, float(weight @ ((x[:, None] - centroids) ** 2).sum(2).min(1))


def run(x: np.ndarray, weight: np.ndarray, uniform: np.ndarray, max_iter: int, on_sphere: bool, work: float = 1e12):
    best = np.empty((uniform.shape[1], x.shape[1]), np.float32)
    rows, columns = (np.ascontiguousarray(one, np.float32) for one in (x, x.T))
    enough = starts.best_of_starts(
        rows, columns, weight.astype(np.float32), uniform, max_iter, 1e-4, MOMENTUM, on_sphere, work, best
    )
    return best if enough else None


@pytest.mark.parametrize("on_sphere", [False, True])
@pytest.mark.parametrize("max_iter", [1, 3, 100])
def test_the_best_run_is_that_of_numpy(max_iter, on_sphere):
    rng = np.random.default_rng(5)
    x = (4 * rng.normal(size=(5, 3))[rng.integers(5, size=200)] + rng.normal(size=(200, 3))).astype(np.float32)
    x, weight, uniform = normalised(x) if on_sphere else x, rng.exponential(size=200), rng.random((6, 5, 3))
    runs = [one_run(x.astype(float), weight, one, max_iter, 1e-4, on_sphere) for one in uniform]
    best, least = min(runs, key=lambda made: made[1])
    found = run(x, weight, uniform, max_iter, on_sphere)
    np.testing.assert_allclose(found, best, atol=1e-3)
    assert float(weight @ ((x[:, None] - found) ** 2).sum(2).min(1)) == pytest.approx(least, rel=1e-5)


def test_work_bounds_the_starts_and_the_updates_of_one():
    rng = np.random.default_rng(1)
    x, weight, uniform = rng.normal(size=(400, 2)), np.ones(400), rng.random((10, 8, 1))
    assignment = 400 * 2 * 8
    assert np.array_equal(run(x, weight, uniform, 10**9, False, 0), run(x, weight, uniform[:1], 2, False))
    # seeds and three updates exceed the work: one more update ends the first run, which is the only one
    most = run(x, weight, uniform, 10**9, False, 3.5 * assignment)
    assert np.array_equal(most, run(x, weight, uniform[:1], 4, False))


def test_rows_of_weight_zero_are_no_seeds_and_too_few_others_no_start():
    x, weight = np.repeat(np.arange(6.0)[:, None], 3, axis=0), np.repeat([1.0, 1, 0, 0, 1, 1], 3)
    uniform = np.random.default_rng(2).random((10, 4, 2))
    assert sorted(run(x, weight, uniform, 1, False)[:, 0]) == [0, 1, 4, 5]
    assert run(x, weight, np.random.default_rng(2).random((10, 5, 2)), 1, False) is None


def test_only_small_tables_have_several_starts(monkeypatch):
    x = torch.from_numpy(np.random.default_rng(3).normal(size=(100, 4)).astype(np.float32))
    shard, generator = Shard(x, torch.ones(100), Ranks()), torch.Generator().manual_seed(0)
    state = generator.get_state()

    def start(k: int) -> torch.Tensor | None:
        return starts.best_start(shard, k, 100, 1e-4, MOMENTUM, False, generator)

    for k in (1, 101):
        assert start(k) is None
    monkeypatch.setattr(starts, "SMALL_WORK", 100 * 4 * 5 - 1)
    assert start(5) is None
    assert torch.equal(generator.get_state(), state)
    monkeypatch.setattr(starts, "SMALL_WORK", 100 * 4 * 5)
    assert start(5).shape == (5, 4)


@pytest.mark.parametrize(("name", "k", "best"), [("wine", 3, 2370689.6868), ("iris", 3, 78.851441)])
def test_a_small_table_ends_at_its_optimum(name, k, best):
    # regression: one in four seeds left wine 11 % above it, as no exchange of three clusters pays there
    x = getattr(datasets, f"load_{name}")().data
    assert all(kmeans(x, k, seed=seed).inertia == pytest.approx(best, rel=1e-6) for seed in range(20))
