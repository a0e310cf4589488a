"""Whether logged propensities contradict the rows that they belong to, and what a user can do about it.

Suffixes: N rows, C configs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from rb_gpu.learn import estimators
from rb_gpu.params import ConfigTable

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

# how many configs with odd propensities a warning names
NAMED = 3


@dataclass(frozen=True)
class Propensities:
    """Rows with one config each: (N,) columns."""

    config_N: Ints
    pscore_N: Floats
    configs: ConfigTable

    @cached_property
    def odd(self) -> dict[int, float]:
        """Configs whose propensities contradict the rows (`estimators.odd_propensities`)."""
        return estimators.odd_propensities(self.config_N, self.pscore_N, len(self.configs))

    @cached_property
    def floored(self) -> tuple[int, float, float] | None:
        """Rows whose propensities are too low to be true (`estimators.floored`)."""
        return estimators.floored(self.pscore_N, len(self.configs))

    def too_low(self, weight_N: Floats) -> bool:
        """Whether any row of positive weight is one of `floored`."""
        return self.floored is not None and bool((self.pscore_N[weight_N > 0] <= self.floored[1]).any())

    def mislead(self, choice_Q: Ints) -> bool:
        """Whether the value of a choice rests on propensities that contradict the rows."""
        return bool(np.isin(choice_Q, list(self.odd)).any())

    def warnings(self) -> list[str]:
        """What is wrong with them, as far as they show it themselves."""
        seldom = {c: share for c, share in self.odd.items() if estimators.too_seldom(share, self.pscore_N)}
        wrong = {c: share for c, share in self.odd.items() if c not in seldom}
        said = []
        if wrong:
            said.append(
                f"{self._added_up(wrong)}; it is not the probability with which they were chosen, or some queries "
                "never get them: log the true one, or leave the column out; values that rest on it are wrong"
            )
        if seldom:
            said.append(
                f"{self._added_up(seldom)}; with propensities down to {self.pscore_N.min():.2g} they may have been "
                "tried too seldom to be judged: log more queries, or raise the least propensity; where none should be "
                "so low, log the true one; values that rest on it are wrong"
            )
        if self.floored is not None:
            rows, least, most = self.floored
            said.append(
                f"propensity: {rows} held-out rows have {least:.2g} or less, at most {most:.2g} are expected; log the "
                f"probability with which these were chosen, or leave them out: each counts as {1 / least:,.0f} rows"
            )
        return said

    def _added_up(self, odd: dict[int, float]) -> str:
        worst = sorted(odd, key=lambda c: -abs(math.log(odd[c])))[:NAMED]
        told = ", ".join(f"{self.configs.describe(c)}: {odd[c]:.2f}" for c in worst)
        return (
            f"propensity: 1/propensity of {len(odd)} config{'s' * (len(odd) > 1)} does not add up to the number of "
            f"held-out rows (as a share of it, 1 is expected: {told})"
        )
