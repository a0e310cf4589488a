"""Constraints of an objective besides what it maximises (a floor on quality, a bound on cost or latency), and which
configs and policies satisfy them.

Suffix: C configs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from rb_gpu.evidence import OUTCOMES, Evidence
from rb_gpu.learn.valuation import Outcomes
from rb_gpu.objective import Objective

if TYPE_CHECKING:  # policy imports this module
    from rb_gpu.learn.policy import Evaluation, PolicyValue


def keeping(root: Evidence, objective: Objective) -> npt.NDArray[np.bool_]:
    """(C,) which configs satisfy the constraint overall, where root is the evidence of all rows as one pattern."""
    quality_C = root.mean[0] @ objective.quality_direction
    if objective.kind == "floor":
        return np.asarray(quality_C >= objective.target)
    kept = np.ones(len(quality_C), dtype=bool)
    if objective.kind == "bound" and objective.max_latency_us is not None:
        kept &= root.latency_quantile(0.95)[0] <= objective.max_latency_us
    if objective.kind == "bound" and objective.max_cost is not None:
        kept &= root.mean[0, :, OUTCOMES.index("cost")] <= objective.max_cost
    return kept


def broken(
    objective: Objective, evaluation: Evaluation, rows: Outcomes, value: Callable[[Outcomes], Evaluation]
) -> tuple[dict[str, str], dict[str, str]]:
    """By name, how each policy violates the constraint, and how it may do so; policies that satisfy it, or without a
    value, are omitted.

    A floor is violated if the quality is significantly below it, and may be violated if the quality is below it, but
    not significantly; a bound is violated if the cost or latency is above it. value: evaluates the same policies on
    other outcomes.
    """
    known = {one.name: one for one in evaluation.values if one.unknown is None}
    if objective.kind == "floor":
        by_quality = value(replace(rows, utility=rows.quality))
        short = {name: by_quality.value(name) for name in known if by_quality.value(name).utility < objective.target}
        told = {
            name: f"held-out quality {one.utility:.4f}, 95 % upper bound {one.high:.4f}, is under "
            f"judge.target={objective.target:g}"
            for name, one in short.items()
        }
        doubtful = {name: told.pop(name) for name, one in short.items() if one.high >= objective.target}
        return told, doubtful
    if objective.kind == "bound":
        over = {name: _over(objective, one) for name, one in known.items()}
        return {name: what for name, what in over.items() if what}, {}
    return {}, {}


def _over(objective: Objective, one: PolicyValue) -> str:
    if objective.max_cost is not None and one.cost > objective.max_cost:
        return f"held-out cost {one.cost:.4g} is over judge.max_cost={objective.max_cost:g}"
    if objective.max_latency_us is not None and one.latency_p95_us > objective.max_latency_us:
        return (
            f"held-out p95 latency {one.latency_p95_us:.4g} us is over judge.max_latency_us="
            f"{objective.max_latency_us:g}"
        )
    return ""
