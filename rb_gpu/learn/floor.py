"""For objective=floor, how far below the target the predicted quality of a single query may be.

The floor is promised for the mean of a pattern. Configs come in steps, so the cheapest one that clears the target
usually exceeds it. This surplus is spent on those queries of the pattern for which the next step is dear, such that
their mean still reaches the target.
Suffixes: Q queries, P leaves, U = P + 1 leaves and all queries together, C configs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from rb_gpu.bank_data import NO_CHANCE
from rb_gpu.evidence import ratio
from rb_gpu.normal import normal_cdf, normal_quantile
from rb_gpu.objective import choose
from rb_gpu.posterior import Beliefs

Floats = npt.NDArray[np.float64]

STEPS = 20


@dataclass(frozen=True)
class Unseen:
    """quality_QC: float64 predictions of queries that were left out of the fit. label_Q: their leaves."""

    quality_QC: Floats
    label_Q: npt.NDArray[np.int64]


def spend(beliefs: Beliefs, unseen: Unseen, target: float, min_probability: float, default: int) -> Beliefs:
    """Beliefs for a floor that test each leaf against a lower bar than the target.

    The bar is the least quality, found by bisection, at which the chosen configs' predicted quality still reaches the
    target on the mean over the leaf's queries; each prediction is lowered to what it exceeds with min_probability.
    Leaves without queries keep the target.
    """
    least_z, leaves = normal_quantile(min_probability), len(beliefs.quality) - 1
    known_Q = unseen.label_Q >= 0
    label_Q, quality_QC = unseen.label_Q[known_Q], unseen.quality_QC[known_Q]
    count_P = np.bincount(label_Q, minlength=leaves)
    mean_PC = np.zeros((leaves, quality_QC.shape[1]))
    np.add.at(mean_PC, label_Q, quality_QC)
    mean_PC /= np.maximum(count_P, 1)[:, None]
    # as in a lookup: the leaf's belief, plus how far the field predicts the query to be from its leaf's mean
    quality_QC = quality_QC + (beliefs.quality[:-1] - mean_PC)[label_Q]
    sure_QC = quality_QC - least_z * beliefs.test_sd[:-1][label_Q]
    sure_QC[(beliefs.test[:-1] == NO_CHANCE)[label_Q]] = -np.inf
    score_QC = beliefs.score[:-1][label_Q]
    each = np.arange(len(label_Q))
    low_P, high_P = np.full(leaves, 2 * target - 1.0), np.full(leaves, target)
    for _ in range(STEPS):
        middle_P = 0.5 * (low_P + high_P)
        choice_Q = choose(score_QC, sure_QC, sure_QC, middle_P[label_Q, None], default, likeliest=True)
        reached_P = np.bincount(label_Q, sure_QC[each, choice_Q], leaves) / np.maximum(count_P, 1)
        keeps_P = reached_P >= target
        high_P, low_P = np.where(keeps_P, middle_P, high_P), np.where(keeps_P, low_P, middle_P)
    # just below the bar may lie a config that would break the floor on many queries at once, and a lookup's prediction
    # differs a little: so the bar is put in the middle of the range in which it makes these choices
    choice_Q = choose(score_QC, sure_QC, sure_QC, high_P[label_Q, None], default, likeliest=True)
    passes_Q = sure_QC[each, choice_Q] >= high_P[label_Q]
    most_P = np.full(leaves, target)
    np.minimum.at(most_P, label_Q[passes_Q], sure_QC[each, choice_Q][passes_Q])
    spare_U = np.append(np.where(count_P > 0, target - 0.5 * (high_P + most_P), 0.0), 0.0)
    test = np.where(beliefs.test == NO_CHANCE, NO_CHANCE, beliefs.test + spare_U[:, None])
    certain = beliefs.test_sd > 0
    z = ratio(test, beliefs.test_sd)
    sure = test - least_z * beliefs.test_sd
    return replace(beliefs, test=test, second=sure, probability=np.where(certain, normal_cdf(z), test >= 0.0))
