"""Row kernels on the CPU, compiled by numba: no product is done here, only what decides after one.

Suffixes: T points of one tile, C centroids of one block (padded to whole masks), D dims, P dims of the code.
Every kernel releases the GIL; workers are Python threads that own disjoint rows or columns. numba's cache knows a
kernel's own file alone: who changes what `direct` calls here must touch that file too.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import extending, types

log = logging.getLogger(__name__)

# centroids whose bounds are compared in one step; their answers are the bits of one uint64
LANES = 64
# unit roundoff of float32
ROUNDOFF = 2.0**-24

# what it makes is called with values, not with the types that its functions are written for
intrinsic: Callable[[Any], Any] = extending.intrinsic
_FLOAT = ir.FloatType()
_FLOATS = ir.VectorType(_FLOAT, LANES)
_INTS = ir.VectorType(ir.IntType(32), LANES)
_MASK = ir.IntType(LANES)
# sums may be taken in any order, which is what lets a compiler use vectors; NaN and infinity keep their meaning
SUMS = {"reassoc", "contract", "nsz"}


def compiled(**options: Any) -> Callable[[Any], Any]:
    """numba.njit that keeps its machine code beside the module, or where a user's caches lie, where it may."""

    def decorate(function: Any) -> Any:
        try:
            return numba.njit(cache=True, nogil=True, **options)(function)
        except RuntimeError as error:
            log.warning("%s is compiled anew in every process: %s", function.__name__, error)
            return numba.njit(nogil=True, **options)(function)

    return decorate


def splat(builder: Any, scalar: Any, kind: Any) -> Any:
    """A vector of that kind, all of whose numbers are the scalar."""
    one = builder.insert_element(ir.Constant(kind, ir.Undefined), scalar, ir.Constant(ir.IntType(32), 0))
    places = ir.Constant(ir.VectorType(ir.IntType(32), kind.count), [0] * kind.count)
    return builder.shuffle_vector(one, ir.Constant(kind, ir.Undefined), places)


def least_of(builder: Any, floats: Any) -> Any:
    """The least number of a vector of LANES, none of which is NaN."""
    name = f"llvm.vector.reduce.fmin.v{LANES}f32"
    least = builder.module.globals.get(name) or ir.Function(builder.module, ir.FunctionType(_FLOAT, [_FLOATS]), name)
    return builder.call(least, [floats], fastmath=("nnan",))


def _load(builder: Any, address: Any, kind: Any) -> Any:
    return builder.load(builder.inttoptr(address, kind.as_pointer()), align=4)


def _bounds(builder: Any, integers: bool, arguments: Any) -> Any:
    """The lower bounds of LANES half squared distances less the point's own half norm, as one vector."""
    product, scale_c, spread_c, rest_c, half_c, scale, norm, rest = arguments
    raw = _load(builder, product, _INTS if integers else _FLOATS)
    raw = builder.sitofp(raw, _FLOATS) if integers else raw
    upper = builder.fmul(builder.fmul(raw, _load(builder, scale_c, _FLOATS)), splat(builder, scale, _FLOATS))
    for of_c, of_point in ((spread_c, norm), (rest_c, rest)):
        term = builder.fmul(_load(builder, of_c, _FLOATS), splat(builder, of_point, _FLOATS), flags=("contract",))
        upper = builder.fadd(upper, term, flags=("contract",))
    return builder.fsub(_load(builder, half_c, _FLOATS), upper)


@intrinsic
def _below(
    _context: Any, sample: Any, product: Any, scales: Any, spreads: Any, rests: Any, halves: Any,
    scale: Any, norm: Any, rest: Any, limit: Any,
) -> Any:  # fmt: skip
    """Bits of the LANES centroids whose lower bound is at most the limit. sample tells the products' type."""
    integers = isinstance(sample, types.Integer)
    signature = types.uint64(sample, *[types.uintp] * 5, *[types.float32] * 4)

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        bounds = _bounds(builder, integers, arguments[1:9])
        return builder.bitcast(builder.fcmp_ordered("<=", bounds, splat(builder, arguments[9], _FLOATS)), _MASK)

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
def lowest_bit(_context: Any, mask: Any) -> Any:
    """The number of the lowest bit that is set; the mask is not 0."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.cttz(arguments[0], ir.Constant(ir.IntType(1), 1))

    return types.int64(types.uint64), generate


@compiled(fastmath=SUMS)
def squared_distance(x_ND: Any, i: int, c_KD: Any, j: int) -> Any:
    """||x − c||² of two rows in float32, from differences: a copy is at 0 exactly. Its relative error is at most
    (D + 2)·2^-24. Rows are not given as slices: to make one takes as long as the distance of a few dims.
    """
    total = np.float32(0)
    for t in range(x_ND.shape[1]):
        difference = x_ND[i, t] - c_KD[j, t]
        total += difference * difference
    return total


@compiled()
def nearer(x_ND: Any, i: int, c_KD: Any, one: int, other: int) -> Any:
    """Sign of ||x − one||² − ||x − other||² of rows in float64: −1, 0 or 1."""
    to_one, to_other = 0.0, 0.0
    for t in range(x_ND.shape[1]):
        x = np.float64(x_ND[i, t])
        to_one += (x - c_KD[one, t]) ** 2
        to_other += (x - c_KD[other, t]) ** 2
    return (to_one > to_other) - (to_one < to_other)


@compiled()
def nearest_of_two(x_ND: Any, i: int, c_KD: Any, label: int, best: Any, other: int, slack: Any) -> Any:
    """Label and d2 of the nearer of two rows of c, of which the first lies at `best`: float64 decides between such as
    float32 cannot tell apart, and of equal ones the lower label stays.
    """
    d2 = squared_distance(x_ND, i, c_KD, other)
    closer = d2 < best
    if abs(d2 - best) <= slack * best:
        sign = nearer(x_ND, i, c_KD, other, label)
        closer = sign < 0 or (sign == 0 and other < label)
    return (other, d2) if closer else (label, best)


@compiled()
def own_distances(x_ND: Any, start: int, stop: int, centroids_KD: Any, labels_N: Any, d2_N: Any) -> None:
    """d2 of rows start to stop, float32, to the centroid of each point's label, written in place."""
    for i in range(start, stop):
        d2_N[i] = squared_distance(x_ND, i, centroids_KD, labels_N[i])


@compiled()
def lower_rows(
    product_TC: Any,
    c_scale: Any,
    c_norm: Any,
    c_error: Any,
    c_rest: Any,
    c_half: Any,
    first: int,
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
) -> Any:
    """Lowers labels int64 and d2 float32 of rows start to stop by a block of centroids; returns the distances computed.

    The block is centroids_KD[first : first + C]; a label is a row of centroids_KD. product is the coarse product of the
    codes; with the other columns, those of the points from code_start on, it bounds every distance from below (see
    `coarse`), and only where the bound does not exceed the best distance so far is that distance computed. Of two
    centroids nearer to each other than float32 can tell, float64 decides, and of equal ones the lower label stays, so
    that the result is the exact assignment in any order of blocks. A label of -1 says that nothing is known: the least
    bound of the block is then looked at first.
    """
    width = product_TC.shape[1]
    slack = np.float32(2 * (x_ND.shape[1] + 2) * ROUNDOFF)
    widest_error = np.float32(0)
    for i in range(code_start, code_start + stop - start):
        if x_norm[i] > 0:
            widest_error = max(widest_error, x_error[i] / x_norm[i])
    c_spread = np.empty(width, np.float32)
    for j in range(width):
        c_spread[j] = c_error[j] + widest_error * (c_norm[j] + c_error[j])
    products, scales, spreads = product_TC.ctypes.data, c_scale.ctypes.data, c_spread.ctypes.data
    rests, halves = c_rest.ctypes.data, c_half.ctypes.data
    sample = product_TC[0, 0]
    computed = 0
    for i in range(start, stop):
        at = code_start + i - start
        a, n, r, half = x_scale[at], x_norm[at], x_rest[at], x_half[at]
        best, label = d2_N[i], labels_N[i]
        row = products + (i - start) * width * 4
        if label < 0:
            least, block = np.float32(np.inf), 0
            for z in range(0, width, LANES):
                o = 4 * z
                bound = _least(sample, row + o, scales + o, spreads + o, rests + o, halves + o, a, n, r)
                if bound < least:
                    least, block = bound, z
            o = 4 * block
            mask = _below(sample, row + o, scales + o, spreads + o, rests + o, halves + o, a, n, r, least)
            label = first + block + (lowest_bit(mask) if mask != 0 else 0)
            best = squared_distance(x_ND, i, centroids_KD, label)
            computed += 1
        limit = np.float32(best * np.float32(0.5) * (np.float32(1) + slack) - half)
        for z in range(0, width, LANES):
            o = 4 * z
            mask = _below(sample, row + o, scales + o, spreads + o, rests + o, halves + o, a, n, r, limit)
            while mask != 0:
                j = z + lowest_bit(mask)
                mask &= mask - np.uint64(1)
                other = first + j
                if other == label:
                    continue
                upper = np.float32(product_TC[i - start, j]) * c_scale[j] * a + c_spread[j] * n + c_rest[j] * r
                if c_half[j] - upper > limit:
                    continue
                computed += 1
                before = label
                label, best = nearest_of_two(x_ND, i, centroids_KD, label, best, other, slack)
                if label != before:
                    limit = np.float32(best * np.float32(0.5) * (np.float32(1) + slack) - half)
        labels_N[i], d2_N[i] = label, best
    return computed


@compiled(fastmath=SUMS)
def centre_rows(x_TD: Any, middle_D: Any, out_TD: Any, half_T: Any) -> None:
    """X − middle into out (T, D), and half its squared norm into half (T,), both float32."""
    for i in range(x_TD.shape[0]):
        total = np.float32(0)
        for t in range(x_TD.shape[1]):
            value = x_TD[i, t] - middle_D[t]
            out_TD[i, t] = value
            total += value * value
        half_T[i] = total * np.float32(0.5)


@compiled(fastmath=SUMS)
def code_rows(y_TP: Any, code_TP: Any, scale_T: Any, norm_T: Any, error_T: Any) -> None:
    """Rows of y (T, P) to int8 codes with y ≈ scale·code; norm is ||scale·code||, error ||y − scale·code||."""
    for i in range(y_TP.shape[0]):
        largest = np.float32(0)
        for t in range(y_TP.shape[1]):
            largest = max(largest, abs(y_TP[i, t]))
        scale = largest / np.float32(127)
        inverse = np.float32(1) / scale if scale > 0 else np.float32(0)
        inverse = inverse if np.isfinite(inverse) else np.float32(0)
        squares, errors = np.float32(0), np.float32(0)
        for t in range(y_TP.shape[1]):
            whole = np.rint(y_TP[i, t] * inverse)
            code_TP[i, t] = np.int8(whole)
            coded = whole * scale
            squares += coded * coded
            errors += (y_TP[i, t] - coded) ** 2
        scale_T[i], norm_T[i], error_T[i] = scale, np.sqrt(squares), np.sqrt(errors)


@compiled()
def nearer_halves(x_ND: Any, start: int, stop: int, halves_2KD: Any, labels_N: Any, half_N: Any, d2_N: Any) -> None:
    """Of the halves 2l and 2l + 1 of each point's cluster l, the nearer, and its squared distance; start to stop."""
    for i in range(start, stop):
        left = 2 * labels_N[i]
        to_left = squared_distance(x_ND, i, halves_2KD, left)
        to_right = squared_distance(x_ND, i, halves_2KD, left + 1)
        half_N[i] = left + (to_right < to_left)
        d2_N[i] = min(to_left, to_right)
