"""The rows that the field learns an outcome from, and how surely they tell each config's level, its mean outcome.

A table is full if every query ran once under every config. Float64 torch on the device.
Suffixes: Q queries, N rows, C configs.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from rb_gpu.evidence import ROUNDING
from rb_gpu.learn.ridge import TINY

# fewest rows with which a config may deviate from the others
LEAST_ROWS = 3


@dataclass(frozen=True)
class Rows:
    """The rows that an outcome is learned from, (N,) each: the row of its query, its config, and float64 weights.

    weight_N: regression weights, mean 1. importance_N: w / propensity, mean 1, with which a config's rows represent all
    queries. apart_CC: distances between configs (`ladder.distances`), None where no configs are comparable.
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
        """Whether every query ran exactly once under every config, all rows with the same weight."""
        if len(self.query_N) != self.queries * self.configs:
            return False
        cell = self.query_N * self.configs + self.config_N
        return bool((self.weight_N == self.weight_N[0]).all()) and len(torch.unique(cell)) == len(cell)

    @cached_property
    def effective(self) -> float:
        """Effective number of independent rows: the queries of a full table, else Kish's (Σw)²/Σw²."""
        return float(self.queries if self.full else self.weight_N.sum() ** 2 / self.weight_N.square().sum())

    @cached_property
    def members(self) -> dict[int, Tensor]:
        """Row indices of each config that has at least LEAST_ROWS rows."""
        found = {c: torch.nonzero(self.config_N == c).squeeze(1) for c in range(self.configs)}
        return {c: index for c, index in found.items() if len(index) >= LEAST_ROWS}

    @cached_property
    def last(self) -> Tensor:
        """Index of the last row of each (query, config) cell; a query may have run under one config several times."""
        cell_N = self.query_N * self.configs + self.config_N
        row_N = torch.arange(len(cell_N), device=cell_N.device)
        last = torch.full((self.queries * self.configs,), -1, device=cell_N.device)
        last.scatter_reduce_(0, cell_N, row_N, "amax")
        return last[last >= 0]

    def by_config(self, v_N: Tensor) -> Tensor:
        """(C,) sums of v_N over each config's rows."""
        return v_N.new_zeros(self.configs).index_add_(0, self.config_N, v_N)

    def levels(self, y_N: Tensor) -> Tensor:
        """(C,) importance-weighted mean of each config's rows; of all rows for a config without any."""
        weight_C, sum_C = self.by_config(self.importance_N), self.by_config(self.importance_N * y_N)
        return torch.where(weight_C > 0, sum_C / weight_C.clamp(min=TINY), sum_C.sum() / weight_C.sum())


def level_errors(rows: Rows, error_N: Tensor) -> tuple[Tensor, Tensor]:
    """(C,) variance of each config's importance-weighted mean, from the residuals error_N, infinite for a config with
    fewer than two rows; and (C,) the number of rows of each config.
    """
    count_C = torch.bincount(rows.config_N, minlength=rows.configs)
    total_C, squares_C = rows.by_config(rows.importance_N), rows.by_config((rows.importance_N * error_N).square())
    # the mean residual was added to the level, which costs one degree of freedom
    variance_C = squares_C / total_C.square().clamp(min=TINY) * count_C / (count_C - 1).clamp(min=1)
    return torch.where(count_C > 1, variance_C, torch.inf), count_C


def constant_levels(rows: Rows, level_C: Tensor) -> Tensor:
    """Covariance (C, C) of the levels if all rows of each config are equal, as in rb_gpu.moderation: that of one row
    among them deviating by as much as the levels differ; infinite for a config with a single row.
    """
    count_C = torch.bincount(rows.config_N, minlength=rows.configs)
    apart = level_C.max() - level_C.min()
    apart = torch.where(apart > ROUNDING * level_C.abs().max(), apart, 0.0)
    variance_C = apart.square() / (len(rows.config_N) * count_C.clamp(min=1))
    return torch.diag(torch.where(count_C > 1, variance_C, torch.inf))
