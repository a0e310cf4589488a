"""Tests whether effects differ by more than chance explains. NumPy only.

Suffixes: P leaves, C configs.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from rb_gpu.evidence import Floats, ratio
from rb_gpu.normal import as_normal, normal_cdf

FAMILY_ERROR = 0.05


def _rejects(p_C: Floats) -> npt.NDArray[np.bool_]:
    """Which hypotheses are rejected at a false discovery rate of FAMILY_ERROR / 2 (Benjamini & Hochberg); NaN is no
    test.
    """
    order = np.argsort(np.where(np.isnan(p_C), np.inf, p_C))
    tests = int(np.count_nonzero(~np.isnan(p_C)))
    passed = np.flatnonzero(p_C[order[:tests]] <= FAMILY_ERROR / 2 * np.arange(1, tests + 1) / max(tests, 1))
    rejected = np.zeros(len(p_C), dtype=bool)
    rejected[order[: passed[-1] + 1 if len(passed) else 0]] = True
    return rejected


def differs(mean_C: Floats, var_C: Floats, freedom_C: Floats) -> npt.NDArray[np.bool_]:
    """Which configs differ from the default overall, by a two-sided t test. freedom_C: degrees of freedom of the
    variances.
    """
    known = np.isfinite(var_C) & (var_C > 0)
    t = np.divide(np.abs(mean_C), np.sqrt(var_C), out=np.zeros(len(mean_C)), where=known)
    return _rejects(np.where(known, 2.0 * normal_cdf(-as_normal(t, freedom_C)), np.nan))


def varies(effect: Floats, variance: Floats, freedom_C: Floats) -> npt.NDArray[np.bool_]:
    """Which configs' effects scatter over the leaves by more than their errors explain: Cochran's Q (1954). Its tail is
    that of F, since few rows estimate the variances with freedom_C (C,) degrees of freedom, by the cube roots of Wilson
    & Hilferty (1931) and Paulson (1942).
    """
    weight = np.where(np.isfinite(variance), 1.0 / variance, 0.0)
    centre = ratio((weight * effect).sum(0), weight.sum(0))
    freedom = np.isfinite(variance).sum(0) - 1.0
    root = np.cbrt((weight * (effect - centre) ** 2).sum(0) / np.maximum(freedom, 1.0))
    part, of_variance = 2.0 / (9.0 * np.maximum(freedom, 1.0)), 2.0 / (9.0 * np.maximum(freedom_C, 1e-9))
    z = (root * (1.0 - of_variance) - (1.0 - part)) / np.sqrt(part + root**2 * of_variance)
    return _rejects(np.where(freedom > 0, normal_cdf(-z), np.nan))
