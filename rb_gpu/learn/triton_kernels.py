"""Triton kernels of the assignment: coarse bounds on the tensor cores, then float64 for points left in doubt.

`triton_assign` prepares the arguments, launches the kernels, and proves the bounds. Suffixes: N points of a tile, K
centroids, D dims; a kernel processes BLOCK_N points, BLOCK_K centroids and BLOCK_D dims together.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _code(y, PRECISION: tl.constexpr):
    """What the product sees of float32 numbers: bf16, tf32 (11 significant bits, kept as float32), or unchanged."""
    if PRECISION == "bf16":
        code = y.to(tl.bfloat16)
    elif PRECISION == "tf32":
        code = ((y.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
    else:
        code = y
    return code


@triton.jit
def _centred(x_ptr, middle_ptr, row, alive, start, D: tl.constexpr, BLOCK: tl.constexpr):
    """Coordinates x − middle (BLOCK_N, BLOCK) float32 of dims from start on; 0 outside."""
    dim = start + tl.arange(0, BLOCK)
    inside = alive[:, None] & (dim < D)[None, :]
    x = tl.load(x_ptr + row[:, None] * D + dim[None, :], mask=inside, other=0.0)
    middle = tl.load(middle_ptr + dim, mask=dim < D, other=0.0)
    return tl.where(inside, x - middle[None, :], 0.0)


@triton.jit
def _reach(
    x_ptr, middle_ptr, row, alive, limits_ptr, pad, D: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(norm, a) of each point: its padded norm, and a with |error of a coarse product| <= a·norm of the centroid."""
    square = tl.zeros([row.shape[0]], tl.float32)
    rest = tl.zeros([row.shape[0]], tl.float32)
    for start in range(0, WIDTH, BLOCK):
        y = _centred(x_ptr, middle_ptr, row, alive, start, D, BLOCK)
        error = y - _code(y, PRECISION).to(tl.float32)
        square += tl.sum(y * y, axis=1)
        rest += tl.sum(error * error, axis=1)
    norm = tl.sqrt(square) + pad
    return norm, tl.sqrt(rest) * tl.load(limits_ptr + 1) + tl.load(limits_ptr) * norm


@triton.jit
def _lower_bounds(
    x_ptr, middle_ptr, held, code_ptr, low_ptr, norm_ptr, row, alive, a,
    first, D: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr, HELD: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Lower bounds (BLOCK_N, BLOCK_K) of the scores of centroids from `first` on."""
    column = first + tl.arange(0, BLOCK_K)
    code_ptrs = code_ptr + column.to(tl.int64)[None, :] * WIDTH
    if HELD:
        code = tl.load(code_ptrs + tl.arange(0, BLOCK_D)[:, None])
        product = tl.dot(held.to(code.dtype), code, input_precision="ieee" if PRECISION == "ieee" else "tf32")
    else:
        product = tl.zeros([row.shape[0], BLOCK_K], tl.float32)
        for start in range(0, WIDTH, BLOCK_D):
            y = _code(_centred(x_ptr, middle_ptr, row, alive, start, D, BLOCK_D), PRECISION)
            code = tl.load(code_ptrs + (start + tl.arange(0, BLOCK_D))[:, None])
            product = tl.dot(y.to(code.dtype), code, product, input_precision="ieee" if PRECISION == "ieee" else "tf32")
    return tl.load(low_ptr + column)[None, :] - product - a[:, None] * tl.load(norm_ptr + column)[None, :]


@triton.jit
def _squared_distance(
    x_ptr, centroid_ptr, row, label, alive, D: tl.constexpr, BLOCK: tl.constexpr,
    KIND: tl.constexpr,
):  # fmt: skip
    """||x − c||² of each point and the centroid of its label, from differences in dtype KIND.

    The order of summation does not depend on the block shape or the number of threads: column by column over the dims,
    then a tree over BLOCK columns.
    """
    total = tl.zeros([row.shape[0], BLOCK], KIND)
    for start in range(0, D, BLOCK):
        dim = start + tl.arange(0, BLOCK)
        inside = alive[:, None] & (dim < D)[None, :]
        x = tl.load(x_ptr + row[:, None] * D + dim[None, :], mask=inside, other=0.0).to(KIND)
        c = tl.load(centroid_ptr + label.to(tl.int64)[:, None] * D + dim[None, :], mask=inside, other=0.0).to(KIND)
        total += (x - c) * (x - c)
    return _tree(total, BLOCK)


@triton.jit
def _tree(total, WIDTH: tl.constexpr):
    """The sum over the second axis (1 to 32 columns), by repeated halving."""
    # unrolled, because Triton 3.4 has no recursive functions
    for level in tl.static_range(5):
        if WIDTH >> level > 1:
            left, right = tl.split(tl.reshape(total, [total.shape[0], WIDTH >> (level + 1), 2]))
            total = left + right
    return tl.reshape(total, [total.shape[0]])


# counts vary between calls: specialising on 1 or multiples of 16 would compile a kernel for each, which takes long
@triton.jit(do_not_specialize=["n", "k", "n_class", "k_class", "first_label"])
def nearest_kernel(
    x_ptr, middle_ptr, centroid_ptr, code_ptr, low_ptr, slack_ptr, norm_ptr,
    limits_ptr, labels_ptr, d2_ptr, rows_ptr, limit_ptr, count_ptr, n, k,
    n_class, k_class, first_label, pad, distance_slack, tiny, D: tl.constexpr, WIDTH: tl.constexpr,
    SUM_BLOCK: tl.constexpr, PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Lowers labels and d2 where the bounds decide; elsewhere lists the row and its limit for `settle_kernel`.

    n_class and k_class are the keys by which block shapes are tuned, see `triton_assign`.
    """
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    alive = row < n
    norm, a = _reach(x_ptr, middle_ptr, row, alive, limits_ptr, pad, D, WIDTH, BLOCK_D, PRECISION)
    HELD: tl.constexpr = BLOCK_D == WIDTH
    held = _code(_centred(x_ptr, middle_ptr, row, alive, 0, D, BLOCK_D), PRECISION) if HELD else 0
    least = tl.full([BLOCK_N], float("inf"), tl.float32)
    second = tl.full([BLOCK_N], float("inf"), tl.float32)
    nearest = tl.zeros([BLOCK_N], tl.int32)
    for start in range(0, k, BLOCK_K):
        low = _lower_bounds(
            x_ptr, middle_ptr, held, code_ptr, low_ptr, norm_ptr, row, alive, a, start, D, WIDTH, PRECISION, HELD,
            BLOCK_K, BLOCK_D,
        )  # fmt: skip
        here, at = tl.min(low, axis=1, return_indices=True)
        other = tl.min(tl.where(tl.arange(0, BLOCK_K)[None, :] == at[:, None], float("inf"), low), axis=1)
        second = tl.minimum(tl.maximum(least, here), tl.minimum(second, other))
        nearest = tl.where(here < least, start + at, nearest)
        least = tl.minimum(least, here)
    # twice the error, with room for its own rounding
    doubled = 2.0 * (a * tl.load(norm_ptr + nearest) + tl.load(slack_ptr + nearest))
    upper = least + doubled * 1.001 + tl.abs(least) * 2.0**-21
    # comparisons are written to be true only where the result is certain, so that NaN decides nothing
    tame = norm * tl.load(limits_ptr + 2) < 1e37
    sure = tame & (upper < second)
    label = tl.load(labels_ptr + row, mask=alive, other=-1)
    d2 = tl.load(d2_ptr + row, mask=alive, other=0.0)
    square = (norm - pad) * (norm - pad) * (1.0 - distance_slack)
    kept = tame & (
        2.0 * least * (1.0 + 2.0**-21 * tl.where(least < 0, 1.0, -1.0)) + square > d2 * (1.0 + distance_slack)
    )
    new_d2 = _squared_distance(x_ptr, centroid_ptr, row, nearest + first_label, alive, D, SUM_BLOCK, tl.float32)
    fresh = label < 0
    apart = tl.abs(new_d2 - d2) > distance_slack * (new_d2 + d2) + tiny
    settled = kept | (sure & (fresh | apart))
    lowered = alive & settled & (kept == 0) & (fresh | (new_d2 < d2))
    tl.store(labels_ptr + row, (nearest + first_label).to(tl.int64), mask=lowered)
    tl.store(d2_ptr + row, new_d2, mask=lowered)
    doubt = (alive & (settled == 0)).to(tl.int32)
    at = tl.atomic_add(count_ptr, tl.sum(doubt)) + tl.cumsum(doubt) - 1
    tl.store(rows_ptr + at, row.to(tl.int32), mask=doubt > 0)
    tl.store(limit_ptr + at, tl.where(tame, upper, float("nan")), mask=doubt > 0)


@triton.jit(do_not_specialize=["k", "first_label"])
def settle_kernel(
    x_ptr, middle_ptr, centroid_ptr, code_ptr, low_ptr, norm_ptr, limits_ptr,
    labels_ptr, d2_ptr, rows_ptr, limit_ptr, count_ptr, k, first_label, pad,
    D: tl.constexpr, WIDTH: tl.constexpr, SUM_BLOCK: tl.constexpr, PRECISION: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Decides the listed rows: the nearest in float64 of the centroids that the limit does not exclude.

    The grid is fixed, so that the host need not know the number of rows: each program strides through the list.
    """
    count = tl.load(count_ptr)
    HELD: tl.constexpr = BLOCK_D == WIDTH
    for tile in range(tl.program_id(0), tl.cdiv(count, BLOCK_N), tl.num_programs(0)):
        place = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        alive = place < count
        row = tl.load(rows_ptr + place, mask=alive, other=0).to(tl.int64)
        limit = tl.load(limit_ptr + place, mask=alive, other=-float("inf"))
        _norm, a = _reach(x_ptr, middle_ptr, row, alive, limits_ptr, pad, D, WIDTH, BLOCK_D, PRECISION)
        held = _code(_centred(x_ptr, middle_ptr, row, alive, 0, D, BLOCK_D), PRECISION) if HELD else 0
        label = tl.load(labels_ptr + row, mask=alive, other=-1)
        known = alive & (label >= 0)
        own = _squared_distance(x_ptr, centroid_ptr, row, label, known, D, SUM_BLOCK, tl.float64)
        best = tl.where(known, own, float("inf"))
        for start in range(0, k, BLOCK_K):
            low = _lower_bounds(
                x_ptr, middle_ptr, held, code_ptr, low_ptr, norm_ptr, row, alive, a, start, D, WIDTH, PRECISION, HELD,
                BLOCK_K, BLOCK_D,
            )  # fmt: skip
            column = start + tl.arange(0, BLOCK_K)
            # written so that a NaN bound or limit excludes nothing
            wanted = tl.where(low > limit[:, None], 0, 1) * (column < k)[None, :] * alive[:, None]
            # in ascending order, so that the lowest of equally near labels wins
            candidate = tl.min(tl.where(wanted > 0, column[None, :], k), axis=1)
            while tl.min(candidate, axis=0) < k:
                there = candidate < k
                d2 = _squared_distance(
                    x_ptr, centroid_ptr, row, candidate + first_label, there, D, SUM_BLOCK, tl.float64
                )
                closer = there & ((d2 < best) | (label < 0))
                label = tl.where(closer, (candidate + first_label).to(tl.int64), label)
                best = tl.where(closer, d2, best)
                later = (wanted > 0) & (column[None, :] > candidate[:, None])
                candidate = tl.min(tl.where(later, column[None, :], k), axis=1)
        d2 = _squared_distance(x_ptr, centroid_ptr, row, label, alive, D, SUM_BLOCK, tl.float32)
        tl.store(labels_ptr + row, label, mask=alive)
        tl.store(d2_ptr + row, d2, mask=alive)


@triton.jit
def piece_kernel(
    x_ptr, weight_ptr, order_ptr, start_ptr, stop_ptr, sum_ptr, D: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Σ round(x·weight) int64 over the rows order[start:stop] of one piece."""
    piece = tl.program_id(0).to(tl.int64)
    dim = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    start = tl.load(start_ptr + piece)
    stop = tl.load(stop_ptr + piece)
    total = tl.zeros([BLOCK_N, BLOCK_D], tl.int64)
    for at in range(start, stop, BLOCK_N):
        place = at + tl.arange(0, BLOCK_N)
        alive = place < stop
        row = tl.load(order_ptr + place, mask=alive, other=0)
        x = tl.load(x_ptr + row[:, None] * D + dim[None, :], mask=alive[:, None] & (dim < D)[None, :], other=0.0)
        units = x.to(tl.float64) * tl.load(weight_ptr + row, mask=alive, other=0.0)[:, None]
        # round half to even; from 2^52 on every float64 is an integer
        size = tl.abs(units)
        size = tl.where(size < 4503599627370496.0, (size + 4503599627370496.0) - 4503599627370496.0, size)
        total += tl.where(units < 0, -size, size).to(tl.int64)
    tl.store(sum_ptr + piece * D + dim, tl.sum(total, axis=0), mask=dim < D)
