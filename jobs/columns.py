"""Columns of text, as wide as the terminal at most."""

from __future__ import annotations

import math
import shutil
import sys
from collections.abc import Iterator, Sequence

from rb_gpu.learn.report.formats import short

GAP = "  "


def terminal_width() -> int:
    """Columns of the terminal that is written to; where it is a file or a pipe, there is no end to a line."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else sys.maxsize


def render(head: Sequence[str], rows: Sequence[Sequence[str]], room: int | None = None) -> str:
    """Columns aligned: the first to the left, the others to the right. Where a line of `room` columns is too narrow,
    those that do not fit follow below, each time with the first. room: None is the terminal's.
    """
    lines = [list(head), *map(list, rows)]
    width = [max(len(line[i]) for line in lines) for i in range(len(head))]
    blocks = _blocks(width, terminal_width() if room is None else room)
    return "\n\n".join(
        "\n".join(
            GAP.join([line[0].ljust(width[0]), *(line[i].rjust(width[i]) for i in block)]).rstrip() for line in lines
        )
        for block in blocks
    )


def _blocks(width: Sequence[int], room: int) -> Iterator[list[int]]:
    """The columns after the first, in runs that fit beside it."""
    block: list[int] = []
    taken = width[0]
    for column in range(1, len(width)):
        taken += len(GAP) + width[column]
        if block and taken > room:
            yield block
            block, taken = [], width[0] + len(GAP) + width[column]
        block.append(column)
    yield block


def number(value: float, form: str, unit: str = "") -> str:
    """The number in the given form, or a dash where it is not known."""
    return f"{value:{form}}{unit}" if math.isfinite(value) else "-"


def amount(value: float, digits: int = 3) -> str:
    """To `digits` significant ones as the report writes it, or a dash where it is not known."""
    return short(value, digits) if math.isfinite(value) else "-"
