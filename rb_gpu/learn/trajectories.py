"""Trajectories as columns: Q distinct queries, N rows that each try one config on one query.

Suffixes: Q queries, N rows, D dims, C configs.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from rb_gpu.errors import ConfigError, DataError
from rb_gpu.learn.config import DataConfig, ParamsConfig
from rb_gpu.learn.tables import BadRows, Columns, Table, read_table
from rb_gpu.params import PARAMETERS, ConfigTable, SearchParams, quantise
from rb_gpu.types import QueryTrajectory

log = logging.getLogger(__name__)

OUTCOME_REQUIRED = ("id", "precision", "recall", "latency_us")
OUTCOME_OPTIONAL = (*PARAMETERS, "cost", "rating", "propensity")


@dataclass(frozen=True)
class Source:
    """What was read: files, rows seen, bad rows by reason, sha256 of the good rows' content."""

    path: str = ""
    files: tuple[str, ...] = ()
    total_rows: int = 0
    bad_rows: dict[str, int] = field(default_factory=dict)
    fingerprint: str = ""


@dataclass(frozen=True)
class Trajectories:
    """Columns of a checked table.

    x_QD: float32 embeddings. query_row: (N,) int64 row in x_QD. query_id: (Q,) uint64. query_time: (Q,) int64, the
    newest timestamp of the query's rows. config_id: (N,) int64 row of `configs`. precision, recall: (N,) float32.
    latency_us: (N,) int64. cost, propensity: (N,) float32, or None where not logged. rating: (N,) int8, 0 is none.
    timestamp: (N,) int64 UTC seconds. id: (N,) uint64.
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

    def __len__(self) -> int:
        return len(self.id)

    @property
    def has_default_pairs(self) -> bool:
        """Whether every query was tried under the default and under another config, so that differences are paired."""
        tries = np.bincount(self.query_row, minlength=len(self.query_id))
        default = np.bincount(self.query_row[self.config_id == self.configs.default], minlength=len(self.query_id))
        return bool((default == 1).all() and (tries > 1).all())

    def select_queries(self, keep_Q: npt.NDArray[np.bool_]) -> Trajectories:
        """The rows of the queries where keep_Q, with every row of each; ids of configs stay."""
        new_row = np.cumsum(keep_Q) - 1
        rows = keep_Q[self.query_row]
        per_row = ("config_id", "precision", "recall", "latency_us", "rating", "timestamp", "id", "cost", "propensity")
        columns = {name: getattr(self, name) for name in per_row}
        taken: dict[str, Any] = {name: None if v is None else v[rows] for name, v in columns.items()}
        return replace(
            self,
            x_QD=self.x_QD if keep_Q.all() else self.x_QD[keep_Q],
            query_id=self.query_id[keep_Q],
            query_time=self.query_time[keep_Q],
            query_row=new_row[self.query_row[rows]],
            **taken,
        )


def split_by_time(trajectories: Trajectories, holdout: float) -> tuple[Trajectories, Trajectories]:
    """The oldest queries to learn from and the newest share `holdout` to evaluate on; a query is never on both sides.

    Queries that share their newest timestamp keep the table's order. Raises DataError where a side would be empty.
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


def load(data: DataConfig, params: ParamsConfig, quarantine: Path | None = None) -> Trajectories:
    """Reads, checks and joins the tables of `data`; bad rows go to the quarantine file.

    Raises DataError naming file, column and remedy; ConfigError where the settings contradict the table.
    """
    if data.path is None:
        raise ConfigError("data.path is not set; give data.path=FILE, DIR or GLOB, or leave data=sample")
    tiers = None if params.tiers == "auto" else list(params.tiers)
    bad = BadRows()
    queries = None
    if data.queries is None:
        required = (*OUTCOME_REQUIRED, "query_embedding", "timestamp")
        outcomes = read_table(data.path, required, (*OUTCOME_OPTIONAL, "query_id"), bad, tiers, data.capacity)
    else:
        queries = read_table(data.queries, ("query_id", "query_embedding", "timestamp"), (), bad, key="data.queries")
        outcomes = read_table(data.path, (*OUTCOME_REQUIRED, "query_id"), OUTCOME_OPTIONAL, bad, tiers)
    seen = outcomes.total_rows + (queries.total_rows if queries else 0)
    columns = _join(outcomes, queries, bad, data.capacity)
    if bad.rows:
        log.warning("set %d of %d rows aside: %s", len(bad.rows), seen, bad.by_reason())
        if quarantine is not None:
            bad.write(quarantine)
            log.warning("bad rows are listed in %s", quarantine)
    bad.check(seen, data.max_bad_fraction, outcomes.source)
    if len(columns["id"]) == 0:
        raise DataError(f"data.path={outcomes.source}: no row is left to learn from; check data.queries' query_id")
    files = (*outcomes.files, *(queries.files if queries else ()))
    source = Source(outcomes.source, files, seen, bad.by_reason())
    return assemble(columns, outcomes.tier_names, params, source)


def _join(outcomes: Table, queries: Table | None, bad: BadRows, capacity: int | None) -> Columns:
    """Rows with the row of their query: adds query_row (N,) and the query table's x_QD, query_id, query_time."""
    columns = outcomes.columns
    if queries is None:
        group = columns.pop("query_id", columns["id"])
        query_id, first, row = np.unique(group, return_index=True, return_inverse=True)
        order = np.argsort(first, kind="stable")  # queries stay in the order of the file, not of their ids
        rank = np.empty_like(order)
        rank[order] = np.arange(len(order))
        x = columns.pop("query_embedding")
        columns["x_QD"] = x if len(first) == len(x) else x[first[order]]
        columns["query_id"], columns["query_row"] = query_id[order], rank[row]
    else:
        table = queries.columns
        query_id, first = np.unique(table["query_id"], return_index=True)
        slot = np.minimum(np.searchsorted(query_id, columns["query_id"]), len(query_id) - 1)
        known = query_id[slot] == columns["query_id"] if len(query_id) else np.zeros(len(slot), bool)
        if not known.all():
            lost = np.flatnonzero(~known)
            bad.add(outcomes.source, lost, columns["id"][lost], "query_id is not in data.queries, or is bad there")
        columns = {name: array[known] for name, array in columns.items() if name != "query_id"}
        columns["query_row"] = first[slot[known]] if len(query_id) else slot[known]
        columns["timestamp"] = table["timestamp"][columns["query_row"]]
        if capacity is not None and capacity < len(columns["id"]):
            newest = np.sort(np.argsort(columns["timestamp"], kind="stable")[-capacity:])
            columns = {name: array[newest] for name, array in columns.items()}
        used, columns["query_row"] = np.unique(columns["query_row"], return_inverse=True)
        columns["x_QD"], columns["query_id"] = table["query_embedding"], table["query_id"]
        if len(used) < len(table["query_id"]):
            columns["x_QD"], columns["query_id"] = columns["x_QD"][used], columns["query_id"][used]
    columns["query_time"] = np.full(len(columns["query_id"]), np.iinfo(np.int64).min)
    np.maximum.at(columns["query_time"], columns["query_row"], columns["timestamp"])
    return columns


def assemble(columns: Columns, tier_names: Sequence[str], params: ParamsConfig, source: Source) -> Trajectories:
    """Quantises parameters to configs, orders tiers, finds the default. Columns as `_join` leaves them."""
    n = len(columns["id"])
    given = {} if params.default == "auto" else dict(params.default)
    unknown = set(given) - set(PARAMETERS)
    if unknown:
        raise ConfigError(f"params.default.{min(unknown)} is no search parameter; use {', '.join(PARAMETERS)}")
    base = SearchParams(**given)
    price = columns.get("cost", columns["latency_us"]).astype(np.float64)
    tiers, codes = _order_tiers(columns.get("model_tier"), list(tier_names), params, base, price, n)
    absent = {
        "ef_search": base.ef_search,
        "n_probes": base.n_probes,
        "context_tokens": base.context_tokens,
        "temperature": base.temperature,
    }
    raw: dict[str, npt.NDArray[Any]] = {k: columns[k] if k in columns else np.full(n, v) for k, v in absent.items()}
    table, config_id = quantise(raw | {"model_tier": codes}, tiers, params.temperature_step, params.context_step)
    table, config_id = _with_default(table, config_id, given, base, params, price, columns["latency_us"])
    trajectories = Trajectories(
        x_QD=columns["x_QD"],
        query_row=columns["query_row"],
        query_id=columns["query_id"],
        query_time=columns["query_time"],
        config_id=config_id,
        precision=columns["precision"],
        recall=columns["recall"],
        latency_us=columns["latency_us"],
        cost=columns.get("cost"),
        rating=columns.get("rating", np.zeros(n, np.int8)),
        timestamp=columns["timestamp"],
        propensity=columns.get("propensity"),
        id=columns["id"],
        configs=table,
    )
    return replace(trajectories, source=replace(source, fingerprint=_fingerprint(trajectories)))


def _order_tiers(
    codes: npt.NDArray[np.int32] | None,
    names: list[str],
    params: ParamsConfig,
    base: SearchParams,
    price: npt.NDArray[np.float64],
    n: int,
) -> tuple[list[str], npt.NDArray[np.int64]]:
    """Tiers cheapest first (by mean cost, where not logged by latency) and each row's index among them."""
    if codes is None:
        tiers = [base.model_tier] if params.tiers == "auto" else list(params.tiers)
        if base.model_tier not in tiers:
            raise ConfigError(
                f"params.default.model_tier={base.model_tier} is not one of params.tiers={tiers} and the table has no "
                "model_tier column; set params.default={model_tier: ...} to the tier that ran"
            )
        return tiers, np.full(n, tiers.index(base.model_tier))
    if params.tiers != "auto":
        return names, codes.astype(np.int64)
    count = np.bincount(codes, minlength=len(names))
    mean_price = np.bincount(codes, weights=price, minlength=len(names)) / np.maximum(count, 1)
    order = sorted((i for i in range(len(names)) if count[i]), key=lambda i: (mean_price[i], names[i]))
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
    """The table with its default row set: the configured one (added where it was never tried), or the most logged."""
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
    log.warning("the default %s was never tried; improvement over it is unknown", wanted)
    return ConfigTable.from_params([*table, wanted], table.tiers, len(table)), config_id


def _fingerprint(trajectories: Trajectories) -> str:
    digest = hashlib.sha256()
    for name in ("id", "x_QD", "query_row", "config_id", "precision", "recall", "latency_us", "timestamp"):
        digest.update(np.ascontiguousarray(getattr(trajectories, name)).data)
    return digest.hexdigest()


def from_trajectories(
    trajectories: Sequence[QueryTrajectory], params: ParamsConfig | None = None, source: Source | None = None
) -> Trajectories:
    """Columns of trajectory objects, for a service or a notebook. Raises DataError where there is none."""
    if not trajectories:
        raise DataError("no trajectories were given; record some queries first")
    params = params or ParamsConfig()
    found = sorted({t.search_params.model_tier for t in trajectories})
    names = found if params.tiers == "auto" else list(params.tiers)
    unknown = set(found) - set(names)
    if unknown:
        raise DataError(f"model_tier={min(unknown)} is not one of params.tiers={names}; add it or drop its rows")
    column: dict[str, npt.NDArray[Any]] = {
        "id": np.array([t.id for t in trajectories], np.uint64),
        "query_id": np.array([t.id if t.query_id is None else t.query_id for t in trajectories], np.uint64),
        "query_embedding": np.stack([np.asarray(t.query_embedding, np.float32) for t in trajectories]),
        "ef_search": np.array([t.search_params.ef_search for t in trajectories]),
        "n_probes": np.array([t.search_params.n_probes for t in trajectories]),
        "model_tier": np.array([names.index(t.search_params.model_tier) for t in trajectories], np.int32),
        "context_tokens": np.array([t.search_params.context_tokens for t in trajectories]),
        "temperature": np.array([t.search_params.temperature for t in trajectories], np.float32),
        "precision": np.array([t.precision for t in trajectories], np.float32),
        "recall": np.array([t.recall for t in trajectories], np.float32),
        "latency_us": np.array([t.latency_us for t in trajectories], np.int64),
        "rating": np.array([t.feedback.rating if t.feedback else 0 for t in trajectories], np.int8),
        "timestamp": np.array([t.timestamp for t in trajectories], np.int64),
    }
    if all(t.cost is not None for t in trajectories):
        column["cost"] = np.array([t.cost for t in trajectories], np.float32)
    if all(t.propensity is not None for t in trajectories):
        column["propensity"] = np.array([t.propensity for t in trajectories], np.float32)
    table = Table(column, names, len(trajectories), "memory", [])
    return assemble(_join(table, None, BadRows(), None), names, params, source or Source("memory"))
