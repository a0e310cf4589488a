"""What the evidence says about each config of each pattern: effects over the default, pooled through the hierarchy.

NumPy only, so that the batch job and a lookup with another trade-off compute the same numbers.
Suffixes: P leaves, C configs, O outcomes, G nodes of the level above.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from rb_gpu.bank_data import NO_CHANCE
from rb_gpu.evidence import OUTCOMES, ROUNDING, Evidence, Floats, linear_moments
from rb_gpu.field import Field
from rb_gpu.homogeneity import FAMILY_ERROR, differs, varies
from rb_gpu.moderation import alike, moderated
from rb_gpu.normal import normal_cdf
from rb_gpu.objective import Objective, choose

Rows = npt.NDArray[np.int64]

# share of its variance that an effect keeps once it is taken as 0: not none, so that a precision stays finite
SPIKE = 1e-6
# of a gain that is rounding, also in a lookup's float32, as a share of how far configs lie apart
LEAST_GAIN = 1e-6


@dataclass(frozen=True)
class Beliefs:
    """Posterior of each cell's gain over the default and of its quality; (P + 1, C) each, float64.

    The last row is for a pattern that is not known: what the table foretells of one more pattern. A query that is near
    no pattern is answered by it.

    gain, gain_variance: of the objective's difference to the default. probability: that it beats the default by the
    margin (bound: and keeps the bound; floor: that quality reaches the target). score: what is maximised among the
    configs that are probable enough. quality: expected quality. margin: (C,). test, test_sd: what the probability is
    that of, a normal variable's exceeding 0; NO_CHANCE and 0 where nothing is known (a bound is not
    judged by them).
    """

    gain: Floats
    gain_variance: Floats
    probability: Floats
    score: Floats
    quality: Floats
    margin: Floats
    test: Floats
    test_sd: Floats

    def choose(self, min_probability: float, default: int, likeliest: bool) -> Rows:
        """(P + 1,) the config of highest score among those with probability >= min_probability, else the default.

        likeliest: where none is probable enough, the one of highest quality in place of the default (a floor asks for
        that).
        """
        return choose(self.score, self.probability, self.quality, min_probability, default, likeliest)

    def held_back(self) -> Beliefs:
        """The same of a bank in which no config is probable enough anywhere."""
        nothing = np.zeros_like(self.gain)
        return replace(self, probability=nothing, test=nothing + NO_CHANCE, test_sd=nothing)


def effects(evidence: Evidence, direction_O: Floats, default: int, apart: float) -> tuple[Floats, Floats]:
    """Raw effect over the default (P, C) and its variance, infinite where the cell or the default has no evidence.

    Differences are paired where every query was tried under the default too. A cell's variance is its config's over all
    patterns, moderated; where that is zero or unknown, nothing can be said and it is infinite. apart: `widest` of the
    outcomes, of which `evidence` may hold what was left unexplained.
    """
    if evidence.paired:
        moments = (evidence.pair_w, evidence.pair_w2, evidence.pair_mean, evidence.pair_comoment)
        effect, variance, size = linear_moments(*moments, direction_O)
        # its differences to itself are no evidence of how far any scatters
        variance[:, default] = np.nan
        # either of the two may come out otherwise
        error = moderated(variance, size, True, math.sqrt(2.0) * apart)
    else:
        mean, variance, size = linear_moments(evidence.w, evidence.w2, evidence.mean, evidence.comoment, direction_O)
        error = moderated(variance, size, False, apart)
        effect = mean - mean[:, [default]]
        error = error + error[:, [default]]
    known = np.isfinite(error) & (error > 0)
    effect, error = np.where(known, effect, 0.0), np.where(known, error, np.inf)
    effect[:, default], error[:, default] = 0.0, np.inf
    return effect, error


def widest(evidence: Evidence, direction_O: Floats) -> float:
    """How far the means of two configs lie apart in one pattern, at most; 0 where no pattern ran two, or it is
    rounding.
    """
    mean, ran = evidence.mean @ direction_O, evidence.w > 0
    apart_P = np.where(ran, mean, -np.inf).max(1) - np.where(ran, mean, np.inf).min(1)
    apart = float(apart_P.max(initial=0.0))
    return apart if apart > ROUNDING * float((np.abs(evidence.mean) @ np.abs(direction_O)).max(initial=0.0)) else 0.0


def pool(
    effect: Floats, variance: Floats, parents: Sequence[Rows], tested: bool, gated: bool = False
) -> tuple[Floats, Floats, Floats]:
    """Posterior mean and variance of every cell (P, C), and the variance of the root (C,).

    A normal model on the tree: a child scatters around its parent by τ² (per level and config, Paule & Mandel 1982).
    Beliefs go up and then down exactly (Pearl 1988): a child's prior is its parent's posterior from everything but that
    child, so no row counts twice. parents: for each level from the leaves, the row of each node's parent; the last
    level's nodes hang below one root. An infinite variance says that a cell has no evidence.

    tested: what chance alone could show is taken as nothing, so that equal configs stay equal: a config's effect on the
    whole is 0 unless a test rejects that, and its τ² are 0 unless Cochran's Q over the leaves rejects homogeneity, at
    FAMILY_ERROR for all configs and both tests together. gated: whether choices must be shown to pay as a whole before
    any is made: the τ² of all levels are then not tested, but drawn together.
    """
    levels = [*parents, np.zeros(_width(parents, len(effect)), dtype=np.int64)]
    mean, var = effect, variance
    varied = varies(effect, variance) if tested else np.ones(effect.shape[1], dtype=bool)
    messages: list[tuple[Floats, Floats, Floats, Floats]] = []
    for parent in levels:
        groups = int(parent.max()) + 1
        tau2 = np.where(varied, paule_mandel(mean, var, parent, groups), 0.0)
        if gated:
            tau2 = _drawn_together(mean, var, parent, groups, tau2)
        precision = np.where(np.isfinite(var), 1.0 / (var + tau2), 0.0)
        messages.append((mean, var, precision, tau2))
        total = _add(precision, parent, groups)
        up = np.divide(_add(precision * mean, parent, groups), total, out=np.zeros(total.shape), where=total > 0)
        mean, var = up, np.divide(1.0, total, out=np.full(total.shape, np.inf), where=total > 0)
    root_var = var[0]
    if tested:
        doubtful = ~differs(mean[0], root_var)
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
        mean = np.divide(own * child_mean + prior * prior_mean, total, out=np.zeros(total.shape), where=total > 0)
        var = np.divide(1.0, total, out=np.full(total.shape, np.inf), where=total > 0)
    return mean, var, root_var


def _width(parents: Sequence[Rows], leaves: int) -> int:
    return int(parents[-1].max()) + 1 if parents else leaves


def _add(x: Floats, group: Rows, groups: int) -> Floats:
    out = np.zeros((groups, x.shape[1]))
    np.add.at(out, group, x)
    return out


def paule_mandel(mean: Floats, var: Floats, parent: Rows, groups: int) -> Floats:
    """τ² (C,) at which the children's weighted squares around their parents' means equal their degrees of freedom.

    Paule & Mandel (1982) with one mean per parent. 0 where the children scatter no more than their errors.
    """
    informative = np.isfinite(var)
    freedom = np.maximum(_add(informative.astype(np.float64), parent, groups) - 1.0, 0.0).sum(0)

    def excess(tau2: Floats) -> Floats:
        weight = np.where(informative, 1.0 / (np.where(informative, var, 1.0) + tau2), 0.0)
        total = _add(weight, parent, groups)
        centre = np.divide(_add(weight * mean, parent, groups), total, out=np.zeros(total.shape), where=total > 0)
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
    """τ² (C,) of each config drawn to that of all as one, as far as chance explains how they differ (James & Stein
    1961): where configs are many, each has too few rows to show its own. Each `alone` where only one has any.

    A config's own is the moment estimate (DerSimonian & Laird 1986). Its chance error is read from how the leaves'
    parts of it scatter, on the mean over configs: a config that is much better in few leaves has no normal effects.
    """
    weight = np.where(np.isfinite(var), 1.0 / var, 0.0)
    total = _add(weight, parent, groups)
    centre = np.divide(_add(weight * mean, parent, groups), total, out=np.zeros(total.shape), where=total > 0)
    lost = np.divide(_add(weight**2, parent, groups), total, out=np.zeros(total.shape), where=total > 0)
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


def believe(
    evidence: Evidence,
    parents: Sequence[Rows],
    objective: Objective,
    default: int,
    margin: float | str | Floats,
    field: Field | None = None,
) -> Beliefs:
    """The posterior beliefs of every leaf, and of a leaf that is not known, under an objective.

    margin: a number, (C,) numbers, or "auto": the standard error of the config's difference to the default over the
    whole table, since no smaller gain can be told from none; 0 for leaves with a field, whose choices are shown to pay
    as a whole before any is made. field: what foretells the leaves; their evidence then corrects it, by what it left
    unexplained.
    """
    judged = (evidence if field is None else field.residual(evidence)).with_unknown()
    evidence = evidence.with_unknown()
    parents = [np.append(parent, parent.max() + 1) for parent in parents]
    apart = widest(evidence, objective.direction)
    effect, variance = effects(judged, objective.direction, default, apart)
    gain, gain_variance, root_variance = pool(effect, variance, parents, tested=True, gated=field is not None)
    if field is not None:
        foretold, foretold_variance, root_variance = _foretold(field, objective.direction, default)
        gain, gain_variance = gain + foretold, gain_variance + foretold_variance
    gain[:, default], gain_variance[:, default] = 0.0, 0.0
    configs = len(root_variance)
    if isinstance(margin, str):
        unknown_C = np.sqrt(np.where(np.isfinite(root_variance), root_variance, 0.0))
        margin_C = unknown_C.copy() if field is None else np.zeros(configs)
    else:
        margin_C = np.broadcast_to(np.asarray(margin, dtype=np.float64), (configs,)).copy()
        unknown_C = margin_C.copy()
    margin_C[default] = unknown_C[default] = 0.0
    lead, none = gain - margin_C, LEAST_GAIN * apart
    # what answers as the default does is no better, by whichever side rounding puts it on
    lead[np.abs(gain) < none] -= none
    # the test of choices was of queries like those learned from, which one that is near no leaf is not
    lead[-1] = gain[-1] - unknown_C
    known = np.isfinite(gain_variance) & (gain_variance > 0)
    z_PC = np.divide(lead, np.sqrt(gain_variance), out=np.full(gain.shape, -np.inf), where=known)
    probability = np.where(known, normal_cdf(np.where(known, z_PC, 0.0)), 0.0)

    direction = objective.quality_direction
    level, level_var, size = linear_moments(judged.w, judged.w2, judged.mean, judged.comoment, direction)
    # of a rare outcome, a leaf that shows none has next to no variance of its own, and would decide the mean of all
    quality, quality_var, _ = pool(level, alike(level_var, size), parents, tested=False)
    quality = np.where(np.isfinite(quality_var), quality, _fallback_quality(level, evidence.w))
    if field is not None:
        quality, quality_var = quality + (field.base + field.mean) @ direction, quality_var + field.quality_variance
    # what a field says of a config that never ran is what it says of all others together
    never_C = (evidence.rows == 0).all(0)
    quality[:, never_C] = 0.0
    score = gain
    test, test_sd = np.where(known, lead, NO_CHANCE), np.sqrt(np.where(known, gain_variance, 0.0))
    if objective.kind == "bound":
        keeps = _keeps_bound(evidence, objective)
        probability = np.where(keeps[:, [default]], probability, 1.0) * keeps
        score = quality
    elif objective.kind == "floor":
        certain = np.isfinite(quality_var) & (quality_var > 0)
        z_PC = np.divide(quality - objective.target, np.sqrt(quality_var), out=np.zeros(quality.shape), where=certain)
        probability = np.where(certain, normal_cdf(z_PC), quality >= objective.target)
        probability[:, never_C] = 0.0
        score = -_expense(evidence)
        test, test_sd = quality - objective.target, np.sqrt(np.where(certain, quality_var, 0.0))
        test[:, never_C] = NO_CHANCE
    return Beliefs(gain, gain_variance, probability, score, quality, margin_C, test, test_sd)


def surely_better(field: Field, objective: Objective, default: int) -> bool:
    """Whether some config beats the default over all queries together, at FAMILY_ERROR for all configs (Bonferroni).

    What is left to ask once the rows are gone: whether choices by place pay needs them (rb_gpu.learn.proof).
    """
    direction_O = objective.direction
    level_C = (field.base + field.mean[-1]) @ direction_O
    error_C = field.level_variance @ direction_O**2
    z_C = np.divide(level_C - level_C[default], np.sqrt(error_C), out=np.zeros(len(level_C)), where=error_C > 0)
    return bool(normal_cdf(-z_C.max()) * max(len(z_C) - 1, 1) < FAMILY_ERROR)


def _foretold(field: Field, direction_O: Floats, default: int) -> tuple[Floats, Floats, Floats]:
    """What the field says of every leaf's gain (P + 1, C), with its variance, and the variance (C,) over the table.

    The differences of all configs to the default, on the whole, are shrunk towards 0 together (James & Stein 1961, with
    τ² by the method of moments), but for those of worse ones: nearer to the default, they would seem as good in places.
    """
    error = field.level_variance @ direction_O**2
    error = np.where(error > 0, error, np.inf)
    level = (field.base + field.mean) @ direction_O
    shift = level - level[:, [default]]
    known = np.isfinite(error)
    weight = np.where(known, 1.0 / np.where(known, error, 1.0), 0.0)
    excess = (weight * shift[-1] ** 2).sum() - np.count_nonzero(known)
    tau2 = max(excess, 0.0) / max(weight.sum(), 1e-300)
    kept = np.divide(tau2, tau2 + error, out=np.zeros(error.shape), where=known)
    kept = np.where(known & (shift[-1] < 0), 1.0, kept)
    variance = field.gain_variance @ direction_O**2 + np.where(known, np.maximum(kept, SPIKE) * error, np.inf)
    return shift - shift[-1] + kept * shift[-1], variance, error


def _fallback_quality(level: Floats, w: Floats) -> Floats:
    """A constant outcome has no variance to pool by: its plain mean over all patterns stands in."""
    total = w.sum(0)
    mean = np.divide((w * level).sum(0), total, out=np.zeros(total.shape), where=total > 0)
    return np.where(w > 0, level, mean)


def _expense(evidence: Evidence) -> Floats:
    """(P, C) mean cost, or mean latency where no cost was logged; a config never tried here at its mean over all."""
    cost = evidence.mean[..., OUTCOMES.index("cost")]
    price = cost if (cost > 0).any() else evidence.latency_us
    return _fallback_quality(price, evidence.w)


def _keeps_bound(evidence: Evidence, objective: Objective) -> npt.NDArray[np.bool_]:
    """(P, C) whether p95 latency and mean cost stay under their bounds; a cell without rows answers by the root's."""
    everything = evidence.regroup(np.zeros(len(evidence.rows), dtype=np.int64), 1)
    keeps = np.ones(evidence.rows.shape, dtype=bool)
    for bound, leaf, root in (
        (objective.max_latency_us, evidence.latency_quantile(0.95), everything.latency_quantile(0.95)),
        (objective.max_cost, evidence.mean[..., OUTCOMES.index("cost")], everything.mean[..., OUTCOMES.index("cost")]),
    ):
        if bound is not None:
            keeps &= np.where(evidence.rows > 0, leaf, root) <= bound
    return keeps
