"""The standard error of a cell's mean when the cell has too few rows to estimate its own variance. NumPy only.

Suffixes: P leaves, C configs.
"""

from __future__ import annotations

import numpy as np

from rb_gpu.evidence import ROUNDING, Floats, ratio

# prior weight, in rows, of the variance pooled over all configs when a config's own is estimated: a config that was
# tried twice in only a few cells says little about its own variance
PRIOR_CONFIG_ROWS = 20.0
# relative variance of a variance estimate from normal rows, times its degrees of freedom
NORMAL_NOISE = 2.0
# falls that rows may have missed by chance (the rule of three, Hanley & Lippman-Hand 1983): a normal variance of this
# many in n rows reaches 3 / n at 95 %, and as far as the Beta(1, n + 1) posterior of a rate of none in n at 80 %
UNSEEN_FALLS = 3.0


def alike(variance: Floats, size: Floats) -> Floats:
    """Variance (P, C) of each cell's mean, assuming that a config has the same variance in all leaves.

    variance, size: (P, C) sample variance of a cell's rows, and their effective number. Infinite where nothing is
    known.
    """
    freedom, within = _known(variance, size)
    return _of_mean(_of_config(freedom, within), size)


def degrees_of_freedom(variance: Floats, size: Floats, default: int | None) -> Floats:
    """(C,) degrees of freedom of the variance of each config's overall effect, when a config's own variance is shrunk
    as in `moderated`. default: the config whose variance adds to the others' (Satterthwaite 1946), None if paired.
    """
    freedom, within = _known(variance, size)
    total_C = freedom.sum(0)
    own_C = total_C / (PRIOR_CONFIG_ROWS + total_C)
    # variance of the shrunk estimate, in units of that of an estimate with one degree of freedom; the pooled variance
    # contains the config's own rows
    noise_C = own_C**2 / np.maximum(total_C, 1e-300) + (1.0 - own_C**2) / max(total_C.sum(), 1e-300)
    if default is not None:
        rows_C = np.maximum(size.sum(0), 1e-300)
        part_C = np.nan_to_num(_of_config(freedom, within)) / rows_C
        both_C = part_C + part_C[default]
        squares_C = part_C**2 * noise_C + part_C[default] ** 2 * noise_C[default]
        noise_C = np.divide(squares_C, both_C**2, out=noise_C, where=both_C > 0)
    return np.asarray(1.0 / noise_C)


def unseen_falls(level: Floats, variance: Floats, size: Floats) -> Floats:
    """Variance (P, C) of each cell's mean quality due to failures that the config's rows in all leaves did not show.

    A few rows that are all perfect show no variance, and yet prove little. So UNSEEN_FALLS of a config's rows may as
    well have fallen short of quality 1. How far is the mean over the falls seen, weighted by their size, and one more
    from 1 to 0, which alone decides where none was seen. level, variance, size: (P, C) mean quality of a cell's rows,
    their sample variance and effective number. Infinite for cells without rows.
    """
    freedom, within = _known(variance, size)
    fall = np.where(size > 0, 1.0 - level, 0.0)
    large_C = (1.0 + (size * fall**2 + freedom * within).sum(0)) / (1.0 + (size * fall).sum(0))
    return _of_mean(UNSEEN_FALLS * large_C**2 / np.maximum(size.sum(0), 1e-300), size)


def moderated(variance: Floats, size: Floats, paired: bool, apart: float) -> Floats:
    """Like `alike`, but each config's variance is scaled by the leaf, in proportion to how much leaves are found to
    differ.

    apart: how far the means of two configs lie apart in one leaf at most (`posterior.widest`). A config (or a leaf's
    scale) without any spread in n rows is not certain: its variance is that of one deviation by `apart` among the n. If
    apart is 0 it is unknown.

    A leaf's scale is shrunk towards 1 by empirical Bayes, as Smyth (2004) shrinks variances. Its error does not follow
    the chi-squared law, by which 40 rows without a click would prove that nothing is ever clicked; it is estimated by
    the method of moments, from how the configs of one leaf disagree about the scale.

    With skewed outcomes, the errors of a mean and of a scale estimated from the same rows are correlated. Unpaired
    evidence therefore uses one scale for all rows of a leaf: its error then moves the means of all configs alike,
    however few rows one has, and no difference between them. paired: variance and size are those of differences to the
    default. The errors of the default's rows are then in every difference, and a common scale would move them all; so
    each cell has its own scale, and half of that scale's error is shared with the other configs.
    """
    freedom, within = _known(variance, size)
    total_C = freedom.sum(0)
    constant_C = (total_C > 0) & ((freedom * within).sum(0) <= total_C * (ROUNDING * apart) ** 2)
    of_config = _of_config(freedom, np.where(constant_C, apart**2 / np.maximum(total_C, 1.0), within))
    freedom = np.where((of_config > 0) & ~constant_C, freedom, 0.0)
    scale = np.divide(within, of_config, out=np.ones(size.shape), where=freedom > 0)
    rows = freedom.sum(1, keepdims=True)
    leaf = ratio((freedom * scale).sum(1, keepdims=True), rows, 1.0)
    cells, leaves, total = np.count_nonzero(freedom), np.count_nonzero(rows), rows.sum()
    between = total - (rows**2).sum() / max(total, 1e-300)
    spread, noise = 0.0, NORMAL_NOISE / (1 + paired)
    if cells > leaves:
        noise = float((freedom * (scale - leaf) ** 2).sum()) / (cells - leaves)
    if between > 1e-9 * total:
        spread = float((rows * (leaf - 1.0) ** 2).sum() - noise * (leaves - 1)) / between
    if paired:
        spread, noise = spread - noise * cells / max(total, 1e-300), 2.0 * noise
        leaf, rows = scale, freedom
    # the scale of a leaf without spread: as if one of its rows had deviated by `apart`
    expected = np.where(freedom > 0, freedom * of_config, 0.0)
    one_deviation = ratio(apart**2, expected if paired else expected.sum(1, keepdims=True), 1.0)
    leaf = np.where(leaf > 0, leaf, one_deviation)
    known = max(spread, 0.0) * rows
    kept = np.divide(known, known + noise, out=np.zeros(rows.shape), where=known > 0)
    # the inverse of an estimated scale is too large on average; this is the first-order correction
    correction = 1.0 + ratio(noise * kept**2, rows)
    return _of_mean(of_config * (1.0 + kept * (leaf - 1.0)) * correction, size)


def _known(variance: Floats, size: Floats) -> tuple[Floats, Floats]:
    """Degrees of freedom and variance of each cell, 0 where unknown."""
    known = np.isfinite(variance)
    return np.where(known, np.maximum(size - 1.0, 0.0), 0.0), np.where(known, variance, 0.0)


def _of_config(freedom: Floats, within: Floats) -> Floats:
    """(C,) each config's variance over all leaves, shrunk towards that of all configs; NaN where nothing is known."""
    total_C, squares_C = freedom.sum(0), (freedom * within).sum(0)
    overall = squares_C.sum() / total_C.sum() if total_C.sum() > 0 else np.nan
    # skipped: a config that never varies, or that no cell tried twice, says nothing about its error
    tried = (total_C > 0) & (squares_C > 0)
    return np.where(tried, (PRIOR_CONFIG_ROWS * overall + squares_C) / (PRIOR_CONFIG_ROWS + total_C), np.nan)


def _of_mean(variance: Floats, size: Floats) -> Floats:
    variance = np.broadcast_to(variance, size.shape)
    error: Floats = np.divide(variance, size, out=np.full(size.shape, np.inf), where=(size > 0) & (variance > 0))
    return error
