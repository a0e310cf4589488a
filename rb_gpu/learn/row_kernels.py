"""Numba kernels over the rows of a table on the CPU, used to load, move and sum them.

Suffixes: N rows, M of them, K clusters, D dims, C some of them. Every kernel releases the GIL.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from rb_gpu.learn.vectors import SUMS, compiled


@compiled()
def changed_rows(old_N: Any, new_N: Any, rows_N: Any) -> Any:
    """Writes the indices of rows whose labels differ to the front of rows (N,) int64, and returns their number."""
    count = 0
    for i in range(old_N.shape[0]):
        rows_N[count] = i
        count += old_N[i] != new_N[i]
    return count


@compiled()
def move_masses(weight_N: Any, rows_M: Any, old_N: Any, new_N: Any, unit: float, mass_K: Any, counts_K: Any) -> None:
    """Moves the weights of rows (M,), in multiples of 1/unit, from the mass of their old label to that of the new."""
    for m in range(rows_M.shape[0]):
        i = rows_M[m]
        amount = np.int64(np.rint(np.float64(weight_N[i]) * unit))
        mass_K[new_N[i]] += amount
        counts_K[new_N[i]] += weight_N[i] > 0
        if old_N[i] >= 0:
            mass_K[old_N[i]] -= amount
            counts_K[old_N[i]] -= weight_N[i] > 0


@compiled()
def move_rows(
    x_ND: Any, weight_N: Any, rows_M: Any, old_N: Any, new_N: Any, unit: float, left: int, right: int, sums_KD: Any
) -> None:
    """Moves the weighted points of rows (M,) from the sums of their old label to those of the new, in place.

    Touches only columns left to right, so that no two workers write to the same number. sums (K, D) int64 are in
    multiples of 1/unit: integers add up to the same total in every order. An old label below 0 has no sum to leave.
    """
    units = np.empty(right - left, np.int64)
    for m in range(rows_M.shape[0]):
        i = rows_M[m]
        x_C = x_ND[i, left:right]
        weight = np.float64(weight_N[i]) * unit
        # loops over one array each, which the compiler can vectorise
        for t in range(units.shape[0]):
            units[t] = np.int64(np.rint(x_C[t] * weight))
        sums_C = sums_KD[new_N[i], left:right]
        for t in range(units.shape[0]):
            sums_C[t] += units[t]
        if old_N[i] >= 0:
            sums_C = sums_KD[old_N[i], left:right]
            for t in range(units.shape[0]):
                sums_C[t] -= units[t]


@compiled(fastmath=SUMS)
def squares_and_hashes(x_ND: Any, bits_ND: Any, key_D: Any, start: int, stop: int, norm2_N: Any, hash_N: Any) -> None:
    """The float32 squared norm and a hash of each row from start to stop. bits_ND is x viewed as uint32.

    The hash is the multilinear Σ key·bits modulo 2^64 of uint32 words with uint64 keys: two different rows agree in its
    upper half with probability 2^-32 over random keys (Lemire & Kaser 2014).
    """
    for i in range(start, stop):
        total, squares = np.uint64(0), np.float32(0)
        for t in range(x_ND.shape[1]):
            squares += x_ND[i, t] * x_ND[i, t]
            total += np.uint64(bits_ND[i, t]) * key_D[t]
        norm2_N[i] = squares
        hash_N[i] = total


@compiled(fastmath=SUMS)
def row_peaks(x_ND: Any, bits_ND: Any, start: int, stop: int, peak_bits_N: Any, norm_N: Any) -> None:
    """The largest |x| of each row from start to stop, as its bits, and the row's norm.

    bits_ND is x viewed as int32: without the sign bit, the bits of floats are ordered as the floats are, NaN above all.
    """
    for i in range(start, stop):
        peak, squares = np.int32(0), np.float32(0)
        for t in range(x_ND.shape[1]):
            peak = max(peak, bits_ND[i, t] & np.int32(0x7FFFFFFF))
            squares += x_ND[i, t] * x_ND[i, t]
        peak_bits_N[i] = peak
        norm_N[i] = np.sqrt(squares)


@compiled()
def permute_rows(x_ND: Any, order_N: Any, spare_D: Any) -> None:
    """Puts row order[i] of x into row i, in place, by following the cycles; order (N,) int64 ends as the identity."""
    for first in range(order_N.shape[0]):
        if order_N[first] == first:
            continue
        spare_D[:] = x_ND[first]
        to = first
        while order_N[to] != first:
            source = order_N[to]
            x_ND[to] = x_ND[source]
            order_N[to] = to
            to = source
        x_ND[to] = spare_D
        order_N[to] = to
