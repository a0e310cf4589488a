"""The field: what a query's place among the landmarks foretells of every config, beyond what its patterns say.

Outcomes are predicted by a kernel regression on M landmarks: y_c(q) = base_c + φ(q)·coef_c, where φ holds the kernels
exp(a·(cos(q, landmark) − 1)) of every slope a (the Nyström method, Williams & Seeger 2001), and the cosine is that of
their projections on the axes along which queries spread most, as seen from the queries' mean: of many embedders all
queries lie in a narrow cone, whose cosines hardly differ. A constant beside them keeps how far a query lies from the
mean, which a cosine does not tell. NumPy only.
Axes: M landmarks, D dims, R of the projection, S = 2 slopes, F = M times S, C configs, O outcomes, U leaves and what
stands for none.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from rb_gpu.evidence import Evidence, Floats

Matrix = npt.NDArray[np.float32]
Vector = npt.NDArray[np.float32]

# of the kernels' slopes, least and greatest: a lookup's float32 holds e^64, and not e^128
SLOPE_BOUNDS = (0.5, 64.0)
# the arrays of bank.safetensors where there is a field: dtype, and axes (P leaves, besides those of the legend)
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
    """What BankData keeps of the field.

    slopes: (S,), the second twice the first, so that a lookup makes both kernels of one exponential. axes: (R, D)
    float32, orthonormal, and a last one of zeros. centre: (R,) float32, the queries' mean on the axes, and on the last
    minus the standard deviation of their distances from it. landmarks: (M, R) float32 of norm 1.
    coef: (F, C, O) float32, zeros for the outcomes that it does not foretell. base: (C, O). level_variance: (C, O) of
    each config's difference to the default over all queries, 0 where unknown. low, high: (C, O) least and greatest
    prediction of a training query, less base; gain_low, gain_high: of its difference to the default's. Nothing beyond
    them is foretold. mean: (U, C, O) mean prediction over each leaf's queries, less base; over all queries in the last
    row. gain_variance: (U, C, O) of a config's difference to the default for one query there, quality_variance: (U, C)
    of its mean quality, both without what a leaf's own evidence says. residual_*: as in Evidence, the leaves' moments
    of outcomes less what the field says of their queries without having seen them.
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
        """Evidence of the same rows whose outcomes are what the field left unexplained."""
        return evidence._replace(
            mean=self.residual_mean,
            comoment=self.residual_comoment,
            pair_mean=self.residual_pair_mean,
            pair_comoment=self.residual_pair_comoment,
        )
