"""What a policy is worth on held-out queries, beside the default, the best single config and the per-query oracle.

A policy picks one config per query. Its value is the mean outcome of the rows that did try what it picks, each weighted
by 1 / propensity: exact where every query was tried under every pick, self-normalised inverse propensity scoring
(Swaminathan & Joachims 2015) where propensities are logged, and else merely associational.
Suffixes: Q queries, N rows, C configs, M policies.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from rb_gpu.bank import ReasoningBank
from rb_gpu.evidence import OUTCOMES, Evidence
from rb_gpu.learn.config import EvalConfig
from rb_gpu.learn.evidence import outcomes
from rb_gpu.learn.trajectories import Trajectories
from rb_gpu.posterior import Objective
from rb_gpu.registry import CHAMPION

Floats = npt.NDArray[np.float64]
Choice = npt.NDArray[np.int64]

RESAMPLES_AT_ONCE = 64
SINGLE = "best single config"


@dataclass(frozen=True)
class Gain:
    """A difference of utility and its 95 % interval; NaN where one side is unknown."""

    gain: float
    low: float
    high: float


@dataclass(frozen=True)
class PolicyValue:
    """One row of the table; utility in the objective's unit. All NaN where no held-out row tried what it picks.

    captured: share of the gap between the best single config and the oracle that the policy closes; NaN without one.
    acted: share of queries on which it leaves the default. matched: rows that tried what it picks.
    """

    name: str
    utility: float
    quality: float
    latency_p50_us: float
    latency_p95_us: float
    latency_p99_us: float
    cost: float
    captured: float
    acted: float
    matched: int


@dataclass(frozen=True)
class Evaluation:
    """The policy table; grade is exact, snips or associational.

    bank_gains: how much more utility the policy "bank" has than each other one, with a paired 95 % bootstrap interval.
    """

    grade: str
    queries: int
    rows: int
    values: list[PolicyValue]
    bank_gains: dict[str, Gain]

    def value(self, name: str) -> PolicyValue:
        """The row of one policy. Raises KeyError."""
        for value in self.values:
            if value.name == name:
                return value
        raise KeyError(name)


@dataclass(frozen=True)
class Outcomes:
    """Held-out rows as plain columns, (N,) each; utility and quality under the bank's objective."""

    query_row: npt.NDArray[np.int64]
    config_id: npt.NDArray[np.int64]
    weight: Floats
    utility: Floats
    quality: Floats
    latency_us: Floats
    cost: Floats
    queries: int
    default: int
    logged_propensity: bool


def held_out_outcomes(trajectories: Trajectories, objective: Objective) -> Outcomes:
    """The columns that every policy of a table is scored on."""
    y_NO = outcomes(trajectories, torch.device("cpu")).numpy()
    quality = y_NO @ objective.quality_direction
    cost = y_NO[:, OUTCOMES.index("cost")]
    latency_us = trajectories.latency_us.astype(np.float64)
    logged = trajectories.propensity is not None
    return Outcomes(
        query_row=trajectories.query_row,
        config_id=trajectories.config_id,
        weight=1.0 / trajectories.propensity.astype(np.float64)
        if trajectories.propensity is not None
        else np.ones(len(trajectories)),
        utility=objective.utility(quality, latency_us, cost),
        quality=quality,
        latency_us=latency_us,
        cost=cost,
        queries=len(trajectories.query_id),
        default=trajectories.configs.default,
        logged_propensity=logged,
    )


def best_single(evidence: Evidence, objective: Objective) -> int:
    """The config of highest mean utility over all training rows (of quality where the objective is bound or floor)."""
    root = evidence.regroup(np.zeros(len(evidence.rows), dtype=np.int64), 1)
    utility = np.where(root.rows[0] > 0, root.mean[0] @ objective.direction, -np.inf)
    return int(utility.argmax())


def oracle(rows: Outcomes) -> Choice | None:
    """The best config of each query in hindsight, None unless every query was tried under several."""
    if (np.bincount(rows.query_row, minlength=rows.queries) < 2).any():
        return None
    order = np.lexsort((-rows.utility, rows.query_row))
    first = np.flatnonzero(np.diff(rows.query_row[order], prepend=-1))
    return rows.config_id[order[first]]


def evaluate(rows: Outcomes, policies: dict[str, Choice], resamples: int, seed: int) -> Evaluation:
    """Values every policy (name to (Q,) config ids; -1 is a config that the table does not know).

    policies must hold "default", "bank" and SINGLE; "oracle" is used where present.
    """
    names = list(policies)
    matched = {name: rows.config_id == policies[name][rows.query_row] for name in names}
    weight_QM = np.stack([_by_query(rows, matched[n] * rows.weight) for n in names], axis=1)
    utility_QM = np.stack([_by_query(rows, matched[n] * rows.weight * rows.utility) for n in names], axis=1)
    with np.errstate(invalid="ignore"):
        point_M = utility_QM.sum(0) / weight_QM.sum(0)
    drawn = _bootstrap(weight_QM, utility_QM, resamples, seed)
    best = point_M[names.index(SINGLE)]
    gap = point_M[names.index("oracle")] - best if "oracle" in names else np.nan

    values = []
    for m, name in enumerate(names):
        hit = matched[name]
        share = rows.weight[hit] / rows.weight[hit].sum()
        p50, p95, p99 = _weighted_quantiles(rows.latency_us[hit], share, (0.5, 0.95, 0.99))
        known = bool(hit.any())
        values.append(
            PolicyValue(
                name=name,
                utility=float(point_M[m]),
                quality=float(share @ rows.quality[hit]) if known else float("nan"),
                latency_p50_us=p50,
                latency_p95_us=p95,
                latency_p99_us=p99,
                cost=float(share @ rows.cost[hit]) if known else float("nan"),
                captured=float((point_M[m] - best) / gap) if gap > 0 else float("nan"),
                acted=float((policies[name] != rows.default).mean()),
                matched=int(hit.sum()),
            )
        )
    bank = names.index("bank")
    gains = {
        name: Gain(float(point_M[bank] - point_M[m]), *_interval(drawn[:, bank] - drawn[:, m]))
        for m, name in enumerate(names)
        if m != bank
    }
    complete = all((_by_query(rows, matched[n].astype(np.float64)) > 0).all() for n in names)
    grade = "exact" if complete else "snips" if rows.logged_propensity else "associational"
    return Evaluation(grade, rows.queries, len(rows.query_row), values, gains)


def _by_query(rows: Outcomes, values_N: Floats) -> Floats:
    return np.bincount(rows.query_row, weights=values_N, minlength=rows.queries).astype(np.float64)


def _bootstrap(weight_QM: Floats, utility_QM: Floats, resamples: int, seed: int) -> Floats:
    """(resamples, M) values on queries drawn with replacement, the same queries for every policy."""
    rng = np.random.default_rng(seed)
    queries = len(weight_QM)
    out = []
    for start in range(0, resamples, RESAMPLES_AT_ONCE):
        count = min(RESAMPLES_AT_ONCE, resamples - start)
        times = np.stack([np.bincount(rng.integers(queries, size=queries), minlength=queries) for _ in range(count)])
        with np.errstate(invalid="ignore"):
            out.append((times @ utility_QM) / (times @ weight_QM))
    return np.concatenate(out)


def _interval(drawn: Floats) -> tuple[float, float]:
    known = drawn[np.isfinite(drawn)]
    if len(known) == 0:
        return float("nan"), float("nan")
    low, high = np.quantile(known, (0.025, 0.975))
    return float(low), float(high)


def _weighted_quantiles(values: Floats, share: Floats, levels: tuple[float, ...]) -> tuple[float, ...]:
    if len(values) == 0:
        return tuple(float("nan") for _ in levels)
    order = np.argsort(values)
    running = np.cumsum(share[order])
    at = np.minimum(np.searchsorted(running, levels), len(values) - 1)
    return tuple(float(v) for v in values[order][at])


def value_bank(
    bank: ReasoningBank, held_out: Trajectories, single: int, config: EvalConfig, seed: int,
    champion: ReasoningBank | None = None, others: dict[str, Choice] | None = None,
) -> Evaluation:  # fmt: skip
    """The policy table of a bank, and of the champion and other choices where given, on held-out trajectories.

    Each bank's configs are looked up among the table's; one that the table lacks is -1 and matches no row.
    """
    rows = held_out_outcomes(held_out, bank.data.objective)
    queries = len(held_out.query_id)
    policies = {
        "default": np.full(queries, held_out.configs.default),
        SINGLE: np.full(queries, single),
        "bank": _choices(bank, held_out),
    }
    if champion is not None:
        policies[CHAMPION] = _choices(champion, held_out)
    policies |= others or {}
    hindsight = oracle(rows)
    if hindsight is not None:
        policies["oracle"] = hindsight
    return evaluate(rows, policies, config.bootstrap, seed)


def _choices(bank: ReasoningBank, table: Trajectories) -> Choice:
    """What the bank picks for each query (Q,), as config ids of the table."""
    ids = [table.configs.id_of(params) for params in bank.configs]
    known = np.array([-1 if one is None else one for one in ids])
    return np.asarray(known[bank.optimized_params_batch(table.x_QD)["config_id"]])


def improvement_percent(evaluation: Evaluation) -> float | None:
    """Relative gain in quality of the bank over the default, None where the default's quality is 0."""
    base = evaluation.value("default").quality
    return 100.0 * (evaluation.value("bank").quality - base) / base if base > 0 else None
