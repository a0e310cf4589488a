"""Reads and validates a corpus of vectors and queries to search it with. Suffixes: M corpus rows, Q queries, D dims."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from rb_gpu.errors import DataError
from rb_gpu.learn.quarantine import BadRows
from rb_gpu.learn.tables import Reading, read_table

log = logging.getLogger(__name__)

CHUNK_ROWS = 16_384
# norms of float16 rows of norm 1 differ by a thousandth
EVEN_NORMS = 0.01

Matrix = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Queries:
    """x_QD: float32 embeddings as given; unit_QD: of norm 1. query_id: (Q,) uint64. timestamp: (Q,) int64, UTC seconds.

    query_id is distinct; every row of x_QD is finite and not 0.
    """

    x_QD: Matrix
    unit_QD: Matrix
    query_id: npt.NDArray[np.uint64]
    timestamp: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.query_id)


def open_vectors(path: str, key: str) -> npt.NDArray[np.floating]:
    """The (M, D) matrix of a .npy file, memory-mapped. Raises DataError where it is missing, damaged or no matrix."""
    if not Path(path).is_file():
        raise DataError(f"{key}={path} does not exist; give a .npy file of shape (rows, dims)")
    try:
        vectors = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise DataError(f"{key}={path} is not a readable .npy file ({error}); write it with numpy.save") from error
    if not isinstance(vectors, np.ndarray) or vectors.dtype.kind != "f":
        kind = vectors.dtype if isinstance(vectors, np.ndarray) else "an archive of arrays"
        raise DataError(f"{key}={path} holds {kind}; store one array of float16 or float32")
    if vectors.ndim != 2:
        raise DataError(f"{key}={path} has shape {vectors.shape}, not (rows, dims); store one vector a row")
    if vectors.size == 0:
        raise DataError(f"{key}={path} has shape {vectors.shape} and no vector; check its export")
    return vectors


def warn_of_norms(vectors_MD: npt.NDArray[np.floating], name: str) -> None:
    """Warns if the norms of the first rows differ, because a service that searches them by inner product or L2 finds
    other neighbours than a search by cosine. name: `key=path` for messages.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        norm_N = np.linalg.norm(vectors_MD[:CHUNK_ROWS].astype(np.float32), axis=1)
    low, high = float(norm_N.min()), float(norm_N.max())
    if high > (1.0 + EVEN_NORMS) * low:
        log.warning(
            "%s: norms range from %.3g to %.3g, and the search is by cosine; if your service's index is by inner "
            "product or L2, its neighbours and recall differ: log its own searches instead", name, low, high,
        )  # fmt: skip


def unit_rows(rows_ND: npt.NDArray[np.floating], name: str, number_N: npt.NDArray[np.int64]) -> Matrix:
    """The rows as float32, normalised. Raises DataError naming the first row that is not finite or has norm 0.

    name: `key=path` for messages. number_N: the rows' numbers in the file.
    """
    with np.errstate(over="ignore"):  # a double beyond float32 becomes infinite and is refused below
        x_ND: Matrix = rows_ND.astype(np.float32)
    norm_N = np.sqrt(np.einsum("nd,nd->n", x_ND, x_ND, dtype=np.float64))
    for wrong_N, what in ((~np.isfinite(norm_N), "is not finite"), (norm_N == 0, "has norm 0")):
        if wrong_N.any():
            row = int(number_N[np.argmax(wrong_N)])
            raise DataError(f"{name}: row {row} {what}; drop such rows ({int(wrong_N.sum())} among {len(wrong_N)})")
    x_ND /= norm_N[:, None].astype(np.float32)
    return x_ND


def unit_chunks(vectors_MD: npt.NDArray[np.floating], name: str) -> Iterator[Matrix]:
    """The normalised rows in order, CHUNK_ROWS at a time, so that a memory-mapped corpus is never copied whole."""
    for start in range(0, len(vectors_MD), CHUNK_ROWS):
        chunk_ND = vectors_MD[start : start + CHUNK_ROWS]
        yield unit_rows(chunk_ND, name, np.arange(start, start + len(chunk_ND)))


def read_queries(path: str, dim: int, max_queries: int | None, rng: np.random.Generator) -> Queries:
    """Queries from a .npy (Q, D), or from Parquet with query_embedding and, optionally, query_id and timestamp.

    Without these, query_id is the row number and timestamp is now. max_queries: the size of a random subset, kept in
    file order. Raises DataError for: a missing file or column, a dimension other than `dim`, a bad row, a repeated
    query_id.
    """
    if Path(path).suffix == ".npy":
        columns: dict[str, npt.NDArray[Any]] = {"query_embedding": open_vectors(path, "queries")}
    else:
        bad = BadRows()
        columns = read_table(path, ("query_embedding",), ("query_id", "timestamp"), bad, Reading(key="queries")).columns
        if len(bad):
            file, row, _, reason = next(iter(bad))
            raise DataError(f"queries={file}: row {row}: {reason}; drop such rows ({len(bad)} in all)")
    x_QD = columns["query_embedding"]
    if x_QD.shape[1] != dim:
        raise DataError(f"queries={path} has {x_QD.shape[1]} dimensions and base has {dim}; embed both with one model")
    n = len(x_QD)
    query_id = columns.get("query_id", np.arange(n, dtype=np.uint64))
    timestamp = columns.get("timestamp", np.full(n, int(time.time())))
    if len(np.unique(query_id)) < n:
        raise DataError(f"queries={path} repeats a query_id; give every query its own")
    rows = np.arange(n)
    if max_queries is not None and max_queries < n:
        rows = np.sort(rng.choice(n, max_queries, replace=False))
    unit_QD = unit_rows(x_QD[rows], f"queries={path}", rows)
    given_QD = x_QD[rows].astype(np.float32)
    return Queries(given_QD, unit_QD, query_id[rows].astype(np.uint64), timestamp[rows].astype(np.int64))
