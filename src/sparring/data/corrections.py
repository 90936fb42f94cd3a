"""A person's verdicts on mined negatives: the table that an audit writes, and what is read back from it.

The table is tab-separated with nothing quoted, so that ids survive exactly; ids never hold a tab or a line break, and
in the texts these become spaces. Verdicts: ``positive`` becomes a training label; ``drop`` is neither positive nor
negative; ``keep`` is a true negative, whatever a ranker says. A row without a verdict changes nothing.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sparring.data.dataset import Dataset
from sparring.data.textfiles import at, bad_row, lines, tsv_field, write_text

COLUMNS = ("verdict", "query_id", "passage_id", "score", "rank", "query", "title", "text")
VERDICTS = ("positive", "drop", "keep")
SPLIT = "train"
"""The only split that verdicts are about: dev and test labels are never touched."""


class ReviewRow(NamedTuple):
    """One pair that a person is asked about."""

    query_id: str
    passage_id: str
    score: float
    rank: int
    query: str
    title: str
    text: str
    verdict: str = ""


def write_review(rows: Iterable[ReviewRow], path: Path) -> None:
    """Write pairs for a person to judge, with the header `COLUMNS`. InputError for an id that no line can hold."""
    with write_text(path) as file:
        file.write("\t".join(COLUMNS) + "\n")
        for row in rows:
            ids = tsv_field(row.query_id, "query id"), tsv_field(row.passage_id, "passage id")
            texts = (re.sub(r"[\t\r\n]+", " ", text) for text in (row.query, row.title, row.text))
            file.write("\t".join([row.verdict, *ids, f"{row.score:.6g}", str(row.rank), *texts]) + "\n")


@dataclass(frozen=True)
class Corrections:
    """Verdicts on (query id, passage id) pairs of the training split. Empty unless `read_corrections` made it."""

    verdicts: Mapping[tuple[str, str], str] = field(default_factory=dict)

    def counts(self) -> dict[str, int]:
        """Pairs by verdict, all three named."""
        found = Counter(self.verdicts.values())
        return {verdict: found[verdict] for verdict in VERDICTS}

    def __str__(self) -> str:
        return "corrections: " + ", ".join(f"{count} {verdict}" for verdict, count in self.counts().items())

    def fingerprint(self) -> str:
        """SHA-256 of all verdicts, their order left out; empty where there are none."""
        told = json.dumps(sorted([*pair, verdict] for pair, verdict in self.verdicts.items()))
        return hashlib.sha256(told.encode()).hexdigest() if self.verdicts else ""

    def pairs(self, verdict: str) -> list[tuple[str, str]]:
        """The pairs with a verdict, in the order of the files."""
        return [pair for pair, found in self.verdicts.items() if found == verdict]

    def rows(self, verdict: str, dataset: Dataset) -> dict[int, np.ndarray]:
        """Query row -> passage rows, int64, of the pairs with a verdict: the form in which phases take them."""
        pairs = self.pairs(verdict)
        found: dict[int, list[int]] = {}
        queries, passages = dataset.queries.rows(q for q, _ in pairs), dataset.corpus.rows(p for _, p in pairs)
        for query, passage in zip(queries.tolist(), passages.tolist(), strict=True):
            found.setdefault(query, []).append(passage)
        return {query: np.array(rows, dtype=np.int64) for query, rows in found.items()}

    def apply(self, dataset: Dataset) -> Dataset:
        """The same data with the ``positive`` pairs among the training labels, of grade 1 where they had none."""
        if not self.pairs("positive"):
            return dataset
        labels = {query: dict(grades) for query, grades in dataset.split(SPLIT).items()}
        for query, passage in self.pairs("positive"):
            labels[query][passage] = max(1, labels[query].get(passage, 0))
        return replace(dataset, qrels={**dataset.qrels, SPLIT: labels})

    def write(self, path: Path) -> None:
        """The verdicts as a table that `read_corrections` reads back."""
        with write_text(path) as file:
            file.write("\t".join(COLUMNS[:3]) + "\n")
            for (query, passage), verdict in self.verdicts.items():
                file.write(f"{verdict}\t{tsv_field(query, 'query id')}\t{tsv_field(passage, 'passage id')}\n")


def read_corrections(files: Sequence[str | Path], dataset: Dataset) -> Corrections:
    """Verdicts from one or more audit tables (CRLF and a BOM are accepted; a header line is, and may be missing).

    Raises:
        InputError: at file:line, for a row of fewer than three columns, an unknown verdict, query or passage, a query
            outside the training split, ``keep`` or ``drop`` of a labelled positive, and verdicts that contradict each
            other. Passages of equal text are one passage in the last two.
    """
    if not files:
        return Corrections()
    verdicts: dict[tuple[str, str], str] = {}
    texts: dict[tuple[str, int], tuple[str, str]] = {}
    for file in map(Path, files):
        for number, line in lines(file):
            columns = line.split("\t")
            if number == 1 and tuple(columns[:3]) == COLUMNS[:3]:
                continue
            if not line.strip():
                continue
            if len(columns) < 3:
                expected = "verdict, query_id, passage_id with tabs between"
                raise bad_row("a correction cannot be read", file, number, expected=expected, got=line)
            verdict, (query, passage) = columns[0].strip().lower(), columns[1:3]
            if verdict:
                _check(dataset, file, number, verdict, query, passage)
                _agree(dataset, file, number, verdict, query, passage, texts)
                verdicts[query, passage] = verdict
    return Corrections(verdicts)


def _check(dataset: Dataset, file: Path, line: int, verdict: str, query: str, passage: str) -> None:
    if verdict not in VERDICTS:
        expected = "positive, drop, keep, or nothing"
        raise bad_row("an unknown verdict", file, line, expected=expected, got=repr(verdict))
    for kind, id, table in (("query", query, dataset.queries), ("passage", passage, dataset.corpus)):
        if id not in table:
            fix = "ids are exact, nothing is quoted: was the file saved by a program that adds quotation marks?"
            raise bad_row(
                f"a correction names a {kind} that the data lacks", file, line,
                expected=f"a {kind} id of {dataset.source}", got=repr(id), fix=fix,
            )  # fmt: skip
    labels = dataset.split(SPLIT)
    if query not in labels:
        others = [name for name, qrels in dataset.qrels.items() if query in qrels]
        raise bad_row(
            "a correction is for a query outside the training split", file, line,
            expected=f"a query of the split {SPLIT}: other labels are never changed",
            got=f"query {query!r}" + (f" of {', '.join(others)}" if others else " without labels"),
        )  # fmt: skip


def _agree(
    dataset: Dataset, file: Path, line: int, verdict: str, query: str, passage: str,
    texts: dict[tuple[str, int], tuple[str, str]],
) -> None:  # fmt: skip
    """Refuse a verdict against a label or against an earlier verdict; remember this one in ``texts``."""
    group = int(dataset.corpus.groups[dataset.corpus.row(passage)])
    labelled = [id for id, grade in dataset.split(SPLIT)[query].items() if grade > 0]
    same = [id for id in labelled if int(dataset.corpus.groups[dataset.corpus.row(id)]) == group]
    if verdict != "positive" and same:
        text = "" if passage in same else f", whose text is that of {same[0]!r}"
        raise bad_row(
            f"a labelled positive cannot be {verdict}", file, line,
            expected="a passage that no training label names", got=f"query {query!r}, passage {passage!r}{text}",
            fix="correct the label in the qrels file, or remove this row",
        )  # fmt: skip
    earlier, where = texts.setdefault((query, group), (verdict, at(file, line)))
    if earlier != verdict:
        raise bad_row(
            "two corrections contradict each other", file, line,
            expected=f"{earlier}, as at {where} (passages of equal text count as one)",
            got=f"{verdict} for query {query!r}, passage {passage!r}", fix="decide for one, or empty both verdicts",
        )  # fmt: skip


