"""Finds where a table contradicts itself or its settings, so that the job would silently learn something wrong from it.

Suffixes: N rows, Q queries, C configs, M rows that differ, D dims.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from rb_gpu.errors import ConfigError
from rb_gpu.learn.config import ParamsConfig
from rb_gpu.learn.estimators import odd_propensities
from rb_gpu.learn.order import first_rows
from rb_gpu.learn.quarantine import BadRows
from rb_gpu.learn.tables import HASH, Table, distinct
from rb_gpu.params import ConfigTable

log = logging.getLogger(__name__)

# rows from which a config's costs are checked, and the effective number of rows below which its mean cost is doubtful
COST_ROWS, COST_SIZE = 100, 10.0
# cosine from which two embeddings count as one query's, embedded twice
SAME_QUERY = 0.99
ROWS_AT_ONCE = 4096


def refuse_other_embeddings(outcomes: Table, bad: BadRows) -> None:
    """Quarantines rows whose embedding differs from that of their query's row of least id.

    Only one embedding is kept per query: if query_id named a session or a user, the other embeddings would be lost.
    """
    columns = outcomes.columns
    if "query_id" not in columns or distinct(columns["query_id"]):
        return
    _, first_Q, query_N = first_rows(columns["query_id"], columns["id"])
    x_ND, hash_N, first_N = columns["query_embedding"], columns[HASH], first_Q[query_N]
    rows_M = np.flatnonzero(hash_N != hash_N[first_N])
    other_N = np.zeros(len(hash_N), dtype=bool)
    for start in range(0, len(rows_M), ROWS_AT_ONCE):
        mine = rows_M[start : start + ROWS_AT_ONCE]
        pair = [x_ND[rows].astype(np.float64) for rows in (mine, first_N[mine])]
        squares = [np.einsum("md,md->m", one, one) for one in pair]
        other_N[mine] = np.einsum("md,md->m", *pair) < SAME_QUERY * np.sqrt(squares[0] * squares[1])
    outcomes.room.ranks.wait()  # the first rank moves rows of a matrix that the others may still compare
    outcomes.refuse(other_N, "query_id stands for another embedding, as a session's would", "id", bad)


def check_merged(
    raw: Mapping[str, npt.NDArray[Any]],
    config_id: npt.NDArray[np.int64],
    propensity: npt.NDArray[np.float32] | None,
    table: ConfigTable,
    params: ParamsConfig,
) -> None:
    """Raises ConfigError if rows of several logged settings became one config but kept each setting's own propensity.

    The config's probability is then the sum of theirs, and 1/propensity over its rows sums to the number of merged
    settings times the rows of the table. raw: temperature and context_tokens (N,) as logged.
    """
    if propensity is None:
        return
    steps = {"temperature": "params.temperature_step", "context_tokens": "params.context_step"}
    merged: dict[int, str] = {}
    for name, key in steps.items():
        low_C, high_C = np.full(len(table), np.inf), np.full(len(table), -np.inf)
        np.minimum.at(low_C, config_id, raw[name])
        np.maximum.at(high_C, config_id, raw[name])
        told = f"{key}={getattr(params, key.removeprefix('params.')):g}"
        merged |= {int(c): f"{told} makes one config of {name} {low_C[c]:g} to {high_C[c]:g}"
                   for c in np.flatnonzero(low_C < high_C)}  # fmt: skip
    if not merged:
        return
    odd = odd_propensities(config_id, propensity.astype(np.float64), len(table))
    for c, what in merged.items():
        if odd.get(c, 0.0) > 1.0:
            raise ConfigError(
                f"{what} ({table.describe(c)}), but their propensities are those of the separate settings: "
                f"1/propensity adds up to {odd[c]:.2f} times the rows, where 1 is expected; lower the step, or log "
                "the probability of the merged config"
            )


def warn_of_few_costs(
    cost: npt.NDArray[np.float32] | None, config_id: npt.NDArray[np.int64], id_N: npt.NDArray[np.uint64],
    table: ConfigTable,
) -> None:  # fmt: skip
    """Logs a warning if few of a config's rows hold nearly all of its cost (N,), as when some are in another unit.

    Their mean, and the utility that subtracts it, are then meaningless: no choice is sure to pay, and nobody sees why.
    """
    if cost is None:
        return
    cost_N = cost.astype(np.float64)
    rows_C, total_C, squares_C = (np.bincount(config_id, of_N, len(table)) for of_N in (None, cost_N, cost_N**2))
    size_C = np.divide(total_C**2, squares_C, out=np.full(len(table), np.inf), where=squares_C > 0)
    few = np.flatnonzero((rows_C >= COST_ROWS) & (size_C < COST_SIZE))
    if len(few):
        worst = int(few[size_C[few].argmin()])
        most = int(np.where(config_id == worst, cost_N, -1.0).argmax())
        log.warning("cost: for %d configs a few rows make up nearly all of it (%s: %d rows count as much as %.1f equal "
                    "ones; the largest, %.6g, has id %d), so its mean is unreliable; check the unit, or leave cost out "
                    "with judge.cost_weight=0", len(few), table.describe(worst), rows_C[worst], size_C[worst],
                    cost_N[most], id_N[most])  # fmt: skip


def warn_of_one_config(config_N: npt.NDArray[np.int64], configs: ConfigTable, path: str) -> None:
    """Warns if every row ran the same config."""
    if (config_N == config_N[0]).all():
        log.warning(
            "data.path=%s: every row ran %s, so there is nothing to choose from; check that every setting that varied "
            "has a column, or let the service try other settings on a random share of its queries and log the "
            "propensity", path, configs[config_N[0]],
        )  # fmt: skip
