"""Numba kernel that computes only the distances to coded centroids whose lower bound could beat the best so far.

The bounds come from products of codes (see `coarse`). Products are made for a few points and centroids at a time, used
at once, and never stored.

Suffixes: N points, C centroids of one block (padded to whole masks), D dims, P dims of the code.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils

from rb_gpu.learn.kernels import ROUNDOFF, nearest_of_two, squared_distance
from rb_gpu.learn.products import GROUP, begin_products, end_products, group_products
from rb_gpu.learn.vectors import (
    FLOATS,
    INT,
    LANES,
    WIDTH,
    address,
    called,
    compiled,
    intrinsic,
    least_of,
    lowest_bit,
    splat,
)

# points for which the columns of LANES centroids stay in the first-level cache
BATCH = 128
# bytes of a cache line, and of the start of a row that is prefetched: the hardware prefetcher fetches the rest
LINE, AHEAD = 64, 512
LARGEST = np.finfo(np.float32).max
_INTS = ir.VectorType(ir.IntType(32), LANES)


def _load(builder: Any, place: Any, kind: Any) -> Any:
    return builder.load(builder.inttoptr(place, kind.as_pointer()), align=4)


def _bounds(builder: Any, integers: bool, arguments: Any) -> Any:
    """Lower bounds of LANES half squared distances, less the point's own half norm, as one vector."""
    product, scale_c, spread_c, rest_c, half_c, scale, norm, rest = arguments
    raw = _load(builder, product, _INTS if integers else FLOATS)
    raw = builder.sitofp(raw, FLOATS) if integers else raw
    upper = builder.fmul(builder.fmul(raw, _load(builder, scale_c, FLOATS)), splat(builder, scale, FLOATS))
    for of_c, of_point in ((spread_c, norm), (rest_c, rest)):
        term = builder.fmul(_load(builder, of_c, FLOATS), splat(builder, of_point, FLOATS), flags=("contract",))
        upper = builder.fadd(upper, term, flags=("contract",))
    return builder.fsub(_load(builder, half_c, FLOATS), upper)


@intrinsic
def _below(
    _context: Any, sample: Any, product: Any, scales: Any, spreads: Any, rests: Any, halves: Any,
    scale: Any, norm: Any, rest: Any, limit: Any,
) -> Any:  # fmt: skip
    """A bit mask of the LANES centroids whose lower bound is at most limit. sample determines the product's type."""
    integers = isinstance(sample, types.Integer)
    signature = types.uint64(sample, *[types.uintp] * 5, *[types.float32] * 4)

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        bounds = _bounds(builder, integers, arguments[1:9])
        return builder.bitcast(
            builder.fcmp_ordered("<=", bounds, splat(builder, arguments[9], FLOATS)), ir.IntType(LANES)
        )

    return signature, generate


@intrinsic
def _least(
    _context: Any, sample: Any, product: Any, scales: Any, spreads: Any, rests: Any, halves: Any,
    scale: Any, norm: Any, rest: Any,
) -> Any:  # fmt: skip
    """The least of LANES lower bounds."""
    integers = isinstance(sample, types.Integer)
    signature = types.float32(sample, *[types.uintp] * 5, *[types.float32] * 3)

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        bounds = _bounds(builder, integers, arguments[1:9])
        return least_of(builder, bounds)

    return signature, generate


@intrinsic
def _fetch(_context: Any, row: Any, count: Any) -> Any:
    """Prefetches `count` bytes from address `row` on, so that a later read need not wait for memory."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> None:
        lines = builder.udiv(builder.add(arguments[1], ir.Constant(INT, LINE - 1)), ir.Constant(INT, LINE))
        # llvm.prefetch: for reading, high temporal locality, into the data cache
        how = [ir.Constant(ir.IntType(32), code) for code in (0, 3, 1)]
        with cgutils.for_range(builder, lines, intp=INT) as loop:
            place = address(builder, arguments[0], builder.mul(loop.index, ir.Constant(INT, LINE)), ir.IntType(8))
            called(builder, "llvm.prefetch.p0", ir.VoidType(), [place, *how])

    return types.void(types.uintp, types.uintp), generate


@compiled()
def _limit(best: Any, slack: Any, half: Any) -> Any:
    """Half the best squared distance with room for rounding, less the point's half norm. It is kept finite where a
    square overflows, unlike the infinite bounds of padding centroids.
    """
    return min(best * np.float32(0.5) * (np.float32(1) + slack) - half, LARGEST)


@compiled()
def lower_rows(
    columns: Any,
    begin_C: Any,
    c_scale: Any,
    c_norm: Any,
    c_error: Any,
    c_rest: Any,
    c_half: Any,
    first: int,
    code_NP: Any,
    x_scale: Any,
    x_norm: Any,
    x_error: Any,
    x_rest: Any,
    x_half: Any,
    code_start: int,
    x_ND: Any,
    start: int,
    stop: int,
    centroids_KD: Any,
    labels_N: Any,
    d2_N: Any,
    loose: bool,
    product_GL: Any,
    c_spread: Any,
) -> Any:
    """Lowers labels int64 and d2 float32 of rows start to stop by a block of centroids; returns the distances computed.

    The block is centroids_KD[first : first + C], and a label is a row of centroids_KD. columns and begin are its
    `columns_of`. The points' codes begin at row code_start of code; GROUP further rows must be readable behind them.
    The product of codes, with the scales, norms, errors and rests of both sides, bounds every distance from below (see
    `coarse`), and a distance is computed only where its bound does not exceed the best so far. Where float32 cannot
    tell two centroids apart, float64 decides, and of equally near ones the lower label wins, so that the result is the
    exact assignment in any order of blocks. For a label of -1 (unknown), the centroid with the least of the first LANES
    bounds is tried first. loose: d2 is only an upper bound of the distance to the label's centroid; that distance is
    computed as soon as any other bound is as low, and d2 is left as it is otherwise. product (GROUP, LANES), of begin's
    dtype, and spread (C,) are scratch space.
    """
    width, depth = c_half.shape[0], code_NP.strides[0]
    slack = np.float32(2 * (x_ND.shape[1] + 2) * ROUNDOFF)
    widest_error = np.float32(0)
    for i in range(code_start, code_start + stop - start):
        if x_norm[i] > 0:
            widest_error = max(widest_error, x_error[i] / x_norm[i])
    for j in range(width):
        c_spread[j] = c_error[j] + widest_error * (c_norm[j] + c_error[j])
    limit_B, guessed_B = np.empty(BATCH, np.float32), np.empty(BATCH, np.bool_)
    # the points of a group in doubt, and their candidate centroids: collected first, so that prefetches run ahead
    doubt_G, mask_G = np.empty(GROUP, np.int64), np.empty(GROUP, np.uint64)
    x_rows, c_rows, x_step = x_ND.ctypes.data, centroids_KD.ctypes.data, x_ND.strides[0]
    ahead = min(x_step, AHEAD)
    products, codes, begin = product_GL.ctypes.data, code_NP.ctypes.data, begin_C.ctypes.data
    scales, spreads, rests, halves = c_scale.ctypes.data, c_spread.ctypes.data, c_rest.ctypes.data, c_half.ctypes.data
    kind, sample = code_NP[0, 0], begin_C[0]
    begin_products(kind)
    computed = 0
    for batch in range(start, stop, BATCH):
        count, at = min(BATCH, stop - batch), code_start + batch - start
        guessed_B[:] = loose
        for b in range(count):
            limit_B[b] = _limit(d2_N[batch + b], slack, x_half[at + b])
        for z in range(0, width, LANES):
            o, column = 4 * z, columns.ctypes.data + z * depth
            for g in range(0, count, GROUP):
                code, points = codes + (at + g) * depth, min(GROUP, count - g)
                group_products(kind, points, code, depth, column, WIDTH * depth, begin + o, products)
                doubtful = 0
                for b in range(g, g + points):
                    i, limit = batch + b, limit_B[b]
                    row, a, n, r = products + (b - g) * LANES * 4, x_scale[at + b], x_norm[at + b], x_rest[at + b]
                    if labels_N[i] < 0:
                        least = _least(sample, row, scales + o, spreads + o, rests + o, halves + o, a, n, r)
                        mask = _below(sample, row, scales + o, spreads + o, rests + o, halves + o, a, n, r, least)
                        labels_N[i] = first + z + (lowest_bit(mask) if mask != 0 else 0)
                        d2_N[i] = squared_distance(x_ND, i, centroids_KD, labels_N[i])
                        limit_B[b] = limit = _limit(d2_N[i], slack, x_half[at + b])
                        computed += 1
                    mask = _below(sample, row, scales + o, spreads + o, rests + o, halves + o, a, n, r, limit)
                    own = labels_N[i] - first - z
                    if 0 <= own < LANES:
                        mask &= ~(np.uint64(1) << np.uint64(own))
                    if mask != 0:
                        _fetch(x_rows + i * x_step, ahead)
                        _fetch(c_rows + (first + z + lowest_bit(mask)) * x_step, ahead)
                        if guessed_B[b]:
                            _fetch(c_rows + labels_N[i] * x_step, ahead)
                        doubt_G[doubtful], mask_G[doubtful] = b, mask
                        doubtful += 1
                for d in range(doubtful):
                    b, mask = doubt_G[d], mask_G[d]
                    i, limit, guessed = batch + b, limit_B[b], guessed_B[b]
                    row, a, n, r = products + (b - g) * LANES * 4, x_scale[at + b], x_norm[at + b], x_rest[at + b]
                    while mask != 0:
                        computed += 1
                        if guessed:
                            best = squared_distance(x_ND, i, centroids_KD, labels_N[i])
                            guessed, d2_N[i] = False, best
                        else:
                            other = first + z + lowest_bit(mask)
                            mask &= mask - np.uint64(1)
                            label, best = nearest_of_two(x_ND, i, centroids_KD, labels_N[i], d2_N[i], other, slack)
                            if label != other:
                                continue
                            labels_N[i], d2_N[i] = label, best
                        limit = _limit(best, slack, x_half[at + b])
                        mask &= _below(sample, row, scales + o, spreads + o, rests + o, halves + o, a, n, r, limit)
                    limit_B[b], guessed_B[b] = limit, guessed
    end_products(kind)
    return computed
