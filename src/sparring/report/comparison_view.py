"""What the page about a comparison shows, in the order in which it shows it."""

from __future__ import annotations

import math
from pathlib import PurePath
from typing import Any

from sparring.report import blocks
from sparring.report.blocks import Grid
from sparring.report.compared import Arm, Cell, Cells, Comparison
from sparring.report.figures import ROW_KEYS, Figure, Key, number, over_rounds, over_seeds, reach, span
from sparring.report.read import ROWS, Interval
from sparring.types import RETRIEVER

SEED = Key(0, "○", "each seed's own mean (line below)")
MEAN = Key(0, "●■◆", "mean over seeds, 95 % interval over queries")


def comparison_view(found: Comparison) -> dict[str, Any]:
    """The names that comparison.html.j2 uses."""
    source = PurePath(str(found.data["source"])).name
    return {
        "found": found, "title": f"{len(found.arms)} ways to train on {source}", "source": source,
        "explain": blocks.explained, "chart": chart(found), "results": results(found), "costs": costs(found),
        "tests": tests(found), "tuning": tuning(found), "curves": curves(found), "queries": found.shown or {},
        "number": number, "moved": blocks.moved,
        "settings": Grid(
            "Settings of each arm", ("arm", "recipe", "settings"),
            [[arm.name, arm.recipe, _settings(arm)] for arm in found.arms],
        ),
        "data": Grid("Data", ("", "value"), [[key, blocks.plain(value)] for key, value in found.data.items()]),
        "hardware": blocks.hardware_grid(found.hardware), "versions": blocks.versions_grid(found.versions),
    }  # fmt: skip


def _settings(arm: Arm) -> str:
    return ", ".join(f"{key} = {blocks.plain(value)}" for key, value in arm.settings.items())


def _systems(found: Comparison, row: str) -> list[tuple[str, Cell]]:
    """References and arms with a cell of this row; a reference with one row of its own counts as a retriever."""
    systems: list[tuple[str, Cells]] = [(r.name, r.rows) for r in found.references]
    systems += [(arm.name, arm.rows) for arm in found.arms]
    cells = []
    for name, rows in systems:
        own = rows.get(row) or (rows.get(name) if row == RETRIEVER else None)
        if own:
            cells.append((name, own[found.measure]))
    return cells


def chart(found: Comparison) -> Figure:
    """Every system's row: interval over queries, and each seed."""
    systems = {row: _systems(found, row) for row in ROWS}
    cells = [cell for row in ROWS for _, cell in systems[row]]
    limits = reach([v for cell in cells for v in (cell.over_queries, *(Interval(s, s, s) for s in cell.per_seed))])
    panels, table = [], []
    for place, row in enumerate(ROWS):
        warm = next((cell.over_queries.mean for name, cell in systems[row] if name == "warm start"), None)
        panels.append(over_seeds(
            f"arms-{place}", place, found.measure, [name for name, _ in systems[row]],
            [cell.over_queries for _, cell in systems[row]], [cell.per_seed for _, cell in systems[row]], limits, warm,
        ))  # fmt: skip
        table += [
            [name, row, span(cell.over_queries), number(cell.seed_sd), ", ".join(number(v) for v in cell.per_seed)]
            for name, cell in systems[row]
        ]
    note = (
        f"{found.measure} on {found.data['test_queries']} test queries, {len(found.seeds)} seeds. The whisker says how "
        "much other queries would move the mean; the hollow dots say how much another seed moves it. Dashed line: the "
        "warm start that every arm starts from."
    )
    columns = ("system", "row", "mean [95 % interval]", "sd over seeds", "each seed")
    return Figure("arms", "Every arm, three rows", note, (MEAN, SEED), panels, columns, table)


def results(found: Comparison) -> Grid:
    """All measures of all systems."""
    rows = []
    for name, cells in [*((r.name, r.rows) for r in found.references), *((a.name, a.rows) for a in found.arms)]:
        for row, measures in cells.items():
            label = name if row == name else f"{name}: {row}"
            rows.append([label, *(_with_spread(measures[m]) for m in found.measures)])
    caption = "Test, mean over seeds [95 % interval over queries] ± standard deviation over seeds"
    shipped = found.ship["arm"] if found.ship else ""
    strong = frozenset(n for n, row in enumerate(rows) if row[0].rpartition(": ")[0] == shipped)
    return Grid(caption, ("", *found.measures), rows, strong)


def _with_spread(cell: Cell) -> str:
    return span(cell.over_queries) + ("" if math.isnan(cell.seed_sd) else f" ± {number(cell.seed_sd)}")


def costs(found: Comparison) -> Grid:
    """What each arm took."""
    forwards = list(dict.fromkeys(name for arm in found.arms for name in arm.forwards))
    rows = [
        [arm.name, blocks.duration(arm.seconds), f"{arm.peak_memory_mb / 1024:.1f} GiB",
         *(f"{arm.forwards.get(name, 0):,}" for name in forwards), ", ".join(arm.kept)]
        for arm in found.arms
    ]  # fmt: skip
    columns = ("arm", "time (median)", "peak memory", *(name.replace("_", " ") for name in forwards), "kept, by seed")
    return Grid("Cost of each arm; forwards are query-passage pairs", columns, rows)


def tests(found: Comparison) -> Grid:
    """Paired tests between arms."""
    rows = [
        [f"{t.arm} - {t.against}", t.test.row, t.test.measure, *blocks.test_cells(t.test)[:3], blocks.p_value(t.p_holm),
         str(t.test.queries)]
        for t in found.tests
    ]  # fmt: skip
    columns = ("pair", "row", "measure", "difference", "p, randomisation", "p, Student's t", "p, Holm", "queries")
    strong = frozenset(n for n, t in enumerate(found.tests) if t.p_holm < 0.05)
    return Grid("Paired tests on the same test queries", columns, rows, strong)


def tuning(found: Comparison) -> Grid:
    """Dev's measure for each factor on the learning rates, and the one that was taken."""
    factors = list(dict.fromkeys(factor for arm in found.arms for factor, _ in arm.tuning))
    rows = [
        [arm.name, *(_tried(dict(arm.tuning), factor) for factor in factors), f"{arm.factor:g}"] for arm in found.arms
    ]
    columns = ("arm", *(f"x {factor:g}" for factor in factors), "taken")
    return Grid(f"Dev {found.measure} for each factor on the learning rates", columns, rows)


def _tried(tuning: dict[float, float], factor: float) -> str:
    return number(tuning[factor]) if factor in tuning else ""


def curves(found: Comparison) -> Figure:
    """Dev's three rows over rounds, one panel an arm, all panels on one scale."""
    panels, table, summaries = [], [], []
    for arm in found.arms:
        values = {row: [_over_seeds(rows[row]) for _, rows in arm.curves] for row in ROWS}
        summaries.append(values)
        table += [
            [arm.name, name, *(", ".join(number(v) for v in rows[row]) for row in ROWS)] for name, rows in arm.curves
        ]
    limits = reach([cell for values in summaries for cells in values.values() for cell in cells])
    for place, (arm, values) in enumerate(zip(found.arms, summaries, strict=True)):
        names = [name for name, _ in arm.curves]
        panels.append(over_rounds(f"curve-{place}", arm.name, found.measure, names, values, limits))
    note = f"Dev {found.measure}, mean over seeds; whiskers reach from the lowest to the highest seed."
    columns = ("arm", "after", *(f"{row}, by seed" for row in ROWS))
    return Figure("curves", "Over the rounds", note, ROW_KEYS, panels, columns, table)


def _over_seeds(values: Any) -> Interval:
    return Interval(sum(values) / len(values), min(values), max(values))
