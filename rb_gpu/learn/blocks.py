"""Copies and hashes embeddings while they are loaded, in blocks of megabytes on every core. N rows, D dims."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt

from rb_gpu.learn.row_kernels import squares_and_hashes

Matrix = npt.NDArray[np.float32]
Copy = Callable[[Matrix, npt.NDArray[np.floating[Any]]], None]

# small enough that much of a block is still cached when its norms are taken; smaller ones would wait for each other
BLOCK_BYTES = 1 << 24
# more threads copy no faster: memory bandwidth is saturated
MAX_THREADS = 8


def block_threads() -> ThreadPoolExecutor:
    """A thread pool for blocks, created once for many batches: starting a thread costs as much as copying a block."""
    return ThreadPoolExecutor(min(os.cpu_count() or 1, MAX_THREADS), thread_name_prefix="block")


def start_blocks(pool: Executor, work: Callable[[int, int], object], rows: int, row_bytes: int) -> list[Future[object]]:
    """Starts work(start, stop) on consecutive blocks of about BLOCK_BYTES."""
    step = max(1, BLOCK_BYTES // row_bytes)
    return [pool.submit(work, start, min(start + step, rows)) for start in range(0, rows, step)]


class Copying:
    """A copy of rows in progress on a pool's threads, which also compute each row's squared norm and hash."""

    def __init__(self, from_ND: npt.NDArray[np.floating[Any]], to_ND: Matrix, copy: Copy, pool: Executor) -> None:
        self._norm2_N, self._hash_N = np.empty(len(to_ND)), np.empty(len(to_ND), np.uint64)
        bits_ND, key_D = to_ND.view(np.uint32), _hash_key(to_ND.shape[1])

        def block(start: int, stop: int) -> None:
            copy(to_ND[start:stop], from_ND[start:stop])
            squares_and_hashes(to_ND, bits_ND, key_D, start, stop, self._norm2_N, self._hash_N)
            # float32 squares are several times faster; rows where they over- or underflow are redone in float64
            unsure = start + np.flatnonzero(~((self._norm2_N[start:stop] > 0) & (self._norm2_N[start:stop] < np.inf)))
            if len(unsure):
                some_ND = to_ND[unsure]
                self._norm2_N[unsure] = np.einsum("nd,nd->n", some_ND, some_ND, dtype=np.float64)

        self._blocks = start_blocks(pool, block, len(to_ND), to_ND.strides[0])

    def norms_and_hashes(self) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.uint64]]:
        """Waits for the copy; returns the squared norms (N,), not finite if a value is not and 0 only if all values
        are, and the hashes (N,) as in `row_hashes`. Re-raises what copying raised.
        """
        for block in self._blocks:
            block.result()
        return self._norm2_N, self._hash_N


def _hash_key(dim: int) -> npt.NDArray[np.uint64]:
    # NumPy guarantees the raw output of its bit generators to be stable across versions
    return np.random.PCG64(0).random_raw(dim)


def row_hashes(x_ND: Matrix, pool: Executor) -> npt.NDArray[np.uint64]:
    """A hash of each row's bits (N,), at memory speed; two different rows collide once in billions of times."""
    x_ND, key_D = np.ascontiguousarray(x_ND), _hash_key(x_ND.shape[1])
    norm2_N, hash_N = np.empty(len(x_ND)), np.empty(len(x_ND), np.uint64)

    def block(start: int, stop: int) -> None:
        squares_and_hashes(x_ND, x_ND.view(np.uint32), key_D, start, stop, norm2_N, hash_N)

    for started in start_blocks(pool, block, len(x_ND), x_ND.strides[0]):
        started.result()
    return hash_N
