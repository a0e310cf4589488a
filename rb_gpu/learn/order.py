"""Puts a table's queries and rows into a canonical order that does not depend on the order or the files they came in.

Suffixes: N rows, Q queries.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from rb_gpu.learn.room import Room
from rb_gpu.learn.tables import Columns


def put_in_order(columns: Columns, room: Room, told: Sequence[str]) -> None:
    """Sorts in place: queries by their newest timestamp and then query_id, so that those of any time span are
    consecutive; rows by their query and then id, so that sums over rows are the same to the bit. told: further columns
    of queries (Q,), used if present, besides x_QD, hash_Q, query_id and query_time.

    If all queries have one time, none is the newest. They are then shuffled, because the last ones are held out and row
    numbers of a file may go by kind of query. Those of sessions are not, as they came in the order of their ids.
    """
    of_queries = [name for name in ("hash_Q", "query_id", "query_time", *told) if name in columns]
    tie_Q, queries = columns["query_id"], len(columns["query_id"])
    if queries > 1 and "session" not in columns and (columns["query_time"] == columns["query_time"][0]).all():
        # NumPy guarantees the raw output of its bit generators to be stable across versions
        tie_Q = np.random.PCG64(0).random_raw(queries)[np.argsort(np.argsort(tie_Q))]
    if not _ascend(columns["query_time"], tie_Q):
        order = np.lexsort((tie_Q, columns["query_time"]))
        room.sort(columns["x_QD"], order)
        columns["query_row"] = np.argsort(order)[columns["query_row"]]
        for name in of_queries:
            columns[name] = columns[name][order]
    if not _ascend(columns["query_row"], columns["id"]):
        order = np.lexsort((columns["id"], columns["query_row"]))
        for name in columns.keys() - {"x_QD", *of_queries}:
            columns[name] = columns[name][order]


def first_rows(
    query_N: npt.NDArray[np.uint64], id_N: npt.NDArray[np.uint64]
) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """The distinct queries (Q,), the row of the least id of each (Q,), and each row's index among the queries (N,).

    The least id rather than the first row, because it does not depend on the order of the rows. Ids are distinct.
    """
    if (id_N[1:] > id_N[:-1]).all():
        return np.unique(query_N, return_index=True, return_inverse=True)
    query_Q, place_N = np.unique(query_N, return_inverse=True)
    order = np.lexsort((id_N, place_N))
    return query_Q, order[np.flatnonzero(np.diff(place_N[order], prepend=-1))], place_N


def _ascend(major: npt.NDArray[Any], minor: npt.NDArray[Any]) -> bool:
    """Whether the pairs (major, minor) are distinct and in ascending order."""
    later = major[1:] > major[:-1]
    return bool((later | ((major[1:] == major[:-1]) & (minor[1:] > minor[:-1]))).all())
