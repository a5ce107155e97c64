"""What several rounds say: median, least, most; and how figures are written for people."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import NamedTuple


class Spread(NamedTuple):
    """Median, minimum and maximum of the rounds of one scenario on one server."""

    median: float
    least: float
    most: float
    rounds: int


def spread(values: Iterable[float]) -> Spread | None:
    """The spread of the values; None when there are none."""
    known = list(values)
    if not known:
        return None
    return Spread(statistics.median(known), min(known), max(known), len(known))


def ratio(ours: Spread | None, theirs: Spread | None) -> float | None:
    """Our median by theirs; None when either is missing or theirs is nothing."""
    if ours is None or theirs is None or theirs.median == 0:
        return None
    return ours.median / theirs.median


def figure(value: float | None) -> str:
    """A number with about three digits: ``0.23``, ``4.1``, ``12``, ``2,600``; a dash for none."""
    if value is None:
        return "–"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    if abs(value) >= 10:
        return f"{value:.1f}".removesuffix(".0")
    return f"{value:.2f}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table with columns aligned, the first to the left: it is read in terminals and in documents."""
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]

    def line(cells: Sequence[str]) -> str:
        padded = [
            cells[0].ljust(widths[0]),
            *(c.rjust(w) for c, w in zip(cells[1:], widths[1:], strict=True)),
        ]
        return f"| {' | '.join(padded)} |"

    rule = ["-" * widths[0], *("-" * (w - 1) + ":" for w in widths[1:])]
    return "\n".join([line(head), line(rule), *map(line, rows)])
