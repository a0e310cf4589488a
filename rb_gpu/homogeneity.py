"""Whether effects differ by more than chance explains, and by how much they may where that does not show. NumPy only.

Suffixes: P leaves, C configs.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from rb_gpu.evidence import Floats
from rb_gpu.normal import normal_cdf

FAMILY_ERROR = 0.05
# of a moment estimate, in standard errors: one further below 0 says no more
LEAST_Z = -3.0


def _rejects(p_C: Floats) -> npt.NDArray[np.bool_]:
    """Which hypotheses fall at a false discovery rate of FAMILY_ERROR / 2 (Benjamini & Hochberg); NaN is no test."""
    order = np.argsort(np.where(np.isnan(p_C), np.inf, p_C))
    tests = int(np.count_nonzero(~np.isnan(p_C)))
    passed = np.flatnonzero(p_C[order[:tests]] <= FAMILY_ERROR / 2 * np.arange(1, tests + 1) / max(tests, 1))
    rejected = np.zeros(len(p_C), dtype=bool)
    rejected[order[: passed[-1] + 1 if len(passed) else 0]] = True
    return rejected


def differs(mean_C: Floats, var_C: Floats) -> npt.NDArray[np.bool_]:
    """Which configs differ from the default on the whole, by a two-sided normal test."""
    known = np.isfinite(var_C) & (var_C > 0)
    z = np.divide(np.abs(mean_C), np.sqrt(var_C), out=np.zeros(len(mean_C)), where=known)
    return _rejects(np.where(known, 2.0 * normal_cdf(-z), np.nan))


def varies(effect: Floats, variance: Floats) -> npt.NDArray[np.bool_]:
    """For which configs the leaves scatter more than their errors explain: Cochran's Q (1954), its chi-squared tail by
    Wilson & Hilferty's cube root (1931).
    """
    weight = np.where(np.isfinite(variance), 1.0 / variance, 0.0)
    total = weight.sum(0)
    centre = np.divide((weight * effect).sum(0), total, out=np.zeros(total.shape), where=total > 0)
    freedom = np.isfinite(variance).sum(0) - 1.0
    ratio = (weight * (effect - centre) ** 2).sum(0) / np.maximum(freedom, 1.0)
    part = 2.0 / (9.0 * np.maximum(freedom, 1.0))
    z = (np.cbrt(ratio) - (1.0 - part)) / np.sqrt(part)
    return _rejects(np.where(freedom > 0, normal_cdf(-z), np.nan))


def hidden(effect: Floats, variance: Floats) -> Floats:
    """Variance (P, C) of true effects that a test for it did not find, which does not say that there is none.

    The moment estimate (DerSimonian & Laird 1986) is normal about it, and it is not negative: its mean under a flat
    prior, at most the squared range of the effects, less what a leaf's own rows say of its effect. 0 where the test
    found some, which `pool` takes in.
    """
    weight = np.where(np.isfinite(variance), 1.0 / variance, 0.0)
    total, freedom = weight.sum(0), np.isfinite(variance).sum(0) - 1.0
    doubtful = (freedom > 0) & ~varies(effect, variance)
    total, freedom = np.where(doubtful, total, 1.0), np.where(doubtful, freedom, 1.0)
    centre = (weight * effect).sum(0) / total
    excess = (weight * (effect - centre) ** 2).sum(0) - freedom
    z = np.maximum(excess / np.sqrt(2.0 * freedom), LEAST_Z)
    mean_z = z + np.exp(-0.5 * z**2) / math.sqrt(2.0 * math.pi) / normal_cdf(z)
    scale = (weight * (1.0 - weight / total)).sum(0)
    widest = np.where(weight > 0, effect, -np.inf).max(0) - np.where(weight > 0, effect, np.inf).min(0)
    known = doubtful & (scale > 0)
    spread = np.divide(mean_z * np.sqrt(2.0 * freedom), scale, out=np.zeros(scale.shape), where=known)
    spread = np.minimum(spread, np.where(known, widest, 0.0) ** 2)
    left: Floats = spread / (1.0 + spread * weight)
    return left
