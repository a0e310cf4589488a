"""Reads trajectory tables into checked NumPy columns; bad rows are set aside by reason.

Only the columns of design section 4 are read. Suffixes: N rows, D dims.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from rb_gpu.errors import DataError
from rb_gpu.learn.decode import decode_embeddings, embedding_dim
from rb_gpu.learn.sources import Source, guarded, list_paths, open_source
from rb_gpu.params import MAX_COUNT, MAX_TEMPERATURE

log = logging.getLogger(__name__)

OFFENDERS_SHOWN = 5

Columns = dict[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class Column:
    """One column of the contract: its NumPy dtype, the least and largest value, and whether a null is a bad row."""

    dtype: type
    least: float = -np.inf
    largest: float = np.inf
    nullable: bool = False
    open_below: bool = False


CONTRACT: dict[str, Column] = {
    "id": Column(np.uint64),
    "query_id": Column(np.uint64),
    "ef_search": Column(np.int64, 1, MAX_COUNT),
    "n_probes": Column(np.int64, 1, MAX_COUNT),
    "context_tokens": Column(np.int64, 1, MAX_COUNT),
    "temperature": Column(np.float32, 0, MAX_TEMPERATURE),
    "precision": Column(np.float32, 0, 1),
    "recall": Column(np.float32, 0, 1),
    "latency_us": Column(np.int64, 0),
    "cost": Column(np.float32, 0),
    "rating": Column(np.int8, 1, 5, nullable=True),
    "timestamp": Column(np.int64),
    "propensity": Column(np.float32, 0, 1, open_below=True),
}


@dataclass
class BadRows:
    """Bad rows, counted by reason, with where each one stands: (file, row in the file, id, reason)."""

    rows: list[tuple[str, int, int, str]] = field(default_factory=list)

    def by_reason(self) -> dict[str, int]:
        """How many bad rows each reason has, most first."""
        return dict(Counter(reason for *_, reason in self.rows).most_common())

    def add(self, source: str, row: npt.NDArray[np.int64], ids: npt.NDArray[Any], reason: str) -> None:
        """Adds the given rows of one file under one reason."""
        self.rows.extend((source, int(r), int(i), reason) for r, i in zip(row, ids, strict=True))

    def write(self, path: Path) -> None:
        """Writes the quarantine table: file, row (in the file), id, reason."""
        columns = list(zip(*self.rows, strict=True)) or [(), (), (), ()]
        schema = pa.schema([("file", pa.string()), ("row", pa.int64()), ("id", pa.uint64()), ("reason", pa.string())])
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table([pa.array(c, t.type) for c, t in zip(columns, schema, strict=True)], schema), path)

    def check(self, total: int, max_bad_fraction: float, path: str) -> None:
        """Raises DataError where no good row is left, or more than max_bad_fraction of the rows are bad."""
        bad = len(self.rows)
        if bad < total and bad <= max_bad_fraction * total:
            return
        shown = "; ".join(f"{Path(s).name} row {r} (id {i}): {why}" for s, r, i, why in self.rows[:OFFENDERS_SHOWN])
        bound = f"over data.max_bad_fraction={max_bad_fraction:g}" if bad < total else "and none is left to learn from"
        counts = ", ".join(f"{reason}: {n}" for reason, n in self.by_reason().items())
        raise DataError(
            f"data.path={path}: {bad} of {total} rows are bad, {bound} ({counts}); first: {shown}; "
            "mend the log or raise data.max_bad_fraction"
        )


@dataclass
class Table:
    """Good rows of one or several files. tier: (N,) int32 codes into tier_names, absent where no file has the column.

    columns has only what every file holds. source: what was read, for messages.
    """

    columns: Columns
    tier_names: list[str]
    total_rows: int
    source: str
    files: list[str]


def read_table(
    path: str | Sequence[str],
    required: Sequence[str],
    optional: Sequence[str],
    bad: BadRows,
    tiers: Sequence[str] | None = None,
    newest: int | None = None,
    key: str = "data.path",
) -> Table:
    """Reads the required and optional columns of every file of `path`, sets bad rows aside, and joins the rest.

    tiers: the configured tiers, another name is a bad row; None takes all. newest: keep the rows of largest timestamp.
    Returns query_embedding as (N, D) float32. Raises DataError naming the file and the column: missing file or column,
    a type that cannot be read, a dimension that differs between files, no rows.
    """
    sources = [open_source(filesystem, name, key) for filesystem, name in list_paths(path, key)]
    label = path if isinstance(path, str) else ", ".join(path)
    for source in sources:
        missing = [c for c in required if c not in source.schema.names]
        if missing:
            raise DataError(
                f"{key}={source.name} has no column {missing[0]}; add it (the table needs {', '.join(required)})"
            )
    total = sum(source.rows for source in sources)
    if total == 0:
        raise DataError(f"{key}={label} has no rows; check the log's export")
    wanted = [c for c in (*required, *optional) if all(c in s.schema.names for s in sources)]
    for column in set(optional) - set(wanted):
        if any(column in s.schema.names for s in sources):
            log.warning("%s: %s is in some files only and is taken as absent", key, column)
    dim = _common_dim(sources, key) if "query_embedding" in wanted else None
    cutoff = _cutoff(sources, newest) if newest is not None and newest < total else None
    size = total if cutoff is None else min(total, cutoff.rows_kept)

    columns: Columns = {c: np.empty(size, CONTRACT[c].dtype) for c in wanted if c in CONTRACT}
    if dim is not None:
        columns["query_embedding"] = np.empty((size, dim), np.float32)
    if "model_tier" in wanted:
        columns["model_tier"] = np.empty(size, np.int32)
    origin_file, origin_row = np.empty(size, np.int32), np.empty(size, np.int64)
    tier_names: list[str] = list(tiers or ())
    filled = 0
    for file_id, source in enumerate(sources):
        row = 0
        for batch in guarded(source, wanted, key):
            rows = np.arange(row, row + batch.num_rows)
            row += batch.num_rows
            if cutoff is not None:
                keep = cutoff.keep(_timestamps(batch.column("timestamp"), source.name))
                batch, rows = batch.filter(pa.array(keep)), rows[keep]
            values, good = _check_batch(batch, rows, source.name, dim, tier_names, tiers is not None, bad, key)
            n = int(good.sum())
            for name, array in values.items():
                columns[name][filled : filled + n] = array if n == len(good) else array[good]
            origin_file[filled : filled + n], origin_row[filled : filled + n] = file_id, rows[good]
            filled += n
    columns = {name: array[:filled] for name, array in columns.items()}
    if "id" in columns:
        columns = _drop_duplicates(columns, origin_file[:filled], origin_row[:filled], sources, bad)
    kept_total = total if cutoff is None else cutoff.rows_kept
    return Table(columns, tier_names, kept_total, label, [source.name for source in sources])


def _common_dim(sources: Sequence[Source], key: str) -> int:
    dims: dict[int, str] = {}
    for source in sources:
        if source.rows == 0:
            continue
        first = next(iter(guarded(source, ["query_embedding"], key))).column(0)
        dims.setdefault(embedding_dim(first, f"{key}={source.name}"), source.name)
    if len(dims) > 1:
        (dim_a, file_a), (dim_b, file_b) = list(dims.items())[:2]
        raise DataError(
            f"{key}: query_embedding has {dim_a} dimensions in {file_a} and {dim_b} in {file_b}; "
            "train on one embedder's files at a time"
        )
    return next(iter(dims))


@dataclass
class _Cutoff:
    """Rows with a timestamp over `after` stay, and the last `ties` of those equal to it."""

    after: int
    ties_to_skip: int
    rows_kept: int

    def keep(self, timestamp: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        equal = timestamp == self.after
        skipped = equal & (np.cumsum(equal) <= self.ties_to_skip)
        self.ties_to_skip -= int(skipped.sum())
        kept: npt.NDArray[np.bool_] = (timestamp >= self.after) & ~skipped
        return kept


def _cutoff(sources: Sequence[Source], newest: int) -> _Cutoff:
    times = np.concatenate(
        [_timestamps(b.column(0), s.name) for s in sources for b in s.batches(["timestamp"])] or [np.empty(0, np.int64)]
    )
    after = int(np.partition(times, len(times) - newest)[len(times) - newest])
    ties = int((times == after).sum()) - (newest - int((times > after).sum()))
    return _Cutoff(after, ties, newest)


def _timestamps(column: pa.Array, source: str) -> npt.NDArray[np.int64]:
    if pa.types.is_timestamp(column.type):
        column = pc.cast(column, pa.timestamp("s"), safe=False)
    elif not pa.types.is_integer(column.type):
        raise DataError(f"{source}: timestamp is {column.type}; store a timestamp, or integer UTC seconds")
    return np.asarray(pc.fill_null(pc.cast(column, pa.int64()), 0).to_numpy(zero_copy_only=False), np.int64)


def _check_batch(
    batch: pa.RecordBatch,
    rows: npt.NDArray[np.int64],
    source: str,
    dim: int | None,
    tier_names: list[str],
    tiers_fixed: bool,
    bad: BadRows,
    key: str,
) -> tuple[Columns, npt.NDArray[np.bool_]]:
    """The batch's columns as NumPy, and which rows are good; each bad row goes under its first reason."""
    good = np.ones(batch.num_rows, dtype=bool)
    ids = np.zeros(batch.num_rows, np.uint64)
    values: Columns = {}

    def refuse(mask: npt.NDArray[np.bool_], reason: str) -> None:
        hit = mask & good
        if hit.any():
            bad.add(source, rows[hit], ids[hit], reason)
            good[hit] = False

    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        if name == "query_embedding":
            embedding, right_length = decode_embeddings(column, dim or 0, f"{key}={source}")
            refuse(~right_length, f"query_embedding has not {dim} values")
            norm2 = np.einsum("nd,nd->n", embedding, embedding, dtype=np.float64)
            refuse(~np.isfinite(norm2), "query_embedding is not finite")
            refuse(norm2 == 0, "query_embedding has norm 0")
            values[name] = embedding
        elif name == "model_tier":
            codes = _tier_codes(column, tier_names, tiers_fixed)
            refuse(codes == -1, "model_tier is null")
            refuse(codes == -2, f"unknown model_tier (params.tiers={tier_names})")
            values[name] = codes
        else:
            rule = CONTRACT[name]
            array, null = _numbers(column, name, rule, f"{key}={source}")
            if name in ("id", "query_id"):
                ids = array if name == "id" else ids
            if not rule.nullable:
                refuse(null, f"{name} is null or not a number")
            below = array <= rule.least if rule.open_below else array < rule.least
            outside = (below | (array > rule.largest)) & ~null
            bracket = "(" if rule.open_below else "["
            refuse(outside, f"{name} is outside {bracket}{rule.least:g}, {rule.largest:g}]")
            values[name] = np.where(null, 0, array).astype(rule.dtype)
    return values, good


def _numbers(column: pa.Array, name: str, rule: Column, source: str) -> tuple[npt.NDArray[Any], npt.NDArray[np.bool_]]:
    if name == "timestamp":
        return _timestamps(column, source), column.is_null().to_numpy(zero_copy_only=False)
    if not (pa.types.is_integer(column.type) or pa.types.is_floating(column.type)):
        raise DataError(f"{source}: column {name} is {column.type}; store it as a number")
    if rule.dtype is np.uint64 and not pa.types.is_integer(column.type):
        raise DataError(f"{source}: column {name} is {column.type}; store ids as uint64")
    null = column.is_null().to_numpy(zero_copy_only=False)
    array = np.asarray(pc.fill_null(column, 0).to_numpy(zero_copy_only=False))
    if array.dtype.kind == "f":
        null = null | ~np.isfinite(array)
        array = np.where(null, 0, array)
        if rule.dtype is np.int64:
            null = null | (array != np.rint(array))
    return array, null


def _tier_codes(column: pa.Array, tier_names: list[str], tiers_fixed: bool) -> npt.NDArray[np.int32]:
    """Codes into tier_names, which grows unless tiers_fixed; -1 null, -2 unknown."""
    encoded = column if pa.types.is_dictionary(column.type) else pc.dictionary_encode(column)
    local = encoded.dictionary.to_pylist()
    mapping = np.full(len(local) + 1, -1, np.int32)
    for code, name in enumerate(local):
        if name in tier_names:
            mapping[code] = tier_names.index(name)
        elif name and not tiers_fixed:
            tier_names.append(name)
            mapping[code] = len(tier_names) - 1
        elif name:
            mapping[code] = -2
    codes: npt.NDArray[np.int32] = mapping[
        np.asarray(pc.fill_null(encoded.indices, len(local)).to_numpy(zero_copy_only=False))
    ]
    return codes


def _drop_duplicates(
    columns: Columns,
    origin_file: npt.NDArray[np.int32],
    origin_row: npt.NDArray[np.int64],
    sources: Sequence[Source],
    bad: BadRows,
) -> Columns:
    _, first = np.unique(columns["id"], return_index=True)
    if len(first) == len(columns["id"]):
        return columns
    repeated = np.ones(len(columns["id"]), dtype=bool)
    repeated[first] = False
    for file_id in np.unique(origin_file[repeated]):
        rows = repeated & (origin_file == file_id)
        bad.add(sources[file_id].name, origin_row[rows], columns["id"][rows], "duplicate id")
    return {name: array[~repeated] for name, array in columns.items()}
