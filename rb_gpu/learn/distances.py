"""Nearest centroids and per-label sums in tiles of rows; no N x K matrix is ever held.

Suffixes: N points, K centroids, D dims, T points of one tile. Points may lie on the host while the centroids are on a
GPU: each tile then travels on its own, so data larger than the card still fits.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

# scores of one tile: stays in a CPU's outer cache, and keeps a GPU busy
TILE_SCORES = {"cpu": 4 * 2**20, "cuda": 256 * 2**20}
# below this share of the norms, ||x||^2 + ||c||^2 - 2xc in float32 is mostly rounding
CANCELLATION = 1e-3


def tiles(n: int, width: int, device: torch.device) -> Iterator[slice]:
    """Slices of rows whose (rows, width) float32 scores fit one tile of the device."""
    rows = max(256, TILE_SCORES[device.type] // max(width, 1))
    return (slice(start, min(start + rows, n)) for start in range(0, n, rows))


def nearest(x_ND: Tensor, centroids_KD: Tensor) -> tuple[Tensor, Tensor]:
    """Each point's nearest centroid by Euclidean distance: labels (N,) int64 and squared distances (N,) float32.

    Both come back on the centroids' device. argmin ||x - c||^2 = argmin ||c||^2 / 2 - x.c, so one product a tile does.
    """
    device = centroids_KD.device
    labels = torch.empty(len(x_ND), dtype=torch.int64, device=device)
    d2 = torch.empty(len(x_ND), dtype=torch.float32, device=device)
    half_norm_K = centroids_KD.square().sum(1) / 2
    for tile in tiles(len(x_ND), len(centroids_KD), device):
        x_TD = x_ND[tile].to(device, non_blocking=True)
        scores_TK = torch.addmm(half_norm_K, x_TD, centroids_KD.T, alpha=-1)
        best_T, labels[tile] = scores_TK.min(dim=1)
        d2[tile] = (2 * best_T + x_TD.square().sum(1)).clamp_(min=0)
    return labels, d2


def lower_distances(x_ND: Tensor, d2_N: Tensor, labels_N: Tensor, new_MD: Tensor, first_label: int) -> None:
    """Lowers d2 (N,) and labels (N,) in place by M further centroids, labelled from first_label on.

    Where the float32 product cancels, the distance is taken from the difference, so that a copy of a centroid is at 0
    exactly and can never be drawn as another one.
    """
    half_norm_M = new_MD.square().sum(1) / 2
    for tile in tiles(len(x_ND), len(new_MD), new_MD.device):
        x_TD = x_ND[tile].to(new_MD.device, non_blocking=True)
        best_T, which_T = torch.addmm(half_norm_M, x_TD, new_MD.T, alpha=-1).min(dim=1)
        norm_T = x_TD.square().sum(1)
        new_T = 2 * best_T + norm_T
        close = torch.nonzero(new_T < CANCELLATION * norm_T.clamp(min=torch.finfo(torch.float32).tiny)).squeeze(1)
        new_T[close] = (x_TD[close] - new_MD[which_T[close]]).square().sum(1)
        better = new_T < d2_N[tile]
        d2_N[tile] = torch.where(better, new_T.clamp(min=0), d2_N[tile])
        labels_N[tile] = torch.where(better, which_T + first_label, labels_N[tile])


def label_sums(x_ND: Tensor, weight_N: Tensor, labels_N: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Weighted sum of the points of each label (K, D) and their weight (K,), float64 on the labels' device.

    Tiles add up in float32 and their totals in float64, so that millions of points lose no digits. Labels below 0 are
    left out.
    """
    device = labels_N.device
    sums_KD = torch.zeros(k, x_ND.shape[1], dtype=torch.float64, device=device)
    # the last row takes what is left out; it is cut off below
    slot_N = torch.where(labels_N < 0, k, labels_N)
    for tile in tiles(len(x_ND), 2 * x_ND.shape[1], device):
        x_TD = x_ND[tile].to(device, non_blocking=True)
        part_KD = torch.zeros(k + 1, x_ND.shape[1], dtype=torch.float32, device=device)
        part_KD.index_add_(0, slot_N[tile], x_TD * weight_N[tile, None])
        sums_KD += part_KD[:k]
    weight_K = torch.zeros(k + 1, dtype=torch.float64, device=device)
    weight_K.index_add_(0, slot_N, weight_N.double())
    return sums_KD, weight_K[:k]


def normalise_(x_ND: Tensor) -> Tensor:
    """Scales every row to norm 1 in place and returns it. A row of norm 0 stays 0."""
    for tile in tiles(len(x_ND), x_ND.shape[1], x_ND.device):
        x_ND[tile] /= x_ND[tile].norm(dim=1, keepdim=True).clamp_(min=torch.finfo(torch.float32).tiny)
    return x_ND
