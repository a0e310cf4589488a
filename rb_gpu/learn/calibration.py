"""Whether confidence keeps its word: of patterns foretold to beat the default with some probability, how many did.

Held-out means are noisy themselves. What is compared is therefore not the confidence but the probability that follows
from it for the held-out mean: a normal gain with the confidence's standard deviation, plus the mean's own error.
Suffixes: Q queries, R rounds (as in valuation.py), P leaf patterns, B bins.
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
# confidences are float32: nearer to 1 they cannot be told apart
NEAR_ONE = 1.0 - 1e-7


@dataclass(frozen=True)
class Calibration:
    """patterns: those that act on enough held-out queries. brier: mean squared error of the probability. ece: expected
    calibration error (Naeini, Cooper & Hauskrecht 2015) over bins of as many patterns each; chance: its 95 % quantile
    where every probability is right. foretold, seen: mean probability and share that did beat it, by bin.
    """

    patterns: int
    brier: float
    ece: float
    chance: float
    foretold: list[float]
    seen: list[float]


@dataclass(frozen=True)
class Promise:
    """What a bank says of its choices, (Q,) each: confidence, the probability that the gain over the default exceeds
    the margin; gain, the expected one.
    """

    confidence: Floats
    gain: Floats
    margin: Floats


def measure_calibration(
    valuation: Valuation, choice_Q: Choice, default_Q: Choice, leaf_Q: Choice, promise: Promise, seed: int
) -> Calibration | None:
    """From held-out queries and the leaf pattern of each. None where values are merely associational, or fewer than
    BINS patterns act on LEAST_QUERIES.
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

    leaf = leaf_Q[acts_Q]
    count_P = np.bincount(leaf)

    def mean(values_Q: Floats) -> Floats:
        return np.asarray(np.bincount(leaf, values_Q[acts_Q]) / np.maximum(count_P, 1))

    seen_P = mean(seen_Q)
    away_Q = np.zeros(queries)
    away_Q[acts_Q] = seen_Q[acts_Q] - seen_P[leaf]
    error_P = mean(away_Q**2) / np.maximum(count_P - 1, 1)
    total_P = np.sqrt(mean(sd_Q) ** 2 + error_P)
    told_P = np.bincount(leaf, telling_rows(valuation, choice_Q, default_Q)[acts_Q])
    judged_P = (told_P >= LEAST_ROWS) & (count_P >= LEAST_QUERIES) & (total_P > 0)
    if judged_P.sum() < BINS:
        return None
    return compare(stats.norm.cdf(mean(lead_Q)[judged_P] / total_P[judged_P]), seen_P[judged_P] > 0, seed)


def compare(foretold_P: Floats, seen_P: npt.NDArray[np.bool_], seed: int) -> Calibration:
    """Probabilities (P,) beside what came."""
    order = np.argsort(foretold_P, kind="stable")
    bins = np.array_split(order, BINS)
    share_B = np.array([len(index) for index in bins]) / len(order)
    foretold_B = np.array([foretold_P[index].mean() for index in bins])

    def ece(seen: npt.NDArray[np.bool_]) -> float:
        return float(share_B @ np.abs(foretold_B - [seen[index].mean() for index in bins]))

    rng = np.random.default_rng(seed)
    by_chance = [ece(rng.random(len(foretold_P)) < foretold_P) for _ in range(DRAWS)]
    return Calibration(
        patterns=len(foretold_P),
        brier=float(np.mean((foretold_P - seen_P) ** 2)),
        ece=ece(seen_P),
        chance=float(np.quantile(by_chance, 0.95)),
        foretold=foretold_B.tolist(),
        seen=[float(seen_P[index].mean()) for index in bins],
    )
