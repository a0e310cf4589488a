"""How two published versions differ: settings, configs, patterns, verdicts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from rb_gpu.bank_data import BankData
from rb_gpu.params import PARAMETERS

# stands for a verdict that nothing beats the default
STANDS = "default"


@dataclass(frozen=True)
class ChangedVerdict:
    """A leaf of both versions whose verdict changed; pairs are before and after. gain: in the objective's unit, NaN
    where the default stands.
    """

    pattern_id: int
    support: tuple[int, int]
    config: tuple[str, str]
    gain: tuple[float, float]


@dataclass(frozen=True)
class Comparison:
    """Differences between a version before and one after.

    kept, gone, new: ids of patterns of all levels that are in both, only in the first, only in the second. fates: how
    many were kept, split, merged, born and retired by the later one's lineage, None if it descends from another
    version. leaves_kept: number of leaves in both. verdicts: those of them whose verdict changed, by falling support.
    configs_gone, configs_new: configs that only one of them knows. default: of each. settings: key, before and after,
    where they differ.
    """

    kept: list[int]
    gone: list[int]
    new: list[int]
    fates: dict[str, int] | None
    leaves_kept: int
    verdicts: list[ChangedVerdict]
    configs_gone: list[str]
    configs_new: list[str]
    default: tuple[str, str]
    settings: list[tuple[str, str, str]]


def compare(before: BankData, after: BankData) -> Comparison:
    """Compares two banks that were loaded from a registry, so that their facts are their manifests."""
    was, now = (set(map(int, one.arrays["pattern_id"])) for one in (before, after))
    configs = _described(before, after)
    lineage = after.facts.get("lineage") or {}
    leaves = [{int(one): row for row, one in enumerate(b.arrays["pattern_id"][: b.leaves])} for b in (before, after)]
    common = leaves[0].keys() & leaves[1].keys()
    changed = []
    for one in common:
        old, new = (
            _verdict(b, row[one], names) for b, row, names in zip((before, after), leaves, configs, strict=True)
        )
        if old[1] != new[1]:
            changed.append(ChangedVerdict(one, (old[0], new[0]), (old[1], new[1]), (old[2], new[2])))
    settings = [_flat(one.facts.get("config") or {}) for one in (before, after)]
    keys = sorted(settings[0].keys() | settings[1].keys())
    pairs = [(key, *(str(one.get(key, "-")) for one in settings)) for key in keys]
    return Comparison(
        kept=sorted(was & now),
        gone=sorted(was - now),
        new=sorted(now - was),
        fates=lineage["counts"] if lineage.get("parent") == before.facts["version"] else None,
        leaves_kept=len(common),
        verdicts=sorted(changed, key=lambda one: (-one.support[1], one.pattern_id)),
        configs_gone=[name for name in configs[0] if name not in configs[1]],
        configs_new=[name for name in configs[1] if name not in configs[0]],
        default=(configs[0][before.default], configs[1][after.default]),
        settings=[(key, old, new) for key, old, new in pairs if old != new],
    )


def _described(*banks: BankData) -> list[list[str]]:
    """Each bank's configs, described by the parameters in which any two configs of all banks differ."""
    everything = [params for bank in banks for params in bank.configs]
    varying = [name for name in PARAMETERS if len({getattr(params, name) for params in everything}) > 1]
    return [[params.describe(varying or PARAMETERS[:1]) for params in bank.configs] for bank in banks]


def _verdict(bank: BankData, row: int, configs: list[str]) -> tuple[int, str, float]:
    """Support, config and gain of a leaf."""
    arrays, support = bank.arrays, int(bank.arrays["support"][row])
    if arrays["verdict_stands"][row]:
        return support, STANDS, math.nan
    return support, configs[int(arrays["verdict_config"][row])], float(arrays["verdict_effect"][row])


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as one level of dotted keys."""
    out: dict[str, Any] = {}
    for key, value in settings.items():
        nested = isinstance(value, dict) and value
        out |= _flat(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return out
