"""Embeddings in a file, and a table read by several processes together, equal those of one process in memory."""

from __future__ import annotations

import errno
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rb_gpu.errors import DataError
from rb_gpu.learn.config import DataConfig, ParamsConfig
from rb_gpu.learn.distributed import Ranks
from rb_gpu.learn.room import Room
from rb_gpu.learn.sources import of_batches, share_out
from rb_gpu.learn.trajectories import Trajectories, load

COLUMNS = ("x_QD", "query_row", "query_id", "query_time", "config_id", "precision", "timestamp", "id")


class Board:
    """Where threads that act as ranks leave values for each other."""

    def __init__(self, size: int) -> None:
        self.values: list[Any] = [None] * size
        self.barrier = threading.Barrier(size, timeout=20)


class Thread(Ranks):
    """A rank that is a thread."""

    def __init__(self, rank: int, board: Board) -> None:
        super().__init__(rank, len(board.values))
        self.board = board

    def gathered(self, value: Any) -> list[Any]:
        self.board.values[self.rank] = value
        self.board.barrier.wait()
        values = deepcopy(self.board.values)
        self.board.barrier.wait()
        return values

    def of_first(self, value: Any) -> Any:
        return self.gathered(value)[0]

    def wait(self) -> None:
        self.board.barrier.wait()


def together(size: int, config: DataConfig, params: ParamsConfig, scratch: Path) -> list[Trajectories]:
    board = Board(size)

    def one(rank: int) -> Trajectories:
        try:
            quarantine = scratch / f"bad{rank}"
            return load(config, params, quarantine, Room(None, str(scratch), Thread(rank, board)))
        except BaseException:
            board.barrier.abort()
            raise

    with ThreadPoolExecutor(size) as pool:
        started = [pool.submit(one, rank) for rank in range(size)]
    errors = [error for rank in started if (error := rank.exception()) is not None]
    for error in sorted(errors, key=lambda e: isinstance(e, threading.BrokenBarrierError)):
        raise error
    return [rank.result() for rank in started]


def write(path: Path, rng: np.random.Generator, n: int, group: int, repeated: bool) -> None:
    x = rng.normal(size=(n, 3)).astype(np.float32)
    x[rng.random(n) < 0.1] = 0  # bad rows
    ids = np.arange(n, dtype=np.uint64)
    if n > 5:
        ids[rng.integers(n)] = ids[0]  # mostly a duplicate
    columns = {
        "id": ids,
        "query_embedding": pa.FixedSizeListArray.from_arrays(pa.array(x.ravel()), 3),
        "precision": np.where(rng.random(n) < 0.1, 7, 0.5).astype(np.float32),
        "recall": np.full(n, 0.5, np.float32),
        "latency_us": rng.integers(1, 99, size=n).astype(np.uint64),
        "timestamp": rng.integers(1, 20, size=n),
        "ef_search": rng.integers(1, 4, size=n).astype(np.uint32),
        "model_tier": rng.choice(["a", "b", "c"], size=n),
    }
    if repeated:
        columns["query_id"] = rng.integers(n, size=n).astype(np.uint64)
    pq.write_table(pa.table(columns), path, row_group_size=group)


def same(one: Trajectories, other: Trajectories) -> None:
    for name in COLUMNS:
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name), name)
    assert list(one.configs) == list(other.configs) and one.configs.default == other.configs.default
    assert one.source == other.source


# regression: the first rank moved rows while the second still compared them; it then refused other rows and waited
# elsewhere
@example(n=[39, 39, 36], group=1, size=2, capacity=20, repeated=True, seed=28)
@settings(max_examples=40, deadline=None)
@given(
    n=st.lists(st.integers(1, 60), min_size=1, max_size=3), group=st.integers(1, 30), size=st.integers(2, 4),
    capacity=st.none() | st.integers(1, 60), repeated=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_processes_that_share_the_reading_get_the_table_of_one(
    n, group, size, capacity, repeated, seed, tmp_path_factory
):
    folder = tmp_path_factory.mktemp("shared")
    rng = np.random.default_rng(seed)
    for i, rows in enumerate(n):
        write(folder / f"{i}.parquet", rng, rows, group, repeated)
    config = DataConfig(path=str(folder / "*.parquet"), capacity=capacity, max_bad_fraction=1.0)
    params = ParamsConfig()
    try:
        alone = load(config, params, folder / "bad")
    except DataError as error:
        with pytest.raises(DataError) as raised:
            together(size, config, params, folder)
        assert str(raised.value) == str(error)  # noqa: PT017
        return
    for shared in together(size, config, params, folder):
        same(alone, shared)
    if alone.source.bad_rows:
        # a batch reports its bad rows by reason, and may extend beyond the end of a share
        by = [(name, "ascending") for name in ("file", "row")]
        assert pq.read_table(folder / "bad").sort_by(by) == pq.read_table(folder / "bad0").sort_by(by)
        assert not (folder / "bad1").exists()
    assert not list(folder.glob("rb_gpu-*"))


def test_table_beyond_the_budget_lies_in_a_file_without_a_name(tmp_path):
    rng = np.random.default_rng(0)
    write(tmp_path / "x.parquet", rng, 500, 64, True)
    config = DataConfig(path=str(tmp_path / "x.parquet"), max_bad_fraction=1.0)
    (tmp_path / "scratch").mkdir()
    filed = load(config, ParamsConfig(), room=Room(0, str(tmp_path / "scratch")))
    maps = Path("/proc/self/maps").read_text()
    assert f"{tmp_path}/scratch/rb_gpu-" in maps or f"{tmp_path}/scratch/#" in maps
    assert not list((tmp_path / "scratch").iterdir())
    same(load(config, ParamsConfig()), filed)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES])
def test_no_room_for_the_file_is_an_error_before_anything_is_read(code, tmp_path, monkeypatch):
    def refuse(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    with pytest.raises(DataError, match=rf"device\.scratch={tmp_path} cannot take 0\.04 GiB .*raise the budget"):
        Room(2**20, str(tmp_path)).matrix(10**5, 100)


def test_budget_is_what_is_free_unless_it_is_said(monkeypatch):
    monkeypatch.setattr("rb_gpu.learn.room.free_memory", lambda: 1000)
    in_memory, in_file = Room().matrix(5, 25), Room().matrix(5, 26)
    assert in_memory.base is None and in_file.base is not None


@given(order=st.integers(1, 40).flatmap(lambda n: st.permutations(range(n))))
def test_rows_are_sorted_in_place(order):
    x = np.arange(2 * len(order), dtype=np.float32).reshape(-1, 2)
    expected = x[list(order)]
    given_order = np.array(order)
    Room().sort(x, given_order)
    np.testing.assert_array_equal(x, expected)
    assert given_order.tolist() == list(order)


@given(
    files=st.lists(st.lists(st.integers(1, 50), min_size=1, max_size=8), min_size=1, max_size=4), size=st.integers(1, 5)
)
def test_every_group_is_read_once_in_order_and_shares_are_even(files, size):
    schema = pa.schema({"i": pa.int64()})
    batches = [[pa.record_batch({"i": [0] * n}) for n in groups] for groups in files]
    sources = [of_batches(str(i), schema, held) for i, held in enumerate(batches)]
    shares = share_out(sources, size)
    read = [(int(span.source.name), group) for share in shares for span in share for group in span.groups]
    assert read == [(i, group) for i, groups in enumerate(files) for group in range(len(groups))]
    rows = [row for share in shares for span in share for row in range(span.at, span.at + span.rows)]
    total = sum(map(sum, files))
    assert rows == list(range(total))
    widest = max(map(max, files))
    assert all(abs(sum(span.rows for span in share) - total / size) <= widest for share in shares)
    for share in shares:
        for span in share:
            assert span.row == sum(span.source.groups[: span.groups[0]])
