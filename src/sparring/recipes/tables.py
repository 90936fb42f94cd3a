"""Results as tables, for a round's file and for the summary."""

from __future__ import annotations

from collections.abc import Sequence

from sparring.log import table
from sparring.phases.evaluate import Row, Table


def result_table(
    rows: Sequence[Row], tables: Sequence[tuple[str, Table]], measures: Sequence[str], *, markdown: bool = False
) -> str:
    """Baselines, then three rows for each state of the pair."""
    cells = [[row.name, *(str(row.estimates[m]) for m in measures)] for row in rows]
    for name, found in tables:
        cells += [[f"{name}: {cell[0]}", *cell[1:]] for cell in found.cells(measures)]
    return table(cells, ["system", *measures], markdown=markdown)
