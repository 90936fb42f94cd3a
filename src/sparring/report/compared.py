"""A comparison folder as frozen objects: comparison.json, and what the arms' own run folders add to it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparring.report.read import (
    Interval,
    ShownQuery,
    Significance,
    interval,
    parsed,
    read_evidence,
    read_json,
    read_run_folder,
    shown_query,
)
from sparring.types import CASCADE, InputError

SHOWN = 10
"""Queries of each kind that are shown."""


@dataclass(frozen=True)
class Cell:
    """One measure of one row over seeds: the mean with its interval over queries, and how seeds scatter."""

    over_queries: Interval
    seed_sd: float
    per_seed: Sequence[float]


Cells = Mapping[str, Mapping[str, Cell]]
"""Row -> measure -> cell."""


@dataclass(frozen=True)
class Reference:
    """What the arms are measured against: BM25, the zero-shot retriever, the warm start."""

    name: str
    rows: Cells


@dataclass(frozen=True)
class Arm:
    """One recipe with its settings, over all seeds.

    Attributes:
        tuning: (factor on the learning rates, dev's measure) of everything that was tried; ``factor`` was chosen.
        forwards: query-passage forwards by model and purpose.
        seconds: median over seeds; ``peak_memory_mb``: largest.
        kept: the round whose pair dev chose, one a seed.
        curves: evaluations of dev in order: (name, row -> the measure's value of each seed).
    """

    name: str
    recipe: str
    settings: Mapping[str, Any]
    tuning: Sequence[tuple[float, float]]
    factor: float
    rows: Cells
    forwards: Mapping[str, int]
    seconds: float
    peak_memory_mb: float
    kept: Sequence[str]
    curves: Sequence[tuple[str, Mapping[str, Sequence[float]]]]


@dataclass(frozen=True)
class PairTest:
    """One arm against another on the same queries; ``p_holm`` allows for all tests of the table."""

    arm: str
    against: str
    test: Significance
    p_holm: float


@dataclass(frozen=True)
class Comparison:
    """A comparison folder. ``shown`` is None where the arms' folders have no evidence.json."""

    name: str
    command: str
    version: str
    data: Mapping[str, Any]
    hardware: Mapping[str, Any]
    versions: Mapping[str, str]
    budget: float
    counts: str
    seeds: Sequence[int]
    baseline: str
    measure: str
    measures: Sequence[str]
    references: Sequence[Reference]
    arms: Sequence[Arm]
    tests: Sequence[PairTest]
    warnings: Sequence[str]
    ship: Mapping[str, Any] | None
    sentences: Sequence[str]
    shown: Mapping[str, Sequence[ShownQuery]] | None


def read_comparison_folder(folder: Path) -> Comparison:
    """Read a finished comparison and the run folders of its arms; raises as `read_run_folder`."""
    file = folder / "comparison.json"
    raw = read_json(file)
    return parsed(file, _comparison, raw, folder)


def _comparison(raw: Mapping[str, Any], folder: Path) -> Comparison:
    if raw["kind"] != "comparison":
        raise InputError("this is no comparison", where=str(folder), expected="comparison", got=str(raw["kind"]))
    arms = [_arm(arm, folder, raw["measure"]) for arm in raw["arms"]]
    ship = raw["verdict"]["ship"]
    return Comparison(
        name=folder.resolve().name,
        **{key: raw[key] for key in _SAME},
        references=[Reference(r["name"], _rows(r["rows"])) for r in raw["references"]],
        arms=arms, tests=[_test(t) for t in raw["tests"]], ship=ship, sentences=raw["verdict"]["sentences"],
        shown=_shown(raw, folder) if ship else None,
    )  # fmt: skip


_SAME = (
    "command", "version", "data", "hardware", "versions", "budget", "counts", "seeds", "baseline", "measure",
    "measures", "warnings",
)  # fmt: skip


def _arm(raw: Mapping[str, Any], folder: Path, measure: str) -> Arm:
    runs = [read_run_folder(folder / name) for name in raw["folders"]]
    names = dict.fromkeys(state.name for run in runs for state in run.dev.states)
    curves = []
    for name in names:
        found = [state.rows for run in runs for state in run.dev.states if state.name == name]
        curves.append((name, {row: [rows[row][measure].mean for rows in found] for row in found[0]}))
    tuning = [(float(t["factor"]), math.nan if t["dev"] is None else float(t["dev"])) for t in raw["tuning"]]
    return Arm(
        raw["name"], raw["recipe"], raw["settings"], tuning,
        raw["factor"], _rows(raw["rows"]), raw["forwards"], raw["seconds"], raw["peak_memory_mb"], raw["kept"], curves,
    )  # fmt: skip


def _rows(raw: Mapping[str, Any]) -> dict[str, dict[str, Cell]]:
    return {row: {measure: _cell(cell) for measure, cell in cells.items()} for row, cells in raw.items()}


def _cell(raw: Mapping[str, Any]) -> Cell:
    spread = math.nan if raw["seed_sd"] is None else float(raw["seed_sd"])
    return Cell(interval([raw["mean"], raw["low"], raw["high"]]), spread, [float(v) for v in raw["per_seed"]])


def _test(raw: Mapping[str, Any]) -> PairTest:
    difference = interval([raw["difference"], raw["low"], raw["high"]])
    test = Significance(raw["row"], raw["measure"], difference, raw["p_randomisation"], raw["p_t"], int(raw["queries"]))
    return PairTest(raw["arm"], raw["against"], test, float(raw["p_holm"]))


def _shown(raw: Mapping[str, Any], folder: Path) -> dict[str, list[ShownQuery]] | None:
    """Queries on which the shipped run and the baseline's of the same seed differ most, and the shipped run's worst.

    None where one of the two run folders has no evidence.json, or where no arm is shipped or it is the baseline.
    """
    ship = raw["verdict"]["ship"]
    baseline = next((arm for arm in raw["arms"] if arm["name"] == raw["baseline"]), None)
    if baseline is None or ship["arm"] == raw["baseline"]:
        return None
    other = folder / baseline["folders"][list(raw["seeds"]).index(ship["seed"])]
    files = [other / "evidence.json", folder / ship["folder"] / "evidence.json"]
    if not all(file.is_file() for file in files):
        return None
    before, after = (parsed(file, read_evidence, read_json(file)).raw for file in files)
    places = {query["id"]: row for row, query in enumerate(before["queries"])}
    if list(places) != [query["id"] for query in after["queries"]]:
        raise InputError("two arms were tested on different queries", where=f"{files[0]}, {files[1]}")
    values = [found["values"][found["states"][-1]][CASCADE][raw["measure"]] for found in (before, after)]
    moved = [b - a for a, b in zip(*values, strict=True)]
    order = sorted(range(len(moved)), key=lambda row: -moved[row])
    last = sorted(range(len(moved)), key=lambda row: values[1][row])
    chosen = {
        "improved": [row for row in order[:SHOWN] if moved[row] > 0],
        "worsened": [row for row in order[::-1][:SHOWN] if moved[row] < 0],
        "worst": [row for row in last[:SHOWN] if values[1][row] < 1],
    }
    measure = raw["measure"]
    return {kind: [shown_query(before, row, after, row, measure) for row in rows] for kind, rows in chosen.items()}
