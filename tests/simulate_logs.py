"""Measures the coverage of confidence intervals: evaluates policies on logs of one config per query, drawn from worlds
in which every policy's true value is known.

`python -m tests.simulate_logs --logs 500` prints how many of the 95 % intervals of held-out values contain the truth.
"""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import dataclass
from functools import cache

import numpy as np
from scipy import stats

from rb_gpu.bench.decisions import draw
from rb_gpu.learn.policy import evaluate
from rb_gpu.learn.trajectories import Trajectories
from rb_gpu.learn.valuation import held_out_outcomes
from rb_gpu.objective import Objective
from rb_gpu.params import ConfigTable, SearchParams

DIM, CONFIGS, NOISE = 8, 6, 0.08
LOGS = ("uniform", "skewed", "confounded")
QUALITY = Objective("utility", "f1", 0.0, 0.0, 1.0, 1.0, 0.95, None, None)


def world(queries: int, rng: np.random.Generator) -> Trajectories:
    """A full table in which more expensive configs find more, but not on every query, and in which quality varies far
    more between queries than between configs.
    """
    x = rng.normal(size=(queries, DIM)).astype(np.float32)
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    place = np.arange(CONFIGS) / (CONFIGS - 1)
    hard = 1.0 / (1.0 + np.exp(-4.0 * unit[:, :1]))
    expected = 0.75 - 0.35 * hard * (1.0 - 0.5 * place) + 0.1 * unit[:, 1:2] * np.cos(3.0 * place) - 0.05 * place
    quality = np.clip(expected + NOISE * rng.normal(size=(queries, CONFIGS)), 0.0, 1.0).astype(np.float32).ravel()
    row = np.repeat(np.arange(queries), CONFIGS)
    return Trajectories(
        x_QD=x, query_row=row, query_id=rng.permutation(queries).astype(np.uint64), query_time=np.arange(queries),
        config_id=np.tile(np.arange(CONFIGS), queries), precision=quality, recall=quality,
        latency_us=np.full(len(row), 1000), cost=np.tile(1.0 + np.arange(CONFIGS), queries).astype(np.float32),
        rating=np.zeros(len(row), np.int8), timestamp=row, propensity=None, id=np.arange(len(row), dtype=np.uint64),
        configs=ConfigTable.from_params([SearchParams(ef_search=16 * 2**c) for c in range(CONFIGS)], ("auto",), 0),
    )  # fmt: skip


def choices(x: np.ndarray) -> dict[str, np.ndarray]:
    """The choices (Q,) of three policies: a default, a fixed config, and one that picks more expensive configs for
    queries that look hard.
    """
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    bank = np.digitize(unit[:, 0] + 0.5 * unit[:, 2], (-0.4, 0.1, 0.5)) + 1
    return {"default": np.zeros(len(x), int), "best single config": np.full(len(x), 2), "bank": bank}


@dataclass
class Coverage:
    """Counts for one quantity: logs whose interval contains the truth (held), logs that have an interval (known), and
    all logs; width: sum of the intervals' widths.
    """

    held: int = 0
    known: int = 0
    logs: int = 0
    width: float = 0.0

    def add(self, low: float, high: float, truth: float) -> None:
        self.logs += 1
        if math.isfinite(low):
            self.known += 1
            self.held += low <= truth <= high
            self.width += high - low

    @property
    def share(self) -> float:
        return self.held / self.known if self.known else float("nan")

    def plausible(self, share: float, level: float) -> bool:
        """Whether the coverage is consistent with the probability `share`: a two-sided binomial test does not reject it
        at the significance level 1 - level.
        """
        return bool(stats.binomtest(self.held, self.known, share).pvalue >= 1.0 - level)


@cache
def truths() -> dict[str, float]:
    """The value of every policy of `choices`, computed on 400,000 queries."""
    table = world(400_000, np.random.default_rng(2**32))
    quality = table.precision.astype(np.float64).reshape(-1, CONFIGS)
    return {name: float(quality[np.arange(len(quality)), pick].mean()) for name, pick in choices(table.x_QD).items()}


def coverage(log: str, queries: int, logs: int, seed: int = 0) -> dict[str, Coverage]:
    """Coverage of the intervals of the bank's value, and of its gains over the default and over the single config.
    Every log is a new sample of queries, outcomes and logged choices.
    """
    truth = truths()
    found = {name: Coverage() for name in ("value of bank", "gain over default", "gain over best single config")}
    for number in range(logs):
        rng = np.random.default_rng([seed, number, queries, LOGS.index(log)])
        drawn = draw(world(queries, rng), log, 0, rng)
        evaluation = evaluate(held_out_outcomes(drawn, QUALITY), choices(drawn.x_QD), 100, 0)
        bank = evaluation.value("bank")
        found["value of bank"].add(bank.low, bank.high, truth["bank"])
        for name, gain in evaluation.bank_gains.items():
            found[f"gain over {name}"].add(gain.low, gain.high, truth["bank"] - truth[name])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--logs", type=int, default=500)
    parser.add_argument("--queries", type=int, nargs="+", default=[800, 1600])
    options = parser.parse_args()
    for queries in options.queries:
        for log in LOGS:
            for name, one in coverage(log, queries, options.logs).items():
                width = one.width / max(one.known, 1)
                sys.stdout.write(
                    f"{log:12} {queries:6,} queries  {name:30} {one.known:4} of {one.logs} logs have an interval, "
                    f"{100 * one.share:5.1f} % hold the truth, mean width {width:.4f}\n"
                )
                sys.stdout.flush()


if __name__ == "__main__":
    main()
