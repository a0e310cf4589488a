"""Full tables for the suites decisions and router: every query was tried under every config, so that the value of any
choice is known exactly.

Suffixes: Q queries, C configs.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq

from rb_gpu.errors import DataError
from rb_gpu.learn.config import SAMPLE_FOLDER, DataConfig, ParamsConfig
from rb_gpu.learn.trajectories import Trajectories, load, split_by_time
from rb_gpu.learn.valuation import held_out_outcomes
from rb_gpu.objective import Objective

Floats = npt.NDArray[np.float64]
HOLDOUT = 0.2
# of `fold_of`: each part of a table is held out once
FOLDS = 5


@dataclass(frozen=True)
class Outcomes:
    """Utility, quality and cost of every config on every query, (Q, C) each."""

    utility_QC: Floats
    quality_QC: Floats
    cost_QC: Floats


def outcomes_of(table: Trajectories, objective: Objective) -> Outcomes:
    """The outcomes of a full table under an objective."""
    rows = held_out_outcomes(table, objective)

    def square(v_N: Floats) -> Floats:
        out_QC = np.zeros((rows.queries, len(table.configs)))
        out_QC[rows.query_row, rows.config_id] = v_N
        return out_QC

    return Outcomes(square(rows.utility), square(rows.quality), square(rows.cost))


def _folder(folder: str) -> Path:
    return SAMPLE_FOLDER if folder == "sample" else Path(folder)


def _column(folder: str, name: str, table: Trajectories) -> npt.NDArray[np.str_] | None:
    """A text column of queries.parquet as (Q,), in the table's order of queries; None if there is no such column."""
    path = _folder(folder) / "queries.parquet"
    if name not in pq.read_schema(path).names:
        return None
    columns = pq.read_table(path, columns=["query_id", name])
    ids = columns["query_id"].to_numpy()
    order = np.argsort(ids)
    values: npt.NDArray[np.str_] = np.array(columns[name].to_pylist())
    return values[order[np.searchsorted(ids[order], table.query_id)]]


def kinds(folder: str, table: Trajectories) -> npt.NDArray[np.str_] | None:
    """The kind (Q,) of each query, from the column `task` of queries.parquet; None if there is no such column."""
    return _column(folder, "task", table)


@cache
def whole_tables(folder: str) -> dict[str, Trajectories]:
    """Each outcomes*.parquet in a folder; `sample` is the bundled one.

    Raises DataError if the folder has no such file, or if a query was not tried under every config.
    """
    path = _folder(folder)
    found = {}
    for outcomes in sorted(path.glob("outcomes*.parquet")):
        whole = load(DataConfig(path=str(outcomes), queries=str(path / "queries.parquet")), ParamsConfig())
        if len(whole) != len(whole.query_id) * len(whole.configs):
            raise DataError(
                f"sets={folder}: {outcomes} is not a full table; every query must be tried under every config"
            )
        found[f"{path.name}/{outcomes.stem.removeprefix('outcomes').strip('_')}".rstrip("/")] = whole
    if not found:
        raise DataError(
            f"sets={folder} has no outcomes*.parquet; give folders with queries.parquet and outcomes.parquet"
        )
    return found


@cache
def tables(folder: str) -> dict[str, tuple[Trajectories, Trajectories]]:
    """Training and held-out queries of each table in a folder, split by the column `split` of queries.parquet (train or
    dev) if there is one, else by time. Raises DataError as `whole_tables` does.
    """
    found = {}
    for name, whole in whole_tables(folder).items():
        split_Q = _column(folder, "split", whole)
        if split_Q is not None:
            found[name] = whole.select_queries(split_Q == "train"), whole.select_queries(split_Q == "dev")
        else:
            found[name] = split_by_time(whole, HOLDOUT)
    return found


def fold_of(folder: str, name: str, seed: int) -> tuple[Trajectories, Trajectories]:
    """Training and held-out queries of a table: a fifth of the queries, drawn at random, is held out, another one for
    each of FOLDS consecutive seeds. A set's own split has too few held-out queries to tell similar methods apart.
    """
    whole = whole_tables(folder)[name]
    queries = len(whole.query_id)
    held_Q = np.zeros(queries, dtype=np.bool_)
    held_Q[np.random.default_rng(0).permutation(queries)[seed % FOLDS :: FOLDS]] = True
    return whole.select_queries(~held_Q), whole.select_queries(held_Q)
