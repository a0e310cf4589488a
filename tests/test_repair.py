"""The repair against NumPy: what merges cost, what splits gain, and which of them are exchanged."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from pretend import pretended

from rb_gpu.learn import devices, repair
from rb_gpu.learn.assign import Assignment
from rb_gpu.learn.distributed import Ranks
from rb_gpu.learn.shard import Shard, peaks
from rb_gpu.learn.sums import ClusterSums
from rb_gpu.learn.workers import workers


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_a_merge_costs_what_it_adds_to_the_inertia(offset):
    # torch.cdist computes by products from 26 rows on, which cancel far from the origin
    rng = np.random.default_rng(0)
    centroids, mass = (rng.normal(size=(40, 3)) + offset).astype(np.float32), rng.exponential(size=40)
    cost, partner = repair._merge_costs(torch.from_numpy(centroids), torch.from_numpy(mass))
    each = centroids.astype(np.float64)
    added = np.full((40, 40), np.inf)
    for i in range(40):
        for j in set(range(40)) - {i}:
            mean = (mass[i] * each[i] + mass[j] * each[j]) / (mass[i] + mass[j])
            added[i, j] = mass[i] * ((each[i] - mean) ** 2).sum() + mass[j] * ((each[j] - mean) ** 2).sum()
    np.testing.assert_allclose(cost, added[np.arange(40), partner], rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(cost, added.min(1), rtol=1e-3, atol=1e-9)


def test_the_costs_of_merges_fit_the_memory_that_is_kept_for_tiles(monkeypatch):
    # regression: from 16,384 clusters on they took 8 GB of a card on which 4 GB were kept free
    k = 1500
    monkeypatch.setitem(devices.TILE_SCORES, "cuda", k * k)
    with pretended() as operations:
        repair._merge_costs(torch.randn(k, 4, device="cuda"), torch.ones(k, dtype=torch.float64, device="cuda"))
    assert operations.memory.peak < 3 * 4 * k * k


def test_a_split_gains_what_two_means_inside_the_cluster_save():
    rng = np.random.default_rng(1)
    size = [1, 2, 3, 9, 14, 300]
    label, weight = np.repeat(np.arange(6), size), rng.exponential(size=329).astype(np.float32)
    x = (rng.normal(size=(6, 4))[label] + rng.normal(size=(329, 4))).astype(np.float32)
    # of 300 points the halves stay where the plane was, which saves a fraction of what to part this one does
    x[-1] += 20
    centroids = np.stack([np.average(x[label == c], axis=0, weights=weight[label == c]) for c in range(6)])
    drawn = np.stack([x[label == c][-1] for c in range(6)])
    known = np.arange(6) != 4
    with workers() as crew:
        points = Assignment(torch.from_numpy(x), torch.zeros(4), crew, 0)
        points.labels_N.copy_(torch.from_numpy(label))
        shard = Shard(points.x_ND, torch.from_numpy(weight), Ranks())
        halves = ClusterSums(shard, peaks(points.x_ND, crew, torch.device("cpu"))[0], 12, crew)
        before = np.bincount(label, weight * ((x - centroids[label]) ** 2).sum(1))
        gain, moved = repair._split_gains(
            points, torch.from_numpy(before), *(torch.from_numpy(v.astype(np.float32)) for v in (centroids, drawn)),
            torch.from_numpy(known), halves,
        )  # fmt: skip
    parted = []
    for c in range(6):
        mine, w = x[label == c].astype(np.float64), weight[label == c]
        pair = np.stack([2 * centroids[c] - drawn[c], drawn[c]])
        for _ in range(repair.SPLIT_ITERATIONS):
            d2 = ((mine[:, None] - pair) ** 2).sum(2)
            nearer, after = d2.argmin(1), w @ d2.min(1)
            pair = np.stack([np.average(mine[nearer == h], axis=0, weights=w[nearer == h]) if (nearer == h).any()
                             else pair[h] for h in (0, 1)])  # fmt: skip
        saved, apart = before[c] - after, np.stack([centroids[c], drawn[c]])
        parting = before[c] - w @ ((mine[:, None] - apart) ** 2).sum(2).min(1)
        if parting > repair.LEAST_RATIO * saved:
            saved, pair = parting, apart
            parted.append(c)
        assert float(gain[c]) == pytest.approx(saved if known[c] else 0.0, rel=1e-5, abs=1e-4)
        np.testing.assert_allclose(moved[2 * c : 2 * c + 2], pair, atol=1e-5)
    assert parted == [5]


def test_the_cheapest_merges_pay_for_the_most_gainful_splits_and_no_cluster_is_taken_twice(monkeypatch):
    rng = np.random.default_rng(2)
    exchanged = []
    for _ in range(200):
        k = int(rng.integers(3, 10))
        cost, gain, mass = rng.exponential(size=k), rng.exponential(size=k) * rng.choice([0.3, 2.0, 9.0]), rng.random(k)
        mass[rng.random(k) < 0.2], gain[rng.random(k) < 0.2] = 0.0, 0.0
        partner = (np.arange(k) + rng.integers(1, k, size=k)) % k
        # the inertia is such that the gain of one exchange is large relative to it, or negligible
        d2, weight = (rng.random(k) + 9.0) * rng.choice([1.0, 200.0]), rng.uniform(1.0, 5.0, k)
        if rng.random() < 0.1:
            d2 *= 1e-4
        centroids, halves = rng.normal(size=(k, 2)), rng.normal(size=(2 * k, 2))

        inertia = d2 * weight
        expected, free, done = centroids.copy(), set(range(k)), 0
        for i in sorted(range(k), key=lambda i, cost=cost: cost[i]):
            pair = {i, int(partner[i])}
            if not pair <= free:
                continue
            split = max(free, key=lambda c, gain=gain: (gain[c], c))
            gone = min(pair - {split} if split in pair else pair, key=lambda c, i=i, mass=mass: (mass[c], c != i))
            [kept] = pair - {gone}
            pays = gain[split] > repair.LEAST_RATIO * cost[i]
            tried = gain[split] > max(repair.WORTH_TRYING * inertia.sum(), repair.LEAST_COVERED * cost[i])
            if gain[split] <= 0 or not (pays or (tried and done == 0)):
                break
            free -= {gone, kept, split}
            if mass[gone] + mass[kept] > 0:
                expected[kept] = np.average(centroids[[gone, kept]], axis=0, weights=mass[[gone, kept]])
            expected[split], expected[gone], done = halves[2 * split], halves[2 * split + 1], done + 1
            if not pays:
                break
        if inertia.max() <= repair.LEAST_COVERED * cost.min():
            done = 0

        told = torch.from_numpy(cost), torch.from_numpy(partner)
        monkeypatch.setattr(repair, "_merge_costs", lambda *_, told=told: told)
        monkeypatch.setattr(repair, "_split_gains", lambda *_, gain=gain, halves=halves: (
            torch.from_numpy(gain), torch.from_numpy(halves)))  # fmt: skip
        points = SimpleNamespace(d2_N=torch.from_numpy(d2), labels_N=torch.arange(k))
        sums = SimpleNamespace(weight_N=torch.from_numpy(weight), ranks=Ranks())
        found = repair.exchange(points, torch.from_numpy(centroids), torch.from_numpy(mass), None, None, sums)
        assert (found is None) == (done == 0)
        if found is not None:
            np.testing.assert_allclose(found, expected, atol=1e-6)
        exchanged.append(done)
    assert (np.bincount(exchanged, minlength=4)[:4] > 5).all()
