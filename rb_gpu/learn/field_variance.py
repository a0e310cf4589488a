"""Error variances of the field's predictions: of the mean over a leaf's queries, and of one query about that mean.

A difference is a config's outcome less the default's. A row's noise variance is the mean square of its config's
leave-one-query-out residuals.
Suffixes: Q queries, N rows, F features of one slope, R axes, P leaves, U = P + 1 leaves and all queries together, C
configs, O outcomes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rb_gpu.learn.field import Fit
from rb_gpu.learn.ladder import to_default
from rb_gpu.learn.ridge import TINY
from rb_gpu.learn.rows import Rows
from rb_gpu.normal import normal_cdf

# floor of a moment estimate's z score: an estimate further below 0 is no stronger evidence of a small variance
LEAST_Z = -3.0
# most queries on which to compute how much of the variation inside leaves the field has learned
MOST_READ = 4096


def variances(
    fits: dict[int, Fit], rows: Rows, y_NO: Tensor, means: Sequence[Tensor], inside: Inside, default: int, quality: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Error variances of each config's predicted difference to the default: (C, O) of its mean over all queries, and
    (U, C, O) of one query's deviation from that mean, for a query of each leaf. And (U, C) of each config's predicted
    quality at each leaf's mean features. All are 0 where nothing is known; the differences' also for the default.

    fits: by outcome. y_NO: outcomes of the rows. means: the leaves' mean features (U, F) per slope. quality: the index
    of the quality outcome.
    """
    like = y_NO.new_zeros(len(means[0]), rows.configs)
    gain_UCO = like.new_zeros(*like.shape, y_NO.shape[1])
    level_CO = y_NO.new_zeros(rows.configs, y_NO.shape[1])
    quality_UC = like
    weight_C = rows.by_config(rows.weight_N).clamp(min=1e-300)
    for o, one in fits.items():
        learned_UC, left_UC = inside.share(one)
        leverage_UC = one.leverage(means)
        error_N = y_NO[:, o] - one.unseen_N
        noise_C = rows.by_config(rows.weight_N * error_N.square()) / weight_C
        own_UC = leverage_UC * noise_C
        if rows.full:
            error_QC = y_NO.new_zeros(rows.queries, rows.configs)
            error_QC[rows.query_N, rows.config_N] = error_N
            apart_C = (error_QC - error_QC[:, [default]]).square().mean(0)
            gain_UCO[..., o] = (leverage_UC + learned_UC) * apart_C
            level_CO[:, o] = apart_C / rows.queries if one.level_CC is None else _level_errors(one, noise_C, default)
        else:
            level_CO[:, o] = _level_errors(one, noise_C, default)
            mix_CC = torch.eye(rows.configs).to(y_NO) if one.mix_CC is None else one.mix_CC
            gain_UCO[..., o] = (own_UC + learned_UC * noise_C) @ (mix_CC - mix_CC[default]).square().T
            own_UC = own_UC @ mix_CC.square().T
        gain_UCO[..., o] += left_UC * inside.variance(rows, y_NO[:, o], default)
        # how a query deviates from those around it shows only where it was repeated
        found, error = (0.0, 0.0) if rows.full else of_repeats(rows, error_N, default)
        more_C = (found - inside.query_share @ gain_UCO[..., o]).clamp(min=0.0)
        gain_UCO[..., o] += (more_C - error**2 / more_C.clamp(min=TINY)).clamp(min=0.0)
        gain_UCO[:, default, o] = level_CO[default, o] = 0.0
        if o == quality:
            quality_UC = own_UC
    return level_CO, gain_UCO, quality_UC


def _level_errors(fitted: Fit, like_C: Tensor, default: int) -> Tensor:
    """(C,) variance of each config's mean difference to the default over all queries; 0 where nothing is known."""
    if fitted.level_CC is None:
        return torch.zeros_like(like_C)
    apart_C = to_default(fitted.level_CC, default)
    return torch.where(torch.isfinite(apart_C), apart_C.clamp(min=0.0), 0.0)


def of_repeats(rows: Rows, error_N: Tensor, default: int) -> tuple[float, float]:
    """Mean squared deviation of a query's difference to the default from the predicted one, and its standard error.

    Estimated from products of the residuals error_N (N,) of two rows of one query: over pairs of the config's rows,
    pairs of one of its rows and one of the default's, and pairs of the default's rows, combined as in
    `Inside.variance`. All pairs are of one query, so that what all configs share there cancels. One estimate for all
    configs. Both are 0 where no query ran both a config and the default at least twice.
    """
    cell_N = rows.query_N * rows.configs + rows.config_N

    def by_cell(v_N: Tensor) -> Tensor:
        return v_N.new_zeros(rows.queries * rows.configs).index_add_(0, cell_N, v_N).view(rows.queries, rows.configs)

    count_QC, sum_QC = by_cell(torch.ones_like(error_N)), by_cell(error_N)
    pairs_QC, own_QC = count_QC.square() - count_QC, sum_QC.square() - by_cell(error_N.square())
    both_QC, across_QC = sum_QC * sum_QC[:, [default]], count_QC * count_QC[:, [default]]
    known_QC = (pairs_QC > 0) & (pairs_QC[:, [default]] > 0)
    known_QC[:, default] = False
    pairs_QC, across_QC = pairs_QC.clamp(min=1), across_QC.clamp(min=1)
    # inverse variances for rows that differ by noise alone
    weight_QC = known_QC / (1.0 / pairs_QC + 4.0 / across_QC + 1.0 / pairs_QC[:, [default]])
    total = weight_QC.sum().clamp(min=TINY)
    own_QC = own_QC / pairs_QC
    squared_QC = own_QC - 2.0 * both_QC / across_QC + own_QC[:, [default]]
    found = (weight_QC * squared_QC).sum() / total
    away_Q = (weight_QC * (squared_QC - found)).sum(1) / total
    return float(found), float(away_Q.square().sum().sqrt())


@dataclass(frozen=True)
class Inside:
    """Where the queries of a fit lie relative to the mean of their leaf.

    place_QR: each query's place (`landmarks`) less the leaf's mean; 0 without a leaf. leaf_Q: index of the leaf, P for
    none. spread_U: mean squared distance of a new query of each leaf from the leaf's mean. features: for every slope
    (at most MOST_READ, F), the features of evenly spaced queries less their leaf's mean.
    """

    place_QR: Tensor
    leaf_Q: Tensor
    spread_U: Tensor
    features: Sequence[Tensor]

    @property
    def query_share(self) -> Tensor:
        """(U,) share of each leaf among the queries that have a leaf; 0 in the last place."""
        count_U = torch.bincount(self.leaf_Q, minlength=len(self.spread_U)).to(self.spread_U)
        count_U[-1] = 0.0
        return count_U / count_U.sum().clamp(min=1)

    @classmethod
    def of(cls, place_QR: Tensor, label_Q: Tensor, leaves: int, features: Sequence[Tensor]) -> Inside:
        """From places (Q, R), labels (Q,), negative for queries without a leaf, and features (Q, F) per slope."""
        leaf_Q = torch.where(label_Q < 0, leaves, label_Q)
        count_U = torch.bincount(leaf_Q, minlength=leaves + 1)
        count_U[-1] = 0
        away_QR = about_leaf(place_QR.double(), leaf_Q, count_U)
        squares_U = away_QR.new_zeros(leaves + 1).index_add_(0, leaf_Q, away_QR.square().sum(1))
        freedom_U = (count_U - 1).clamp(min=0)
        overall = squares_U.sum() / freedom_U.sum().clamp(min=1)
        spread_U = torch.where(freedom_U > 0, squares_U / freedom_U.clamp(min=1), overall)
        step = max(1, -(-len(leaf_Q) // MOST_READ))
        read = slice(None, None, step)
        return cls(away_QR, leaf_Q, spread_U, [about_leaf(x, leaf_Q, count_U, read) for x in features])

    def share(self, fitted: Fit) -> tuple[Tensor, Tensor]:
        """(U, C) twice, for a new query of each leaf: the sampling variance of what the field learned about its
        deviation from the leaf's mean, in units of a row's noise variance; and the query's mean squared distance from
        the leaf's mean times the share of the prior variance that was not learned.
        """
        learned_C, left_C = fitted.inside(self.features)
        return self.spread_U[:, None] / self.spread_U[-1].clamp(min=TINY) * learned_C, self.spread_U[:, None] * left_C

    def variance(self, rows: Rows, y_N: Tensor, default: int) -> float:
        """Variance of a config's difference to the default inside leaves, per unit of squared distance.

        To first order the difference is linear in place, so that the differences of two queries covary in proportion to
        the product of their places. Products of two queries' outcomes are therefore regressed on the product of their
        places and on whether they share a leaf (Haseman & Elston 1972): over pairs of the config's rows, pairs of one
        of its rows and one of the default's, and pairs of the default's rows. The first coefficient less twice the
        second plus the third is that of the difference; what all configs share cancels. One estimate for all configs.
        It is replaced by the mean of its normal distribution truncated at 0 (`not_negative`) and is at most what the
        variance of the outcomes allows. 0 where the default has too few rows.
        """
        away_N = y_N - rows.levels(y_N)[rows.config_N]
        leaf_N = self.leaf_Q[rows.query_N]
        if rows.full:
            # what makes a query hard for all configs tells nothing about their differences and would act as noise
            away_N = about_leaf(away_N[:, None], rows.query_N, torch.bincount(rows.query_N))[:, 0]
        everywhere = torch.bincount(leaf_N, minlength=len(self.spread_U))
        away_N = about_leaf(away_N[:, None], leaf_N, everywhere)[:, 0]
        away_N = torch.where(leaf_N < len(self.spread_U) - 1, away_N, 0.0)
        with_leaf_N = (leaf_N < len(self.spread_U) - 1).to(y_N)
        if default not in rows.members:
            return 0.0
        standing = self._sums(rows, default, away_N, with_leaf_N)
        pairs_3X = y_N.new_zeros(3, 5)
        pairs_3X[2] = standing.with_(standing)
        squares, count = 0.0, 0.0
        for c in rows.members:
            if c != default:
                one = self._sums(rows, c, away_N, with_leaf_N)
                pairs_3X[0] += one.with_(one)
                pairs_3X[1] += one.with_(standing)
                squares, count = squares + one.squares, count + one.rows
        own, of_default = squares / max(count, 1.0), standing.squares / max(standing.rows, 1.0)
        products = (2.0 * own**2, own * of_default, 2.0 * of_default**2)
        estimate = error = 0.0
        for times, product, sums in zip((1.0, -2.0, 1.0), products, pairs_3X.tolist(), strict=True):
            by_place, by_leaf, places, both, leaves = sums
            told = places - both**2 / leaves if leaves > 0 else 0.0
            if told <= 0.0:
                return 0.0
            estimate += times * (by_place - by_leaf * both / leaves) / told
            error += times**2 * product / told
        most = (own + of_default) / max(float(self.spread_U[-1]), TINY)
        return min(not_negative(estimate, math.sqrt(error)), most)

    def _sums(self, rows: Rows, config: int, away_N: Tensor, with_leaf_N: Tensor) -> _Sums:
        index, leaves = rows.members[config], len(self.spread_U)
        query_N = rows.query_N[index]
        away_Q, rows_Q = (v.new_zeros(rows.queries).index_add_(0, query_N, v[index]) for v in (away_N, with_leaf_N))
        ran_Q = torch.nonzero(rows_Q).squeeze(1)
        place_QR, leaf_Q = self.place_QR[ran_Q], self.leaf_Q[ran_Q]
        weighted_QR = place_QR * rows_Q[ran_Q, None]
        return _Sums(
            away_Q,
            rows_Q,
            self.place_QR.square().sum(1),
            place_QR.T @ away_Q[ran_Q],
            away_Q.new_zeros(leaves).index_add_(0, leaf_Q, away_Q[ran_Q]),
            place_QR.T @ weighted_QR,
            weighted_QR.new_zeros(leaves, place_QR.shape[1]).index_add_(0, leaf_Q, weighted_QR),
            rows_Q.new_zeros(leaves).index_add_(0, leaf_Q, rows_Q[ran_Q]),
            float(away_N[index].square().sum()),
            float(with_leaf_N[index].sum()),
        )


@dataclass(frozen=True)
class _Sums:
    """Sums over one config's rows from which sums over all pairs of rows follow, where away is an outcome's deviation.

    By query (Q,): away_Q, the sum of away; rows_Q, the number of rows; distance_Q, the squared distance from the leaf's
    mean. Sums of away times place (R,) and of away by leaf (U,); over rows, of place times place (R, R), of place by
    leaf (U, R), and the number by leaf (U,). squares: sum of away². rows: the number of rows that have a leaf.
    """

    away_Q: Tensor
    rows_Q: Tensor
    distance_Q: Tensor
    away_R: Tensor
    away_U: Tensor
    place_RR: Tensor
    place_UR: Tensor
    rows_U: Tensor
    squares: float
    rows: float

    def with_(self, other: _Sums) -> Tensor:
        """(5,) sums over all pairs of rows of two different queries: the product of outcomes times that of places; the
        product of outcomes if they share a leaf; the squared product of places; the product of places if they share a
        leaf; and the number of pairs that share one.
        """
        away_Q, rows_Q = self.away_Q * other.away_Q, self.rows_Q * other.rows_Q
        return torch.stack([
            self.away_R @ other.away_R - away_Q @ self.distance_Q,
            self.away_U @ other.away_U - away_Q.sum(),
            (self.place_RR * other.place_RR).sum() - rows_Q @ self.distance_Q.square(),
            (self.place_UR * other.place_UR).sum() - rows_Q @ self.distance_Q,
            self.rows_U @ other.rows_U - rows_Q.sum(),
        ])  # fmt: skip


def about_leaf(x_QX: Tensor, leaf_Q: Tensor, count_U: Tensor, read: slice = slice(None)) -> Tensor:
    """Values of the rows `read`, less the mean of their leaf over all rows; 0 for a leaf whose count is 0."""
    sum_UX = x_QX.new_zeros(len(count_U), x_QX.shape[1]).index_add_(0, leaf_Q, x_QX)
    away_QX = x_QX[read] - (sum_UX / count_U.clamp(min=1)[:, None])[leaf_Q[read]]
    return torch.where((count_U > 0)[leaf_Q[read], None], away_QX, 0.0)


def not_negative(estimate: float, error: float) -> float:
    """Posterior mean of a value ≥ 0 under a flat prior, given a normal estimate of it and its standard error."""
    if error <= 0.0:
        return max(estimate, 0.0)
    z = max(estimate / error, LEAST_Z)
    above = float(normal_cdf(np.array([z]))[0])
    return error * (z + math.exp(-0.5 * z * z) / math.sqrt(2.0 * math.pi) / above)
