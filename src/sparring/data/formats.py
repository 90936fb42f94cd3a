"""Which reader reads which file: by its name's ending and its first line. All are streams of rows with line numbers.

========== ======================================== =========================================
role       file                                     module
========== ======================================== =========================================
passages   ``.jsonl`` / ``.tsv`` / id-text-title    ``beir`` / ``msmarco`` / ``dpr.table``
queries    ``.jsonl`` / ``id<TAB>text`` / ``<top>`` ``beir`` / ``msmarco`` / ``trec.topics``
           ``.qa.csv``                              ``dpr.answered``
qrels      3 columns / 4 columns                    ``beir`` / ``trec`` (and MS MARCO)
========== ======================================== =========================================

Each may be gzipped (``.gz``). DPR's training lists (``dpr.questions``) hold all three at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from sparring.data import beir, dpr, msmarco, trec
from sparring.data.dataset import Dataset, split_name
from sparring.data.rows import Label, PassageRow, QueryRow
from sparring.data.table import TextTable
from sparring.data.textfiles import Problem, bad_row, ignore_problem, lines, raise_problem
from sparring.types import InputError, Qrels

QA = ".qa.csv"
_STEP = 4096  # rows written at once


def plain_suffix(path: Path) -> str:
    """The ending of a file's name without ``.gz``: ``.jsonl``, ``.tsv``, ``.json``, ``.txt``."""
    return (path.with_suffix("") if path.suffix == ".gz" else path).suffix.lower()


def _first(path: Path) -> str:
    return next((line for _, line in lines(path, ignore_problem)), "")


def passages(path: Path, problem: Problem = raise_problem) -> Iterator[PassageRow]:
    """Passages of one file: JSON lines (BEIR), DPR's table (by its header), else MS MARCO's columns."""
    if plain_suffix(path) in (".jsonl", ".json"):
        return beir.passages(path, problem)
    return (dpr.table if _first(path).split("\t") == dpr.HEADER else msmarco.passages)(path, problem)


def queries(path: Path, problem: Problem = raise_problem, split: str = "") -> Iterator[QueryRow]:
    """Queries of one file: JSON lines (BEIR), DPR's questions with answers (``.qa.csv``; ids begin with the split, by
    default the last word of the name), TREC topics (by their ``<top>``), else two columns."""
    if path.name.removesuffix(".gz").endswith(QA):
        return dpr.answered(path, split or path.name.partition(QA)[0].rpartition("-")[2], problem)
    if plain_suffix(path) in (".jsonl", ".json"):
        return beir.queries(path, problem)
    return (trec.topics if _first(path).lstrip().lower().startswith("<top>") else msmarco.queries)(path, problem)


def labels(path: Path, problem: Problem = raise_problem) -> Iterator[Label]:
    """Labels of one qrels file: three columns with or without BEIR's header, or TREC's four (MS MARCO's too)."""
    count = 0
    for number, line in lines(path, problem):
        count = count or _columns(line)
        columns = trec.fields(line, count or 4)
        if not count or len(columns) != count:
            known = {3: "query-id corpus-id score", 4: "qid iter docid rel"}
            expected = known[count] + ", as in the first line" if count else " or ".join(known.values())
            got = f"{len(columns)} columns: {line}"
            problem(bad_row("a label cannot be read", path, number, expected=expected, got=got))
        elif number > 1 or tuple(columns) != beir.HEADER:
            row = (beir if count == 3 else trec).label(number, columns, path, problem)
            if row is not None:
                yield row


def _columns(line: str) -> int:
    """How many columns a qrels file has, from its first line: 3 or 4, by tabs where these give so many; else 0."""
    found = [len(line.split("\t")), len(line.split())]
    return next((count for count in found if count in (3, 4)), 0)


def read_qrels(path: str | Path) -> dict[str, dict[str, int]]:
    """Read a qrels file of either form: query id -> passage id -> grade."""
    out: dict[str, dict[str, int]] = {}
    add_labels(out, labels(Path(path)), Path(path))
    return out


def add_labels(
    qrels: dict[str, dict[str, int]], rows: Iterator[Label], path: Path, problem: Problem = raise_problem
) -> None:
    """Add rows to ``qrels``. A label given twice counts once; given twice with two grades it is a problem."""
    for row in rows:
        known = qrels.setdefault(row.query, {}).setdefault(row.passage, row.grade)
        if known != row.grade:
            got = f"query {row.query!r}, passage {row.passage!r}: grade {known} before, {row.grade} here"
            what = "a label is given with two grades"
            problem(bad_row(what, path, row.line, expected="one grade per query and passage", got=got))


def write_qrels(qrels: Qrels, path: str | Path, *, style: Literal["beir", "trec"] = "beir") -> None:
    """Write labels with BEIR's three columns and header, or with TREC's (and MS MARCO's) four."""
    (beir if style == "beir" else trec).write_qrels(qrels, Path(path))


def rows_of(table: TextTable) -> Iterator[tuple[str, str, str]]:
    """(id, title, text) of a table, in order, as a stream."""
    for start in range(0, len(table), _STEP):
        rows = range(start, min(start + _STEP, len(table)))
        yield from zip(table.ids(rows), map(table.title, rows), map(table.body, rows), strict=True)


def save_beir(dataset: Dataset, folder: str | Path, *, gz: bool = False) -> Path:
    """Write a dataset in the BEIR layout, answers included. InputError when the folder has files already."""
    folder, end = _fresh(folder), ".gz" if gz else ""
    beir.write_passages(rows_of(dataset.corpus), folder / f"corpus.jsonl{end}")
    answers = dataset.answers
    rows = ((id, text, tuple(answers.get(id, ()))) for id, _, text in rows_of(dataset.queries))
    beir.write_queries(rows, folder / f"queries.jsonl{end}")
    for split, qrels in dataset.qrels.items():
        beir.write_qrels(qrels, folder / "qrels" / f"{split_name(split)}.tsv{end}")
    return folder


def save_msmarco(dataset: Dataset, folder: str | Path, *, gz: bool = False) -> Path:
    """Write ``corpus.tsv`` (three columns) or ``collection.tsv`` (no titles), ``queries.tsv``, ``qrels.SPLIT.tsv``."""
    folder, end = _fresh(folder), ".gz" if gz else ""
    titles = any(title for _, title, _ in rows_of(dataset.corpus))
    name = "corpus" if titles else "collection"
    msmarco.write_passages(rows_of(dataset.corpus), folder / f"{name}.tsv{end}", titles=titles)
    msmarco.write_queries(((id, text) for id, _, text in rows_of(dataset.queries)), folder / f"queries.tsv{end}")
    for split, qrels in dataset.qrels.items():
        trec.write_qrels(qrels, folder / f"qrels.{split_name(split)}.tsv{end}")
    return folder


def save_dpr(dataset: Dataset, folder: str | Path, *, gz: bool = False) -> Path:
    """Write ``psgs_w100.tsv`` and one training list a split, ``biencoder-SPLIT.json``. Only positives can be kept."""
    folder, end = _fresh(folder), ".gz" if gz else ""
    corpus, texts = dataset.corpus, dataset.queries
    dpr.write_table(rows_of(corpus), folder / f"psgs_w100.tsv{end}")

    def passage(id: str) -> PassageRow:
        row = corpus.row(id)
        return PassageRow(0, id, corpus.title(row), corpus.body(row))

    for split, qrels in dataset.qrels.items():
        items = (
            (
                QueryRow(0, query, texts.text(texts.row(query)), tuple(dataset.answers.get(query, ()))),
                [passage(id) for id, grade in grades.items() if grade > 0],
                (),
            )
            for query, grades in qrels.items()
        )
        dpr.write_list(items, folder / f"biencoder-{split_name(split)}.json{end}")
    return folder


def _fresh(folder: str | Path) -> Path:
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(
            "the folder to write to is already used",
            where=str(folder),
            expected="a new or empty folder",
            got="files are there",
            fix="choose another folder, or remove this one",
        )
    return folder
