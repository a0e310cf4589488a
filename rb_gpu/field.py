"""The field: predicts the outcomes of every config from a query's own position, beyond what its patterns say.

It is a kernel regression on M landmarks: y_c(q) = base_c + φ(q)·coef_c, where φ holds the kernels exp(a·(cos(q,
landmark) − 1)) for every slope a (the Nyström method, Williams & Seeger 2001). The cosine is taken between projections
onto the axes of largest variance of the training queries, measured from their mean: with many embedders all queries lie
in a narrow cone, where plain cosines hardly differ. A constant last coordinate keeps information on a query's distance
from the mean, which a cosine alone would lose. NumPy only.

Axes: M landmarks, D dims, R projected dims, S = 2 slopes, F = M·S features, C configs, O outcomes, P leaves, U = P + 1
rows (the leaves, and last a row for queries that are near no leaf).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from rb_gpu.evidence import Evidence, Floats

Matrix = npt.NDArray[np.float32]
Vector = npt.NDArray[np.float32]

# bounds of the kernel slopes: a lookup computes e^slope in float32, which holds e^64 but not e^128
SLOPE_BOUNDS = (0.5, 64.0)
# arrays that bank.safetensors holds if there is a field: dtype, and axes named as in the legend
FIELD_ARRAYS: dict[str, tuple[str, str]] = {
    "field_slopes": ("float64", "S"),
    "field_axes": ("float32", "RD"),
    "field_centre": ("float32", "R"),
    "field_landmarks": ("float32", "MR"),
    "field_coef": ("float32", "FCO"),
    "field_base": ("float64", "CO"),
    "field_level_variance": ("float64", "CO"),
    "field_low": ("float64", "CO"),
    "field_high": ("float64", "CO"),
    "field_gain_low": ("float64", "CO"),
    "field_gain_high": ("float64", "CO"),
    "field_mean": ("float64", "UCO"),
    "field_gain_variance": ("float64", "UCO"),
    "field_quality_variance": ("float64", "UC"),
    "field_residual_mean": ("float64", "PCO"),
    "field_residual_comoment": ("float64", "PCOO"),
    "field_residual_pair_mean": ("float64", "PCO"),
    "field_residual_pair_comoment": ("float64", "PCOO"),
    "field_test": ("float32", "UC"),
    "field_test_sd": ("float32", "UC"),
}


class Field(NamedTuple):
    """The arrays of a fitted field, as BankData stores them. "Gain" is a config's difference to the default.

    slopes: (S,), the second twice the first, so that a lookup derives both kernels from one exponential.
    axes: (R, D) float32, orthonormal, except for a last axis of zeros (the constant coordinate).
    centre: (R,) float32, mean of the queries on the axes; its last entry is minus the standard deviation of their
        distances from that mean.
    landmarks: (M, R) float32 of norm 1.
    coef: (F, C, O) float32, 0 for outcomes that the field does not predict. base: (C, O).
    level_variance: (C, O) variance of each config's estimated mean gain over all queries; 0 if unknown.
    low, high: (C, O) smallest and largest prediction for a training query, less base. gain_low, gain_high: the same for
        the predicted gain. Lookups clip to these bounds.
    mean: (U, C, O) mean prediction over the queries of each leaf, less base; the last row is the mean over all queries.
    gain_variance: (U, C, O) variance of a config's gain on a single query of the leaf around its prediction, beyond
        level_variance. quality_variance: (U, C) variance of its predicted mean quality in the leaf. Neither includes
        the variance of the leaf's own residual effect, which `posterior.believe` adds.
    residual_*: moments as in Evidence, of the outcomes less the field's predictions, each made without the row's own
        query.
    """

    slopes: Floats
    axes: Matrix
    centre: Vector
    landmarks: Matrix
    coef: Matrix
    base: Floats
    level_variance: Floats
    low: Floats
    high: Floats
    gain_low: Floats
    gain_high: Floats
    mean: Floats
    gain_variance: Floats
    quality_variance: Floats
    residual_mean: Floats
    residual_comoment: Floats
    residual_pair_mean: Floats
    residual_pair_comoment: Floats

    def residual(self, evidence: Evidence) -> Evidence:
        """Evidence of the same rows with the field's residuals in place of the outcomes."""
        return evidence._replace(
            mean=self.residual_mean,
            comoment=self.residual_comoment,
            pair_mean=self.residual_pair_mean,
            pair_comoment=self.residual_pair_comoment,
        )
