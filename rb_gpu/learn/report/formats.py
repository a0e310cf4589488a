"""Numbers and dates as the report writes them; what is not known (None or NaN) is a dash."""

from __future__ import annotations

import math
from datetime import UTC, datetime

UNKNOWN = "–"


def number(value: float | None, digits: int = 4) -> str:
    """With `digits` decimals, a thousands separator, and no sign but the minus of what is not 0."""
    return UNKNOWN if value is None or not math.isfinite(value) else f"{value:z,.{digits}f}"


def signed(value: float | None, digits: int = 4) -> str:
    """The same with its sign, of differences."""
    return UNKNOWN if value is None or not math.isfinite(value) else f"{value:+,.{digits}f}"


def short(value: float | None, digits: int = 3) -> str:
    """To `digits` significant ones, of amounts whose size is not known before: cost, latency, p-values."""
    if value is None or not math.isfinite(value):
        return UNKNOWN
    if value != 0 and abs(value) < 1e-4:
        return f"{value:.{digits - 1}e}"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value)))) if value else 0
    return f"{value:,.{decimals}f}"


def percent(value: float | None, digits: int = 1) -> str:
    """Of a share from 0 to 1."""
    return UNKNOWN if value is None or not math.isfinite(value) else f"{100 * value:.{digits}f} %"


def change(before: float | None, after: float | None) -> str:
    """From one amount to another in percent, as a factor from twice on."""
    if before is None or after is None or not before > 0:
        return UNKNOWN
    ratio = after / before
    return f"×{ratio:.3g}" if ratio >= 2 else f"{100 * (ratio - 1):+.1f} %"


def interval(low: float | None, high: float | None, digits: int = 4) -> str:
    """The two ends of an interval of differences."""
    return UNKNOWN if low is None or high is None else f"{low:+.{digits}f} to {high:+.{digits}f}"


def milliseconds(microseconds: float | None) -> str:
    """The number alone; its unit stands in the column's head."""
    return UNKNOWN if microseconds is None else short(microseconds / 1e3)


def latency(microseconds: float) -> str:
    """With the unit that fits, for an axis."""
    unit, size = ("s", 1e6) if microseconds >= 1e6 else ("ms", 1e3) if microseconds >= 1e3 else ("µs", 1.0)
    return f"{microseconds / size:.3g} {unit}"


def count(value: float | None) -> str:
    """A whole number."""
    return UNKNOWN if value is None or not math.isfinite(value) else f"{value:,.0f}"


def counted(value: float, noun: str) -> str:
    """So many of what the noun names."""
    return f"{count(value)} {noun}" + "s" * (value != 1)


def sentence(text: str) -> str:
    """With a capital and a full stop, of what other modules say in half sentences."""
    return f"{text[:1].upper()}{text[1:]}."


def date(timestamp: int) -> str:
    """UTC, of seconds since 1970."""
    return datetime.fromtimestamp(timestamp, UTC).strftime("%Y-%m-%d %H:%M")
