"""Nearest-neighbour searches in the suite decisions: the cost of a mean recall of TARGET under each method, and the
cost of a recall floor for every kind of query.

Each method chooses by quality − w·cost for many weights w, which traces a curve of mean cost over mean recall; its cost
is read off where mean recall is TARGET. Fixed settings trace a curve too: between two neighbouring settings, queries
are split at random. Suffixes: Q training queries, B held-out queries, C configs, G weights of cost.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from rb_gpu.bench.sets import Outcomes, kinds, outcomes_of, tables
from rb_gpu.learn.baselines import LEARNERS, Training, centroids, unit
from rb_gpu.learn.config import JudgeConfig, TrainConfig
from rb_gpu.learn.pipeline import learn
from rb_gpu.learn.trajectories import Trajectories
from rb_gpu.learn.valuation import Choice
from rb_gpu.learn.verdicts import resolve_objective
from rb_gpu.objective import Objective
from rb_gpu.types import Tradeoff

Floats = npt.NDArray[np.float64]

TARGET = 0.95
# a query with a lower recall counts as badly served
BAD_RECALL = 0.8
# cost weights w, for costs as shares of the most expensive config's mean cost
WEIGHTS_G = np.geomspace(1e-3, 10.0, 49)
RESAMPLES = 300
FLOOR_CLUSTERS = 16


def searches(table: Trajectories) -> bool:
    """Whether a data set is of a nearest-neighbour search, that is, its configs differ in ef_search or n_probes."""
    return len(np.unique(table.configs.ef_search)) > 1 or len(np.unique(table.configs.n_probes)) > 1


@dataclass(frozen=True)
class Curve:
    """Recall and cost, (G, B) each, of a method's choice for every held-out query under each weight of cost."""

    recall_GB: Floats
    cost_GB: Floats

    def at(self, times_B: Floats, target: float) -> tuple[float, float]:
        """Mean cost and share of badly served queries at a mean recall of `target`; NaN if the curve does not reach it.

        times_B: how often each query counts (bootstrap). Values are interpolated linearly along the Pareto front.
        """
        share_B = times_B / times_B.sum()
        recall_G, cost_G = self.recall_GB @ share_B, self.cost_GB @ share_B
        bad_G = (self.recall_GB < BAD_RECALL) @ share_B
        front = pareto(recall_G, cost_G)
        if not recall_G[front[0]] <= target <= recall_G[front[-1]]:
            return float("nan"), float("nan")
        cost, bad = (float(np.interp(target, recall_G[front], v_G[front])) for v_G in (cost_G, bad_G))
        return cost, bad


def pareto(recall_G: Floats, cost_G: Floats) -> npt.NDArray[np.int64]:
    """Indices of the Pareto-optimal points: no other has at least their recall at the same or less cost. Sorted by
    increasing cost and recall.
    """
    order = np.lexsort((-recall_G, cost_G))
    best_before = np.concatenate([[-np.inf], np.maximum.accumulate(recall_G[order])[:-1]])
    return order[recall_G[order] > best_before]


def curve(choice_GB: npt.NDArray[np.int64], held_out: Outcomes) -> Curve:
    """The recall and cost of the choices (G, B) on the held-out queries."""
    each = np.arange(choice_GB.shape[1])
    return Curve(held_out.quality_QC[each, choice_GB], held_out.cost_QC[each, choice_GB])


def _weight_at_target(training: Outcomes, cost_ref: float) -> float:
    """The weight of cost at which the best fixed setting on training queries has a mean recall nearest to TARGET."""
    recall_C, share_C = training.quality_QC.mean(0), training.cost_QC.mean(0) / cost_ref
    chosen_G = (recall_C - WEIGHTS_G[:, None] * share_C).argmax(1)
    return float(WEIGHTS_G[np.abs(recall_C[chosen_G] - TARGET).argmin()])


def matched_recall(folder: str, name: str, seed: int) -> dict[str, Curve]:
    """The curve of every method.

    The bank is trained for the one cost weight that suits TARGET, and moves along its curve by `tradeoff` at lookup.
    The baselines are tuned once and predict quality and cost separately, except soft clusters, which vote anew for
    every weight. The reference method has no trade-off and is left out.
    """
    training, held_out = tables(folder)[name]
    config, objective, bank = _learned(training, JudgeConfig(latency_weight=0.0), seed)
    before = outcomes_of(training, objective)
    config.judge.cost_weight = _weight_at_target(before, objective.cost_ref)
    config, objective, bank = _learned(training, config.judge, seed)
    after, x_BD = outcomes_of(held_out, objective), unit(held_out.x_QD)
    queries, configs = after.quality_QC.shape
    found = {
        "fixed": curve(np.broadcast_to(np.arange(configs)[:, None], (configs, queries)), after),
        "bank": curve(
            np.stack([bank.optimized_params_batch(held_out.x_QD, Tradeoff(0.0, w))["config_id"] for w in WEIGHTS_G]),
            after,
        ),
        "oracle": curve(_sweep(after.quality_QC, after.cost_QC / objective.cost_ref), after),
    }
    table = Training.of(training, objective)
    quality_N = before.quality_QC[table.query_N, table.config_N]
    share_N = before.cost_QC[table.query_N, table.config_N] / objective.cost_ref
    for method, learner in LEARNERS.items():
        predict = learner(table, np.random.default_rng(seed))
        if method == "soft clusters":
            choice_GB = np.stack([
                predict(replace(table, utility_N=quality_N - w * share_N), x_BD).argmax(1) for w in WEIGHTS_G
            ])  # fmt: skip
        else:
            quality, share = (predict(replace(table, utility_N=v_N), x_BD) for v_N in (quality_N, share_N))
            choice_GB = _sweep(quality, share)
        found[method] = curve(choice_GB, after)
    return found


def _learned(training: Trajectories, judging: JudgeConfig, seed: int) -> tuple[TrainConfig, Objective, Any]:
    config = TrainConfig(judge=judging, seed=seed)
    config.index.kind = "off"
    bank = learn(training, config).bank()
    return config, resolve_objective(judging, config.quality, training, bank.data.evidence), bank


def _sweep(quality_BC: Floats, share_BC: Floats) -> npt.NDArray[np.int64]:
    return np.stack([(quality_BC - w * share_BC).argmax(1) for w in WEIGHTS_G])


def pooled(runs: list[dict[str, Curve]]) -> dict[str, dict[str, float]]:
    """Each method's cost at TARGET relative to that of the fixed settings, minus 1, and its share of badly served
    queries, as means over seeds. The 95 % interval of the former bootstraps the held-out queries, with the same
    resamples for all methods and seeds.
    """
    queries = runs[0]["fixed"].recall_GB.shape[1]
    rng = np.random.default_rng(0)
    draws = [np.ones(queries)] + [
        np.bincount(rng.integers(queries, size=queries), minlength=queries).astype(np.float64) for _ in range(RESAMPLES)
    ]
    fixed_R = np.array([runs[0]["fixed"].at(times_B, TARGET)[0] for times_B in draws])
    out = {}
    for method in runs[0]:
        same = runs[:1] if method in ("fixed", "oracle") else runs
        at_SR2 = np.array([[run[method].at(times_B, TARGET) for times_B in draws] for run in same])
        ratio_R = at_SR2[:, :, 0].mean(0) / fixed_R - 1.0
        known = ratio_R[1:][np.isfinite(ratio_R[1:])]
        low, high = np.quantile(known, (0.025, 0.975)) if len(known) else (np.nan, np.nan)
        out[method] = {
            "cost": float(at_SR2[:, 0, 0].mean()), "change": float(ratio_R[0]), "low": float(low), "high": float(high),
            "bad": float(at_SR2[:, 0, 1].mean()),
        }  # fmt: skip
    return out


def recall_floor(folder: str, name: str, seed: int) -> dict[str, dict[str, float]]:
    """Each method's mean cost, and its mean recall overall and by kind of query, when TARGET is the floor of recall.

    The bank (objective=floor) is compared with the cheapest setting whose mean recall on training queries reaches
    TARGET: over all queries, for every kind at once, in each of 16 clusters, and in each kind, if a query's kind were
    known. Empty if the data set has no kinds.
    """
    training, held_out = tables(folder)[name]
    kind_Q, kind_B = kinds(folder, training), kinds(folder, held_out)
    if kind_Q is None or kind_B is None:
        return {}
    _, objective, bank = _learned(training, JudgeConfig(latency_weight=0.0, objective="floor", target=TARGET), seed)
    before, after = outcomes_of(training, objective), outcomes_of(held_out, objective)
    x_QD, x_BD = unit(training.x_QD), unit(held_out.x_QD)
    centroids_KD = centroids(x_QD, FLOOR_CLUSTERS, np.random.default_rng(seed))
    label_Q, label_B = (x_QD @ centroids_KD.T).argmax(1), (x_BD @ centroids_KD.T).argmax(1)
    worst_C = np.min([before.quality_QC[kind_Q == kind].mean(0) for kind in np.unique(kind_Q)], axis=0)
    order_C = np.argsort(before.cost_QC.mean(0), kind="stable")
    every = order_C[(worst_C[order_C] >= TARGET).argmax()] if (worst_C >= TARGET).any() else worst_C.argmax()
    same_Q, same_B = np.zeros(len(x_QD), np.int64), np.zeros(len(x_BD), np.int64)
    choices: dict[str, Choice] = {
        "bank": bank.optimized_params_batch(held_out.x_QD)["config_id"],
        "fixed, on the whole": _cheapest(before, same_Q, same_B),
        "fixed, for every kind": np.full(len(x_BD), int(every)),
        "16 clusters": _cheapest(before, label_Q, label_B),
        "knowing the kind": _cheapest(before, kind_Q, kind_B),
    }
    out = {}
    for method, choice_B in choices.items():
        reached = curve(choice_B[None], after)
        recall_B = reached.recall_GB[0]
        by_kind = {str(kind): float(recall_B[kind_B == kind].mean()) for kind in np.unique(kind_B)}
        out[method] = {"cost": float(reached.cost_GB.mean()), "recall": float(recall_B.mean()), **by_kind}
    return out


def _cheapest(before: Outcomes, group_Q: npt.NDArray[Any], group_B: npt.NDArray[Any]) -> Choice:
    """(B,) the cheapest config whose mean recall in the query's group reaches TARGET, else that of highest recall."""
    choice_B = np.zeros(len(group_B), dtype=np.int64)
    for group in np.unique(group_B):
        recall_C, cost_C = (v_QC[group_Q == group].mean(0) for v_QC in (before.quality_QC, before.cost_QC))
        reaches = recall_C >= TARGET
        best = np.where(reaches, cost_C, np.inf).argmin() if reaches.any() else recall_C.argmax()
        choice_B[group_B == group] = best
    return choice_B


def averaged(runs: list[dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    """The mean over seeds of every number."""
    return {
        method: {key: float(np.mean([run[method][key] for run in runs])) for key in row}
        for method, row in runs[0].items()
    }
