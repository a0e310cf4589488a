"""What is maximised, as a combination of outcomes, and which config that makes. NumPy only, for the batch job and the
lookup alike.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from rb_gpu.evidence import OUTCOMES, Floats


@dataclass(frozen=True)
class Objective:
    """What is maximised. quality: f1 or product; weights and references as in design section 7.

    kind utility: quality − latency_weight·log2(latency / latency_ref) − cost_weight·cost / cost_ref.
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
        """(O,) quality as a combination of OUTCOMES."""
        return np.array([float(name == self.quality) for name in OUTCOMES])

    @property
    def direction(self) -> Floats:
        """(O,) what is maximised as a combination of OUTCOMES; its constant does not matter to a comparison."""
        direction = self.quality_direction
        if self.kind == "utility":
            direction[OUTCOMES.index("log2_latency")] = -self.latency_weight
            direction[OUTCOMES.index("cost")] = -self.cost_weight / self.cost_ref
        return direction

    def utility(self, quality: Floats, latency_us: Floats, cost: Floats) -> Floats:
        """Utility of single outcomes, with its constant, elementwise. Where kind is bound, quality alone; where it is
        floor, what is not spent: minus cost as a share of cost_ref, or latency of latency_ref where there is no cost.
        """
        if self.kind == "bound":
            return quality
        if self.kind == "floor":
            return -(cost / self.cost_ref) if cost.any() else -(latency_us / self.latency_ref_us)
        octaves = np.log2(np.maximum(latency_us, 1.0) / self.latency_ref_us)
        return quality - self.latency_weight * octaves - self.cost_weight * cost / self.cost_ref


def choose(
    score: npt.NDArray[np.floating],
    probability: npt.NDArray[np.floating],
    quality: npt.NDArray[np.floating],
    least: float | npt.NDArray[np.floating],
    default: int,
    likeliest: bool,
) -> npt.NDArray[np.int64]:
    """For each row of (P, C): argmax score where probability >= least, else the default, or argmax quality."""
    eligible = np.where(probability >= least, score, -np.inf)
    best = eligible.argmax(1)
    none = eligible[np.arange(len(best)), best] == -np.inf
    # probabilities of a floor far out of reach are all 0; the highest quality is then the likeliest to reach it
    return np.where(none, quality.argmax(1) if likeliest else default, best)
