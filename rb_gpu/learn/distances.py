"""Distances, sums and norms in torch, in tiles of rows; no N x K matrix is ever held.

Suffixes: N points, K centroids, D dims, M new centroids, T points of one tile. Points may lie on the host while the
centroids are on a GPU: tiles are then streamed one at a time, so that data larger than the GPU's memory still fit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rb_gpu.learn.devices import tiles
from rb_gpu.learn.streaming import chunks

# rows whose norm is within this of 1 count as normalised
NORMED = 1e-6


def lower_distances(
    x_ND: Tensor,
    middle_D: Tensor,
    d2_N: Tensor,
    labels_N: Tensor,
    new_MD: Tensor,
    first_label: int,
    budget: int | None = None,
) -> None:
    """Lowers d2 (N,) and labels (N,) in place by M further centroids, labelled from first_label on.

    argmin ||x - c||² = argmin ||c||²/2 - x·c, so one matrix product per tile suffices; both sides are centred on the
    middle, because products cancel far from the origin. The distance itself is then computed from the difference, so
    that a copy of a centroid is at exactly 0 and never drawn as another seed. budget: bytes of host points that may be
    copied to the device at once.
    """
    device = new_MD.device
    about_MD = new_MD - middle_D
    half_norm_M = about_MD.square().sum(1) / 2
    for tile, x_TD in chunks(x_ND, max(len(new_MD), 4 * x_ND.shape[1]), device, budget=budget):
        which_T = torch.addmm(half_norm_M, x_TD - middle_D, about_MD.T, alpha=-1).argmin(dim=1)
        new_T = (x_TD - new_MD[which_T]).square().sum(1)
        better_T = new_T < d2_N[tile]
        d2_N[tile] = torch.where(better_T, new_T, d2_N[tile])
        labels_N[tile] = torch.where(better_T, which_T + first_label, labels_N[tile])


def label_sums(x_ND: Tensor, weight_N: Tensor, labels_N: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Weighted sum of the points of each label (K, D) and their weight (K,), float64 on the labels' device.

    Tiles are summed in float32 and their totals in float64, so that millions of points lose no precision. Negative
    labels are ignored.
    """
    device = labels_N.device
    sums_KD = torch.zeros(k, x_ND.shape[1], dtype=torch.float64, device=device)
    # an extra last row collects the ignored points; it is cut off below
    slot_N = torch.where(labels_N < 0, k, labels_N)
    for tile, x_TD in chunks(x_ND, 2 * x_ND.shape[1], device):
        part_KD = torch.zeros(k + 1, x_ND.shape[1], dtype=torch.float32, device=device)
        part_KD.index_add_(0, slot_N[tile], x_TD * weight_N[tile, None])
        sums_KD += part_KD[:k]
    weight_K = torch.zeros(k + 1, dtype=torch.float64, device=device)
    weight_K.index_add_(0, slot_N, weight_N.double())
    return sums_KD, weight_K[:k]


def normalised(x_ND: Tensor) -> Tensor:
    """The rows scaled to norm 1: x itself if every row has it, up to float32 rounding, else a copy."""
    spans = tiles(len(x_ND), x_ND.shape[1], x_ND.device)
    if all(float((x_ND[tile].norm(dim=1) - 1).abs().max()) <= NORMED for tile in spans):
        return x_ND
    return normalise_(x_ND.clone())


def normalise_(x_ND: Tensor) -> Tensor:
    """Scales every row to norm 1 in place and returns it. A zero row stays zero."""
    for tile in tiles(len(x_ND), x_ND.shape[1], x_ND.device):
        # divide by the largest coordinate first: squares of 1e30 or 1e-30 leave float32's range
        peak_T1 = x_ND[tile].abs().amax(dim=1, keepdim=True)
        x_ND[tile] /= torch.where(peak_T1 > 0, peak_T1, 1)
        x_ND[tile] /= x_ND[tile].norm(dim=1, keepdim=True).clamp_(min=1)
    return x_ND
