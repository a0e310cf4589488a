"""Configs that differ in numbers do much alike where the numbers are near: levels smoothed along them.

What 30 rows say of ef_search=48 its neighbours' rows say too. How far to believe that the levels themselves tell.
Suffixes: C configs, K of them whose level is known, X of their numbers that vary, M models.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from rb_gpu.moderation import PRIOR_CONFIG_ROWS
from rb_gpu.params import COUNT_PARAMETERS, ConfigTable

# what is solved for every model grows with their cube
MOST_CONFIGS = 256
LEAST_ALIKE = 3
# how far configs are alike, as shares of the range of a number
REACHES = (0.25, 0.5, 1.0, 2.0)
# variance of levels about their mean as a share of the one seen, and what of it follows the numbers
SCALES = (0.1, 0.3, 1.0, 3.0, 10.0)
SMOOTH = (0.5, 0.9, 0.99, 0.999)
# what each config has of its own beside what it shares, and by how much that is raised
NOISES = (0.1, 1.0)
GAINS = (1.0, 2.0)
# of a level, as a share of their variance
LEAST_NOISE = 1e-6
# beyond which nothing is alike
FAR = 100.0


def distances(configs: ConfigTable, device: torch.device) -> Tensor | None:
    """(C, C) float64 between configs: Euclidean, of counts by their logarithms, each number's range being 1; infinite
    between model tiers. None where no LEAST_ALIKE of a tier are alike, or where they are more than MOST_CONFIGS.
    """
    if len(configs) > MOST_CONFIGS:
        return None
    columns = [np.log2(getattr(configs, name).astype(np.float64)) for name in COUNT_PARAMETERS]
    columns.append(configs.temperature.astype(np.float64))
    x_CX = np.stack([v / np.ptp(v) for v in columns if np.ptp(v) > 0] or [np.zeros(len(configs))], 1)
    apart_CC = np.sqrt(((x_CX[:, None] - x_CX[None]) ** 2).sum(2))
    apart_CC[configs.tier[:, None] != configs.tier[None]] = np.inf
    # of two alone nothing tells how alike they are
    if np.isfinite(apart_CC).sum(1).max(initial=0) < LEAST_ALIKE:
        return None
    return torch.from_numpy(apart_CC).to(device)


def settled(level_C: Tensor, error_C: Tensor, rows_C: Tensor, apart_CC: Tensor | None) -> tuple[Tensor, Tensor]:
    """Levels (C,) and their covariance (C, C): smoothed where some configs are alike, else as they were estimated.

    error_C: variances of the estimates, infinite where nothing is known. rows_C: how many rows each is of; a variance
    of few is drawn to that of all configs, as in rb_gpu.moderation: 30 rows without a failure do not say that there are
    none.
    """
    if apart_CC is None:
        return level_C, torch.diag(error_C)
    known_C = torch.isfinite(error_C)
    count_C = torch.where(known_C, rows_C, 0).to(error_C)
    of_row_C = torch.where(known_C, error_C * count_C, 0.0)
    overall = (count_C @ of_row_C) / count_C.sum().clamp(min=1)
    drawn_C = (PRIOR_CONFIG_ROWS * overall + count_C * of_row_C) / (PRIOR_CONFIG_ROWS + count_C)
    return smoothed(level_C, torch.where(known_C, drawn_C / count_C.clamp(min=1), torch.inf), apart_CC)


def smoothed(level_C: Tensor, error_C: Tensor, apart_CC: Tensor) -> tuple[Tensor, Tensor]:
    """Posterior mean (C,) and covariance (C, C) of the levels of configs, given independent estimates of them and their
    variances (C,), infinite where nothing is known: such a level stays as it is.

    A Gaussian process along the numbers (Matérn 5/2, as Snoek, Larochelle & Adams 2012 have it for settings of this
    kind), and what each config has of its own beside it, about a mean that is not known. Reach and sizes are averaged
    over, each model with its marginal likelihood.
    """
    mean_C, cov_CC = level_C.clone(), torch.diag(error_C)
    known = torch.nonzero(torch.isfinite(error_C)).squeeze(1)
    y_K, noise_KK = level_C[known], torch.diag(error_C[known])
    seen = float(y_K.var()) if len(known) > 1 else 0.0
    if seen == 0.0:
        return mean_C, cov_CC
    own_KK = torch.eye(len(known), dtype=y_K.dtype, device=y_K.device)
    # no level is better known than that
    noise_KK = noise_KK + LEAST_NOISE * seen * own_KK
    near = [_matern(apart_CC[known][:, known] / reach) for reach in REACHES]
    shapes = [own_KK, *(share * one_KK + (1.0 - share) * own_KK for one_KK in near for share in SMOOTH)]
    priors = [0.0 * own_KK, *(seen * scale * shape_KK for shape_KK in shapes for scale in SCALES)]
    fits = [_fit(y_K, noise_KK, prior_KK) for prior_KK in priors]
    weight_M = torch.softmax(torch.stack([log_likelihood for log_likelihood, _, _ in fits]), 0)
    mean_MK = torch.stack([mean_K for _, mean_K, _ in fits])
    mean_C[known] = weight_M @ mean_MK
    away_MK = mean_MK - mean_C[known]
    within_KK = torch.stack([weight * cov_KK for weight, (_, _, cov_KK) in zip(weight_M, fits, strict=True)]).sum(0)
    cov_CC[known[:, None], known] = within_KK + away_MK.T @ (weight_M[:, None] * away_MK)
    return mean_C, cov_CC


def to_default(level_CC: Tensor, default: int) -> Tensor:
    """(C,) variance of how each level differs from the default's, given the covariance of levels."""
    own_C = level_CC.diagonal()
    return own_C + own_C[default] - 2.0 * level_CC[default]


def mixtures(apart_CC: Tensor) -> Tensor:
    """(M, C, C) ways of sharing the deviations of configs, each with itself first: every config's becomes a mean of
    those near it, the smoother of a Gaussian process, less what all have in common; times a GAIN, for each of them was
    drawn to 0 by itself.
    """
    own_CC = torch.eye(len(apart_CC), dtype=apart_CC.dtype, device=apart_CC.device)
    found = [own_CC]
    for reach in REACHES:
        near_CC = _matern(apart_CC / reach)
        for noise in NOISES:
            smoother_CC = torch.linalg.solve(near_CC + noise * own_CC, near_CC)
            # what all have in common is foretold already, and tells none from another
            smoother_CC = smoother_CC - smoother_CC.mean(0)
            found += [gain * smoother_CC for gain in GAINS]
    return torch.stack(found)


def _matern(ratio_KK: Tensor) -> Tensor:
    scaled = math.sqrt(5.0) * ratio_KK.clamp(max=FAR)
    return (1.0 + scaled + scaled.square() / 3.0) * torch.exp(-scaled)


def _fit(y_K: Tensor, noise_KK: Tensor, prior_KK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Log marginal likelihood under a flat prior of the mean, posterior mean (K,) and covariance (K, K) (Rasmussen &
    Williams 2006, section 2.7).
    """
    factor_KK = torch.linalg.cholesky(prior_KK + noise_KK)
    solved = torch.cholesky_solve(torch.cat([y_K[:, None], torch.ones_like(y_K)[:, None], noise_KK], 1), factor_KK)
    y_solved_K, one_solved_K, noise_solved_KK = solved[:, 0], solved[:, 1], solved[:, 2:]
    information = one_solved_K.sum()
    left_K = y_solved_K - (one_solved_K @ y_K / information) * one_solved_K
    log_likelihood = -0.5 * (left_K @ y_K) - factor_KK.diagonal().log().sum() - 0.5 * information.log()
    # by what the noise leaves open: of a prior that is far wider, differences would leave rounding
    beyond_K = noise_KK @ one_solved_K
    cov_KK = noise_KK - noise_KK @ noise_solved_KK + beyond_K[:, None] * beyond_K / information
    return log_likelihood, y_K - noise_KK @ left_K, cov_KK
