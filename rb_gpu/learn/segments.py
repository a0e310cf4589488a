"""Sums over the points of each label without atomics: points are sorted by label, and each label's run is summed.

Integer sums are the same in every order, so runs may be cut anywhere: torch takes differences of running sums, tile by
tile; Triton sums pieces of runs and takes differences of running sums over the pieces.

Suffixes: N points, K labels, D dims, T points of one tile, P pieces of runs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rb_gpu.learn.streaming import chunks


def runs(labels_N: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Row numbers (N,) int64 sorted by label, and where each label's run begins, plus the end of the last (K + 1,)."""
    # a GPU sorts eight bits per round: int16 needs two rounds instead of four
    kind = torch.int16 if k <= torch.iinfo(torch.int16).max else torch.int32
    sorted_N, order_N = torch.sort(labels_N.to(kind), stable=True)
    return order_N, torch.searchsorted(sorted_N, torch.arange(k + 1, dtype=kind, device=labels_N.device))


def differences(values_T: Tensor, bounds_K1: Tensor) -> Tensor:
    """Sums (K, ...) of the values (T, ...) int64 between consecutive bounds (K + 1,)."""
    # scan along the last axis, which many threads of a GPU do together; along any other axis torch leaves each column
    # to a single thread (ScanUtils.cuh): a third of a second for a million rows
    running = torch.nn.functional.pad(values_T.movedim(0, -1).contiguous().cumsum(-1), (1, 0))
    return (running[..., bounds_K1[1:]] - running[..., bounds_K1[:-1]]).movedim(-1, 0).contiguous()


def run_sums(x_ND: Tensor, weight_N: Tensor, order_N: Tensor, bounds_K1: Tensor, engine: str) -> Tensor:
    """Σ round(x·weight) by label (K, D) int64, of points x (N, D) float32 and weights (N,) float64 in integer units.

    order and bounds come from `runs`; all tensors lie on one device.
    """
    if engine == "triton":
        # only CUDA builds of torch ship triton
        from rb_gpu.learn.triton_sums import piece_sums

        return piece_sums(x_ND, weight_N, order_N, bounds_K1)
    sums_KD = torch.zeros(len(bounds_K1) - 1, x_ND.shape[1], dtype=torch.int64, device=x_ND.device)
    for tile, x_TD in chunks(x_ND, 8 * x_ND.shape[1], x_ND.device, order_N):
        units_TD = (x_TD.double() * weight_N[order_N[tile]][:, None]).round().to(torch.int64)
        sums_KD += differences(units_TD, (bounds_K1 - tile.start).clamp(0, len(units_TD)))
    return sums_KD
