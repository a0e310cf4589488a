"""Fits the field: kernel ridge regression on landmarks, shared by all configs, and each config's deviation from that.

Every prediction of a training row comes without its query. Float64 torch on the device.
Suffixes: Q queries, N rows, P places, F features of one slope, C configs, L ridges, S slopes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from rb_gpu.learn import ladder
from rb_gpu.learn.canonical import average_coordinates
from rb_gpu.learn.echo import echoes
from rb_gpu.learn.ridge import RIDGES, TINY, Average, Ridge, Task, average, losses, repeated, shares

SWEEPS = 3
# rows that a config must have before it may deviate from the others
LEAST_ROWS = 3
# an outcome that varies less inside its configs, as a share of its size, is constant there
ROUNDING = 1e-9


@dataclass(frozen=True)
class Rows:
    """What an outcome is learned from, (N,) each: row of its query, its config, and float64 weights of mean 1.

    weight_N: of the regression. importance_N: w / propensity, by which a config's rows stand for all queries. apart_CC:
    how far configs lie apart (`ladder.distances`), None where none is alike to another.
    """

    query_N: Tensor
    config_N: Tensor
    weight_N: Tensor
    importance_N: Tensor
    queries: int
    configs: int
    apart_CC: Tensor | None = None

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

    @cached_property
    def last(self) -> Tensor:
        """The last row of each query under each config that it ran: a config may have run twice."""
        cell_N = self.query_N * self.configs + self.config_N
        row_N = torch.arange(len(cell_N), device=cell_N.device)
        last = torch.full((self.queries * self.configs,), -1, device=cell_N.device)
        last.scatter_reduce_(0, cell_N, row_N, "amax")
        return last[last >= 0]

    def levels(self, y_N: Tensor) -> Tensor:
        """(C,) mean of each config by importance; of all rows where it has none."""
        weight_C = y_N.new_zeros(self.configs).index_add_(0, self.config_N, self.importance_N)
        sum_C = y_N.new_zeros(self.configs).index_add_(0, self.config_N, self.importance_N * y_N)
        return torch.where(weight_C > 0, sum_C / weight_C.clamp(min=TINY), sum_C.sum() / weight_C.sum())


@dataclass(frozen=True)
class Fit:
    """One outcome: y_c = base_c + Σ over slopes of features·coef_c.

    coefs: (F, C) per slope. base_C: (C,). unseen_N: each row's prediction without its query; unseen_QC: every query's,
    but for what all configs share. deviates: whether configs differ from place to place, as far as unseen rows tell;
    else all have the same coefficients. share_SL, ridges: the models and their weights, from which a deviation's
    variance follows. mix_CC: how configs share their own regressions (`ladder.mixtures`), None where none
    does. level_CC: covariance of the levels, infinite where nothing is known; None of a full table whose rows differ.
    """

    coefs: list[Tensor]
    base_C: Tensor
    unseen_N: Tensor
    unseen_QC: Tensor
    deviates: bool
    share_SL: Tensor
    ridges: dict[int, Sequence[Ridge]]
    mix_CC: Tensor | None = None
    level_CC: Tensor | None = None

    def leverage(self, features: Sequence[Tensor]) -> Tensor:
        """(P, C) variance of each config's deviation at P places, in units of a row's noise, under the likeliest model;
        0 for a config without rows of its own.

        Also where deviations foretold no better: that does not say that there are none.
        """
        out_PC = self.base_C.new_zeros(len(features[0]), len(self.base_C))
        slope, ridge = divmod(int(self.share_SL.argmax()), len(RIDGES))
        for c, ridges in self.ridges.items():
            out_PC[:, c] = ridges[slope].variance(features[slope], ridge)
        return out_PC

    def inside(self, features: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """(C,) twice, of features that lie about a mean which is known: the variance of the deviations learned, in
        units of a row's noise, and the share of their prior variance that was not learned; as the likeliest model has
        it.
        """
        learned_C, left_C = torch.zeros_like(self.base_C), torch.ones_like(self.base_C)
        slope, ridge = divmod(int(self.share_SL.argmax()), len(RIDGES))
        # of a full table all configs have the same
        told: dict[int, tuple[Tensor, Tensor]] = {}
        for c, ridges in self.ridges.items() if self.deviates else ():
            one = ridges[slope]
            told[id(one)] = told.get(id(one)) or one.learned(features[slope], ridge)
            learned_C[c], left_C[c] = told[id(one)]
        return learned_C, left_C


@dataclass(frozen=True)
class Kernel:
    """What all outcomes of the same rows share at one slope: features (Q, F), and what is solved with them."""

    features: Tensor
    rows: Rows

    @cached_property
    def shared(self) -> Ridge:
        """Over all queries of a full table, else over all rows."""
        x, query_N = self.features, self.rows.query_N
        if self.rows.full:
            return Ridge(x, torch.ones_like(x[:, 0]))
        return Ridge(x[query_N], self.rows.weight_N, repeated(query_N))

    @cached_property
    def own(self) -> dict[int, Ridge]:
        """Over the rows of each config; of a full table the same for all."""
        if self.rows.full:
            return dict.fromkeys(range(self.rows.configs), self.shared)
        x, query_N, weight_N = self.features, self.rows.query_N, self.rows.weight_N
        return {
            c: Ridge(x[query_N[index]], weight_N[index], repeated(query_N[index]))
            for c, index in self.rows.members.items()
        }


def fit(kernels: Sequence[Kernel], y_N: Tensor) -> Fit:
    """One outcome y (N,) of the rows, which all kernels have in common.

    The fit in which no config deviates from the others stands where deviations foretell unseen rows no better.
    """
    rows = kernels[0].rows
    level_C = rows.levels(y_N)
    level_N = level_C[rows.config_N]
    if float((y_N - level_N).square().mean()) <= ROUNDING**2 * float(y_N.square().mean()):
        nothing = [y_N.new_zeros(kernel.features.shape[1], rows.configs) for kernel in kernels]
        level_QC, alike_SL = level_C.expand(rows.queries, -1), y_N.new_ones(len(kernels), len(RIDGES))
        return Fit(nothing, level_C, level_N, level_QC, False, alike_SL, {}, level_CC=_constant_levels(rows, level_C))
    plain, deviating = (_fit_full if rows.full else _fit_rows)(kernels, y_N)
    better_N = rows.weight_N * ((y_N - plain.unseen_N).square() - (y_N - deviating.unseen_N).square())
    found = deviating if float(better_N.sum()) > 0 else plain
    if rows.full:
        return found
    error_C, count_C = level_errors(rows, y_N - found.unseen_N)
    base_C, level_CC = ladder.settled(found.base_C, error_C, count_C, rows.apart_CC)
    moved_C = base_C - found.base_C
    return replace(
        found,
        base_C=base_C,
        unseen_N=found.unseen_N + moved_C[rows.config_N],
        unseen_QC=found.unseen_QC + moved_C,
        level_CC=level_CC,
    )


def level_errors(rows: Rows, error_N: Tensor) -> tuple[Tensor, Tensor]:
    """Variance of each config's level (C,), of whose rows this was left unexplained, infinite of a single one; and how
    many rows it has (C,).
    """

    def by_config(v_N: Tensor) -> Tensor:
        return v_N.new_zeros(rows.configs).index_add_(0, rows.config_N, v_N)

    count_C = torch.bincount(rows.config_N, minlength=rows.configs)
    total_C, squares_C = by_config(rows.importance_N), by_config((rows.importance_N * error_N).square())
    # the residuals' mean was added to the level, which takes a degree of freedom
    variance_C = squares_C / total_C.square().clamp(min=TINY) * count_C / (count_C - 1).clamp(min=1)
    return torch.where(count_C > 1, variance_C, torch.inf), count_C


def _constant_levels(rows: Rows, level_C: Tensor) -> Tensor:
    """Covariance (C, C) of levels that no row differed from: the next may, as in rb_gpu.moderation, in one of as many
    rows by as much as levels lie apart; infinite of a single row.
    """
    count_C = torch.bincount(rows.config_N, minlength=rows.configs)
    apart = level_C.max() - level_C.min()
    apart = torch.where(apart > ROUNDING * level_C.abs().max(), apart, 0.0)
    variance_C = apart.square() / (len(rows.config_N) * count_C.clamp(min=1))
    return torch.diag(torch.where(count_C > 1, variance_C, torch.inf))


def likelihoods(kernels: Sequence[Kernel], y_N: Tensor) -> Tensor:
    """(S,) weights of the slopes, which add up to 1, by how well they foretell what tells configs apart in unseen rows:
    nearly what `fit` gives its slopes, in less time: one sweep, and of a full table no canonical coordinates.
    """
    rows = kernels[0].rows
    if not rows.full:
        return _backfitted(kernels, y_N, 1)[0].sum(1)
    y_QC = _square(rows, y_N)
    loss_SL = losses(Task([kernel.shared for kernel in kernels], y_QC - y_QC.mean(1, keepdim=True))).sum(2)
    return shares(loss_SL[:, :, None], rows.effective).sum((1, 2))


def _square(rows: Rows, y_N: Tensor) -> Tensor:
    """(Q, C) of a full table."""
    y_QC = y_N.new_zeros(rows.queries, rows.configs)
    y_QC[rows.query_N, rows.config_N] = y_N
    return y_QC


def _own(kernels: Sequence[Kernel]) -> dict[int, Sequence[Ridge]]:
    """Of every slope, by config."""
    return {c: [kernel.own[c] for kernel in kernels] for c in kernels[0].own}


def _fit_full(kernels: Sequence[Kernel], y_N: Tensor) -> tuple[Fit, Fit]:
    """Every query under every config: regressions of canonical coordinates."""
    rows, by_config = kernels[0].rows, _own(kernels)
    y_QC = _square(rows, y_N)
    level_C = y_QC.mean(0)
    share_SL, found = average_coordinates([kernel.shared for kernel in kernels], y_QC)
    plain_QC = level_C + (found.unseen_NC - level_C).mean(1, keepdim=True)
    plain = Fit(
        [w.mean(1, keepdim=True).expand_as(w) for w in found.coefs],
        level_C - level_C.mean() + found.base_C.mean(),
        plain_QC[rows.query_N, rows.config_N],
        plain_QC,
        False,
        share_SL,
        by_config,
    )
    unseen_N = found.unseen_NC[rows.query_N, rows.config_N]
    deviating = Fit(found.coefs, found.base_C, unseen_N, found.unseen_NC, True, share_SL, by_config)
    return plain, deviating


def _backfitted(kernels: Sequence[Kernel], y_N: Tensor, sweeps: int) -> tuple[Tensor, Average, list[Average], Tensor]:
    """Configs share one regression and deviate from it, by turns (backfitting, Breiman & Friedman 1985): the weights
    (S, L) of the deviations, what is shared, each config's deviation, and that of every row without its query (N,).
    """
    rows, shared, own = kernels[0].rows, [kernel.shared for kernel in kernels], _own(kernels)
    level_N, deviation_N = rows.levels(y_N)[rows.config_N], torch.zeros_like(y_N)
    echo: dict[int, list[Tensor]] = {}
    for _ in range(sweeps):
        common_SL, [common] = average([Task(shared, (y_N - level_N - deviation_N)[:, None])], rows.effective)
        # the weights hardly change from sweep to sweep
        echo = echo or {c: echoes(shared, common_SL, own[c], index) for c, index in rows.members.items()}
        left_N = y_N - level_N - common.unseen_NC[:, 0]
        of_query_N = shared[0].of_query(rows.weight_N * left_N) / shared[0].whole_N.clamp(min=TINY)
        tasks = [
            Task(own[c], left_N[index, None], [of_query_N[index, None] * part_NL for part_NL in echo[c]])
            for c, index in rows.members.items()
        ]
        share_SL, deviations = average(tasks, rows.effective)
        for index, deviation in zip(rows.members.values(), deviations, strict=True):
            deviation_N[index] = deviation.unseen_NC[:, 0]
    return share_SL, common, deviations, deviation_N


def _fit_rows(kernels: Sequence[Kernel], y_N: Tensor) -> tuple[Fit, Fit]:
    """Any rows: configs deviate from what they share."""
    rows, own = kernels[0].rows, _own(kernels)
    level_C = rows.levels(y_N)
    level_N = level_C[rows.config_N]
    share_SL, common, deviations, deviation_N = _backfitted(kernels, y_N, SWEEPS)
    common_coefs = [w.expand(-1, rows.configs) for w in common.coefs]
    plain_N = level_N + common.unseen_NC[:, 0]
    plain = Fit(common_coefs, level_C + common.base_C, plain_N, level_C.expand(rows.queries, -1), False, share_SL, own)
    own_coefs, own_base_C = [torch.zeros_like(w) for w in common_coefs], torch.zeros_like(level_C)
    for c, deviation in zip(rows.members, deviations, strict=True):
        own_base_C[c] = deviation.base_C[0]
        for w, own_w in zip(own_coefs, deviation.coefs, strict=True):
            w[:, c] = own_w[:, 0]
    own_QC = own_base_C + sum(kernel.features @ w for kernel, w in zip(kernels, own_coefs, strict=True))
    # of several written to one place, threads would leave any
    own_QC[rows.query_N[rows.last], rows.config_N[rows.last]] = deviation_N[rows.last]
    mix_CC = None if rows.apart_CC is None else _mix(own_QC, y_N - plain_N, rows, rows.apart_CC)
    if mix_CC is not None:
        own_QC, own_base_C = own_QC @ mix_CC.T, mix_CC @ own_base_C
        own_coefs = [w @ mix_CC.T for w in own_coefs]
    deviating = Fit(
        [v + w for v, w in zip(common_coefs, own_coefs, strict=True)],
        plain.base_C + own_base_C,
        plain_N + own_QC[rows.query_N, rows.config_N],
        level_C + own_QC,
        True,
        share_SL,
        own,
        mix_CC,
    )
    return _recentred(plain, rows, y_N), _recentred(deviating, rows, y_N)


def _mix(own_QC: Tensor, left_N: Tensor, rows: Rows, apart_CC: Tensor) -> Tensor:
    """(C, C) how configs that are alike share their deviations: averaged over `ladder.mixtures` by how well each
    foretells what rows leave (N,). own_QC: each config's deviation at every query, without the query's rows of it.
    """
    mixtures = ladder.mixtures(apart_CC)
    loss_M = torch.stack([
        rows.weight_N @ (left_N - (own_QC @ mix_CC.T)[rows.query_N, rows.config_N]).square() for mix_CC in mixtures
    ])  # fmt: skip
    share_M = shares(loss_M[:, None, None], rows.effective)[:, 0, 0]
    return torch.einsum("m,mcd->cd", share_M, mixtures)


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
