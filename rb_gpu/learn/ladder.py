"""Smooths the configs' levels along their numeric parameters, as configs with similar numbers perform similarly.

What 30 rows show about ef_search=48, the rows of its neighbours show too. How strongly to smooth is estimated from the
levels themselves. A level is a config's mean outcome over all queries.
Suffixes: C configs, K of them whose level is known, X of their numbers that vary, M models.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from rb_gpu.moderation import PRIOR_CONFIG_ROWS
from rb_gpu.params import COUNT_PARAMETERS, ConfigTable

# the cost of each model grows with the cube of the number of configs
MOST_CONFIGS = 256
LEAST_ALIKE = 3
# length scales of the similarity of configs, as shares of a parameter's range
REACHES = (0.25, 0.5, 1.0, 2.0)
# prior variance of levels about their mean, as multiples of the observed one; and the part of it that is smooth
SCALES = (0.1, 0.3, 1.0, 3.0, 10.0)
SMOOTH = (0.5, 0.9, 0.99, 0.999)
# for deviations: the variance of each config's own part relative to the smooth one; factors on the smoothed deviation
NOISES = (0.1, 1.0)
GAINS = (1.0, 2.0)
# least error variance of a level, as a share of the variance of the levels
LEAST_NOISE = 1e-6
# in length scales; configs further apart are uncorrelated
FAR = 100.0


def distances(configs: ConfigTable, device: torch.device) -> Tensor | None:
    """(C, C) float64 Euclidean distances between configs, of the logarithms of counts and of temperature, each scaled
    to a range of 1; infinite between model tiers. None where no tier has LEAST_ALIKE configs, or where there are more
    than MOST_CONFIGS.
    """
    if len(configs) > MOST_CONFIGS:
        return None
    columns = [np.log2(getattr(configs, name).astype(np.float64)) for name in COUNT_PARAMETERS]
    columns.append(configs.temperature.astype(np.float64))
    x_CX = np.stack([v / np.ptp(v) for v in columns if np.ptp(v) > 0] or [np.zeros(len(configs))], 1)
    apart_CC = np.sqrt(((x_CX[:, None] - x_CX[None]) ** 2).sum(2))
    apart_CC[configs.tier[:, None] != configs.tier[None]] = np.inf
    # two configs alone cannot show how similar they are
    if np.isfinite(apart_CC).sum(1).max(initial=0) < LEAST_ALIKE:
        return None
    return torch.from_numpy(apart_CC).to(device)


def settled(level_C: Tensor, error_C: Tensor, rows_C: Tensor, apart_CC: Tensor | None) -> tuple[Tensor, Tensor]:
    """Levels (C,) and their covariance (C, C): smoothed given distances apart_CC, else as they were estimated.

    error_C: error variances of the estimates, infinite where nothing is known. rows_C: rows behind each estimate. The
    variance per row of a config with few rows is shrunk towards that of all configs, as in rb_gpu.moderation: 30 rows
    without a failure do not show that failures never happen.
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
    """Posterior mean (C,) and covariance (C, C) of the configs' levels, given independent estimates of them with error
    variances error_C (C,). A level of infinite variance, that is, unknown, is left as it is.

    The prior is a Gaussian process along the numeric parameters (Matérn 5/2, as Snoek, Larochelle & Adams 2012 use for
    such settings) plus an independent part for each config, about an unknown mean. Length scale and variances are
    averaged over, each model weighted by its marginal likelihood.
    """
    mean_C, cov_CC = level_C.clone(), torch.diag(error_C)
    known = torch.nonzero(torch.isfinite(error_C)).squeeze(1)
    y_K, noise_KK = level_C[known], torch.diag(error_C[known])
    seen = float(y_K.var()) if len(known) > 1 else 0.0
    if seen == 0.0:
        return mean_C, cov_CC
    own_KK = torch.eye(len(known), dtype=y_K.dtype, device=y_K.device)
    # a floor of the error variances: an error of exactly 0 would make some models singular
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
    """(C,) variance of each level's difference to the default's, given the covariance of the levels."""
    own_C = level_CC.diagonal()
    return own_C + own_C[default] - 2.0 * level_CC[default]


def mixtures(apart_CC: Tensor) -> Tensor:
    """(M, C, C) ways of pooling the configs' deviations, the first one the identity: no pooling.

    The others replace each config's deviation by a mean over similar configs, the smoother of a Gaussian process, less
    the mean over all configs; times one of GAINS, since each deviation was shrunk towards 0 by itself.
    """
    own_CC = torch.eye(len(apart_CC), dtype=apart_CC.dtype, device=apart_CC.device)
    found = [own_CC]
    for reach in REACHES:
        near_CC = _matern(apart_CC / reach)
        for noise in NOISES:
            smoother_CC = torch.linalg.solve(near_CC + noise * own_CC, near_CC)
            # the mean over all configs is predicted already and does not tell them apart
            smoother_CC = smoother_CC - smoother_CC.mean(0)
            found += [gain * smoother_CC for gain in GAINS]
    return torch.stack(found)


def _matern(ratio_KK: Tensor) -> Tensor:
    scaled = math.sqrt(5.0) * ratio_KK.clamp(max=FAR)
    return (1.0 + scaled + scaled.square() / 3.0) * torch.exp(-scaled)


def _fit(y_K: Tensor, noise_KK: Tensor, prior_KK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Log marginal likelihood, posterior mean (K,) and covariance (K, K) of levels under a flat prior for their common
    mean (Rasmussen & Williams 2006, section 2.7). prior_KK: covariance of the levels about that mean.
    """
    factor_KK = torch.linalg.cholesky(prior_KK + noise_KK)
    solved = torch.cholesky_solve(torch.cat([y_K[:, None], torch.ones_like(y_K)[:, None], noise_KK], 1), factor_KK)
    y_solved_K, one_solved_K, noise_solved_KK = solved[:, 0], solved[:, 1], solved[:, 2:]
    information = one_solved_K.sum()
    left_K = y_solved_K - (one_solved_K @ y_K / information) * one_solved_K
    log_likelihood = -0.5 * (left_K @ y_K) - factor_KK.diagonal().log().sum() - 0.5 * information.log()
    # starts from the noise: subtracted from a far wider prior, the same covariance would drown in rounding
    beyond_K = noise_KK @ one_solved_K
    cov_KK = noise_KK - noise_KK @ noise_solved_KK + beyond_K[:, None] * beyond_K / information
    return log_likelihood, y_K - noise_KK @ left_K, cov_KK
