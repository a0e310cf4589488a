"""Measures the calibration of a bank's confidence on synthetic data whose truth is known: when the bank deviates from
the default on a query, how often is its choice really better, and how confident was it?

`python -m tests.known_worlds --worlds 20` prints the expected calibration error for every kind of world and log.
Suffixes: Q queries, N rows, B fresh queries, K clusters, D dims, C configs.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from multiprocessing import get_context
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from rb_gpu.learn import learn
from rb_gpu.learn.config import JudgeConfig, ParamsConfig, TrainConfig
from rb_gpu.learn.trajectories import Source, Trajectories, assemble

Floats = npt.NDArray[np.float64]

CONFIGS, DEFAULT, DIM, CLUSTERS = 6, 2, 32, 40
# standard deviations: of a config's value between places, of configs' overall values, and of one row's noise
SPREAD, LEVEL, NOISE = 0.06, 0.03, 0.15
KINDS = ("by cluster", "by direction", "by both")
LOGS = ("uniform", "70 % on the default", "every config")
QUERIES = (1000, 4000)
FRESH_QUERIES, BINS = 3000, 10


class Acted(NamedTuple):
    """For the queries on which a bank deviates from the default: its confidence, and whether its choice is better."""

    confidence: Floats
    better: npt.NDArray[np.bool_]


def truth(kind: str, rng: np.random.Generator) -> tuple[Callable[[int], Floats], Callable[[Floats], Floats]]:
    """Two functions: one draws embeddings (B, D), the other gives the true value (B, C) of every config on them."""
    centre_KD = rng.normal(size=(CLUSTERS, DIM))
    level_C = LEVEL * rng.normal(size=CONFIGS)
    cluster_KC = SPREAD * rng.normal(size=(CLUSTERS, CONFIGS))
    slope_DC = SPREAD * rng.normal(size=(DIM, CONFIGS))
    parts = {"by cluster": (1.0, 0.0), "by direction": (0.0, 1.0), "by both": (0.7, 0.7)}[kind]

    def draw(count: int) -> Floats:
        x_BD = centre_KD[rng.integers(CLUSTERS, size=count)] + 0.5 * rng.normal(size=(count, DIM))
        return np.asarray(x_BD / np.linalg.norm(x_BD, axis=1, keepdims=True))

    def worth(x_BD: Floats) -> Floats:
        nearest_B = (x_BD @ (centre_KD / np.linalg.norm(centre_KD, axis=1, keepdims=True)).T).argmax(1)
        return np.asarray(level_C + parts[0] * cluster_KC[nearest_B] + parts[1] * (x_BD @ slope_DC))

    return draw, worth


def logged(x_QD: Floats, worth_QC: Floats, log: str, rng: np.random.Generator) -> Trajectories:
    """A log with one config per query and its propensity, or with every config on every query."""
    queries = len(x_QD)
    propensity_C = np.full(CONFIGS, 1.0 / CONFIGS)
    if log == "70 % on the default":
        propensity_C = np.where(np.arange(CONFIGS) == DEFAULT, 0.7, 0.3 / (CONFIGS - 1))
    query_N, config_N = np.arange(queries), rng.choice(CONFIGS, size=queries, p=propensity_C)
    if log == "every config":
        query_N, config_N = np.repeat(query_N, CONFIGS), np.tile(np.arange(CONFIGS), queries)
    rows = len(query_N)
    quality_N = 0.5 + 0.15 * (x_QD[query_N, 0] > 0) + worth_QC[query_N, config_N] + NOISE * rng.normal(size=rows)
    found_N = np.clip(quality_N, 0.0, 1.0).astype(np.float32)
    columns = {
        "id": np.arange(rows, dtype=np.uint64), "query_id": np.arange(queries, dtype=np.uint64),
        "x_QD": x_QD.astype(np.float32), "query_row": query_N, "query_time": np.arange(queries),
        "timestamp": query_N, "ef_search": (config_N + 1).astype(np.uint32), "precision": found_N,
        "recall": found_N, "latency_us": np.full(rows, 1000),
    }  # fmt: skip
    if log != "every config":
        columns["propensity"] = propensity_C[config_N].astype(np.float32)
    return assemble(columns, [], ParamsConfig(default={"ef_search": DEFAULT + 1}), Source())


def acted(kind: str, log: str, queries: int, seed: int) -> Acted:
    """Trains a bank in one world, and compares its answers on fresh queries with the truth."""
    rng = np.random.default_rng([seed, queries, KINDS.index(kind), LOGS.index(log)])
    draw, worth = truth(kind, rng)
    x_QD = draw(queries)
    config = TrainConfig(judge=JudgeConfig(latency_weight=0.0, cost_weight=0.0), seed=seed)
    config.index.kind = "off"
    bank = learn(logged(x_QD, worth(x_QD), log, rng), config).bank()
    x_BD = draw(FRESH_QUERIES)
    answers, worth_BC = bank.optimized_params_batch(x_BD.astype(np.float32)), worth(x_BD)
    chosen_B = answers["config_id"]
    better_B = worth_BC[np.arange(FRESH_QUERIES), chosen_B] > worth_BC[:, DEFAULT]
    acts_B = chosen_B != DEFAULT
    return Acted(answers["confidence"][acts_B].astype(np.float64), better_B[acts_B])


def calibration_error(worlds: list[Acted]) -> tuple[float, float, float]:
    """Mean confidence, share of better choices, and expected calibration error over BINS bins of equal size."""
    confidence, better = (np.concatenate(part) for part in zip(*worlds, strict=True))
    if not len(confidence):
        return float("nan"), float("nan"), float("nan")
    bins = np.array_split(np.argsort(confidence, kind="stable"), BINS)
    error = sum(len(index) * abs(confidence[index].mean() - better[index].mean()) for index in bins)
    return float(confidence.mean()), float(better.mean()), float(error / len(confidence))


def quietly() -> None:
    """Initialises a worker process: one thread, because the workers share the cores, and no log of each training."""
    logging.disable(logging.CRITICAL)
    torch.set_num_threads(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--worlds", type=int, default=20)
    options = parser.parse_args()
    sys.stdout.write("configs differ  log                  queries  confidence  better  calibration error\n")
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn"), quietly) as pool:
        cases = list(product(KINDS, LOGS, QUERIES))
        runs = [[pool.submit(acted, *case, seed) for seed in range(options.worlds)] for case in cases]
        for (kind, log, queries), futures in zip(cases, runs, strict=True):
            confidence, better, error = calibration_error([future.result() for future in futures])
            sys.stdout.write(f"{kind:14}  {log:20} {queries:7,}  {confidence:10.3f}  {better:6.3f}  {error:17.3f}\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
