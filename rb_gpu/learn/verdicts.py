"""Which config each pattern should use: empirical Bayes, corrected Welch tests, or the reference document's procedure.

Suffixes: P patterns, C configs.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import stats

from rb_gpu.evidence import OUTCOMES, Evidence
from rb_gpu.learn.arrays import student_tail
from rb_gpu.learn.config import JudgeConfig, QualityConfig
from rb_gpu.learn.sequential import sequential_p
from rb_gpu.learn.trajectories import Trajectories
from rb_gpu.objective import Objective
from rb_gpu.params import ConfigTable
from rb_gpu.posterior import Beliefs

Floats = npt.NDArray[np.float64]
Rows = npt.NDArray[np.int64]

Z_95 = 1.959963984540054


@dataclass(frozen=True)
class VerdictColumns:
    """One verdict per pattern, (P,) each. Where `stands`, config_id is the default. Unknown numbers are NaN."""

    config_id: Rows
    stands: npt.NDArray[np.bool_]
    confidence: Floats
    probability: Floats
    effect: Floats
    effect_low: Floats
    effect_high: Floats
    p_value: Floats
    p_adjusted: Floats
    p_sequential: Floats
    improvement: Floats
    consistency: Floats
    support: Rows

    def of(self, kept_P: npt.NDArray[np.bool_]) -> VerdictColumns:
        """The verdicts of the patterns that kept_P selects."""
        return VerdictColumns(**{f.name: getattr(self, f.name)[kept_P] for f in fields(self)})


@dataclass(frozen=True)
class Comparison:
    """One-sided tests of every config against the default, (P, C) each; NaN where there is no test.

    null_error: standard error under the null of no effect, at least that of the test. size: the number of effective
    rows with that error, in one sample of differences or in each of two equal samples.
    """

    effect: Floats
    error: Floats
    freedom: Floats
    p_value: Floats
    null_error: Floats
    size: Floats


def compare(evidence: Evidence, direction_O: Floats, default: int, min_samples: int) -> Comparison:
    """One-sided Welch t-test (Welch 1947) of whether each config beats the default, from sufficient statistics.

    If every query also ran under the default, the paired t-test instead. Cells with fewer than min_samples rows, or
    with zero variance on both sides, are not tested. null_error takes squares about the null's mean: 0 for differences,
    the common mean for two samples. The reason: a few rows that all succeed show no variance of their own.
    """
    if evidence.paired:
        effect, variance, size = evidence.pair_moments(direction_O)
        squared = variance / np.maximum(size, 1e-300)
        freedom = size - 1.0
        tested = evidence.pair_rows >= min_samples
        unit = variance + effect**2
        null_squared = unit / np.maximum(size, 1e-300)
    else:
        mean, variance, size = evidence.moments(direction_O)
        part = variance / np.maximum(size, 1e-300)
        effect = mean - mean[:, [default]]
        squared = part + part[:, [default]]
        with np.errstate(divide="ignore", invalid="ignore"):
            bottom = part**2 / (size - 1.0)
            freedom = squared**2 / (bottom + bottom[:, [default]])
        tested = (evidence.rows >= min_samples) & (evidence.rows[:, [default]] >= min_samples)
        other = size[:, [default]]
        with np.errstate(divide="ignore", invalid="ignore"):
            within = variance * (size - 1.0) + (variance * (size - 1.0))[:, [default]]
            common = (within + effect**2 * size * other / (size + other)) / (size + other - 1.0)
            null_squared = np.maximum(squared, common * (1.0 / size + 1.0 / other))
        unit = np.maximum(variance + variance[:, [default]], 2.0 * common)
    with np.errstate(invalid="ignore"):
        tested = tested & (squared > 0) & (freedom > 0)
    tested[:, default] = False
    error = np.sqrt(np.where(tested, squared, np.nan))
    freedom = np.where(tested, freedom, np.nan)
    p_value = student_tail(effect / error, freedom)
    null_squared = np.where(tested, null_squared, np.nan)
    return Comparison(
        effect=np.where(tested, effect, np.nan),
        error=error,
        freedom=freedom,
        p_value=p_value,
        null_error=np.sqrt(null_squared),
        size=unit / null_squared,
    )


def holm(p_PC: Floats) -> Floats:
    """Holm's (1979) adjusted p-values along the last axis; NaN means no test and stays NaN."""
    order = np.argsort(np.where(np.isnan(p_PC), np.inf, p_PC), axis=-1)
    tests = (~np.isnan(p_PC)).sum(-1, keepdims=True)
    factor = np.maximum(tests - np.arange(p_PC.shape[-1]), 1)
    ranked = np.take_along_axis(p_PC, order, -1) * factor
    ranked = np.minimum(np.maximum.accumulate(np.nan_to_num(ranked, nan=0.0), axis=-1), 1.0)
    out = np.empty_like(p_PC)
    np.put_along_axis(out, order, ranked, -1)
    return np.where(np.isnan(p_PC), np.nan, out)


def sequential(comparison: Comparison, half_life: float | None) -> Floats:
    """(P, C) p-values of the same comparisons that allow nightly peeking, Holm-adjusted over the configs of a pattern.

    Each night's training tests all rows so far, and someone acts on the result; with fixed-n p-values they would sooner
    or later act on noise. The probability that these p-values, or their minimum over the nights, ever fall below .05
    for a config of the pattern that is no better than the default is 5 % at most (more if a config fails too rarely for
    its first rows to show its variance). Holm's correction preserves this: its first false rejection needs one p below
    α over the number of true nulls. There is no correction over patterns, and a pattern whose members another
    clustering changes starts anew. With decay, old rows lose weight, the sums are no martingale, and all are NaN.
    """
    if half_life is not None:
        return np.full(comparison.p_value.shape, np.nan)
    return holm(sequential_p(comparison.effect / comparison.null_error, comparison.size))


def benjamini_hochberg(p_P: Floats) -> Floats:
    """Benjamini & Hochberg's (1995) adjusted p-values; NaN means no test and stays NaN."""
    tested = np.flatnonzero(~np.isnan(p_P))
    out = np.full(p_P.shape, np.nan)
    if len(tested):
        order = tested[np.argsort(p_P[tested])]
        scaled = p_P[order] * len(order) / np.arange(1, len(order) + 1)
        out[order] = np.minimum(np.minimum.accumulate(scaled[::-1])[::-1], 1.0)
    return out


def chosen_p(
    evidence: Evidence, configs: ConfigTable, objective: Objective, config: JudgeConfig, chosen_P: Rows
) -> Floats:
    """(P,) p-value of each pattern's chosen config, Holm-adjusted over the configs of the pattern."""
    return _pick(holm(compare(evidence, objective.direction, configs.default, config.min_samples).p_value), chosen_P)


def judge(
    evidence: Evidence, configs: ConfigTable, objective: Objective, beliefs: Beliefs, config: JudgeConfig,
    gone_p: Floats | tuple[()] = (),
) -> VerdictColumns:  # fmt: skip
    """The verdict of every pattern by `judge.method`; judge.min_probability must be a number, auto resolved. gone_p:
    `chosen_p` of judged patterns that were pruned, over which p_adjusted corrects too. Only eb knows bound and floor.
    """
    comparison = compare(evidence, objective.direction, configs.default, config.min_samples)
    adjusted, peeked = holm(comparison.p_value), sequential(comparison, config.half_life)
    if config.method == "reference":
        return _reference(evidence, configs, config, comparison, adjusted, peeked)
    if config.method == "welch":
        chosen = _welch(comparison, adjusted, configs.default, config.alpha)
        gain, spread = np.nan_to_num(comparison.effect), comparison.error * stats.t.ppf(0.975, comparison.freedom)
    else:
        chosen = beliefs.choose(float(config.min_probability), configs.default, objective.kind == "floor")[:-1]
        gain, spread = beliefs.gain[:-1], Z_95 * np.sqrt(beliefs.gain_variance[:-1])
    effect, half = _pick(gain, chosen), _pick(spread, chosen)
    probability = _pick(beliefs.probability[:-1], chosen)
    quality = beliefs.quality[:-1]
    improvement = _relative(_pick(quality, chosen), quality[:, configs.default], evidence.rows[:, configs.default] > 0)
    mean, variance, _ = evidence.moments(objective.quality_direction)
    with np.errstate(divide="ignore", invalid="ignore"):
        consistency = 1.0 / (1.0 + np.sqrt(_pick(variance, chosen)) / _pick(mean, chosen))
    stands = chosen == configs.default
    return VerdictColumns(
        config_id=chosen,
        stands=stands,
        confidence=np.where(stands, 0.0, probability),
        probability=probability,
        effect=np.where(stands, 0.0, effect),
        effect_low=np.where(stands, 0.0, effect - half),
        effect_high=np.where(stands, 0.0, effect + half),
        p_value=_pick(comparison.p_value, chosen),
        p_adjusted=benjamini_hochberg(np.concatenate([_pick(adjusted, chosen), gone_p]))[: len(chosen)],
        p_sequential=_pick(peeked, chosen),
        improvement=np.where(stands & np.isfinite(improvement), 0.0, improvement),
        consistency=consistency,
        support=_pick(evidence.rows, chosen),
    )


def _welch(comparison: Comparison, adjusted: Floats, default: int, alpha: float) -> Rows:
    """(P,) the best config that passes, else the default: selects patterns by Benjamini-Hochberg on their least Holm p,
    then configs by Holm at alpha times the share of patterns selected (Benjamini & Bogomolov 2014).
    """
    least = np.where(np.isnan(adjusted), np.inf, adjusted).min(1)
    patterns_p = np.where(np.isinf(least), np.nan, least)
    selected = np.nan_to_num(benjamini_hochberg(patterns_p), nan=1.0) <= alpha
    level = alpha * selected.sum() / max(int((~np.isnan(patterns_p)).sum()), 1)
    passed = selected[:, None] & (np.nan_to_num(adjusted, nan=1.0) <= level)
    best = np.where(passed, comparison.effect, -np.inf).argmax(1)
    return np.where(passed.any(1), best, default)


def _reference(
    evidence: Evidence,
    configs: ConfigTable,
    config: JudgeConfig,
    comparison: Comparison,
    adjusted: Floats,
    peeked: Floats,
) -> VerdictColumns:
    """Section 5 of the reference document: the group of at least 3 rows with the best mean F1, tested by a two-sided
    Welch test on precision * recall against all trajectories of the pattern. The default is found by ef_search alone.
    Where the test is undefined (NaN), there is no verdict.
    """
    f1, product = OUTCOMES.index("f1"), OUTCOMES.index("product")
    rows = evidence.rows
    mean_f1 = evidence.mean[..., f1]
    best = np.where(rows >= 3, mean_f1, -np.inf).argmax(1)
    mean_all = (evidence.w * evidence.mean[..., product]).sum(1) / np.maximum(evidence.w.sum(1), 1e-300)
    away = evidence.mean[..., product] - mean_all[:, None]
    square_all = (evidence.comoment[..., product, product] + evidence.w * away**2).sum(1)
    n_all = rows.sum(1)
    n_best, mean_best = _pick(rows, best), _pick(evidence.mean[..., product], best)
    square_best = _pick(evidence.comoment[..., product, product], best)
    with np.errstate(divide="ignore", invalid="ignore"):
        test = stats.ttest_ind_from_stats(
            mean_best, np.sqrt(square_best / (n_best - 1)), n_best,
            mean_all, np.sqrt(square_all / (n_all - 1)), n_all, equal_var=False,
        )  # fmt: skip
        p_value = np.asarray(test.pvalue, dtype=np.float64)
        quality = _pick(mean_f1, best)
        spread = np.sqrt(_pick(evidence.comoment[..., f1, f1], best) / n_best)
        consistency = 1.0 / (1.0 + spread / quality)
        same_ef = configs.ef_search == configs.ef_search[configs.default]
        weight = np.where(same_ef, evidence.w, 0.0)
        default_quality = (weight * evidence.mean[..., product]).sum(1) / weight.sum(1)
        default_quality = np.where(weight.sum(1) > 0, default_quality, 0.5)
        improvement = np.where(default_quality > 0, (quality - default_quality) / default_quality, np.nan)
        passed = (n_all >= config.min_samples) & (n_best >= 3) & (p_value <= config.alpha) & np.isfinite(consistency)
    chosen = np.where(passed, best, configs.default)
    confidence = np.where(passed, quality * consistency, 0.0)
    half = comparison.error * stats.t.ppf(0.975, comparison.freedom)
    return VerdictColumns(
        config_id=chosen,
        stands=~passed,
        confidence=confidence,
        probability=np.full(len(rows), np.nan),
        effect=np.nan_to_num(_pick(comparison.effect, chosen)),
        effect_low=_pick(comparison.effect - half, chosen),
        effect_high=_pick(comparison.effect + half, chosen),
        p_value=np.where(passed, p_value, np.nan),
        p_adjusted=benjamini_hochberg(_pick(adjusted, chosen)),
        p_sequential=_pick(peeked, chosen),
        improvement=np.where(passed, improvement, 0.0),
        consistency=np.where(passed, consistency, np.nan),
        support=_pick(rows, chosen),
    )


def _pick(values_PC: npt.NDArray[Any], chosen_P: Rows) -> npt.NDArray[Any]:
    return np.take_along_axis(values_PC, chosen_P[:, None], axis=1)[:, 0]


def _relative(quality: Floats, base: Floats, known: npt.NDArray[np.bool_]) -> Floats:
    usable = known & (base > 0)
    relative: Floats = np.divide(quality - base, base, out=np.full(base.shape, np.nan), where=usable)
    return relative


def verdict_matrices(verdicts: VerdictColumns, beliefs: Beliefs, method: str) -> tuple[Floats, Floats, Floats]:
    """What a lookup votes with: score, probability, gain, (P + 1, C) each; the last row is for queries near no pattern.

    eb votes with its beliefs. The tests of welch and reference only say yes or no, so a pattern gives its whole vote to
    its verdict's config, or to none where the default stands.
    """
    if method == "eb":
        return beliefs.score, beliefs.probability, beliefs.gain
    votes, gain = np.zeros(beliefs.score.shape), np.zeros(beliefs.score.shape)
    issued = np.flatnonzero(~verdicts.stands)
    votes[issued, verdicts.config_id[issued]] = 1.0
    gain[issued, verdicts.config_id[issued]] = np.nan_to_num(verdicts.effect[issued])
    return votes, votes, gain


def resolve_objective(
    judging: JudgeConfig, quality: QualityConfig, trajectories: Trajectories, evidence: Evidence
) -> Objective:
    """The objective with its references: the default's geometric mean latency and the dearest config's mean cost."""
    root = evidence.pooled()
    octaves = root.mean[0, :, OUTCOMES.index("log2_latency")]
    default = trajectories.configs.default
    tried = root.rows[0] > 0
    octave = octaves[default] if tried[default] else octaves[tried].mean()
    dearest = float(root.mean[0, :, OUTCOMES.index("cost")].max())
    return Objective(
        kind=judging.objective,
        quality=quality.name,
        latency_weight=judging.latency_weight,
        cost_weight=judging.cost_weight,
        latency_ref_us=float(np.exp2(octave)),
        cost_ref=dearest if dearest > 0 else 1.0,
        target=judging.target,
        max_latency_us=judging.max_latency_us,
        max_cost=judging.max_cost,
    )
