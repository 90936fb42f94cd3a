"""RUN/evidence.json: what the pair did to each test query, so that the report (or anyone) needs only the run folder.

Written after the one reading of test; nothing here can change what was trained, chosen or measured.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from sparring.data import read_run
from sparring.phases.evaluate import Table
from sparring.phases.slices import Slice, by_length, by_script, measured, script
from sparring.phases.stats import Estimate, interval, paired_test
from sparring.types import CASCADE, RETRIEVER

if TYPE_CHECKING:
    from sparring.recipes.experiment import Experiment
    from sparring.recipes.summary import Outcome

FORMAT = 1
SHOWN = 10
"""Queries of each kind (most improved, most worsened, worst) that are kept with their passages' texts."""
TOP = 3
LABELLED = 5
"""Labelled passages of a query that are named."""
TEXT, LABEL = 400, 100
"""Characters kept of a shown passage's text, and of every other passage's title."""

States = Sequence[tuple[str, Table]]
"""The warm start's table and, where another pair is exported, that one's."""


def write_evidence(x: Experiment, outcome: Outcome) -> None:
    """Write RUN/evidence.json, one field a line. ``outcome`` is what the recipe returned, its TREC files are there."""
    fields = (f"{json.dumps(key)}: {json.dumps(value, ensure_ascii=False, allow_nan=False)}"
              for key, value in evidence(x, outcome).items())  # fmt: skip
    x.run.write_text("evidence.json", "{\n" + ",\n".join(fields) + "\n}\n")


def evidence(x: Experiment, outcome: Outcome) -> dict[str, Any]:
    """Everything in evidence.json (the fields: docs/report.md)."""
    states = list(outcome.test_tables)
    ids = x.query_ids(x.test.rows)
    texts = x.dataset.queries.texts(x.test.rows)
    lengths = np.asarray(x.feed.retriever_queries.true_lengths)[x.test.rows]
    found = {name: _found(x, name, ids) for name, _ in states}
    chosen = choose_queries(states, outcome.select_by)
    labelled = [[p for p, grade in x.test.qrels[query].items() if grade > 0] for query in ids]
    queries: list[dict[str, Any]] = [
        {"id": query, "text": text, "length": int(length), "script": script(text), "labelled": known[:LABELLED],
         "labelled_count": len(known)}
        for query, text, length, known in zip(ids, texts, lengths, labelled, strict=True)
    ]  # fmt: skip
    top = {name: [list(ranking)[:TOP] for ranking in rankings] for name, rankings in found.items()}
    shown = {row for rows in chosen.values() for row in rows}
    return {
        "format": FORMAT, "split": x.test.name, "measures": list(outcome.measures), "select_by": outcome.select_by,
        "states": [name for name, _ in states], "length_unit": "retriever tokens",
        "queries": queries, "values": {name: _values(table) for name, table in states},
        "rank": {name: _first_ranks(rankings, labelled) for name, rankings in found.items()}, "top": top,
        "passages": _passages(x, top.values(), [query["labelled"] for query in queries], shown),
        **{kind: [ids[row] for row in rows] for kind, rows in chosen.items()},
        "slices": _slices(states, outcome.select_by, texts, lengths, x.config.seed),
        "tests": paired_tests(states, outcome.measures, x.config.seed),
    }  # fmt: skip


def choose_queries(states: States, measure: str, count: int = SHOWN) -> dict[str, list[int]]:
    """Rows of the queries to read, by the cascade: most improved, most worsened, and worst of the exported pair.

    Queries that did not change are in neither of the first two. The worst are ordered by the cascade's value, then the
    retriever's, then their place: where many have 0, first those that the retriever misses too.
    """
    before, after = states[0][1], states[-1][1]
    moved = after.row(CASCADE).values[measure] - before.row(CASCADE).values[measure]
    order = np.argsort(-moved, kind="stable")
    last = after.row(CASCADE).values[measure], after.row(RETRIEVER).values[measure]
    worst = np.lexsort((last[1], last[0]))
    return {
        "improved": [int(row) for row in order[:count] if moved[row] > 0],
        "worsened": [int(row) for row in np.argsort(moved, kind="stable")[:count] if moved[row] < 0],
        "worst": [int(row) for row in worst[:count] if last[0][row] < 1],
    }


def paired_tests(states: States, measures: Sequence[str], seed: int) -> list[dict[str, Any]]:
    """Warm start against the exported pair, for each row and measure; none where the warm start is exported."""
    if len(states) < 2:
        return []
    (first, before), (second, after) = states[0], states[-1]
    found = []
    for row in after.rows:
        for measure in measures:
            a, b = row.values[measure], before.row(row.name).values[measure]
            test, moved = paired_test(a, b), interval(a - b, seed)
            found.append({
                "row": row.name, "measure": measure, "before": first, "after": second,
                "difference": test.difference, "low": _number(moved.low), "high": _number(moved.high),
                "p_randomisation": test.p_randomisation, "p_t": test.p_t, "queries": test.queries,
            })  # fmt: skip
    return found


def _slices(
    states: States, measure: str, texts: Sequence[str], lengths: np.ndarray, seed: int
) -> dict[str, list[dict[str, Any]]]:
    before = {row.name: row.values[measure] for row in states[0][1].rows}
    after = {row.name: row.values[measure] for row in states[-1][1].rows} if len(states) > 1 else None
    groups = {"length": by_length(lengths), "script": by_script(texts)}
    return {by: [_slice(found) for found in measured(rows, before, after, seed)] for by, rows in groups.items()}


def _slice(found: Slice) -> dict[str, Any]:
    parts = {"before": found.before, "after": found.after, "difference": found.difference}
    cells = {part: {row: _cell(value) for row, value in rows.items()} for part, rows in parts.items()}
    return {"name": found.name, "queries": len(found.rows), **cells}


def _cell(value: Estimate) -> list[float | None]:
    return [_number(part) for part in value]


def _number(value: float) -> float | None:
    """A number for JSON; a query alone has no interval."""
    return None if np.isnan(value) else float(value)


def _values(table: Table) -> dict[str, dict[str, list[float]]]:
    return {row.name: {m: [round(float(v), 6) for v in row.values[m]] for m in table.measures} for row in table.rows}


def _found(x: Experiment, state: str, ids: Sequence[str]) -> list[list[str]]:
    """The cascade's passage ids of each query, best first, as written in the run's TREC file."""
    run = read_run(x.run_file(f"{x.test.name}-{state}", CASCADE))
    return [list(run.get(query, {})) for query in ids]


def _first_ranks(rankings: Iterable[Sequence[str]], labelled: Iterable[Sequence[str]]) -> list[int | None]:
    """The best rank of a labelled passage, from 1; None where none was found."""
    found: list[int | None] = []
    for ranking, known in zip(rankings, map(set, labelled), strict=True):
        found.append(next((rank for rank, passage in enumerate(ranking, 1) if passage in known), None))
    return found


def _passages(
    x: Experiment, tops: Iterable[Sequence[Sequence[str]]], labelled: Sequence[Sequence[str]], shown: set[int]
) -> dict[str, dict[str, str]]:
    """Every passage that is named: a short title, and the text of those that belong to a shown query."""
    full: dict[str, bool] = {}
    for lists in (*tops, labelled):
        for row, passages in enumerate(lists):
            for passage in passages:
                full[passage] = full.get(passage, False) or row in shown
    corpus = x.dataset.corpus
    found = {}
    for passage, with_text in full.items():
        row = corpus.row(passage)
        title, body = corpus.title(row), corpus.body(row)
        found[passage] = {"title": _cut(title if with_text else title or body, LABEL)}
        if with_text:
            found[passage]["text"] = _cut(body, TEXT)
    return found


def _cut(text: str, length: int) -> str:
    """At most ``length`` characters of a text on one line, with a sign where it was cut."""
    line = " ".join(text.split())
    return line if len(line) <= length else line[: length - 1].rstrip() + "…"
