"""In how many of the patterns where a policy acts it does worse than the default would have done.

A mean gain may hide patterns that lose. Noise alone makes about half of the patterns without a true effect look worse,
so two shares are reported: the patterns whose estimated gain is below 0, and those where that is significant.
Suffixes: Q queries, R rounds (queries where the grade is exact, else rows), N rows, P leaf patterns, C cells (the
queries of one cluster in one leaf).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import stats

from rb_gpu.evidence import ratio
from rb_gpu.learn.valuation import Choice, Floats, Valuation
from rb_gpu.learn.verdicts import holm

LEVEL = 0.05
# fewest rows that tried each of two differing picks: with fewer of either, half of a pattern's gain is only a model's
# prediction, whose error no spread of the rows shows
LEAST_ROWS = 2


@dataclass(frozen=True)
class Harm:
    """patterns: number in which the policy acts on a held-out query and that have enough rows to judge.

    negative: share of them whose estimated gain over the default is below 0 (the harm rate). sure: share of them where
    it is below 0 by a one-sided t test at 5 % that counts a session's queries together, Holm-adjusted over the
    patterns. NaN if there is no such pattern.
    """

    patterns: int
    negative: float
    sure: float


UNKNOWN_HARM = Harm(0, float("nan"), float("nan"))


def measure_harm(valuation: Valuation, choice_Q: Choice, default_Q: Choice, leaf_Q: Choice) -> Harm:
    """Harm over held-out queries, given the leaf pattern of each. UNKNOWN_HARM if the grade is merely associational:
    within a pattern nothing balances which queries got which config.
    """
    if valuation.grade == "associational" or not (choice_Q != default_Q).any():
        return UNKNOWN_HARM
    gain_R = valuation.estimate("utility", choice_Q).over(valuation.estimate("utility", default_Q)).score_N
    query_R, queries = valuation.round_query, len(leaf_Q)
    gain_Q, rounds_Q = np.bincount(query_R, gain_R, queries), np.bincount(query_R, minlength=queries)

    leaves = int(leaf_Q.max()) + 1
    rounds_P, of_cell_Q, leaf_C = np.bincount(leaf_Q, rounds_Q, leaves), *_cells(leaf_Q, valuation.rows.cluster)
    members_P = np.bincount(leaf_C, minlength=leaves)
    told_P, acted_P = telling_rows(valuation, choice_Q, default_Q, leaf_Q), np.bincount(leaf_Q, choice_Q != default_Q)
    mean_P = np.bincount(leaf_Q, gain_Q, leaves) / np.maximum(rounds_P, 1)
    away_C = np.bincount(of_cell_Q, gain_Q - rounds_Q * mean_P[leaf_Q])
    spread_P = np.bincount(leaf_C, away_C**2, leaves) * members_P / np.maximum(members_P - 1, 1)
    error_P = np.sqrt(spread_P) / np.maximum(rounds_P, 1)
    # for a doubly robust gain, queries whose picks no row tried contribute next to no information. 2 (n - 1) are the
    # degrees of freedom of a difference of two means of n rows each
    freedom_P = members_P - 1 if valuation.grade == "exact" else np.minimum(members_P - 1, 2 * (told_P - 1))

    judged_P = (acted_P > 0) & (told_P >= LEAST_ROWS) & (members_P > 1)
    mean, error, freedom = mean_P[judged_P], error_P[judged_P], freedom_P[judged_P]
    if len(mean) == 0:
        return UNKNOWN_HARM
    p_value = stats.t.cdf(ratio(mean, error), freedom)
    return Harm(len(mean), float((mean < 0).mean()), float((holm(p_value) < LEVEL).mean()))


def _cells(leaf_Q: Choice, cluster_Q: Choice) -> tuple[Choice, Choice]:
    """The cell of each query (Q,), and the leaf of each cell (C,)."""
    clusters = int(cluster_Q.max()) + 1
    name_C, of_cell_Q = np.unique(leaf_Q * clusters + cluster_Q, return_inverse=True)
    return of_cell_Q, name_C // clusters


def telling_rows(valuation: Valuation, choice_Q: Choice, other_Q: Choice, leaf_Q: Choice) -> Floats:
    """(P,) rows of each pattern that tried only the first of two picks or only the second, whichever are fewer.

    Rows that match both picks do not tell them apart. Where a service explores little, a pattern has many rows of what
    runs and few or none of what is picked. For the grade exact a query has rows of both, so that one is enough: all of
    them are counted.
    """
    first_N, second_N = valuation.weights(choice_Q) > 0, valuation.weights(other_Q) > 0
    leaf_N = leaf_Q[valuation.rows.query_row]
    tried = [np.bincount(leaf_N, only_N, leaf_Q.max() + 1) for only_N in (first_N & ~second_N, second_N & ~first_N)]
    return np.asarray(sum(tried) if valuation.grade == "exact" else np.minimum(*tried))
