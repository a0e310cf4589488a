"""All products of points and centroids in float32, a few points at a time: fastest for few centroids or dims.

For a point whose best distance is known, the products are reduced to one bit per centroid: whether it may be as near.
With y = x − middle, half_x + half_c − y·c is half the squared distance up to `slack`·(half_x + half_c) (see `coarse`),
so few distances must be computed exactly. If points far outnumber centroids, a point is not compared at all
when it is nearer to its centroid than half the distance from that to the next one (Hamerly 2010).
Suffixes: N points, T points of one tile, K centroids, C centroids padded to whole masks (M), B blocks of W of these,
D dims.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numpy.typing import NDArray

from rb_gpu.learn.kernels import ROUNDOFF, nearest_of_two, squared_distance
from rb_gpu.learn.products import POINTS, VECTORS, write_below, write_sums
from rb_gpu.learn.vectors import (
    FLOATS,
    INT,
    LANES,
    SUMS,
    WIDTH,
    address,
    alloca,
    compiled,
    intrinsic,
    least_of,
    lowest_bit,
    splat,
)

# points whose bounds stay in a core's second-level cache; a block of centroids stays in the first-level one
TILE = 32


class Columns:
    """Centroids (K, D) about the middle, arranged as columns of blocks (B, D, W), and half their squared norms less the
    slack (C,), both float32; padding centroids are infinitely far.
    """

    def __init__(self, centroids_KD: NDArray[np.float32], middle_D: NDArray[np.float32]) -> None:
        k, dims = centroids_KD.shape
        # 3·dims + 10 roundings of half norms, centring and products (Higham 2002, section 3.1), with some margin
        self.slack = (4 * dims + 64) * ROUNDOFF
        padded_CD = np.zeros((-(-k // WIDTH) * WIDTH, dims), np.float32)
        about_KD = np.subtract(centroids_KD, middle_D, out=padded_CD[:k])
        self.half_C = np.full(-(-k // LANES) * LANES, np.inf, np.float32)
        norm2_K = np.einsum("kd,kd->k", about_KD, about_KD)
        self.half_C[:k] = norm2_K * np.float32(0.5 * (1 - self.slack))
        self.columns_BDW = np.ascontiguousarray(padded_CD.reshape(-1, WIDTH, dims).transpose(0, 2, 1))

    def bounds(self) -> NDArray[np.float32]:
        """Scratch space for bounds (TILE, C), initially infinite."""
        return np.full((TILE, len(self.half_C)), np.inf, np.float32)

    def masks(self) -> tuple[NDArray[np.uint64], NDArray[np.float32]]:
        """Scratch space for masks (TILE, M), initially unset, and for limits (TILE,)."""
        return np.zeros((TILE, len(self.half_C) // LANES), np.uint64), np.zeros(TILE, np.float32)

    def about(self) -> NDArray[np.float32]:
        """Scratch space for points about the middle (TILE, D)."""
        return np.zeros((TILE, self.columns_BDW.shape[1]), np.float32)


def _halves(vectors: int) -> Any:
    """A function that writes half norms plus products of POINTS points with the columns of `vectors` blocks."""

    @intrinsic
    def write(_context: Any, x: Any, columns: Any, half: Any, x_step: Any, c_step: Any, out: Any, o_step: Any) -> Any:
        def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> None:
            steps = builder.udiv(arguments[3], ir.Constant(INT, 4))
            write_sums(builder, torch.float32, vectors, list(arguments), steps)

        return types.void(*[types.uintp] * 7), generate

    return write


def _compared(vectors: int) -> Any:
    """A function that writes, as bits, which of those sums are at most the points' limits."""

    @intrinsic
    def write(
        _context: Any, x: Any, columns: Any, half: Any, x_step: Any, c_step: Any, limits: Any, out: Any, o_step: Any
    ) -> Any:
        def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> None:
            write_below(builder, vectors, list(arguments), builder.udiv(arguments[3], ir.Constant(INT, 4)))

        return types.void(*[types.uintp] * 8), generate

    return write


_one_block, _some_blocks = _halves(1), _halves(VECTORS)
_one_compared, _some_compared = _compared(1), _compared(VECTORS)


@intrinsic
def _smallest(_context: Any, values: Any, count: Any) -> Any:
    """The least of count · LANES float32 at an address."""

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
    """A bit mask of which of the LANES float32 at an address are at most the limit."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        found = builder.load(builder.inttoptr(arguments[0], FLOATS.as_pointer()), align=4)
        below = builder.fcmp_ordered("<=", found, splat(builder, arguments[1], FLOATS))
        return builder.bitcast(below, ir.IntType(LANES))

    return types.uint64(types.uintp, types.float32), generate


@compiled(fastmath=SUMS)
def _less_middle(x_ND: Any, i: int, middle_D: Any, out_TD: Any, p: int) -> Any:
    """Writes middle − row i of x to row p of out; returns half its squared norm."""
    total = np.float32(0)
    for t in range(x_ND.shape[1]):
        value = middle_D[t] - x_ND[i, t]
        out_TD[p, t] = value
        total += value * value
    return total * np.float32(0.5)


@compiled()
def _write_bounds(
    x_ND: Any, start: int, points: int, middle_D: Any, columns_BDW: Any, half_C: Any, half_T: Any, bounds_TC: Any,
    about_TD: Any,
) -> None:  # fmt: skip
    """For `points` rows from start on, writes half their squared norms about the middle, and to the rows of bounds half
    the columns' squared norms plus the products with all columns.
    """
    for p in range(points):
        half_T[p] = _less_middle(x_ND, start + p, middle_D, about_TD, p)
    dims, width = about_TD.shape[1], half_C.shape[0]
    about, columns, halves, bounds = (
        about_TD.ctypes.data,
        columns_BDW.ctypes.data,
        half_C.ctypes.data,
        bounds_TC.ctypes.data,
    )
    b = 0
    while b < columns_BDW.shape[0]:
        o, several = 4 * WIDTH * b, b + VECTORS <= columns_BDW.shape[0]
        for p in range(0, points, POINTS):
            y, to = about + 4 * dims * p, bounds + 4 * width * p + o
            if several:
                _some_blocks(y, columns + o * dims, halves + o, 4 * dims, 4 * WIDTH * dims, to, 4 * width)
            else:
                _one_block(y, columns + o * dims, halves + o, 4 * dims, 4 * WIDTH * dims, to, 4 * width)
        b += VECTORS if several else 1


@compiled()
def first_rows(
    x_ND: Any, start: int, stop: int, middle_D: Any, columns_BDW: Any, half_C: Any, slack: float, first: int,
    centroids_KD: Any, labels_N: Any, d2_N: Any, bounds_TC: Any, about_TD: Any,
) -> None:  # fmt: skip
    """Writes the first labels int64 and d2 float32 of rows start to stop, against centroids_KD[first:]. The arguments
    are those centroids' `Columns` and the scratch space that these provide.

    The result is bit-identical to that of `bounded.lower_rows`, for the same reasons.
    """
    width, count = half_C.shape[0], centroids_KD.shape[0] - first
    near, kept = np.float32(2 * (x_ND.shape[1] + 2) * ROUNDOFF), np.float32(1 - slack)
    half_T = np.empty(TILE, np.float32)
    bounds = bounds_TC.ctypes.data
    for tile in range(start, stop, TILE):
        points = min(TILE, stop - tile)
        _write_bounds(x_ND, tile, points, middle_D, columns_BDW, half_C, half_T, bounds_TC, about_TD)
        for p in range(points):
            i, row = tile + p, bounds + 4 * width * p
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


@compiled()
def nearer_rows(
    x_ND: Any, start: int, stop: int, middle_D: Any, columns_BDW: Any, half_C: Any, slack: float, first: int,
    centroids_KD: Any, guessed: bool, loose: bool, gap2_K: Any, labels_N: Any, d2_N: Any, masks_TM: Any, limit_T: Any,
    about_TD: Any,
) -> Any:  # fmt: skip
    """Lowers labels int64 and d2 float32 of rows start to stop, which are known, by centroids_KD[first:]; returns the
    number of points compared. The arguments are those centroids' `Columns` and the scratch space that these provide.

    guessed: d2 is not that of the label and is computed first. loose: d2 is an upper bound. A point whose d2 is below
    gap2 (K,) of its label is not compared, as no other centroid can be as near. The result is bit-identical to that of
    `bounded.lower_rows`, for the same reasons.
    """
    dims, count = x_ND.shape[1], centroids_KD.shape[0] - first
    near, kept = np.float32(2 * (dims + 2) * ROUNDOFF), np.float32(1 - slack)
    row_T = np.empty(TILE, np.int64)
    about, columns, halves, masks, limits = (
        about_TD.ctypes.data,
        columns_BDW.ctypes.data,
        half_C.ctypes.data,
        masks_TM.ctypes.data,
        limit_T.ctypes.data,
    )
    next_row, compared, m_step = start, 0, 8 * masks_TM.shape[1]
    while next_row < stop:
        points = 0
        while points < TILE and next_row < stop:
            i, next_row = next_row, next_row + 1
            label, best = labels_N[i], d2_N[i]
            if guessed or loose:
                if loose and best < gap2_K[label]:
                    continue
                best = squared_distance(x_ND, i, centroids_KD, label)
                d2_N[i] = best
                if best < gap2_K[label]:
                    continue
            half = _less_middle(x_ND, i, middle_D, about_TD, points)
            limit_T[points] = np.float32(best * np.float32(0.5) * (np.float32(1) + near) - half * kept)
            row_T[points] = i
            points += 1
        compared += points
        b = 0
        while b < columns_BDW.shape[0]:
            o, several = 4 * WIDTH * b, b + VECTORS <= columns_BDW.shape[0]
            for p in range(0, points, POINTS):
                y, to = about + 4 * dims * p, masks + m_step * p + WIDTH // 8 * b
                c, h, limit = columns + o * dims, halves + o, limits + 4 * p
                if several:
                    _some_compared(y, c, h, 4 * dims, 4 * WIDTH * dims, limit, to, m_step)
                else:
                    _one_compared(y, c, h, 4 * dims, 4 * WIDTH * dims, limit, to, m_step)
            b += VECTORS if several else 1
        for p in range(points):
            i = row_T[p]
            label, best = labels_N[i], d2_N[i]
            for z in range(masks_TM.shape[1]):
                mask = masks_TM[p, z]
                while mask != 0:
                    other = first + LANES * z + lowest_bit(mask)
                    mask &= mask - np.uint64(1)
                    if other == label or other - first >= count:
                        continue
                    label, best = nearest_of_two(x_ND, i, centroids_KD, label, best, other, near)
            labels_N[i], d2_N[i] = label, best
    return compared


@compiled()
def least_gaps(
    centroids_KD: Any, start: int, stop: int, middle_D: Any, columns_BDW: Any, half_C: Any, slack: float, gap2_K: Any,
    bounds_TC: Any, about_TD: Any,
) -> None:  # fmt: skip
    """Writes to gap2, for each centroid start to stop, a lower bound of the square of half its distance to the nearest
    other one, with room for rounding of the squared distance it is compared with. The `Columns` are those of all.
    """
    width = half_C.shape[0]
    near, kept = np.float32(4 * (centroids_KD.shape[1] + 4) * ROUNDOFF), np.float32(1 - slack)
    half_T = np.empty(TILE, np.float32)
    for tile in range(start, stop, TILE):
        points = min(TILE, stop - tile)
        _write_bounds(centroids_KD, tile, points, middle_D, columns_BDW, half_C, half_T, bounds_TC, about_TD)
        for p in range(points):
            bounds_TC[p, tile + p] = np.inf
            half = _smallest(bounds_TC.ctypes.data + 4 * width * p, width // LANES) + half_T[p] * kept
            gap2_K[tile + p] = max(np.float32(0), half * np.float32(0.5) * (np.float32(1) - near))
