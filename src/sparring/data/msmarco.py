"""MS MARCO's tab-separated files: ``pid<TAB>text`` or ``pid<TAB>title<TAB>text``, and ``qid<TAB>text``.

Nothing is quoted in them, so no field holds a tab or a line break. Its qrels have TREC's four columns: see ``trec``.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from sparring.data.rows import PassageRow, QueryRow
from sparring.data.textfiles import Problem, bad_id, bad_row, lines, raise_problem, tsv_field, write_text
from sparring.types import InputError


def passages(path: Path, problem: Problem = raise_problem) -> Iterator[PassageRow]:
    """Passages of a ``collection.tsv[.gz]`` or ``corpus.tsv[.gz]``. The first row decides whether there are titles."""
    columns = 0
    for number, line in lines(path, problem):
        fields = line.split("\t")
        columns = columns or (len(fields) if len(fields) in (2, 3) else 0)
        wrong = bad_id(fields[0]) if columns and len(fields) == columns else f"{len(fields)} columns: {line[:100]}"
        if wrong:
            shapes = {0: "pid<TAB>text or pid<TAB>title<TAB>text", 2: "pid<TAB>text", 3: "pid<TAB>title<TAB>text"}
            expected = shapes[columns] + (", as in the first row" if columns else "")
            problem(bad_row("a passage cannot be read", path, number, expected=expected, got=wrong))
            continue
        yield PassageRow(number, fields[0], fields[1] if columns == 3 else "", fields[-1])


def queries(path: Path, problem: Problem = raise_problem) -> Iterator[QueryRow]:
    """Queries of a ``queries.SPLIT.tsv[.gz]``, or TREC topics as a table: id, tab, text."""
    for number, line in lines(path, problem):
        fields = line.split("\t")
        wrong = bad_id(fields[0]) if len(fields) == 2 else f"{len(fields)} columns: {line[:100]}"
        if wrong:
            problem(bad_row("a query cannot be read", path, number, expected="qid<TAB>text", got=wrong))
            continue
        yield QueryRow(number, fields[0], fields[1])


def with_titles(texts: Path, titles: Path, problem: Problem = raise_problem) -> Iterator[PassageRow]:
    """RocketQA's title-augmented passages: ``para.txt`` (``pid<TAB>text``) with ``para.title.txt`` (``pid<TAB>title``).

    Both are in the order of their whole-number ids, so they are read side by side and nothing is held. A passage may
    have no title; a title without a passage is a problem, and so is an id that is not after the one before it.
    """
    waiting = _ascending(titles, "a title", problem)
    title = next(waiting, None)
    for line, id, text in _ascending(texts, "a passage", problem):
        while title is not None and int(title[1]) < int(id):
            problem(_lonely(titles, title))
            title = next(waiting, None)
        if title is not None and int(title[1]) == int(id):
            yield PassageRow(line, id, title[2], text)
            title = next(waiting, None)
        else:
            yield PassageRow(line, id, "", text)
    for left in itertools.chain([title] if title is not None else [], waiting):
        problem(_lonely(titles, left))


def _ascending(path: Path, what: str, problem: Problem) -> Iterator[tuple[int, str, str]]:
    """(line, id, text) of two columns whose ids are whole numbers that rise from line to line."""
    before = -1
    for number, line in lines(path, problem):
        fields = line.split("\t")
        usable = len(fields) == 2 and fields[0].isdecimal() and fields[0].isascii() and len(fields[0]) < 19
        if not usable or int(fields[0]) <= before:
            got = f"{line[:100]}" + (f", after the id {before}" if usable else "")
            expected = "number<TAB>text, sorted by the number, each once"
            problem(bad_row(f"{what} cannot be read", path, number, expected=expected, got=got))
            continue
        before = int(fields[0])
        yield number, fields[0], fields[1]


def _lonely(path: Path, title: tuple[int, str, str]) -> InputError:
    expected = "the id of a passage of the other file"
    return bad_row("a title belongs to no passage", path, title[0], expected=expected, got=f"the id {title[1]!r}")


class Candidate(NamedTuple):
    """One line of a ``top1000`` file."""

    line: int
    query: str
    passage: str
    query_text: str
    text: str


def candidates(path: Path, problem: Problem = raise_problem) -> Iterator[Candidate]:
    """Lines of a ``top1000.dev.tsv[.gz]``: ``qid<TAB>pid<TAB>query<TAB>passage``, BM25's passages in no set order."""
    for number, line in lines(path, problem):
        fields = line.split("\t")
        wrong = f"{len(fields)} columns: {line[:100]}" if len(fields) != 4 else bad_id(fields[0]) or bad_id(fields[1])
        if wrong:
            expected = "qid<TAB>pid<TAB>query<TAB>passage"
            problem(bad_row("a candidate cannot be read", path, number, expected=expected, got=wrong))
            continue
        yield Candidate(number, *fields)


def write_passages(rows: Iterable[tuple[str, str, str]], path: Path, *, titles: bool) -> None:
    """Write (id, title, text) rows with three columns, or with two when ``titles`` is off and no row has one.

    InputError when a text holds a tab or a line break (this format cannot hold it), or a title would be lost.
    """
    with write_text(path) as file:
        for id, title, text in rows:
            if title and not titles:
                raise InputError(
                    "a title would be lost",
                    where=f"passage {id}",
                    expected="passages without titles",
                    got=title[:80],
                    fix="write with titles=True (three columns)",
                )
            fields = (id, title, text) if titles else (id, text)
            file.write("\t".join(tsv_field(field, f"passage {id}") for field in fields) + "\n")


def write_queries(rows: Iterable[tuple[str, str]], path: Path) -> None:
    """Write (id, text) rows. InputError when a text holds a tab or a line break."""
    with write_text(path) as file:
        for id, text in rows:
            file.write(f"{tsv_field(id, f'query {id}')}\t{tsv_field(text, f'query {id}')}\n")
