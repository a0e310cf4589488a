"""Ridge regression at every ridge at once, and its average over slopes and ridges.

Every prediction of a training row comes without its query (leave-one-out, in closed form). Slopes and ridges are not
chosen but averaged, each with the weight that its leave-one-out error earns (pseudo Bayesian model averaging, Geisser &
Eddy 1979). Float64 torch on the device.
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

# in units of a row's noise; the last one leaves the mean alone
RIDGES = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0, math.inf)
# models of less weight are left out of an average
LEAST_SHARE = 1e-6
TINY = 1e-300
# eigenvalues below it, as a share of the greatest
ROUNDING = 1e-10
# of cross-fitting
FOLDS = 5


def folds_in_turn(queries: int, device: torch.device) -> Tensor:
    """(queries,) in [0, FOLDS), one after the other: all of the same size, which those by id are not."""
    return torch.arange(queries, device=device) % FOLDS


def repeated(query_N: Tensor) -> Tensor | None:
    """The queries of some rows, as `Ridge` takes them: None where each has one row."""
    return query_N if len(torch.unique(query_N)) < len(query_N) else None


def _sums(v_N: Tensor, group_N: Tensor) -> Tensor:
    """Over the rows of each group, with as many places as there are rows."""
    return torch.zeros_like(v_N).index_add_(0, group_N, v_N)


def _eigen(x_NF: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (E,) and vectors (F, E) of xᵀx: of fewer rows than features those of xxᵀ, of which there are as few,
    and without what is rounding.
    """
    if len(x_NF) >= x_NF.shape[1]:
        value_F, vectors_FF = torch.linalg.eigh(x_NF.T @ x_NF)
        return value_F.clamp(min=0), vectors_FF
    value_N, vectors_NN = torch.linalg.eigh(x_NF @ x_NF.T)
    seen_N = value_N > ROUNDING * value_N[-1] + TINY
    vectors_FN = x_NF.T @ vectors_NN / value_N.clamp(min=TINY).sqrt()
    return torch.where(seen_N, value_N, 0.0), torch.where(seen_N, vectors_FN, 0.0)


class Ridge:
    """Weighted ridge regression with an unpenalised mean, at every ridge at once, with leave-one-out errors.

    query_N: which query a row is of, where some have several; all of them are then left out.
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
        # rows of one query lie in one place, and are to a regression one row of their mean and of all their weight
        self.whole_N = self.of_query(weight_N)
        leverage_NL = self.whole_N[:, None] * (self.scores_NE.square() @ self.shrunk_EL + 1.0 / total)
        self.kept_NL = (1.0 - leverage_NL).clamp(min=1e-3)

    def of_query(self, v_N: Tensor) -> Tensor:
        """(N,) sums over the rows of each row's query."""
        return v_N if self.group_N is None else _sums(v_N, self.group_N)[self.group_N]

    def solve(self, y_NC: Tensor) -> tuple[Tensor, Tensor]:
        """Means (C,) and products (E, C) from which every ridge's coefficients follow."""
        mean_C = self.weight_N @ y_NC / self.weight_N.sum()
        return mean_C, self.scores_NE.T @ (self.weight_N[:, None] * (y_NC - mean_C))

    def errors(self, y_NC: Tensor, mean_C: Tensor, products_EC: Tensor, ridge: int) -> Tensor:
        """How far y lies from its prediction without its query, (N, C)."""
        fitted_NC = mean_C + self.scores_NE @ (products_EC * self.shrunk_EL[:, ridge, None])
        own_NC = self._own(y_NC)
        error_NC: Tensor = y_NC - own_NC + (own_NC - fitted_NC) / self.kept_NL[:, ridge, None]
        return error_NC

    def every_error(self, y_NC: Tensor, mean_C: Tensor, products_EC: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """`errors` at every ridge, (n, L, C), of one tile of rows after the other: scores are read once for all."""
        own_NC = self._own(y_NC)
        coef_EM = (products_EC[:, None] * self.shrunk_EL[:, :, None]).flatten(1)
        for rows in tiles(len(y_NC), coef_EM.shape[1], y_NC.device):
            fitted_NLC = mean_C + (self.scores_NE[rows] @ coef_EM).reshape(-1, len(RIDGES), y_NC.shape[1])
            own_N1C = own_NC[rows, None]
            yield rows, y_NC[rows, None] - own_N1C + (own_N1C - fitted_NLC) / self.kept_NL[rows, :, None]

    def _own(self, y_NC: Tensor) -> Tensor:
        """Mean of y over the rows of each row's query."""
        if self.group_N is None:
            return y_NC
        return self.of_query(self.weight_N[:, None] * y_NC) / self.whole_N.clamp(min=TINY)[:, None]

    def coef(self, products_EC: Tensor, share_LW: Tensor) -> Tensor:
        """(F, C) coefficients summed over ridges with the given shares."""
        coef_FC: Tensor = self.vectors_FE @ (products_EC * (self.shrunk_EL @ share_LW))
        return coef_FC

    def variance(self, x_PF: Tensor, ridge: int) -> Tensor:
        """(P,) variance of the prediction at x, its mean apart, in units of a row's noise.

        The posterior's of a Gaussian process, times Σw²/Σw since weighted rows say less.
        """
        design = self.weight_N.square().sum() / self.weight_N.sum()
        away_PF = x_PF - self.mean_F
        squares_PE = (away_PF @ self.vectors_FE).square()
        unseen_P = (away_PF.square().sum(1) - squares_PE.sum(1)).clamp(min=0) / self.ridges_L[ridge]
        variance_P: Tensor = design * (squares_PE @ self.shrunk_EL[:, ridge] + unseen_P)
        return variance_P

    def learned(self, x_PF: Tensor, ridge: int) -> tuple[Tensor, Tensor]:
        """Mean over x of the variance of what was learned, in units of a row's noise, and the share of the prior's
        variance, which may be another than the ridge says, that was not (a ridge's variance and squared bias, Hoerl &
        Kennard 1970).
        """
        squares_E, whole = (x_PF @ self.vectors_FE).square().mean(0), x_PF.square().sum(1).mean()
        found_E = self.value_E * self.shrunk_EL[:, ridge]
        design = self.weight_N.square().sum() / self.weight_N.sum()
        left = (whole - squares_E @ (1.0 - (1.0 - found_E).square())) / whole.clamp(min=TINY)
        return design * (squares_E @ (found_E * self.shrunk_EL[:, ridge])), left


@dataclass(frozen=True)
class Average:
    """A regression averaged over slopes and ridges: coefs (F, C) per slope, base_C, and each row's prediction without
    itself, unseen_NC.
    """

    coefs: list[Tensor]
    base_C: Tensor
    unseen_NC: Tensor


@dataclass(frozen=True)
class Task:
    """The ridges of every slope, and y (N, C). missed: (N, L) of every slope, what they foretell too little of a row
    that y was not made without.
    """

    ridges: Sequence[Ridge]
    y_NC: Tensor
    missed: Sequence[Tensor] | None = None

    def errors(self, slope: int, solved: tuple[Tensor, Tensor], ridge: int) -> Tensor:
        """(N, C) as `Ridge.errors`."""
        error_NC = self.ridges[slope].errors(self.y_NC, *solved, ridge)
        return error_NC if self.missed is None else error_NC - self.missed[slope][:, ridge, None]

    def every_error(self, slope: int, solved: tuple[Tensor, Tensor]) -> Iterator[tuple[slice, Tensor]]:
        """(n, L, C) of one tile of rows after the other, as `Ridge.every_error`."""
        for rows, error_NLC in self.ridges[slope].every_error(self.y_NC, *solved):
            yield rows, error_NLC if self.missed is None else error_NLC - self.missed[slope][rows, :, None]


def average(tasks: Sequence[Task], rows: float) -> tuple[Tensor, list[Average]]:
    """The weights (S, L) of slopes and ridges, one set for all tasks, and each task's averaged regression.

    rows: how many independent ones there are, n in the weights exp(−n/2·log(loss / least loss)).
    """
    loss_SL = torch.stack([losses(task).sum(2) for task in tasks]).sum(0)
    share_SLW = shares(loss_SL[:, :, None], rows)
    return share_SLW[:, :, 0], [_averaged(task, share_SLW) for task in tasks]


def losses(task: Task) -> Tensor:
    """(S, L, C) squared leave-one-out errors."""
    loss_SLC = task.y_NC.new_zeros(len(task.ridges), len(RIDGES), task.y_NC.shape[1])
    for s, ridge in enumerate(task.ridges):
        for rows, error_NLC in task.every_error(s, ridge.solve(task.y_NC)):
            loss_SLC[s] += torch.einsum("n,nlc->lc", ridge.weight_N[rows], error_NLC.square())
    return loss_SLC


def shares(loss_SLW: Tensor, rows: float) -> Tensor:
    """(S, L, W) shares of slopes and ridges, which add up to 1, from their losses; rows as in `average`."""
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
    """(C,) what is foretold at the origin of the features, from coefs (F, C) per slope and the means there were."""
    return mean_C - torch.stack([ridge.mean_F @ coef for ridge, coef in zip(ridges, coefs, strict=True)]).sum(0)
