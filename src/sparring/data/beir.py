"""The BEIR layout: ``corpus.jsonl`` and ``queries.jsonl`` (``_id``, ``title``, ``text``), ``qrels/SPLIT.tsv``.

Answers of a query, where there are any, stand in ``metadata.answers``.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from sparring.data.rows import Label, PassageRow, QueryRow
from sparring.data.textfiles import (
    Problem,
    bad_id,
    bad_row,
    decode_json,
    encodable,
    grade,
    lines,
    raise_problem,
    tsv_field,
    write_text,
)
from sparring.types import Qrels

HEADER = ("query-id", "corpus-id", "score")


def passages(path: Path, problem: Problem = raise_problem) -> Iterator[PassageRow]:
    """Passages of a ``corpus.jsonl[.gz]``. ``title`` may be missing, null or empty."""
    for line, id, item in _objects(path, problem):
        yield PassageRow(line, id, item.get("title") or "", item["text"])


def queries(path: Path, problem: Problem = raise_problem) -> Iterator[QueryRow]:
    """Queries of a ``queries.jsonl[.gz]``, with ``metadata.answers`` where it is a list of strings."""
    for line, id, item in _objects(path, problem):
        metadata = item.get("metadata")
        answers = metadata.get("answers") if isinstance(metadata, dict) else None
        if not isinstance(answers, list) or not all(isinstance(answer, str) for answer in answers):
            answers = []
        if not all(map(encodable, answers)):
            got = "answers with half of a surrogate pair, which is not valid Unicode"
            problem(bad_row("an answer cannot be read", path, line, expected="valid Unicode", got=got))
            continue
        yield QueryRow(line, id, item["text"], tuple(answers))


def _objects(path: Path, problem: Problem) -> Iterator[tuple[int, str, dict[str, Any]]]:
    expected = 'one JSON object a line: {"_id": "...", "title": "...", "text": "..."}'
    for number, line in lines(path, problem):
        try:
            item = decode_json(line)
        except ValueError as error:
            problem(bad_row("a line is not JSON", path, number, expected=expected, got=f"{line[:100]} ({error})"))
            continue
        wrong = _wrong(item, surrogates="\\ud" in line or "\\uD" in line)
        if wrong:
            problem(bad_row("a line lacks what a row needs", path, number, expected=expected, got=wrong))
            continue
        yield number, str(item["_id"]), item


def _wrong(item: Any, surrogates: bool) -> str:
    """What is wrong with one decoded line, or an empty string. A whole number is taken as an id, as its digits."""
    if not isinstance(item, dict):
        return f"a JSON {type(item).__name__}"
    id = item.get("_id")
    if "_id" not in item or "text" not in item:
        return f"the keys {', '.join(map(repr, item)) or 'none'}"
    if not isinstance(id, str | int) or isinstance(id, bool):
        return f"_id {id!r}"
    for key in ("text", "title"):
        value = item.get(key, "")
        if not isinstance(value, str) and not (key == "title" and value is None):
            return f"{key} {value!r}"
        if surrogates and value and not encodable(value):
            return f"{key} with half of a surrogate pair, which is not valid Unicode"
    return bad_id(str(id))


def write_passages(rows: Iterable[tuple[str, str, str]], path: Path) -> None:
    """Write (id, title, text) rows as ``corpus.jsonl[.gz]``."""
    with write_text(path) as file:
        for id, title, text in rows:
            file.write(json.dumps({"_id": id, "title": title, "text": text}, ensure_ascii=False) + "\n")


def write_queries(rows: Iterable[tuple[str, str, tuple[str, ...]]], path: Path) -> None:
    """Write (id, text, answers) rows as ``queries.jsonl[.gz]``."""
    with write_text(path) as file:
        for id, text, answers in rows:
            item: dict[str, Any] = {"_id": id, "text": text}
            if answers:
                item["metadata"] = {"answers": list(answers)}
            file.write(json.dumps(item, ensure_ascii=False) + "\n")


def write_qrels(qrels: Qrels, path: Path) -> None:
    """Write labels as ``qrels/SPLIT.tsv[.gz]``: a header, then query id, passage id and grade separated by tabs."""
    with write_text(path) as file:
        file.write("\t".join(HEADER) + "\n")
        for query, grades in qrels.items():
            for passage, grade in grades.items():
                file.write(f"{tsv_field(query, 'query id')}\t{tsv_field(passage, 'passage id')}\t{int(grade)}\n")


def label(line: int, fields: list[str], path: Path, problem: Problem) -> Label | None:
    """One line of three fields; None after a problem."""
    wrong = bad_id(fields[0]) or bad_id(fields[1])
    try:
        value = grade(fields[2])
    except ValueError:
        wrong = wrong or f"the score {fields[2]!r}"
    if wrong:
        expected = "query-id<TAB>corpus-id<TAB>score, the score a whole number"
        problem(bad_row("a label cannot be read", path, line, expected=expected, got=wrong))
        return None
    return Label(line, fields[0], fields[1], value)
