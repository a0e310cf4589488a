"""Measures false positives: in how many synthetic worlds in which no config beats the default a bank deviates from it.

`python -m tests.null_worlds --worlds 300` prints the share for each kind of world.
"""

from __future__ import annotations

import argparse
import logging
import sys

import numpy as np
import torch

from rb_gpu.learn import learn
from rb_gpu.learn.config import JudgeConfig, ParamsConfig, TrainConfig
from rb_gpu.learn.trajectories import Source, Trajectories, assemble

CONFIGS, DEFAULT, DIM, NOISE = 6, 2, 32, 0.15
KINDS = (
    "no config differs",
    "one bad config",
    "95 % of traffic on the default",
    "hard queries go to dear configs",
    "the default is best everywhere, in places by more",
    "queries run 5 times each and differ",
    "queries run 20 times each and differ",
    "two configs, 14 kinds of query",
)


def world(kind: str, rows: int, rng: np.random.Generator) -> Trajectories:
    """A log with one config per row and its propensity. Quality depends only on the query, except in the two kinds with
    a bad config and with a better default.
    """
    times = next((n for n in (5, 20) if f"run {n} times" in kind), 1)
    query = np.arange(rows) // times
    x = rng.normal(size=(query[-1] + 1, DIM)).astype(np.float32)
    quality = 0.5 + 0.2 * (x[query, 0] > 0)
    if times > 1:
        quality += 0.2 * rng.normal(size=len(x))[query]
    propensity = np.full((rows, CONFIGS), 1.0 / CONFIGS)
    if kind == "two configs, 14 kinds of query":
        kind_N = rng.integers(14, size=rows)
        x = (rng.normal(size=(14, DIM))[kind_N] + 0.5 * x).astype(np.float32)
        quality = 0.5 + 0.1 * rng.normal(size=14)[kind_N]
        propensity[:] = 0.5 * np.isin(np.arange(CONFIGS), [DEFAULT, DEFAULT + 1])
    elif kind == "95 % of traffic on the default":
        propensity[:] = 0.05 / (CONFIGS - 1)
        propensity[:, DEFAULT] = 0.95
    elif kind == "hard queries go to dear configs":
        hard = rng.random(rows)
        quality -= 0.3 * hard
        tilt = np.exp(-8.0 * (np.arange(CONFIGS) / (CONFIGS - 1) - hard[:, None]) ** 2)
        propensity = 0.9 * tilt / tilt.sum(1, keepdims=True) + 0.1 / CONFIGS
    config = np.minimum((propensity.cumsum(1) < rng.random(rows)[:, None]).sum(1), CONFIGS - 1)
    quality = quality + NOISE * rng.normal(size=rows)
    if kind == "one bad config":
        quality -= 0.2 * (config == CONFIGS - 1)
    elif kind == "the default is best everywhere, in places by more":
        quality -= (0.02 + 0.15 * (x[query, 1] > 0)) * (config != DEFAULT)
    found = np.clip(quality, 0.0, 1.0).astype(np.float32)
    columns = {
        "id": np.arange(rows, dtype=np.uint64), "query_id": np.arange(len(x), dtype=np.uint64), "x_QD": x,
        "query_row": query, "query_time": np.arange(len(x)), "timestamp": query,
        "ef_search": (config + 1).astype(np.uint32), "precision": found, "recall": found,
        "latency_us": np.full(rows, 1000), "propensity": propensity[np.arange(rows), config].astype(np.float32),
    }  # fmt: skip
    return assemble(columns, [], ParamsConfig(default={"ef_search": DEFAULT + 1}), Source())


def acts(kind: str, rows: int, seed: int) -> bool:
    """Whether the bank of one world deviates from the default on any training query."""
    trajectories = world(kind, rows, np.random.default_rng([seed, KINDS.index(kind)]))
    config = TrainConfig(judge=JudgeConfig(latency_weight=0.0, cost_weight=0.0), seed=seed)
    config.index.kind = "off"
    answers = learn(trajectories, config).bank().optimized_params_batch(trajectories.x_QD)
    return bool((answers["ef_search"] != DEFAULT + 1).any())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--worlds", type=int, default=300)
    parser.add_argument("--rows", type=int, default=1500)
    options = parser.parse_args()
    logging.disable(logging.CRITICAL)
    torch.set_num_threads(1)
    for kind in KINDS:
        count = sum(acts(kind, options.rows, seed) for seed in range(options.worlds))
        share = 100 * count / options.worlds
        sys.stdout.write(f"{kind:50} the bank acts in {count:3} of {options.worlds} worlds, {share:.1f} %\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
