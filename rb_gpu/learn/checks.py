"""Checks for all groups of settings: a failed check names the key, its value, the bound and a remedy."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from rb_gpu.errors import ConfigError
from rb_gpu.types import MAX_WEIGHT, is_real

MAX_SEED = 2**63 - 1


def check(key: str, value: Any, ok: bool, bound: str, remedy: str) -> None:
    """Raises ConfigError `key=value is not BOUND; REMEDY` unless ok."""
    if not ok:
        raise ConfigError(f"{key}={value} is not {bound}; {remedy}")


def check_choice(key: str, value: str, choices: tuple[str, ...]) -> None:
    """Raises ConfigError unless value is one of choices."""
    check(key, value, value in choices, f"one of {', '.join(choices)}", "choose one of them")


def check_count(key: str, value: int, least: int = 1) -> None:
    """Raises ConfigError unless value >= least."""
    ok = isinstance(value, (int, np.integer)) and not isinstance(value, bool) and value >= least
    check(key, value, ok, f"an integer >= {least}", f"raise it to {least} or more")


def check_seed(seed: int) -> None:
    """Raises ConfigError unless `seed` is valid for both torch and NumPy."""
    ok = isinstance(seed, (int, np.integer)) and not isinstance(seed, bool) and 0 <= seed <= MAX_SEED
    check("seed", seed, ok, f"an integer in [0, {MAX_SEED}]", "use 0")


def check_share(key: str, value: float) -> None:
    """Raises ConfigError unless 0 <= value <= 1."""
    check(key, value, is_real(value) and 0.0 <= value <= 1.0, "a share in [0, 1]", "give a number from 0 to 1")


def check_nonnegative(key: str, value: float) -> None:
    """Raises ConfigError unless value is finite and >= 0."""
    check(key, value, is_real(value) and math.isfinite(value) and value >= 0, "a finite number >= 0", "give 0 or more")


def check_weight(key: str, value: float) -> None:
    """Raises ConfigError unless a lookup can use value as a weight in float32: 0 <= value <= MAX_WEIGHT."""
    check(
        key,
        value,
        is_real(value) and 0 <= value <= MAX_WEIGHT,
        f"a number in [0, {MAX_WEIGHT:g}]",
        "lower it; 1 is already large",
    )


def is_auto(value: int | float | str | None) -> bool:
    """Whether a setting is to be derived from the data."""
    return value == "auto"
