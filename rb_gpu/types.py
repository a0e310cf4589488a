"""The values that pass between a service and the bank; the names are the reference document's (section 2).

What is checked as it is made is a frozen dataclass. The others are named tuples: one of those is made for every answer,
in a third of the time, and so are their classes when a service starts.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from rb_gpu.params import SearchParams

Vector = npt.NDArray[np.float32]

# of a trade-off: float32 holds what it weighs
MAX_WEIGHT = 1e6


def is_masked(values: npt.ArrayLike) -> bool:
    """Whether a masked array hides some of its values, which NumPy's own functions then read all the same."""
    return "numpy.ma" in sys.modules and bool(np.ma.is_masked(values))  # whoever made one has imported it


@dataclass(frozen=True)
class UserFeedback:
    """A user's rating of one answer, an integer from 1 (bad) to 5 (good). Raises ValueError for anything else."""

    rating: int
    comment: str | None = None

    def __post_init__(self) -> None:
        integer = isinstance(self.rating, (int, np.integer)) and not isinstance(self.rating, bool)
        if not (integer and 1 <= self.rating <= 5):
            raise ValueError(f"rating={self.rating!r} is not an integer in [1, 5]; map your scale to 1..5")

    @property
    def score(self) -> float:
        """The rating as a share of a positive vote, 0 for 1 and 1 for 5."""
        return (self.rating - 1) / 4


class QueryTrajectory(NamedTuple):
    """One answered query. precision, recall in [0, 1]; latency_us in microseconds; timestamp in UTC seconds.

    propensity is the probability in (0, 1] with which the serving policy chose these parameters, None where unknown.
    """

    id: int
    query_embedding: Vector
    search_params: SearchParams
    precision: float
    recall: float
    latency_us: int
    timestamp: int
    retrieved_ids: tuple[str, ...] = ()
    feedback: UserFeedback | None = None
    query_id: int | None = None
    cost: float | None = None
    propensity: float | None = None
    policy: str | None = None


class LearnedPattern(NamedTuple):
    """A cluster of query embeddings with its statistics.

    `quality` is the reference's mean precision * recall; `confidence` is the probability that the pattern's best
    config beats the default by the margin. Children of level L are patterns of level L - 1; a leaf has none.
    """

    id: int
    centroid: Vector
    optimal_params: SearchParams
    confidence: float
    quality: float
    support_count: int
    avg_precision: float
    avg_recall: float
    avg_latency_us: int
    created_at: int
    updated_at: int
    abstraction_level: int
    children: tuple[int, ...] = ()


class VerdictEvidence(NamedTuple):
    """Why a verdict says what it says.

    effect: gain over the default in the objective's unit, with its 95 % interval [effect_low, effect_high]: for one
    query of the pattern, where the bank has a field, else for the mean of its queries.
    avg_improvement: relative gain in quality over the default; None where the default was never tried or scored 0.
    p_value: of the chosen config against the default; p_adjusted: the same, corrected for the number of configs and
    patterns; p_sequential: corrected for the number of configs, and valid though one looks every night; NaN with decay.
    probability: posterior P(beats the default by the margin). consistency: 1 / (1 + std / mean) of quality.
    grade: randomized, adjusted or associational. Unknown numbers are NaN.
    """

    support_count: int
    avg_improvement: float | None
    p_value: float
    consistency: float
    p_adjusted: float
    p_sequential: float
    effect: float
    effect_low: float
    effect_high: float
    probability: float
    method: str
    grade: str


class Verdict(NamedTuple):
    """Which config a pattern should use; where `default_stands`, that is the default, for want of a better one."""

    pattern_id: int
    recommended_params: SearchParams
    confidence: float
    evidence: VerdictEvidence
    config_id: int
    default_stands: bool


class PatternMatch(NamedTuple):
    """A pattern and its cosine similarity to the query, in [-1, 1]."""

    pattern: LearnedPattern
    similarity: float


@dataclass(frozen=True)
class Tradeoff:
    """What an octave of latency, and cost as a share of its reference, weigh against quality; both in [0, 1e6].

    Raises ValueError outside that.
    """

    latency_weight: float
    cost_weight: float

    def __post_init__(self) -> None:
        for name in ("latency_weight", "cost_weight"):
            value = getattr(self, name)
            if not 0 <= value <= MAX_WEIGHT:  # false for NaN too
                raise ValueError(f"{name}={value!r} is not a number in [0, {MAX_WEIGHT:g}]; give one within")


class ParamSource(NamedTuple):
    """Which pattern an answer came from; None where the default stands, or where no pattern is near the query."""

    pattern_id: int | None

    @property
    def has_pattern(self) -> bool:
        """Whether a pattern's evidence chose the parameters."""
        return self.pattern_id is not None


class OptimizedParams(NamedTuple):
    """The answer for one query.

    confidence: probability that `params` beat the default by the margin; 0 where the default is returned.
    expected_quality: quality expected of `params` here, in [0, 1], NaN where unknown. expected_gain: expected gain
    over the default in the objective's unit. config_id: row of `bank.configs`, None for an interpolated setting that
    was never tried. reason: in a few words, why this answer.
    """

    params: SearchParams
    confidence: float
    source: ParamSource
    expected_quality: float
    expected_gain: float
    config_id: int | None
    reason: str


class ReasoningBankStats(NamedTuple):
    """Counters of this process and figures of the artifact (reference section 8).

    avg_improvement_percent comes from held-out data: the bank's gain in quality over the default; NaN if not measured.
    avg_expected_gain is of this process's answers: what they are expected to gain over the default, in the objective's
    unit; a setting that was never tried counts 0.
    """

    total_trajectories: int = 0
    total_patterns: int = 0
    total_verdicts: int = 0
    total_lookups: int = 0
    total_feedback: int = 0
    pattern_hit_rate: float = 0.0
    avg_recommendation_confidence: float = 0.0
    avg_improvement_percent: float = float("nan")
    avg_expected_gain: float = 0.0
