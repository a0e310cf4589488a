"""The field in the form that a lookup needs: projection, landmarks and predictions, aligned with the cells of the
leaves.

Suffixes: M landmarks, D dims, R projected dims, B queries, F = M times the number of slopes, U leaves and a last row
for queries that are near no leaf, C configs, E columns.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from rb_gpu.bank_data import NO_CHANCE, BankData
from rb_gpu.evidence import OUTCOMES, Floats
from rb_gpu.normal import normal_quantile
from rb_gpu.objective import Objective
from rb_gpu.search import in_lines

Matrix = npt.NDArray[np.float32]


class FieldCells:
    """What a lookup averages over leaves, and what it adds for the query, if there is a field; for one objective.

    cells_UE: the four blocks of BankState (score, probability, gain, quality), less the field's mean prediction for
        each leaf since `shift` adds the prediction for the query itself, and a fifth block, the standard deviation of
        the test variable (see Beliefs). The block of probabilities instead holds test − least_z·sd, which is at least 0
        exactly if the probability reaches min_probability.
    block: for each of the first four blocks, which columns of `shift` are added to it; blocks with the same prediction
        share their columns.
    column_E: the same as `block`, one entry for each column of the four blocks.
    """

    def __init__(
        self, data: BankData, objective: Objective, test_UC: Floats, test_sd_UC: Floats, cells_UE: Matrix
    ) -> None:
        field, default, configs = data.field, data.default, len(data.arrays["margin"])
        if field is None:
            raise ValueError("this bank has no field")
        floor = objective.kind == "floor"
        expense = np.zeros(len(OUTCOMES))
        by_cost = (data.arrays["evidence_mean"][..., OUTCOMES.index("cost")] > 0).any()
        expense[OUTCOMES.index("cost" if by_cost else "log2_latency")] = -1.0
        quality_O, gain_O = objective.quality_direction, objective.direction
        said = [(gain_O, True), (quality_O, False), (expense, False)][: 3 if floor else 2]
        said_of_block = (2, 1, 0, 1) if floor else (0, 0, 0, 1)
        # landmarks are scaled by the first slope, and the kernels' constant factor e^-slope is folded into the
        # coefficients
        self.axes_RD, self.centre_R = in_lines(field.axes), field.centre
        self.landmarks_MR = in_lines(field.landmarks * np.float32(field.slopes[0]))
        constant_F = np.exp(-np.repeat(field.slopes, len(field.landmarks)))
        shift, means, low, high = [], [], [], []
        cells = cells_UE.astype(np.float64)
        self.least_z = normal_quantile(data.lookup.min_probability)
        cells[:, configs : 2 * configs] = test_UC - self.least_z * test_sd_UC.astype(np.float64)
        for direction_O, relative in said:
            part, mean = field.coef @ direction_O, field.mean @ direction_O
            ends = (field.gain_low, field.gain_high) if relative else (field.low, field.high)
            low.append(np.minimum(ends[0] * direction_O, ends[1] * direction_O).sum(1))
            high.append(np.maximum(ends[0] * direction_O, ends[1] * direction_O).sum(1))
            if relative:
                part, mean = part - part[:, [default]], mean - mean[:, [default]]
            shift.append(part)
            means.append(mean)
        for block, one in enumerate(said_of_block):
            # the last row stands for a query that is near no leaf; the field makes no prediction for it
            cells[:-1, block * configs : (block + 1) * configs] -= means[one][:-1]
        if not floor:
            # if the default could beat itself, the answer would name a pattern as its source
            cells[:, configs + default] = NO_CHANCE
        self._low_E, self._high_E = (np.concatenate(end).astype(np.float32) for end in (low, high))
        # each column contiguous: the product for one query is then twice as fast
        self._first_ME, self._second_ME = (
            in_lines(part_ME.T).T for part_ME in np.split(np.concatenate(shift, 1) * constant_F[:, None], 2)
        )
        self.width, self.block = len(self._low_E), [slice(i * configs, (i + 1) * configs) for i in said_of_block]
        self.column_E = np.concatenate([np.arange(columns.start, columns.stop) for columns in self.block])
        self.cells_UE = np.concatenate([cells, test_sd_UC], 1).astype(np.float32)

    def shift(self, x_D: Matrix, scale: float) -> Matrix:
        """(width,) the field's prediction for one query of norm 1 / scale, clipped to the range of its predictions for
        training queries, so that it does not extrapolate to a query unlike all of them.
        """
        place_R = self.axes_RD.dot(x_D)
        place_R -= self.centre_R * (1.0 / scale)
        norm = math.sqrt(place_R.dot(place_R))
        place_R *= 1.0 / norm if norm > 0 else 0.0
        return self._said(self.landmarks_MR.dot(place_R))

    def shifts(self, x_BD: Matrix, scale_B: Matrix) -> Matrix:
        """The same for many queries, (B, width)."""
        place_BR: Matrix = x_BD @ self.axes_RD.T
        place_BR -= self.centre_R / scale_B[:, None]
        norm_B: Matrix = np.sqrt(np.einsum("br,br->b", place_BR, place_BR))
        norm_B[norm_B == 0] = np.inf
        steep_BM: Matrix = place_BR @ self.landmarks_MR.T
        np.divide(steep_BM, norm_B[:, None], out=steep_BM)
        return self._said(steep_BM)

    def _said(self, steep_M: Matrix) -> Matrix:
        """(..., width) predictions, clipped, from the first slope times the cosines to the landmarks (..., M)."""
        kernel = np.exp(steep_M)
        found: Matrix = kernel.dot(self._first_ME)
        kernel *= kernel  # the kernel of the second slope, which is twice the first
        found += kernel.dot(self._second_ME)
        np.maximum(found, self._low_E, out=found)
        return np.minimum(found, self._high_E, out=found)
