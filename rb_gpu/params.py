"""Search parameters, their bounds, and their quantisation to configs (the arms that are judged).

Suffixes: N rows, C configs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from rb_gpu.errors import ConfigError

PARAMETERS = ("ef_search", "n_probes", "model_tier", "context_tokens", "temperature")
COUNT_PARAMETERS = ("ef_search", "n_probes", "context_tokens")
MAX_COUNT = 2**32 - 1
MAX_TEMPERATURE = 2.0
# temperatures that differ by less are the same
SAME_TEMPERATURE = 1e-6
MAX_CONFIGS = 4096
AUTO_TIER = "auto"

ModelTier = str


@dataclass(frozen=True)
class SearchParams:
    """One joint setting of everything that a service may tune for a query.

    The default values stand in for a column that a table lacks (reference section 2; its `ModelTier::Auto` and 2048
    tokens). Raises ConfigError if a value is outside its bounds.
    """

    ef_search: int = 100
    n_probes: int = 8
    model_tier: ModelTier = AUTO_TIER
    context_tokens: int = 2048
    temperature: float = 0.7

    def __post_init__(self) -> None:
        for name in COUNT_PARAMETERS:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or not 1 <= value <= MAX_COUNT:
                raise ConfigError(f"{name}={value!r} is not an integer in [1, {MAX_COUNT}]; give a positive integer")
        if not isinstance(self.model_tier, str) or not self.model_tier:
            raise ConfigError(f"model_tier={self.model_tier!r} is not a non-empty string; give the tier's name")
        number = isinstance(self.temperature, (int, float, np.number)) and not isinstance(self.temperature, bool)
        if not (number and 0.0 <= self.temperature <= MAX_TEMPERATURE):  # false for NaN too
            raise ConfigError(
                f"temperature={self.temperature!r} is not a number in [0, {MAX_TEMPERATURE:g}]; give one in it"
            )

    def as_dict(self) -> dict[str, Any]:
        """The five parameters by name, as plain Python values."""
        values = asdict(self)
        return values | {k: v.item() for k, v in values.items() if isinstance(v, np.generic)}

    def describe(self, names: Sequence[str]) -> str:
        """The parameters `names` as text, such as `ef_search=64 temperature=0.7`."""
        values = self.as_dict()
        return " ".join(f"{n}={values[n]:.3g}" if n == "temperature" else f"{n}={values[n]}" for n in names)


def decimal(value: np.float32) -> float:
    """The shortest decimal that rounds to `value` in float32: 0.7, as it was given, not 0.699999988."""
    return float(str(value))


@dataclass(frozen=True)
class ConfigTable:
    """The C configs that a bank knows, one column per parameter, sorted so that equal tables have equal ids.

    ef_search, n_probes, context_tokens: (C,) uint32. tier: (C,) uint32, index into `tiers` (cheapest first).
    temperature: (C,) float32. default: row of the config that runs when nothing is known.
    """

    ef_search: npt.NDArray[np.uint32]
    n_probes: npt.NDArray[np.uint32]
    tier: npt.NDArray[np.uint32]
    context_tokens: npt.NDArray[np.uint32]
    temperature: npt.NDArray[np.float32]
    tiers: tuple[str, ...]
    default: int

    def __len__(self) -> int:
        return len(self.ef_search)

    def __getitem__(self, config_id: int) -> SearchParams:
        return SearchParams(
            ef_search=int(self.ef_search[config_id]),
            n_probes=int(self.n_probes[config_id]),
            model_tier=self.tiers[int(self.tier[config_id])],
            context_tokens=int(self.context_tokens[config_id]),
            temperature=decimal(self.temperature[config_id]),
        )

    def __iter__(self) -> Iterator[SearchParams]:
        return (self[i] for i in range(len(self)))

    def id_of(self, params: SearchParams) -> int | None:
        """Row of the config equal to `params` (temperatures within SAME_TEMPERATURE), or None if it was never tried.
        Raises TypeError where `params` is of another type.
        """
        if not isinstance(params, SearchParams):
            raise TypeError(f"params={params!r} is not a SearchParams; give SearchParams(ef_search=64, ...)")
        if params.model_tier not in self.tiers:
            return None
        same = (
            (self.ef_search == params.ef_search)
            & (self.n_probes == params.n_probes)
            & (self.tier == self.tiers.index(params.model_tier))
            & (self.context_tokens == params.context_tokens)
            & np.isclose(self.temperature, params.temperature, rtol=0, atol=SAME_TEMPERATURE)
        )
        rows = np.flatnonzero(same)
        return int(rows[0]) if len(rows) else None

    def describe(self, config_id: int) -> str:
        """The parameters in which the table's configs differ, such as `ef_search=64 n_probes=8`."""
        columns = {name: getattr(self, "tier" if name == "model_tier" else name) for name in PARAMETERS}
        varying = [name for name in PARAMETERS if len(np.unique(columns[name])) > 1] or ["ef_search"]
        return self[config_id].describe(varying)

    @classmethod
    def from_params(cls, params: Sequence[SearchParams], tiers: Sequence[str], default: int) -> ConfigTable:
        """A table of the given rows, in the given order."""
        return cls(
            ef_search=np.array([p.ef_search for p in params], dtype=np.uint32),
            n_probes=np.array([p.n_probes for p in params], dtype=np.uint32),
            tier=np.array([tiers.index(p.model_tier) for p in params], dtype=np.uint32),
            context_tokens=np.array([p.context_tokens for p in params], dtype=np.uint32),
            temperature=np.array([p.temperature for p in params], dtype=np.float32),
            tiers=tuple(tiers),
            default=default,
        )


def quantise(
    columns: Mapping[str, npt.NDArray[Any]], tiers: Sequence[str], temperature_step: float, context_step: int
) -> tuple[ConfigTable, npt.NDArray[np.int64]]:
    """The distinct configs of N rows, and each row's config.

    columns: ef_search, n_probes, context_tokens (N,) integers; model_tier (N,) index into `tiers`; temperature (N,).
    Temperatures are rounded to the nearest multiple of `temperature_step`, contexts to the nearest positive multiple of
    `context_step`. Returns a table (default row 0, which the caller sets) and config_id (N,) int64. Raises ConfigError
    if there are more than MAX_CONFIGS.
    """
    context = np.asarray(columns["context_tokens"], dtype=np.int64)
    if context_step > 1:
        steps = np.maximum(np.rint(context / context_step).astype(np.int64), 1)  # 0 tokens would be no valid context
        context = np.minimum(steps * context_step, MAX_COUNT)
    keys = [
        np.asarray(columns["ef_search"], dtype=np.int64),
        np.asarray(columns["n_probes"], dtype=np.int64),
        np.asarray(columns["model_tier"], dtype=np.int64),
        context,
        np.rint(np.asarray(columns["temperature"], dtype=np.float64) / temperature_step).astype(np.int64),
    ]
    rows, config_id = _unique_rows(keys)
    if len(rows) > MAX_CONFIGS:
        widths = {name: len(np.unique(rows[:, i])) for i, name in enumerate(PARAMETERS)}
        widest = max(widths, key=lambda name: widths[name])
        raise ConfigError(
            f"the table has {len(rows)} distinct configs, over the limit of {MAX_CONFIGS}; {widest} alone has "
            f"{widths[widest]} values; raise params.context_step or params.temperature_step, or bin {widest} in the log"
        )
    table = ConfigTable(
        ef_search=rows[:, 0].astype(np.uint32),
        n_probes=rows[:, 1].astype(np.uint32),
        tier=rows[:, 2].astype(np.uint32),
        context_tokens=rows[:, 3].astype(np.uint32),
        temperature=np.minimum(rows[:, 4] * temperature_step, MAX_TEMPERATURE).astype(np.float32),
        tiers=tuple(tiers),
        default=0,
    )
    return table, config_id


def _unique_rows(columns: Sequence[npt.NDArray[np.int64]]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """The distinct rows of M columns (N,), in lexicographic order (C, M), and each row's index among them (N,)."""
    code, count = np.zeros(len(columns[0]), dtype=np.int64), min(len(columns[0]), 1)
    for column in columns:
        if (column == column[:1]).all():
            continue
        # coding column by column is fast for millions of rows; recoding to the codes in use keeps them within int64
        inverse, values = _codes(column)
        code, count = (inverse, values) if count == 1 else _codes(code * values + inverse)
    of_code = np.empty(count, dtype=np.int64)
    of_code[code] = np.arange(len(code))  # rows of the same code are equal, so any of them will do
    return np.stack([column[of_code] for column in columns], axis=1), code


def _codes(values_N: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], int]:
    """Each value's rank among the distinct values (N,), and the number of distinct values."""
    if len(values_N) == 0:
        return values_N, 0
    offset_N = values_N - values_N.min()
    span = int(offset_N.max()) + 1
    if span > max(len(values_N), 1 << 16):
        distinct, inverse_N = np.unique(values_N, return_inverse=True)
        return inverse_N.astype(np.int64), len(distinct)
    used = np.zeros(span, dtype=np.int64)  # marking takes a few passes over the data, sorting many
    used[offset_N] = 1
    rank = np.cumsum(used)
    return rank[offset_N] - 1, int(rank[-1])


def snap(value: float, tried: npt.NDArray[Any]) -> int:
    """The tried value nearest to `value`; the smaller one of a tie."""
    values = np.unique(np.asarray(tried, dtype=np.float64))
    return int(values[np.argmin(np.abs(values - value))])


def round_half_up(value: float) -> int:
    """Rounds halves away from zero, as Rust's `f32::round` does in the reference document, for value >= 0."""
    whole = math.floor(value)
    return whole + (value - whole >= 0.5)
