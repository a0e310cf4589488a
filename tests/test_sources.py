"""Batches are read ahead by a thread that leaves nothing behind, and copied from the file that was opened."""

from __future__ import annotations

import threading
from collections.abc import Generator

import numpy as np
import pyarrow as pa
import pyarrow.fs
import pytest

from rb_gpu.errors import DataError
from rb_gpu.learn.sources import Source, ahead, guarded, open_source


def readers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("reader")]


def counting(n: int, made: list[int], closed: list[bool]) -> Generator[pa.RecordBatch]:
    try:
        for i in range(n):
            made.append(i)
            yield pa.record_batch({"i": [i]})
    finally:
        closed.append(True)


def test_batches_come_in_order_and_no_more_than_one_is_read_ahead():
    made: list[int] = []
    closed: list[bool] = []
    seen = []
    for batch in ahead(counting(5, made, closed)):
        seen.append(batch["i"][0].as_py())
        assert len(made) <= len(seen) + 1
    assert seen == [0, 1, 2, 3, 4] and closed == [True] and not readers()
    assert list(ahead(counting(0, made, closed))) == []


def test_the_next_batch_is_read_while_the_caller_works():
    read = threading.Event()

    def two() -> Generator[pa.RecordBatch]:
        yield pa.record_batch({"i": [0]})
        read.set()
        yield pa.record_batch({"i": [1]})

    batches = ahead(two())
    next(batches)
    assert read.wait(10)
    batches.close()


def test_reader_ends_when_the_caller_stops_early():
    made: list[int] = []
    closed: list[bool] = []
    batches = ahead(counting(100, made, closed))
    next(batches)
    assert readers()
    batches.close()
    assert not readers() and closed == [True] and len(made) <= 2


def test_damage_met_by_the_reader_is_the_error_it_always_was():
    def broken(columns: list[str], rows: int, groups: range) -> Generator[pa.RecordBatch]:
        yield pa.record_batch({"i": [0]})
        raise OSError("the disk is gone\nand more")

    source = Source("x.parquet", pa.schema({"i": pa.int64()}), [2], broken)
    seen = []
    with pytest.raises(DataError) as raised:
        seen.extend(ahead(guarded(source, ["i"], 10, "data.path")))
    assert len(seen) == 0 or seen[0]["i"][0].as_py() == 0
    assert str(raised.value) == (
        "data.path=x.parquet cannot be read to its end (the disk is gone); the file is damaged"
    )
    assert not readers()


def mapped(path) -> tuple[Source, np.ndarray, np.ndarray]:
    """An Arrow file of 6 rows: its source, its content, and its rows as a view of the mapped file."""
    x = np.arange(1, 25, dtype=np.float32).reshape(6, 4)
    table = pa.table({"x": pa.FixedSizeListArray.from_arrays(pa.array(x.ravel()), 4)})
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)
    source = open_source(pyarrow.fs.LocalFileSystem(), str(path), "data.path")
    batch = next(source.batches(["x"], 10, range(1)))
    return source, x, batch.column(0).flatten().to_numpy().reshape(6, 4)


def test_rows_are_copied_by_reading_the_file(tmp_path):
    source, x, rows = mapped(tmp_path / "x.arrow")
    for part in (slice(0, 6), slice(2, 5)):
        out = np.zeros_like(x[part])
        source.copy(out, rows[part])
        np.testing.assert_array_equal(out, x[part])
    # arrays that are not in the map, or have another type or stride, are copied from where they are
    for other in (x, x.astype(np.float64), rows[::2], rows[:, :2]):
        out = np.zeros(other.shape, np.float32)
        source.copy(out, other)
        np.testing.assert_array_equal(out, other)


def test_file_that_takes_the_place_of_a_mapped_one_is_not_read_for_it(tmp_path):
    source, x, rows = mapped(tmp_path / "x.arrow")
    (tmp_path / "new").write_bytes(b"\xff" * 10_000)
    (tmp_path / "new").replace(tmp_path / "x.arrow")
    out = np.zeros_like(x)
    source.copy(out, rows)
    np.testing.assert_array_equal(out, x)


def test_file_that_cannot_be_read_any_more_is_an_error_that_names_it(tmp_path):
    source, x, rows = mapped(tmp_path / "x.arrow")
    (tmp_path / "x.arrow").unlink()
    with pytest.raises(DataError, match=rf"^data\.path={tmp_path}/x\.arrow cannot be read to its end \(.+damaged$"):
        source.copy(np.zeros_like(x), rows)
