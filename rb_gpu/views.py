"""Patterns and verdicts of a bank as mappings by pattern id; each object is built from the arrays when it is asked
for.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from rb_gpu.bank_data import BankData
from rb_gpu.params import SearchParams, decimal
from rb_gpu.types import LearnedPattern, Verdict, VerdictEvidence


class PatternView(Mapping[int, LearnedPattern]):
    """All patterns of all levels, by id."""

    def __init__(self, data: BankData) -> None:
        self._data = data
        self._row = {int(pattern_id): row for row, pattern_id in enumerate(data.arrays["pattern_id"])}
        self._made: dict[int, LearnedPattern] = {}

    def __len__(self) -> int:
        return len(self._row)

    def __iter__(self) -> Iterator[int]:
        return iter(self._row)

    def __repr__(self) -> str:
        return f"<{len(self)} patterns of {self._data.dim} dims>"

    def __getitem__(self, pattern_id: int) -> LearnedPattern:
        return self.by_row(self._row[pattern_id])

    def row_of(self, pattern_id: int) -> int:
        """Row of a pattern in the arrays. Raises KeyError if there is no such pattern."""
        return self._row[pattern_id]

    def by_row(self, row: int) -> LearnedPattern:
        """The pattern at a row of the arrays."""
        made = self._made.get(row)
        if made is None:
            made = self._made[row] = self._make(row)
        return made

    def _make(self, row: int) -> LearnedPattern:
        arrays = self._data.arrays
        centroid = arrays["centroids"][row]
        centroid.flags.writeable = False
        children = np.flatnonzero(arrays["parent"] == row) if arrays["level"][row] else np.empty(0, np.int64)
        return LearnedPattern(
            id=int(arrays["pattern_id"][row]),
            centroid=centroid,
            optimal_params=SearchParams(
                ef_search=int(arrays["optimal_ef_search"][row]),
                n_probes=int(arrays["optimal_n_probes"][row]),
                model_tier=self._data.tiers[int(arrays["optimal_tier"][row])],
                context_tokens=int(arrays["optimal_context_tokens"][row]),
                temperature=decimal(arrays["optimal_temperature"][row]),
            ),
            confidence=float(arrays["confidence"][row]),
            quality=float(arrays["quality"][row]),
            support_count=int(arrays["support"][row]),
            avg_precision=float(arrays["precision"][row]),
            avg_recall=float(arrays["recall"][row]),
            avg_latency_us=int(arrays["latency_us"][row]),
            created_at=int(arrays["created_at"][row]),
            updated_at=int(arrays["updated_at"][row]),
            abstraction_level=int(arrays["level"][row]),
            children=tuple(int(i) for i in arrays["pattern_id"][children]),
        )


class VerdictView(Mapping[int, Verdict]):
    """The verdict of every leaf pattern, by pattern id, including those by which the default stands."""

    def __init__(self, data: BankData) -> None:
        self._data = data
        leaves = data.arrays["pattern_id"][: data.leaves]
        self._row = {int(pattern_id): row for row, pattern_id in enumerate(leaves)}

    def __len__(self) -> int:
        return len(self._row)

    def __iter__(self) -> Iterator[int]:
        return iter(self._row)

    def __repr__(self) -> str:
        return f"<{len(self)} verdicts>"

    def __getitem__(self, pattern_id: int) -> Verdict:
        row, data = self._row[pattern_id], self._data
        value: dict[str, Any] = {
            name.removeprefix("verdict_"): array[row].item()
            for name, array in data.arrays.items()
            if name.startswith("verdict_")
        }
        improvement = value["improvement"]
        return Verdict(
            pattern_id=pattern_id,
            recommended_params=data.configs[value["config"]],
            confidence=value["confidence"],
            evidence=VerdictEvidence(
                support_count=value["support"],
                avg_improvement=None if math.isnan(improvement) else improvement,
                p_value=value["p_value"],
                consistency=value["consistency"],
                p_adjusted=value["p_adjusted"],
                p_sequential=value["p_sequential"],
                effect=value["effect"],
                effect_low=value["effect_low"],
                effect_high=value["effect_high"],
                probability=value["probability"],
                method=data.method,
                grade=data.grade,
            ),
            config_id=value["config"],
            default_stands=bool(value["stands"]),
        )
