"""judge.half_life=auto: how fast old rows should lose weight, chosen by how well the next block of time is predicted.

Suffixes: N rows, B blocks of time, H half-lives, G groups of queries, U cells of a pattern and a config.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import torch

from rb_gpu.learn.config import JudgeConfig, QualityConfig
from rb_gpu.learn.evidence import SECONDS_PER_DAY, gather_evidence, row_weights
from rb_gpu.learn.trajectories import Trajectories
from rb_gpu.learn.valuation import held_out_outcomes
from rb_gpu.learn.verdicts import resolve_objective

log = logging.getLogger(__name__)

Floats = npt.NDArray[np.float64]
Rows = npt.NDArray[np.int64]

BLOCKS = 6
# the shortest half-life is a fifth of a block: blocks cannot show faster changes
SHARES_OF_SPAN = tuple(2.0**-step for step in range(6))
GROUPS = 20
# standard errors by which decay must beat no decay: at one, noise makes it do so in up to 6 % of stationary simulations
ERRORS = 1.5
# most rows that a config's mean over the patterns counts for in the prediction of a cell
MOST_PRIOR_ROWS = 1e6


@dataclass(frozen=True)
class HalfLife:
    """half_life_days: None if no decay is best. gain, error: for each candidate, how much lower its mean squared error
    on the following blocks is than without decay, and the standard error of that.
    """

    half_life_days: float | None
    candidates_days: list[float]
    gain: list[float]
    error: list[float]


def auto_half_life(
    trajectories: Trajectories, label_Q: Rows, judging: JudgeConfig, quality: QualityConfig, device: torch.device
) -> HalfLife:
    """Resolves judge.half_life=auto, for the utility whose references come from all rows without decay.

    label_Q: (Q,) pattern of each query, negative for none.
    """
    weight_N, patterns, configs = row_weights(trajectories, None), int(label_Q.max()) + 1, len(trajectories.configs)
    whole = gather_evidence(trajectories, torch.zeros(len(label_Q), dtype=torch.int64), 1, weight_N, device)
    objective = resolve_objective(judging, quality, trajectories, whole)
    label_N = label_Q[trajectories.query_row]
    found = choose_half_life(
        trajectories.timestamp,
        trajectories.query_row,
        np.where(label_N < 0, -1, label_N * configs + trajectories.config_id),
        (patterns, configs),
        weight_N.numpy(),
        held_out_outcomes(trajectories, objective).utility,
    )
    days = found.half_life_days
    log.info("judge.half_life=auto: %s", "null, no half-life predicts better" if days is None else f"{days:.3g} days")
    return found


def choose_half_life(
    time_N: Rows, query_N: Rows, cell_N: Rows, shape: tuple[int, int], weight_N: Floats, utility_N: Floats
) -> HalfLife:
    """Rolling-origin validation (Tashman 2000): each of BLOCKS blocks of time but the first is predicted from earlier.

    time_N: UTC seconds. query_N: row of each row's query. cell_N: pattern · configs + config, negative for none; shape:
    patterns and configs. weight_N: weights without decay. A cell is predicted by its decayed mean, shrunk towards its
    config's as is best without decay; with too little shrinkage, decay would win as a substitute for it. Decay is
    chosen only if it beats none by ERRORS standard errors of the paired differences. These come from a jackknife over
    GROUPS groups of queries (Quenouille 1956), since chance in a cell's past enters all blocks predicted from it. None
    if there are too few rows for blocks and groups, or all have one timestamp.
    """
    kept = np.flatnonzero(cell_N >= 0)
    order = kept[np.argsort(time_N[kept], kind="stable")]
    time_N, query_N, cell_N = time_N[order], query_N[order], cell_N[order]
    weight_N, utility_N = weight_N[order], utility_N[order]
    span = float(time_N[-1] - time_N[0])
    candidates = [span * share for share in SHARES_OF_SPAN]
    days = [seconds / SECONDS_PER_DAY for seconds in candidates]
    if len(order) < BLOCKS * GROUPS or span <= 0:
        unknown = [math.nan] * len(days)
        return HalfLife(None, days, unknown, unknown)
    group_N = np.random.default_rng(0).integers(GROUPS, size=int(query_N.max()) + 1)[query_N]
    slot_N = group_N * (shape[0] * shape[1]) + cell_N
    weight_N = weight_N / weight_N.mean()
    prior_rows = _prior_rows(cell_N, shape, weight_N, utility_N)
    ends = np.arange(1, BLOCKS + 1) * len(order) // BLOCKS

    def sums(block: slice, weight: Floats) -> Floats:
        """Σw and Σw·y of each cell, (2, G + 1, P, C): over all rows, then with each group left out."""
        values = (weight, weight * utility_N[block])
        by_group = np.stack(
            [np.bincount(slot_N[block], weights=v, minlength=GROUPS * shape[0] * shape[1]) for v in values]
        ).reshape(2, GROUPS, *shape)
        total = by_group.sum(1, keepdims=True)
        return np.concatenate([total, total - by_group], axis=1)

    past = [np.zeros((2, GROUPS + 1, *shape)) for _ in range(1 + len(days))]
    lost, seen = np.zeros((len(days), GROUPS + 1)), np.zeros(GROUPS + 1)
    for start, stop in pairwise([0, *ends]):
        block = slice(start, stop)
        plain = sums(block, weight_N[block])
        if start:
            n, total = plain
            constant, *decayed = (_predict(prior_rows, one[0], one[1]) for one in past)
            seen += n.sum((1, 2))
            for h, predicted in enumerate(decayed):
                # Σw·(y − a)² − Σw·(y − b)², which needs no squares of y
                lost[h] += ((constant - predicted) * (n * (constant + predicted) - 2.0 * total)).sum((1, 2))
        past[0] += plain
        now = time_N[stop - 1]
        elapsed = now - time_N[max(start - 1, 0)]
        for one, seconds in zip(past[1:], candidates, strict=True):
            one *= 2.0 ** (-elapsed / seconds)
            one += sums(block, weight_N[block] * np.exp2(-(now - time_N[block]) / seconds))
    gain_HG = lost / np.maximum(seen, 1e-300)
    gain = gain_HG[:, 0]
    error = np.sqrt((GROUPS - 1) * gain_HG[:, 1:].var(1))
    better = np.where(gain > ERRORS * error, gain, -np.inf)
    best = int(better.argmax())
    return HalfLife(days[best] if np.isfinite(better[best]) else None, days, gain.tolist(), error.tolist())


def _prior_rows(cell_N: Rows, shape: tuple[int, int], weight_N: Floats, utility_N: Floats) -> float:
    """Variance within cells over that between a config's patterns, by moments (Cochran 1954); weights have mean 1."""
    cells = shape[0] * shape[1]
    w_PC = np.bincount(cell_N, weights=weight_N, minlength=cells).reshape(shape)
    mean_PC = np.bincount(cell_N, weights=weight_N * utility_N, minlength=cells).reshape(shape) / np.maximum(
        w_PC, 1e-300
    )
    w_C = np.maximum(w_PC.sum(0), 1e-300)
    mean_C = (w_PC * mean_PC).sum(0) / w_C
    spread = float((weight_N**2).mean())  # unequal weights inflate the variance of a mean by this factor
    held = float((w_PC > 0).sum())
    within = float(weight_N @ (utility_N - mean_PC.ravel()[cell_N]) ** 2) / max(len(cell_N) / spread - held, 1.0)
    between = float((w_PC * (mean_PC - mean_C) ** 2).sum()) - (held - float((w_PC > 0).any(0).sum())) * within
    variance = between / max(float((w_C - (w_PC**2).sum(0) / w_C).sum()), 1e-300)
    return min(within / max(variance, within / MOST_PRIOR_ROWS), MOST_PRIOR_ROWS) if within > 0 else 0.0


def _predict(prior_rows: float, w: Floats, total: Floats) -> Floats:
    """Mean of each cell (..., P, C), with prior_rows further rows at its config's mean over the patterns."""
    # at least 1e-9 rows: without a group that had a config to itself, rounding errors remain
    mean_C = total.sum(-2, keepdims=True) / np.maximum(w.sum(-2, keepdims=True), 1e-9)
    return np.asarray((total + prior_rows * mean_C) / np.maximum(w + prior_rows, 1e-9))
