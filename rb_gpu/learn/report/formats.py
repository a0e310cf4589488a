"""Formats numbers and dates for the report; an unknown value (None or NaN) becomes a dash."""

from __future__ import annotations

import math
from datetime import UTC, datetime

UNKNOWN = "–"


def number(value: float | None, digits: int = 4) -> str:
    """With `digits` decimals and thousands separators; a minus only if the rounded value is not 0."""
    return UNKNOWN if value is None or not math.isfinite(value) else f"{value:z,.{digits}f}"


def signed(value: float | None, digits: int = 4) -> str:
    """A difference: always with its sign, `digits` decimals and thousands separators."""
    return UNKNOWN if value is None or not math.isfinite(value) else f"{value:+,.{digits}f}"


def short(value: float | None, digits: int = 3) -> str:
    """With `digits` significant digits, for amounts of any size: cost, latency, p-values."""
    if value is None or not math.isfinite(value):
        return UNKNOWN
    if value != 0 and abs(value) < 1e-4:
        return f"{value:.{digits - 1}e}"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value)))) if value else 0
    return f"{value:,.{decimals}f}"


def percent(value: float | None, digits: int = 1) -> str:
    """A share from 0 to 1 as a percentage."""
    return UNKNOWN if value is None or not math.isfinite(value) else f"{100 * value:.{digits}f} %"


def change(before: float | None, after: float | None) -> str:
    """The relative change between two amounts: in percent, or as a factor if the amount at least doubles."""
    if before is None or after is None or not before > 0:
        return UNKNOWN
    ratio = after / before
    return f"×{ratio:.3g}" if ratio >= 2 else f"{100 * (ratio - 1):+.1f} %"


def interval(low: float | None, high: float | None, digits: int = 4) -> str:
    """The two ends of an interval of a difference, with signs."""
    return UNKNOWN if low is None or high is None else f"{low:+.{digits}f} to {high:+.{digits}f}"


def milliseconds(microseconds: float | None) -> str:
    """Microseconds as a number of milliseconds, without the unit, which is in the column's head."""
    return UNKNOWN if microseconds is None else short(microseconds / 1e3)


def latency(microseconds: float) -> str:
    """A latency in the unit that suits its size, for an axis."""
    unit, size = ("s", 1e6) if microseconds >= 1e6 else ("ms", 1e3) if microseconds >= 1e3 else ("µs", 1.0)
    return f"{microseconds / size:.3g} {unit}"


def count(value: float | None) -> str:
    """A whole number."""
    return UNKNOWN if value is None or not math.isfinite(value) else f"{value:,.0f}"


def counted(value: float, noun: str) -> str:
    """The number with its noun, in the plural unless it is 1."""
    return f"{count(value)} {noun}" + "s" * (value != 1)


def sentence(text: str) -> str:
    """The text as a sentence, with a capital letter and a full stop; messages of other modules have neither."""
    return f"{text[:1].upper()}{text[1:]}."


def date(timestamp: int) -> str:
    """A date in UTC from seconds since 1970."""
    return datetime.fromtimestamp(timestamp, UTC).strftime("%Y-%m-%d %H:%M")
