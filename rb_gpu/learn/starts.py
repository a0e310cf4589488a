"""The start of k-means on a small table: the best of several whole runs, made by one compiled function.

On a small table such a run takes less time than one exchange of clusters, and where clusters are few, a new start
leaves a poor local optimum more often than exchanges do. Suffixes: N points, K clusters, D dims, S starts, L candidates
for a seed.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rb_gpu.learn.shard import Shard
from rb_gpu.learn.vectors import compiled

# most starts: twice as many as other libraries make where they make several, in less time
STARTS = 20
# multiplications per assignment of a table that is still small, and of all its starts together, which take 3 to 6 ms
# then: past that, no start begins and the current one ends
SMALL_WORK, MOST_WORK = 2**19, 2**24
# shortest vector on the sphere that still has a direction
LEAST_NORM = 1e-12


@compiled()
def _drawn(running_N: Any, uniform: float) -> Any:
    """The row drawn by a uniform number below 1, given the running sum of masses; a row without mass never is."""
    target, low, high = uniform * running_N[-1], 0, running_N.shape[0] - 1
    while low < high:
        middle = (low + high) // 2
        if running_N[middle] > target:
            high = middle
        else:
            low = middle + 1
    return low


@compiled()
def _square(x_DN: Any, rows_RD: Any, row: int, sum_N: Any) -> None:
    """Writes the squared distance of each point to the row to sum (N,) float32."""
    sum_N[:] = 0
    # the inner loop runs over points, so that the compiler can vectorise it
    for t in range(x_DN.shape[0]):
        place = rows_RD[row, t]
        for i in range(x_DN.shape[1]):
            sum_N[i] += (x_DN[t, i] - place) * (x_DN[t, i] - place)


@compiled()
def _lower(x_DN: Any, centroids_KD: Any, j: int, labels_N: Any, d2_N: Any, sum_N: Any) -> None:
    """Lowers labels and squared distances d2 by centroid j. sum (N,) is scratch space."""
    _square(x_DN, centroids_KD, j, sum_N)
    for i in range(sum_N.shape[0]):
        labels_N[i] = j if sum_N[i] < d2_N[i] else labels_N[i]
        d2_N[i] = min(sum_N[i], d2_N[i])


@compiled()
def _seeded(
    x_ND: Any, x_DN: Any, weight_N: Any, uniform_KL: Any, centroids_KD: Any, labels_N: Any, d2_N: Any, sum_N: Any,
    running_N: Any,
) -> Any:  # fmt: skip
    """Chooses seeds by greedy k-means++ (Arthur & Vassilvitskii 2007) and assigns all points to them; returns whether
    there are K distinct points. Of L candidates drawn by D², the one that leaves the least inertia becomes a seed.
    """
    d2_N[:] = 1
    for j in range(uniform_KL.shape[0]):
        mass = 0.0
        for i in range(running_N.shape[0]):
            mass += np.float64(weight_N[i]) * d2_N[i]
            running_N[i] = mass
        if mass == 0:
            return False
        if j == 0:
            # the first seed is drawn by weight alone
            d2_N[:], seed = np.inf, _drawn(running_N, uniform_KL[0, 0])
        else:
            seed, least = -1, np.inf
            for one in range(uniform_KL.shape[1]):
                row, inertia = _drawn(running_N, uniform_KL[j, one]), 0.0
                _square(x_DN, x_ND, row, sum_N)
                for i in range(sum_N.shape[0]):
                    inertia += np.float64(weight_N[i]) * min(sum_N[i], d2_N[i])
                if inertia < least:
                    seed, least = row, inertia
        for t in range(x_ND.shape[1]):
            centroids_KD[j, t] = x_ND[seed, t]
        _lower(x_DN, centroids_KD, j, labels_N, d2_N, sum_N)
    return True


@compiled()
def _copy(from_KD: Any, to_KD: Any) -> None:
    # the assignment of one array to another takes numba seconds to compile
    for j in range(from_KD.shape[0]):
        for t in range(from_KD.shape[1]):
            to_KD[j, t] = from_KD[j, t]


@compiled()
def _norm(rows_KD: Any, j: int) -> Any:
    square = 0.0
    for t in range(rows_KD.shape[1]):
        square += rows_KD[j, t] ** 2
    return np.sqrt(square)


@compiled()
def _update(
    x_ND: Any, weight_N: Any, labels_N: Any, momentum: float, on_sphere: bool, centroids_KD: Any, previous_KD: Any,
    means_KD: Any, mass_K: Any,
) -> Any:  # fmt: skip
    """Moves each centroid to its mean plus momentum times its last move. Returns the mean squared distance over the
    points between a centroid and its cluster's mean.

    A cluster without mass, or whose members cancel out on the sphere, has no mean: its centroid stays.
    """
    n, dims = x_ND.shape
    means_KD[:], mass_K[:] = 0, 0
    for i in range(n):
        label, weight = labels_N[i], np.float64(weight_N[i])
        mass_K[label] += weight
        for t in range(dims):
            means_KD[label, t] += weight * x_ND[i, t]
    mass, shift2 = 0.0, 0.0
    for j in range(mass_K.shape[0]):
        mass += mass_K[j]
        norm = _norm(means_KD, j)
        if mass_K[j] == 0 or (on_sphere and norm < LEAST_NORM * mass_K[j]):
            continue
        for t in range(dims):
            means_KD[j, t] /= norm if on_sphere else mass_K[j]
            shift2 += mass_K[j] * (means_KD[j, t] - centroids_KD[j, t]) ** 2
            means_KD[j, t] += momentum * (centroids_KD[j, t] - previous_KD[j, t])
        norm = _norm(means_KD, j) if on_sphere else 1.0
        for t in range(dims):
            previous_KD[j, t] = centroids_KD[j, t]
            centroids_KD[j, t] = means_KD[j, t] / norm
    return shift2 / mass


@compiled()
def best_of_starts(
    x_ND: Any, x_DN: Any, weight_N: Any, uniform_SKL: Any, max_iter: int, least_shift: float, momentum: Any,
    on_sphere: bool, work: float, best_KD: Any,
) -> Any:  # fmt: skip
    """Writes the centroids of the run of least inertia to best (K, D) float32; returns whether K points are distinct.

    x (N, D), its transpose and weight (N,) are float32. Each of uniform (S, K, L) float64 seeds one run of at most
    max_iter updates, and `work` bounds the multiplications of all runs. momentum: its initial value, its decrease per
    update and its minimum; once centroids are within least_shift of their clusters' means, updates are plain means.
    """
    (n, dims), k = x_ND.shape, best_KD.shape[0]
    centroids_KD, labels_N = np.empty((k, dims), np.float32), np.empty(n, np.int32)
    d2_N, sum_N, running_N = np.empty(n, np.float32), np.empty(n, np.float32), np.empty(n)
    previous_KD, means_KD, mass_K = np.empty((k, dims)), np.empty((k, dims)), np.empty(k)
    least, done = np.inf, 0.0
    for s in range(uniform_SKL.shape[0]):
        if done > work:
            break
        if not _seeded(x_ND, x_DN, weight_N, uniform_SKL[s], centroids_KD, labels_N, d2_N, sum_N, running_N):
            return False
        done += n * k * dims * uniform_SKL.shape[2]
        _copy(centroids_KD, previous_KD)
        still = False
        for update in range(max_iter):
            plain = still or update == max_iter - 1
            share = 0.0 if plain else max(momentum[2], momentum[0] - momentum[1] * update)
            shift2 = _update(x_ND, weight_N, labels_N, share, on_sphere, centroids_KD, previous_KD, means_KD, mass_K)
            d2_N[:] = np.inf
            for j in range(k):
                _lower(x_DN, centroids_KD, j, labels_N, d2_N, sum_N)
            done += n * k * dims
            if shift2 <= least_shift * least_shift or done > work:
                if plain:
                    break
                still = True
        inertia = 0.0
        for i in range(n):
            inertia += np.float64(weight_N[i]) * d2_N[i]
        if inertia < least:
            least = inertia
            _copy(centroids_KD, best_KD)
    return True


def best_start(
    shard: Shard,
    k: int,
    max_iter: int,
    least_shift: float,
    momentum: tuple[float, float, float],
    on_sphere: bool,
    generator: torch.Generator,
) -> Tensor | None:
    """The centroids (K, D) float32 of the best of up to STARTS runs on a small table, on its device and the same on
    all ranks; None where the table is not small or has fewer than K distinct points of positive weight.

    momentum: as in `best_of_starts`. least_shift: in units of x.
    """
    n, dims = shard.count, shard.x_ND.shape[1]
    if k == 1 or k > n or n * k * dims > SMALL_WORK:
        return None
    x_ND, weight_N = shard.ranks.joined(shard.x_ND).cpu(), shard.ranks.joined(shard.weight_N).cpu()
    shape = STARTS, k, 2 + int(math.log(k))
    uniform_SKL = torch.rand(shape, dtype=torch.float64, generator=generator, device=shard.device).cpu()
    best_KD = np.empty((k, dims), np.float32)
    enough = best_of_starts(
        x_ND.numpy(), x_ND.T.contiguous().numpy(), weight_N.numpy(), uniform_SKL.numpy(), max_iter, least_shift,
        momentum, on_sphere, float(MOST_WORK), best_KD,
    )  # fmt: skip
    return torch.from_numpy(best_KD).to(shard.device) if enough else None
