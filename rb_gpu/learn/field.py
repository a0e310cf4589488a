"""Fits the field: kernel ridge regression on landmarks, shared by all configs, and each config's deviation from that.

Every prediction of a training row comes without its query (leave-one-out, in closed form). Slopes and ridges are not
chosen but averaged, each with the weight that its leave-one-out error earns (pseudo Bayesian model averaging, Geisser &
Eddy 1979). Float64 torch on the device.
Suffixes: Q queries, N rows, P places, F features of one slope, C configs, L ridges, S slopes, W sets of weights: C of
them, or 1 for all.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

# in units of a row's noise; the last one leaves the mean alone
RIDGES = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0, math.inf)
SWEEPS = 3
# rows that a config must have before it may deviate from the others
LEAST_ROWS = 3
# models of less weight are left out of an average
LEAST_SHARE = 1e-6
# least noise of a canonical coordinate, as a share of the greatest
LEAST_NOISE = 1e-6
# an outcome that varies less inside its configs, as a share of its size, is constant there
ROUNDING = 1e-9
TINY = 1e-300


@dataclass(frozen=True)
class Rows:
    """What an outcome is learned from, (N,) each: row of its query, its config, and float64 weights of mean 1.

    weight_N: of the regression. importance_N: w / propensity, by which a config's rows stand for all queries.
    """

    query_N: Tensor
    config_N: Tensor
    weight_N: Tensor
    importance_N: Tensor
    queries: int
    configs: int

    @cached_property
    def full(self) -> bool:
        """Whether every query was tried once under every config, all with one weight."""
        if len(self.query_N) != self.queries * self.configs:
            return False
        cell = self.query_N * self.configs + self.config_N
        return bool((self.weight_N == self.weight_N[0]).all()) and len(torch.unique(cell)) == len(cell)

    @cached_property
    def effective(self) -> float:
        """How many independent rows there are: queries of a full table, else Kish's (Σw)²/Σw²."""
        return float(self.queries if self.full else self.weight_N.sum() ** 2 / self.weight_N.square().sum())

    @cached_property
    def members(self) -> dict[int, Tensor]:
        """The rows of each config that has LEAST_ROWS or more."""
        found = {c: torch.nonzero(self.config_N == c).squeeze(1) for c in range(self.configs)}
        return {c: index for c, index in found.items() if len(index) >= LEAST_ROWS}

    def levels(self, y_N: Tensor) -> Tensor:
        """(C,) mean of each config by importance; of all rows where it has none."""
        weight_C = y_N.new_zeros(self.configs).index_add_(0, self.config_N, self.importance_N)
        sum_C = y_N.new_zeros(self.configs).index_add_(0, self.config_N, self.importance_N * y_N)
        return torch.where(weight_C > 0, sum_C / weight_C.clamp(min=TINY), sum_C.sum() / weight_C.sum())


class Ridge:
    """Weighted ridge regression with an unpenalised mean, at every ridge at once, with leave-one-out errors."""

    def __init__(self, x_NF: Tensor, weight_N: Tensor) -> None:
        self.weight_N, total = weight_N, weight_N.sum()
        self.mean_F = weight_N @ x_NF / total
        centred = x_NF - self.mean_F
        value_F, self.vectors_FF = torch.linalg.eigh((centred * weight_N[:, None]).T @ centred)
        self.scores_NF = centred @ self.vectors_FF
        ridges_L = torch.tensor(RIDGES, dtype=x_NF.dtype, device=x_NF.device)
        self.shrunk_FL = 1.0 / (value_F.clamp(min=0)[:, None] + ridges_L)
        leverage_NL = weight_N[:, None] * (self.scores_NF.square() @ self.shrunk_FL + 1.0 / total)
        self.kept_NL = (1.0 - leverage_NL).clamp(min=1e-3)

    def solve(self, y_NC: Tensor) -> tuple[Tensor, Tensor]:
        """Means (C,) and products (F, C) from which every ridge's coefficients follow."""
        mean_C = self.weight_N @ y_NC / self.weight_N.sum()
        return mean_C, self.scores_NF.T @ (self.weight_N[:, None] * (y_NC - mean_C))

    def errors(self, y_NC: Tensor, mean_C: Tensor, products_FC: Tensor, ridge: int) -> Tensor:
        """How far y lies from its leave-one-out prediction, (N, C)."""
        fitted_NC = self.scores_NF @ (products_FC * self.shrunk_FL[:, ridge, None])
        error_NC: Tensor = (y_NC - mean_C - fitted_NC) / self.kept_NL[:, ridge, None]
        return error_NC

    def coef(self, products_FC: Tensor, share_LW: Tensor) -> Tensor:
        """(F, C) coefficients summed over ridges with the given shares."""
        coef_FC: Tensor = self.vectors_FF @ (products_FC * (self.shrunk_FL @ share_LW))
        return coef_FC

    def variance(self, x_PF: Tensor, ridge: int) -> Tensor:
        """(P,) variance of the prediction at x, its mean apart, in units of a row's noise.

        The posterior's of a Gaussian process, times Σw²/Σw since weighted rows say less.
        """
        design = self.weight_N.square().sum() / self.weight_N.sum()
        variance_P: Tensor = design * (((x_PF - self.mean_F) @ self.vectors_FF).square() @ self.shrunk_FL[:, ridge])
        return variance_P


@dataclass(frozen=True)
class Average:
    """A regression averaged over slopes and ridges: coefs (F, C) per slope, base_C, and each row's prediction without
    itself, unseen_NC.
    """

    coefs: list[Tensor]
    base_C: Tensor
    unseen_NC: Tensor


def average(groups: Sequence[tuple[Sequence[Ridge], Tensor]], rows: float) -> tuple[Tensor, list[Average]]:
    """The weights (S, L) of slopes and ridges, one set for all groups, and each group's averaged regression.

    groups: the ridges of every slope, and y (N, C). rows: how many independent ones there are, n in the weights
    exp(−n/2·log(loss / least loss)).
    """
    loss_SL = torch.stack([_losses(ridges, y_NC).sum(2) for ridges, y_NC in groups]).sum(0)
    share_SLW = _weights(loss_SL[:, :, None], rows)
    return share_SLW[:, :, 0], [_averaged(ridges, y_NC, share_SLW) for ridges, y_NC in groups]


def average_each(ridges: Sequence[Ridge], y_NC: Tensor, rows: float) -> tuple[Tensor, Average]:
    """The same with weights (S, L, C) of their own for every column of y."""
    share_SLC = _weights(_losses(ridges, y_NC), rows)
    return share_SLC, _averaged(ridges, y_NC, share_SLC)


def _losses(ridges: Sequence[Ridge], y_NC: Tensor) -> Tensor:
    """(S, L, C) squared leave-one-out errors."""
    loss_SLC = y_NC.new_zeros(len(ridges), len(RIDGES), y_NC.shape[1])
    for s, ridge in enumerate(ridges):
        solved = ridge.solve(y_NC)
        for i in range(len(RIDGES)):
            loss_SLC[s, i] = ridge.weight_N @ ridge.errors(y_NC, *solved, i).square()
    return loss_SLC


def _weights(loss_SLW: Tensor, rows: float) -> Tensor:
    log_loss = torch.log((loss_SLW + TINY) / (loss_SLW.amin((0, 1)) + TINY))
    share_SLW = torch.softmax(-0.5 * rows * log_loss.flatten(0, 1), 0).view_as(loss_SLW)
    share_SLW = torch.where(share_SLW > LEAST_SHARE, share_SLW, 0.0)
    return share_SLW / share_SLW.sum((0, 1))


def _averaged(ridges: Sequence[Ridge], y_NC: Tensor, share_SLW: Tensor) -> Average:
    solved = [ridge.solve(y_NC) for ridge in ridges]
    unseen_NC = torch.zeros_like(y_NC)
    for s, i in torch.nonzero(share_SLW.sum(2)).tolist():
        unseen_NC += share_SLW[s, i] * (y_NC - ridges[s].errors(y_NC, *solved[s], i))
    coefs = [
        ridge.coef(products_FC, share_LW)
        for ridge, (_, products_FC), share_LW in zip(ridges, solved, share_SLW, strict=True)
    ]
    passed_C = torch.stack([ridge.mean_F @ coef for ridge, coef in zip(ridges, coefs, strict=True)]).sum(0)
    return Average(coefs, solved[0][0] - passed_C, unseen_NC)


@dataclass(frozen=True)
class Fit:
    """One outcome: y_c = base_c + Σ over slopes of features·coef_c.

    coefs: (F, C) per slope. base_C: (C,). unseen_N: each row's prediction without its query; unseen_QC: every query's,
    but for what all configs share. deviates: whether configs
    differ from place to place, as far as unseen rows tell; else all have the same coefficients. share_SL, ridges: the
    models and their weights, from which a deviation's variance follows.
    """

    coefs: list[Tensor]
    base_C: Tensor
    unseen_N: Tensor
    unseen_QC: Tensor
    deviates: bool
    share_SL: Tensor
    ridges: dict[int, Sequence[Ridge]]

    def predict(self, features: Sequence[Tensor]) -> Tensor:
        """(Q, C) of queries whose features (Q, F) are given for every slope."""
        return torch.stack([x @ w for x, w in zip(features, self.coefs, strict=True)]).sum(0) + self.base_C

    def leverage(self, features: Sequence[Tensor]) -> Tensor:
        """(P, C) variance of each config's deviation at P places, in units of a row's noise, under the likeliest model;
        0 for a config without rows of its own.
        """
        out_PC = self.base_C.new_zeros(len(features[0]), len(self.base_C))
        slope, ridge = divmod(int(self.share_SL.argmax()), len(RIDGES))
        if self.deviates:
            for c, ridges in self.ridges.items():
                out_PC[:, c] = ridges[slope].variance(features[slope], ridge)
        return out_PC


@dataclass(frozen=True)
class Regressions:
    """What all outcomes of the same rows share: features (Q, F) of every slope, and what is solved with them."""

    features: Sequence[Tensor]
    rows: Rows

    @cached_property
    def shared(self) -> list[Ridge]:
        """Of every slope, over all queries of a full table, else over all rows."""
        if self.rows.full:
            return [Ridge(x, torch.ones_like(x[:, 0])) for x in self.features]
        return [Ridge(x[self.rows.query_N], self.rows.weight_N) for x in self.features]

    @cached_property
    def own(self) -> dict[int, Sequence[Ridge]]:
        """Of every slope, over the rows of each config; of a full table the same for all."""
        if self.rows.full:
            return dict.fromkeys(range(self.rows.configs), self.shared)
        query_N, weight_N = self.rows.query_N, self.rows.weight_N
        return {
            c: [Ridge(x[query_N[index]], weight_N[index]) for x in self.features]
            for c, index in self.rows.members.items()
        }


def fit(regressions: Regressions, y_N: Tensor) -> Fit:
    """One outcome y (N,) of the rows.

    The fit in which no config deviates from the others stands where deviations foretell unseen rows no better.
    """
    features, rows = regressions.features, regressions.rows
    level_C = rows.levels(y_N)
    level_N = level_C[rows.config_N]
    if float((y_N - level_N).square().mean()) <= ROUNDING**2 * float(y_N.square().mean()):
        nothing = [x.new_zeros(x.shape[1], rows.configs) for x in features]
        return Fit(
            nothing,
            level_C,
            level_N,
            level_C.expand(rows.queries, -1),
            False,
            y_N.new_ones(len(features), len(RIDGES)),
            {},
        )
    plain, deviating = (_fit_full if rows.full else _fit_rows)(regressions, y_N)
    better_N = rows.weight_N * ((y_N - plain.unseen_N).square() - (y_N - deviating.unseen_N).square())
    return deviating if float(better_N.sum()) > 0 else plain


def _fit_full(regressions: Regressions, y_N: Tensor) -> tuple[Fit, Fit]:
    """Every query under every config: a regression of its own for each canonical coordinate.

    What tells configs apart is not foretold as well as what they share, and asks for other slopes and ridges.
    """
    rows, by_config = regressions.rows, regressions.own
    y_QC = y_N.new_zeros(rows.queries, rows.configs)
    y_QC[rows.query_N, rows.config_N] = y_N
    level_C = y_QC.mean(0)
    _, [first] = average([(regressions.shared, y_QC)], rows.effective)
    to_CC, back_CC = canonical(y_QC, first.unseen_NC)
    share_SLC, found = average_each(regressions.shared, (y_QC - level_C) @ to_CC, rows.effective)
    coefs, base_C = [w @ back_CC for w in found.coefs], level_C + found.base_C @ back_CC
    unseen_QC = level_C + found.unseen_NC @ back_CC
    # the models by how much their coordinates tell configs apart
    apart_C = (back_CC - back_CC.mean(1, keepdim=True)).square().sum(1)
    share_SL = share_SLC @ (apart_C / apart_C.sum())
    plain_QC = level_C + (unseen_QC - level_C).mean(1, keepdim=True)
    plain = Fit(
        [w.mean(1, keepdim=True).expand_as(w) for w in coefs],
        level_C - level_C.mean() + base_C.mean(),
        plain_QC[rows.query_N, rows.config_N],
        plain_QC,
        False,
        share_SL,
        by_config,
    )
    deviating = Fit(coefs, base_C, unseen_QC[rows.query_N, rows.config_N], unseen_QC, True, share_SL, by_config)
    return plain, deviating


def canonical(y_QC: Tensor, unseen_QC: Tensor) -> tuple[Tensor, Tensor]:
    """Two (C, C) matrices, each the other's inverse: to coordinates in which noise and signal are uncorrelated, and
    back.

    A Gaussian process of several outcomes whose covariance is one of places times one of outcomes falls apart into
    single ones there (Bonilla, Chai & Williams 2008; the canonical coordinates of Breiman & Friedman 1997). Noise is
    what predictions without the query left unexplained; the coordinates have noise 1.
    """
    noise_CC = torch.cov((y_QC - unseen_QC).T)
    signal_CC = torch.cov(y_QC.T) - noise_CC
    noise_C, axes_CC = torch.linalg.eigh(noise_CC)
    sd_C = noise_C.clamp(min=LEAST_NOISE * float(noise_C[-1]) + TINY).sqrt()
    white_CC = axes_CC / sd_C
    _, turn_CC = torch.linalg.eigh(white_CC.T @ signal_CC @ white_CC)
    return white_CC @ turn_CC, turn_CC.T @ (sd_C[:, None] * axes_CC.T)


def _fit_rows(regressions: Regressions, y_N: Tensor) -> tuple[Fit, Fit]:
    """Configs share one regression and deviate from it, by turns (backfitting, Breiman & Friedman 1985)."""
    features, rows = regressions.features, regressions.rows
    shared, own = regressions.shared, regressions.own
    level_C = rows.levels(y_N)
    level_N, deviation_N = level_C[rows.config_N], torch.zeros_like(y_N)
    for _ in range(SWEEPS):
        _, [common] = average([(shared, (y_N - level_N - deviation_N)[:, None])], rows.effective)
        left_N = y_N - level_N - common.unseen_NC[:, 0]
        share_SL, deviations = average(
            [(own[c], left_N[index, None]) for c, index in rows.members.items()], rows.effective
        )
        for index, deviation in zip(rows.members.values(), deviations, strict=True):
            deviation_N[index] = deviation.unseen_NC[:, 0]
    common_coefs = [w.expand(-1, rows.configs) for w in common.coefs]
    plain_N = level_N + common.unseen_NC[:, 0]
    plain = Fit(common_coefs, level_C + common.base_C, plain_N, level_C.expand(rows.queries, -1), False, share_SL, own)
    coefs, base_C = [w.clone() for w in common_coefs], plain.base_C.clone()
    for c, deviation in zip(rows.members, deviations, strict=True):
        base_C[c] += deviation.base_C[0]
        for w, own_w in zip(coefs, deviation.coefs, strict=True):
            w[:, c] += own_w[:, 0]
    unseen_QC = level_C + sum(x @ (w - v) for x, w, v in zip(features, coefs, common_coefs, strict=True))
    unseen_QC = unseen_QC + base_C - plain.base_C
    unseen_QC[rows.query_N, rows.config_N] = level_N + deviation_N
    deviating = Fit(coefs, base_C, plain_N + deviation_N, unseen_QC, True, share_SL, own)
    return _recentred(plain, rows, y_N), _recentred(deviating, rows, y_N)


def _recentred(fitted: Fit, rows: Rows, y_N: Tensor) -> Fit:
    """Adds to each config the mean of what it left unexplained, by importance: the doubly robust level."""
    left_N = y_N - fitted.unseen_N
    weight_C = y_N.new_zeros(rows.configs).index_add_(0, rows.config_N, rows.importance_N)
    away_C = y_N.new_zeros(rows.configs).index_add_(0, rows.config_N, rows.importance_N * left_N)
    away_C = away_C / weight_C.clamp(min=TINY)
    return replace(
        fitted,
        base_C=fitted.base_C + away_C,
        unseen_N=fitted.unseen_N + away_C[rows.config_N],
        unseen_QC=fitted.unseen_QC + away_C,
    )
