"""Fits the field: a kernel ridge regression on landmarks, shared by all configs, plus each config's deviation from it.

Predictions of training rows are leave-one-query-out, apart from the level of each config, its mean over all queries. A
slope is the a of a kernel exp(a·(cos − 1)). A table is full if every query ran once under every config. A place is a
query's embedding, projected and normalised (`landmarks`). Float64 torch on the device.
Suffixes: Q queries, N rows, P places, F features of one slope, C configs, L ridges, S slopes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from rb_gpu.evidence import ROUNDING
from rb_gpu.learn import ladder
from rb_gpu.learn.canonical import average_coordinates
from rb_gpu.learn.echo import echoes
from rb_gpu.learn.ridge import RIDGES, TINY, Average, Ridge, Task, average, losses, repeated, shares
from rb_gpu.learn.rows import Rows, constant_levels, level_errors

SWEEPS = 3


@dataclass(frozen=True)
class Fit:
    """The fit of one outcome: y_c = base_c + Σ over slopes of features·coef_c.

    coefs: (F, C) per slope. base_C: (C,). unseen_N: leave-one-query-out prediction of each row. unseen_QC: the same for
    every query under every config, without the part that all configs share unless the table is full. deviates: whether
    deviations between configs improve the predictions of unseen rows; if not, all configs have the same coefficients.
    share_SL, ridges: the weights of the models and each config's regressions, from which the variance of its deviation
    follows. mix_CC: how configs pool their own regressions (`ladder.mixtures`), None without pooling. level_CC:
    covariance of the levels, infinite where nothing is known; None on a full table whose rows vary.
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
        """(P, C) variance of each config's deviation at P places, in units of a row's noise variance, under the model
        of the greatest weight; 0 for a config without a regression of its own.

        Computed even where deviations did not improve the predictions, since that does not show that there are none.
        """
        out_PC = self.base_C.new_zeros(len(features[0]), len(self.base_C))
        slope, ridge = divmod(int(self.share_SL.argmax()), len(RIDGES))
        for c, ridges in self.ridges.items():
            out_PC[:, c] = ridges[slope].variance(features[slope], ridge)
        return out_PC

    def inside(self, features: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """(C,) twice, for features centred on a known mean, under the model of the greatest weight: the sampling
        variance of the learned deviations, in units of a row's noise variance, and the share of their prior variance
        that was not learned (`Ridge.learned`).
        """
        learned_C, left_C = torch.zeros_like(self.base_C), torch.ones_like(self.base_C)
        slope, ridge = divmod(int(self.share_SL.argmax()), len(RIDGES))
        # on a full table all configs share one ridge, so that this is computed once
        told: dict[int, tuple[Tensor, Tensor]] = {}
        for c, ridges in self.ridges.items() if self.deviates else ():
            one = ridges[slope]
            told[id(one)] = told.get(id(one)) or one.learned(features[slope], ridge)
            learned_C[c], left_C[c] = told[id(one)]
        return learned_C, left_C


@dataclass(frozen=True)
class Kernel:
    """What all outcomes of the same rows share at one slope: the features (Q, F) and the regressions on them."""

    features: Tensor
    rows: Rows

    @cached_property
    def shared(self) -> Ridge:
        """The regression common to all configs: over all queries of a full table, else over all rows."""
        x, query_N = self.features, self.rows.query_N
        if self.rows.full:
            return Ridge(x, torch.ones_like(x[:, 0]))
        return Ridge(x[query_N], self.rows.weight_N, repeated(query_N))

    @cached_property
    def own(self) -> dict[int, Ridge]:
        """The regression over each config's own rows; on a full table the same one for all configs."""
        if self.rows.full:
            return dict.fromkeys(range(self.rows.configs), self.shared)
        x, query_N, weight_N = self.features, self.rows.query_N, self.rows.weight_N
        return {
            c: Ridge(x[query_N[index]], weight_N[index], repeated(query_N[index]))
            for c, index in self.rows.members.items()
        }


def fit(kernels: Sequence[Kernel], y_N: Tensor) -> Fit:
    """Fits one outcome y (N,); all kernels must hold the same rows.

    Returns the fit without deviations between configs unless deviations lower the weighted squared error of the
    leave-one-query-out predictions by more than what they have in common does. Unless the table is full, the levels are
    then smoothed (`ladder.settled`).
    """
    rows = kernels[0].rows
    level_C = rows.levels(y_N)
    level_N = level_C[rows.config_N]
    if float((y_N - level_N).square().mean()) <= ROUNDING**2 * float(y_N.square().mean()):
        nothing = [y_N.new_zeros(kernel.features.shape[1], rows.configs) for kernel in kernels]
        level_QC, alike_SL = level_C.expand(rows.queries, -1), y_N.new_ones(len(kernels), len(RIDGES))
        return Fit(nothing, level_C, level_N, level_QC, False, alike_SL, {}, level_CC=constant_levels(rows, level_C))
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


def likelihoods(kernels: Sequence[Kernel], y_N: Tensor) -> Tensor:
    """(S,) weights of the slopes, which sum to 1, by how well they predict differences between configs in unseen rows.

    Approximates the slope weights of `fit` in less time: one sweep, and no canonical coordinates on a full table.
    """
    rows = kernels[0].rows
    if not rows.full:
        return _backfitted(kernels, y_N, 1)[0].sum(1)
    y_QC = _square(rows, y_N)
    loss_SL = losses(Task([kernel.shared for kernel in kernels], y_QC - y_QC.mean(1, keepdim=True))).sum(2)
    return shares(loss_SL[:, :, None], rows.effective).sum((1, 2))


def _square(rows: Rows, y_N: Tensor) -> Tensor:
    """(Q, C) outcomes of a full table."""
    y_QC = y_N.new_zeros(rows.queries, rows.configs)
    y_QC[rows.query_N, rows.config_N] = y_N
    return y_QC


def _own(kernels: Sequence[Kernel]) -> dict[int, Sequence[Ridge]]:
    """Each config's own regressions, one per slope."""
    return {c: [kernel.own[c] for kernel in kernels] for c in kernels[0].own}


def _fit_full(kernels: Sequence[Kernel], y_N: Tensor) -> tuple[Fit, Fit]:
    """The fits without and with deviations, by regressions in canonical coordinates, on a full table."""
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


def _backfitted(
    kernels: Sequence[Kernel], y_N: Tensor, sweeps: int
) -> tuple[Tensor, Average, list[Average], Tensor, Tensor]:
    """Alternates between the regression that configs share and their deviations from it (backfitting, Breiman &
    Friedman 1985). Returns the weights (S, L) of the deviations' models (of the shared one's where no config has rows
    enough for one), the shared regression, each config's deviation, the leave-one-query-out deviation of every row
    (N,), and by how much the deviations of other configs at each query are too low (Q, C).

    The latter also learned from residuals that hold an echo of the query's rows (`echoes`). How loud it is at queries
    that ran other configs is taken from the config's own rows, as if they were a random sample of all queries.
    """
    rows, shared, own = kernels[0].rows, [kernel.shared for kernel in kernels], _own(kernels)
    level_N, deviation_N = rows.levels(y_N)[rows.config_N], torch.zeros_like(y_N)
    echo: dict[int, list[Tensor]] = {}
    for _ in range(sweeps):
        common_SL, [common] = average([Task(shared, (y_N - level_N - deviation_N)[:, None])], rows.effective)
        # computed once, because the weights hardly change from sweep to sweep
        echo = echo or {c: echoes(shared, common_SL, own[c], index) for c, index in rows.members.items()}
        left_N = y_N - level_N - common.unseen_NC[:, 0]
        of_query_N = shared[0].of_query(rows.weight_N * left_N) / shared[0].whole_N.clamp(min=TINY)
        tasks = [
            Task(own[c], left_N[index, None], [of_query_N[index, None] * part_NL for part_NL in echo[c]])
            for c, index in rows.members.items()
        ]
        share_SL, deviations = average(tasks, rows.effective) if tasks else (common_SL, [])
        for index, deviation in zip(rows.members.values(), deviations, strict=True):
            deviation_N[index] = deviation.unseen_NC[:, 0]
    total_Q = y_N.new_zeros(rows.queries).index_add_(0, rows.query_N, rows.weight_N * left_N)
    heard_QC = y_N.new_zeros(rows.queries, rows.configs)
    for c, index in rows.members.items():
        loud_N = torch.stack([part_NL @ share_L for part_NL, share_L in zip(echo[c], share_SL, strict=True)]).sum(0)
        even_N = rows.importance_N[index]
        heard_QC[:, c] = total_Q * (even_N @ (loud_N / shared[0].whole_N[index]) / even_N.sum())
    return share_SL, common, deviations, deviation_N, heard_QC


def _fit_rows(kernels: Sequence[Kernel], y_N: Tensor) -> tuple[Fit, Fit]:
    """The fits without and with deviations from a shared regression, on a table that is not full."""
    rows, own = kernels[0].rows, _own(kernels)
    level_C = rows.levels(y_N)
    level_N = level_C[rows.config_N]
    share_SL, common, deviations, deviation_N, heard_QC = _backfitted(kernels, y_N, SWEEPS)
    common_N = level_N + common.unseen_NC[:, 0]
    own_base_C, own_coefs = torch.zeros_like(level_C), [w.new_zeros(len(w), rows.configs) for w in common.coefs]
    for c, deviation in zip(rows.members, deviations, strict=True):
        own_base_C[c] = deviation.base_C[0]
        for w, own_w in zip(own_coefs, deviation.coefs, strict=True):
            w[:, c] = own_w[:, 0]
    own_QC = own_base_C + heard_QC + sum(kernel.features @ w for kernel, w in zip(kernels, own_coefs, strict=True))
    # only the last row of each cell: which of several writes to one cell wins depends on the threads
    own_QC[rows.query_N[rows.last], rows.config_N[rows.last]] = deviation_N[rows.last]
    mix_CC = None if rows.apart_CC is None else _mix(own_QC, y_N - common_N, rows, rows.apart_CC)
    if mix_CC is not None:
        own_QC, own_base_C = own_QC @ mix_CC.T, mix_CC @ own_base_C
        own_coefs = [w @ mix_CC.T for w in own_coefs]
    deviating = Fit(
        [v + w for v, w in zip(common.coefs, own_coefs, strict=True)],
        level_C + common.base_C + own_base_C,
        common_N + own_QC[rows.query_N, rows.config_N],
        level_C + own_QC,
        True,
        share_SL,
        own,
        mix_CC,
    )
    # a ridge leaves some of what all configs share to the deviations; the average of these is none
    mean_C = rows.by_config(rows.weight_N) / rows.weight_N.sum()
    plain = replace(
        deviating,
        coefs=[v + (w @ mean_C)[:, None].expand_as(w) for v, w in zip(common.coefs, own_coefs, strict=True)],
        base_C=level_C + common.base_C + own_base_C @ mean_C,
        unseen_N=common_N + (own_QC @ mean_C)[rows.query_N],
        unseen_QC=level_C.expand(rows.queries, -1),
        deviates=False,
        mix_CC=None,
    )
    return _recentred(plain, rows, y_N), _recentred(deviating, rows, y_N)


def _mix(own_QC: Tensor, left_N: Tensor, rows: Rows, apart_CC: Tensor) -> Tensor:
    """(C, C) by which comparable configs pool their deviations: the average of `ladder.mixtures`, each weighted by how
    well it predicts the residuals left_N of the shared fit. own_QC: each config's deviation at every query, predicted
    without the query's own rows of that config.
    """
    mixtures = ladder.mixtures(apart_CC)
    loss_M = torch.stack([
        rows.weight_N @ (left_N - (own_QC @ mix_CC.T)[rows.query_N, rows.config_N]).square() for mix_CC in mixtures
    ])  # fmt: skip
    share_M = shares(loss_M[:, None, None], rows.effective)[:, 0, 0]
    return torch.einsum("m,mcd->cd", share_M, mixtures)


def _recentred(fitted: Fit, rows: Rows, y_N: Tensor) -> Fit:
    """Adds each config's importance-weighted mean residual to its level, which makes the level doubly robust."""
    left_N = y_N - fitted.unseen_N
    away_C = rows.by_config(rows.importance_N * left_N) / rows.by_config(rows.importance_N).clamp(min=TINY)
    return replace(
        fitted,
        base_C=fitted.base_C + away_C,
        unseen_N=fitted.unseen_N + away_C[rows.config_N],
        unseen_QC=fitted.unseen_QC + away_C,
    )
