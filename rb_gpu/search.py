"""Nearest leaf patterns by cosine: exact in NumPy, or the artifact's Faiss index, behind one protocol.

Suffixes: P leaves, D dims, B queries, K neighbours.
"""

from __future__ import annotations

import logging
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from rb_gpu.errors import ArtifactError

log = logging.getLogger(__name__)

Matrix = npt.NDArray[np.float32]
Rows = npt.NDArray[np.int64]

# up to here one product over all leaves beats a graph or an inverted file on one core
EXACT_LEAVES = 4096


class Search(Protocol):
    """Finds the leaves nearest to queries of norm 1."""

    name: str

    def nearest(self, unit_BD: Matrix, k: int) -> tuple[Rows, Matrix]:
        """Rows (B, K) and cosines (B, K), best first; K = min(k, P); row -1 with cosine -1 where nothing was found."""
        ...


class ExactSearch:
    """Every leaf, by one matrix product."""

    name = "exact"

    def __init__(self, unit_PD: Matrix) -> None:
        self._unit_DP = np.ascontiguousarray(unit_PD.T)

    def nearest(self, unit_BD: Matrix, k: int) -> tuple[Rows, Matrix]:
        """See Search.nearest; equal cosines come in the order of rows."""
        cosine = unit_BD @ self._unit_DP
        k = min(k, cosine.shape[1])
        rows = np.argpartition(-cosine, k - 1, axis=1)[:, :k] if k < cosine.shape[1] else _all_rows(cosine)
        least = np.take_along_axis(cosine, rows, axis=1).min(axis=1, keepdims=True)
        # a partition takes any of the leaves that are equally near as the last one
        tied = np.flatnonzero((cosine >= least).sum(axis=1) > k)
        rows[tied] = np.argsort(-cosine[tied], axis=1, kind="stable")[:, :k]
        rows.sort(axis=1)
        found = np.take_along_axis(cosine, rows, axis=1)
        order = np.argsort(-found, axis=1, kind="stable")
        return np.take_along_axis(rows, order, 1), np.take_along_axis(found, order, 1)


def _all_rows(cosine: Matrix) -> Rows:
    return np.tile(np.arange(cosine.shape[1]), (len(cosine), 1))


class FaissSearch:
    """A Faiss index over the unit leaves (inner product), as the job built it: flat, IVF or HNSW."""

    def __init__(self, index: Any, kind: str, leaves: int, dim: int) -> None:
        # 0 is Faiss's METRIC_INNER_PRODUCT
        if index.metric_type != 0 or not index.is_trained:
            raise ArtifactError("index.faiss is not trained, or not for inner products; train again")
        if index.ntotal != leaves or index.d != dim:
            raise ArtifactError(
                f"index.faiss holds {index.ntotal} patterns of {index.d} dims, the bank {leaves} of {dim}; train again"
            )
        self._index, self.name, self._leaves = index, kind, leaves

    def nearest(self, unit_BD: Matrix, k: int) -> tuple[Rows, Matrix]:
        """See Search.nearest."""
        cosine, rows = self._index.search(unit_BD, min(k, self._leaves))
        found = (rows >= 0) & (rows < self._leaves)  # an inverted file may hold any id
        return np.where(found, rows, -1), np.where(found, cosine, np.float32(-1))


def open_search(unit_PD: Matrix, index: bytes | None, kind: str, wanted: str) -> Search:
    """exact, index, or auto: exact up to EXACT_LEAVES leaves, beyond that the index where there is one and Faiss is.

    Raises ArtifactError where `index` is wanted and cannot be had, ValueError on another word.
    """
    if wanted not in ("auto", "exact", "index"):
        raise ValueError(f"search={wanted!r} is not one of auto, exact, index; choose one of them")
    if wanted == "exact" or (wanted == "auto" and (len(unit_PD) <= EXACT_LEAVES or index is None)):
        return ExactSearch(unit_PD)
    if index is None:
        raise ArtifactError("search=index, but the artifact has no index.faiss; train with index.kind=hnsw or use auto")
    try:
        import faiss
    except ImportError:
        if wanted == "auto":
            log.warning("%d patterns are searched exactly without Faiss: pip install 'rb_gpu[index]'", len(unit_PD))
            return ExactSearch(unit_PD)
        raise ArtifactError("search=index needs Faiss; pip install 'rb_gpu[index]' or use search=exact") from None
    try:
        read = faiss.deserialize_index(np.frombuffer(index, dtype=np.uint8))
    except (RuntimeError, MemoryError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ArtifactError(f"index.faiss cannot be read ({reason}); train again") from error
    return FaissSearch(read, kind, *unit_PD.shape)
