"""Finds and opens what trajectories lie in: Parquet and Arrow IPC files on any Arrow filesystem, and SQLite logs."""

from __future__ import annotations

import glob
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq

from rb_gpu.errors import DataError
from rb_gpu.trajectory_file import read_batches

BATCH_ROWS = 65_536
BUFFER_BYTES = 1 << 20
PARQUET_SUFFIXES = (".parquet", ".pq")
IPC_SUFFIXES = (".arrow", ".ipc", ".feather")
SQLITE_SUFFIXES = (".sqlite", ".sqlite3", ".db")
KNOWN_SUFFIXES = PARQUET_SUFFIXES + IPC_SUFFIXES + SQLITE_SUFFIXES


@dataclass(frozen=True)
class Source:
    """One file: its schema, its rows, and its batches restricted to the given columns, of at most the given rows."""

    name: str
    schema: pa.Schema
    rows: int
    batches: Callable[[list[str], int], Iterator[pa.RecordBatch]]


def list_paths(path: str | Sequence[str], key: str) -> list[tuple[pyarrow.fs.FileSystem, str]]:
    """Every file that `path` names (file, directory, glob, URI, or a list of them). Raises DataError where none is."""
    found: list[tuple[pyarrow.fs.FileSystem, str]] = []
    for one in [path] if isinstance(path, str) else path:
        try:
            if "://" in one:
                filesystem, inner = pyarrow.fs.FileSystem.from_uri(one)
                names = [inner]
            else:
                filesystem = pyarrow.fs.LocalFileSystem()
                names = _local_names(one)
            for name in names:
                found.extend((filesystem, file) for file in _files(filesystem, name, key))
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{key}={one} cannot be opened ({_first_line(error)}); check the path") from error
        if not names:
            raise DataError(f"{key}={one} matches no file; check the pattern")
    return found


def _local_names(path: str) -> list[str]:
    # a folder may well be called runs[1]
    if not glob.has_magic(path) or Path(path).exists():
        return [path]
    return sorted(glob.glob(path, recursive=True))  # noqa: PTH207 - any root


def _files(filesystem: pyarrow.fs.FileSystem, name: str, key: str) -> list[str]:
    """The file itself, or the files of a directory but those that Arrow and Spark hide with a leading . or _."""
    info = filesystem.get_file_info(name)
    if info.type == pyarrow.fs.FileType.NotFound:
        raise DataError(f"{key}={name} does not exist; give a file, a directory, a URI of one, or a local glob")
    if info.type != pyarrow.fs.FileType.Directory:
        return [name]
    files = [
        file.path
        for file in filesystem.get_file_info(pyarrow.fs.FileSelector(name, recursive=True))
        if file.is_file
        and PurePosixPath(file.path).suffix.lower() in KNOWN_SUFFIXES
        and not any(part[0] in "._" for part in PurePosixPath(file.path).relative_to(info.path).parts)
    ]
    if not files:
        raise DataError(f"{key}={name} holds no {', '.join(KNOWN_SUFFIXES)} file; name the right directory")
    return sorted(files)


def open_source(filesystem: pyarrow.fs.FileSystem, name: str, key: str) -> Source:
    """Opens one file by its suffix. Raises DataError where it is damaged or of an unknown kind."""
    suffix = PurePosixPath(name).suffix.lower()
    try:
        if suffix in PARQUET_SUFFIXES:
            return _open_parquet(filesystem, name)
        if suffix in IPC_SUFFIXES:
            return _open_ipc(filesystem, name)
        if suffix in SQLITE_SUFFIXES:
            return _open_log(name)
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"{key}={name} cannot be read ({_first_line(error)}); it is damaged or of another format"
        ) from error
    except DataError as error:
        raise DataError(f"{key}={error}") from error
    raise DataError(f"{key}={name} has no known suffix; use one of {', '.join(KNOWN_SUFFIXES)}")


def _open_parquet(filesystem: pyarrow.fs.FileSystem, name: str) -> Source:
    with filesystem.open_input_file(name) as file:
        parquet = pq.ParquetFile(file)
        metadata, schema = parquet.metadata, parquet.schema_arrow

    def batches(columns: list[str], rows: int) -> Iterator[pa.RecordBatch]:
        # opened anew: a table may have more files than a process may hold open;
        # buffered, and not ahead: Arrow would read the whole column of a row group at once
        with filesystem.open_input_file(name) as file:
            parquet = pq.ParquetFile(file, metadata=metadata, buffer_size=BUFFER_BYTES, pre_buffer=False)
            yield from parquet.iter_batches(rows, columns=columns)

    return Source(name, schema, metadata.num_rows, batches)


def _open_ipc(filesystem: pyarrow.fs.FileSystem, name: str) -> Source:
    def reader(fields: list[int]) -> pa.RecordBatchFileReader:
        local = isinstance(filesystem, pyarrow.fs.LocalFileSystem)
        file = pa.memory_map(name) if local else filesystem.open_input_file(name)
        return pa.ipc.open_file(file, options=pa.ipc.IpcReadOptions(included_fields=fields))

    def batches(columns: list[str], rows: int) -> Iterator[pa.RecordBatch]:
        opened = reader([schema.get_field_index(c) for c in columns])  # the others may be compressed
        for i in range(opened.num_record_batches):
            batch = opened.get_batch(i)
            batch.validate(full=True)  # Arrow trusts the offsets in a file, and would read beyond its end
            for start in range(0, batch.num_rows, rows):
                yield batch.slice(start, rows)

    counter = reader([0])
    count = sum(counter.get_batch(i).num_rows for i in range(counter.num_record_batches))
    schema = reader([]).schema
    return Source(name, schema, count, batches)


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
    """A log whole in memory, since its writers may go on while it is read."""
    logged = list(read_batches(name, rows=BATCH_ROWS))
    kinds = dict(_LOG_TYPES)
    for column in ("cost", "propensity"):
        # every log has these columns: one that no row fills is absent, in one that some rows fill the others are bad
        if logged and all(np.isnan(columns[column]).all() for columns in logged):
            del kinds[column]
    batches = [_log_batch(columns, kinds) for columns in logged]

    def slices(columns: list[str], rows: int) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            for start in range(0, batch.num_rows, rows):
                yield batch.select(columns).slice(start, rows)

    return Source(name, pa.schema(kinds), sum(b.num_rows for b in batches), slices)


def _log_batch(columns: dict[str, Any], kinds: dict[str, pa.DataType]) -> pa.RecordBatch:
    no_rating = np.asarray(columns["rating"]) == 0
    arrays = [pa.array(columns[c], kind, mask=no_rating if c == "rating" else None) for c, kind in kinds.items()]
    return pa.RecordBatch.from_arrays(arrays, schema=pa.schema(kinds))


def guarded(source: Source, columns: list[str], rows: int, key: str) -> Iterator[pa.RecordBatch]:
    """The source's batches; damage met while reading becomes a DataError."""
    try:
        yield from source.batches(columns, rows)
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"{key}={source.name} cannot be read to its end ({_first_line(error)}); the file is damaged"
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
