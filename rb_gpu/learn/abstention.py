"""Why the default stands everywhere: one sentence for the log and the report.

Suffixes: P patterns, C configs.
"""

from __future__ import annotations

import numpy as np

from rb_gpu.learn.assemble import Leaves
from rb_gpu.learn.config import JudgeConfig
from rb_gpu.learn.verdicts import compare
from rb_gpu.objective import Objective
from rb_gpu.posterior import Beliefs, widest


def why_default_stands(
    leaves: Leaves, beliefs: Beliefs, objective: Objective, default: int, judging: JudgeConfig
) -> str | None:
    """The reason why no pattern has a verdict; None where single queries may be answered otherwise all the same, or the
    default is what a floor chooses. judge.min_probability is a number by now.
    """
    eb, least = judging.method == "eb", float(judging.min_probability)
    others = np.arange(beliefs.probability.shape[1]) != default
    if objective.kind == "floor" or (eb and (beliefs.probability[:, others] >= least).any()):
        return None
    if len(others) == 1:
        return "it is the only config"
    if leaves.evidence.rows[:, default].sum() == 0:
        return "it ran in no row, and nothing can be compared with it"
    if widest(leaves.evidence, objective.direction) == 0.0:
        return "no pattern ran two configs that came to different utilities"
    if not eb:
        tested = compare(leaves.evidence, objective.direction, default, judging.min_samples).p_value
        if np.isnan(tested).all():
            return (
                f"judge.method={judging.method} has no test: in no pattern have the default and another config "
                f"judge.min_samples={judging.min_samples} rows each that vary; judge.method=eb needs neither"
            )
        return f"no config passes the tests of judge.method={judging.method} in any pattern"
    if leaves.field is not None and not leaves.pays:
        return "no choice of configs is sure to pay on unseen queries"
    if not np.isfinite(beliefs.gain_variance[:, others]).any():
        return "no pattern ran a config twice, and nothing tells how far outcomes scatter"
    return f"no config is better by judge.margin with a probability of {least:g} in any pattern"
