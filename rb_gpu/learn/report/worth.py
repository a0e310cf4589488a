"""The value of each policy on the held-out queries, and reasons to doubt these values.

`evaluation` has the fields of policy.Evaluation as plain values of the manifest; None stands for an unknown number.
"""

from __future__ import annotations

from typing import Any

from markupsafe import Markup

from rb_gpu.learn.charts import whisker
from rb_gpu.learn.policy import SINGLE
from rb_gpu.learn.report.formats import UNKNOWN, count, interval, milliseconds, number, percent, short, signed
from rb_gpu.learn.report.pieces import Table
from rb_gpu.registry import CHAMPION

# the policies whose intervals set the scale: one far off, such as the oracle, would make the others look alike
COMPARED = ("default", SINGLE, "bank", CHAMPION)


def policy_tables(evaluation: dict[str, Any]) -> list[Table]:
    """A table of each policy's utility and the bank's gain over it, both drawn; one of quality, cost, latency and harm;
    and one of other estimators if values are estimated.
    """
    values, gains = evaluation["values"], evaluation["bank_gains"]
    ends = _ends([(value["low"], value["high"]) for value in values if value["name"] in COMPARED])
    gain_ends = _ends([(0.0, 0.0), *((gain["low"], gain["high"]) for name, gain in gains.items() if name in COMPARED)])
    default = next(value["utility"] for value in values if value["name"] == "default")
    worth: list[tuple[str, ...]] = []
    for value in values:
        gain = gains.get(value["name"], {"gain": None, "low": None, "high": None})
        worth.append((
            Markup("<b>{}</b>").format(value["name"]) if value["name"] == "bank" else value["name"],
            number(value["utility"]),
            whisker(value["low"], value["utility"], value["high"], ends, default),
            UNKNOWN if value["low"] is None else f"{number(value['low'])} to {number(value['high'])}",
            signed(gain["gain"]),
            whisker(gain["low"], gain["gain"], gain["high"], gain_ends, 0.0),
            interval(gain["low"], gain["high"]),
        ))  # fmt: skip
    touched = [
        (
            value["name"], number(value["quality"]), short(value["cost"], 4), milliseconds(value["latency_p50_us"]),
            milliseconds(value["latency_p95_us"]), milliseconds(value["latency_p99_us"]), percent(value["captured"]),
            number(value["regret"]), percent(value["acted"]), count(value["ess"]), percent(value["harm"]["negative"]),
            percent(value["harm"]["sure"]),
        )
        for value in values
    ]  # fmt: skip
    tables = [
        Table(
            "Utility of each policy on held-out queries",
            ("policy", "utility", f"{number(ends[0], 3)} to {number(ends[1], 3)}, line at default", "95 % interval",
             "bank's gain over it", f"{signed(gain_ends[0], 3)} to {signed(gain_ends[1], 3)}, line at 0",
             "95 % interval of the gain"),
            worth, drawn=(2, 5), sortable=True,
        ),
        Table(
            "Quality, cost, latency and harm of each policy on held-out queries",
            ("policy", "quality", "cost", "p50 ms", "p95 ms", "p99 ms", "gap closed", "regret", "acted",
             "effective rows", "harm", "sure harm"),
            touched, sortable=True,
        ),
    ]  # fmt: skip
    estimated = [value for value in values if value["estimates"]]
    if estimated:
        rows = [
            (value["name"], number(value["utility"]), *(number(one) for one in value["estimates"].values()))
            for value in estimated
        ]
        head = ("policy", "self-normalised dr (used)", *estimated[0]["estimates"])
        tables.append(Table("Utility by other estimators", head, rows, sortable=True))
    return tables


def _ends(intervals: list[tuple[float | None, float | None]]) -> tuple[float, float]:
    """The ends of a scale that covers all intervals, with half their range added on each side for values nearby."""
    known = [end for pair in intervals for end in pair if end is not None]
    low, high = min(known, default=0.0), max(known, default=1.0)
    room = (high - low) / 2 or 0.5
    return low - room, high + room


def doubts(evaluation: dict[str, Any]) -> list[str]:
    """The warnings about propensities, logged or missing, and why some policies have no value."""
    unknown = [f"{value['name']} has no value: {value['unknown']}" for value in evaluation["values"]
               if value["unknown"]]  # fmt: skip
    return [*evaluation["warnings"], *unknown]
