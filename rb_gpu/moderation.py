"""How sure the mean of a cell is, whose own few rows know their variance badly. NumPy only.

Suffixes: P leaves, C configs.
"""

from __future__ import annotations

import numpy as np

from rb_gpu.evidence import ROUNDING, Floats

# rows that the variance pooled over configs counts for beside a config's own: one that few cells tried twice knows
# little of its own
PRIOR_CONFIG_ROWS = 20.0
# of a variance estimated from normal rows: its relative variance times its degrees of freedom
NORMAL_NOISE = 2.0


def alike(variance: Floats, size: Floats) -> Floats:
    """Variance (P, C) of each cell's mean, from its config's variance over all leaves alone.

    variance, size: (P, C) of a cell's rows, and how many they count for. Infinite where nothing is known of it.
    """
    freedom, within = _known(variance, size)
    return _of_mean(np.broadcast_to(_of_config(freedom, within), size.shape), size)


def moderated(variance: Floats, size: Floats, paired: bool, apart: float) -> Floats:
    """The same of a config's variance times the scale of the leaf, as far as leaves are seen to differ in scale.

    apart: how far outcomes of one leaf lie apart. What showed no spread in n rows, a config or of a leaf its scale, may
    still differ in the next: as much as if one of the n had, by that much. Where nothing lies apart it is unknown.

    A leaf's scale is drawn to 1 by empirical Bayes, as Smyth (2004) draws variances. How much it errs is not taken from
    the chi-squared law, by which 40 rows without a click would know that nothing is ever clicked, but from how the
    configs of one leaf disagree about it, by the method of moments.

    A scale and the means that it weighs come from the same rows, and of skewed outcomes both err together. Where the
    scale is that of all rows of the leaf, the means of all configs do so by as much, however few rows one has, and no
    difference moves. paired: variance and size are of differences to the default. What the default's rows err by is
    then in all of them, and would move them: each has its own scale, and half of its error is that of the others too.
    """
    freedom, within = _known(variance, size)
    total_C = freedom.sum(0)
    even_C = (total_C > 0) & ((freedom * within).sum(0) <= total_C * (ROUNDING * apart) ** 2)
    of_config = _of_config(freedom, np.where(even_C, apart**2 / np.maximum(total_C, 1.0), within))
    freedom = np.where((of_config > 0) & ~even_C, freedom, 0.0)
    scale = np.divide(within, of_config, out=np.ones(size.shape), where=freedom > 0)
    rows = freedom.sum(1, keepdims=True)
    leaf = np.divide((freedom * scale).sum(1, keepdims=True), rows, out=np.ones(rows.shape), where=rows > 0)
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
    seen = np.where(freedom > 0, freedom * of_config, 0.0)
    one = apart**2 / np.maximum(seen if paired else seen.sum(1, keepdims=True), 1e-300)
    leaf = np.where(leaf > 0, leaf, one)
    known = max(spread, 0.0) * rows
    kept = np.divide(known, known + noise, out=np.zeros(rows.shape), where=known > 0)
    # a scale that is itself estimated makes its inverse too large on average: the first-order correction
    correction = 1.0 + np.divide(noise * kept**2, rows, out=np.zeros(rows.shape), where=rows > 0)
    return _of_mean(of_config * (1.0 + kept * (leaf - 1.0)) * correction, size)


def _known(variance: Floats, size: Floats) -> tuple[Floats, Floats]:
    """Degrees of freedom and variance of each cell, 0 where it has none."""
    known = np.isfinite(variance)
    return np.where(known, np.maximum(size - 1.0, 0.0), 0.0), np.where(known, variance, 0.0)


def _of_config(freedom: Floats, within: Floats) -> Floats:
    """(C,) each config's variance over all leaves, drawn to that of all configs; NaN where nothing is known of it."""
    total_C, squares_C = freedom.sum(0), (freedom * within).sum(0)
    overall = squares_C.sum() / total_C.sum() if total_C.sum() > 0 else np.nan
    # a config that never varies says nothing of its error, nor does one that no cell tried twice
    tried = (total_C > 0) & (squares_C > 0)
    return np.where(tried, (PRIOR_CONFIG_ROWS * overall + squares_C) / (PRIOR_CONFIG_ROWS + total_C), np.nan)


def _of_mean(variance: Floats, size: Floats) -> Floats:
    error: Floats = np.divide(variance, size, out=np.full(size.shape, np.inf), where=(size > 0) & (variance > 0))
    return error
