"""Sums over points that are bit-identical in every order of addition, because numbers are rounded to integers first.

Threads, tiles, ranks and updates by difference therefore cannot change a result. An upper bound S on the sum of the
absolute values is known beforehand, and one unit is 2^-61·S rounded up to a power of two, which is about 2^-61·N of a
typical point.

Suffixes: N points, K clusters, D dims, M points that changed clusters, T points of one tile.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from rb_gpu.learn.distributed import Ranks
from rb_gpu.learn.row_kernels import changed_rows, move_masses, move_rows
from rb_gpu.learn.segments import differences, run_sums, runs
from rb_gpu.learn.shard import Shard
from rb_gpu.learn.streaming import chunks
from rb_gpu.learn.workers import Workers

# sums stay below 2^62, of which one bit is for what rounding adds
SUM_BITS = 62
# upper bound on the workers' private sums, all together; and the rows that one worker takes at a time
OWN_BYTES, OWN_ROWS = 2**26, 4096
# a mean is not used if rounding may have moved it by more than this share of the largest coordinate
LEAST_PRECISION = 2.0**-20


def unit_for(total: float) -> float:
    """The power of two to multiply numbers by before rounding, if their absolute values sum to at most `total`."""
    if total <= 0:
        return 1.0
    # the margin keeps totals that differ only by rounding on the same side of a power of two
    return 2.0 ** (SUM_BITS - 1 - math.ceil(math.log2(total * (1 + 2**-20))))


def exact_total(values_N: Tensor, ranks: Ranks) -> float:
    """Σ values over all ranks, for values (N,) float64 >= 0."""
    largest, (_, count) = ranks.largest(float(values_N.max()) if len(values_N) else 0.0), ranks.place(len(values_N))
    unit = unit_for(largest * count)
    return float(ranks.total((values_N * unit).round().to(torch.int64).sum()).item()) / unit


def label_totals(values_N: Tensor, labels_N: Tensor, k: int, ranks: Ranks) -> Tensor:
    """Σ values by label over all ranks, (K,) float64, for values (N,) float64 >= 0."""
    largest, (_, count) = ranks.largest(float(values_N.max()) if len(values_N) else 0.0), ranks.place(len(values_N))
    unit = unit_for(largest * count)
    totals_K = torch.zeros(k, dtype=torch.int64, device=values_N.device)
    totals_K.index_add_(0, labels_N, (values_N * unit).round().to(torch.int64))
    return ranks.total(totals_K).double() / unit


class ClusterSums:
    """Weighted sums of the points of each label, updated only by the points that changed label where reading is costly.

    counts_K: the number of points of positive weight.
    """

    def __init__(self, shard: Shard, peak_N: Tensor, k: int, crew: Workers | None) -> None:
        """peak_N: the largest |coordinate| of each point. crew: the host's workers; None sums on the device."""
        self.x_ND, self.weight_N, self.ranks, self.crew = shard.x_ND, shard.weight_N, shard.ranks, crew
        self.budget, self.engine = shard.budget, shard.engine
        self.unit = unit_for(self.ranks.sum_of(float((peak_N.double() * self.weight_N).sum())))
        self.weight_unit = unit_for(self.ranks.sum_of(float(self.weight_N.sum(dtype=torch.float64))))
        self.peak = self.ranks.largest(float(peak_N.max()))
        self.sums_KD = torch.zeros(k, self.x_ND.shape[1], dtype=torch.int64, device=shard.device)
        self.mass_K = torch.zeros(k, dtype=torch.int64, device=shard.device)
        self.counts_K = torch.zeros(k, dtype=torch.int64, device=shard.device)
        self.labels_N = torch.full((len(self.x_ND),), -1, dtype=torch.int64, device=shard.device)

    def update(self, labels_N: Tensor) -> Tensor:
        """Updates the sums to these labels (N,) int64, all >= 0; returns whether any differs from before."""
        if self.crew is not None:
            return self._move_by_workers(labels_N, self.crew)
        changed = (labels_N != self.labels_N).any()
        if self.x_ND.device == labels_N.device:
            self._sum_runs(labels_N)
        else:
            self._sum_differences(labels_N)
        self.labels_N.copy_(labels_N)
        return changed

    def _sum_runs(self, labels_N: Tensor) -> None:
        """Sums all points anew: on a device that holds them, this is cheaper than finding out which ones moved."""
        order_N, bounds_K1 = runs(labels_N, len(self.counts_K))
        weight_N = self.weight_N.double()
        units_N = (weight_N * self.weight_unit).round().to(torch.int64)
        self.mass_K = differences(units_N[order_N], bounds_K1)
        self.counts_K = differences((weight_N > 0).to(torch.int64)[order_N], bounds_K1)
        self.sums_KD = run_sums(self.x_ND, weight_N * self.unit, order_N, bounds_K1, self.engine)

    def _sum_differences(self, labels_N: Tensor) -> None:
        """Adds and subtracts only the points whose label changed: the others need not be read."""
        rows_M = torch.nonzero(labels_N != self.labels_N).squeeze(1)
        old_M, new_M = self.labels_N[rows_M], labels_N[rows_M]
        weight_M, leaves_M = self.weight_N[rows_M].double(), old_M >= 0
        units_M, present_M = (weight_M * self.weight_unit).round().to(torch.int64), (weight_M > 0).to(torch.int64)
        for totals_K, amount_M in ((self.mass_K, units_M), (self.counts_K, present_M)):
            totals_K.index_add_(0, new_M, amount_M)
            totals_K.index_add_(0, old_M[leaves_M], -amount_M[leaves_M])
        self._move(rows_M, old_M, new_M)

    def _move_by_workers(self, labels_N: Tensor, crew: Workers) -> Tensor:
        """The same by workers without shared writes: each has private sums, or a range of columns if too large."""
        x, weight, old, new = (t.numpy() for t in (self.x_ND, self.weight_N, self.labels_N, labels_N))
        rows_N = np.empty(len(new), np.int64)
        rows_M = rows_N[: changed_rows(old, new, rows_N)]
        move_masses(weight, rows_M, old, new, self.weight_unit, self.mass_K.numpy(), self.counts_K.numpy())
        dims, sums_KD = x.shape[1], self.sums_KD.numpy()
        if len(rows_M) >= crew.count * len(sums_KD) and crew.count * sums_KD.nbytes <= OWN_BYTES:
            own_WKD = np.zeros((crew.count, *sums_KD.shape), np.int64)

            def rows(worker: int, start: int, stop: int) -> None:
                move_rows(x, weight, rows_M[start:stop], old, new, self.unit, 0, dims, own_WKD[worker])

            crew.each(len(rows_M), OWN_ROWS, rows)
            sums_KD += own_WKD.sum(0)
        else:

            def columns(_worker: int, left: int, right: int) -> None:
                move_rows(x, weight, rows_M, old, new, self.unit, left, right, sums_KD)

            crew.each(dims, -(-dims // crew.count), columns)
        old[rows_M] = new[rows_M]
        return torch.tensor(len(rows_M) > 0)

    def _move(self, rows_M: Tensor, old_M: Tensor, new_M: Tensor) -> None:
        """The same by torch, for points on the host whose sums are on the device."""
        width, device = 8 * self.x_ND.shape[1], self.sums_KD.device
        for tile, x_TD in chunks(self.x_ND, width, device, rows_M, self.budget):
            weight_T = self.weight_N[rows_M[tile]].double() * self.unit
            units_TD = (x_TD.double() * weight_T[:, None]).round().to(torch.int64)
            self.sums_KD.index_add_(0, new_M[tile], units_TD)
            leaves_T = old_M[tile] >= 0
            self.sums_KD.index_add_(0, old_M[tile][leaves_T], -units_TD[leaves_T])

    def empties(self) -> Tensor:
        """Which labels (K,) have no point of positive weight on any rank."""
        return self.ranks.total(self.counts_K.clone()) == 0

    def means(self) -> tuple[Tensor, Tensor, Tensor]:
        """Over all ranks: means (K, D) float64, masses (K,) float64, and which means are too imprecise to use (K,)."""
        sums_KD, mass_K = self.ranks.total(self.sums_KD.clone()), self.ranks.total(self.mass_K.clone())
        counts_K = self.ranks.total(self.counts_K.clone())
        weights_K = mass_K.double() / self.weight_unit
        means_KD = sums_KD.double() / (weights_K * self.unit).clamp(min=torch.finfo(torch.float64).tiny)[:, None]
        rounded_K = counts_K.double() / 2 * (1 / self.unit + self.peak / self.weight_unit)
        return means_KD, weights_K, ~(weights_K * self.peak * LEAST_PRECISION > rounded_K)
