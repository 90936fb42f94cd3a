"""What both kinds of page are made of: tables, figures' rows, and the words that explain a measure."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sparring.report.figures import number, span
from sparring.report.read import Measures, Significance


@dataclass(frozen=True)
class Grid:
    """A table: the first cell of a row is its heading; ``strong`` are the places of rows that stand out."""

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    strong: frozenset[int] = frozenset()


def result_rows(name: str, rows: Mapping[str, Measures], measures: Sequence[str]) -> list[list[str]]:
    """A state's rows as table cells; a baseline is its own only row."""
    return [
        [row if row == name else f"{name}: {row}", *(span(found[measure]) for measure in measures)]
        for row, found in rows.items()
    ]


def p_value(p: float) -> str:
    """A p value as it is read: never 0."""
    return "< 0.0001" if p < 0.0001 else f"{p:.4f}"


def test_cells(test: Significance) -> list[str]:
    """Difference with interval, both p values, number of queries."""
    low, high = test.difference.low, test.difference.high
    moved = f"{test.difference.mean:+.3f}"
    moved += "" if low != low else f" [{low:+.3f}, {high:+.3f}]"
    return [moved, p_value(test.p_randomisation), p_value(test.p_t), str(test.queries)]


def settings_grid(section: str, values: Mapping[str, Any]) -> Grid:
    """A section of the configuration."""
    return Grid(f"[{section}]", ("setting", "value"), [[key, plain(value)] for key, value in values.items()])


def plain(value: Any) -> str:
    """A value of a configuration or of JSON as text."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def hardware_grid(hardware: Mapping[str, Any]) -> Grid:
    """Device, precision, threads, with their reasons."""
    rows = [[name, str(found[0]), str(found[1])] for name, found in hardware.items()]
    return Grid("Hardware", ("setting", "value", "why"), rows)


def versions_grid(versions: Mapping[str, Any]) -> Grid:
    """Versions of packages."""
    return Grid("Versions", ("package", "version"), [[name, str(version)] for name, version in versions.items()])


def explained(measure: str) -> str:
    """What a measure means, for a reader who does not know the field."""
    kind, _, k = measure.partition("@")
    return {
        "RR": f"1 divided by the place of the first right passage if it is among the first {k}, else 0, as a mean over "
        "queries. 1 is always first, 0.5 is second on average.",
        "nDCG": f"How close the first {k} are to the best possible order; 1 is the best order.",
        "R": f"The share of a query's right passages that are among the first {k}.",
        "Success": f"The share of queries with at least one right passage among the first {k}.",
    }.get(kind, "")


def duration(seconds: float) -> str:
    """Seconds as people say them."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.1f} h"


def moved(before: float, after: float) -> str:
    """The class of one query's change: better, worse or same, after rounding as shown."""
    first, last = number(before), number(after)
    return "same" if first == last else "better" if after > before else "worse"
