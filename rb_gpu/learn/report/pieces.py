"""What a section of the report is made of. The templates turn it into HTML, and escape every text that is no Markup."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup


@dataclass(frozen=True)
class Table:
    """label: what a screen reader calls it. head: names of the columns with their units. words: columns of text, which
    stand at the left, as the first always does. drawn: columns of drawings, which nobody sorts by.
    """

    label: str
    head: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    words: tuple[int, ...] = ()
    drawn: tuple[int, ...] = ()
    sortable: bool = False


@dataclass(frozen=True)
class Figure:
    """A drawing, what its marks stand for, how to read it, and the same numbers as a table where they are few."""

    caption: str
    drawing: Markup
    legend: tuple[tuple[Markup, str], ...] = ()
    note: str = ""
    table: Table | None = None


@dataclass(frozen=True)
class Check:
    """One thing that may be wrong. state: good, bad, or none where nothing can be said. section: where more is said."""

    state: str
    name: str
    text: str
    section: str
