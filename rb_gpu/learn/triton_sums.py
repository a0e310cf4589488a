"""Sums of runs in Triton: points are read once, and runs are cut into pieces so that all programs are equally busy.

Suffixes: N points, K labels, D dims, P pieces of runs.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from rb_gpu.learn.segments import differences
from rb_gpu.learn.triton_assign import launch
from rb_gpu.learn.triton_kernels import piece_kernel

# points of one piece: enough to amortise a program, few enough that one large cluster occupies all of them
PIECE = 256
SUM_SHAPE = {"BLOCK_N": 8, "BLOCK_D": 128}


def piece_sums(x_ND: Tensor, weight_N: Tensor, order_N: Tensor, bounds_K1: Tensor) -> Tensor:
    """As `segments.run_sums`. An upper bound on the number of pieces is used, so that the host need not wait for it."""
    counts_K = bounds_K1.diff()
    pieces_K = (counts_K + PIECE - 1) // PIECE
    ends_K = pieces_K.cumsum(0)
    piece_P = torch.arange(len(counts_K) + len(order_N) // PIECE, device=x_ND.device)
    label_P = torch.searchsorted(ends_K, piece_P, right=True)
    alive_P, label_P = label_P < len(counts_K), label_P.clamp(max=len(counts_K) - 1)
    start_P = bounds_K1[label_P] + (piece_P - (ends_K - pieces_K)[label_P]) * PIECE
    stop_P = torch.where(alive_P, torch.minimum(start_P + PIECE, bounds_K1[label_P + 1]), start_P)
    sums_PD = torch.empty(len(piece_P), x_ND.shape[1], dtype=torch.int64, device=x_ND.device)
    block = min(SUM_SHAPE["BLOCK_D"], triton.next_power_of_2(x_ND.shape[1]))
    # no fused multiply-add: without rounding the product before it is converted, results would differ from the CPU's
    launch(
        piece_kernel, (len(piece_P), triton.cdiv(x_ND.shape[1], block)),
        x_ND, weight_N, order_N, start_P, stop_P, sums_PD,
        D=x_ND.shape[1], BLOCK_N=SUM_SHAPE["BLOCK_N"], BLOCK_D=block, enable_fp_fusion=False,
    )  # fmt: skip
    return differences(sums_PD, torch.cat([torch.zeros_like(ends_K[:1]), ends_K]))
