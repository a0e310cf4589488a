"""The building blocks of a section of the report. The templates turn them into HTML and escape all text but Markup."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup


@dataclass(frozen=True)
class Table:
    """A table. label: its caption, also for screen readers. head: the columns' names with units. words: indices of text
    columns, which are left-aligned, as the first always is. drawn: indices of columns of drawings, which cannot be
    sorted by.
    """

    label: str
    head: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    words: tuple[int, ...] = ()
    drawn: tuple[int, ...] = ()
    sortable: bool = False


@dataclass(frozen=True)
class Figure:
    """A drawing with a legend, a note on how to read it and, if they are few, its numbers as a table."""

    caption: str
    drawing: Markup
    legend: tuple[tuple[Markup, str], ...] = ()
    note: str = ""
    table: Table | None = None


@dataclass(frozen=True)
class Check:
    """One thing that may be wrong. state: good, bad, or none if unknown. section: id of the section with details."""

    state: str
    name: str
    text: str
    section: str
