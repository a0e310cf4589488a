"""The suite decisions: what the bank's choices are worth on queries that it did not see, beside simple alternatives.

Every set is a full table: each query was tried under every config, so that any choice is valued exactly. The bank and
the baselines learn from it whole, or from logs of one config per query drawn from it with known propensities.
Suffixes: Q queries, N rows, C configs, B queries to answer.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq

from rb_gpu.bench.baselines import Training, choices
from rb_gpu.errors import DataError
from rb_gpu.learn.config import SAMPLE_FOLDER, DataConfig, JudgeConfig, ParamsConfig, TrainConfig
from rb_gpu.learn.pipeline import learn
from rb_gpu.learn.policy import held_out_outcomes
from rb_gpu.learn.trajectories import Trajectories, load, split_by_time
from rb_gpu.learn.verdicts import resolve_objective
from rb_gpu.posterior import Objective

log = logging.getLogger(__name__)

Floats = npt.NDArray[np.float64]
HOLDOUT = 0.2
RESAMPLES = 2000


def tables(folder: str) -> dict[str, tuple[Trajectories, Trajectories]]:
    """Training and held-out queries of each outcomes*.parquet in a folder; `sample` is the bundled one.

    By the column `split` of queries.parquet where there is one (train; dev), else by time. Raises DataError where a
    query was not tried under every config.
    """
    path = SAMPLE_FOLDER if folder == "sample" else Path(folder)
    queries = path / "queries.parquet"
    found = {}
    for outcomes in sorted(path.glob("outcomes*.parquet")):
        whole = load(DataConfig(path=str(outcomes), queries=str(queries)), ParamsConfig())
        if len(whole) != len(whole.query_id) * len(whole.configs):
            raise DataError(f"sets={folder}: {outcomes} is no full table; every query must be tried under every config")
        name = f"{path.name}/{outcomes.stem.removeprefix('outcomes').strip('_')}".rstrip("/")
        if "split" in pq.read_schema(queries).names:
            columns = pq.read_table(queries, columns=["query_id", "split"])
            ids = columns["query_id"].to_numpy()
            order = np.argsort(ids)
            split_Q = np.array(columns["split"].to_pylist())[order[np.searchsorted(ids[order], whole.query_id)]]
            found[name] = whole.select_queries(split_Q == "train"), whole.select_queries(split_Q == "dev")
        else:
            found[name] = split_by_time(whole, HOLDOUT)
    if not found:
        raise DataError(
            f"sets={folder} has no outcomes*.parquet; give folders with queries.parquet and outcomes.parquet"
        )
    return found


def draw(table: Trajectories, policy: str, size: int, rng: np.random.Generator) -> Trajectories:
    """A part of `size` queries (0: all), whole for policy full, else a log of one config per query.

    uniform: every config alike. skewed: 70 % on the config of middle cost. confounded: queries on which the cheapest
    config did badly go to dearer ones.
    """
    queries, configs = len(table.query_id), len(table.configs)
    if size and size < queries:
        keep_Q = np.zeros(queries, dtype=bool)
        keep_Q[rng.permutation(queries)[:size]] = True
        table, queries = table.select_queries(keep_Q), size
    if policy == "full":
        return table
    row_QC = np.zeros((queries, configs), dtype=np.int64)
    row_QC[table.query_row, table.config_id] = np.arange(len(table))
    price = table.latency_us if table.cost is None else table.cost
    order = np.argsort(price[row_QC].mean(0), kind="stable")
    propensity_QC = np.full((queries, configs), 1.0 / configs)
    if policy == "skewed":
        propensity_QC *= 0.3
        propensity_QC[:, order[configs // 2]] += 0.7
    elif policy == "confounded":
        hard_Q = 1.0 - table.recall[row_QC[:, order[0]]]
        rank_Q = (np.argsort(np.argsort(hard_Q, kind="stable")) + 0.5) / queries
        place_C = np.empty(configs)
        place_C[order] = np.arange(configs) / max(configs - 1, 1)
        tilt_QC = np.exp(-8.0 * (place_C - rank_Q[:, None]) ** 2)
        propensity_QC = 0.9 * tilt_QC / tilt_QC.sum(1, keepdims=True) + 0.1 / configs
    chosen_Q = np.minimum((propensity_QC.cumsum(1) < rng.random(queries)[:, None]).sum(1), configs - 1)
    each = np.arange(queries)
    rows = row_QC[each, chosen_Q]
    per_row = ("config_id", "precision", "recall", "latency_us", "cost", "rating", "timestamp", "id")
    changed: dict[str, Any] = {name: getattr(table, name) for name in per_row}
    changed = {name: None if column is None else column[rows] for name, column in changed.items()}
    changed |= {"query_row": each, "propensity": propensity_QC[each, chosen_Q].astype(np.float32)}
    # the default that such a log would have: the config most logged
    default = int(np.bincount(chosen_Q, minlength=configs).argmax())
    return replace(table, configs=replace(table.configs, default=default), **changed)


def _utilities(table: Trajectories, objective: Objective) -> Floats:
    """(Q, C) of a full table."""
    rows = held_out_outcomes(table, objective)
    utility_QC = np.zeros((rows.queries, len(table.configs)))
    utility_QC[rows.query_row, rows.config_id] = rows.utility
    return utility_QC


def _one(training: Trajectories, held_out: Trajectories, cost_weight: float, seed: int) -> dict[str, Floats]:
    """Utility of each method's choice on every held-out query (B,)."""
    config = TrainConfig(seed=seed)
    config.judge = JudgeConfig(latency_weight=0.0, cost_weight=cost_weight)
    config.index.kind = "off"
    bank = learn(training, config).bank()
    objective = resolve_objective(config.judge, config.quality, training, bank.data.evidence)
    rows = held_out_outcomes(training, objective)
    x_QD = training.x_QD / np.linalg.norm(training.x_QD, axis=1, keepdims=True)
    x_BD = held_out.x_QD / np.linalg.norm(held_out.x_QD, axis=1, keepdims=True)
    picked = choices(
        Training(x_QD, rows.query_row, rows.config_id, rows.weight, rows.utility, len(training.configs)), x_BD, seed
    )
    picked["default"] = np.full(len(x_BD), training.configs.default)
    picked["bank"] = bank.optimized_params_batch(held_out.x_QD)["config_id"]
    utility_BC = _utilities(held_out, objective)
    worth = {name: utility_BC[np.arange(len(x_BD)), choice] for name, choice in picked.items()}
    return worth | {"oracle": utility_BC.max(1)}


def measure(settings: dict[str, Any]) -> dict[str, Any]:
    """Every set, cost weight, kind of log and size: gains over the best single config, with 95 % intervals.

    The best single config is the one of highest mean on the same training data. Intervals are of a bootstrap over
    held-out queries, of the mean over seeds.
    """
    quiet = logging.getLogger("rb_gpu.learn")
    level, cases = quiet.level, []
    quiet.setLevel(logging.ERROR)
    try:
        for folder in settings["sets"]:
            for name, (training, held_out) in tables(folder).items():
                for weight in settings["cost_weights"]:
                    for policy in settings["logs"]:
                        for size in [0] if policy == "full" else settings["sizes"]:
                            log.info("%s, cost weight %g, %s log, %s queries", name, weight, policy, size or "all")
                            cases.append(_case(name, training, held_out, weight, policy, size, settings["rounds"]))
    finally:
        quiet.setLevel(level)
    return {"suite": "decisions", "settings": settings, "cases": cases}


def _case(
    name: str, training: Trajectories, held_out: Trajectories, weight: float, policy: str, size: int, seeds: int
) -> dict[str, Any]:
    gains: dict[str, list[Floats]] = defaultdict(list)
    for seed in range(seeds):
        log_ = draw(training, policy, size, np.random.default_rng(seed))
        worth = _one(log_, held_out, weight, seed)
        for method, utility_B in worth.items():
            gains[method].append(utility_B - worth["best single config"])
    gain_MB = np.stack([np.mean(parts, axis=0) for parts in gains.values()])
    rng = np.random.default_rng(0)
    drawn = np.stack([
        gain_MB[:, rng.integers(gain_MB.shape[1], size=gain_MB.shape[1])].mean(1) for _ in range(RESAMPLES)
    ])  # fmt: skip
    low, high = np.quantile(drawn, (0.025, 0.975), axis=0)
    methods = {
        method: {"gain": float(gain_MB[m].mean()), "low": float(low[m]), "high": float(high[m])}
        for m, method in enumerate(gains)
    }
    return {
        "set": name, "cost_weight": weight, "log": policy, "queries": len(log_.query_id), "methods": methods,
    }  # fmt: skip
