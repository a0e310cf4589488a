"""Row kernels on the CPU, compiled by numba: distances between rows, and the coding of rows.

Suffixes: T points of one tile, C centroids of one block (padded to whole masks), D dims, P dims of the code.
Every kernel releases the GIL; workers are Python threads that own disjoint rows or columns. An array whose address a
kernel takes must be an argument: numba frees a local array after its last use by name.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils

from rb_gpu.learn.vectors import (
    FLOAT,
    INT,
    LANES,
    SUMS,
    WIDTH,
    address,
    alloca,
    called,
    compiled,
    intrinsic,
    splat,
    sum_of,
)

# unit roundoff of float32
ROUNDOFF = 2.0**-24


def _squared_difference(lanes: int) -> Any:
    """A function that sums squared differences of two rows, `lanes` numbers at a time."""
    kind = ir.VectorType(FLOAT, lanes)

    @intrinsic
    def add(_context: Any, x: Any, c: Any, dims: Any) -> Any:
        """The sum over the rows at these addresses; dims is a multiple of lanes."""

        def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
            zero = ir.Constant(kind, [0.0] * lanes)
            place = alloca(builder, zero)
            builder.store(zero, place)
            steps = builder.udiv(arguments[2], ir.Constant(INT, lanes))
            with cgutils.for_range(builder, steps, intp=INT) as loop:
                offset = builder.mul(loop.index, ir.Constant(INT, 4 * lanes))
                one, other = (builder.load(address(builder, row, offset, kind), align=4) for row in arguments[:2])
                difference = builder.fsub(one, other)
                square = builder.fmul(difference, difference, flags=("contract",))
                builder.store(builder.fadd(builder.load(place), square, flags=("contract",)), place)
            return sum_of(builder, builder.load(place))

        return types.float32(types.uintp, types.uintp, types.intp), generate

    return add


_of_many, _of_some = _squared_difference(LANES), _squared_difference(WIDTH)


@intrinsic
def _of_few(_context: Any, x: Any, c: Any, dims: Any) -> Any:
    """The sum of squared differences of two rows at these addresses, for fewer dims than a vector has numbers."""
    kind, places = ir.VectorType(FLOAT, WIDTH), ir.VectorType(INT, WIDTH)

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        count = splat(builder, arguments[2], places)
        mask = builder.icmp_unsigned("<", ir.Constant(places, list(range(WIDTH))), count)
        rest = [ir.Constant(ir.IntType(32), 4), mask, ir.Constant(kind, [0.0] * WIDTH)]
        rows = [builder.inttoptr(row, kind.as_pointer()) for row in arguments[:2]]
        one, other = (called(builder, f"llvm.masked.load.v{WIDTH}f32.p0", kind, [row, *rest]) for row in rows)
        difference = builder.fsub(one, other)
        return sum_of(builder, builder.fmul(difference, difference))

    return types.float32(types.uintp, types.uintp, types.intp), generate


@compiled(fastmath=SUMS)
def squared_distance(x_ND: Any, i: int, c_KD: Any, j: int) -> Any:
    """||x − c||² of two rows in float32, from differences, so that a copy is at exactly 0. The relative error is at
    most (D + 2)·2^-24. Rows are passed by index: making a slice takes as long as a distance in few dims.
    """
    dims, begun = x_ND.shape[1], 0
    total = np.float32(0)
    x, c = x_ND.ctypes.data + i * x_ND.strides[0], c_KD.ctypes.data + j * c_KD.strides[0]
    if dims >= 2 * LANES:
        begun = dims - dims % LANES
        total = _of_many(x, c, begun)
    if dims - begun >= WIDTH:
        some = dims - begun - dims % WIDTH
        total += _of_some(x + 4 * begun, c + 4 * begun, some)
        begun += some
    if begun < dims:
        total += _of_few(x + 4 * begun, c + 4 * begun, dims - begun)
    return total


@compiled()
def nearer(x_ND: Any, i: int, c_KD: Any, one: int, other: int) -> Any:
    """Sign of ||x − one||² − ||x − other||² in float64: −1, 0 or 1."""
    to_one, to_other = 0.0, 0.0
    for t in range(x_ND.shape[1]):
        x = np.float64(x_ND[i, t])
        to_one += (x - c_KD[one, t]) ** 2
        to_other += (x - c_KD[other, t]) ** 2
    return (to_one > to_other) - (to_one < to_other)


@compiled()
def nearest_of_two(x_ND: Any, i: int, c_KD: Any, label: int, best: Any, other: int, slack: Any) -> Any:
    """Label and d2 of the nearer of two rows of c, where `best` is the squared distance to the first. float64 decides
    where float32 cannot tell them apart; of equally near ones the lower label wins.
    """
    d2 = squared_distance(x_ND, i, c_KD, other)
    closer = d2 < best
    if abs(d2 - best) <= slack * best:
        sign = nearer(x_ND, i, c_KD, other, label)
        closer = sign < 0 or (sign == 0 and other < label)
    return (other, d2) if closer else (label, best)


@compiled()
def own_distances(x_ND: Any, start: int, stop: int, centroids_KD: Any, labels_N: Any, d2_N: Any) -> None:
    """Writes d2 (float32) of rows start to stop to the centroid of each point's label."""
    for i in range(start, stop):
        d2_N[i] = squared_distance(x_ND, i, centroids_KD, labels_N[i])


@compiled()
def widen(start: int, stop: int, labels_N: Any, moved_K: Any, more: float, d2_N: Any) -> None:
    """Raises d2 of rows start to stop in place to upper bounds after each centroid moved by moved_K."""
    for i in range(start, stop):
        far = (np.sqrt(d2_N[i]) + moved_K[labels_N[i]]) * np.float32(more)
        d2_N[i] = far * far


@compiled(fastmath=SUMS)
def centre_rows(x_TD: Any, middle_D: Any, out_TD: Any, half_T: Any) -> None:
    """Writes x − middle to out (T, D) and half its squared norm to half (T,), both float32."""
    for i in range(x_TD.shape[0]):
        total = np.float32(0)
        for t in range(x_TD.shape[1]):
            value = x_TD[i, t] - middle_D[t]
            out_TD[i, t] = value
            total += value * value
        half_T[i] = total * np.float32(0.5)


@compiled(fastmath=SUMS)
def code_rows(
    y_TP: Any, zero: int, square_T: Any, code_TP: Any, scale_T: Any, norm_T: Any, error_T: Any
) -> None:  # fmt: skip
    """Codes rows of y (T, P) in eight bits, with y ≈ scale·(code − zero); dims beyond P are coded as 0. norm is the
    norm of the decoded row, error an upper bound on that of y minus the decoded row, square the squared norm of y.
    """
    more = np.float32(1 + 2 * (y_TP.shape[1] + 4) * ROUNDOFF)
    # compare bit patterns without the sign: they are ordered like the magnitudes, and integers vectorise
    bits_TP = y_TP.view(np.int32)
    for i in range(y_TP.shape[0]):
        largest = np.int32(0)
        for t in range(y_TP.shape[1]):
            largest = max(largest, bits_TP[i, t] & np.int32(0x7FFFFFFF))
        scale = np.int32(largest).view(np.float32) / np.float32(127)
        inverse = np.float32(1) / scale if scale > 0 else np.float32(0)
        inverse = inverse if np.isfinite(inverse) else np.float32(0)
        square, squares, errors = np.float32(0), np.float32(0), np.float32(0)
        for t in range(y_TP.shape[1]):
            whole = np.rint(y_TP[i, t] * inverse)
            coded = whole * scale
            left = y_TP[i, t] - coded
            square += y_TP[i, t] * y_TP[i, t]
            squares += coded * coded
            errors += left * left
            code_TP[i, t] = np.int32(whole) + np.int32(zero)
        for t in range(y_TP.shape[1], code_TP.shape[1]):
            code_TP[i, t] = zero
        square_T[i], scale_T[i], norm_T[i], error_T[i] = square, scale, np.sqrt(squares), np.sqrt(errors) * more


@compiled()
def nearer_halves(x_ND: Any, start: int, stop: int, halves_2KD: Any, labels_N: Any, half_N: Any, d2_N: Any) -> None:
    """Writes the nearer of the halves 2l and 2l + 1 of each point's cluster l and its squared distance, rows start to
    stop.
    """
    for i in range(start, stop):
        left = 2 * labels_N[i]
        to_left = squared_distance(x_ND, i, halves_2KD, left)
        to_right = squared_distance(x_ND, i, halves_2KD, left + 1)
        half_N[i] = left + (to_right < to_left)
        d2_N[i] = min(to_left, to_right)
