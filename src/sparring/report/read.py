"""A run folder as frozen objects: what the page shows, without a look at models or data."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from sparring.config import read_toml
from sparring.log import read_metrics
from sparring.types import CASCADE, FIXED, RETRIEVER, InputError

T = TypeVar("T")

ROWS = (RETRIEVER, FIXED, CASCADE)
WARM = "warm start"
DIAGNOSTICS = ("retriever_entropy", "ranker_prefers_negative", "retriever_prefers_negative", "reward")
"""What is logged beside the loss terms at every update."""


class Interval(NamedTuple):
    """A mean with its 95 % interval; low and high are NaN where there is none."""

    mean: float
    low: float
    high: float


Measures = Mapping[str, Interval]


@dataclass(frozen=True)
class State:
    """The pair at one point of the run: its three rows, by name, or one row of a baseline."""

    name: str
    rows: Mapping[str, Measures]


@dataclass(frozen=True)
class Split:
    """Results of one split: what needs no training first, then each state of the pair."""

    queries: int
    baselines: Sequence[State]
    states: Sequence[State]


@dataclass(frozen=True)
class Training:
    """One training phase: values of each logged name, one an update.

    ``passages`` are those of one list; the retriever's entropy is at most their number's logarithm.
    """

    phase: str
    passages: int
    values: Mapping[str, Sequence[float]]


@dataclass(frozen=True)
class Passage:
    """A passage as evidence.json names it; without a text where it belongs to no shown query."""

    id: str
    title: str
    text: str
    labelled: bool


@dataclass(frozen=True)
class ShownQuery:
    """One query with the cascade's first passages before and after; ranks are of the first labelled passage."""

    id: str
    text: str
    before: float
    after: float
    rank_before: int | None
    rank_after: int | None
    labelled: Sequence[Passage]
    top_before: Sequence[Passage]
    top_after: Sequence[Passage]


@dataclass(frozen=True)
class SliceRow:
    """One group of queries: one measure's interval of each row of results; ``after`` is empty in an unchanged run."""

    name: str
    queries: int
    before: Mapping[str, Interval]
    after: Mapping[str, Interval]
    difference: Mapping[str, Interval]


@dataclass(frozen=True)
class Significance:
    """A paired test of one row and measure, and the mean difference with its interval."""

    row: str
    measure: str
    difference: Interval
    p_randomisation: float
    p_t: float
    queries: int


@dataclass(frozen=True)
class Evidence:
    """What evidence.json says about each test query. ``values`` are by state, row and measure, one a query."""

    select_by: str
    states: Sequence[str]
    length_unit: str
    ids: Sequence[str]
    values: Mapping[str, Mapping[str, Mapping[str, Sequence[float]]]]
    raw: Mapping[str, Any]
    slices: Mapping[str, Sequence[SliceRow]]
    tests: Sequence[Significance]
    shown: Mapping[str, Sequence[ShownQuery]]


@dataclass(frozen=True)
class AuditRefresh:
    """Mined negatives of one refresh as the ranker scored them."""

    generation: str
    counts: Mapping[str, int]
    lists: int
    candidates: int
    pairs_scored: int
    median_positive: float
    edges: Sequence[float]
    positives: Sequence[int]
    negatives: Sequence[int]
    likely: int
    examples: Sequence[Mapping[str, Any]]
    file: str


@dataclass(frozen=True)
class Run:
    """A run folder. ``evidence`` and ``audit`` are None where the folder has no such file."""

    name: str
    recipe: str
    best: str
    select_by: str
    measures: Sequence[str]
    sentences: Sequence[str]
    forwards: Mapping[str, int]
    dev: Split
    test: Split
    training: Sequence[Training]
    phases: Sequence[tuple[str, float, int]]
    kinds: Mapping[str, str]
    seconds: float
    overlaps: Sequence[tuple[str, float]]
    warnings: Sequence[str]
    config: Mapping[str, Any]
    environment: Mapping[str, Any]
    evidence: Evidence | None
    audit: Sequence[AuditRefresh] | None


def read_run_folder(folder: Path) -> Run:
    """Read a finished run.

    Raises:
        InputError: a file is missing (the run did not finish) or is not what a run writes; names the file.
    """
    results = read_json(folder / "results.json")
    environment = read_json(folder / "environment.json")
    records = read_metrics(folder / "metrics.jsonl", fix="wait until the run has ended, or name another folder")
    config = read_toml(folder / "config.toml")
    file = folder / "results.json"
    dev, test = (parsed(file, _split, results, name) for name in ("dev", "test"))
    evidence, audit = folder / "evidence.json", folder / "audit.json"
    return Run(
        name=folder.resolve().name, recipe=str(config.get("recipe", "")), dev=dev, test=test, config=config,
        environment=environment,
        measures=parsed(file, lambda: list(next(iter(test.states[0].rows.values())))),
        **parsed(file, lambda: {key: results[key] for key in ("best", "select_by", "sentences", "forwards")}),
        **parsed(folder / "metrics.jsonl", _history, records),
        evidence=parsed(evidence, read_evidence, read_json(evidence)) if evidence.is_file() else None,
        audit=parsed(audit, _audit, read_json(audit)) if audit.is_file() else None,
    )  # fmt: skip


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object; InputError where there is none."""
    if not file.is_file():
        raise InputError(
            "a file of the run is missing", where=str(file), expected="the folder of a run that has ended",
            fix="wait until the run has ended, or name another folder",
        )  # fmt: skip
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError("this file is not JSON", where=str(file), got=str(error)) from None
    if not isinstance(value, dict):
        raise InputError("this file is not a JSON object", where=str(file), got=type(value).__name__)
    return value


def parsed(file: Path, function: Callable[..., T], *arguments: Any) -> T:
    """Call a reader; what it does not find where it should be becomes an InputError that names the file."""
    try:
        return function(*arguments)
    except (LookupError, TypeError, ValueError, AttributeError, StopIteration, ArithmeticError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            "this file is not as Sparring writes it", where=str(file), got=f"{type(error).__name__}: {error}",
            fix="give the folder as the run left it; a run of another version may lack something",
        ) from error  # fmt: skip


def interval(cell: Sequence[float | None]) -> Interval:
    """``[mean, low, high]`` as written to JSON."""
    mean, low, high = (math.nan if value is None else float(value) for value in cell)
    return Interval(mean, low, high)


def _split(results: Mapping[str, Any], name: str) -> Split:
    baselines: list[State] = []
    states: dict[str, dict[str, Measures]] = {}
    for row in results[name]:
        measures = {m: interval(cell) for m, cell in row.items() if m not in ("name", "queries")}
        state, _, kind = row["name"].rpartition(": ")
        if state and kind in ROWS:
            states.setdefault(state, {})[kind] = measures
        else:
            baselines.append(State(row["name"], {row["name"]: measures}))
    return Split(results[name][0]["queries"], baselines, [State(state, rows) for state, rows in states.items()])


def _history(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    of_kind: dict[str, list[Mapping[str, Any]]] = {}
    for record in records:
        of_kind.setdefault(record["kind"], []).append(record)
    phases = [(r["name"], float(r["took"]), int(r["peak_memory_mb"])) for r in of_kind.get("phase", [])]
    fits, denoised = of_kind.get("fit", []), {r["phase"] for r in of_kind.get("denoise", [])}
    steps: dict[str, list[Mapping[str, Any]]] = {}
    for step in of_kind.get("step", []):
        steps.setdefault(step["phase"], []).append(step)
    return {
        "training": [_training(fit, steps.get(fit["phase"], [])) for fit in fits],
        "phases": phases,
        "kinds": {name: _kind(name, {fit["phase"] for fit in fits}, denoised) for name, _, _ in phases},
        "seconds": max((float(r["seconds"]) for r in records), default=0.0),
        "overlaps": [
            (r["generation"], float(r["pool_overlap"])) for r in of_kind.get("refresh", [])
            if r["pool_overlap"] is not None
        ],
        "warnings": [f"{r['at']}: {r['text']}" for r in of_kind.get("warning", [])],
    }  # fmt: skip


def _training(fit: Mapping[str, Any], steps: Sequence[Mapping[str, Any]]) -> Training:
    names = dict.fromkeys(name for step in steps for name in step if name not in ("kind", "seconds", "phase", "step"))
    values = {name: [math.nan if step.get(name) is None else float(step[name]) for step in steps] for name in names}
    return Training(fit["phase"], int(fit["passages_per_list"]), values)


def _kind(name: str, fits: set[str], denoised: set[str]) -> str:
    """What a phase did, from its name."""
    if name in fits:
        model = next((m for m in ("retriever", "ranker", "joint") if name.endswith(m)), "ranker")
        return {"joint": "train both models"}.get(model, f"train the {model}")
    if name in denoised:
        return "denoise"
    if name.startswith("bm25"):
        return "BM25"
    kinds = {"encode": "encode", "index": "index", "mine": "mine", "evaluate": "evaluate on dev", "audit": "audit"}
    return kinds.get(name.rpartition("-")[2], {"tokenise": "tokenise", "export": "export"}.get(name, "other"))


def read_evidence(raw: Mapping[str, Any]) -> Evidence:
    """What a run's evidence.json says."""
    slices = {
        by: [SliceRow(row["name"], row["queries"], *(_cells(row[part]) for part in ("before", "after", "difference")))
             for row in rows]
        for by, rows in raw["slices"].items()
    }  # fmt: skip
    tests = [
        Significance(
            t["row"], t["measure"], interval([t["difference"], t["low"], t["high"]]), t["p_randomisation"], t["p_t"],
            t["queries"],
        )
        for t in raw["tests"]
    ]  # fmt: skip
    place = {query["id"]: row for row, query in enumerate(raw["queries"])}
    shown = {
        kind: [shown_query(raw, place[query], raw, place[query], raw["select_by"]) for query in raw[kind]]
        for kind in ("improved", "worsened", "worst")
    }
    return Evidence(
        raw["select_by"], raw["states"], raw["length_unit"], list(place), raw["values"], raw, slices, tests, shown
    )


def shown_query(before: Mapping[str, Any], row: int, after: Mapping[str, Any], other: int, measure: str) -> ShownQuery:
    """One query, from the evidence of one pair (its first state) or of two pairs (the last state of each)."""
    query = after["queries"][other]
    same = before is after
    first, last = before["states"][0 if same else -1], after["states"][-1]
    known = set(query["labelled"])
    passages = {**before["passages"], **_with_text(before["passages"], after["passages"])}

    def named(ids: Sequence[str]) -> list[Passage]:
        return [Passage(i, passages[i]["title"], passages[i].get("text", ""), i in known) for i in ids]

    return ShownQuery(
        query["id"], query["text"],
        before["values"][first][CASCADE][measure][row], after["values"][last][CASCADE][measure][other],
        before["rank"][first][row], after["rank"][last][other],
        named(query["labelled"]), named(before["top"][first][row]), named(after["top"][last][other]),
    )  # fmt: skip


def _with_text(one: Mapping[str, Any], two: Mapping[str, Any]) -> dict[str, Any]:
    """Passages of two runs; the entry with a text is taken where only one has it."""
    return {key: one[key] if key in one and "text" in one[key] else value for key, value in two.items()}


def _cells(rows: Mapping[str, Any]) -> dict[str, Interval]:
    return {row: interval(cell) for row, cell in rows.items()}


def _audit(raw: Mapping[str, Any]) -> list[AuditRefresh]:
    return [
        AuditRefresh(
            r["generation"], r["counts"], r["lists"], r["candidates"], r["pairs_scored"], float(r["median_positive"]),
            r["histogram"]["edges"], r["histogram"]["positives"], r["histogram"]["negatives"], r["likely"],
            r["examples"], r["file"],
        )
        for r in raw["refreshes"]
    ]  # fmt: skip
