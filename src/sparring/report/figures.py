"""Figures as inline SVG. The only home of matplotlib.

Text stays text, colours are the page's CSS variables (so that light, dark and print are one file), and every figure has
a title, a description and the table of its numbers. The same numbers give the same bytes.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import MaxNLocator

from sparring.report.read import ROWS, Interval, SliceRow, Training

INK, LINE, PALE = "#0a0b00", "#0a0b09", "#0a0b08"
SERIES = ("#0a0b01", "#0a0b02", "#0a0b03", "#0a0b04")
_COLOURS = {
    INK: "currentColor",
    LINE: "var(--line)",
    PALE: "var(--quiet)",
    **{c: f"var(--s{n})" for n, c in enumerate(SERIES, 1)},
}
"""Colours that nothing else has, and what the page puts in their place."""
MARKERS, DASHES = ("o", "s", "D", "^"), ("-", (0, (5, 2)), (0, (1.5, 1.5)), "-.")
GLYPHS = ("●", "■", "◆", "▲")
"""The markers as characters, for legends."""
WIDTH, HEIGHT = 4.7, 2.7
"""Inches of one panel. A page shows panels beside one another, and below one another on a narrow screen."""
POINTS = 160
"""Points of a curve over updates; longer ones are means of consecutive updates."""
SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none", "svg.hashsalt": "sparring", "text.parse_math": False, "font.size": 9.0,
    "font.family": "DejaVu Sans", "axes.edgecolor": LINE, "axes.labelcolor": INK, "axes.titlesize": 9.5,
    "axes.titlecolor": INK, "axes.titlelocation": "left", "text.color": INK, "xtick.color": LINE, "ytick.color": LINE,
    "xtick.labelcolor": INK, "ytick.labelcolor": INK, "grid.color": LINE, "grid.linewidth": 0.5, "axes.grid": True,
    "axes.axisbelow": True, "axes.spines.top": False, "axes.spines.right": False, "lines.linewidth": 1.5,
    "lines.markersize": 4.5, "xtick.labelsize": 8.5, "ytick.labelsize": 8.5,
}  # fmt: skip


@dataclass(frozen=True)
class Key:
    """One entry of a legend: the series (from 1; 0 is the pale one), its marker, its name."""

    series: int
    glyph: str
    name: str


ROW_KEYS = tuple(Key(place, GLYPHS[place - 1], row) for place, row in enumerate(ROWS, 1))
"""The three rows in their colours."""


@dataclass(frozen=True)
class Panel:
    """One drawing. ``svg`` is markup; everything in it that came from outside is escaped."""

    name: str
    title: str
    description: str
    svg: str


@dataclass(frozen=True)
class Figure:
    """One or more panels with a legend and the table of all numbers that they show.

    ``rows`` have as many cells as ``columns``.
    """

    name: str
    title: str
    note: str
    legend: Sequence[Key]
    panels: Sequence[Panel]
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


def number(value: float, digits: int = 3) -> str:
    """A number for people; an empty text for what is not one."""
    return "" if math.isnan(value) else f"{value:.{digits}f}"


def span(value: Interval, digits: int = 3) -> str:
    """``mean [low, high]``, or the mean alone where there is no interval."""
    text = number(value.mean, digits)
    return text if math.isnan(value.low) else f"{text} [{number(value.low, digits)}, {number(value.high, digits)}]"


def draw(
    name: str, title: str, description: str, paint: Callable[[Axes], None], *, height: float = HEIGHT,
    width: float = WIDTH,
) -> Panel:  # fmt: skip
    """One panel; ``paint`` gets empty axes. A letter that the layout font lacks is drawn by the browser's."""
    with rc_context(SETTINGS), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"Glyph .* missing from font")
        canvas = Canvas(figsize=(width, height), layout="constrained", facecolor="none")
        axes = canvas.add_subplot(facecolor="none")
        if title:
            axes.set_title(title)
        paint(axes)
        out = io.BytesIO()
        FigureCanvasSVG(canvas).print_svg(out, metadata={"Date": None, "Creator": None})
    return Panel(name, title, description, _inline(out.getvalue().decode(), name, title or name, description))


def _inline(svg: str, name: str, title: str, description: str) -> str:
    """matplotlib's document as an element of a page: ids of its own, a name for readers, colours from CSS."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"\s*<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'(url\(|xlink:href=")#', rf"\1#{name}-", svg)
    for colour, style in _COLOURS.items():
        svg = svg.replace(colour, style)
    svg = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", svg)
    box = re.search(r'viewBox="([^"]+)"', svg)
    assert box is not None
    head = (
        f'<svg xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="{box[1]}" role="img" '
        f'aria-labelledby="{name}-title {name}-desc"><title id="{name}-title">{escape(title)}</title>'
        f'<desc id="{name}-desc">{escape(description)}</desc>'
    )
    return head + svg[svg.index(">") + 1 :].strip()


def _series(index: int) -> dict[str, Any]:
    return {"color": SERIES[index], "marker": MARKERS[index], "linestyle": DASHES[index]}


def _errors(values: Sequence[Interval]) -> np.ndarray:
    """Distances below and above the mean, [2, n]; 0 where there is no interval."""
    return np.nan_to_num(np.array([[v.mean - v.low for v in values], [v.high - v.mean for v in values]]))


def over_rounds(
    name: str, title: str, measure: str, states: Sequence[str], rows: Mapping[str, Sequence[Interval]],
    limits: tuple[float, float] | None = None,
) -> Panel:  # fmt: skip
    """Each row's mean after each round with its interval."""

    def paint(axes: Axes) -> None:
        for index, row in enumerate(ROWS):
            if row in rows:
                places = np.arange(len(rows[row])) + (index - 1) * 0.06
                means = [value.mean for value in rows[row]]
                axes.errorbar(places, means, yerr=_errors(rows[row]), capsize=2.5, elinewidth=1, **_series(index))
        axes.set_xticks(range(len(states)), [short(state) for state in states])
        axes.set_xlim(-0.3, len(states) - 0.7)
        axes.set_ylabel(measure)
        axes.grid(visible=False, axis="x")
        if limits:
            axes.set_ylim(*limits)

    ends = "; ".join(f"{row} {number(v[0].mean)} to {number(v[-1].mean)}" for row, v in rows.items())
    return draw(name, title, f"{measure} from {states[0]} to {states[-1]}: {ends}.", paint)


def short(state: str) -> str:
    """``round 3`` as ``3``, so that many rounds fit below an axis."""
    return state.removeprefix("round ")


def before_after(
    name: str, title: str, measure: str, labels: Sequence[str], row: int, before: Sequence[Interval],
    after: Sequence[Interval], limits: tuple[float, float], width: float = WIDTH,
) -> Panel:  # fmt: skip
    """Means with intervals, one line a label: before in pale, after in the colour of its row of results.

    ``row``: place in :data:`ROWS`. Without ``after`` there is nothing but one state, drawn in the row's colour.
    """
    series = (
        [(PALE, "o", before), (SERIES[row], MARKERS[row], after)] if after else [(SERIES[row], MARKERS[row], before)]
    )

    def paint(axes: Axes) -> None:
        for place, (colour, marker, values) in enumerate(series):
            y = np.arange(len(labels)) + (place - (len(series) - 1) / 2) * 0.28
            shape: dict[str, Any] = {"color": colour, "marker": marker, "linestyle": "none"}
            axes.errorbar([v.mean for v in values], y, xerr=_errors(values), capsize=2.5, elinewidth=1.2, **shape)
        _named_rows(axes, labels, measure)
        axes.set_xlim(*limits)

    spoken = "; ".join(
        f"{label} " + ", then ".join(span(values[n]) for _, _, values in series) for n, label in enumerate(labels)
    )
    return draw(name, title, f"{measure}: {spoken}.", paint, height=0.75 + 0.4 * len(labels), width=width)


def reach(values: Sequence[Interval]) -> tuple[float, float]:
    """Ends of an axis on which all these intervals lie, with a margin."""
    ends = [end for value in values for end in value if not math.isnan(end)]
    margin = 0.04 * (max(ends) - min(ends)) or 0.02
    return min(ends) - margin, max(ends) + margin


def _named_rows(axes: Axes, labels: Sequence[str], measure: str) -> None:
    axes.set_yticks(range(len(labels)), list(labels))
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.set_xlabel(measure)
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.grid(visible=False, axis="y")


def over_seeds(
    name: str, row: int, measure: str, labels: Sequence[str], values: Sequence[Interval],
    seeds: Sequence[Sequence[float]], limits: tuple[float, float], line: float | None,
) -> Panel:  # fmt: skip
    """One line a system: the interval over queries as a whisker, each seed's own mean as a hollow dot below it.

    ``row``: place in :data:`ROWS`; ``line``: a value to compare with, or None.
    """

    def paint(axes: Axes) -> None:
        if line is not None:
            axes.axvline(line, color=INK, linewidth=1, linestyle=DASHES[1])
        style: dict[str, Any] = {"color": SERIES[row], "marker": MARKERS[row], "linestyle": "none"}
        means = [v.mean for v in values]
        axes.errorbar(means, np.arange(len(labels)), xerr=_errors(values), capsize=3, elinewidth=1.3, **style)
        for place, found in enumerate(seeds):
            if len(found) > 1:
                below = np.full(len(found), place + 0.26)
                axes.plot(found, below, "o", markersize=4, markerfacecolor="none", markeredgecolor=INK)
        _named_rows(axes, labels, measure)
        axes.set_xlim(*limits)

    spoken = "; ".join(f"{label} {span(value)}" for label, value in zip(labels, values, strict=True))
    return draw(name, ROWS[row], f"{measure}: {spoken}.", paint, height=0.75 + 0.36 * len(labels))


def over_updates(name: str, term: str, training: Sequence[Training], *, share: bool = False) -> Panel:
    """One logged value over all updates of the phases that have it; a gap stands between phases."""
    phases = [phase for phase in training if term in phase.values]

    def paint(axes: Axes) -> None:
        start = 0
        for number_of, phase in enumerate(phases):
            values = np.asarray(phase.values[term], dtype=float)
            places, means = binned(values, max(8, POINTS // len(phases)))
            axes.plot(start + places, means, color=SERIES[0])
            if number_of:
                axes.axvline(start, color=INK, linewidth=0.7, linestyle=DASHES[2])
            if term == "retriever_entropy" and phase.passages > 1:
                most = math.log(phase.passages)
                axes.plot([start, start + len(values)], [most, most], color=INK, linewidth=1, linestyle=DASHES[1])
            start += len(values)
        axes.set_xlabel("updates: " + ", ".join(phase.phase for phase in phases) if len(phases) < 4 else "updates")
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        if share:
            axes.set_ylim(-0.03, 1.03)

    ends = [(phase.phase, *(number(mean(part)) for part in _ends(phase.values[term]))) for phase in phases]
    spoken = "; ".join(f"{phase} {first} at first, {last} at last" for phase, first, last in ends)
    return draw(name, words(term), f"{words(term)} over updates: {spoken}.", paint, height=2.2)


def _ends(values: Sequence[float]) -> tuple[Sequence[float], Sequence[float]]:
    return values[:5], values[-5:]


def mean(values: Sequence[float]) -> float:
    """The mean of what is a number; NaN where nothing is."""
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan


def binned(values: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
    """At most ``most`` means of consecutive values, and the middle place of each; short series are left as they are."""
    parts = np.array_split(np.asarray(values, dtype=float), min(len(values), most))
    ends = np.cumsum([len(part) for part in parts])
    places = ends - np.array([len(part) for part in parts]) / 2
    return places, np.array([mean(part.tolist()) for part in parts])


def words(term: str) -> str:
    """A logged name as words."""
    return term.replace("_", " ")


def bars(name: str, title: str, unit: str, values: Mapping[str, float], *, most: float | None = None) -> Panel:
    """Horizontal bars with their numbers, in the order given."""

    def paint(axes: Axes) -> None:
        labels = list(values)
        drawn = axes.barh(range(len(labels)), list(values.values()), color=SERIES[0], height=0.62)
        axes.bar_label(drawn, [f"{v:.2f}" if most else f"{v:,.0f}" for v in values.values()], padding=3, color=INK)
        _named_rows(axes, labels, unit)
        axes.set_xlim(0, most or max([*values.values(), 1e-9]) * 1.15)

    spoken = "; ".join(f"{label} {value:.4g}" for label, value in values.items())
    return draw(name, title, f"{title or name} in {unit}: {spoken}.", paint, height=0.7 + 0.27 * max(1, len(values)))


def histogram(
    name: str, title: str, edges: Sequence[float], positives: Sequence[int], negatives: Sequence[int], median: float
) -> Panel:
    """Scores of known positives and of mined negatives, each as a share of its own kind."""

    def paint(axes: Axes) -> None:
        for index, counts in ((0, negatives), (1, positives)):
            shares = np.asarray(counts, dtype=float) / max(1, sum(counts))
            axes.stairs(shares, edges, color=SERIES[index], fill=True, alpha=0.25, linewidth=0)
            axes.stairs(shares, edges, color=SERIES[index], linewidth=1.4, linestyle=DASHES[index])
        axes.axvline(median, color=INK, linewidth=1, linestyle=DASHES[1])
        axes.set_xlabel("ranker score")
        axes.set_ylabel("share")

    spoken = f"{sum(positives)} positives with median {number(median)}, {sum(negatives)} mined negatives"
    return draw(name, title, f"Histogram of the ranker's scores: {spoken}.", paint, height=2.3)


def slices(name: str, measure: str, found: Sequence[SliceRow], row: int, limits: tuple[float, float]) -> Panel:
    """One row of results in each group of queries, before and after."""
    labels = [f"{group.name} (n={group.queries})" for group in found]
    before = [group.before[ROWS[row]] for group in found]
    after = [group.after[ROWS[row]] for group in found if group.after]
    return before_after(name, ROWS[row], measure, labels, row, before, after, limits)
