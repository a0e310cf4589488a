"""Assembles what was learned into the arrays of an artifact: leaves first, then each level above.

Suffixes: A patterns of all levels, P leaves, G nodes of one level, D dims, Q queries.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt

from rb_gpu.bank_data import ARRAYS, BankData, LookupSettings
from rb_gpu.evidence import Evidence
from rb_gpu.field import FIELD_ARRAYS, Field
from rb_gpu.learn.checks import is_auto
from rb_gpu.learn.config import JudgeConfig, TrainConfig
from rb_gpu.learn.floor import Unseen
from rb_gpu.learn.patterns import summarise
from rb_gpu.learn.trajectories import Trajectories
from rb_gpu.learn.verdicts import VerdictColumns, verdict_matrices
from rb_gpu.objective import Objective
from rb_gpu.params import ConfigTable
from rb_gpu.posterior import Beliefs

Rows = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
# with a test, a pattern votes fully or not at all, so that a weighted majority decides
MAJORITY = 0.5
# least probability of beating the default: if choices were shown to pay as a whole, the likelier side suffices;
# otherwise each choice must be sure on its own
PROVEN, UNPROVEN = 0.5, 0.8
# untuned lookup: how many nearest patterns vote, and the slope of their weights
USUAL_TOP_K, USUAL_BETA = 5, 16.0


@dataclass(frozen=True)
class Leaves:
    """The leaves: label_Q (Q,) of each training query, -1 where it was pruned; sums_PD and mass_P, the weighted sum of
    each leaf's embeddings and its weight, from which centroids of all levels are computed; evidence; parents per level.

    field: the outcome field, which predicts a query's outcomes beyond what its leaf says, if one was fitted; pays:
    whether its choices were shown to pay; unseen: for the objective floor, its predictions for queries it was not
    fitted on.
    """

    label_Q: Rows
    sums_PD: Floats
    mass_P: Floats
    evidence: Evidence
    parents: list[Rows]
    field: Field | None = None
    pays: bool = False
    unseen: Unseen | None = None

    def least_probability(self, judging: JudgeConfig) -> float:
        """judge.min_probability, with auto resolved."""
        if is_auto(judging.min_probability):
            return PROVEN if self.pays and self.unseen is None else UNPROVEN
        return float(judging.min_probability)


def assemble(
    trajectories: Trajectories,
    config: TrainConfig,
    leaves: Leaves,
    objective: Objective,
    beliefs: Beliefs,
    verdicts: VerdictColumns,
    floor: float,
) -> BankData:
    """The bank's arrays and settings, without its facts. If top_k or beta is auto, the standard value is set."""
    configs = trajectories.configs
    score, probability, gain = verdict_matrices(verdicts, beliefs, config.judge.method)
    confidence_P = confidence_of(probability, configs.default)
    arrays = _pattern_arrays(trajectories, config.cluster.metric, leaves, confidence_P)
    for f in fields(ConfigTable):
        if f"config_{f.name}" in ARRAYS:
            arrays[f"config_{f.name}"] = getattr(configs, f.name)
    arrays |= {
        "margin": beliefs.margin,
        "score": score,
        "probability": probability,
        "gain": gain,
        "expected_quality": beliefs.quality,
        "verdict_config": verdicts.config_id,
        **{f"verdict_{f.name}": getattr(verdicts, f.name) for f in fields(VerdictColumns) if f.name != "config_id"},
        **{f"evidence_{name}": array for name, array in leaves.evidence._asdict().items()},
    }
    if leaves.field is not None:
        arrays |= {f"field_{name}": array for name, array in leaves.field._asdict().items()}
        arrays |= {"field_test": beliefs.test, "field_test_sd": beliefs.test_sd}
    eb = config.judge.method == "eb"
    return BankData(
        arrays={
            name: np.ascontiguousarray(arrays[name], dtype=dtype)
            for name, (dtype, _) in (ARRAYS | FIELD_ARRAYS).items()
            if name in arrays
        },
        tiers=configs.tiers,
        default=configs.default,
        metric=config.cluster.metric,
        embedder=config.data.embedder,
        method=config.judge.method,
        grade=grade(trajectories.propensity is not None, leaves.evidence, configs.default),
        objective=objective,
        lookup=LookupSettings(
            top_k=USUAL_TOP_K if is_auto(config.lookup.top_k) else int(config.lookup.top_k),
            beta=USUAL_BETA if is_auto(config.lookup.beta) else float(config.lookup.beta),
            floor=floor,
            min_probability=leaves.least_probability(config.judge) if eb else MAJORITY,
            likeliest=eb and objective.kind == "floor",
            auto_margin=is_auto(config.judge.margin),
        ),
    )


def grade(logged_propensity: bool, evidence: Evidence, default: int) -> str:
    """How far a verdict may be read causally: randomized if propensities are logged, or if every query ran under every
    tried config; adjusted if each row of another config is compared with the default's on its own query, though which
    queries it ran on may depend on what it is worth there; else associational.
    """
    ran = evidence.pair_rows[:, evidence.rows.sum(0) > 0]
    if logged_propensity or (evidence.paired and (ran == evidence.pair_rows[:, [default]]).all()):
        return "randomized"
    return "adjusted" if evidence.paired else "associational"


def confidence_of(probability_UC: Floats, default: int) -> Floats:
    """(P,) each leaf's confidence: the highest probability, over configs other than the default, of beating it; for the
    methods that test, 1 where there is a verdict and else 0. probability_UC: from `verdict_matrices`.
    """
    other_PC = probability_UC[:-1].copy()
    other_PC[:, default] = 0.0
    return np.asarray(other_PC.max(1))


def _pattern_arrays(
    trajectories: Trajectories, metric: str, leaves: Leaves, confidence_P: Floats
) -> dict[str, npt.NDArray[Any]]:
    """The pattern columns of all levels, concatenated."""
    levels: list[dict[str, npt.NDArray[Any]]] = []
    count_P, score_P = _ratings(trajectories, leaves.label_Q, len(leaves.mass_P))
    weight_P = leaves.evidence.w.sum(1)
    newest = int(trajectories.timestamp.max())
    group_P = np.arange(len(leaves.mass_P))
    start = 0
    for level in range(len(leaves.parents) + 1):
        nodes = int(group_P.max()) + 1
        stop = start + nodes

        def add(values: npt.NDArray[Any], group: Rows = group_P, nodes: int = nodes) -> npt.NDArray[Any]:
            out = np.zeros((nodes, *values.shape[1:]), dtype=values.dtype)
            np.add.at(out, group, values)
            return out

        rows = summarise(leaves.evidence.regroup(group_P, nodes), trajectories.configs)
        params = rows.optimal_params
        levels.append(
            {
                "centroids": _centroids(add(leaves.sums_PD), add(leaves.mass_P), metric),
                "pattern_id": np.arange(start, stop),
                "level": np.full(nodes, level),
                "parent": leaves.parents[level] + stop if level < len(leaves.parents) else np.full(nodes, -1),
                "support": rows.support,
                "precision": rows.precision,
                "recall": rows.recall,
                "latency_us": rows.latency_us,
                "quality": rows.quality,
                "confidence": add(confidence_P * weight_P) / np.maximum(add(weight_P), 1e-300),
                "created_at": np.full(nodes, newest),
                "updated_at": np.full(nodes, newest),
                "rating_count": add(count_P),
                "rating_score": add(score_P),
                "optimal_ef_search": np.array([p.ef_search for p in params]),
                "optimal_n_probes": np.array([p.n_probes for p in params]),
                "optimal_tier": np.array([trajectories.configs.tiers.index(p.model_tier) for p in params]),
                "optimal_context_tokens": np.array([p.context_tokens for p in params]),
                "optimal_temperature": np.array([p.temperature for p in params]),
            }
        )
        if level < len(leaves.parents):
            group_P = leaves.parents[level][group_P]
        start = stop
    return {name: np.concatenate([one[name] for one in levels]) for name in levels[0]}


def _centroids(sums_GD: Floats, mass_G: Floats, metric: str) -> Floats:
    """Means of the members, projected on the unit sphere if the metric is cosine; where opposite members cancel out, no
    direction is nearer to them than another, and the first axis stands for all.
    """
    if metric == "cosine":
        sums_GD = sums_GD.copy()
        sums_GD[~sums_GD.any(1), 0] = 1.0
    scale = np.linalg.norm(sums_GD, axis=1) if metric == "cosine" else mass_G
    return np.asarray(sums_GD / np.maximum(scale, 1e-300)[:, None])


def _ratings(trajectories: Trajectories, label_Q: Rows, patterns: int) -> tuple[Rows, Floats]:
    """Votes per leaf: their number, and the sum of their positivity (1 star 0, 5 stars 1)."""
    label_N = label_Q[trajectories.query_row]
    rated = (trajectories.rating > 0) & (label_N >= 0)
    score = (trajectories.rating[rated].astype(np.float64) - 1.0) / 4.0
    count = np.bincount(label_N[rated], minlength=patterns).astype(np.int64)
    return count, np.bincount(label_N[rated], weights=score, minlength=patterns).astype(np.float64)
