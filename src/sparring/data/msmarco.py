"""MS MARCO's tab-separated files: ``pid<TAB>text`` or ``pid<TAB>title<TAB>text``, and ``qid<TAB>text``.

Nothing is quoted in them, so no field holds a tab or a line break. Its qrels have TREC's four columns: see ``trec``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

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
