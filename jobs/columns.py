"""Formats tables as aligned text columns that fit the width of the terminal."""

from __future__ import annotations

import math
import shutil
import sys
from collections.abc import Iterator, Sequence

from rb_gpu.learn.report.formats import short

GAP = "  "


def terminal_width() -> int:
    """Width of the terminal in characters; sys.maxsize if the output goes to a file or a pipe."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else sys.maxsize


def render(head: Sequence[str], rows: Sequence[Sequence[str]], room: int | None = None) -> str:
    """A table as text, with the first column left-aligned and the others right-aligned.

    Columns that do not fit into `room` characters continue in blocks below, each of which repeats the first column.
    room: width in characters; None uses the width of the terminal.
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
    """Splits the columns after the first into runs that fit next to the first column."""
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
    """The number formatted with the format spec `form`, or a dash if it is not finite (unknown)."""
    return f"{value:{form}}{unit}" if math.isfinite(value) else "-"


def amount(value: float, digits: int = 3) -> str:
    """The number with `digits` significant digits, as in the report, or a dash if it is not finite (unknown)."""
    return short(value, digits) if math.isfinite(value) else "-"
