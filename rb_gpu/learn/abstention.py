"""What a bank cannot do, as a clause for the log: why the default stands everywhere (also for the manifest and the
report), and where a floor is out of reach.

Suffixes: P patterns, C configs.
"""

from __future__ import annotations

import numpy as np
from scipy.stats import norm

from rb_gpu.evidence import Evidence, Floats, ratio
from rb_gpu.learn.assemble import Leaves
from rb_gpu.learn.config import JudgeConfig
from rb_gpu.learn.verdicts import compare
from rb_gpu.objective import Objective
from rb_gpu.posterior import Beliefs, widest

# error over all configs, and power, of the test that `least_seen` imagines
ERROR, POWER = 0.05, 0.8


def least_seen(evidence: Evidence, direction_O: Floats, default: int) -> float:
    """The gain in utility, the same on every query, that a one-sided test of the most explored config against the
    default finds with probability POWER, Bonferroni-corrected over configs; infinite if its error is unknown.

    The gate before any choice (proof.py) also looks for choices by place, and finds one such config less often.
    """
    pooled = evidence.pooled()
    _, variance_C, size_C = (x[0] for x in (pooled.pair_moments if pooled.paired else pooled.moments)(direction_O))
    others = np.arange(len(size_C)) != default
    known = np.isfinite(variance_C) & (others | (not pooled.paired))
    if not known.any():
        return np.inf
    # one variance for all configs: that of a config with two rows may be near 0 by chance
    error_C = ratio(np.average(variance_C[known], weights=size_C[known]), size_C, np.inf)
    if not pooled.paired:
        error_C = error_C + error_C[default]
    sure = norm.isf(ERROR / others.sum()) + norm.ppf(POWER)
    return float(sure * np.sqrt(error_C[others].min()))


def why_default_stands(
    leaves: Leaves, beliefs: Beliefs, objective: Objective, default: int, judging: JudgeConfig
) -> str | None:
    """The reason why no pattern has a verdict; None if single queries may still get another config, or if a floor
    chooses the default. judge.min_probability must have been resolved to a number.
    """
    eb, least = judging.method == "eb", float(judging.min_probability)
    others = np.arange(beliefs.probability.shape[1]) != default
    if objective.kind == "floor" or (eb and (beliefs.probability[:, others] >= least).any()):
        return None
    if len(others) == 1:
        return "it is the only config"
    if leaves.evidence.rows[:, default].sum() == 0:
        return "it never ran, so nothing can be compared with it"
    if widest(leaves.evidence, objective.direction) == 0.0:
        return "no pattern has two configs with different utilities"
    if not eb:
        tested = compare(leaves.evidence, objective.direction, default, judging.min_samples).p_value
        if np.isnan(tested).all():
            return (
                f"judge.method={judging.method} has no test: in no pattern have the default and another config "
                f"judge.min_samples={judging.min_samples} rows each that vary; judge.method=eb needs neither"
            )
        return f"no config passes the tests of judge.method={judging.method} in any pattern"
    if leaves.field is not None and not leaves.pays:
        unseen = "no choice of configs was shown to beat the default on unseen queries"
        least_gain = least_seen(leaves.evidence, objective.direction, default)
        if not 0.0 < least_gain < np.inf:
            return unseen
        more = "queries" if leaves.evidence.pooled().paired else "rows, or four times the exploration,"
        return (
            f"{unseen}; a config whose utility is higher by less than {least_gain:.2g} on every query would mostly go "
            f"unnoticed in so few rows (four times the {more} halve that)"
        )
    if not np.isfinite(beliefs.gain_variance[:, others]).any():
        return "no pattern ran a config twice, so the scatter of outcomes is unknown"
    return f"in no pattern is a config better by judge.margin with a probability of {least:g}"


def out_of_reach(beliefs: Beliefs, objective: Objective, judging: JudgeConfig) -> str | None:
    """In how many patterns no config reaches a floor, and what to do; None if there are none, or without a floor.
    judge.min_probability must have been resolved to a number.
    """
    least = float(judging.min_probability)
    short = int((beliefs.probability[:-1] < least).all(axis=1).sum())
    if judging.method != "eb" or objective.kind != "floor" or short == 0:
        return None
    return (
        f"judge.target={objective.target:g}: in {short} of {len(beliefs.probability) - 1} patterns no config reaches "
        f"it with a probability of {least:g}; there the one of highest quality is used, whatever it costs; log more "
        "queries or better configs, or lower judge.target"
    )
