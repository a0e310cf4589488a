"""Trajectories as columns: Q distinct queries and N rows, each of which tried one config on one query.

Suffixes: Q queries, N rows, D dims, C configs.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from rb_gpu.errors import ConfigError, DataError
from rb_gpu.learn.blocks import block_threads, row_hashes
from rb_gpu.learn.config import DataConfig, ParamsConfig
from rb_gpu.learn.contradictions import check_merged, refuse_other_embeddings, warn_of_few_costs, warn_of_one_config
from rb_gpu.learn.decode import CONTRACT
from rb_gpu.learn.order import first_rows, put_in_order
from rb_gpu.learn.quarantine import BadRows
from rb_gpu.learn.room import Room
from rb_gpu.learn.sessions import one_of_each
from rb_gpu.learn.tables import HASH, Columns, Reading, Table, distinct, read_table
from rb_gpu.params import PARAMETERS, ConfigTable, SearchParams, quantise

log = logging.getLogger(__name__)

OUTCOME_REQUIRED = ("id", "precision", "recall", "latency_us")
QUERY_REQUIRED = ("query_embedding", "timestamp")
OUTCOME_OPTIONAL = (*PARAMETERS, "cost", "rating", "propensity")
QUERY_OPTIONAL = ("session",)


@dataclass(frozen=True)
class Source:
    """What was read: files, row count, bad rows by reason, the good rows' fingerprint, versions (None: unversioned)."""

    path: str = ""
    files: tuple[str, ...] = ()
    total_rows: int = 0
    bad_rows: dict[str, int] = field(default_factory=dict)
    fingerprint: str = ""
    versions: dict[str, int | None] = field(default_factory=dict)


@dataclass(frozen=True)
class Trajectories:
    """Columns of a validated table.

    x_QD: float32 embeddings. query_row: (N,) int64 row in x_QD. query_id: (Q,) uint64. query_time: (Q,) int64, the
    newest timestamp of the query's rows. config_id: (N,) int64 row of `configs`. precision, recall: (N,) float32.
    latency_us: (N,) int64. cost, propensity: (N,) float32, or None where not logged. rating: (N,) int8, 0 means none.
    timestamp: (N,) int64 UTC seconds. id: (N,) uint64. auto_default: True if no default was configured. session: (Q,)
    uint64, 0 means none, or None where not logged. feature_QF: float32 columns of data.features, or None.
    """

    x_QD: npt.NDArray[np.float32]
    query_row: npt.NDArray[np.int64]
    query_id: npt.NDArray[np.uint64]
    query_time: npt.NDArray[np.int64]
    config_id: npt.NDArray[np.int64]
    precision: npt.NDArray[np.float32]
    recall: npt.NDArray[np.float32]
    latency_us: npt.NDArray[np.int64]
    cost: npt.NDArray[np.float32] | None
    rating: npt.NDArray[np.int8]
    timestamp: npt.NDArray[np.int64]
    propensity: npt.NDArray[np.float32] | None
    id: npt.NDArray[np.uint64]
    configs: ConfigTable
    source: Source = field(default_factory=Source)
    auto_default: bool = False
    session: npt.NDArray[np.uint64] | None = None
    feature_QF: npt.NDArray[np.float32] | None = None

    def __len__(self) -> int:
        return len(self.id)

    def select_queries(self, keep_Q: npt.NDArray[np.bool_]) -> Trajectories:
        """The queries where keep_Q is true, each with all of its rows; config ids do not change."""
        new_row = np.cumsum(keep_Q) - 1
        rows = keep_Q[self.query_row]
        per_row = ("config_id", "precision", "recall", "latency_us", "rating", "timestamp", "id", "cost", "propensity")
        columns = {name: getattr(self, name) for name in per_row}
        taken: dict[str, Any] = {name: None if v is None else v[rows] for name, v in columns.items()}
        return replace(
            self,
            x_QD=_rows_of(self.x_QD, keep_Q),
            query_id=self.query_id[keep_Q],
            query_time=self.query_time[keep_Q],
            session=None if self.session is None else self.session[keep_Q],
            feature_QF=None if self.feature_QF is None else self.feature_QF[keep_Q],
            query_row=new_row[self.query_row[rows]],
            **taken,
        )


def _rows_of(x_QD: npt.NDArray[np.float32], keep_Q: npt.NDArray[np.bool_]) -> npt.NDArray[np.float32]:
    """The kept rows: a view where they are consecutive, else a copy."""
    rows = np.flatnonzero(keep_Q)
    if len(rows) and rows[-1] - rows[0] + 1 == len(rows):
        return x_QD[rows[0] : rows[-1] + 1]
    return x_QD[rows]


def split_by_time(trajectories: Trajectories, holdout: float) -> tuple[Trajectories, Trajectories]:
    """The oldest queries to learn from and the newest share `holdout` to evaluate on; a query is never on both sides.

    Queries with the same newest timestamp keep the table's order. For a loaded table, which is ordered by time, both
    sides are views. Raises DataError where a side would be empty.
    """
    n = len(trajectories.query_id)
    newest = round(holdout * n)
    if newest < 1 or newest >= n:
        raise DataError(
            f"eval.holdout={holdout:g} leaves {n - newest} of {n} queries to learn from and {newest} to evaluate on; "
            "log more queries or change eval.holdout"
        )
    held = np.zeros(n, dtype=bool)
    held[np.argsort(trajectories.query_time, kind="stable")[n - newest :]] = True
    return trajectories.select_queries(~held), trajectories.select_queries(held)


def load(
    data: DataConfig, params: ParamsConfig, quarantine: Path | None = None, room: Room | None = None
) -> Trajectories:
    """Reads, validates and joins the tables of `data`, with queries ordered by their newest timestamp, whatever the
    order of the rows; bad rows go to the quarantine file. Of sessions that keep their config only one query each is
    returned, with a warning (sessions.py). room: where the embeddings lie, and the processes that share
    the reading.

    Raises DataError naming file, column and remedy; ConfigError where the settings contradict the table.
    """
    room = room or Room()
    if data.path is None:
        raise ConfigError("data.path is not set; give data.path=FILE, DIR or GLOB, or leave data=sample")
    features = tuple(data.features)
    meant = sorted({"query_embedding", "model_tier", *CONTRACT} & set(features))
    if meant:
        raise ConfigError(f"data.features={list(features)}: {meant[0]} has a meaning of its own; leave it out")
    tiers = None if params.tiers == "auto" else list(params.tiers)
    absent = SearchParams(**({} if params.default == "auto" else params.default)).as_dict()
    bad = BadRows()
    queries = None
    if data.queries is None:
        required = (*OUTCOME_REQUIRED, *QUERY_REQUIRED, *features)
        reading = Reading(tiers, data.capacity, room=room, store=data.store, absent=absent)
        outcomes = read_table(data.path, required, (*OUTCOME_OPTIONAL, "query_id", *QUERY_OPTIONAL), bad, reading)
    else:
        per_query = ("query_id", *QUERY_REQUIRED, *features)
        reading = Reading(key="data.queries", unique="query_id", room=room, store=data.queries_store)
        queries = read_table(data.queries, per_query, QUERY_OPTIONAL, bad, reading)
        reading = Reading(tiers, room=room, store=data.store, absent=absent)
        outcomes = read_table(data.path, (*OUTCOME_REQUIRED, "query_id"), OUTCOME_OPTIONAL, bad, reading)
    seen = outcomes.total_rows + (queries.total_rows if queries else 0)
    columns = join(outcomes, queries, bad, data.capacity, features)
    if len(bad):
        log.warning("set aside %d of %d rows: %s", len(bad), seen, bad.by_reason())
        if quarantine is not None and room.ranks.rank == 0:
            bad.write(quarantine)
            log.warning("bad rows are listed in %s", quarantine)
    bad.check(seen, data.max_bad_fraction, outcomes.source)
    if len(columns["id"]) == 0:
        raise DataError(f"data.path={outcomes.source}: no row is left to learn from; check data.queries' query_id")
    files = (*outcomes.files, *(queries.files if queries else ()))
    versions = {"path": outcomes.version} | ({"queries": queries.version} if queries else {})
    source = Source(outcomes.source, files, seen, bad.by_reason(), versions=versions)
    put_in_order(columns, room, (*QUERY_OPTIONAL, *features))
    trajectories = assemble(columns, outcomes.tier_names, params, source, features)
    warn_of_few_costs(trajectories.cost, trajectories.config_id, trajectories.id, trajectories.configs)
    warn_of_one_config(trajectories.config_id, trajectories.configs, outcomes.source)
    return _independent(trajectories, room)


def _independent(table: Trajectories, room: Room) -> Trajectories:
    """One query of each session if sessions keep their config; without propensities this cannot be told."""
    if table.session is None or table.propensity is None:
        return table
    keep_Q = one_of_each(table.session, table.query_id, table.query_row, table.config_id, table.propensity)
    if keep_Q is None:
        return table
    few = replace(table, x_QD=np.empty((len(keep_Q), 0), np.float32)).select_queries(keep_Q)
    return replace(few, x_QD=room.keep(table.x_QD, np.flatnonzero(keep_Q)))


def join(
    outcomes: Table, queries: Table | None, bad: BadRows, capacity: int | None, features: Sequence[str] = ()
) -> Columns:
    """Joins rows to their queries: adds query_row (N,) and the queries' x_QD, hash_Q, query_id, query_time, and session
    and features where present. If a query's rows carry its columns, those of the row of least id are used, except for
    its time.
    """
    columns = outcomes.columns
    if queries is None:
        refuse_other_embeddings(outcomes, bad)
        told = {name: columns.pop(name) for name in (*QUERY_OPTIONAL, *features) if name in columns}
        group, x, hash_N = columns.pop("query_id", columns["id"]), columns.pop("query_embedding"), columns.pop(HASH)
        if group is columns["id"] or distinct(group):
            columns |= {"x_QD": x, "hash_Q": hash_N, "query_id": group, "query_row": np.arange(len(group))}
        else:
            query_id, first, row = first_rows(group, columns["id"])
            order = np.argsort(first, kind="stable")  # queries stay in the order of the file, not of their ids
            rank = np.empty_like(order)
            rank[order] = np.arange(len(order))
            columns["x_QD"], columns["hash_Q"] = outcomes.room.keep(x, first[order]), hash_N[first[order]]
            columns["query_id"], columns["query_row"] = query_id[order], rank[row]
            told = {name: values[first[order]] for name, values in told.items()}
    else:
        table = queries.columns
        told = {name: table[name] for name in (*QUERY_OPTIONAL, *features) if name in table}
        query_id, first = np.unique(table["query_id"], return_index=True)
        slot = np.minimum(np.searchsorted(query_id, columns["query_id"]), len(query_id) - 1)
        known = query_id[slot] == columns["query_id"] if len(query_id) else np.zeros(len(slot), bool)
        outcomes.refuse(~known, "query_id is not in data.queries, or is bad there", "id", bad)
        columns, slot = outcomes.columns, slot[known]
        del columns["query_id"]
        columns["query_row"] = first[slot]
        columns["timestamp"] = table["timestamp"][columns["query_row"]]
        if capacity is not None and capacity < len(columns["id"]):
            newest = np.sort(np.argsort(columns["timestamp"], kind="stable")[-capacity:])
            columns = {name: array[newest] for name, array in columns.items()}
        used, columns["query_row"] = np.unique(columns["query_row"], return_inverse=True)
        columns |= {"x_QD": table["query_embedding"], "hash_Q": table[HASH], "query_id": table["query_id"]}
        if len(used) < len(table["query_id"]):
            columns["x_QD"] = queries.room.keep(columns["x_QD"], used)
            columns |= {name: columns[name][used] for name in ("hash_Q", "query_id")}
            told = {name: values[used] for name, values in told.items()}
    columns |= told
    columns["query_time"] = np.full(len(columns["query_id"]), np.iinfo(np.int64).min)
    np.maximum.at(columns["query_time"], columns["query_row"], columns["timestamp"])
    return columns


def assemble(
    columns: Columns, tier_names: Sequence[str], params: ParamsConfig, source: Source, features: Sequence[str] = ()
) -> Trajectories:
    """Quantises parameters to configs, orders tiers, finds the default. columns: from `join`; hash_Q may be missing."""
    n = len(columns["id"])
    given = {} if params.default == "auto" else dict(params.default)
    base = SearchParams(**given)
    price = columns.get("cost", columns["latency_us"]).astype(np.float64)
    latency_us = columns["latency_us"]
    tiers, codes = _order_tiers(columns.get("model_tier"), list(tier_names), params, base, price, latency_us)
    absent = {name: getattr(base, name) for name in PARAMETERS if name != "model_tier"}
    raw: dict[str, npt.NDArray[Any]] = {k: columns[k] if k in columns else np.full(n, v) for k, v in absent.items()}
    table, config_id = quantise(raw | {"model_tier": codes}, tiers, params.temperature_step, params.context_step)
    check_merged(raw, config_id, columns.get("propensity"), table, params)
    table, config_id = _with_default(table, config_id, given, base, params, price, latency_us)
    trajectories = Trajectories(
        x_QD=columns["x_QD"],
        query_row=columns["query_row"],
        query_id=columns["query_id"],
        query_time=columns["query_time"],
        config_id=config_id,
        precision=columns["precision"],
        recall=columns["recall"],
        latency_us=latency_us,
        cost=columns.get("cost"),
        rating=columns.get("rating", np.zeros(n, np.int8)),
        timestamp=columns["timestamp"],
        propensity=columns.get("propensity"),
        id=columns["id"],
        configs=table,
        auto_default=not given,
        session=columns.get("session"),
        feature_QF=np.stack([columns[name] for name in features], axis=1) if features else None,
    )
    return replace(trajectories, source=replace(source, fingerprint=_fingerprint(trajectories, columns.get("hash_Q"))))


def _order_tiers(
    codes: npt.NDArray[np.int32] | None,
    names: list[str],
    params: ParamsConfig,
    base: SearchParams,
    price: npt.NDArray[np.float64],
    latency_us: npt.NDArray[np.int64],
) -> tuple[list[str], npt.NDArray[np.int64]]:
    """Tiers, cheapest first (by mean cost, then by mean latency), and the index of each row's tier among them."""
    if codes is None:
        tiers = [base.model_tier] if params.tiers == "auto" else list(params.tiers)
        if base.model_tier not in tiers:
            raise ConfigError(
                f"params.default.model_tier={base.model_tier} is not one of params.tiers={tiers} and the table has no "
                "model_tier column; set params.default={model_tier: ...} to the tier that ran"
            )
        return tiers, np.full(len(price), tiers.index(base.model_tier))
    if params.tiers != "auto":
        return names, codes.astype(np.int64)
    count = np.bincount(codes, minlength=len(names))
    mean_price, mean_latency = (
        np.bincount(codes, weights=w, minlength=len(names)) / np.maximum(count, 1) for w in (price, latency_us)
    )
    order = sorted((i for i in range(len(names)) if count[i]), key=lambda i: (mean_price[i], mean_latency[i], names[i]))
    rank = np.zeros(len(names), np.int64)
    rank[order] = np.arange(len(order))
    return [names[i] for i in order], rank[codes]


def _with_default(
    table: ConfigTable,
    config_id: npt.NDArray[np.int64],
    given: dict[str, Any],
    base: SearchParams,
    params: ParamsConfig,
    price: npt.NDArray[np.float64],
    latency_us: npt.NDArray[np.int64],
) -> tuple[ConfigTable, npt.NDArray[np.int64]]:
    """The table with its default set: the configured one (added if it was never tried), or the most logged one."""
    if not given:
        count = np.bincount(config_id, minlength=len(table))
        mean_price = np.bincount(config_id, weights=price, minlength=len(table)) / count
        mean_latency = np.bincount(config_id, weights=latency_us, minlength=len(table)) / count
        return replace(table, default=int(np.lexsort((mean_latency, mean_price, -count))[0])), config_id
    if base.model_tier not in table.tiers:
        raise ConfigError(
            f"params.default.model_tier={base.model_tier} is not one of the tiers {list(table.tiers)}; "
            "set params.default.model_tier"
        )
    rounded = {name: np.array([getattr(base, name)]) for name in PARAMETERS}
    rounded["model_tier"] = np.array([table.tiers.index(base.model_tier)])
    wanted = quantise(rounded, table.tiers, params.temperature_step, params.context_step)[0][0]
    known = table.id_of(wanted)
    if known is not None:
        return replace(table, default=known), config_id
    log.warning("params.default=%s was never tried: nothing can be shown to beat it; log some queries under it, "
                "or set params.default=auto, the config most logged", wanted)  # fmt: skip
    return ConfigTable.from_params([*table, wanted], table.tiers, len(table)), config_id


def _fingerprint(trajectories: Trajectories, hash_Q: npt.NDArray[np.uint64] | None) -> str:
    """sha256 of every column; embeddings enter by their row hashes, which are computed here if the loader did not."""
    columns = {
        column.name: getattr(part, column.name)
        for part in (trajectories, trajectories.configs)
        for column in fields(part)
        if isinstance(getattr(part, column.name), np.ndarray)
    }
    x_QD = columns.pop("x_QD")
    with block_threads() as pool:
        columns["x_QD"] = row_hashes(x_QD, pool) if hash_Q is None else hash_Q
        digests = pool.map(lambda column: hashlib.sha256(np.ascontiguousarray(column).data).digest(), columns.values())
        digest = hashlib.sha256(b"".join(digests))
    digest.update(repr((list(columns), trajectories.configs.tiers, trajectories.configs.default)).encode())
    return digest.hexdigest()
