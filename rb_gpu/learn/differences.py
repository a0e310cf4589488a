"""Nearest centroids by computing all differences, with one point in each lane of a vector.

This is the fastest method in few dims, as no sum across the lanes of a vector is needed. Where centroids moved little,
bounds confirm most labels without any distance (Hamerly 2010).
The relative error of these distances is at most (D + 2)·2^-24; `nearest_of_two` decides where two are closer than that.
Labels and exact distances are bit-identical to those of `direct` and `bounded`, for the same reasons.
Suffixes: N points, T points of one tile, K centroids, C centroids padded to an even number by an infinitely far one,
D dims.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numpy.typing import NDArray

from rb_gpu.learn.kernels import ROUNDOFF, nearest_of_two, squared_distance
from rb_gpu.learn.products import VECTORS
from rb_gpu.learn.vectors import FLOAT, INT, WIDTH, address, alloca, compiled, intrinsic, splat

# the gaps between centroids are computed from this many points per centroid on: their cost is then negligible
GAPS = 32
# points of one tile: a few of their dims, and their state, stay in a core's first-level cache
TILE = 64


@intrinsic
def _lower(
    _context: Any, y: Any, centroids: Any, dims: Any, label: Any, least: Any, following: Any, labels: Any
) -> Any:  # fmt: skip
    """Updates the least two squared distances of TILE points, and the label of the least, by two further centroids. The
    arguments are addresses: of the points (their dims are TILE numbers apart), the two centroids and the state.
    """
    kind, whole, vectors = ir.VectorType(FLOAT, WIDTH), ir.VectorType(ir.IntType(32), WIDTH), 2 * VECTORS

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> None:
        points, centroids, dims, label, *known = arguments
        zero = ir.Constant(kind, [0.0] * WIDTH)
        rows = [centroids, builder.add(centroids, builder.mul(dims, ir.Constant(INT, 4)))]
        names = [builder.trunc(label, whole.element), builder.trunc(builder.add(label, INT(1)), whole.element)]
        for block in range(0, 4 * TILE, 4 * WIDTH * vectors):
            offsets = [INT(block + 4 * WIDTH * v) for v in range(vectors)]
            sums = [[alloca(builder, zero) for _ in offsets] for _ in rows]
            for place in (place for row in sums for place in row):
                builder.store(zero, place)
            with cgutils.for_range(builder, dims, intp=INT) as loop:
                start, at = builder.mul(loop.index, INT(4 * TILE)), builder.mul(loop.index, INT(4))
                here = builder.add(points, start)
                parts = [builder.load(address(builder, here, offset, kind), align=4) for offset in offsets]
                for centroid, row in zip(rows, sums, strict=True):
                    number = splat(builder, builder.load(address(builder, centroid, at, FLOAT), align=4), kind)
                    for part, place in zip(parts, row, strict=True):
                        difference = builder.fsub(part, number)
                        square = builder.fmul(difference, difference, flags=("contract",))
                        builder.store(builder.fadd(builder.load(place), square, flags=("contract",)), place)
            for v, offset in enumerate(offsets):
                to = [address(builder, base, offset, one) for base, one in zip(known, (kind, kind, whole), strict=True)]
                first, second, nearest = (builder.load(place, align=4) for place in to)
                for name, row in zip(names, sums, strict=True):
                    d2 = builder.load(row[v])
                    closer = builder.fcmp_ordered("<", d2, first)
                    later = builder.select(closer, first, d2)
                    second = builder.select(builder.fcmp_ordered("<", later, second), later, second)
                    first = builder.select(closer, d2, first)
                    nearest = builder.select(closer, splat(builder, name, whole), nearest)
                for value, place in zip((first, second, nearest), to, strict=True):
                    builder.store(value, place, align=4)

    return types.void(*[types.uintp] * 2, types.intp, types.intp, *[types.uintp] * 3), generate


@compiled()
def lowered_rows(
    x_ND: Any, start: int, stop: int, centroids_CD: Any, first: int, k: int, labels_N: Any, d2_N: Any, y_DT: Any,
    least_T: Any, next_T: Any, label_T: Any,
) -> None:  # fmt: skip
    """Lowers labels int64 and d2 float32 of rows start to stop by the centroids first to k; a negative label means none
    yet. Arguments that end in T are scratch space.
    """
    dims = x_ND.shape[1]
    near = np.float32(2 * (dims + 2) * ROUNDOFF)
    # room for the rounding of two squared distances that are compared
    less = np.float32(1 - (4 * dims + 16) * ROUNDOFF)
    y, centroids = y_DT.ctypes.data, centroids_CD.ctypes.data
    known = least_T.ctypes.data, next_T.ctypes.data, label_T.ctypes.data
    for tile in range(start, stop, TILE):
        points = min(TILE, stop - tile)
        for p in range(points):
            for t in range(dims):
                y_DT[t, p] = x_ND[tile + p, t]
        least_T[:], next_T[:], label_T[:] = np.inf, np.inf, first
        for j in range(first, k, 2):
            _lower(y, centroids + 4 * dims * j, dims, j, *known)
        for p in range(points):
            i, nearest = tile + p, np.int64(label_T[p])
            label, best = labels_N[i], d2_N[i]
            if label < 0:
                label, best = nearest, squared_distance(x_ND, i, centroids_CD, nearest)
            elif least_T[p] * less > best:
                continue
            else:
                label, best = nearest_of_two(x_ND, i, centroids_CD, label, best, nearest, near)
            if not next_T[p] * less > best:
                for j in range(first, k):
                    if j != label:
                        label, best = nearest_of_two(x_ND, i, centroids_CD, label, best, j, near)
            labels_N[i], d2_N[i] = label, best


@compiled()
def moved_rows(
    x_ND: Any, start: int, stop: int, centroids_CD: Any, moved_K: Any, others_K: Any, half_K: Any, labels_N: Any,
    d2_N: Any, next_N: Any, y_DT: Any, least_T: Any, next_T: Any, label_T: Any,
) -> Any:  # fmt: skip
    """Updates labels int64 of rows start to stop after each centroid moved by moved (K,), where others (K,) is the
    largest move among the other centroids; returns the number of points compared. Arguments in T are scratch space.

    Before and after, d2 float32 is an upper bound (up to rounding) of the squared distance to the label's centroid, and
    next float32 a lower bound of the distance to any other centroid. A point is not read if these confirm its label, or
    if its distance is below half (K,), half the distance from its centroid to the next one.
    """
    dims, k = x_ND.shape[1], moved_K.shape[0]
    near = np.float32(2 * (dims + 2) * ROUNDOFF)
    # room for the rounding of a bound: d2 has a relative error of D + 2 units, its root of half that
    more, less = np.float32(1 + (2 * dims + 8) * ROUNDOFF), np.float32(1 - (2 * dims + 8) * ROUNDOFF)
    row_T = np.empty(TILE, np.int64)
    y, centroids = y_DT.ctypes.data, centroids_CD.ctypes.data
    known = least_T.ctypes.data, next_T.ctypes.data, label_T.ctypes.data
    next_row, compared = start, 0
    while next_row < stop:
        points = 0
        while points < TILE and next_row < stop:
            i, next_row = next_row, next_row + 1
            label = labels_N[i]
            far, apart = (np.sqrt(d2_N[i]) + moved_K[label]) * more, (next_N[i] - others_K[label]) * less
            d2_N[i], next_N[i] = far * far, apart
            if far < apart or far < half_K[label]:
                continue
            for t in range(dims):
                y_DT[t, points] = x_ND[i, t]
            row_T[points] = i
            points += 1
        if points == 0:
            break
        compared += points
        least_T[:], next_T[:], label_T[:] = np.inf, np.inf, 0
        for j in range(0, k, 2):
            _lower(y, centroids + 4 * dims * j, dims, j, *known)
        for p in range(points):
            i, label, best, after = row_T[p], np.int64(label_T[p]), least_T[p], next_T[p]
            if not best * more * more < after * less * less:
                after = best
                best = squared_distance(x_ND, i, centroids_CD, label)
                for j in range(k):
                    if j != label:
                        label, best = nearest_of_two(x_ND, i, centroids_CD, label, best, j, near)
            labels_N[i], d2_N[i], next_N[i] = label, best, np.sqrt(after) * less
    return compared


def _tile(dims: int) -> tuple[NDArray[Any], ...]:
    """Scratch space of one call: points (D, T), their least and second squared distances (T,), labels of the least."""
    return *(np.zeros(shape, np.float32) for shape in ((dims, TILE), TILE, TILE)), np.zeros(TILE, np.int32)


def _made_even(centroids_KD: NDArray[np.float32], first: int) -> NDArray[np.float32]:
    """The centroids (C, D), padded so that the number from `first` on is even."""
    k, dims = centroids_KD.shape
    centroids_CD = np.full((k + (k - first) % 2, dims), np.inf, np.float32)
    centroids_CD[:k] = centroids_KD
    return centroids_CD


def lowering(
    x_ND: NDArray[np.float32],
    centroids_KD: NDArray[np.float32],
    first: int,
    labels_N: NDArray[np.int64],
    d2_N: NDArray[np.float32],
) -> Callable[[int, int], int]:
    """A function that lowers labels and d2 of rows start to stop by the centroids from `first` on, and returns the
    number of rows.
    """
    (k, dims), centroids_CD = centroids_KD.shape, _made_even(centroids_KD, first)

    def lower(start: int, stop: int) -> int:
        lowered_rows(x_ND, start, stop, centroids_CD, first, k, labels_N, d2_N, *_tile(dims))
        return stop - start

    return lower


def following(
    x_ND: NDArray[np.float32],
    centroids_KD: NDArray[np.float32],
    moved_K: NDArray[np.float64],
    labels_N: NDArray[np.int64],
    d2_N: NDArray[np.float32],
    next_N: NDArray[np.float32],
    of: int,
) -> Callable[[int, int], int]:
    """A function that assigns rows start to stop to these centroids, which moved by moved_K, and returns how many
    points it compared with all of them.

    d2 and next are as in `moved_rows`. of: the number of points that it will be used for.
    """
    (k, dims), centroids_CD = centroids_KD.shape, _made_even(centroids_KD, 0)
    furthest = int(moved_K.argmax())
    others_K = np.full(k, moved_K[furthest])
    others_K[furthest] = np.delete(moved_K, furthest).max(initial=0)
    # rounded up, because it is subtracted from bounds that may be hardly larger
    given = moved_K.astype(np.float32), (others_K * (1 + 2**-20)).astype(np.float32)

    half_K, still_K = np.zeros((2, k), np.float32)
    if GAPS * k <= of:
        known = np.arange(k), np.full(k, np.inf, np.float32), half_K
        moved_rows(centroids_CD, 0, k, centroids_CD, still_K, still_K, still_K, *known, *_tile(dims))
        half_K *= np.float32(0.5 * (1 - 2**-20))
    states = half_K, labels_N, d2_N, next_N

    def follow(start: int, stop: int) -> int:
        return int(moved_rows(x_ND, start, stop, centroids_CD, *given, *states, *_tile(dims)))

    return follow
