"""Pooling effects through the hierarchy of patterns: an empirical Bayes model on a tree. NumPy only.

Suffixes: P leaves, C configs, G nodes of the level above.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from rb_gpu.evidence import Floats, ratio
from rb_gpu.homogeneity import differs, varies

Rows = npt.NDArray[np.int64]

# share of its variance that an effect keeps once a test has set it to 0; not 0, so that its precision stays finite
SPIKE = 1e-6


def pool(
    effect: Floats, variance: Floats, parents: Sequence[Rows], tested: bool, gated: bool = False,
    freedom: Floats | None = None,
) -> tuple[Floats, Floats, Floats]:  # fmt: skip
    """Posterior mean and variance of every cell (P, C), and the variance of the root (C,) before any test.

    A normal model on the tree: a child scatters around its parent with variance τ² (one per level and config, Paule &
    Mandel 1982). Exact belief propagation, upwards and then downwards (Pearl 1988): a child's prior is its parent's
    posterior from everything but that child, so no row counts twice. parents: for each level from the leaves up, the
    row of each node's parent; the nodes of the last level hang below one root. An infinite variance marks a cell
    without evidence.

    tested: effects that chance alone could produce are set to 0, so that equal configs stay equal. A config's overall
    effect is 0, and its root variance is multiplied by SPIKE, unless a test rejects that; its τ² are 0 unless Cochran's
    Q over the leaves rejects homogeneity. Both tests together keep FAMILY_ERROR over all configs. gated: set if choices
    are only made once they were shown to pay as a whole; the τ² of a level are then shrunk towards a common one in
    place of the test. freedom: (C,) degrees of freedom of each config's variance; None if variances are known.
    """
    freedom = np.full(effect.shape[1], np.inf) if freedom is None else freedom
    top = int(parents[-1].max()) + 1 if parents else len(effect)
    levels = [*parents, np.zeros(top, dtype=np.int64)]
    mean, var = effect, variance
    varied = varies(effect, variance, freedom) if tested else np.ones(effect.shape[1], dtype=bool)
    messages: list[tuple[Floats, Floats, Floats, Floats]] = []
    for parent in levels:
        groups = int(parent.max()) + 1
        tau2 = np.where(varied, paule_mandel(mean, var, parent, groups), 0.0)
        if gated:
            tau2 = _drawn_together(mean, var, parent, groups, tau2)
        precision = np.where(np.isfinite(var), 1.0 / (var + tau2), 0.0)
        messages.append((mean, var, precision, tau2))
        total = _add(precision, parent, groups)
        mean, var = ratio(_add(precision * mean, parent, groups), total), ratio(1.0, total, np.inf)
    root_var = var[0].copy()
    if tested:
        doubtful = ~differs(mean[0], root_var, freedom)
        mean[0, doubtful] = 0.0
        var[0, doubtful] *= SPIKE
    for parent, (child_mean, child_var, precision, tau2) in zip(reversed(levels), reversed(messages), strict=True):
        above = np.divide(1.0, var, out=np.zeros(var.shape), where=np.isfinite(var))[parent]
        cavity = above - precision
        known = cavity > 1e-9 * np.maximum(above, 1e-300)
        prior_mean = np.divide(
            above * mean[parent] - precision * child_mean, cavity, out=np.zeros(cavity.shape), where=known
        )
        prior_var = np.divide(1.0, cavity, out=np.full(cavity.shape, np.inf), where=known) + tau2
        own = np.where(np.isfinite(child_var), 1.0 / child_var, 0.0)
        prior = np.where(np.isfinite(prior_var), 1.0 / prior_var, 0.0)
        total = own + prior
        mean, var = ratio(own * child_mean + prior * prior_mean, total), ratio(1.0, total, np.inf)
    return mean, var, root_var


def _add(x: Floats, group: Rows, groups: int) -> Floats:
    out = np.zeros((groups, x.shape[1]))
    np.add.at(out, group, x)
    return out


def paule_mandel(mean: Floats, var: Floats, parent: Rows, groups: int) -> Floats:
    """τ² (C,) at which the children's weighted squares around their parents' means equal their degrees of freedom.

    Paule & Mandel (1982) with one mean per parent. 0 if the children scatter no more than their errors explain.
    """
    informative = np.isfinite(var)
    freedom = np.maximum(_add(informative.astype(np.float64), parent, groups) - 1.0, 0.0).sum(0)

    def excess(tau2: Floats) -> Floats:
        weight = np.where(informative, 1.0 / (np.where(informative, var, 1.0) + tau2), 0.0)
        total = _add(weight, parent, groups)
        centre = ratio(_add(weight * mean, parent, groups), total)
        return np.asarray((weight * (mean - centre[parent]) ** 2).sum(0) - freedom)

    spread = np.where(informative, mean, 0.0)
    high = np.maximum((spread.max(0) - spread.min(0)) ** 2, 1e-300)
    low = np.zeros_like(high)
    over_dispersed = (excess(low) > 0) & (freedom > 0)
    for _ in range(60):
        middle = 0.5 * (low + high)
        above = excess(middle) > 0
        low, high = np.where(above, middle, low), np.where(above, high, middle)
    return np.where(over_dispersed, 0.5 * (low + high), 0.0)


def _drawn_together(mean: Floats, var: Floats, parent: Rows, groups: int, alone: Floats) -> Floats:
    """τ² (C,) of each config, shrunk towards the common τ² of all configs to the extent that chance explains how they
    differ (James & Stein 1961): with many configs, each has too few rows for a good estimate of its own. Returns
    `alone` if fewer than two configs have an estimate.

    A config's own estimate is that of moments (DerSimonian & Laird 1986). Its error variance is not taken from normal
    theory, since a config that is much better in a few leaves has effects that are not normal; it is estimated from how
    the leaves' contributions scatter, and averaged over configs.
    """
    weight = np.where(np.isfinite(var), 1.0 / var, 0.0)
    total = _add(weight, parent, groups)
    centre = ratio(_add(weight * mean, parent, groups), total)
    lost = ratio(_add(weight**2, parent, groups), total)
    freedom = (np.count_nonzero(weight, axis=0) - np.count_nonzero(total, axis=0)).astype(np.float64)
    scale = weight.sum(0) - lost.sum(0)
    known = (freedom > 0) & (scale > 0)
    if np.count_nonzero(known) < 2:
        return alone
    part = (weight * (mean - centre[parent]) ** 2)[:, known]
    leaves, freedom, scale = np.count_nonzero(weight[:, known], axis=0), freedom[known], scale[known]
    configs = mean.shape[1]
    of_all = (parent + groups * np.arange(configs)[:, None]).ravel()
    together = paule_mandel(mean.T.reshape(-1, 1), var.T.reshape(-1, 1), of_all, groups * configs)[0]
    own = (part.sum(0) - freedom) / scale
    away = np.where(weight[:, known] > 0, part - part.sum(0) / leaves, 0.0)
    chance = leaves / freedom * (away**2).sum(0) / scale**2
    differ = float(((own - together) ** 2).mean())
    share = min(1.0, float(chance.mean()) / differ) if differ > 0 else 1.0
    out = np.full(configs, together)
    out[known] = np.maximum(share * together + (1.0 - share) * own, 0.0)
    return out
