"""Repairs what Lloyd's iterations cannot: two centroids that share one cluster while another centroid spans two.

Suffixes: N points, K clusters, D dims, T points of one tile.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rb_gpu.learn.distances import label_sums, tiles

# a split must gain this many times what the merge costs: smaller exchanges are what Lloyd's iterations do by themselves
LEAST_RATIO = 2.0
SPLIT_ITERATIONS = 4


def exchange(
    x_ND: Tensor, weight_N: Tensor, centroids_KD: Tensor, labels_N: Tensor, d2_N: Tensor, generator: torch.Generator
) -> Tensor | None:
    """Centroids (K, D) in which cheap merges paid for gainful splits, or None where no exchange pays.

    Merging clusters i and j costs w_i·w_j/(w_i+w_j)·||c_i − c_j||² of inertia (Ward 1963); splitting one gains what a
    2-means inside it saves. The cheapest merges are matched with the most gainful splits while the gain is at least
    LEAST_RATIO times the cost, so that the inertia falls (compare Kaukoranta et al. 1998, split-and-merge).
    """
    k = len(centroids_KD)
    if k < 3:
        return None
    gain_K, halves_2KD = _split_gains(x_ND, weight_N, centroids_KD, labels_N, d2_N, generator)
    mass_K = torch.zeros(k, dtype=torch.float64, device=labels_N.device).index_add_(0, labels_N, weight_N.double())
    cost_K, partner_K = _merge_costs(centroids_KD, mass_K)
    merges = sorted((cost, i, j) for i, (cost, j) in enumerate(zip(cost_K.tolist(), partner_K.tolist(), strict=True)))
    splits = sorted(((gain, i) for i, gain in enumerate(gain_K.tolist())), reverse=True)
    used: set[int] = set()
    out_KD = centroids_KD.clone()
    splits_left = iter(splits)
    for cost, removed, partner in merges:
        if removed in used or partner in used:
            continue
        gain, split = next(((g, s) for g, s in splits_left if s not in used and s not in (removed, partner)), (0.0, -1))
        if gain <= LEAST_RATIO * cost or gain <= 0:
            break
        used |= {removed, partner, split}
        mass = mass_K[removed] + mass_K[partner]
        merged_D = (mass_K[removed] * centroids_KD[removed] + mass_K[partner] * centroids_KD[partner]) / mass
        out_KD[partner] = merged_D.float()
        out_KD[split], out_KD[removed] = halves_2KD[2 * split], halves_2KD[2 * split + 1]
    return out_KD if used else None


def _split_gains(
    x_ND: Tensor, weight_N: Tensor, centroids_KD: Tensor, labels_N: Tensor, d2_N: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """What a 2-means inside each cluster saves (K,) float64, and its two centroids at rows 2i and 2i + 1."""
    k = len(centroids_KD)
    mass_N = weight_N * d2_N
    # the first of independent exponential clocks with rates w·D² draws one member per cluster by D²
    uniform_N = torch.rand(len(mass_N), generator=generator, device=mass_N.device).clamp_(min=1e-30)
    clock_N = torch.where(mass_N > 0, -uniform_N.log() / mass_N, torch.inf)
    first_K = torch.full((k,), torch.inf, device=clock_N.device).scatter_reduce_(0, labels_N, clock_N, "amin")
    won_N = (clock_N == first_K[labels_N]) & torch.isfinite(clock_N)
    member_K = torch.full((k,), -1, device=labels_N.device).scatter_reduce_(
        0, labels_N, torch.where(won_N, torch.arange(len(won_N), device=won_N.device), -1), "amax"
    )
    drawn_KD = x_ND[member_K.clamp(min=0).to(x_ND.device)].to(centroids_KD.device)
    halves_2KD = torch.stack([centroids_KD, drawn_KD], dim=1).reshape(2 * k, -1)
    before_K = torch.zeros(k, dtype=torch.float64, device=d2_N.device).index_add_(0, labels_N, mass_N.double())
    after_K = before_K
    for _ in range(SPLIT_ITERATIONS):
        half_N, after_K = _assign_halves(x_ND, weight_N, halves_2KD, labels_N)
        sums, mass = label_sums(x_ND, weight_N, half_N, 2 * k)
        halves_2KD = torch.where((mass > 0)[:, None], (sums / mass.clamp(min=1e-300)[:, None]).float(), halves_2KD)
    return torch.where(member_K >= 0, before_K - after_K, 0.0), halves_2KD


def _assign_halves(x_ND: Tensor, weight_N: Tensor, halves_2KD: Tensor, labels_N: Tensor) -> tuple[Tensor, Tensor]:
    """The nearer half of each point's own cluster (N,) in 0 .. 2K - 1, and the inertia per cluster (K,) float64."""
    half_N = torch.empty_like(labels_N)
    after_K = torch.zeros(len(halves_2KD) // 2, dtype=torch.float64, device=labels_N.device)
    for tile in tiles(len(x_ND), 4 * x_ND.shape[1], labels_N.device):
        x_TD, left_T = x_ND[tile].to(labels_N.device, non_blocking=True), 2 * labels_N[tile]
        left_d2_T = (x_TD - halves_2KD[left_T]).square().sum(1)
        right_d2_T = (x_TD - halves_2KD[left_T + 1]).square().sum(1)
        half_N[tile] = left_T + (right_d2_T < left_d2_T)
        saved_T = torch.minimum(left_d2_T, right_d2_T) * weight_N[tile]
        after_K.index_add_(0, labels_N[tile], saved_T.double())
    return half_N, after_K


def _merge_costs(centroids_KD: Tensor, mass_K: Tensor) -> tuple[Tensor, Tensor]:
    """Each cluster's cheapest merge (K,) float64, and with which other cluster (K,) int64."""
    k = len(centroids_KD)
    cost_K = torch.empty(k, dtype=torch.float64, device=mass_K.device)
    partner_K = torch.empty(k, dtype=torch.int64, device=mass_K.device)
    for tile in tiles(k, k, centroids_KD.device):
        rows_T = torch.arange(tile.start, tile.stop, device=mass_K.device)
        d2_TK = torch.cdist(centroids_KD[tile], centroids_KD).double().square()
        harmonic_TK = mass_K[tile, None] * mass_K / (mass_K[tile, None] + mass_K).clamp(min=1e-300)
        cost_TK = d2_TK * harmonic_TK
        cost_TK[rows_T - tile.start, rows_T] = torch.inf
        cost_K[tile], partner_K[tile] = cost_TK.min(dim=1)
    return cost_K, partner_K
