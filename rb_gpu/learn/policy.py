"""What policies are worth on held-out queries: a bank beside the default, the best single config and the oracle.

A policy picks one config per query. valuation.py values its picks, or says why they have no value. This module compares
the values: gains with paired intervals, the regret to the oracle, and how many patterns are harmed.
Suffixes: Q queries, N rows, C configs, P leaf patterns, D dims, R resamples, M policies,
G clusters of queries (Outcomes.cluster).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
import torch

from rb_gpu.bank import ReasoningBank
from rb_gpu.evidence import OUTCOMES, Evidence
from rb_gpu.learn.arrays import weighted_quantiles
from rb_gpu.learn.bootstrap import resampled_means
from rb_gpu.learn.calibration import Calibration, Promise, measure_calibration
from rb_gpu.learn.config import EvalConfig
from rb_gpu.learn.devices import tiles
from rb_gpu.learn.distances import normalise_
from rb_gpu.learn.estimators import effective_size
from rb_gpu.learn.harm import UNKNOWN_HARM, Harm, measure_harm
from rb_gpu.learn.requirements import broken, keeping
from rb_gpu.learn.tradeoffs import Tradeoffs, choices, measure_tradeoffs
from rb_gpu.learn.trajectories import Trajectories
from rb_gpu.learn.valuation import LEAST_SIZE, Choice, Floats, Outcomes, Valuation, held_out_outcomes
from rb_gpu.learn.verdicts import Z_95
from rb_gpu.objective import Objective
from rb_gpu.registry import CHAMPION

SINGLE = "best single config"
NAN = float("nan")


@dataclass(frozen=True)
class Gain:
    """A difference of utility and its 95 % interval; NaN where one side is unknown."""

    gain: float
    low: float
    high: float


@dataclass(frozen=True)
class PolicyValue:
    """One row of the table; utility with its 95 % interval, in the objective's unit. Unknown numbers are NaN.

    captured: share of the gap between the best single config and the oracle that the policy closes. regret: the
    oracle's utility less this one. acted, abstained: shares of the queries on which it leaves the default, and on which
    it does not. matched: rows that tried what it picks; ess: their effective number (Kish). harm: among the patterns in
    which it acts. estimates: utility by simpler estimators, if the grade is dr. unknown: why the policy has no value,
    None if it has one.
    """

    name: str
    utility: float
    low: float
    high: float
    quality: float
    latency_p50_us: float
    latency_p95_us: float
    latency_p99_us: float
    cost: float
    captured: float
    regret: float
    acted: float
    abstained: float
    matched: int
    ess: float
    harm: Harm
    estimates: dict[str, float]
    unknown: str | None


@dataclass(frozen=True)
class Evaluation:
    """The policy table; grade is exact, dr or associational (valuation.py).

    bank_gains: utility of the policy "bank" less that of each other one, with a paired 95 % interval: by the jackknife
    if the grade is dr, else by a bootstrap, both over queries, or over whole sessions where these were logged.
    warnings: what is wrong with the propensities, or doubtful without them. misled: policies whose values rest on wrong
    propensities. tradeoffs: quality over cost, None without logged costs and for a bank that cannot answer for another
    trade-off. calibration: of the bank's confidence, None where too few patterns act. coverage: share of the queries at
    or above the bank's similarity floor, NaN without a bank. broken: by policy, how it violates the objective's floor
    or bound. doubtful: how it may violate a floor, by an estimate that is not significantly below it.
    """

    grade: str
    queries: int
    rows: int
    values: list[PolicyValue]
    bank_gains: dict[str, Gain]
    warnings: list[str] = field(default_factory=list)
    tradeoffs: Tradeoffs | None = None
    calibration: Calibration | None = None
    coverage: float = NAN
    misled: list[str] = field(default_factory=list)
    broken: dict[str, str] = field(default_factory=dict)
    doubtful: dict[str, str] = field(default_factory=dict)

    def value(self, name: str) -> PolicyValue:
        """The row of one policy. Raises KeyError."""
        for value in self.values:
            if value.name == name:
                return value
        raise KeyError(name)


def best_single(evidence: Evidence, objective: Objective) -> int:
    """The config of highest mean utility over all training rows, among those with LEAST_SIZE effective rows if there
    are any, since a few lucky rows could decide otherwise. For the objective bound: the highest quality within the
    bounds; for floor: the cheapest that reaches it. If no config does: the highest quality.
    """
    root = evidence.pooled()
    tried = root.rows[0] > 0
    enough = tried & (root.w[0] ** 2 >= LEAST_SIZE * root.w2[0])
    eligible = enough if enough.any() else tried
    kept = eligible & keeping(root, objective)
    worth_C = root.mean[0] @ objective.direction
    if objective.kind == "floor" and kept.any():
        cost_C = root.mean[0, :, OUTCOMES.index("cost")]
        latency_us = np.exp2(root.mean[0, :, OUTCOMES.index("log2_latency")])
        worth_C = objective.utility(worth_C, latency_us, cost_C)
    return int(np.where(kept if kept.any() else eligible, worth_C, -np.inf).argmax())


def oracle(rows: Outcomes) -> Choice | None:
    """The config of highest mean utility on each query; None unless every query ran under at least two configs."""
    configs = len(rows.configs)
    cell, inverse, count = np.unique(rows.query_row * configs + rows.config_id, return_inverse=True, return_counts=True)
    query, config = np.divmod(cell, configs)
    if (np.bincount(query, minlength=rows.queries) < 2).any():
        return None
    order = np.lexsort((-np.bincount(inverse, rows.utility) / count, query))
    return np.asarray(config[order[np.flatnonzero(np.diff(query[order], prepend=-1))]])


def evaluate(
    rows: Outcomes, policies: dict[str, Choice], resamples: int, seed: int, leaf_Q: Choice | None = None
) -> Evaluation:
    """Values every policy (name to (Q,) config ids; -1 is a config that the table does not know).

    policies must hold "default", "bank" and SINGLE. "oracle" is optional and valued only if the grade is exact: it was
    chosen by the outcomes, and only a full table has the outcomes of all choices. leaf_Q: leaf pattern of each query,
    by which harm is measured.
    """
    valuation = Valuation(rows, policies.values())
    if valuation.grade != "exact":
        policies = {name: choice for name, choice in policies.items() if name != "oracle"}
    unknown = {name: valuation.refusal(choice) for name, choice in policies.items()}
    point = {n: NAN if unknown[n] else valuation.estimate("utility", choice).value for n, choice in policies.items()}
    exact_gap = point.get("oracle", NAN) - point[SINGLE]
    drawn_RM = None if valuation.grade == "dr" else _bootstrap(valuation, policies, resamples, seed)

    values = []
    for m, (name, choice) in enumerate(policies.items()):
        weight_N = valuation.weights(choice)
        hit_N = weight_N > 0
        p50, p95, p99 = weighted_quantiles(rows.latency_us[hit_N], weight_N[hit_N], (0.5, 0.95, 0.99)).tolist()
        if unknown[name]:
            quality = cost = low = high = p50 = p95 = p99 = NAN
        else:
            quality, cost = (valuation.estimate(column, choice).value for column in ("quality", "cost"))
            low, high = (
                valuation.interval(choice)
                if drawn_RM is None
                else _widened(point[name], _interval(drawn_RM[:, m]), valuation.rare(choice))
            )
        acted = float((choice != rows.default).mean())
        values.append(
            PolicyValue(
                name=name,
                utility=point[name],
                low=low,
                high=high,
                quality=quality,
                latency_p50_us=p50,
                latency_p95_us=p95,
                latency_p99_us=p99,
                cost=cost,
                captured=(point[name] - point[SINGLE]) / exact_gap if exact_gap > 0 else NAN,
                regret=point.get("oracle", NAN) - point[name],
                acted=acted,
                abstained=1.0 - acted,
                matched=int(hit_N.sum()),
                ess=effective_size(weight_N),
                harm=UNKNOWN_HARM
                if leaf_Q is None or unknown[name] or unknown["default"]
                else measure_harm(valuation, choice, policies["default"], leaf_Q),
                estimates={} if unknown[name] else valuation.beside(choice),
                unknown=unknown[name],
            )
        )
    gains = _bank_gains(valuation, policies, point, drawn_RM)
    misled = [name for name, choice in policies.items() if valuation.misled(choice)]
    return Evaluation(
        valuation.grade, rows.queries, len(rows.query_row), values, gains, valuation.warnings(), misled=misled
    )


def _bank_gains(
    valuation: Valuation, policies: dict[str, Choice], point: dict[str, float], drawn_RM: Floats | None
) -> dict[str, Gain]:
    """Utility of the bank less that of each other policy. point: utilities, NaN where unknown. drawn_RM: utilities on
    resamples; None to use the estimator's own interval.
    """
    bank, picked = list(policies).index("bank"), policies["bank"]
    gains = {}
    for m, (name, choice) in enumerate(policies.items()):
        if m == bank:
            continue
        gain = point["bank"] - point[name]
        if math.isnan(gain):
            gains[name] = Gain(NAN, NAN, NAN)
        elif drawn_RM is None:
            gains[name] = Gain(gain, *valuation.interval(picked, choice))
        else:
            drawn_R = drawn_RM[:, bank] - drawn_RM[:, m]
            gains[name] = Gain(gain, *_widened(gain, _interval(drawn_R), valuation.rare(picked, choice)))
    return gains


def _bootstrap(valuation: Valuation, policies: dict[str, Choice], resamples: int, seed: int) -> Floats:
    """(resamples, M) utilities on clusters of queries drawn with replacement, the same ones for every policy."""
    rows = valuation.rows
    cluster_N = rows.cluster[rows.query_row]
    weights = [valuation.weights(choice) for choice in policies.values()]

    def by_cluster(values_N: Floats) -> Floats:
        return np.bincount(cluster_N, values_N).astype(np.float64)

    weight_GM = np.stack([by_cluster(weight_N) for weight_N in weights], axis=1)
    utility_GM = np.stack([by_cluster(weight_N * rows.utility) for weight_N in weights], axis=1)
    return resampled_means(utility_GM, weight_GM, resamples, seed)


def _interval(drawn: Floats) -> tuple[float, float]:
    known = drawn[np.isfinite(drawn)]
    if len(known) == 0:
        return NAN, NAN
    low, high = np.quantile(known, (0.025, 0.975))
    return float(low), float(high)


def _widened(value: float, ends: tuple[float, float], rare: float) -> tuple[float, float]:
    """The interval widened by the standard error `rare`, which no resampling shows."""
    low, high = (math.hypot(value - end, Z_95 * rare) for end in ends)
    return value - low, value + high


def value_bank(
    bank: ReasoningBank, held_out: Trajectories, single: int, config: EvalConfig, seed: int,
    champion: ReasoningBank | None = None, others: dict[str, Choice] | None = None, brief: bool = False,
    rows: Outcomes | None = None,
) -> Evaluation:  # fmt: skip
    """The policy table of a bank, and of the champion and other choices where given, on held-out trajectories.

    Each bank's configs are looked up among the table's. One that the table lacks becomes -1, and a policy that picks it
    has no value. brief: without trade-offs and calibration. rows: outcomes of held_out, if already computed.
    """
    rows = held_out_outcomes(held_out, bank.data.objective) if rows is None else rows
    queries = len(held_out.query_id)
    policies = {
        "default": np.full(queries, held_out.configs.default),
        SINGLE: np.full(queries, single),
        "bank": choices(bank, held_out),
    }
    if champion is not None:
        policies[CHAMPION] = choices(champion, held_out)
    policies |= others or {}
    objective = bank.data.objective
    # under a floor or bound, more utility is no better if the floor or bound is broken for it
    alone = objective.kind == "utility"
    hindsight = oracle(rows) if alone else None
    if hindsight is not None:
        policies["oracle"] = hindsight
    leaf_Q, cosine_Q = nearest_leaves(bank, held_out.x_QD)
    evaluation = evaluate(rows, policies, config.bootstrap, seed, leaf_Q if alone else None)
    breaks, doubts = broken(
        objective, evaluation, rows, lambda other: evaluate(other, policies, config.bootstrap, seed)
    )
    coverage = float((cosine_Q >= bank.data.lookup.floor).mean())
    evaluation = replace(evaluation, coverage=coverage, broken=breaks, doubtful=doubts)
    if held_out.cost is None:
        evaluation = replace(evaluation, values=[replace(value, cost=NAN) for value in evaluation.values])
    if brief:
        return evaluation
    valuation = Valuation(rows, policies.values())
    refused = any(valuation.refusal(policies[name]) for name in ("bank", "default"))
    calibration = None
    if not refused and bank.data.method == "eb" and alone:
        picked = (policies["bank"], policies["default"], leaf_Q)
        calibration = measure_calibration(valuation, *picked, _promise(bank, held_out.x_QD), seed)
    return replace(evaluation, tradeoffs=measure_tradeoffs(bank, held_out, valuation), calibration=calibration)


def _promise(bank: ReasoningBank, x_QD: npt.NDArray[np.float32]) -> Promise:
    said = bank.optimized_params_batch(x_QD)
    confidence, gain = (said[name].astype(np.float64) for name in ("confidence", "expected_gain"))
    return Promise(confidence, gain, bank.data.arrays["margin"][said["config_id"]].astype(np.float64))


def nearest_leaves(bank: ReasoningBank, x_QD: npt.NDArray[np.float32]) -> tuple[Choice, npt.NDArray[np.float32]]:
    """(Q,) row of the leaf pattern of largest cosine to each query, and that cosine."""
    unit_PD = normalise_(torch.tensor(bank.data.arrays["centroids"][: bank.data.leaves], dtype=torch.float32))
    x = torch.from_numpy(np.asarray(x_QD, dtype=np.float32))
    # cosines times the query's norm, which ranks the leaves the same
    best = [(x[tile] @ unit_PD.T).max(1) for tile in tiles(len(x), len(unit_PD), x.device)]
    cosine_Q = torch.cat([one.values for one in best]) / x.norm(dim=1)
    return torch.cat([one.indices for one in best]).numpy(), cosine_Q.numpy()


def improvement_percent(evaluation: Evaluation) -> float | None:
    """Relative gain in quality of the bank over the default, None where either is unknown or the default's is 0."""
    base, bank = (evaluation.value(name).quality for name in ("default", "bank"))
    return 100.0 * (bank - base) / base if base > 0 and math.isfinite(bank) else None
