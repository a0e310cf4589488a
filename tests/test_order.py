"""A table's order of queries and rows depends only on its content, not on the order of the input."""

from __future__ import annotations

import numpy as np
import pytest

from rb_gpu.learn.order import first_rows, put_in_order
from rb_gpu.learn.room import Room


@pytest.mark.parametrize("seed", range(6))
def test_a_querys_first_row_is_that_of_its_least_id(seed):
    rng = np.random.default_rng(seed)
    query_N, id_N = rng.integers(5, size=20).astype(np.uint64), rng.permutation(100)[:20].astype(np.uint64)
    if seed == 0:
        id_N.sort()  # rows already in the final order take a short cut
    query_Q, first_Q, place_N = first_rows(query_N, id_N)
    assert query_Q.tolist() == sorted(set(query_N.tolist()))
    assert np.array_equal(query_Q[place_N], query_N)
    for query, first in zip(query_Q, first_Q, strict=True):
        rows = np.flatnonzero(query_N == query)
        assert first == min(rows, key=lambda row: id_N[row])


def table(seed: int) -> dict[str, np.ndarray]:
    """Six queries, two of them with equal times, and eleven rows, in a random order."""
    rng = np.random.default_rng(seed)
    queries, rows = rng.permutation(6), rng.permutation(11)
    place = np.argsort(queries)
    query_row = np.array([0, 0, 1, 2, 2, 2, 3, 4, 4, 5, 5])
    return {
        "x_QD": np.arange(12, dtype=np.float32).reshape(6, 2)[queries],
        "query_id": np.array([7, 3, 9, 1, 4, 2], np.uint64)[queries],
        "query_time": np.array([5, 5, 1, 8, 2, 8])[queries],
        "told_Q": np.arange(6)[queries],
        "query_row": place[query_row][rows],
        "id": np.arange(20, 31).astype(np.uint64)[rows],
        "value": np.arange(11.0)[rows],
    }


@pytest.mark.parametrize("seed", range(5))
def test_queries_come_by_time_and_id_and_rows_by_their_queries_and_id(seed):
    columns = table(seed)
    put_in_order(columns, Room(), ("told_Q",))
    # times 1, 2, 5, 5, 8, 8; equal times are ordered by query_id
    assert columns["query_id"].tolist() == [9, 4, 3, 7, 1, 2]
    assert columns["told_Q"].tolist() == [2, 4, 1, 0, 3, 5]
    assert columns["x_QD"][:, 0].tolist() == [4, 8, 2, 0, 6, 10]
    assert columns["query_row"].tolist() == [0, 0, 0, 1, 1, 2, 3, 3, 4, 5, 5]
    assert columns["id"].tolist() == [23, 24, 25, 27, 28, 22, 20, 21, 26, 29, 30]
    assert columns["value"].tolist() == [i - 20 for i in columns["id"].tolist()]


@pytest.mark.parametrize("session", [False, True])
def test_without_times_the_last_queries_are_no_single_kind(session):
    # a .npy of queries, kind after kind, was given one time by jobs.collect, and only its last kind was held out
    n = 1000
    given = {
        "x_QD": np.arange(n, dtype=np.float32)[:, None], "query_id": np.arange(n, dtype=np.uint64),
        "query_time": np.full(n, 1_700_000_000), "query_row": np.arange(n), "id": np.arange(n, dtype=np.uint64),
    }  # fmt: skip
    if session:
        given["session"] = np.repeat(np.arange(1, 101, dtype=np.uint64), 10)
    backwards = {name: values if name == "query_row" else values[::-1].copy() for name, values in given.items()}
    for columns in (given, backwards):
        put_in_order(columns, Room(), ("session",))
        assert np.array_equal(columns["id"], columns["query_id"])
        assert np.array_equal(columns["x_QD"][:, 0], columns["query_id"])
    assert np.array_equal(given["query_id"], backwards["query_id"])
    if session:
        assert np.array_equal(given["query_id"], np.arange(n))  # a session's queries came in the order of their ids
    else:
        assert abs(given["query_id"][-200:].mean() - n / 2) < 80  # four standard errors
