"""Opens files of trajectories: Parquet and Arrow IPC on any Arrow filesystem, and SQLite logs."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq

from rb_gpu.errors import DataError
from rb_gpu.learn.blocks import Copy, Matrix
from rb_gpu.trajectory_file import read_batches

BATCH_ROWS = 65_536
BUFFER_BYTES = 1 << 20
# for remote stores: about as many bytes as are transferred in the latency of one request
FAR_BUFFER_BYTES = 8 << 20
PARQUET_SUFFIXES = (".parquet", ".pq")
IPC_SUFFIXES = (".arrow", ".ipc", ".feather")
SQLITE_SUFFIXES = (".sqlite", ".sqlite3", ".db")
KNOWN_SUFFIXES = PARQUET_SUFFIXES + IPC_SUFFIXES + SQLITE_SUFFIXES


@dataclass(frozen=True)
class Source:
    """One file: its schema, the row counts of its groups, which can be read independently (row groups of Parquet,
    batches of Arrow), and a function that yields batches of the requested groups, restricted to the given columns and
    of at most the given number of rows.

    copy: copies embeddings out of a batch, like np.copyto.
    """

    name: str
    schema: pa.Schema
    groups: list[int]
    batches: Callable[[list[str], int, range], Iterator[pa.RecordBatch]]
    copy: Copy = np.copyto

    @property
    def rows(self) -> int:
        """The number of rows of the file."""
        return sum(self.groups)


@dataclass(frozen=True)
class Span:
    """Consecutive groups of one source, whose first row is number `row` in the file and number `at` in the table."""

    source: Source
    groups: range
    row: int
    at: int

    @property
    def rows(self) -> int:
        """The number of rows of the groups."""
        return sum(self.source.groups[i] for i in self.groups)


def share_out(sources: Sequence[Source], size: int) -> list[list[Span]]:
    """Splits the sources among `size` readers: whole, consecutive groups with about as many rows each."""
    total = sum(source.rows for source in sources)
    shares: list[list[Span]] = [[] for _ in range(size)]
    at = 0
    for source in sources:
        ends = np.cumsum(source.groups, dtype=np.int64)
        middle = at + ends - np.array(source.groups) / 2
        reader = np.minimum((middle * size / max(total, 1)).astype(np.int64), size - 1)
        for one in np.unique(reader):
            first, last = np.flatnonzero(reader == one)[[0, -1]]
            row = int(ends[first]) - source.groups[first]
            shares[one].append(Span(source, range(int(first), int(last) + 1), row, at + row))
        at += source.rows
    return shares


def open_source(filesystem: pyarrow.fs.FileSystem, name: str, key: str) -> Source:
    """Opens one file by its suffix. Raises DataError where it is damaged or of an unknown kind."""
    suffix = PurePosixPath(name).suffix.lower()
    try:
        if suffix in PARQUET_SUFFIXES:
            return open_parquet(filesystem, name)
        if suffix in IPC_SUFFIXES:
            return _open_ipc(filesystem, name, key)
        if suffix in SQLITE_SUFFIXES:
            return _open_log(name)
    except (pa.ArrowException, OSError) as error:
        far = "" if isinstance(filesystem, pyarrow.fs.LocalFileSystem) else ", or these credentials may not read it"
        raise DataError(
            f"{key}={name} cannot be read ({first_line(error)}); it is damaged or of another format{far}"
        ) from error
    except DataError as error:
        raise DataError(f"{key}={error}") from error
    raise DataError(
        f"{key}={name} has no known suffix; use one of {', '.join(KNOWN_SUFFIXES)} "
        "(jobs/README.md turns a CSV into Parquet)"
    )


def open_parquet(filesystem: pyarrow.fs.FileSystem, name: str) -> Source:
    """Opens one Parquet file. Raises OSError or pyarrow.ArrowException where that fails."""
    with filesystem.open_input_file(name) as file:
        parquet = pq.ParquetFile(file)
        metadata, schema = parquet.metadata, parquet.schema_arrow

    local = isinstance(filesystem, pyarrow.fs.LocalFileSystem)

    def batches(columns: list[str], rows: int, groups: range) -> Iterator[pa.RecordBatch]:
        # reopened here, because a table may have more files than a process may hold open;
        # buffered rather than pre-buffered, with which Arrow would read the whole column of a row group at once
        with filesystem.open_input_file(name) as file:
            buffer = BUFFER_BYTES if local else FAR_BUFFER_BYTES
            parquet = pq.ParquetFile(file, metadata=metadata, buffer_size=buffer, pre_buffer=False)
            yield from parquet.iter_batches(rows, row_groups=list(groups), columns=columns)

    groups = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
    return Source(name, schema, groups, batches)


class _Mapped:
    """A memory-mapped local file, of which only the parts in use are read. where: names the file in messages."""

    def __init__(self, name: str, where: str) -> None:
        self.name, self.where = name, where

    def open(self) -> pa.MemoryMappedFile:
        file = pa.memory_map(self.name)
        whole = file.read_buffer(file.size())
        self.address, self.size, self.stat = whole.address, whole.size, os.fstat(file.fileno())
        return file

    def copy(self, to_ND: Matrix, from_ND: npt.NDArray[np.floating[Any]]) -> None:
        """Copies rows that lie in the map by reading the file: this is faster than page faults, and no page of the map
        stays in this process's memory.
        """
        offset = from_ND.ctypes.data - self.address
        if 0 <= offset < self.size and from_ND.dtype == to_ND.dtype and from_ND.flags.c_contiguous:
            try:
                with open(self.name, "rb", buffering=0) as file:  # noqa: PTH123 - the same on every system
                    # another file may have taken this name since it was mapped
                    if os.path.samestat(os.fstat(file.fileno()), self.stat):
                        file.seek(offset)
                        if file.readinto(to_ND.data) == to_ND.nbytes:
                            return
            except OSError as error:
                raise _cut_short(self.where, error) from error
        np.copyto(to_ND, from_ND)


def _open_ipc(filesystem: pyarrow.fs.FileSystem, name: str, key: str) -> Source:
    local = _Mapped(name, f"{key}={name}") if isinstance(filesystem, pyarrow.fs.LocalFileSystem) else None

    def reader(fields: list[int]) -> pa.RecordBatchFileReader:
        file = local.open() if local else filesystem.open_input_file(name)
        return pa.ipc.open_file(file, options=pa.ipc.IpcReadOptions(included_fields=fields))

    first, whole = reader([0]), reader([])
    schema = whole.schema
    # if some columns are requested, Arrow copies them; if all are, it decompresses those that are compressed, into
    # buffers of their own, while uncompressed ones stay parts of the mapped file
    mapped = local is not None and first.num_record_batches > 0 and _lies_in_file(first.get_batch(0).column(0))
    counter = whole if mapped else first
    counts = [counter.get_batch(i).num_rows for i in range(counter.num_record_batches)]

    def batches(columns: list[str], rows: int, groups: range) -> Iterator[pa.RecordBatch]:
        opened = reader([] if mapped else [schema.get_field_index(c) for c in columns])
        for i in groups:
            batch = opened.get_batch(i).select(columns)
            batch.validate(full=True)  # Arrow trusts the offsets in a file and would read beyond its end
            step = BATCH_ROWS if mapped else rows  # a mapped batch takes no memory
            for start in range(0, batch.num_rows, step):
                yield batch.slice(start, step)

    return Source(name, schema, counts, batches, local.copy if local else np.copyto)


def _lies_in_file(column: pa.Array) -> bool:
    return all(buffer.parent is not None for buffer in column.buffers() if buffer is not None)


_LOG_TYPES: dict[str, pa.DataType] = {
    "id": pa.uint64(),
    "query_id": pa.uint64(),
    "query_embedding": pa.list_(pa.float32()),
    "ef_search": pa.uint32(),
    "n_probes": pa.uint32(),
    "context_tokens": pa.uint32(),
    "model_tier": pa.string(),
    "temperature": pa.float32(),
    "precision": pa.float32(),
    "recall": pa.float32(),
    "latency_us": pa.uint64(),
    "cost": pa.float32(),
    "rating": pa.int8(),
    "timestamp": pa.int64(),
    "propensity": pa.float32(),
}


def _open_log(name: str) -> Source:
    """Reads a whole log into memory, since its writers may go on meanwhile."""
    logged = list(read_batches(name, rows=BATCH_ROWS))
    kinds = dict(_LOG_TYPES)
    for column in ("cost", "propensity"):
        # every log has these columns: if no row has a value the column is absent, if some have, the other rows are bad
        if logged and all(np.isnan(columns[column]).all() for columns in logged):
            del kinds[column]
    batches = [_log_batch(columns, kinds) for columns in logged]

    return of_batches(name, pa.schema(kinds), batches)


def of_batches(name: str, schema: pa.Schema, held: Sequence[pa.RecordBatch]) -> Source:
    """A source made of batches in memory."""

    def slices(columns: list[str], rows: int, groups: range) -> Iterator[pa.RecordBatch]:
        for i in groups:
            for start in range(0, held[i].num_rows, rows):
                yield held[i].select(columns).slice(start, rows)

    return Source(name, schema, [batch.num_rows for batch in held], slices)


def _log_batch(columns: dict[str, Any], kinds: dict[str, pa.DataType]) -> pa.RecordBatch:
    no_rating = np.asarray(columns["rating"]) == 0
    arrays = [pa.array(columns[c], kind, mask=no_rating if c == "rating" else None) for c, kind in kinds.items()]
    return pa.RecordBatch.from_arrays(arrays, schema=pa.schema(kinds))


def guarded(
    source: Source, columns: list[str], rows: int, key: str, groups: range | None = None
) -> Generator[pa.RecordBatch]:
    """The source's batches, of all groups if none are given; turns damage found while reading into a DataError."""
    try:
        yield from source.batches(columns, rows, range(len(source.groups)) if groups is None else groups)
    except (pa.ArrowException, OSError) as error:
        raise _cut_short(f"{key}={source.name}", error) from error


def ahead(batches: Generator[pa.RecordBatch]) -> Generator[pa.RecordBatch]:
    """The same batches, with a thread that reads the next one while the caller works; only these two are in memory.

    Re-raises what reading raises. The thread ends after the last batch, or when the caller closes the generator.
    """
    with closing(batches), ThreadPoolExecutor(1, thread_name_prefix="reader") as reader:
        coming = reader.submit(next, batches, None)
        while (batch := coming.result()) is not None:
            coming = reader.submit(next, batches, None)
            yield batch


def _cut_short(where: str, error: Exception) -> DataError:
    return DataError(f"{where} cannot be read to its end ({first_line(error)}); the file is damaged")


def first_line(error: Exception) -> str:
    """The first line of another package's error, without the trace that some append."""
    return (str(error).splitlines() or [type(error).__name__])[0]
