"""Sums trajectories into evidence on the device: one pass for means, one for centred squares.

Suffixes: N rows, Q queries, U queries' runs of configs, P patterns, C configs, O outcomes, T rows of one tile.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from rb_gpu.evidence import BINS_PER_OCTAVE, LATENCY_BINS, OUTCOMES, Evidence
from rb_gpu.learn.trajectories import Trajectories

TILE_ROWS = 2**20
SECONDS_PER_DAY = 86_400.0
# 2^-200, at which fourth powers are still float64 numbers
MOST_HALF_LIVES = 200.0


def row_weights(trajectories: Trajectories, half_life_days: float | None) -> torch.Tensor:
    """(N,) float64 w = 2^(−age / half_life), 1 without decay, over the propensity where logged (Hájek's weights).

    Ages over MOST_HALF_LIVES half-lives count as that many, since products of still smaller weights vanish.
    """
    weight = np.ones(len(trajectories))
    if half_life_days is not None:
        age_days = (trajectories.timestamp.max() - trajectories.timestamp) / SECONDS_PER_DAY
        weight = np.exp2(-np.minimum(age_days / half_life_days, MOST_HALF_LIVES))
    if trajectories.propensity is not None:
        weight = weight / trajectories.propensity
    return torch.from_numpy(weight)


def f1_score(precision: Tensor, recall: Tensor) -> Tensor:
    """Harmonic mean of precision and recall, 0 where both are 0; elementwise."""
    total = precision + recall
    return torch.where(total > 0, 2 * precision * recall / torch.where(total > 0, total, 1.0), 0.0)


def outcomes(trajectories: Trajectories, device: torch.device) -> Tensor:
    """(N, O) float64 on the device, in the order of OUTCOMES. Cost is 0 where not logged; latency is at least 1 µs."""
    precision = torch.from_numpy(trajectories.precision).to(device, torch.float64)
    recall = torch.from_numpy(trajectories.recall).to(device, torch.float64)
    latency_us = torch.from_numpy(trajectories.latency_us).to(device, torch.float64)
    cost = torch.zeros_like(precision)
    if trajectories.cost is not None:
        cost = torch.from_numpy(trajectories.cost).to(device, torch.float64)
    columns = {
        "f1": f1_score(precision, recall),
        "product": precision * recall,
        "log2_latency": latency_us.clamp(min=1).log2(),
        "cost": cost,
    }
    return torch.stack([columns[name] for name in OUTCOMES], dim=1)


def gather_evidence(
    trajectories: Trajectories,
    label_Q: Tensor,
    patterns: int,
    weight_N: Tensor,
    device: torch.device,
    predicted_NO: Tensor | None = None,
) -> Evidence:
    """Evidence of each (pattern, config) cell. label_Q: (Q,) pattern of each query, negative leaves its rows out.

    predicted_NO: predictions to subtract from the outcomes first, so that the moments are those of the residuals.

    Two passes with centred squares avoid cancellation. The sums do not depend on the order of the rows, up to float64
    rounding.
    """
    configs = len(trajectories.configs)
    query_row = torch.from_numpy(trajectories.query_row).to(device)
    config_N = torch.from_numpy(trajectories.config_id).to(device)
    label_N = label_Q.to(device)[query_row]
    cell_N = torch.where(label_N < 0, patterns * configs, label_N * configs + config_N)
    y_NO = outcomes(trajectories, device)
    if predicted_NO is not None:
        y_NO = y_NO - predicted_NO
    weight_N = weight_N.to(device)
    latency_us_N = torch.from_numpy(trajectories.latency_us).to(device, torch.float64)
    extra_N3 = torch.stack(
        [
            torch.from_numpy(trajectories.precision).to(device, torch.float64),
            torch.from_numpy(trajectories.recall).to(device, torch.float64),
            latency_us_N,
        ],
        dim=1,
    )
    shape = (patterns, configs)
    rows, w, w2, mean, comoment = _moments(cell_N, weight_N, y_NO, shape)
    extra = _sums(cell_N, weight_N[:, None] * extra_N3, shape) / w.clamp(min=1e-300)[..., None]
    bins_N = (latency_us_N.clamp(min=1).log2() * BINS_PER_OCTAVE).long().clamp(max=LATENCY_BINS - 1)
    hist = torch.zeros((patterns * configs + 1) * LATENCY_BINS, dtype=torch.float64, device=device)
    hist.index_add_(0, cell_N * LATENCY_BINS + bins_N, weight_N)

    # pair each query's mean outcome under a config with its mean under the default, where there is one
    run_U, weight_U, y_UO = _runs(query_row * configs + config_N, weight_N, y_NO)
    query_U, config_U = run_U // configs, run_U % configs
    default_U = torch.nonzero(config_U == trajectories.configs.default).squeeze(1)
    default_of_Q = torch.full((len(label_Q),), -1, dtype=torch.int64, device=device)
    default_of_Q[query_U[default_U]] = default_U
    partner_U, label_U = default_of_Q[query_U], label_Q.to(device)[query_U]
    left_out = (partner_U < 0) | (label_U < 0)
    pair_cell_U = torch.where(left_out, patterns * configs, label_U * configs + config_U)
    difference_UO = y_UO - y_UO[partner_U.clamp(min=0)]
    pair_rows, pair_w, pair_w2, pair_mean, pair_comoment = _moments(pair_cell_U, weight_U, difference_UO, shape)
    return Evidence(
        rows=rows.cpu().numpy(),
        w=w.cpu().numpy(),
        w2=w2.cpu().numpy(),
        mean=mean.cpu().numpy(),
        comoment=comoment.cpu().numpy(),
        precision=extra[..., 0].cpu().numpy(),
        recall=extra[..., 1].cpu().numpy(),
        latency_us=extra[..., 2].cpu().numpy(),
        latency_hist=hist[:-LATENCY_BINS].reshape(*shape, LATENCY_BINS).cpu().numpy(),
        pair_rows=pair_rows.cpu().numpy(),
        pair_w=pair_w.cpu().numpy(),
        pair_w2=pair_w2.cpu().numpy(),
        pair_mean=pair_mean.cpu().numpy(),
        pair_comoment=pair_comoment.cpu().numpy(),
    )


def _runs(run_N: Tensor, weight_N: Tensor, y_NO: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Merges the rows of one query under one config into one run: its key (U,), total weight (U,) and mean outcomes
    (U, O).

    Were each row paired with the same rows of the default, the pairs would share noise and yet count as independent.
    """
    run_U, unit_N = torch.unique(run_N, return_inverse=True)
    if len(run_U) == len(run_N):
        return run_N, weight_N, y_NO
    weight_U = weight_N.new_zeros(len(run_U)).index_add_(0, unit_N, weight_N)
    sum_UO = y_NO.new_zeros(len(run_U), y_NO.shape[1]).index_add_(0, unit_N, weight_N[:, None] * y_NO)
    return run_U, weight_U, sum_UO / weight_U.clamp(min=1e-300)[:, None]


def _sums(cell_N: Tensor, values: Tensor, shape: tuple[int, int]) -> Tensor:
    """Sums of values (N, ...) per cell; rows that are left out go to one more cell, which is dropped."""
    total = torch.zeros((shape[0] * shape[1] + 1, *values.shape[1:]), dtype=values.dtype, device=values.device)
    return total.index_add_(0, cell_N, values)[:-1].reshape(*shape, *values.shape[1:])


def _moments(
    cell_N: Tensor, weight_N: Tensor, y_NO: Tensor, shape: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Row count, Σw, Σw², weighted mean and centred comoment of each cell."""
    rows = _sums(cell_N, torch.ones_like(cell_N), shape)
    w = _sums(cell_N, weight_N, shape)
    w2 = _sums(cell_N, weight_N.square(), shape)
    mean = _sums(cell_N, weight_N[:, None] * y_NO, shape) / w.clamp(min=1e-300)[..., None]
    mean_by_cell = torch.cat([mean.reshape(-1, mean.shape[-1]), mean.new_zeros(1, mean.shape[-1])])
    comoment = mean.new_zeros(*shape, mean.shape[-1], mean.shape[-1])
    for start in range(0, len(cell_N), TILE_ROWS):
        tile = slice(start, start + TILE_ROWS)
        away_TO = y_NO[tile] - mean_by_cell[cell_N[tile]]
        comoment += _sums(cell_N[tile], weight_N[tile, None, None] * away_TO[:, :, None] * away_TO[:, None, :], shape)
    return rows, w, w2, mean, comoment
