"""Whether confidence is calibrated: of the patterns predicted to beat the default with some probability, how many did.

Held-out means are noisy themselves. The confidence is therefore turned into the probability that the held-out mean gain
exceeds the margin: a normal gain with the confidence's standard deviation, plus the error of the held-out mean. In a
pattern with many queries that error is normal too. With few it is not, since single gains are skewed (most save a
little, some lose much), and they do not show its size: it is drawn from all gains under that config (Efron's
bootstrap). Below, a gain is the gain over the default less the margin.
Suffixes: Q queries, A those on which the bank acts, R rounds (as in valuation.py), P leaf patterns, K configs, B bins.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import stats

from rb_gpu.learn.harm import LEAST_ROWS, telling_rows
from rb_gpu.learn.valuation import Choice, Valuation

Floats = npt.NDArray[np.float64]

BINS = 10
LEAST_QUERIES = 3
DRAWS = 1000
# queries from which a pattern's mean has a normal error; gains from which a config's spread is known
MANY_QUERIES, LEAST_GAINS = 100, 30
# most gains drawn over all draws, of which there are at least LEAST_DRAWS
MOST_DRAWN, LEAST_DRAWS = 2 * 10**7, 100
# largest confidence that float32 distinguishes from 1
NEAR_ONE = 1.0 - 1e-7


@dataclass(frozen=True)
class Calibration:
    """patterns: number of those that act on enough held-out queries. brier: mean squared error of the probability. ece:
    expected calibration error (Naeini, Cooper & Hauskrecht 2015) over bins of equally many patterns; chance: its 95 %
    quantile if every probability is right. predicted, seen: by bin, mean probability and share that did beat it.
    """

    patterns: int
    brier: float
    ece: float
    chance: float
    predicted: list[float]
    seen: list[float]


@dataclass(frozen=True)
class Promise:
    """A bank's predictions for its choices, (Q,) each. confidence: probability that the gain over the default exceeds
    the margin. gain: the expected gain over the default.
    """

    confidence: Floats
    gain: Floats
    margin: Floats


def measure_calibration(
    valuation: Valuation, choice_Q: Choice, default_Q: Choice, leaf_Q: Choice, promise: Promise, seed: int
) -> Calibration | None:
    """Calibration on held-out queries, given the leaf pattern of each. None if values are merely associational, or if
    fewer than BINS patterns act on LEAST_QUERIES queries.
    """
    acts_Q = choice_Q != default_Q
    if valuation.grade == "associational" or not acts_Q.any():
        return None
    gain_R = valuation.estimate("utility", choice_Q).over(valuation.estimate("utility", default_Q)).score_N
    query_R, queries = valuation.round_query, len(leaf_Q)
    rounds_Q = np.bincount(query_R, minlength=queries)
    seen_Q = np.bincount(query_R, gain_R, queries) / np.maximum(rounds_Q, 1) - promise.margin
    lead_Q = promise.gain - promise.margin
    z_Q = stats.norm.ppf(np.clip(promise.confidence, 1.0 - NEAR_ONE, NEAR_ONE))
    sd_Q = np.divide(lead_Q, z_Q, out=np.zeros_like(lead_Q), where=np.abs(z_Q) > 1e-6)

    leaf_A, seen_A = leaf_Q[acts_Q], seen_Q[acts_Q]
    count_P = np.bincount(leaf_A)

    def mean(values_A: Floats) -> Floats:
        return np.asarray(np.bincount(leaf_A, values_A) / np.maximum(count_P, 1))

    seen_P, lead_P, sd_P = mean(seen_A), mean(lead_Q[acts_Q]), mean(sd_Q[acts_Q])
    away_A = seen_A - seen_P[leaf_A]
    error_P = np.sqrt(mean(away_A**2) / np.maximum(count_P - 1, 1))
    told_P = telling_rows(valuation, choice_Q, default_Q, leaf_Q)[: len(count_P)]
    judged_P = (told_P >= LEAST_ROWS) & (count_P >= LEAST_QUERIES) & (np.hypot(sd_P, error_P) > 0)
    if judged_P.sum() < BINS:
        return None
    predicted_P = _exceeding(lead_P, np.hypot(sd_P, error_P))
    few_A = judged_P[leaf_A] & (count_P[leaf_A] < MANY_QUERIES)
    if few_A.any():
        # unbiased: subtracting the pattern's own mean shrinks the spread of its gains
        away_A = away_A * np.sqrt(count_P / np.maximum(count_P - 1, 1))[leaf_A]
        few_P, leaf_F = np.unique(leaf_A[few_A], return_inverse=True)
        predicted_P[few_P] = _of_few(lead_P[few_P], sd_P[few_P], away_A[few_A], choice_Q[acts_Q][few_A], leaf_F, seed)
    return compare(predicted_P[judged_P], seen_P[judged_P] > 0, seed)


def _exceeding(mean: Floats, sd: Floats) -> Floats:
    """The probability that normal variables exceed 0; for sd 0 it is 1, or 0, or .5 if the mean is 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(np.where(sd > 0, stats.norm.cdf(mean / sd), (mean > 0) + 0.5 * (mean == 0)))


def _of_few(lead_P: Floats, sd_P: Floats, away_A: Floats, config_A: Choice, leaf_A: Choice, seed: int) -> Floats:
    """The probability that the mean of each pattern's few gains exceeds 0, when each differs from the expected lead by
    a deviation drawn from away_A of its config, or of all configs if it was chosen too seldom.
    """
    _, kind_A, count_K = np.unique(config_A, return_inverse=True, return_counts=True)
    order_A = np.argsort(kind_A, kind="stable")
    pool_A = (away_A - (np.bincount(kind_A, away_A) / count_K)[kind_A])[order_A]
    known_K = count_K >= LEAST_GAINS
    first_A = np.where(known_K, np.cumsum(count_K) - count_K, 0)[kind_A]
    size_A = np.where(known_K, count_K, len(pool_A))[kind_A]
    count_P, rng = np.bincount(leaf_A), np.random.default_rng(seed)
    draws = min(DRAWS, max(LEAST_DRAWS, MOST_DRAWN // len(pool_A)))
    exceeding_P = np.zeros(len(lead_P))
    for _ in range(draws):
        drawn_A = pool_A[first_A + (rng.random(len(pool_A)) * size_A).astype(np.int64)]
        exceeding_P += _exceeding(lead_P + np.bincount(leaf_A, drawn_A) / count_P, sd_P)
    return exceeding_P / draws


def compare(predicted_P: Floats, seen_P: npt.NDArray[np.bool_], seed: int) -> Calibration:
    """Compares predicted probabilities (P,) with what happened."""
    order = np.argsort(predicted_P, kind="stable")
    bins = np.array_split(order, BINS)
    share_B = np.array([len(index) for index in bins]) / len(order)
    predicted_B = np.array([predicted_P[index].mean() for index in bins])

    def ece(seen: npt.NDArray[np.bool_]) -> float:
        return float(share_B @ np.abs(predicted_B - [seen[index].mean() for index in bins]))

    rng = np.random.default_rng(seed)
    by_chance = [ece(rng.random(len(predicted_P)) < predicted_P) for _ in range(DRAWS)]
    return Calibration(
        patterns=len(predicted_P),
        brier=float(np.mean((predicted_P - seen_P) ** 2)),
        ece=ece(seen_P),
        chance=float(np.quantile(by_chance, 0.95)),
        predicted=predicted_B.tolist(),
        seen=[float(seen_P[index].mean()) for index in bins],
    )
