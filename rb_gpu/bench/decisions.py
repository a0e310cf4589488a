"""The suite decisions: the utility of the bank's choices on held-out queries, compared with simple alternatives.

Every data set is a full table: each query was tried under every config, so that the value of any choice is known
exactly. The bank and the baselines learn from the full table, or from logs of one config per query that are drawn from
it with known propensities, always without a fifth of the queries, which they then answer; each seed holds out another
fifth. Suffixes: Q queries, N rows, C configs, B queries to answer, H queries that were held out at least once, M
methods.
"""

from __future__ import annotations

import logging
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from rb_gpu.bench.searches import averaged, matched_recall, pooled, recall_floor, searches
from rb_gpu.bench.sets import FOLDS, fold_of, outcomes_of, whole_tables
from rb_gpu.learn.baselines import Training
from rb_gpu.learn.config import BASELINE_NAMES, JudgeConfig, TrainConfig
from rb_gpu.learn.pipeline import choices_beside, learn
from rb_gpu.learn.policy import SINGLE
from rb_gpu.learn.trajectories import Trajectories
from rb_gpu.learn.verdicts import resolve_objective

log = logging.getLogger(__name__)

Floats = npt.NDArray[np.float64]
RESAMPLES = 2000


def draw(table: Trajectories, policy: str, size: int, rng: np.random.Generator) -> Trajectories:
    """A random subset of `size` queries (0: all): with all configs for policy "full", else a log of one config each.

    uniform: all configs are equally likely. skewed: 70 % of the probability is on the config of median cost, and the
    rest is uniform. confounded: the worse the cheapest config's recall on a query, the more expensive the configs that
    it is likely to get; every config keeps a probability of at least 0.1 / C.
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
    # params.default=auto would take the most frequently logged config as the default of such a log
    default = int(np.bincount(chosen_Q, minlength=configs).argmax())
    return replace(table, configs=replace(table.configs, default=default), **changed)


def _one(training: Trajectories, held_out: Trajectories, cost_weight: float, seed: int) -> dict[str, Floats]:
    """For each method, the utility (B,) of its choice on every held-out query, the oracle included."""
    config = TrainConfig(seed=seed)
    config.judge = JudgeConfig(latency_weight=0.0, cost_weight=cost_weight)
    config.index.kind = "off"
    bank = learn(training, config).bank()
    objective = resolve_objective(config.judge, config.quality, training, bank.data.evidence)
    queries = len(held_out.query_id)
    picked = {
        SINGLE: np.full(queries, int(Training.of(training, objective).means.argmax())),
        **choices_beside(BASELINE_NAMES, training, held_out.x_QD, objective, config),
        "default": np.full(queries, training.configs.default),
        "bank": bank.optimized_params_batch(held_out.x_QD)["config_id"],
    }
    utility_BC = outcomes_of(held_out, objective).utility_QC
    worth = {name: utility_BC[np.arange(queries), choice] for name, choice in picked.items()}
    return worth | {"oracle": utility_BC.max(1)}


@dataclass(frozen=True)
class Setting:
    """What one training run of the suite learns from. log: the logging policy; size: number of queries, 0 for all."""

    folder: str
    name: str
    cost_weight: float
    log: str
    size: int


@dataclass(frozen=True)
class Run:
    """One training run: the number of training queries; the ids (B,) of the held-out queries; and for each method the
    utility (B,) of its choices on them.
    """

    training_queries: int
    query_id: npt.NDArray[np.uint64]
    worth: dict[str, Floats]


def settings_of(settings: dict[str, Any]) -> list[Setting]:
    """All combinations of data set, cost weight, logging policy and size that the suite was asked for."""
    out = []
    for folder in settings["sets"]:
        for name, whole in whole_tables(folder).items():
            training_queries = len(whole.query_id) * (FOLDS - 1) // FOLDS
            sizes = dict.fromkeys(size if size < training_queries else 0 for size in settings["sizes"])
            # at cost weight 0 the most expensive setting of a search is best for every query: nothing to learn
            weights = [weight for weight in settings["cost_weights"] if weight > 0 or not searches(whole)]
            out += [
                Setting(folder, name, weight, policy, size)
                for weight in weights
                for policy in settings["logs"]
                for size in ([0] if policy == "full" else sizes)
            ]
    return out


def _run(setting: Setting, seed: int) -> Run:
    training, held_out = fold_of(setting.folder, setting.name, seed)
    drawn = draw(training, setting.log, setting.size, np.random.default_rng(seed))
    return Run(len(drawn.query_id), held_out.query_id, _one(drawn, held_out, setting.cost_weight, seed))


def quietly() -> None:
    """Initialises a worker process: one thread, because the workers share the cores, and no log of each training."""
    torch.set_num_threads(1)
    logging.getLogger("rb_gpu.learn").setLevel(logging.ERROR)


def measure(settings: dict[str, Any]) -> dict[str, Any]:
    """Gains over the best single config, with 95 % intervals, for every data set, cost weight, log policy and size.

    The best single config is the one with the highest mean utility on the same training data. For nearest-neighbour
    searches the result also has the cost at a given mean recall and the cost under a recall floor (searches.py), both
    on the sets' own split.
    """
    seeds = range(settings["rounds"])
    asked = settings_of(settings)
    found = {
        name: (folder, name)
        for folder in settings["sets"]
        for name, whole in whole_tables(folder).items()
        if searches(whole)
    }
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn"), quietly) as pool:
        runs = [[pool.submit(_run, setting, seed) for seed in seeds] for setting in asked]
        sweeps = {name: [pool.submit(matched_recall, *one, seed) for seed in seeds] for name, one in found.items()}
        floors = {name: [pool.submit(recall_floor, *one, seed) for seed in seeds] for name, one in found.items()}
        cases = []
        for setting, futures in zip(asked, runs, strict=True):
            cases.append(case_of(setting, [future.result() for future in futures]))
            log.info("%s", cases[-1])
        return {
            "suite": "decisions",
            "settings": settings,
            "cases": cases,
            "matched_recall": {name: pooled([one.result() for one in futures]) for name, futures in sweeps.items()},
            "floor": {
                name: averaged([one.result() for one in futures])
                for name, futures in floors.items()
                if futures[0].result()
            },
        }


def case_of(setting: Setting, runs: list[Run]) -> dict[str, Any]:
    """One row of the result: each method's gain over the best single config with a 95 % interval, and `captured`, that
    gain as a share of the oracle's; `ahead`, the lower bound of its lead over the bank.

    The intervals bootstrap the held-out queries; a query that several runs held out counts with its mean over them.
    """
    names = list(runs[0].worth)
    gain_MB = np.concatenate([np.stack([run.worth[name] - run.worth[SINGLE] for name in names]) for run in runs], 1)
    _, query_B, count_H = np.unique(np.concatenate([run.query_id for run in runs]), return_inverse=True,
                                    return_counts=True)  # fmt: skip
    gain_MH = np.stack([np.bincount(query_B, gain_B) for gain_B in gain_MB]) / count_H
    lead_MH = gain_MH - gain_MH[names.index("bank")]
    rng, queries = np.random.default_rng(0), len(count_H)
    gains, leads = [], []
    for _ in range(RESAMPLES):
        times_H = np.bincount(rng.integers(queries, size=queries), minlength=queries)
        gains.append(gain_MH @ times_H / queries)
        leads.append(lead_MH @ times_H / queries)
    low, high = np.quantile(gains, (0.025, 0.975), axis=0)
    ahead = np.quantile(leads, 0.025, axis=0)
    gain_M = gain_MH.mean(1)
    headroom = float(gain_M[names.index("oracle")])
    methods = {
        name: {
            "gain": float(gain_M[m]),
            "low": float(low[m]),
            "high": float(high[m]),
            "captured": float(gain_M[m]) / headroom if headroom > 0 else 0.0,
            "ahead": float(ahead[m]),
        }
        for m, name in enumerate(names)
    }
    return {
        "set": setting.name, "cost_weight": setting.cost_weight, "log": setting.log,
        "queries": runs[0].training_queries, "methods": methods,
    }  # fmt: skip
