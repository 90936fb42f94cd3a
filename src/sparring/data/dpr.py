"""DPR's files: training lists in JSON (question, answers, positive and hard negative contexts), ``psgs_w100.tsv``, and
questions with answers alone (``nq-test.qa.csv``).

The lists are read as a stream: NQ's is 7 GB. A question without an ``id`` gets ``SPLIT-0``, ``SPLIT-1`` ... by place.
"""

from __future__ import annotations

import ast
import codecs
import csv
import hashlib
import json
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sparring.data.rows import Label, PassageRow, QueryRow
from sparring.data.textfiles import (
    Problem,
    at,
    bad_id,
    bad_row,
    encodable,
    lines,
    not_utf8,
    open_binary,
    raise_problem,
    tsv_field,
    write_text,
)
from sparring.types import InputError

_AHEAD = 1 << 16  # characters to have before an item is decoded
_SPACE, _COMMA = re.compile(r"[ \t\r\n]*"), re.compile(r"[ \t\r\n,]*")

HEADER = ["id", "text", "title"]
ROW = "id<TAB>text<TAB>title after a header line, quoted as by Python's csv"
QA = "question<TAB>['an answer', 'another']"
_LITERAL = 1 << 16
CONTEXTS = ("positive_ctxs", "hard_negative_ctxs", "negative_ctxs")
EXPECTED = '{"question": "...", "answers": [], "positive_ctxs": [{"title": "", "text": "...", "passage_id": "1"}], ...}'


class Question(NamedTuple):
    """One item of a training list."""

    row: QueryRow
    positives: list[PassageRow]
    others: list[PassageRow]


def table(path: Path, problem: Problem = raise_problem) -> Iterator[PassageRow]:
    """Passages of a ``psgs_w100.tsv[.gz]``: header id, text, title; quoted as by Python's csv."""
    csv.field_size_limit(2**31 - 1)  # the default refuses fields over 128 KiB
    ends = [0]

    def text() -> Iterator[str]:
        for number, line in lines(path, problem, blank=True):
            ends[0] = number
            yield line + "\n"

    reader, header = csv.reader(text(), delimiter="\t", strict=True), True
    while True:
        start = ends[0] + 1
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            problem(bad_row("a passage cannot be read", path, start, expected=ROW, got=str(error)))
            continue
        first, header = header and bool(row), header and not row
        if not row or (first and row == HEADER):
            continue
        wrong = bad_id(row[0]) if len(row) == 3 else f"{len(row)} columns: {row}"
        if wrong:
            problem(bad_row("a passage cannot be read", path, start, expected=ROW, got=wrong))
            continue
        yield PassageRow(start, row[0], row[2], row[1])


def questions(path: Path, split: str, problem: Problem = raise_problem) -> Iterator[Question]:
    """The items of a training list in order. Contexts without an id get one from their title and text."""
    for index, (line, item) in enumerate(_items(path, problem)):
        wrong = _wrong(item)
        if wrong:
            problem(bad_row("a question lacks what it needs", path, line, expected=EXPECTED, got=wrong))
            continue
        id = str(item.get("id", f"{split}-{index}"))
        row = QueryRow(line, id, item["question"], tuple(item.get("answers") or ()))
        contexts = [[_context(line, context) for context in item.get(key) or ()] for key in CONTEXTS]
        yield Question(row, contexts[0], contexts[1] + contexts[2])


def answered(path: Path, split: str, problem: Problem = raise_problem) -> Iterator[QueryRow]:
    """Questions of a ``nq-test.qa.csv`` or ``trivia-dev.qa.csv[.gz]``: question, tab, a Python list of answers.

    They have no labels. Ids as in the lists: ``SPLIT-0``, ``SPLIT-1`` ... by place. The list is read as a literal:
    nothing in it is run.
    """
    csv.field_size_limit(2**31 - 1)
    rows = ((number, line + "\n") for number, line in lines(path, problem))
    for place, (number, line) in enumerate(rows):
        try:
            fields = next(csv.reader([line], delimiter="\t", strict=True), [])
            found = answer_list(fields[1]) if len(fields) == 2 else None
            wrong = f"{len(fields)} columns: {line[:100]}" if found is None else ""
        except (csv.Error, ValueError) as error:
            found, wrong = None, str(error)
        if found is None:
            problem(bad_row("a question cannot be read", path, number, expected=QA, got=wrong))
            continue
        yield QueryRow(number, f"{split}-{place}", fields[0], found)


def answer_list(text: str) -> tuple[str, ...]:
    """The strings of ``['a', "b"]``. ValueError for anything else, or more than 64 KiB."""
    if len(text) > _LITERAL:
        raise ValueError(f"a list of answers of {len(text)} characters")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)  # of a backslash that escapes nothing
            found = ast.literal_eval(text.strip())
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError) as error:
        raise ValueError(f"no list of answers: {text[:80]!r} ({type(error).__name__})") from None
    if not isinstance(found, list) or not all(isinstance(one, str) and encodable(one) for one in found):
        raise ValueError(f"no list of texts: {text[:80]!r}")
    return tuple(found)


def _context(line: int, context: dict[str, Any]) -> PassageRow:
    title, text = context.get("title") or "", context["text"]
    return PassageRow(line, _context_id(context) or _content_id(title, text), title, text)


def _context_id(context: Mapping[str, Any]) -> str:
    id = context.get("passage_id", context.get("psg_id"))
    return "" if id is None else str(id)


def _is_id(value: object) -> bool:
    """Whether a JSON value can be an id: text, or a whole number (as its digits)."""
    return isinstance(value, str | int) and not isinstance(value, bool)


def _content_id(title: str, text: str) -> str:
    return "ctx-" + hashlib.blake2b(json.dumps([title, text]).encode(), digest_size=8).hexdigest()


def _wrong(item: Any) -> str:
    """What is wrong with one item, or an empty string."""
    if not isinstance(item, dict) or not isinstance(item.get("question"), str):
        return f"the keys {', '.join(map(repr, item))}" if isinstance(item, dict) else f"a JSON {type(item).__name__}"
    texts, id = [item["question"]], item.get("id", "-")
    if not _is_id(id) or (wrong := bad_id(str(id))):
        return f"the id {id!r}" if not _is_id(id) else wrong
    answers = _given(item, "answers", [])
    if not isinstance(answers, list) or not all(isinstance(answer, str) for answer in answers):
        return f"answers {answers!r}"
    for key in CONTEXTS:
        contexts = _given(item, key, [])
        if not isinstance(contexts, list):
            return f"{key} {contexts!r}"
        for context in contexts:
            if not isinstance(context, dict) or not isinstance(context.get("text"), str):
                return f"a context without text in {key}: {context!r}"
            title, passage = _given(context, "title", ""), _context_id(context)
            id = context.get("passage_id", context.get("psg_id"))
            if not isinstance(title, str) or not (id is None or _is_id(id)) or (passage and bad_id(passage)):
                return f"a context in {key} with title {title!r} and id {id!r}"
            texts += [context["text"], title]
    return "" if all(map(encodable, texts + answers)) else "half of a surrogate pair, which is not valid Unicode"


def _given(item: Mapping[str, Any], key: str, default: Any) -> Any:
    """A value that may be missing or null."""
    value = item.get(key)
    return default if value is None else value


def _items(path: Path, problem: Problem) -> Iterator[tuple[int, Any]]:
    """(line, item) of a JSON list, read in pieces: memory is bounded by the longest item."""
    decode, pieces, whole = json.JSONDecoder().raw_decode, _pieces(path, problem), f"[{EXPECTED}, ...]"
    buffer, position, line, need, ended, started = "", 0, 1, _AHEAD, False, False
    while True:
        while not ended and len(buffer) - position < need:
            piece = next(pieces, "")
            buffer, position, ended = buffer[position:] + piece, 0, not piece
        space = (_COMMA if started else _SPACE).match(buffer, position)
        end = space.end() if space else position
        line, position = line + buffer.count("\n", position, end), end
        if position == len(buffer):
            if ended:
                problem(bad_row("a JSON list is not complete", path, line, expected=whole, got="the end of the file"))
                return
            continue
        if not started and buffer[position] == "[":
            started, position = True, position + 1
            continue
        if started and buffer[position] == "]":
            rest = (buffer[position + 1 :] + "".join(pieces)).strip(" \t\r\n")
            if rest:
                got = f"more after its end: {rest[:60]!r}"
                problem(bad_row("a file is not one JSON list", path, line, expected=whole, got=got))
            return
        try:
            if not started:
                raise json.JSONDecodeError("Expecting '['", buffer, position)
            item, end = decode(buffer, position)
        except json.JSONDecodeError as error:
            if not ended and (error.msg.startswith("Unterminated string") or error.pos > len(buffer) - 32):
                need = 2 * max(need, len(buffer) - position)  # the item may go on: read on before judging
                continue
            line += buffer.count("\n", position, error.pos)
            got = f"{error.msg}: {buffer[max(0, error.pos - 20) : error.pos + 40]!r}"
            problem(bad_row("a file is not a JSON list of questions", path, line, expected=whole, got=got))
            return
        except (RecursionError, ValueError) as error:  # nested too deeply, or a number of thousands of digits
            got = str(error) if isinstance(error, ValueError) else "an item that is nested too deeply"
            problem(bad_row("a file is not a JSON list of questions", path, line, expected=whole, got=got))
            return
        yield line, item
        line, position, need = line + buffer.count("\n", position, end), end, _AHEAD


def _pieces(path: Path, problem: Problem) -> Iterator[str]:
    decode = codecs.getincrementaldecoder("utf-8-sig")().decode
    with open_binary(path) as file:
        done = 0
        while True:
            piece = file.read(1 << 20)
            try:
                yield decode(piece, not piece)
            except UnicodeDecodeError as error:
                problem(not_utf8(f"{path}, within the MiB after byte {done}", error))
                return
            if not piece:
                return
            done += len(piece)


def contexts(path: Path, split: str, problem: Problem = raise_problem) -> Iterator[PassageRow]:
    """All contexts of a list, repeated as often as they occur."""
    for question in questions(path, split, problem):
        yield from question.positives
        yield from question.others


def queries(path: Path, split: str, problem: Problem = raise_problem) -> Iterator[QueryRow]:
    """The questions of a list."""
    for question in questions(path, split, problem):
        yield question.row


def labels(path: Path, split: str, problem: Problem = raise_problem) -> Iterator[Label]:
    """Every positive context as a label of grade 1."""
    for question in questions(path, split, problem):
        for passage in question.positives:
            yield Label(passage.line, question.row.id, passage.id, 1)


def write_table(rows: Iterable[tuple[str, str, str]], path: Path) -> None:
    """Write (id, title, text) rows as ``psgs_w100.tsv[.gz]``."""
    with write_text(path) as file:
        writer = csv.writer(file, delimiter="\t", lineterminator="\n")
        writer.writerow(HEADER)
        for id, title, text in rows:
            if "\r" in text or "\r" in title:
                tsv_field(text + title, f"passage {id}")
            writer.writerow([tsv_field(id, f"passage {id}"), text, title])


def write_list(items: Iterable[tuple[QueryRow, Sequence[PassageRow], Sequence[PassageRow]]], path: Path) -> None:
    """Write (query, positives, hard negatives) items as a training list, one item a line."""
    with write_text(path) as file:
        file.write("[")
        for number, (query, positives, negatives) in enumerate(items):
            item = {
                "id": query.id,
                "question": query.text,
                "answers": list(query.answers),
                "positive_ctxs": [_plain(passage) for passage in positives],
                "negative_ctxs": [],
                "hard_negative_ctxs": [_plain(passage) for passage in negatives],
            }
            file.write((",\n" if number else "\n") + json.dumps(item, ensure_ascii=False))
        file.write("\n]\n")


def _plain(passage: PassageRow) -> dict[str, str]:
    return {"title": passage.title, "text": passage.text, "passage_id": passage.id}


def union(files: Mapping[str, Path], problem: Problem = raise_problem) -> Iterator[tuple[Path, PassageRow]]:
    """The distinct contexts of several lists, in order of first appearance. One id with two texts is a problem."""
    seen: dict[str, bytes] = {}
    for split, path in files.items():
        for row in contexts(path, split, problem):
            content = hashlib.blake2b(json.dumps([row.title, row.text]).encode(), digest_size=8).digest()
            if row.id not in seen:
                seen[row.id] = content
                yield path, row
            elif seen[row.id] != content:
                problem(
                    InputError(
                        "a passage id stands for two texts",
                        where=at(path, row.line),
                        expected="one text per passage id",
                        got=f"{row.id!r} with another title or text: {row.text[:60]!r}",
                        fix="give the corpus file (corpus=...), or correct the ids",
                    )
                )
