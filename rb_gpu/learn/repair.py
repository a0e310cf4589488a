"""Repairs what Lloyd's iterations cannot: two centroids share one cluster while another centroid spans two clusters.

Suffixes: N points, K clusters, D dims, T centroids of one tile.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rb_gpu.learn.assign import Assignment
from rb_gpu.learn.assign_device import DeviceAssignment
from rb_gpu.learn.devices import tiles
from rb_gpu.learn.inputs import median_of
from rb_gpu.learn.sums import ClusterSums, label_totals

# a split must gain this many times the cost of its merge: Lloyd's iterations make smaller exchanges by themselves
LEAST_RATIO = 2.0
# where no exchange does, the best one is still tried if its gain exceeds both of these shares, of the inertia and of
# the merge's cost: that cost is overestimated where a removed centroid's points scatter to several others
WORTH_TRYING, LEAST_COVERED = 1e-3, 0.5
SPLIT_ITERATIONS = 4


def exchange(
    points: Assignment | DeviceAssignment,
    centroids_KD: Tensor,
    mass_K: Tensor,
    drawn_KD: Tensor,
    known_K: Tensor,
    halves: ClusterSums,
) -> Tensor | None:
    """Merges cheap pairs of clusters and splits gainful ones; returns centroids (K, D), or None where nothing pays.

    Merging clusters i and j costs w_i·w_j/(w_i+w_j)·||c_i − c_j||² of inertia (Ward 1963). Splitting a cluster gains
    what a 2-means inside it saves; that starts from the plane through the centroid perpendicular to the direction of
    one drawn member (drawn_KD; known_K says which clusters have one). The cheapest merges are paired with the most
    gainful splits while the gain is at least LEAST_RATIO times the cost (compare Kaukoranta et al. 1998,
    split-and-merge); the caller keeps the result only if it lowers the inertia. points hold the assignment to the
    centroids, mass_K (K,) float64 its weights; halves are the sums over 2K labels that the 2-means needs.
    """
    weighted_N = halves.weight_N.double() * points.d2_N
    before_K = label_totals(weighted_N, points.labels_N, len(centroids_KD), halves.ranks)
    cost_K, partner_K = _merge_costs(centroids_KD, mass_K)
    # a split cannot gain more than its cluster's inertia: where clusters lie far apart, none can pay for a merge
    if float(before_K.max()) <= LEAST_COVERED * float(cost_K.min()):
        return None
    gain_K, halves_2KD = _split_gains(points, before_K, centroids_KD, drawn_KD, known_K, halves)
    inertia = float(before_K.sum())
    merges = sorted((cost, i, j) for i, (cost, j) in enumerate(zip(cost_K.tolist(), partner_K.tolist(), strict=True)))
    splits = sorted((gain, i) for i, gain in enumerate(gain_K.tolist()))
    used: set[int] = set()
    masses = mass_K.tolist()
    out_KD = centroids_KD.clone()
    for cost, one, other in merges:
        if one in used or other in used:
            continue
        while splits[-1][1] in used:
            splits.pop()
        gain, split = splits[-1]
        # if one of the two is the cluster to split, it stays; otherwise the lighter one is removed
        lighter, heavier = (one, other) if masses[one] <= masses[other] else (other, one)
        removed, partner = (heavier, lighter) if split == lighter else (lighter, heavier)
        alone = not used and gain > WORTH_TRYING * inertia and gain > LEAST_COVERED * cost
        if not (gain > LEAST_RATIO * cost or alone):
            break
        used |= {removed, partner, split}
        mass = masses[removed] + masses[partner]
        # a cluster may hold only points of weight 0: two such have no common mean, so the partner stays where it is
        if mass > 0:
            merged_D = masses[removed] * centroids_KD[removed].double() + masses[partner] * centroids_KD[partner]
            out_KD[partner] = (merged_D / mass).float()
        # where the partner itself is split, its halves absorb the points of the removed cluster
        out_KD[split], out_KD[removed] = halves_2KD[2 * split], halves_2KD[2 * split + 1]
    return out_KD if used else None


def _split_gains(
    points: Assignment | DeviceAssignment,
    before_K: Tensor,
    centroids_KD: Tensor,
    drawn_KD: Tensor,
    known_K: Tensor,
    halves: ClusterSums,
) -> tuple[Tensor, Tensor]:
    """Inertia saved by a 2-means inside each cluster (K,) float64, and its two centroids in rows 2i and 2i + 1.

    The 2-means starts symmetric about the centroid: starting from the centroid and the drawn member would split off a
    lone outlier. That split is taken only if it saves LEAST_RATIO times as much, since a 2-means does not reach it.
    """
    k, ranks, weight_N = len(centroids_KD), halves.ranks, halves.weight_N.double()
    halves_2KD = torch.stack([2 * centroids_KD - drawn_KD, drawn_KD], dim=1).reshape(2 * k, -1)
    half_N, d2_N = torch.empty_like(points.labels_N), torch.empty_like(points.d2_N)
    for _ in range(SPLIT_ITERATIONS):
        points.nearer_halves(halves_2KD, half_N, d2_N)
        halves.update(half_N)
        means_2KD, _, lost_2K = halves.means()
        halves_2KD = torch.where(lost_2K[:, None], halves_2KD, means_2KD.float())
    gain_K = before_K - label_totals(weight_N * d2_N, points.labels_N, k, ranks)
    apart_2KD = torch.stack([centroids_KD, drawn_KD], dim=1).reshape(2 * k, -1)
    points.nearer_halves(apart_2KD, half_N, d2_N)
    apart_K = before_K - label_totals(weight_N * d2_N, points.labels_N, k, ranks)
    better_K = apart_K > LEAST_RATIO * gain_K
    halves_2KD = torch.where(better_K.repeat_interleave(2)[:, None], apart_2KD, halves_2KD)
    return torch.where(known_K, torch.where(better_K, apart_K, gain_K), 0.0), halves_2KD


def _merge_costs(centroids_KD: Tensor, mass_K: Tensor) -> tuple[Tensor, Tensor]:
    """The cost of each cluster's cheapest merge (K,) float64, and the cluster that it merges with (K,) int64."""
    k = len(centroids_KD)
    # centre first: far from the origin, products cancel and leave too few digits of a small distance to decide by; use
    # the median, since one far centroid would move the mean away from all others
    about_KD = centroids_KD - median_of(centroids_KD)

    def harmonic(one: Tensor, other: Tensor) -> Tensor:
        return one * other / (one + other).clamp(min=1e-300)

    partner_K = torch.empty(k, dtype=torch.int64, device=mass_K.device)
    # half a dozen float64 arrays of a tile: on a GPU, all K x K at once would take 10 GB
    for tile in tiles(k, 4 * k, centroids_KD.device):
        rows_T = torch.arange(tile.start, tile.stop, device=mass_K.device)
        d2_TK = torch.cdist(about_KD[tile], about_KD).double().square()
        cost_TK = d2_TK * harmonic(mass_K[tile, None], mass_K)
        cost_TK[rows_T - tile.start, rows_T] = torch.inf
        partner_K[tile] = cost_TK.argmin(dim=1)
    d2_K = (centroids_KD.double() - centroids_KD[partner_K]).square().sum(1)
    return d2_K * harmonic(mass_K, mass_K[partner_K]), partner_K
