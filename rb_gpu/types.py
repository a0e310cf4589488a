"""The values that pass between a service and the bank, named as in the reference document (section 2).

A type that validates its values is a frozen dataclass. The others are named tuples: one of them is created for every
answer, and both the instances and the classes are created in a third of a dataclass's time.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import NamedTuple, TypeGuard

import numpy as np
import numpy.typing as npt

from rb_gpu.params import SearchParams

Vector = npt.NDArray[np.float32]

# largest weight of a trade-off: the weighted outcomes must still fit into float32
MAX_WEIGHT = 1e6


def is_masked(values: npt.ArrayLike) -> bool:
    """Whether `values` is a masked array with hidden entries, which most NumPy functions would read as if they were
    valid.
    """
    return "numpy.ma" in sys.modules and bool(np.ma.is_masked(values))  # none can exist before that import


def numbers_of(name: str, values: npt.ArrayLike, expected: str) -> Vector:
    """The values as a float32 array of their shape. Raises ValueError that says what was passed as `name` and what is
    expected, unless they are an array of real numbers.
    """
    try:
        if is_masked(values):
            raise TypeError("some are masked")
        given = np.asarray(values)
        if given.dtype.kind not in "fiu":
            raise TypeError(f"dtype {given.dtype}")
        with np.errstate(over="ignore"):  # the caller refuses values that overflow float32
            return given.astype(np.float32, copy=False)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name} is not an array of numbers ({error}); give {expected}") from None


def is_real(value: object) -> TypeGuard[float]:
    """Whether `value` is one real number of Python or NumPy; a bool is none."""
    return isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)


@dataclass(frozen=True)
class UserFeedback:
    """A user's rating of one answer, an integer from 1 (bad) to 5 (good), and a comment in words. Raises ValueError for
    anything else.
    """

    rating: int
    comment: str | None = None

    def __post_init__(self) -> None:
        integer = isinstance(self.rating, (int, np.integer)) and not isinstance(self.rating, bool)
        if not (integer and 1 <= self.rating <= 5):
            raise ValueError(f"rating={self.rating!r} is not an integer in [1, 5]; map your scale to 1..5")
        if not isinstance(self.comment, str | None):
            raise ValueError(f"comment={self.comment!r} is not a string; give text, or leave it out")

    @property
    def score(self) -> float:
        """The rating as a share of a positive vote: 0 for a rating of 1, 1 for a rating of 5."""
        return (self.rating - 1) / 4


class QueryTrajectory(NamedTuple):
    """One answered query: its embedding, the parameters that ran and what came of them.

    precision and recall are in [0, 1], latency_us is in microseconds, timestamp in UTC seconds. propensity is the
    probability in (0, 1] with which the serving policy chose these parameters, or None if unknown. policy is the
    version of the artifact that chose them. Rows that share query_id are the same query tried under several configs.
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

    quality is the reference's mean of precision * recall. confidence is the probability that the pattern's best config
    beats the default by the margin. The children of a pattern at level L are patterns of level L - 1; a leaf (level 0)
    has none.
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
    """The statistics behind a verdict; unknown numbers are NaN.

    effect: gain over the default in the objective's unit, with its 95 % interval [effect_low, effect_high]. If the bank
        has a field (rb_gpu/field.py), it is the gain for a single query of the pattern, else the mean gain over its
        queries.
    avg_improvement: relative gain in quality over the default; None if the default was never tried or scored 0.
    p_value: of the test of the chosen config against the default.
    p_adjusted: p_value corrected for the number of configs and patterns.
    p_sequential: p_value corrected for the number of configs, and valid even if it is checked again after every nightly
        training; NaN if old rows are down-weighted (time decay).
    probability: posterior probability that the config beats the default by the margin.
    consistency: 1 / (1 + std / mean) of quality.
    grade: randomized, adjusted or associational.
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
    """Which config a pattern should use. `default_stands` says that this is the default, because nothing better is
    known.
    """

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
    """Weights against quality: of each doubling of latency, and of cost as a share of its reference; both in [0, 1e6].

    Raises ValueError if a weight is outside these bounds.
    """

    latency_weight: float
    cost_weight: float

    def __post_init__(self) -> None:
        for name in ("latency_weight", "cost_weight"):
            value = getattr(self, name)
            if not (is_real(value) and 0 <= value <= MAX_WEIGHT):  # false for NaN too
                raise ValueError(f"{name}={value!r} is not a number in [0, {MAX_WEIGHT:g}]; give one within")


class ParamSource(NamedTuple):
    """The pattern that an answer came from; None if the default was returned or if no pattern is near the query."""

    pattern_id: int | None

    @property
    def has_pattern(self) -> bool:
        """Whether a pattern's evidence chose the parameters."""
        return self.pattern_id is not None


class OptimizedParams(NamedTuple):
    """The answer for one query.

    confidence: probability that `params` beat the default by the margin; 0 if the default is returned.
    expected_quality: expected quality of `params` on this query, in [0, 1]; NaN if unknown. expected_gain: expected
    gain over the default in the objective's unit. With judge.objective=floor, confidence is the probability that
    quality reaches judge.target, and expected_gain is in quality: it is below 0 where a cheaper config gives up quality
    that the target does not need. config_id: row of `bank.configs`, or None for an interpolated setting that was never
    tried. reason: a few words on why this is the answer.
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

    avg_improvement_percent is the bank's gain in quality over the default, measured on held-out data; NaN if it was not
    measured. avg_expected_gain is the mean expected gain over the default, in the objective's unit, of the answers that
    this process gave; a setting that was never tried counts as 0.
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
