"""Regressions of full tables in canonical coordinates, in which the outcomes of all configs become independent.

Differences between configs are harder to predict than what configs share, and need other slopes and ridges.
Suffixes: Q queries, F features of one slope, C configs, as many coordinates, L ridges, S slopes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rb_gpu.learn.ridge import FOLDS, RIDGES, TINY, Average, Ridge, Task, average, base, folds_in_turn, shares

# least noise variance of a coordinate, as a share of the greatest
LEAST_NOISE = 1e-6


def canonical(y_QC: Tensor, unseen_QC: Tensor) -> tuple[Tensor, Tensor]:
    """Two inverse (C, C) matrices: to coordinates in which both noise and signal are uncorrelated, and back.

    A multi-output Gaussian process whose covariance is a product of one over places and one over outputs separates into
    single-output ones there (Bonilla, Chai & Williams 2008; the canonical coordinates of Breiman & Friedman 1997). The
    noise is the residual y_QC − unseen_QC of leave-one-query-out predictions; in the coordinates its variance is 1.
    """
    noise_CC = torch.cov((y_QC - unseen_QC).T)
    signal_CC = torch.cov(y_QC.T) - noise_CC
    noise_C, axes_CC = torch.linalg.eigh(noise_CC)
    sd_C = noise_C.clamp(min=LEAST_NOISE * float(noise_C[-1]) + TINY).sqrt()
    white_CC = axes_CC / sd_C
    _, turn_CC = torch.linalg.eigh(white_CC.T @ signal_CC @ white_CC)
    return white_CC @ turn_CC, turn_CC.T @ (sd_C[:, None] * axes_CC.T)


def average_coordinates(ridges: Sequence[Ridge], y_QC: Tensor) -> tuple[Tensor, Average]:
    """Weights (S, L) of slopes and ridges, weighted by how far each coordinate tells configs apart, and the averaged
    regression.

    ridges: one per slope, over all queries. y_QC: every query's outcome under every config. Each coordinate has weights
    of its own. Coordinates and weights for predicting a query are chosen on the other folds: chosen with the query
    included they found signal in noise, and choices seemed to pay on tables whose configs do not differ.
    """
    queries = len(y_QC)
    _, [first] = average([Task(ridges, y_QC)], queries)
    fold_Q = folds_in_turn(queries, y_QC.device)
    # the last set is for predictions of future queries
    seen = [*(fold_Q != fold for fold in range(FOLDS)), torch.ones_like(fold_Q, dtype=torch.bool)]
    turns = [canonical(y_QC[seen_Q], first.unseen_NC[seen_Q]) for seen_Q in seen]
    solved = [ridge.solve(y_QC) for ridge in ridges]
    losses = [y_QC.new_zeros(len(ridges), len(RIDGES), y_QC.shape[1]) for _ in turns]
    for s, ridge in enumerate(ridges):
        for rows, error_QLC in ridge.every_error(y_QC, *solved[s]):
            for loss_SLC, (to_CC, _), seen_Q in zip(losses, turns, seen, strict=True):
                loss_SLC[s] += torch.einsum("q,qlc->lc", seen_Q[rows].to(y_QC), (error_QLC @ to_CC).square())
    chosen = [shares(loss_SLC, float(seen_Q.sum())) for loss_SLC, seen_Q in zip(losses, seen, strict=True)]
    unseen_QC = torch.zeros_like(y_QC)
    for s, i in torch.nonzero(torch.stack(chosen).sum((0, 3))).tolist():
        said_QC = y_QC - ridges[s].errors(y_QC, *solved[s], i)
        for fold, ((to_CC, back_CC), share_SLC) in enumerate(zip(turns[:-1], chosen[:-1], strict=True)):
            mine_Q = ~seen[fold]
            unseen_QC[mine_Q] += (said_QC[mine_Q] @ to_CC * share_SLC[s, i]) @ back_CC
    (to_CC, back_CC), share_SLC = turns[-1], chosen[-1]
    coefs = [
        ridge.coef(products_EC @ to_CC, share_LC) @ back_CC
        for ridge, (_, products_EC), share_LC in zip(ridges, solved, share_SLC, strict=True)
    ]
    apart_C = (back_CC - back_CC.mean(1, keepdim=True)).square().sum(1)
    return share_SLC @ (apart_C / apart_C.sum()), Average(coefs, base(ridges, coefs, solved[0][0]), unseen_QC)
