"""In how many of the patterns in which a policy acts it does worse than the default would have done.

A mean gain may hide patterns that lose. Noise alone makes about half of the patterns without a true effect look worse,
so that two shares are told: of patterns whose estimate is below 0, and of those where that is sure.
Suffixes: Q queries, R rounds (queries where the grade is exact, else rows), N rows, P leaf patterns.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import stats

from rb_gpu.learn.valuation import Choice, Floats, Valuation
from rb_gpu.learn.verdicts import holm

LEVEL = 0.05
# rows that tried one of the two picks where they differ: with fewer, a pattern's gain is only what a model says
LEAST_ROWS = 2


@dataclass(frozen=True)
class Harm:
    """patterns: in which the policy acts on a held-out query, and enough rows tell of it.

    negative: share of them whose estimated gain over the default is below 0 (the harm rate). sure: share of them where
    it is below 0 by a one-sided t test at 5 %, Holm's over the patterns. NaN where there is no such pattern.
    """

    patterns: int
    negative: float
    sure: float


UNKNOWN_HARM = Harm(0, float("nan"), float("nan"))


def measure_harm(valuation: Valuation, choice_Q: Choice, default_Q: Choice, leaf_Q: Choice) -> Harm:
    """From held-out queries and the leaf pattern of each. UNKNOWN_HARM where values are merely associational: within a
    pattern nothing evens out which queries got which config.
    """
    if valuation.grade == "associational" or not (choice_Q != default_Q).any():
        return UNKNOWN_HARM
    gain_R = valuation.estimate("utility", choice_Q).over(valuation.estimate("utility", default_Q)).score_N
    query_R, queries = valuation.round_query, len(leaf_Q)
    gain_Q, rounds_Q = np.bincount(query_R, gain_R, queries), np.bincount(query_R, minlength=queries)
    tells_Q = telling_rows(valuation, choice_Q, default_Q)

    leaves = int(leaf_Q.max()) + 1
    members_P, rounds_P = np.bincount(leaf_Q, minlength=leaves), np.bincount(leaf_Q, rounds_Q, leaves)
    told_P, acted_P = np.bincount(leaf_Q, tells_Q, leaves), np.bincount(leaf_Q, choice_Q != default_Q, leaves)
    mean_P = np.bincount(leaf_Q, gain_Q, leaves) / np.maximum(rounds_P, 1)
    away_Q = gain_Q - rounds_Q * mean_P[leaf_Q]
    spread_P = np.bincount(leaf_Q, away_Q**2, leaves) * members_P / np.maximum(members_P - 1, 1)
    error_P = np.sqrt(spread_P) / np.maximum(rounds_P, 1)
    # of a doubly robust gain, the queries whose picks no row tried tell next to nothing
    freedom_P = (members_P if valuation.grade == "exact" else np.minimum(members_P, told_P)) - 1

    judged_P = (acted_P > 0) & (told_P >= LEAST_ROWS) & (members_P > 1)
    mean, error, freedom = mean_P[judged_P], error_P[judged_P], freedom_P[judged_P]
    if len(mean) == 0:
        return UNKNOWN_HARM
    p_value = stats.t.cdf(np.divide(mean, error, out=np.zeros_like(mean), where=error > 0), np.maximum(freedom, 1))
    return Harm(len(mean), float((mean < 0).mean()), float((holm(p_value) < LEVEL).mean()))


def telling_rows(valuation: Valuation, choice_Q: Choice, other_Q: Choice) -> Floats:
    """(Q,) rows of each query that tried one of two picks, and not both, which are the same."""
    tells_N = (valuation.weights(choice_Q) > 0) != (valuation.weights(other_Q) > 0)
    return np.bincount(valuation.rows.query_row, tells_N, len(choice_Q)).astype(np.float64)
