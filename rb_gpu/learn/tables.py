"""Reads trajectory tables into checked NumPy columns; bad rows are set aside by reason.

Only the columns of design section 4 are read. Suffixes: N rows, D dims.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor
from contextlib import closing
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from rb_gpu.errors import DataError
from rb_gpu.learn.blocks import Copying, block_threads
from rb_gpu.learn.cutoff import newest_rows, times_of
from rb_gpu.learn.decode import (
    CONTRACT,
    NULL_TIER,
    UNKNOWN_TIER,
    decode_embeddings,
    decode_numbers,
    decode_tiers,
    decode_times,
    embedding_dim,
    list_dim,
)
from rb_gpu.learn.sources import BATCH_ROWS, Source, ahead, guarded, list_paths, open_source

log = logging.getLogger(__name__)

OFFENDERS_SHOWN = 5
# of embeddings at a time; Arrow takes several times as much to read them from Parquet
CHUNK_BYTES = 3 << 21
COMPACT_ROWS = 4096

Columns = dict[str, npt.NDArray[Any]]


@dataclass
class BadRows:
    """Bad rows by reason, with where each one stands. parts: (file, rows in the file, their ids, reason)."""

    parts: list[tuple[str, npt.NDArray[np.int64], npt.NDArray[np.uint64], str]] = field(default_factory=list)

    def __len__(self) -> int:
        return sum(len(rows) for _, rows, _, _ in self.parts)

    def __iter__(self) -> Iterator[tuple[str, int, int, str]]:
        for file, rows, ids, reason in self.parts:
            yield from ((file, int(row), int(i), reason) for row, i in zip(rows, ids, strict=True))

    @property
    def rows(self) -> list[tuple[str, int, int, str]]:
        """(file, row in the file, id, reason) of each one."""
        return list(self)

    def by_reason(self) -> dict[str, int]:
        """How many bad rows each reason has, most first."""
        count: Counter[str] = Counter()
        for _, rows, _, reason in self.parts:
            count[reason] += len(rows)
        return dict(count.most_common())

    def add(self, file: str, rows: npt.NDArray[np.int64], ids: npt.NDArray[np.uint64], reason: str) -> None:
        """Adds the given rows of one file under one reason."""
        if len(rows):
            self.parts.append((file, rows, ids, reason))

    def write(self, path: Path) -> None:
        """Writes the quarantine table: file, row (in the file), id, reason."""
        schema = pa.schema([("file", pa.string()), ("row", pa.int64()), ("id", pa.uint64()), ("reason", pa.string())])
        path.parent.mkdir(parents=True, exist_ok=True)
        with pq.ParquetWriter(path, schema) as writer:
            for file, rows, ids, reason in self.parts:
                n = len(rows)
                writer.write_table(pa.table([pa.repeat(file, n), rows, ids, pa.repeat(reason, n)], schema))

    def check(self, total: int, max_bad_fraction: float, path: str) -> None:
        """Raises DataError where no good row is left, or more than max_bad_fraction of the rows are bad."""
        bad = len(self)
        if bad < total and bad / total <= max_bad_fraction:  # a product would round 29 of 100 to over 0.29
            return
        first = islice(self, OFFENDERS_SHOWN)
        shown = "; ".join(f"{Path(s).name} row {r} (id {i}): {why}" for s, r, i, why in first)
        bound = f"over data.max_bad_fraction={max_bad_fraction:g}" if bad < total else "and none is left to learn from"
        counts = ", ".join(f"{reason}: {n}" for reason, n in self.by_reason().items())
        raise DataError(
            f"data.path={path}: {bad} of {total} rows are bad, {bound} ({counts}); first: {shown}; "
            "mend the log or raise data.max_bad_fraction"
        )


@dataclass
class Table:
    """Good rows of one or several files. model_tier: (N,) int32 codes into tier_names.

    columns has only what every file holds. file_id: (N,) int32 index into `files`; file_row: (N,) int64 row in it.
    source: what was read, for messages. total_rows: rows seen, bad ones too.
    """

    columns: Columns
    tier_names: list[str]
    total_rows: int
    source: str
    files: list[str]
    file_id: npt.NDArray[np.int32]
    file_row: npt.NDArray[np.int64]

    def refuse(self, mask: npt.NDArray[np.bool_], reason: str, key: str, bad: BadRows) -> None:
        """Drops the rows of the mask as bad ones, in place: a copy would double the memory. key: column of the ids."""
        if not mask.any():
            return
        for file_id in np.unique(self.file_id[mask]):
            rows = mask & (self.file_id == file_id)
            bad.add(self.files[file_id], self.file_row[rows], self.columns[key][rows], reason)
        self.columns = {name: _compact(array, ~mask) for name, array in self.columns.items()}
        self.file_id, self.file_row = _compact(self.file_id, ~mask), _compact(self.file_row, ~mask)


def _compact(array: npt.NDArray[Any], keep: npt.NDArray[np.bool_]) -> npt.NDArray[Any]:
    end = 0
    for start in range(0, len(keep), COMPACT_ROWS):
        kept = array[start : start + COMPACT_ROWS][keep[start : start + COMPACT_ROWS]]
        array[end : end + len(kept)] = kept
        end += len(kept)
    return array[:end]


def read_table(
    path: str | Sequence[str],
    required: Sequence[str],
    optional: Sequence[str],
    bad: BadRows,
    tiers: Sequence[str] | None = None,
    newest: int | None = None,
    key: str = "data.path",
    unique: str = "id",
) -> Table:
    """Reads the required and optional columns of every file of `path`, sets bad rows aside, and joins the rest.

    tiers: the configured tiers, another name is a bad row; None takes all. newest: keep the rows of largest timestamp,
    of equal ones the last. unique: a repeated value in this column, if it is read, is a bad row.
    Returns query_embedding as (N, D) float32. Raises DataError naming the file and the column: missing file or column,
    a type that cannot be read, a dimension that differs between files, no rows.
    """
    sources = [open_source(filesystem, name, key) for filesystem, name in list_paths(path, key)]
    label = path if isinstance(path, str) else ", ".join(path)
    return check_sources(sources, label, required, optional, bad, tiers, newest, key, unique)


def check_sources(
    sources: Sequence[Source],
    label: str,
    required: Sequence[str],
    optional: Sequence[str],
    bad: BadRows,
    tiers: Sequence[str] | None = None,
    newest: int | None = None,
    key: str = "data.path",
    unique: str = "id",
) -> Table:
    """`read_table` of opened sources."""
    for source in sources:
        _check_columns(source, required, optional, key)
    files = [source.name for source in sources]
    sources = [source for source in sources if source.rows]
    total = sum(source.rows for source in sources)
    if total == 0:
        raise DataError(f"{key}={label} has no rows; check the log's export")
    wanted = [c for c in (*required, *optional) if all(c in s.schema.names for s in sources)]
    for column in sorted(set(optional) - set(wanted)):
        if any(column in s.schema.names for s in sources):
            log.warning("%s: %s is in some files only and is taken as absent", key, column)
    dim = _common_dim(sources, key) if "query_embedding" in wanted else None
    cutoff = newest_rows(sources, newest, key) if newest is not None and newest < total else None
    size = total if cutoff is None else cutoff.rows_kept

    kinds: dict[str, tuple[tuple[int, ...], type]] = {c: ((size,), rule.dtype) for c, rule in CONTRACT.items()}
    kinds |= {"query_embedding": ((size, dim or 0), np.float32), "model_tier": ((size,), np.int32)}
    columns: Columns = {c: np.empty(*kinds[c]) for c in wanted}
    file_id, file_row = np.empty(size, np.int32), np.empty(size, np.int64)
    tier_names: list[str] = list(tiers or ())
    filled = 0
    for source in sources:
        row = 0
        # closed: the threads end with an error too
        with block_threads() as pool, closing(ahead(guarded(source, wanted, _batch_rows(dim), key))) as batches:
            for batch in batches:
                rows = np.arange(row, row + batch.num_rows)
                row += batch.num_rows
                if cutoff is not None:
                    keep = cutoff.keep(times_of(batch.column("timestamp"), f"{key}={source.name}"))
                    batch, rows = batch.filter(pa.array(keep)), rows[keep]
                place = {name: array[filled : filled + batch.num_rows] for name, array in columns.items()}
                good = _check_batch(batch, rows, source, place, tier_names, tiers is not None, bad, key, pool)
                n = int(good.sum())
                if n < len(good):
                    for array in place.values():
                        _compact(array, good)
                file_id[filled : filled + n], file_row[filled : filled + n] = files.index(source.name), rows[good]
                filled += n
    columns = {name: array[:filled] for name, array in columns.items()}
    table = Table(columns, tier_names, size, label, files, file_id[:filled], file_row[:filled])
    if unique in columns and not distinct(columns[unique]):
        repeated = np.ones(filled, dtype=bool)
        repeated[np.unique(columns[unique], return_index=True)[1]] = False
        table.refuse(repeated, f"duplicate {unique}", unique, bad)
    return table


def distinct(values: npt.NDArray[np.uint64]) -> bool:
    """Whether no value is there twice: far sooner known than which ones are, and at once where they ascend."""
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
            # a batch of nulls, or a whole file of them, tells nothing
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
    tiers_fixed: bool,
    bad: BadRows,
    key: str,
    pool: Executor,
) -> npt.NDArray[np.bool_]:
    """Decodes the batch into the arrays of `place`, and tells which rows are good; each bad one goes under its first
    reason. rows: the batch's row numbers in the file.
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
    for name, out in place.items():  # not the batch's order: reasons go by the contract's, whatever the file's
        column, where = batch.column(name), f"{key}={source.name}: column {name}"
        if name == "query_embedding":
            norm2 = copying.norm2()
            refuse(~right_length, f"query_embedding has not {out.shape[1]} values")
            refuse(~np.isfinite(norm2), "query_embedding is not finite")
            refuse(norm2 == 0, "query_embedding has norm 0")
        elif name == "model_tier":
            out[:] = decode_tiers(column, tier_names, tiers_fixed, where)
            refuse(out == NULL_TIER, "model_tier is null")
            refuse(out == UNKNOWN_TIER, f"unknown model_tier (params.tiers={tier_names})")
        else:
            rule = CONTRACT[name]
            array, missing = (
                decode_times(column, where) if name == "timestamp" else decode_numbers(column, rule.dtype, where)
            )
            if name == "id" or (name == "query_id" and "id" not in place):
                ids = array
            if rule.holds(array) and not missing.any() and (rule.dtype is np.float32 or array.dtype.kind != "f"):
                out[:] = array
                continue
            if not rule.nullable:
                refuse(missing, f"{name} is null or not a number")
            if rule.dtype is not np.float32 and array.dtype.kind == "f":
                refuse(array != np.rint(array), f"{name} is not an integer")
            outside = rule.outside(array) & ~missing
            refuse(outside, f"{name} is outside {rule.bounds}")
            unusable = missing | outside
            out[:] = np.where(unusable, 0, array) if unusable.any() else array
    return good
