"""TREC's files: topics (``<top>`` markup), qrels (``qid iter docid rel``) and runs (``qid Q0 docid rank score tag``).

Columns are read by tabs where a line has the right number of them, else by white space. They are written with tabs:
these are white space to every other tool, and an id with a space in it survives a round trip here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from sparring.data.rows import Label, QueryRow
from sparring.data.textfiles import Problem, at, bad_id, bad_row, grade, lines, raise_problem, tsv_field, write_text
from sparring.types import InputError, Qrels, Run

_NUMBER = re.compile(r"<num>\s*(?:Number:)?\s*([^\s<]+)", re.IGNORECASE)
_AROUND = ("<?xml", "<!--", "<xml>", "</xml>", "<topics>", "</topics>")  # lines that may stand between topics
_TITLE = re.compile(r"<title>\s*(?:Topic:)?\s*([^<]*)", re.IGNORECASE)


def fields(line: str, count: int) -> list[str]:
    """The columns of one line: by tabs when that gives ``count`` of them, else by white space.

    With three columns or more between tabs the tabs are meant: a line that lacks one is never read as another.
    """
    by_tab = line.split("\t")
    return by_tab if len(by_tab) == count or len(by_tab) >= 3 else line.split()


def topics(path: Path, problem: Problem = raise_problem) -> Iterator[QueryRow]:
    """Queries of a topics file: ``<num>`` is the id, ``<title>`` (which may span lines) the text."""
    expected = "<top> <num> Number: 301 <title> words </top>"
    start, waiting = 0, [""]
    for number, line in lines(path, problem):
        lowered = line.strip().lower()
        if lowered.startswith("<top>"):
            if start:
                problem(bad_row("a topic is not closed", path, start, expected=expected, got=" ".join(waiting)))
            start, waiting = number, []
        if start:
            waiting.append(line.strip())
        elif not lowered.startswith(_AROUND):
            problem(bad_row("a line belongs to no topic", path, number, expected=expected, got=line))
        if start and lowered.endswith("</top>"):
            block = " ".join(waiting)
            id, title = _NUMBER.search(block), _TITLE.search(block)
            if block.lower().count("<top>") != 1:
                problem(bad_row("two topics are not told apart", path, start, expected=f"{expected} alone", got=block))
            elif id and title:
                yield QueryRow(start, id[1], " ".join(title[1].split()))
            else:
                problem(bad_row("a topic has no <num> or no <title>", path, start, expected=expected, got=block))
            start = 0
    if start:
        problem(bad_row("a topic is not closed", path, start, expected=expected, got=" ".join(waiting)))


def label(line: int, columns: list[str], path: Path, problem: Problem) -> Label | None:
    """One line of four columns; None after a problem."""
    wrong = bad_id(columns[0]) or bad_id(columns[2])
    try:
        value = grade(columns[3])
    except ValueError:
        wrong = wrong or f"the relevance {columns[3]!r}"
    if wrong:
        expected = "qid iter docid rel, rel a whole number"
        problem(bad_row("a label cannot be read", path, line, expected=expected, got=wrong))
        return None
    return Label(line, columns[0], columns[2], value)


def write_topics(rows: Iterable[tuple[str, str]], path: Path) -> None:
    """Write (id, text) rows as topics. InputError for what the markup cannot hold: ``<``, a space in an id."""
    with write_text(path) as file:
        for id, text in rows:
            if "<" in text or not re.fullmatch(r"[^\s<]+", id) or text != " ".join(text.split()):
                raise InputError(
                    "a topics file cannot hold this query",
                    where=f"query {id}",
                    expected="an id without white space, a text without '<', tabs or double spaces",
                    got=repr(text[:80]),
                    fix="write queries.tsv or the BEIR layout instead",
                )
            prefix = "Topic: " if text.lower().startswith("topic:") else ""  # readers drop one
            file.write(f"<top>\n<num> Number: {id}\n<title> {prefix}{text}\n</top>\n")


def write_qrels(qrels: Qrels, path: Path) -> None:
    """Write labels as ``qid 0 docid rel`` (also MS MARCO's form), tab-separated."""
    with write_text(path) as file:
        for query, grades in qrels.items():
            for passage, grade in grades.items():
                file.write(f"{tsv_field(query, 'query id')}\t0\t{tsv_field(passage, 'passage id')}\t{int(grade)}\n")


def read_run(path: str | Path, problem: Problem = raise_problem) -> Run:
    """Read a run: query id -> passage id -> score. InputError at a malformed line, or a passage ranked twice."""
    path, run = Path(path), Run()
    for number, line in lines(path, problem):
        columns = fields(line, 6)
        wrong = "" if len(columns) == 6 else f"{len(columns)} columns: {line}"
        if not wrong:
            try:
                score = float(columns[4])
            except ValueError:
                score = math.nan
            wrong = f"the score {columns[4]!r}" if math.isnan(score) else bad_id(columns[0]) or bad_id(columns[2])
        if not wrong and columns[2] in run.get(columns[0], {}):
            wrong = f"passage {columns[2]!r} again for query {columns[0]!r}"
        if wrong:
            problem(bad_row("a run cannot be read", path, number, expected="qid Q0 docid rank score tag", got=wrong))
            continue
        run.setdefault(columns[0], {})[columns[2]] = score
    return run


def write_run(run: Run, path: str | Path, *, tag: str = "sparring") -> None:
    """Write a run: best score first, ties in the order given, ranks from 1. Scores read back exactly.

    A query without passages has no line. InputError for a NaN score.
    """
    path = Path(path)
    with write_text(path) as file:
        for query, scores in run.items():
            if any(math.isnan(score) for score in scores.values()):
                raise InputError(
                    "a score is NaN",
                    where=f"{at(path, 1)}, query {query}",
                    expected="finite scores",
                    got="NaN",
                    fix="find out why the model gives NaN: a diverged training or an overflow in half precision",
                )
            ranked = sorted(scores.items(), key=lambda item: -item[1])
            for rank, (passage, score) in enumerate(ranked, 1):
                ids = tsv_field(query, "query id"), tsv_field(passage, "passage id")
                file.write(f"{ids[0]}\tQ0\t{ids[1]}\t{rank}\t{float(score)!r}\t{tag}\n")
