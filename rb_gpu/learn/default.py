"""Resolves `params.default=auto` where nothing was shown to beat the most logged config.

Suffixes: C configs.
"""

from __future__ import annotations

import logging
from dataclasses import replace

import numpy as np

from rb_gpu.evidence import Evidence
from rb_gpu.learn.trajectories import Trajectories
from rb_gpu.objective import Objective

log = logging.getLogger(__name__)

# a config with so many times the rows of any other is what the service runs; without one, the log is an experiment
DOMINANT = 2.0
# standard errors subtracted from a config's mean before the comparison
ERRORS = 2.0


def is_experiment(trajectories: Trajectories, objective: Objective) -> bool:
    """Whether no default was given, and no config ran so often that it must be the one in use."""
    if not trajectories.auto_default or objective.kind != "utility" or len(trajectories.configs) < 2:
        return False
    rows_C = np.sort(np.bincount(trajectories.config_id, minlength=len(trajectories.configs)))
    return bool(rows_C[-1] < DOMINANT * rows_C[-2])


def settle_default(trajectories: Trajectories, evidence: Evidence, objective: Objective) -> Trajectories:
    """The same rows of an experiment, possibly with another default.

    No config of an experiment is in use. Where the bank abstains it should fall back to what one would choose without
    a bank: the config of highest utility over all rows, weighted by 1 / propensity, less two standard errors so that a
    few lucky rows do not decide (a lower confidence bound, as in Rashidinejad et al. 2021).
    """
    mean, variance, size = evidence.pooled().moments(objective.direction)
    known_C = np.isfinite(variance[0]) & (size[0] > 1)
    if not known_C.any():
        return trajectories
    # one variance for all configs: few rows do not show their own
    pooled = np.average(variance[0][known_C], weights=size[0][known_C] - 1.0)
    sure_C = np.full(len(known_C), -np.inf)
    sure_C[known_C] = mean[0][known_C] - ERRORS * np.sqrt(pooled / size[0][known_C])
    best = int(sure_C.argmax())
    if best == trajectories.configs.default:
        return trajectories
    log.info("params.default=auto: the log is an experiment, and no choice of configs was shown to beat the most "
             "logged one; the default is now the one of best overall utility: %s",
             trajectories.configs.describe(best))  # fmt: skip
    return replace(trajectories, configs=replace(trajectories.configs, default=best))
