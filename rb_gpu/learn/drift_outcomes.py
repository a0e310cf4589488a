"""Tests whether configs perform differently inside patterns on the newest queries than on the training queries.

Suffixes: N (query, config) pairs, C configs, U cells of a leaf and a config.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import stats

from rb_gpu.learn.verdicts import benjamini_hochberg

Floats = npt.NDArray[np.float64]
Rows = npt.NDArray[np.int64]


@dataclass(frozen=True)
class ConfigDrift:
    """Change in a config's mean utility inside patterns, newest less training; queries: on both sides, in cells that
    have both.

    p_shift: has it moved in all patterns together; p_patterns: in some against others. q_value: the lesser of the two,
    corrected over both and over the configs (Benjamini & Hochberg 1995). NaN if no cell has queries of both sides.
    """

    config: str
    queries: int
    change: float
    p_shift: float
    p_patterns: float
    q_value: float


@dataclass(frozen=True)
class Utilities:
    """Mean utility of each (query, config) pair (N,), its leaf and its config."""

    value: Floats
    leaf: Rows
    config: Rows


def compare_outcomes(old: Utilities, new: Utilities, configs: list[str]) -> list[ConfigDrift]:
    """Whether each config's mean utility inside leaves changed, over rows as they were logged.

    If a cell's queries are assigned to the two sides at random, the difference of their means has the variance
    s²·(1/n + 1/m), with s² about the mean of both sides. The shift is the sum of differences weighted by n·m / (n + m),
    over its standard deviation (a stratified permutation test, van Elteren 1960); what remains of the cells' squares
    (Cochran 1954) shows patterns that moved against each other. Rare outcomes, such as clicks, make neither normal nor
    chi-squared: each is compared with the Pearson type III law of the moments under random assignment (Mielke & Berry
    2007), and the shift's p-value is no smaller than the normal one.
    """
    width, leaves = len(configs), 1 + max(int(old.leaf.max()), int(new.leaf.max()))
    cell = np.concatenate([old.leaf * width + old.config, new.leaf * width + new.config])
    value = np.concatenate([old.value, new.value])
    is_new = np.repeat([0.0, 1.0], [len(old.value), len(new.value)])

    def per_cell(x: Floats) -> Floats:
        return np.bincount(cell, weights=x, minlength=leaves * width).astype(np.float64)

    def over_leaves(x_U: npt.NDArray[np.generic]) -> Floats:
        return np.asarray(x_U.reshape(leaves, width).sum(0), dtype=np.float64)

    total_U, m_U = per_cell(np.ones(len(value))), per_cell(is_new)
    n_U = total_U - m_U
    middle_U = per_cell(value) / np.maximum(total_U, 1.0)
    away = value - middle_U[cell]
    # a cell that is constant has not changed, and shows nothing about chance
    both_U = np.minimum(n_U, m_U) >= 1
    square_sum_U = per_cell(away**2)
    varies_U = both_U & (square_sum_U > 1e-12 * (1.0 + middle_U**2) * np.maximum(total_U - 1.0, 1.0))
    weight_U = np.where(both_U, n_U * m_U / np.maximum(total_U, 1.0), 0.0)
    # the sum of the newest side's deviations is the weight times the difference
    score_U = np.where(varies_U, per_cell(away * is_new), 0.0)
    second_U, third_U, fourth_U = dealt_moments(
        total_U, m_U, [np.where(varies_U, power_U, 0.0) for power_U in
                       (square_sum_U, per_cell(away**3), per_cell(away**4))]
    )  # fmt: skip
    safe_U = np.where(varies_U, second_U, 1.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        change_C = over_leaves(score_U) / over_leaves(weight_U)
        variance_C = over_leaves(second_U)
        z_C = over_leaves(score_U) / np.sqrt(variance_C)
        p_shift_C = shift_p_value(z_C, over_leaves(third_U) / variance_C**1.5)
        # the sum of the cells' squares, each of mean 1, less z²: its mean and variance are exact
        cells_C = over_leaves(varies_U)
        share_U = second_U / np.tile(variance_C, leaves)
        kurtosis_U = np.where(varies_U, fourth_U / safe_U**2, 1.0)
        spread_C = 2.0 + over_leaves(
            (kurtosis_U - 1.0) * (1.0 - 2.0 * share_U) + (kurtosis_U - 3.0) * share_U**2
        )  # fmt: skip
        left_C = np.maximum(over_leaves(score_U**2 / safe_U) - z_C**2, 0.0)
        mean_C = np.where((cells_C > 1) & (spread_C > 1e-9), cells_C - 1.0, np.nan)
        p_patterns_C = stats.gamma.sf(left_C, mean_C**2 / spread_C, scale=spread_C / mean_C)
    p_C2 = np.stack([p_shift_C, p_patterns_C], axis=1)
    q_C2 = benjamini_hochberg(p_C2.ravel()).reshape(p_C2.shape)
    q_C = np.where(np.isnan(q_C2).all(1), np.nan, np.nan_to_num(q_C2, nan=1.0).min(1))
    queries_C = over_leaves(np.where(both_U, total_U, 0.0))
    return [
        ConfigDrift(
            configs[c], int(queries_C[c]), float(change_C[c]), float(p_C2[c, 0]), float(p_C2[c, 1]), float(q_C[c])
        )
        for c in range(width)
    ]


def dealt_moments(total_U: Floats, dealt_U: Floats, powers: list[Floats]) -> tuple[Floats, Floats, Floats]:
    """Second to fourth moments of the sum of `dealt` of `total` deviations from their mean, drawn without replacement.

    powers: sums of the deviations' second to fourth powers. Sums over products of distinct rows follow from these,
    since the deviations sum to zero.
    """
    all_K = [np.ones(len(total_U))]  # probability that k given rows are all drawn
    for k in range(4):
        all_K.append(all_K[-1] * np.maximum(dealt_U - k, 0.0) / np.maximum(total_U - k, 1.0))
    _, one, two, three, four = all_K
    second, third, fourth = powers
    return (
        second * (one - two),
        third * (one - 3.0 * two + 2.0 * three),
        fourth * (one - 7.0 * two + 12.0 * three - 6.0 * four) + 3.0 * second**2 * (two - 2.0 * three + four),
    )


def shift_p_value(z: Floats, skewness: Floats) -> Floats:
    """Two-sided p-value by Pearson type III, or the normal one if larger: the side without a tail ends too soon."""
    one_sided = np.minimum(stats.pearson3.sf(z, skewness), stats.pearson3.cdf(z, skewness))
    return np.asarray(np.maximum(2.0 * one_sided, stats.chi2.sf(z**2, 1)))
