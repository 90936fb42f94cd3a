"""Verdicts survive the table, whatever the ids and texts hold, and what cannot be meant is refused at its line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sparring.data import Dataset, load
from sparring.data.corrections import COLUMNS, ReviewRow, read_corrections, write_review
from sparring.types import InputError

PASSAGES = ["p 1", 'p"2"', "피\u2028삼", " p4", "'p5", "p6", "p7", "p8"]
TEXTS = ["delete it", "copy it", "move it", "list it", "reset it", "Reset  IT", "undo it", "search it"]
"""p6 has the text of 'p5 but for case and white space."""
LABELS = {"train": {"q 1": "p 1", '"q2"': "'p5"}, "dev": {"q3": "p7"}, "test": {"q4": "p8"}}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    folder = tmp_path_factory.mktemp("reviewed")
    (folder / "qrels").mkdir()
    corpus = [{"_id": id, "title": "", "text": text} for id, text in zip(PASSAGES, TEXTS, strict=True)]
    queries = [{"_id": id, "text": f"how to {id}"} for labels in LABELS.values() for id in labels]
    for name, rows in (("corpus", corpus), ("queries", queries)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    for split, labels in LABELS.items():
        lines = "".join(f"{query}\t{passage}\t2\n" for query, passage in labels.items())
        (folder / "qrels" / f"{split}.tsv").write_text("query-id\tcorpus-id\tscore\n" + lines, "utf-8")
    return load(folder, cache=folder / "cache")


def table(tmp_path: Path, *rows: str, end: str = "\n", head: str = "\t".join(COLUMNS)) -> Path:
    file = tmp_path / "verdicts.tsv"
    file.write_bytes("".join(f"{row}{end}" for row in (*([head] if head else []), *rows)).encode())
    return file


def test_what_an_audit_writes_is_read_back(data: Dataset, tmp_path: Path) -> None:
    """Every pair of a training query with a passage that is no label of it by id or text, each verdict in turn."""
    pairs = [("q 1", p) for p in PASSAGES[1:5]] + [('"q2"', p) for p in PASSAGES[:4]]
    verdicts = dict(zip(pairs, ("positive", "drop", "keep", "") * 2, strict=True))
    rows = [
        ReviewRow(q, p, -0.5, 3, "a\tquestion\r\nof two lines", 'a "title', "text\x85with\u2028odd ends\r", verdict)
        for (q, p), verdict in verdicts.items()
    ]
    write_review(rows, tmp_path / "audit.tsv")
    raw = (tmp_path / "audit.tsv").read_bytes().decode()
    assert [line.count("\t") for line in raw.split("\n")[:-1]] == [7] * 9
    assert "\r" not in raw
    found = read_corrections([tmp_path / "audit.tsv"], data)
    assert found.verdicts == {pair: verdict for pair, verdict in verdicts.items() if verdict}
    assert found.counts() == {"positive": 2, "drop": 2, "keep": 2}
    assert str(found) == "corrections: 2 positive, 2 drop, 2 keep"
    found.write(tmp_path / "again.tsv")
    assert read_corrections([tmp_path / "again.tsv"], data) == found
    for verdict in ("positive", "drop", "keep"):
        ids = [
            (data.queries.id(query), data.corpus.id(int(row)))
            for query, rows_of in found.rows(verdict, data).items()
            for row in rows_of
        ]
        assert sorted(ids) == sorted(found.pairs(verdict))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=5, max_size=5))
def test_no_text_breaks_a_line(tmp_path: Path, texts: list[str]) -> None:
    """Ids as any reader lets them through (no tab, no line break, not empty); texts are anything at all."""
    ids = [id.translate(dict.fromkeys(map(ord, "\t\r\n"))) or "x" for id in texts[:2]]
    write_review([ReviewRow(*ids, 1.0, 1, *texts[2:], "keep")], tmp_path / "audit.tsv")
    lines = (tmp_path / "audit.tsv").read_bytes().decode().split("\n")
    assert len(lines) == 3
    assert lines[1].split("\t")[:5] == ["keep", *ids, "1", "1"]
    assert len(lines[1].split("\t")) == len(COLUMNS)


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("head", ["\t".join(COLUMNS), "\ufeff" + "\t".join(COLUMNS), "\t".join(COLUMNS[:3]), ""])
def test_other_programs_tables_are_read(data: Dataset, tmp_path: Path, end: str, head: str) -> None:
    """CRLF, BOM, three columns, no header, spaces and capitals in the verdict, lines without anything."""
    file = table(tmp_path, " Keep\tq 1\tp7", "", "\t\t\t\t", "\tq 1\tp8\t0.1\t2\tx\ty\tz", end=end, head=head)
    assert read_corrections([file], data).verdicts == {("q 1", "p7"): "keep"}


def test_positives_become_labels_and_nothing_else_changes(data: Dataset, tmp_path: Path) -> None:
    file = table(tmp_path, "positive\tq 1\tp7", "positive\tq 1\tp 1", "drop\tq 1\tp8", 'keep\t"q2"\tp7')
    before = {split: {q: dict(labels) for q, labels in qrels.items()} for split, qrels in data.qrels.items()}
    corrected = read_corrections([file, file], data).apply(data)
    assert corrected.qrels["train"] == {"q 1": {"p 1": 2, "p7": 1}, '"q2"': {"'p5": 2}}
    assert corrected.qrels["dev"] is data.qrels["dev"]
    assert corrected.qrels["test"] is data.qrels["test"]
    assert data.qrels == before, "the data given was changed in place"
    assert corrected.fingerprint != data.fingerprint
    assert read_corrections([], data).apply(data) is data


@pytest.mark.parametrize(
    ("rows", "line", "words"),
    [
        (["maybe\tq 1\tp7"], 2, ["unknown verdict", "'maybe'", "positive, drop, keep"]),
        (["keep\tq 1\tp7", "keep\tq9\tp7"], 3, ["query that the data lacks", "'q9'"]),
        (["keep\tq 1\tp9"], 2, ["passage that the data lacks", "'p9'"]),
        (["keep\tq 1\tp4"], 2, ["passage that the data lacks", "'p4'"]),
        (["keep\tq3\tp 1"], 2, ["outside the training split", "dev"]),
        (["positive\tq4\tp 1"], 2, ["outside the training split", "test"]),
        (["drop\tq 1\tp 1"], 2, ["labelled positive cannot be drop"]),
        (['keep\t"q2"\tp6'], 2, ["labelled positive cannot be keep", "whose text is that of"]),
        (["keep\tq 1\tp7", "drop\tq 1\tp7"], 3, ["contradict", "verdicts.tsv:2"]),
        (["drop\tq 1\t'p5", "positive\tq 1\tp6"], 3, ["contradict", "equal text"]),
        (["keep q 1 p7"], 2, ["cannot be read", "tabs"]),
        (["keep\tq 1"], 2, ["cannot be read"]),
    ],
)
def test_what_cannot_be_meant_is_refused_at_its_line(
    data: Dataset, tmp_path: Path, rows: list[str], line: int, words: list[str]
) -> None:
    file = table(tmp_path, *rows)
    with pytest.raises(InputError) as caught:
        read_corrections([file], data)
    assert caught.value.where == f"{file}:{line}"
    assert all(word in str(caught.value) for word in words), caught.value


def test_contradictions_between_files_name_both(data: Dataset, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    first, second = table(tmp_path / "a", "keep\tq 1\tp7"), table(tmp_path, "positive\tq 1\tp7")
    with pytest.raises(InputError) as caught:
        read_corrections([first, second], data)
    assert f"{first}:2" in caught.value.expected
    assert caught.value.where == f"{second}:2"


def test_a_file_that_is_not_there(data: Dataset, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        read_corrections([tmp_path / "none.tsv"], data)
