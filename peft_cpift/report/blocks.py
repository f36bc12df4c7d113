"""What a report is made of: sections of paragraphs, tables, curves and folded texts, without any form yet.

`markdown` and `html` give them one. All strings are plain text: names come from users, and each form escapes them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias


@dataclass(frozen=True)
class Cell:
    """One cell of a table."""

    text: str
    shade: float | None = None
    """Depth of its colour in a heat map, in [0, 1]; None leaves it plain."""
    strong: bool = False
    """Whether it stands out, as the best of its column does."""
    edges: str = ""
    """Sides at which it is framed: any of `top`, `right`, `bottom`, `left`."""
    note: str = ""
    """A second, smaller line, where there is room for one."""


@dataclass(frozen=True)
class Table:
    """A table; the first cell of each row is its heading."""

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[Cell | str]]
    breaks: frozenset[int] = frozenset()
    """Numbers of the rows above which a line is drawn."""
    key: str = ""
    """What its colours and frames mean, for pages that have any."""
    dense: bool = False
    """Many narrow columns; too wide for a page of plain text, which leaves it out."""

    def cells(self) -> list[list[Cell]]:
        """All rows, strings made cells."""
        return [[cell if isinstance(cell, Cell) else Cell(cell) for cell in row] for row in self.rows]


@dataclass(frozen=True)
class Chart:
    """A small drawing with a title and a line below it."""

    title: str
    svg: str
    """Markup, safe as it is."""
    caption: str = ""


@dataclass(frozen=True)
class Charts:
    """Drawings side by side. A page of plain text leaves them out."""

    caption: str
    charts: Sequence[Chart]
    legend: Sequence[str] = ()
    """What the lines of each drawing are, if there are several."""


@dataclass(frozen=True)
class Folded:
    """Something long that is shown when asked for: a table, or text as it is."""

    summary: str
    content: Table | str


ABSENT = "\N{EN DASH}"
"""Stands where there is no number."""

Block: TypeAlias = "str | Table | Charts | Folded"


@dataclass(frozen=True)
class Section:
    """A part of the report under a heading of its own."""

    anchor: str
    title: str
    blocks: list[Block] = field(default_factory=list)


def shaded(texts: Iterable[str], values: Sequence[float | None], largest: float | None = None) -> list[Cell]:
    """Cells of a heat map, shaded from 0 to `largest`, by default the largest of `values`; None stays plain."""
    top = max((v for v in values if v is not None), default=0) if largest is None else largest
    return [
        Cell(text, None if value is None else min(1.0, max(0.0, value / top)) if top > 0 else 0.0)
        for text, value in zip(texts, values, strict=True)
    ]


def mark_best(rows: list[list[Cell]], among: Sequence[int], columns: Iterable[int]) -> None:
    """Mark, in place, the largest number of each column among some rows. Numbers that look equal are equally good,
    and where all do, none stands out.
    """
    if len(among) < 2:
        return
    for j in columns:
        numbers = [float(rows[i][j].text) for i in among]
        for i, number in zip(among, numbers, strict=True):
            rows[i][j] = replace(rows[i][j], strong=number == max(numbers) > min(numbers))
