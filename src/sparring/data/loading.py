"""Load a dataset: find its files, convert them once into memory-mapped tables in a cache, and check that labels fit."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import logging
import os
import shutil
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from sparring import __version__, files
from sparring.data import dpr, formats
from sparring.data.dataset import Dataset
from sparring.data.layout import Files, Layout, find
from sparring.data.rows import QueryRow
from sparring.data.table import FORMAT, TextTable, move_folder
from sparring.data.textfiles import Problem, at, bad_row, raise_problem
from sparring.files import Damaged, read_sealed, write_sealed
from sparring.types import InputError

logger = logging.getLogger("sparring")

CONVERSION = 2
"""Raised whenever the same files would be converted differently: older caches are then not used."""


@dataclass
class Origin:
    """Where rows came from: for every row of a table its file and line."""

    files: list[Path] = field(default_factory=list)
    file: array[int] = field(default_factory=lambda: array("H"))
    line: array[int] = field(default_factory=lambda: array("Q"))

    def note(self, path: Path, line: int) -> None:
        """Remember one more row."""
        if not self.files or self.files[-1] != path:
            self.files.append(path)
        self.file.append(len(self.files) - 1)
        self.line.append(line)

    def where(self, row: int) -> str:
        """``file:line`` of a row."""
        return at(self.files[self.file[row]], self.line[row])


def default_cache() -> Path:
    """$SPARRING_CACHE, or ``~/.cache/sparring``."""
    return Path(os.environ.get("SPARRING_CACHE") or Path.home() / ".cache" / "sparring")


def load(
    source: str | Path | None = None,
    *,
    cache: str | Path | None = None,
    corpus: Files | None = None,
    queries: Files | None = None,
    qrels: Files | None = None,
    titles: bool = True,
    strict: bool = True,
) -> Dataset:
    """Load a dataset from a folder (BEIR, MS MARCO, DPR or TREC files, also .gz), a dataset.toml, or named files.

    Args:
        source: the folder or file; may be left out when ``corpus``, ``queries`` and ``qrels`` are named.
        cache: where converted tables are kept, :func:`default_cache` by default. A second load of unchanged files
            (path, size, times of modification and of change) only maps them.
        corpus, queries, qrels: files to use in place of those found; ``qrels`` as {split: file}.
        titles: False ignores the passages' titles.
        strict: False loads what can be looked at but not trained on: duplicate ids, labels that point nowhere.

    Raises:
        InputError: at file:line, for a malformed row; with ``strict`` also for an empty corpus, no queries, a query
            without text, a repeated id, and labels that name an unknown query or passage.
    """
    layout = find(source, corpus=corpus, queries=queries, qrels=qrels, titles=titles)
    folder = Path(cache) if cache is not None else default_cache()
    folder = folder / "data" / _key(layout)
    if not folder.is_dir():
        convert(layout, folder)
    try:
        dataset = open_converted(layout, folder)
    except Damaged as error:
        logger.warning("%s is damaged and made again: %s", folder, error.got)
        spoilt = folder.with_name(f".{folder.name}.{os.getpid()}.old")
        with contextlib.suppress(FileNotFoundError):  # another process makes it again, too
            os.replace(folder, spoilt)
        shutil.rmtree(spoilt, ignore_errors=True)
        convert(layout, folder)
        dataset = open_converted(layout, folder)
    valid = folder / "valid"
    if strict and not valid.exists():
        _validate(dataset, layout)
        valid.touch()
    return dataset


def _key(layout: Layout) -> str:
    facts = []
    for path in layout.files:
        stat = path.stat()
        facts.append([str(path.resolve()), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns])
    roles = [len(layout.corpus), [s for s, _ in layout.queries], list(layout.qrels), list(layout.dpr), layout.titles]
    key = json.dumps([__version__, CONVERSION, FORMAT, facts, roles])
    return hashlib.blake2b(key.encode(), digest_size=16).hexdigest()


def open_converted(layout: Layout, folder: Path) -> Dataset:
    """The dataset that :func:`convert` wrote into ``folder``."""
    rest = read_sealed(folder / "rest.json", "a converted dataset", fix=f"delete {folder}: it is made again")
    answers = {query: tuple(texts) for query, texts in rest["answers"].items()}
    corpus, queries = TextTable.open(folder / "corpus"), TextTable.open(folder / "queries")
    return Dataset(corpus, queries, rest["qrels"], answers, layout.source)


def convert(
    layout: Layout,
    folder: Path,
    problem: Problem = raise_problem,
    *,
    passage_origin: Origin | None = None,
    query_origin: Origin | None = None,
) -> None:
    """Write the tables and labels of a layout into ``folder``, which appears only when all is there."""
    aside = files.beside(folder)
    try:
        try:
            aside.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(
                "the cache cannot be written",
                where=str(folder),
                expected="a folder this user can write to",
                got=error.strerror or str(error),
                fix="set SPARRING_CACHE, or give cache=",
            ) from error
        answers: dict[str, tuple[str, ...]] = {}
        TextTable.from_rows(_passages(layout, problem, passage_origin or Origin()), aside / "corpus")
        TextTable.from_rows(_queries(layout, problem, query_origin or Origin(), answers), aside / "queries")
        rest = {"qrels": _labels(layout, problem), "answers": answers}
        write_sealed(aside / "rest.json", rest, indent=None)
        move_folder(aside, folder, replace=False)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _passages(layout: Layout, problem: Problem, origin: Origin) -> Iterator[tuple[str, str, str]]:
    rows = ((path, row) for path in layout.corpus for row in formats.passages(path, problem))
    for path, row in rows if layout.corpus else dpr.union(layout.dpr, problem):
        origin.note(path, row.line)
        yield row.id, row.title if layout.titles else "", row.text


def _queries(
    layout: Layout, problem: Problem, origin: Origin, answers: dict[str, tuple[str, ...]]
) -> Iterator[tuple[str, str, str]]:
    """Queries of all files. One that several files have alike (dev and dev.small) is one query."""
    earlier: dict[str, bytes] = {}
    for path, rows in _query_files(layout, problem):
        here: dict[str, bytes] = {}
        for row in rows:
            text = hashlib.blake2b(row.text.encode(), digest_size=8).digest()
            known = earlier.get(row.id)
            if known is not None and known != text:
                got = f"{row.id!r} with another text: {row.text}"
                what = "a query id stands for two texts"
                problem(bad_row(what, path, row.line, expected="the text an earlier file gives it", got=got))
            if known is not None:
                continue
            here[row.id] = text
            if row.answers:
                answers[row.id] = row.answers
            origin.note(path, row.line)
            yield row.id, "", row.text
        earlier |= here


def _query_files(layout: Layout, problem: Problem) -> Iterator[tuple[Path, Iterator[QueryRow]]]:
    for split, path in layout.queries:
        yield path, formats.queries(path, problem, "" if split.startswith("#") else split)
    for split, path in layout.dpr.items():
        yield path, dpr.queries(path, split, problem)


def _labels(layout: Layout, problem: Problem) -> dict[str, dict[str, dict[str, int]]]:
    out: dict[str, dict[str, dict[str, int]]] = {}
    for split, path in layout.qrels.items():
        formats.add_labels(out.setdefault(split, {}), formats.labels(path, problem), path, problem)
    for split, path in layout.dpr.items():
        formats.add_labels(out.setdefault(split, {}), dpr.labels(path, split, problem), path, problem)
    return out


def _validate(dataset: Dataset, layout: Layout) -> None:
    """One InputError for what cannot be trained on or searched, the most basic first."""
    _not_empty(dataset, layout)
    _no_duplicates(dataset, layout)
    for row in range(len(dataset.queries)):
        if not dataset.queries.text(row).strip():
            raise InputError(
                "a query has no text",
                where=_locate(layout, row, "queries"),
                expected="a query with text",
                got=f"query {dataset.queries.id(row)!r} is empty",
                fix="give it a text or remove it",
            )
    for name, table in (("query", dataset.queries), ("passage", dataset.corpus)):
        for split, labels in dataset.qrels.items():
            named = set(labels) if name == "query" else set(itertools.chain.from_iterable(labels.values()))
            if unknown := {id for id in named if id not in table}:
                raise _nowhere(layout, split, name, unknown)


def _not_empty(dataset: Dataset, layout: Layout) -> None:
    files = layout.files
    for name, table, own in (
        ("passage", dataset.corpus, layout.corpus or tuple(layout.dpr.values())),
        ("query", dataset.queries, tuple(path for _, path in layout.queries) or tuple(layout.dpr.values())),
    ):
        if not len(table):
            raise InputError(
                f"the dataset has no {name}",
                where=", ".join(at(path, 1) for path in own or files),
                expected=f"at least one {name}",
                got="no rows",
                fix="check that the file is the right one and complete",
            )


def _no_duplicates(dataset: Dataset, layout: Layout) -> None:
    for role, table in (("corpus", dataset.corpus), ("queries", dataset.queries)):
        repeated = table.duplicate_rows()
        if len(repeated):
            row = int(repeated[0])
            first = _locate(layout, table.row(table.id(row)), role)
            raise InputError(
                f"the id {table.id(row)!r} occurs twice in the {role}",
                where=_locate(layout, row, role),
                expected="ids that occur once",
                got=f"first at {first}; {len(repeated)} repeated ids in all",
                fix="make the ids unique; sparring check lists them",
            )


def _locate(layout: Layout, row: int, role: str) -> str:
    """``file:line`` of a table's row, found by reading its files again up to there."""
    origin = Origin()
    rows = _passages(layout, raise_problem, origin) if role == "corpus" else _queries(layout, raise_problem, origin, {})
    next(itertools.islice(rows, row, None))
    return origin.where(row)


def label_rows(layout: Layout, split: str, problem: Problem) -> Iterator[tuple[Path, formats.Label]]:
    """Every label line of one split with its file."""
    if split in layout.qrels:
        yield from ((layout.qrels[split], row) for row in formats.labels(layout.qrels[split], problem))
    if split in layout.dpr:
        yield from ((layout.dpr[split], row) for row in dpr.labels(layout.dpr[split], split, problem))


def _nowhere(layout: Layout, split: str, name: str, unknown: set[str]) -> InputError:
    rows = label_rows(layout, split, raise_problem)
    named = ((path, row.line, row.query if name == "query" else row.passage) for path, row in rows)
    hits = [(path, line, id) for path, line, id in named if id in unknown]
    path, line, id = hits[0]
    return InputError(
        f"the labels of {split!r} name a {name} that does not exist",
        where=at(path, line),
        expected=f"the id of a {name} in the dataset",
        got=f"{id!r}; {len(hits)} such rows in this file",
        fix="run sparring check: it lists them; then correct the ids or remove these rows",
    )
