"""What is maximised, as a linear combination of outcomes, and the choice of a config by it. NumPy only, as the batch
job and the lookup share it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from rb_gpu.evidence import OUTCOMES, Floats


@dataclass(frozen=True)
class Objective:
    """What is maximised; weights and references are those of design section 7. quality: f1 or product.

    kind utility: quality − latency_weight·log2(latency / latency_ref) − cost_weight·cost / cost_ref.
    kind bound: quality, with p95 latency under max_latency_us and mean cost under max_cost where these are given.
    kind floor: the least cost (or latency, if no cost was logged) with which quality reaches `target`.
    """

    kind: str
    quality: str
    latency_weight: float
    cost_weight: float
    latency_ref_us: float
    cost_ref: float
    target: float
    max_latency_us: float | None
    max_cost: float | None

    @property
    def quality_direction(self) -> Floats:
        """(O,) coefficients of quality in terms of OUTCOMES."""
        return np.array([float(name == self.quality) for name in OUTCOMES])

    @property
    def direction(self) -> Floats:
        """(O,) coefficients of the maximised quantity in terms of OUTCOMES; its constant cancels in comparisons."""
        direction = self.quality_direction
        if self.kind == "utility":
            direction[OUTCOMES.index("log2_latency")] = -self.latency_weight
            direction[OUTCOMES.index("cost")] = -self.cost_weight / self.cost_ref
        return direction

    def utility(self, quality: Floats, latency_us: Floats, cost: Floats) -> Floats:
        """Utility of single outcomes, including its constant, elementwise. For kind bound it is quality alone; for kind
        floor, minus cost as a share of cost_ref, or minus log2(latency / latency_ref) if there is no cost, because a
        few answers that the machine delays would dominate a mean latency.
        """
        if self.kind == "bound":
            return quality
        octaves = np.log2(np.maximum(latency_us, 1.0) / self.latency_ref_us)
        if self.kind == "floor":
            return -(cost / self.cost_ref) if cost.any() else -octaves
        return quality - self.latency_weight * octaves - self.cost_weight * cost / self.cost_ref


def choose(
    score: npt.NDArray[np.floating],
    probability: npt.NDArray[np.floating],
    second: npt.NDArray[np.floating],
    least: float | npt.NDArray[np.floating],
    default: int,
    likeliest: bool,
) -> npt.NDArray[np.int64]:
    """For each row of (P, C): argmax of score where probability >= least; else the default or, if likeliest, argmax of
    `second`.

    For a floor far out of reach all probabilities are 0, so second is another measure of how near a config comes to it.
    """
    eligible = np.where(probability >= least, score, -np.inf)
    best = eligible.argmax(1)
    none = eligible[np.arange(len(best)), best] == -np.inf
    return np.where(none, second.argmax(1) if likeliest else default, best)
