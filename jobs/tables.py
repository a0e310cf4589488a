"""Tables for a terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rb_gpu.learn.policy import Evaluation


def render(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns aligned: the first to the left, the others to the right."""
    lines = [list(head), *map(list, rows)]
    width = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return "\n".join(
        "  ".join(cell.ljust(width[i]) if i == 0 else cell.rjust(width[i]) for i, cell in enumerate(line)).rstrip()
        for line in lines
    )


def policy_table(evaluation: Evaluation) -> str:
    """What each policy is worth on held-out queries, and the bank's gain over each with its 95 % interval."""
    head = ("policy", "utility", "quality", "cost", "p95 ms", "gap closed", "acted", "bank's gain over it [95 %]")
    rows = []
    for value in evaluation.values:
        gain = evaluation.bank_gains.get(value.name)
        rows.append(
            (
                value.name,
                number(value.utility, ".4f"),
                number(value.quality, ".4f"),
                number(value.cost, ",.4g"),
                number(value.latency_p95_us / 1000, ".3g"),
                number(100 * value.captured, ".1f", " %"),
                number(100 * value.acted, ".1f", " %"),
                "" if gain is None else f"{number(gain.gain, '+.4f')} [{gain.low:+.4f}, {gain.high:+.4f}]",
            )
        )
    return render(head, rows)


def number(value: float, form: str, unit: str = "") -> str:
    """The number in the given form, or a dash where it is not known."""
    return f"{value:{form}}{unit}" if math.isfinite(value) else "-"
