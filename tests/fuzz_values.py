"""Hostile values, and helpers that all mutations share."""

from __future__ import annotations

from typing import Any

import numpy as np

Rng = np.random.Generator

HUGE = 10**400
INTEGERS = [-1, 0, 1, 2, 3, 7, 64, 255, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**40, 2**62, 2**63 - 1, 2**63, 2**64, HUGE]
VALUES: list[Any] = [
    None, True, False, "", "x", "\ud800", "a\0b", "é" * 100, [], {}, [[]], [1], {"a": 1}, 0.5, -0.5, 1.0, 1e308, -1e308,
    5e-324, float("nan"), float("inf"), float("-inf"), "1", "NaN", -HUGE, *INTEGERS,
]  # fmt: skip


def pick(rng: Rng, options: Any) -> Any:
    options = list(options)
    return options[rng.integers(len(options))]


def flip(rng: Rng, content: bytes, among: int | None = None) -> bytes:
    """Flips one bit, a few, or one in a hundred, in the first `among` bytes or in all."""
    if not content:
        return content
    among = min(among or len(content), len(content))
    count = pick(rng, [1, 1, 1, int(rng.integers(2, 17)), max(1, among * 8 // 100)])
    changed = np.frombuffer(content, np.uint8).copy()
    bits = rng.integers(among * 8, size=count)
    np.bitwise_xor.at(changed, bits // 8, (1 << bits % 8).astype(np.uint8))
    return changed.tobytes()


def resize(rng: Rng, content: bytes) -> bytes:
    if rng.integers(3):
        return content[
            : pick(rng, [0, 1, 7, 8, 9, len(content) // 2, len(content) - 1, int(rng.integers(len(content) + 1))])
        ]
    more = int(pick(rng, [1, 7, 8, 4096, 2**20]))
    return content + (rng.bytes(more) if rng.integers(2) else bytes(more))
