"""The order of a table's queries and rows, which is the same in whatever order, and from whatever files, they came.

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
    """Puts, in place, queries in the order of their newest timestamp and then of query_id, so that those of any span of
    time are consecutive, and rows in the order of their queries and then of id: sums over rows are the same to the bit.
    told: columns of queries, (Q,), besides x_QD, hash_Q, query_id and query_time; where they are there.
    """
    of_queries = [name for name in ("hash_Q", "query_id", "query_time", *told) if name in columns]
    if not _ascend(columns["query_time"], columns["query_id"]):
        order = np.lexsort((columns["query_id"], columns["query_time"]))
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
    """The distinct queries (Q,), the row (Q,) of each one's least id, and each row's place among the queries (N,).

    The least id, not the first row: it is the same in whatever order rows are stored. Ids are distinct.
    """
    if (id_N[1:] > id_N[:-1]).all():
        return np.unique(query_N, return_index=True, return_inverse=True)
    query_Q, place_N = np.unique(query_N, return_inverse=True)
    order = np.lexsort((id_N, place_N))
    return query_Q, order[np.flatnonzero(np.diff(place_N[order], prepend=-1))], place_N


def _ascend(major: npt.NDArray[Any], minor: npt.NDArray[Any]) -> bool:
    """Whether pairs, none of which is there twice, are in their order."""
    later = major[1:] > major[:-1]
    return bool((later | ((major[1:] == major[:-1]) & (minor[1:] > minor[:-1]))).all())
