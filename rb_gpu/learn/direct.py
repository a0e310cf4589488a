"""Every product of a point with a centroid in float32, and the least distance at once: no tile of products is written.

The fastest way where centroids or dims are few. With y = x − middle, half_x + half_c − y·c is half the squared distance
up to `slack`·(half_x + half_c) (see `coarse`), so that few distances must be taken exactly.
Suffixes: N points, T points of one tile, K centroids, C of them padded to whole masks, B blocks of W of these, D dims.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from torch import Tensor

from rb_gpu.learn.kernels import ROUNDOFF, nearest_of_two, squared_distance
from rb_gpu.learn.products import POINTS, VECTORS, WIDTH, write_sums
from rb_gpu.learn.vectors import (
    FLOATS,
    INT,
    LANES,
    SUMS,
    address,
    alloca,
    compiled,
    intrinsic,
    least_of,
    lowest_bit,
    splat,
)

# points whose bounds stay in a core's second cache; a block of centroids stays in its first
TILE = 32


class Columns:
    """Centroids (K, D) about the middle as the columns of blocks (B, D, W), and half their squared norms less the slack
    (C,); those that pad them are infinitely far.
    """

    def __init__(self, centroids_KD: Tensor, middle_D: Tensor) -> None:
        k, dims = centroids_KD.shape
        width = -(-k // LANES) * LANES
        about_KD = centroids_KD - middle_D
        # 3·dims + 10 roundings of half norms, centring and products (Higham 2002, section 3.1), and some to spare
        self.slack = (4 * dims + 64) * ROUNDOFF
        self.half_C = torch.full((width,), torch.inf)
        self.half_C[:k] = about_KD.square().sum(1) * (0.5 * (1 - self.slack))
        padded_CD = torch.nn.functional.pad(about_KD, (0, 0, 0, -(-k // WIDTH) * WIDTH - k))
        self.columns_BDW = padded_CD.view(-1, WIDTH, dims).transpose(1, 2).contiguous()

    def room(self) -> tuple[Tensor, Tensor]:
        """What one call of `nearest_rows` writes: bounds (TILE, C), infinite, and points about the middle (TILE, D)."""
        return torch.full((TILE, len(self.half_C)), torch.inf), torch.zeros(TILE, self.columns_BDW.shape[1])


def _halves(vectors: int) -> Any:
    """A function that writes half norms plus the products of POINTS points with the columns of so many blocks."""

    @intrinsic
    def write(_context: Any, x: Any, columns: Any, half: Any, out: Any, x_step: Any, c_step: Any, o_step: Any) -> Any:
        def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> None:
            steps = builder.udiv(arguments[4], ir.Constant(INT, 4))
            write_sums(builder, torch.float32, vectors, list(arguments), steps)

        return types.void(*[types.uintp] * 7), generate

    return write


_one_block, _some_blocks = _halves(1), _halves(VECTORS)


@intrinsic
def _smallest(_context: Any, values: Any, count: Any) -> Any:
    """The least of count times LANES float32 at an address."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        place = alloca(builder, ir.Constant(FLOATS, [float("inf")] * LANES))
        builder.store(ir.Constant(FLOATS, [float("inf")] * LANES), place)
        with cgutils.for_range(builder, arguments[1], intp=INT) as loop:
            offset = builder.mul(loop.index, ir.Constant(INT, 4 * LANES))
            these, least = builder.load(address(builder, arguments[0], offset, FLOATS), align=4), builder.load(place)
            builder.store(builder.select(builder.fcmp_ordered("<", these, least), these, least), place)
        return least_of(builder, builder.load(place))

    return types.float32(types.uintp, types.uintp), generate


@intrinsic
def _at_most(_context: Any, values: Any, limit: Any) -> Any:
    """Bits of the LANES float32 at an address that are at most the limit."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        found = builder.load(builder.inttoptr(arguments[0], FLOATS.as_pointer()), align=4)
        below = builder.fcmp_ordered("<=", found, splat(builder, arguments[1], FLOATS))
        return builder.bitcast(below, ir.IntType(LANES))

    return types.uint64(types.uintp, types.float32), generate


@compiled(fastmath=SUMS)
def _less_middle(x_ND: Any, i: int, middle_D: Any, out_TD: Any, p: int) -> Any:
    """Middle − row i of x into row p of out, and half its squared norm."""
    total = np.float32(0)
    for t in range(x_ND.shape[1]):
        value = middle_D[t] - x_ND[i, t]
        out_TD[p, t] = value
        total += value * value
    return total * np.float32(0.5)


@compiled()
def nearest_rows(
    x_ND: Any, start: int, stop: int, middle_D: Any, columns_BDW: Any, half_C: Any, slack: float, first: int,
    centroids_KD: Any, refresh: bool, labels_N: Any, d2_N: Any, bounds_TC: Any, about_TD: Any,
) -> None:  # fmt: skip
    """Labels int64 and d2 float32 of rows start to stop, lowered by centroids_KD[first:]. Their `Columns` are given,
    and these columns' `room`.

    refresh: forget what was. The result is that of `bounded.lower_rows` to the bit, for the same reasons.
    """
    dims, width, count = x_ND.shape[1], half_C.shape[0], centroids_KD.shape[0] - first
    near = np.float32(2 * (dims + 2) * ROUNDOFF)
    kept = np.float32(1 - slack)
    half_T = np.empty(TILE, np.float32)
    about, columns, halves, bounds = (
        about_TD.ctypes.data,
        columns_BDW.ctypes.data,
        half_C.ctypes.data,
        bounds_TC.ctypes.data,
    )
    for tile in range(start, stop, TILE):
        points = min(TILE, stop - tile)
        for p in range(points):
            half_T[p] = _less_middle(x_ND, tile + p, middle_D, about_TD, p)
        b = 0
        while b < columns_BDW.shape[0]:
            o, several = 4 * WIDTH * b, b + VECTORS <= columns_BDW.shape[0]
            for p in range(0, points, POINTS):
                y, to = about + 4 * dims * p, bounds + 4 * width * p + o
                if several:
                    _some_blocks(y, columns + o * dims, halves + o, to, 4 * dims, 4 * WIDTH * dims, 4 * width)
                else:
                    _one_block(y, columns + o * dims, halves + o, to, 4 * dims, 4 * WIDTH * dims, 4 * width)
            b += VECTORS if several else 1
        for p in range(points):
            i, row = tile + p, bounds + 4 * width * p
            label, best = labels_N[i], d2_N[i]
            if refresh or label < 0:
                least, mask, z = _smallest(row, width // LANES), np.uint64(0), -LANES
                while mask == 0 and z + LANES < width:
                    z += LANES
                    mask = _at_most(row + 4 * z, least)
                label = first + (z + lowest_bit(mask) if mask != 0 else 0)
                best = squared_distance(x_ND, i, centroids_KD, label)
            limit = np.float32(best * np.float32(0.5) * (np.float32(1) + near) - half_T[p] * kept)
            for z in range(0, width, LANES):
                mask = _at_most(row + 4 * z, limit)
                while mask != 0:
                    other = first + z + lowest_bit(mask)
                    mask &= mask - np.uint64(1)
                    if other == label or other - first >= count:
                        continue
                    label, best = nearest_of_two(x_ND, i, centroids_KD, label, best, other, near)
            labels_N[i], d2_N[i] = label, best
