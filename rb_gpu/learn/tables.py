"""Reads trajectory tables into validated NumPy columns and sets bad rows aside by reason.

Only the columns of design section 4 and the requested numeric features are read. Suffixes: N rows, D dims.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from rb_gpu.errors import DataError
from rb_gpu.learn.blocks import Copying, block_threads
from rb_gpu.learn.cutoff import newest_rows
from rb_gpu.learn.data_config import Store
from rb_gpu.learn.decode import (
    NULL_TIER,
    UNKNOWN_TIER,
    decode_embeddings,
    decode_numbers,
    decode_tiers,
    decode_times,
    embedding_dim,
    list_dim,
    rule_of,
)
from rb_gpu.learn.partitions import warn_of_near, with_absent, with_folders
from rb_gpu.learn.places import open_table
from rb_gpu.learn.progress import step
from rb_gpu.learn.quarantine import NO_NUMBER, BadRows
from rb_gpu.learn.room import Room, to_front
from rb_gpu.learn.sources import BATCH_ROWS, Source, Span, ahead, guarded, share_out

# a column that no file has: the hashes of the embeddings, computed while each embedding was in the cache
HASH = "embedding_hash"
# bytes of embeddings per batch; Arrow needs several times as much memory to read them from Parquet
CHUNK_BYTES = 3 << 21

Columns = dict[str, npt.NDArray[Any]]


@dataclass
class Table:
    """Good rows of one or several files. model_tier: (N,) int32 codes into tier_names.

    columns has only those that every file has. file_id: (N,) int32 index into `files`; file_row: (N,) int64 row number
    in that file. source: names what was read, for messages. total_rows: rows read, including bad ones. room: where the
    embeddings lie. version: of the table, None where it has none.
    """

    columns: Columns
    tier_names: list[str]
    total_rows: int
    source: str
    files: list[str]
    file_id: npt.NDArray[np.int32]
    file_row: npt.NDArray[np.int64]
    room: Room
    version: int | None = None

    def refuse(self, mask: npt.NDArray[np.bool_], reason: str, key: str, bad: BadRows) -> None:
        """Drops the rows of the mask as bad, in place, since a copy would double the memory. key: the id column."""
        if not mask.any():
            return
        for file_id in np.unique(self.file_id[mask]):
            rows = mask & (self.file_id == file_id)
            bad.add(self.files[file_id], self.file_row[rows], self.columns[key][rows], reason)
        for name, array in self.columns.items():
            kept = self.room.keep(array, np.flatnonzero(~mask)) if name == "query_embedding" else array[~mask]
            self.columns[name] = kept
        self.file_id, self.file_row = self.file_id[~mask], self.file_row[~mask]


@dataclass(frozen=True)
class Reading:
    """How a table is read. tiers: the configured tiers, where any other name makes a bad row; None accepts all. newest:
    keep only this many rows of largest timestamp, of equal ones the last. key: the setting to name in messages. unique:
    a column in which, if it is read, a repeated value is a bad row. room: where the embeddings lie, and the processes
    that share the reading. store: how the table is stored. absent: the value of a column in a file that lacks it, if
    other files have it.
    """

    tiers: Sequence[str] | None = None
    newest: int | None = None
    key: str = "data.path"
    unique: str = "id"
    room: Room = field(default_factory=Room)
    store: Store = field(default_factory=Store)
    absent: Mapping[str, Any] = field(default_factory=dict)


def read_table(
    path: str | Sequence[str], required: Sequence[str], optional: Sequence[str], bad: BadRows, reading: Reading
) -> Table:
    """Reads the required and optional columns of all files of `path`, sets bad rows aside, and joins the rest.

    Returns query_embedding as (N, D) float32, and HASH beside it. Raises DataError naming the file and the column for:
    a missing file or column, an unreadable type, a dimension that differs between files, no rows.
    """
    sources, version = open_table(path, reading.store, reading.key)
    label = path if isinstance(path, str) else ", ".join(path)
    return replace(check_sources(sources, label, required, optional, bad, reading), version=version)


def check_sources(
    sources: Sequence[Source],
    label: str,
    required: Sequence[str],
    optional: Sequence[str],
    bad: BadRows,
    reading: Reading,
) -> Table:
    """`read_table` for opened sources."""
    key, room, ranks = reading.key, reading.room, reading.room.ranks
    sources = [with_folders(source, (*required, *optional), key) for source in sources]
    for source in sources:
        _check_columns(source, required, optional, key)
    warn_of_near(sources, required, optional)
    files = [source.name for source in sources]
    sources = with_absent([source for source in sources if source.rows], optional, reading.absent, key)
    total = sum(source.rows for source in sources)
    if total == 0:
        raise DataError(f"{key}={label} has no rows; check the log's export")
    wanted = [c for c in (*required, *optional) if all(c in s.schema.names for s in sources)]
    dim = _common_dim(sources, key) if "query_embedding" in wanted else None
    newest = reading.newest if reading.newest is not None and reading.newest < total else None
    keep_N = np.ones(total, dtype=bool) if newest is None else newest_rows(sources, newest, key)
    spans = share_out(sources, ranks.size)[ranks.rank]

    kept = int(keep_N.sum())
    before, size = (int(keep_N[rows].sum()) for rows in _rows_around(spans))
    x_ND = None if dim is None else room.matrix(kept, dim)
    part = _Part({}, [], np.empty(size, np.int32), np.empty(size, np.int64), list(reading.tiers or ()))
    for column in wanted:
        if x_ND is not None and column == "query_embedding":
            part.columns[column] = x_ND[before : before + size]
            part.columns[HASH] = np.empty(size, np.uint64)
        else:
            part.columns[column] = np.empty(size, np.int32 if column == "model_tier" else rule_of(column).dtype)
    for span in spans:
        _read_span(span, part, keep_N[span.at :], files.index(span.source.name), _batch_rows(dim), reading)
    columns, file_id, file_row, tier_names = _joined(part, reading, bad)
    if x_ND is not None:
        filled = np.concatenate([np.arange(first, first + n) for first, n in ranks.gathered((before, part.filled))])
        columns["query_embedding"] = room.keep(x_ND, filled)
    columns = {name: columns[name] for name in (*wanted, *((HASH,) if x_ND is not None else ()))}
    table = Table(columns, tier_names, kept, label, files, file_id, file_row, room)
    unique = reading.unique
    if unique in columns and not distinct(columns[unique]):
        repeated = np.ones(len(columns[unique]), dtype=bool)
        repeated[np.unique(columns[unique], return_index=True)[1]] = False
        table.refuse(repeated, f"duplicate {unique}", unique, bad)
    return table


def _rows_around(spans: Sequence[Span]) -> tuple[slice, slice]:
    """The rows of the table before the spans, which are consecutive, and the rows within them."""
    if not spans:
        return slice(0, 0), slice(0, 0)
    first, last = spans[0].at, spans[-1]
    return slice(0, first), slice(first, last.at + last.rows)


@dataclass
class _Part:
    """The rows that one process has read, of which the first `filled` are good; bad_parts as in BadRows."""

    columns: Columns
    bad_parts: list[tuple[str, npt.NDArray[np.int64], npt.NDArray[np.uint64], str]]
    file_id: npt.NDArray[np.int32]
    file_row: npt.NDArray[np.int64]
    tier_names: list[str]
    filled: int = 0


def _read_span(
    span: Span, part: _Part, keep_N: npt.NDArray[np.bool_], file_id: int, batch_rows: int, reading: Reading
) -> None:
    """Adds the good rows of the span. keep_N: which of the rows from the span's first one on are wanted."""
    row, bad = 0, BadRows(part.bad_parts)
    wanted = [name for name in part.columns if name != HASH]
    batches = guarded(span.source, wanted, batch_rows, reading.key, span.groups)
    # closing: the reader thread must end on an error too
    with block_threads() as pool, closing(ahead(batches)) as coming:
        for batch in coming:
            keep = keep_N[row : row + batch.num_rows]
            rows = span.row + row + np.flatnonzero(keep)
            row += batch.num_rows
            if not keep.all():
                batch = batch.filter(pa.array(keep))
            place = {name: array[part.filled : part.filled + len(rows)] for name, array in part.columns.items()}
            good = _check_batch(batch, rows, span.source, place, part.tier_names, reading, bad, pool)
            n = int(good.sum())
            if n < len(good):
                for array in place.values():
                    to_front(array, np.flatnonzero(good))
            ours = slice(part.filled, part.filled + n)
            part.file_id[ours], part.file_row[ours] = file_id, rows[good]
            part.filled += n
            step(reading.key, part.filled, len(part.file_row), "rows")


def _joined(
    part: _Part, reading: Reading, bad: BadRows
) -> tuple[Columns, npt.NDArray[np.int32], npt.NDArray[np.int64], list[str]]:
    """The columns of all processes except the embeddings, file_id, file_row and the names of the tiers."""
    n, ranks = part.filled, reading.room.ranks
    mine = {name: array[:n] for name, array in part.columns.items() if name != "query_embedding"}
    parts = ranks.gathered((mine, part.file_id[:n], part.file_row[:n], part.tier_names, part.bad_parts))
    tier_names = list(reading.tiers or ())
    for columns, _, _, names, bad_parts in parts:
        bad.parts.extend(bad_parts)
        tier_names.extend(name for name in names if name not in tier_names)
        if "model_tier" in columns and names:
            place = np.array([tier_names.index(name) for name in names], np.int32)
            columns["model_tier"] = place[columns["model_tier"]]
    if len(parts) == 1:
        return (*parts[0][:3], tier_names)
    joined = {name: np.concatenate([columns[name] for columns, *_ in parts]) for name in mine}
    return joined, np.concatenate([p[1] for p in parts]), np.concatenate([p[2] for p in parts]), tier_names


def distinct(values: npt.NDArray[np.uint64]) -> bool:
    """Whether no value repeats; much faster than finding which do, and immediate where values ascend."""
    if (values[1:] > values[:-1]).all():
        return True
    ordered = np.sort(values)
    return not bool((ordered[1:] == ordered[:-1]).any())


def _check_columns(source: Source, required: Sequence[str], optional: Sequence[str], key: str) -> None:
    count = Counter(source.schema.names)
    for column in (*required, *optional):
        if column in required and column not in count:
            raise DataError(
                f"{key}={source.name} has no column {column}; add it (the table needs {', '.join(required)})"
            )
        if count[column] > 1:
            raise DataError(f"{key}={source.name} has {count[column]} columns {column}; leave one")


def _batch_rows(dim: int | None) -> int:
    return BATCH_ROWS if dim is None else min(max(CHUNK_BYTES // (4 * dim), 256), BATCH_ROWS)


def _common_dim(sources: Sequence[Source], key: str) -> int:
    dims: dict[int, str] = {}
    for source in sources:
        dim = embedding_dim(source.schema.field("query_embedding").type, f"{key}={source.name}")
        if dim is None:
            batches = guarded(source, ["query_embedding"], _batch_rows(1024), key)
            # a batch of nulls, or a whole file of them, does not determine the dimension
            dim = next((d for batch in batches if (d := list_dim(batch.column(0)))), None)
        if dim is not None:
            dims.setdefault(dim, source.name)
    if not dims:
        raise DataError(f"{key}={sources[0].name}: query_embedding is null in every row; export the embeddings")
    if len(dims) > 1:
        (dim_a, file_a), (dim_b, file_b) = list(dims.items())[:2]
        raise DataError(
            f"{key}: query_embedding has {dim_a} dimensions in {file_a} and {dim_b} in {file_b}; "
            "train on one embedder's files at a time"
        )
    return next(iter(dims))


def _check_batch(
    batch: pa.RecordBatch,
    rows: npt.NDArray[np.int64],
    source: Source,
    place: Columns,
    tier_names: list[str],
    reading: Reading,
    bad: BadRows,
    pool: Executor,
) -> npt.NDArray[np.bool_]:
    """Decodes the batch into the arrays of `place` and returns which rows are good; a bad row is recorded under the
    first reason that applies. rows: the batch's row numbers in the file.
    """
    good = np.ones(batch.num_rows, dtype=bool)
    ids = np.zeros(batch.num_rows, np.uint64)

    def refuse(mask: npt.NDArray[np.bool_], reason: str) -> None:
        if not mask.any():
            return
        hit = mask & good
        bad.add(source.name, rows[hit], ids[hit], reason)
        good[hit] = False

    if "query_embedding" in place:
        x_ND = place["query_embedding"]
        matrix, right_length = decode_embeddings(batch.column("query_embedding"), x_ND.shape[1])
        copying = Copying(matrix, x_ND, source.copy, pool)  # goes on while the other columns are checked
    for name, out in place.items():  # reasons apply in the contract's order, whatever the file's column order
        if name == HASH:  # taken with the embeddings
            continue
        column, where = batch.column(name), f"{reading.key}={source.name}: column {name}"
        if name == "query_embedding":
            norm2, place[HASH][:] = copying.norms_and_hashes()
            refuse(~right_length, f"query_embedding has not {out.shape[1]} values")
            refuse(~np.isfinite(norm2), "query_embedding is not finite")
            refuse(norm2 == 0, "query_embedding has norm 0")
        elif name == "model_tier":
            out[:] = decode_tiers(column, tier_names, reading.tiers is not None, where)
            refuse(out == NULL_TIER, "model_tier is null")
            refuse(out == UNKNOWN_TIER, f"unknown model_tier (params.tiers={tier_names})")
        else:
            rule = rule_of(name)
            array, missing = (
                decode_times(column, where) if name == "timestamp" else decode_numbers(column, rule.dtype, where)
            )
            if name == "id" or (name == "query_id" and "id" not in place):
                ids = array
            if rule.holds(array) and not missing.any() and (rule.dtype is np.float32 or array.dtype.kind != "f"):
                out[:] = array
                continue
            if not rule.nullable:
                refuse(missing, f"{name} {NO_NUMBER}")
            if rule.dtype is not np.float32 and array.dtype.kind == "f":
                refuse(array != np.rint(array), f"{name} is not an integer")
            outside = rule.outside(array) & ~missing
            refuse(outside, f"{name} is outside {rule.bounds}")
            unusable = missing | outside
            out[:] = np.where(unusable, 0, array) if unusable.any() else array
    return good
