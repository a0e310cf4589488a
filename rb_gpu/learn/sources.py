"""Finds and opens what trajectories lie in: Parquet and Arrow IPC files on any Arrow filesystem, and SQLite logs."""

from __future__ import annotations

import glob
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq

from rb_gpu.errors import DataError
from rb_gpu.trajectory_file import read_batches

BATCH_ROWS = 65_536
PARQUET_SUFFIXES = (".parquet", ".pq")
IPC_SUFFIXES = (".arrow", ".ipc", ".feather")
SQLITE_SUFFIXES = (".sqlite", ".sqlite3", ".db")


@dataclass(frozen=True)
class Source:
    """One opened file: its schema, its rows, and its record batches restricted to the given columns."""

    name: str
    schema: pa.Schema
    rows: int
    batches: Callable[[list[str]], Iterator[pa.RecordBatch]]


def list_paths(path: str | Sequence[str], key: str) -> list[tuple[pyarrow.fs.FileSystem, str]]:
    """Every file that `path` names (file, directory, glob, URI, or a list of them). Raises DataError where none is."""
    found: list[tuple[pyarrow.fs.FileSystem, str]] = []
    for one in [path] if isinstance(path, str) else path:
        if "://" in one:
            filesystem, inner = pyarrow.fs.FileSystem.from_uri(one)
            names = [inner]
        else:
            filesystem = pyarrow.fs.LocalFileSystem()
            names = sorted(glob.glob(one, recursive=True)) if glob.has_magic(one) else [one]  # noqa: PTH207 - any root
            if not names:
                raise DataError(f"{key}={one} matches no file; check the pattern")
        for name in names:
            info = filesystem.get_file_info(name)
            if info.type == pyarrow.fs.FileType.NotFound:
                raise DataError(f"{key}={name} does not exist; give a file, a directory or a glob")
            if info.type == pyarrow.fs.FileType.Directory:
                inside = filesystem.get_file_info(pyarrow.fs.FileSelector(name, recursive=True))
                known = PARQUET_SUFFIXES + IPC_SUFFIXES + SQLITE_SUFFIXES
                names_inside = sorted(f.path for f in inside if f.is_file and PurePosixPath(f.path).suffix in known)
                if not names_inside:
                    raise DataError(f"{key}={name} holds no {', '.join(known)} file; name the right directory")
                found.extend((filesystem, n) for n in names_inside)
            else:
                found.append((filesystem, name))
    return found


def open_source(filesystem: pyarrow.fs.FileSystem, name: str, key: str) -> Source:
    """Opens one file by its suffix. Raises DataError where it is damaged or of an unknown kind."""
    suffix = PurePosixPath(name).suffix.lower()
    try:
        if suffix in PARQUET_SUFFIXES:
            parquet = pq.ParquetFile(filesystem.open_input_file(name))
            return Source(
                name,
                parquet.schema_arrow,
                parquet.metadata.num_rows,
                lambda columns: parquet.iter_batches(BATCH_ROWS, columns=columns),
            )
        if suffix in IPC_SUFFIXES:
            local = isinstance(filesystem, pyarrow.fs.LocalFileSystem)
            reader = pa.ipc.open_file(pa.memory_map(name) if local else filesystem.open_input_file(name))
            rows = sum(reader.get_batch(i).num_rows for i in range(reader.num_record_batches))

            def ipc_batches(columns: list[str]) -> Iterator[pa.RecordBatch]:
                for i in range(reader.num_record_batches):
                    batch = reader.get_batch(i).select(columns)
                    for start in range(0, batch.num_rows, BATCH_ROWS):
                        yield batch.slice(start, BATCH_ROWS)

            return Source(name, reader.schema, rows, ipc_batches)
        if suffix in SQLITE_SUFFIXES:
            return _open_log(name)
    except (pa.ArrowException, OSError) as error:
        first_line = str(error).splitlines()[0]
        raise DataError(f"{key}={name} cannot be read ({first_line}); it is damaged or of another format") from error
    known = ", ".join(PARQUET_SUFFIXES + IPC_SUFFIXES + SQLITE_SUFFIXES)
    raise DataError(f"{key}={name} has no known suffix; use one of {known}")


def _open_log(name: str) -> Source:
    def to_arrow(columns: dict[str, Any]) -> pa.RecordBatch:
        rating, cost, propensity = (np.asarray(columns[c]) for c in ("rating", "cost", "propensity"))
        columns = columns | {"rating": pa.array(rating, pa.int8(), mask=rating == 0)}
        columns["query_embedding"] = pa.array(columns["query_embedding"], pa.list_(pa.float32()))
        # a log holds one schema for all rows: a column that no row of a batch fills is left out as absent
        absent = [c for c, v in (("cost", cost), ("propensity", propensity)) if np.isnan(v).all()]
        return pa.RecordBatch.from_pydict({k: pa.array(v) for k, v in columns.items() if k not in absent})

    batches = [to_arrow(columns) for columns in read_batches(name, rows=BATCH_ROWS)]
    if not batches:
        raise DataError(f"data.path={name} is an empty trajectory log; record some queries first")
    schema = batches[0].schema
    shared = [c for c in schema.names if all(c in b.schema.names for b in batches)]
    schema = pa.schema([schema.field(c) for c in shared])
    return Source(name, schema, sum(b.num_rows for b in batches), lambda cs: (b.select(cs) for b in batches))


def guarded(source: Source, wanted: list[str], key: str) -> Iterator[pa.RecordBatch]:
    """The source's batches; damage met while reading becomes a DataError."""
    try:
        yield from source.batches(wanted)
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"{key}={source.name} cannot be read to its end ({str(error).splitlines()[0]}); the file is damaged"
        ) from error
