"""Evidence: the sufficient statistics of each (pattern, config) cell, all of which are additive.

Suffixes: P patterns, C configs, O outcomes, B latency bins, M merged patterns.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

OUTCOMES = ("f1", "product", "log2_latency", "cost")
LATENCY_BINS = 64
BINS_PER_OCTAVE = 2
# degrees of freedom of a config's paired differences from which their variance can be estimated
LEAST_PAIRS = 20
# a difference or spread below this share of the outcomes' size is rounding
ROUNDING = 1e-9


class Evidence(NamedTuple):
    """Sufficient statistics of every cell; float64 unless stated. A row's weight w is its time decay, divided by its
    propensity if one was logged.

    rows: (P, C) int64, number of trajectories. w, w2: (P, C) Σw and Σw².
    mean: (P, C, O) weighted means of OUTCOMES. comoment: (P, C, O, O) Σw·(y − mean)(y − mean)ᵀ.
    precision, recall, latency_us: (P, C) weighted means.
    latency_hist: (P, C, B) Σw by latency bin, BINS_PER_OCTAVE bins for each doubling from 1 µs.
    pair_*: the same moments of the differences between outcomes and the default's on the same query; 0 rows if the
        default was not tried on it. The rows of one query under one config count once, by their mean.
    """

    rows: npt.NDArray[np.int64]
    w: Floats
    w2: Floats
    mean: Floats
    comoment: Floats
    precision: Floats
    recall: Floats
    latency_us: Floats
    latency_hist: Floats
    pair_rows: npt.NDArray[np.int64]
    pair_w: Floats
    pair_w2: Floats
    pair_mean: Floats
    pair_comoment: Floats

    def regroup(self, group_P: npt.NDArray[np.int64], groups: int) -> Evidence:
        """The evidence of `groups` merged patterns, equal to that of their pooled rows (Chan, Golub & LeVeque 1979).

        group_P: (P,) the merged pattern of each pattern; patterns with a negative group are left out.
        """
        kept = group_P >= 0

        def add(x: npt.NDArray[np.generic]) -> Floats:
            out = np.zeros((groups, *x.shape[1:]), dtype=x.dtype)
            np.add.at(out, group_P[kept], x[kept])
            return out

        def moments(w: Floats, mean: Floats, comoment: Floats) -> tuple[Floats, Floats, Floats]:
            w_M = add(w)
            mean_M = ratio(add(w[..., None] * mean), w_M[..., None])
            away = np.where(kept[:, None, None], mean - mean_M[np.maximum(group_P, 0)], 0.0)
            spread = w[..., None, None] * away[..., :, None] * away[..., None, :]
            return w_M, mean_M, add(comoment + spread)

        w_M, mean_M, comoment_M = moments(self.w, self.mean, self.comoment)
        pair_w_M, pair_mean_M, pair_comoment_M = moments(self.pair_w, self.pair_mean, self.pair_comoment)
        return Evidence(
            rows=add(self.rows).astype(np.int64),
            w=w_M,
            w2=add(self.w2),
            mean=mean_M,
            comoment=comoment_M,
            precision=ratio(add(self.w * self.precision), w_M),
            recall=ratio(add(self.w * self.recall), w_M),
            latency_us=ratio(add(self.w * self.latency_us), w_M),
            latency_hist=add(self.latency_hist),
            pair_rows=add(self.pair_rows).astype(np.int64),
            pair_w=pair_w_M,
            pair_w2=add(self.pair_w2),
            pair_mean=pair_mean_M,
            pair_comoment=pair_comoment_M,
        )

    def pooled(self) -> Evidence:
        """The evidence of all patterns as one, (1, C)."""
        return self.regroup(np.zeros(len(self.rows), dtype=np.int64), 1)

    def with_unknown(self) -> Evidence:
        """The same evidence with one more pattern at the end, about which nothing is known."""
        return Evidence._make(np.concatenate([x, np.zeros_like(x, shape=(1, *x.shape[1:]))]) for x in self)

    @property
    def paired(self) -> bool:
        """Whether differences to the default are paired: every row of another config has an outcome of the default on
        the same query and, where rows repeat, there are enough queries to estimate how differences scatter.
        """
        other = self.rows.sum(0) > 0
        # a pair carries the weight of all its rows
        beside = self.pair_w.sum(0) >= (1.0 - ROUNDING) * self.w.sum(0)
        freedom = np.maximum(self.pair_rows - 1, 0).sum(0)
        told = (self.pair_rows.sum(0) == self.rows.sum(0)) | (freedom >= LEAST_PAIRS)
        return bool(self.pair_rows.sum() > 0 and (beside & told)[other].all())

    def moments(self, direction_O: Floats) -> tuple[Floats, Floats, Floats]:
        """`linear_moments` of the outcomes."""
        return linear_moments(self.w, self.w2, self.mean, self.comoment, direction_O)

    def pair_moments(self, direction_O: Floats) -> tuple[Floats, Floats, Floats]:
        """`linear_moments` of the differences to the default."""
        return linear_moments(self.pair_w, self.pair_w2, self.pair_mean, self.pair_comoment, direction_O)

    def latency_quantile(self, q: float) -> Floats:
        """(P, C) latency in µs below which a share q of the weight lies, log-linear inside a bin; NaN for an empty
        cell.
        """
        total = self.latency_hist.sum(-1)
        running = self.latency_hist.cumsum(-1)
        target = q * total
        bin_PC = np.minimum((running < target[..., None]).sum(-1), LATENCY_BINS - 1)
        inside = np.take_along_axis(self.latency_hist, bin_PC[..., None], -1)[..., 0]
        below = np.take_along_axis(running, bin_PC[..., None], -1)[..., 0] - inside
        octaves = (bin_PC + ratio(target - below, inside)) / BINS_PER_OCTAVE
        return np.where(total > 0, np.exp2(octaves), np.nan)


def ratio(numerator: Floats | float, denominator: Floats, otherwise: float = 0.0) -> Floats:
    """The quotient where the denominator is positive, elsewhere `otherwise`."""
    quotient = np.full(np.broadcast(numerator, denominator).shape, otherwise)
    np.divide(numerator, denominator, out=quotient, where=denominator > 0)
    return quotient


def linear_moments(
    w: Floats, w2: Floats, mean: Floats, comoment: Floats, direction_O: Floats
) -> tuple[Floats, Floats, Floats]:
    """Weighted mean, unbiased variance and effective sample size (Kish: w²/Σw²) of direction·outcomes, each (P, C).

    The variance is NaN in cells with fewer than two effective rows.
    """
    size = ratio(w * w, w2)
    freedom = w - ratio(w2, w)
    second = np.einsum("pcij,i,j->pc", comoment, direction_O, direction_O)
    # equal values leave a sum of squares of rounding errors, which is no variance
    rounding = 1e-12 * (np.abs(mean) @ np.abs(direction_O))
    second = np.where(second <= w * rounding**2, 0.0, second)
    enough = freedom > 1e-9 * np.maximum(w, 1e-300)
    variance = np.divide(np.maximum(second, 0.0), freedom, out=np.full(w.shape, np.nan), where=enough)
    return mean @ direction_O, variance, size
