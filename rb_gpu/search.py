"""Nearest leaf patterns by cosine: exact in NumPy, or by the artifact's Faiss index, behind one protocol.

Suffixes: P leaves, D dims, B queries, K neighbours.
"""

from __future__ import annotations

import os
import sys
import threading
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from rb_gpu.errors import ArtifactError
from rb_gpu.index_file import check_index
from rb_gpu.tensor_file import CACHE_LINE

Matrix = npt.NDArray[np.float32]
Vector = npt.NDArray[np.float32]
Rows = npt.NDArray[np.int64]

# Up to this many floats, leaves x (dims + RANKING_DIMS), a product with all leaves beats a graph on one core; ranking a
# leaf costs as much as RANKING_DIMS more dims. The graph catches up at 2,000 leaves of 128 dims and at 1,050 of 384;
# with more dims, once the leaves exceed these 2 MiB, which not every core's own cache holds. Measured by `python -m
# jobs.benchmark suite=lookup`
EXACT_CELLS, RANKING_DIMS = 2**19, 128
# up to this many leaves, a product with this many queries or more beats a graph that searches for them one by one
EXACT_BATCH_LEAVES, EXACT_BATCH_QUERIES = 4096, 64
# up to this many neighbours, one pass for each is faster than a partition
FEW = 16
# least number of the index's candidates that are compared exactly, as its own distances are between compressed vectors
CANDIDATES = 16
# cosines of a batch held at once: enough for the product's full speed, and little of a service's memory
TILE_CELLS = 2**22
# cosines ranked at once: few enough to stay in a core's cache from one neighbour to the next
RANKED_CELLS = 2**18
# queries of a batch for which the vectors of the candidates are held at once
GATHERED_ROWS = 256


class Search(Protocol):
    """Finds the leaves nearest to queries of any norm: those with the largest inner products, as leaves have norm 1."""

    name: str

    def nearest_one(self, x_D: Vector, k: int) -> tuple[list[int], list[float]]:
        """Rows and products of the min(k, P) nearest leaves of one query, best first; fewer if an index finds fewer.

        Ties are in the order of rows.
        """
        ...

    def nearest(self, x_BD: Matrix, k: int) -> tuple[Rows, Matrix]:
        """The same for a batch: rows and products (B, K) with K = min(k, P); row -1 where nothing was found."""
        ...


def in_lines(values: npt.NDArray[np.floating]) -> Matrix:
    """A float32 copy that begins at a cache line, with which a product with one query is a fifth faster."""
    room = np.empty(values.size + CACHE_LINE // 4, np.float32)
    start = -room.__array_interface__["data"][0] % CACHE_LINE // 4
    placed: Matrix = room[start : start + values.size].reshape(values.shape)
    placed[...] = values
    return placed


def largest(values: Vector, k: int) -> tuple[list[int], list[float]]:
    """Positions and values of the k largest, in descending order; ties in order of position. May overwrite `values`."""
    if k > FEW:
        rows = _stable_top(values[None], k)[0]
        return rows.tolist(), values[rows].tolist()
    found, top, out = [], [], -np.inf
    for _ in range(k):
        row = int(values.argmax())
        found.append(row)
        top.append(values.item(row))
        values[row] = out
    return found, top


def largest_in_rows(values_BP: Matrix, k: int) -> tuple[Rows, Matrix]:
    """The same for every row of a contiguous array: positions and values (B, k). May overwrite the array."""
    if k > FEW:
        rows = _stable_top(values_BP, k)
        return rows, np.take_along_axis(values_BP, rows, 1)
    rows_KB = np.empty((k, len(values_BP)), np.int64)
    found_KB = np.empty((k, len(values_BP)), np.float32)
    step = max(64, RANKED_CELLS // values_BP.shape[1])
    for start in range(0, len(values_BP), step):
        few_BP = values_BP[start : start + step]
        # flat indexing takes half the time of (row, column) indexing
        flat, row_start_B = few_BP.reshape(-1), np.arange(0, few_BP.size, few_BP.shape[1])
        for j in range(k):
            row_B = few_BP.argmax(1)
            best_B = row_start_B + row_B
            rows_KB[j, start : start + step], found_KB[j, start : start + step] = row_B, flat[best_B]
            flat[best_B] = -np.inf
    return rows_KB.T, found_KB.T


def _stable_top(values_BP: Matrix, k: int) -> Rows:
    count = values_BP.shape[1]
    if k == count:
        return np.argsort(-values_BP, axis=1, kind="stable")
    rows = np.argpartition(-values_BP, k - 1, axis=1)[:, :k]
    least = np.take_along_axis(values_BP, rows, axis=1).min(axis=1, keepdims=True)
    # among leaves tied for last place, a partition keeps arbitrary ones; those rows are sorted in full
    tied = np.flatnonzero((values_BP >= least).sum(axis=1) > k)
    rows[tied] = np.argsort(-values_BP[tied], axis=1, kind="stable")[:, :k]
    rows.sort(axis=1)
    order = np.argsort(-np.take_along_axis(values_BP, rows, axis=1), axis=1, kind="stable")
    return np.take_along_axis(rows, order, 1)


class ExactSearch:
    """Compares a query with every leaf, by one matrix product."""

    name = "exact"

    def __init__(self, unit_PD: Matrix) -> None:
        self._unit_PD, self._unit_DP = unit_PD, unit_PD.T

    def nearest_one(self, x_D: Vector, k: int) -> tuple[list[int], list[float]]:
        """See Search.nearest_one."""
        return largest(self._unit_PD.dot(x_D), min(k, len(self._unit_PD)))

    def nearest(self, x_BD: Matrix, k: int) -> tuple[Rows, Matrix]:
        """See Search.nearest."""
        k = min(k, len(self._unit_PD))
        # each column contiguous, because columns are read one by one
        rows_BK, cosine_BK = np.empty((k, len(x_BD)), np.int64).T, np.empty((k, len(x_BD)), np.float32).T
        step = max(64, TILE_CELLS // len(self._unit_PD))
        held_BP = np.empty((min(step, len(x_BD)), len(self._unit_PD)), np.float32)
        for start in range(0, len(x_BD), step):
            tile = slice(start, start + step)
            values_BP = np.matmul(x_BD[tile], self._unit_DP, out=held_BP[: len(x_BD) - start])
            rows_BK[tile], cosine_BK[tile] = largest_in_rows(values_BP, k)
        return rows_BK, cosine_BK


class _Buffers(threading.local):
    """Per thread: the arrays that Faiss reads and writes, and their addresses in the form that its C call takes."""

    def __init__(self) -> None:
        self.query = self.distances = np.empty(0, np.float32)
        self.rows = np.empty(0, np.int64)
        self.addresses: tuple[Any, ...] = ()


class _Batches(threading.local):
    # per thread: whether Faiss has searched a batch, since when OpenMP keeps worker threads for it
    searched = False


_batches = _Batches()


def _after_fork_in_child() -> None:
    if _batches.searched:
        # the worker threads exist only in the parent; GNU's OpenMP would wait for them for ever at the next batch
        sys.modules["faiss"].omp_set_num_threads(1)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)


class FaissSearch:
    """Takes candidates from the artifact's Faiss index and ranks them by their exact products."""

    def __init__(self, index: Any, kind: str, unit_PD: Matrix, pointer: Any) -> None:
        self._index, self.name, self._unit_PD, self._pointer = index, kind, unit_PD, pointer
        self._buffers = _Buffers()

    def nearest_one(self, x_D: Vector, k: int) -> tuple[list[int], list[float]]:
        """See Search.nearest_one."""
        buffers, wanted = self._buffers, self._candidates(k)
        if len(buffers.rows) != wanted:
            self._allocate(buffers, wanted)
        buffers.query[:] = x_D
        # calls the C function, as the checks and allocations of Faiss's Python call take longer than searching a small
        # graph
        self._index.search_c(1, *buffers.addresses)
        rows = buffers.rows
        rows.sort()  # so that ties are in the order of rows
        if rows.item(0) < 0:  # an inverted file may find fewer; check_index has checked that no id exceeds the leaves
            rows = rows[rows >= 0]
        product = self._unit_PD.take(rows, 0).dot(x_D)
        order = (-product).argsort(kind="stable")[:k]
        return rows[order].tolist(), product[order].tolist()

    def nearest(self, x_BD: Matrix, k: int) -> tuple[Rows, Matrix]:
        """See Search.nearest."""
        k = min(k, len(self._unit_PD))
        _batches.searched = True
        _, rows = self._index.search(x_BD, self._candidates(k))
        rows = np.sort(rows, axis=1)
        cosine = np.empty(rows.shape, np.float32)
        for start in range(0, len(rows), GATHERED_ROWS):
            tile = slice(start, start + GATHERED_ROWS)
            np.einsum("bd,bkd->bk", x_BD[tile], self._unit_PD[rows[tile]], out=cosine[tile])
        cosine[rows < 0] = -np.inf
        best, found = largest_in_rows(cosine, k)
        empty = found == -np.inf
        found[empty] = -1.0
        return np.where(empty, -1, np.take_along_axis(rows, best, 1)), found

    def _candidates(self, k: int) -> int:
        return min(len(self._unit_PD), max(CANDIDATES, 2 * k))

    def _allocate(self, buffers: _Buffers, wanted: int) -> None:
        buffers.query = np.empty(self._unit_PD.shape[1], np.float32)
        buffers.distances, buffers.rows = np.empty(wanted, np.float32), np.empty(wanted, np.int64)
        address = self._pointer
        buffers.addresses = address(buffers.query), wanted, address(buffers.distances), address(buffers.rows)


def product_is_faster(leaves: int, dim: int) -> bool:
    """Whether a product with all leaves answers a query sooner than an index does."""
    return leaves * (dim + RANKING_DIMS) <= EXACT_CELLS


def open_search(unit_PD: Matrix, index: Any, kind: str, wanted: str) -> Search:
    """The search for `wanted`: exact, index, or auto, which is exact where that is faster, or if there is no index or
    no Faiss.

    index: the content of index.faiss, or None. Raises ArtifactError if the index cannot be read, or if wanted is
    "index" and the artifact has no index or Faiss is not installed; ValueError for any other value of `wanted`.
    """
    if wanted not in ("auto", "exact", "index"):
        raise ValueError(f"search={wanted!r} is not one of auto, exact, index; choose one of them")
    if wanted == "exact" or (wanted == "auto" and (index is None or product_is_faster(*unit_PD.shape))):
        return ExactSearch(unit_PD)
    if index is None:
        raise ArtifactError("search=index, but the artifact has no index.faiss; train with index.kind=hnsw or use auto")
    try:
        import faiss
    except ImportError:
        if wanted == "auto":
            import logging

            message = "%d patterns are searched exactly without Faiss: pip install 'rb_gpu[index]'"
            logging.getLogger(__name__).warning(message, len(unit_PD))
            return ExactSearch(unit_PD)
        raise ArtifactError("search=index needs Faiss; pip install 'rb_gpu[index]' or use search=exact") from None
    return FaissSearch(read_index(faiss, index, *unit_PD.shape), kind, unit_PD, faiss.swig_ptr)


def read_index(faiss: Any, content: Any, leaves: int, dim: int) -> Any:
    """The Faiss index in the content of an index.faiss. Raises ArtifactError unless it is an index as a job builds it
    for a bank of this size, and refers to nothing outside its own content.
    """
    try:
        check_index(content, leaves, dim)
        return faiss.deserialize_index(np.frombuffer(content, dtype=np.uint8))
    except (RuntimeError, MemoryError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ArtifactError(f"index.faiss cannot be read ({reason}); train again") from error
