"""Means over resampled queries by the Poisson bootstrap, cheap in time and memory even on large tables.

Suffixes: Q queries, M columns, R resamples.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy import stats

Floats = npt.NDArray[np.float64]

# a Poisson(1) count for each of 16 random bits: mean 1 exactly, variance 1 within 4e-5
LEVELS = 1 << 16
COUNTS = np.searchsorted(stats.poisson.cdf(np.arange(8), 1.0), (np.arange(LEVELS) + 0.5) / LEVELS).astype(np.uint8)
QUERIES_AT_ONCE = 1024


def resampled_means(total_QM: Floats, weight_QM: Floats, resamples: int, seed: int) -> Floats:
    """(resamples, M) weighted means sum(total) / sum(weight) on resampled queries, the same ones for every column.

    Each query enters a resample an independent Poisson(1) number of times; a ratio of sums has the law of the
    multinomial bootstrap up to terms of 1/Q (Hanley and MacGibbon 2006; Chamandy et al. 2012). NaN where a resample has
    no weight.
    """
    rng = np.random.default_rng(seed)
    both = np.concatenate([total_QM, weight_QM], axis=1)
    sums = np.zeros((resamples, both.shape[1]))
    for start in range(0, len(both), QUERIES_AT_ONCE):
        block = both[start : start + QUERIES_AT_ONCE]
        times = COUNTS[rng.integers(LEVELS, size=(resamples, len(block)), dtype=np.uint16)]
        sums += times.astype(np.float64) @ block
    total_RM, weight_RM = np.split(sums, 2, axis=1)
    with np.errstate(invalid="ignore"):
        found: Floats = total_RM / weight_RM
    return found
