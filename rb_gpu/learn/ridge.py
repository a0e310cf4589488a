"""Ridge regression at many penalties at once, and its average over slopes and penalties.

Every prediction of a training row leaves its query out (in closed form). Slopes and ridges are not selected but
averaged, each weighted by its leave-one-out error (pseudo Bayesian model averaging, Geisser & Eddy 1979). Float64 torch
on the device.
Suffixes: N rows, P places, F features of one slope, E eigenvectors in their space, C configs, L ridges, S slopes, W
sets of weights: C of them, or 1 for all.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rb_gpu.learn.devices import tiles

# penalties, in units of a row's noise variance; the infinite one leaves only the mean
RIDGES = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0, math.inf)
# models of less weight are dropped from an average
LEAST_SHARE = 1e-6
TINY = 1e-300
# eigenvalues below this share of the greatest are rounding
ROUNDING = 1e-10
# folds of cross-fitting
FOLDS = 5


def folds_in_turn(queries: int, device: torch.device) -> Tensor:
    """(queries,) fold in [0, FOLDS) of each query, in turn: so all folds have one size, unlike folds drawn by id."""
    return torch.arange(queries, device=device) % FOLDS


def repeated(query_N: Tensor) -> Tensor | None:
    """query_N as `Ridge` takes it: None where no query has more than one row."""
    return query_N if len(torch.unique(query_N)) < len(query_N) else None


def _sums(v_N: Tensor, group_N: Tensor) -> Tensor:
    """Sum of v over each group, in an array as long as the rows, indexed by group."""
    return torch.zeros_like(v_N).index_add_(0, group_N, v_N)


def _eigen(x_NF: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (E,) and eigenvectors (F, E) of xᵀx. With fewer rows than features they come from the smaller xxᵀ,
    and those that are mere rounding are 0.
    """
    if len(x_NF) >= x_NF.shape[1]:
        value_F, vectors_FF = torch.linalg.eigh(x_NF.T @ x_NF)
        return value_F.clamp(min=0), vectors_FF
    value_N, vectors_NN = torch.linalg.eigh(x_NF @ x_NF.T)
    seen_N = value_N > ROUNDING * value_N[-1] + TINY
    vectors_FN = x_NF.T @ vectors_NN / value_N.clamp(min=TINY).sqrt()
    return torch.where(seen_N, value_N, 0.0), torch.where(seen_N, vectors_FN, 0.0)


class Ridge:
    """Weighted ridge regression with an unpenalised mean, at every penalty at once, with leave-one-out residuals.

    query_N: the query of each row, where some have several rows: all rows of a query are then left out together.
    """

    def __init__(self, x_NF: Tensor, weight_N: Tensor, query_N: Tensor | None = None) -> None:
        self.weight_N, total = weight_N, weight_N.sum()
        self.group_N = None if query_N is None else torch.unique(query_N, return_inverse=True)[1]
        self.mean_F = weight_N @ x_NF / total
        centred = x_NF - self.mean_F
        self.value_E, self.vectors_FE = _eigen(centred * weight_N.sqrt()[:, None])
        self.scores_NE = centred @ self.vectors_FE
        self.ridges_L = torch.tensor(RIDGES, dtype=x_NF.dtype, device=x_NF.device)
        self.shrunk_EL = 1.0 / (self.value_E[:, None] + self.ridges_L)
        # rows of one query have the same features: to a regression they are one row, of their mean and total weight
        self.whole_N = self.of_query(weight_N)
        leverage_NL = self.whole_N[:, None] * (self.scores_NE.square() @ self.shrunk_EL + 1.0 / total)
        self.kept_NL = (1.0 - leverage_NL).clamp(min=1e-3)

    def of_query(self, v_N: Tensor) -> Tensor:
        """(N,) sum of v over all rows of each row's query."""
        return v_N if self.group_N is None else _sums(v_N, self.group_N)[self.group_N]

    def solve(self, y_NC: Tensor) -> tuple[Tensor, Tensor]:
        """Means (C,) and products (E, C) from which the coefficients at every penalty follow."""
        mean_C = self.weight_N @ y_NC / self.weight_N.sum()
        return mean_C, self.scores_NE.T @ (self.weight_N[:, None] * (y_NC - mean_C))

    def errors(self, y_NC: Tensor, mean_C: Tensor, products_EC: Tensor, ridge: int) -> Tensor:
        """(N, C) leave-one-query-out residuals: y less its prediction without its query."""
        fitted_NC = mean_C + self.scores_NE @ (products_EC * self.shrunk_EL[:, ridge, None])
        own_NC = self._own(y_NC)
        error_NC: Tensor = y_NC - own_NC + (own_NC - fitted_NC) / self.kept_NL[:, ridge, None]
        return error_NC

    def every_error(self, y_NC: Tensor, mean_C: Tensor, products_EC: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """`errors` at every penalty, (n, L, C), tile of rows by tile: the scores are read once for all penalties."""
        own_NC = self._own(y_NC)
        coef_EM = (products_EC[:, None] * self.shrunk_EL[:, :, None]).flatten(1)
        for rows in tiles(len(y_NC), coef_EM.shape[1], y_NC.device):
            fitted_NLC = mean_C + (self.scores_NE[rows] @ coef_EM).reshape(-1, len(RIDGES), y_NC.shape[1])
            own_N1C = own_NC[rows, None]
            yield rows, y_NC[rows, None] - own_N1C + (own_N1C - fitted_NLC) / self.kept_NL[rows, :, None]

    def _own(self, y_NC: Tensor) -> Tensor:
        """Weighted mean of y over the rows of each row's query."""
        if self.group_N is None:
            return y_NC
        return self.of_query(self.weight_N[:, None] * y_NC) / self.whole_N.clamp(min=TINY)[:, None]

    def coef(self, products_EC: Tensor, share_LW: Tensor) -> Tensor:
        """(F, C) coefficients averaged over penalties with the given shares."""
        coef_FC: Tensor = self.vectors_FE @ (products_EC * (self.shrunk_EL @ share_LW))
        return coef_FC

    def variance(self, x_PF: Tensor, ridge: int) -> Tensor:
        """(P,) variance of the prediction at x, apart from its mean's, in units of a row's noise variance.

        It is the posterior variance of a Gaussian process, times Σw²/Σw because unequally weighted rows tell less.
        """
        design = self.weight_N.square().sum() / self.weight_N.sum()
        away_PF = x_PF - self.mean_F
        squares_PE = (away_PF @ self.vectors_FE).square()
        unseen_P = (away_PF.square().sum(1) - squares_PE.sum(1)).clamp(min=0) / self.ridges_L[ridge]
        variance_P: Tensor = design * (squares_PE @ self.shrunk_EL[:, ridge] + unseen_P)
        return variance_P

    def learned(self, x_PF: Tensor, ridge: int) -> tuple[Tensor, Tensor]:
        """Averages over the rows of x of two parts of the prediction's error (variance and squared bias of a ridge
        estimate, Hoerl & Kennard 1970): its sampling variance, in units of a row's noise variance, and the share of the
        prior variance that was not learned. The latter holds for any prior variance, not only the ridge's.
        """
        squares_E, whole = (x_PF @ self.vectors_FE).square().mean(0), x_PF.square().sum(1).mean()
        found_E = self.value_E * self.shrunk_EL[:, ridge]
        design = self.weight_N.square().sum() / self.weight_N.sum()
        left = (whole - squares_E @ (1.0 - (1.0 - found_E).square())) / whole.clamp(min=TINY)
        return design * (squares_E @ (found_E * self.shrunk_EL[:, ridge])), left


@dataclass(frozen=True)
class Average:
    """A regression averaged over slopes and penalties: coefs (F, C) per slope, base_C, and unseen_NC, the prediction of
    each row without its query.
    """

    coefs: list[Tensor]
    base_C: Tensor
    unseen_NC: Tensor


@dataclass(frozen=True)
class Task:
    """The ridges of every slope, and their outcomes y (N, C). missed: per slope (N, L), by how much predictions of each
    row are too low because the row's own outcome went into y elsewhere (`echo.echoes`); None where it did not.
    """

    ridges: Sequence[Ridge]
    y_NC: Tensor
    missed: Sequence[Tensor] | None = None

    def errors(self, slope: int, solved: tuple[Tensor, Tensor], ridge: int) -> Tensor:
        """(N, C) as `Ridge.errors`, corrected by `missed`."""
        error_NC = self.ridges[slope].errors(self.y_NC, *solved, ridge)
        return error_NC if self.missed is None else error_NC - self.missed[slope][:, ridge, None]

    def every_error(self, slope: int, solved: tuple[Tensor, Tensor]) -> Iterator[tuple[slice, Tensor]]:
        """(n, L, C) tile of rows by tile, as `Ridge.every_error`, corrected by `missed`."""
        for rows, error_NLC in self.ridges[slope].every_error(self.y_NC, *solved):
            yield rows, error_NLC if self.missed is None else error_NLC - self.missed[slope][rows, :, None]


def average(tasks: Sequence[Task], rows: float) -> tuple[Tensor, list[Average]]:
    """The weights (S, L) of slopes and penalties, one set for all tasks, and each task's averaged regression.

    rows: the effective number of independent rows, n in the weights exp(−n/2·log(loss / least loss)).
    """
    loss_SL = torch.stack([losses(task).sum(2) for task in tasks]).sum(0)
    share_SLW = shares(loss_SL[:, :, None], rows)
    return share_SLW[:, :, 0], [_averaged(task, share_SLW) for task in tasks]


def losses(task: Task) -> Tensor:
    """(S, L, C) weighted sums of squared leave-one-out residuals."""
    loss_SLC = task.y_NC.new_zeros(len(task.ridges), len(RIDGES), task.y_NC.shape[1])
    for s, ridge in enumerate(task.ridges):
        for rows, error_NLC in task.every_error(s, ridge.solve(task.y_NC)):
            loss_SLC[s] += torch.einsum("n,nlc->lc", ridge.weight_N[rows], error_NLC.square())
    return loss_SLC


def shares(loss_SLW: Tensor, rows: float) -> Tensor:
    """(S, L, W) weights of slopes and penalties from their losses; each set sums to 1. rows: as in `average`."""
    log_loss = torch.log((loss_SLW + TINY) / (loss_SLW.amin((0, 1)) + TINY))
    share_SLW = torch.softmax(-0.5 * rows * log_loss.flatten(0, 1), 0).view_as(loss_SLW)
    share_SLW = torch.where(share_SLW > LEAST_SHARE, share_SLW, 0.0)
    return share_SLW / share_SLW.sum((0, 1))


def _averaged(task: Task, share_SLW: Tensor) -> Average:
    solved = [ridge.solve(task.y_NC) for ridge in task.ridges]
    unseen_NC = torch.zeros_like(task.y_NC)
    for s, i in torch.nonzero(share_SLW.sum(2)).tolist():
        unseen_NC += share_SLW[s, i] * (task.y_NC - task.errors(s, solved[s], i))
    coefs = [
        ridge.coef(products_EC, share_LW)
        for ridge, (_, products_EC), share_LW in zip(task.ridges, solved, share_SLW, strict=True)
    ]
    return Average(coefs, base(task.ridges, coefs, solved[0][0]), unseen_NC)


def base(ridges: Sequence[Ridge], coefs: Sequence[Tensor], mean_C: Tensor) -> Tensor:
    """(C,) prediction at the origin of the features, from coefs (F, C) per slope and the means of y."""
    return mean_C - torch.stack([ridge.mean_F @ coef for ridge, coef in zip(ridges, coefs, strict=True)]).sum(0)
