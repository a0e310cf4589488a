"""The posterior of each config in each pattern: its gain over the default, pooled through the hierarchy, and its
quality.

NumPy only, so that the batch job and a lookup under another trade-off compute the same numbers.

Suffixes: P leaves, C configs, O outcomes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from rb_gpu.bank_data import NO_CHANCE
from rb_gpu.evidence import OUTCOMES, ROUNDING, Evidence, Floats, ratio
from rb_gpu.field import Field
from rb_gpu.homogeneity import FAMILY_ERROR
from rb_gpu.moderation import alike, degrees_of_freedom, moderated, unseen_falls
from rb_gpu.normal import normal_cdf
from rb_gpu.objective import Objective, choose
from rb_gpu.pooling import SPIKE, pool

Rows = npt.NDArray[np.int64]

# a gain below this share of the widest difference between configs is rounding, also in a lookup's float32
LEAST_GAIN = 1e-6


@dataclass(frozen=True)
class Beliefs:
    """Posterior of each cell's gain over the default and of its quality; (P + 1, C) each, float64.

    The last row is the prediction for one more, unknown pattern; it answers queries that are near no pattern.

    gain, gain_variance: posterior of the objective's difference to the default.
    probability: that the gain exceeds the margin. Under a bound it is 0 for a config that breaks the bound, and 1 for
        one that keeps it where the default does not; under a floor it is the probability that quality reaches the
        target.
    score: what is maximised among the configs whose probability is high enough.
    quality: expected quality. margin: (C,).
    second: what is maximised under a floor where no config is likely enough: the quality or, once a field's surplus
        was spent (rb_gpu.learn.floor), `test` less as many standard deviations as min_probability asks for.
    test, test_sd: mean and standard deviation of the normal variable whose probability of exceeding 0 is `probability`;
        NO_CHANCE and 0 where nothing is known. A bound is not part of this variable.
    """

    gain: Floats
    gain_variance: Floats
    probability: Floats
    score: Floats
    quality: Floats
    margin: Floats
    second: Floats
    test: Floats
    test_sd: Floats

    def choose(self, min_probability: float, default: int, likeliest: bool) -> Rows:
        """(P + 1,) the config of highest score among those with probability >= min_probability, else the default.

        likeliest: if no config is likely enough, choose the one of highest `second` in place of the default (used by
        the floor objective).
        """
        return choose(self.score, self.probability, self.second, min_probability, default, likeliest)

    def held_back(self) -> Beliefs:
        """A copy in which no config is likely enough anywhere, so that the default stands."""
        nothing = np.zeros_like(self.gain)
        return replace(self, probability=nothing, test=nothing + NO_CHANCE, test_sd=nothing)


def effects(evidence: Evidence, direction_O: Floats, default: int, apart: float) -> tuple[Floats, Floats, Floats]:
    """Raw effect over the default (P, C), its variance, infinite where the cell or the default has no evidence, and the
    degrees of freedom (C,) of the variances.

    Differences are paired if every query was also tried under the default. The variance of a cell's mean is based on
    its config's variance over all patterns, moderated by the leaf's scale (rb_gpu/moderation.py); where nothing is
    known of it, the effect counts as unknown and its variance is infinite. apart: `widest` of the outcomes, also where
    `evidence` holds residuals: how far a config that never varied may still deviate.
    """
    if evidence.paired:
        effect, variance, size = evidence.pair_moments(direction_O)
        # the default's differences to itself are always 0 and must not count as a config without spread
        variance[:, default] = np.nan
        # either side of a difference may deviate
        error = moderated(variance, size, True, math.sqrt(2.0) * apart)
        freedom_C = degrees_of_freedom(variance, size, None)
    else:
        mean, variance, size = evidence.moments(direction_O)
        error = moderated(variance, size, False, apart)
        freedom_C = degrees_of_freedom(variance, size, default)
        effect = mean - mean[:, [default]]
        error = error + error[:, [default]]
    known = np.isfinite(error) & (error > 0)
    effect, error = np.where(known, effect, 0.0), np.where(known, error, np.inf)
    effect[:, default], error[:, default] = 0.0, np.inf
    return effect, error, freedom_C


def widest(evidence: Evidence, direction_O: Floats) -> float:
    """The widest difference between the means of two configs in one pattern; 0 if no pattern ran two configs or the
    difference is mere rounding.
    """
    mean, ran = evidence.mean @ direction_O, evidence.w > 0
    apart_P = np.where(ran, mean, -np.inf).max(1) - np.where(ran, mean, np.inf).min(1)
    apart = float(apart_P.max(initial=0.0))
    return apart if apart > ROUNDING * float((np.abs(evidence.mean) @ np.abs(direction_O)).max(initial=0.0)) else 0.0


def believe(
    evidence: Evidence,
    parents: Sequence[Rows],
    objective: Objective,
    default: int,
    margin: float | str | Floats,
    field: Field | None = None,
) -> Beliefs:
    """The posterior beliefs for every leaf, and for one more, unknown leaf, under an objective.

    margin: a number, (C,) numbers, or "auto": the sampling error of the config's difference to the default over all
    leaves of the table, since no smaller gain can be told from none. With a field, "auto" is 0 for leaves, because
    choices were shown to pay as a whole before any is made. For an unknown leaf "auto" is the standard error of the
    overall difference, which includes how leaves differ. field: predicts the gains of the leaves; their evidence of its
    residuals then corrects the prediction.
    """
    judged = (evidence if field is None else field.residual(evidence)).with_unknown()
    evidence = evidence.with_unknown()
    parents = [np.append(parent, parent.max() + 1) for parent in parents]
    apart = widest(evidence, objective.direction)
    effect, variance, freedom_C = effects(judged, objective.direction, default, apart)
    gain, gain_variance, root_variance = pool(
        effect, variance, parents, tested=True, gated=field is not None, freedom=freedom_C
    )
    if field is not None:
        predicted, predicted_variance, root_variance = _predicted(field, objective.direction, default)
        gain, gain_variance = gain + predicted, gain_variance + predicted_variance
    gain[:, default], gain_variance[:, default] = 0.0, 0.0
    configs = len(root_variance)
    if isinstance(margin, str):
        unknown_C = np.sqrt(np.where(np.isfinite(root_variance), root_variance, 0.0))
        margin_C = _sampling_error(variance) if field is None else np.zeros(configs)
    else:
        margin_C = np.broadcast_to(np.asarray(margin, dtype=np.float64), (configs,)).copy()
        unknown_C = margin_C.copy()
    margin_C[default] = unknown_C[default] = 0.0
    lead, negligible = gain - margin_C, LEAST_GAIN * apart
    # a config that answers as the default does is no better, whichever side of 0 rounding puts it on
    lead[np.abs(gain) < negligible] -= negligible
    # the test that choices pay covers queries like those of the training; a query near no leaf is unlike them and keeps
    # the margin
    lead[-1] = gain[-1] - unknown_C
    known = np.isfinite(gain_variance) & (gain_variance > 0)
    z_PC = np.divide(lead, np.sqrt(gain_variance), out=np.zeros(gain.shape), where=known)
    probability = np.where(known, normal_cdf(z_PC), 0.0)

    direction = objective.quality_direction
    level, level_var, size = judged.moments(direction)
    # with a rare outcome, a leaf in which it never occurred has next to no variance of its own, and would dominate the
    # mean over leaves; so the variance is the config's
    level_error = alike(level_var, size)
    if objective.kind == "floor":
        raw, raw_var, _ = evidence.moments(direction)
        level_error = np.where(np.isfinite(level_error), level_error, 0.0) + unseen_falls(raw, raw_var, size)
    quality, quality_var, _ = pool(level, level_error, parents, tested=False)
    quality = np.where(np.isfinite(quality_var), quality, _fallback_quality(level, evidence.w))
    if field is not None:
        quality, quality_var = quality + (field.base + field.mean) @ direction, quality_var + field.quality_variance
    # for a config that never ran, the field predicts only what all configs share
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
        score = -_expense(evidence, judged, parents, field)
        test, test_sd = quality - objective.target, np.sqrt(np.where(certain, quality_var, 0.0))
        test[:, never_C] = NO_CHANCE
    return Beliefs(gain, gain_variance, probability, score, quality, margin_C, quality, test, test_sd)


def _sampling_error(variance: Floats) -> Floats:
    """(C,) standard error of each config's difference over these very leaves, from the errors (P, C) of its effects; 0
    where none is known.
    """
    precision = np.where(np.isfinite(variance), 1.0 / variance, 0.0).sum(0)
    return np.asarray(np.sqrt(ratio(1.0, precision)))


def surely_better(field: Field, objective: Objective, default: int) -> bool:
    """Whether some config beats the default over all queries together, at FAMILY_ERROR for all configs (Bonferroni).

    The one test that needs no rows, and so is possible in a lookup; whether choices by place pay is tested on rows
    (rb_gpu.learn.proof).
    """
    direction_O = objective.direction
    level_C = (field.base + field.mean[-1]) @ direction_O
    error_C = field.level_variance @ direction_O**2
    z_C = ratio(level_C - level_C[default], np.sqrt(error_C))
    return bool(normal_cdf(-z_C.max()) * max(len(z_C) - 1, 1) < FAMILY_ERROR)


def _predicted(field: Field, direction_O: Floats, default: int) -> tuple[Floats, Floats, Floats]:
    """The field's predicted gain of every leaf (P + 1, C), its variance, and the variance of the overall gain (C,).

    The overall gains of all configs are shrunk towards 0 together (James & Stein 1961, with τ² by the method of
    moments), except for negative ones: closer to the default, a worse config would seem as good as the default in
    places.
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
    """A constant outcome has no variance to pool by: each cell keeps its own mean, or without rows gets that of all
    patterns.
    """
    return np.where(w > 0, level, ratio((w * level).sum(0), w.sum(0)))


def _expense(evidence: Evidence, judged: Evidence, parents: Sequence[Rows], field: Field | None) -> Floats:
    """(P, C) mean cost; for a config never tried here, its mean over all patterns. If no cost was logged, mean log2
    latency, pooled like the quality: a few answers that the machine delays would make the fastest config of a leaf look
    like the slowest.
    """
    cost = evidence.mean[..., OUTCOMES.index("cost")]
    if (cost > 0).any():
        return _fallback_quality(cost, evidence.w)
    direction = np.array([float(name == "log2_latency") for name in OUTCOMES])
    level, variance, size = judged.moments(direction)
    octaves, octaves_var, _ = pool(level, alike(variance, size), parents, tested=False)
    octaves = np.where(np.isfinite(octaves_var), octaves, _fallback_quality(level, evidence.w))
    return octaves if field is None else octaves + (field.base + field.mean) @ direction


def _keeps_bound(evidence: Evidence, objective: Objective) -> npt.NDArray[np.bool_]:
    """(P, C) whether p95 latency and mean cost stay within their bounds; for a cell without rows, over the whole
    table.
    """
    everything = evidence.pooled()
    keeps = np.ones(evidence.rows.shape, dtype=bool)
    for bound, leaf, root in (
        (objective.max_latency_us, evidence.latency_quantile(0.95), everything.latency_quantile(0.95)),
        (objective.max_cost, evidence.mean[..., OUTCOMES.index("cost")], everything.mean[..., OUTCOMES.index("cost")]),
    ):
        if bound is not None:
            keeps &= np.where(evidence.rows > 0, leaf, root) <= bound
    return keeps
