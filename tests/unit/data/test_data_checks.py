"""Every finding of ``check``, its level, count and place; a clean dataset has none."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path

import pytest
from dataset_files import beir_files, write

from sparring.data import Finding, Report, check
from sparring.types import InputError

HEADER = "query-id\tcorpus-id\tscore\n"


def jsonl(*rows: tuple[str, str]) -> str:
    return "".join(json.dumps({"_id": id, "text": text}, ensure_ascii=False) + "\n" for id, text in rows)


def dataset(folder: Path, corpus: str = "", queries: str = "", **qrels: str) -> Path:
    write(folder / "corpus.jsonl", corpus or jsonl(("p1", "one"), ("p2", "two"), ("p3", "three")))
    write(folder / "queries.jsonl", queries or jsonl(("q1", "a"), ("q2", "b"), ("q3", "c")))
    for split, rows in (qrels or {"train": "q1\tp1\t1\n", "test": "q2\tp2\t1\n"}).items():
        write(folder / "qrels" / f"{split}.tsv", HEADER + rows)
    return folder


def only(report: Report, code: str) -> Finding:
    (found,) = [finding for finding in report.findings if finding.code == code]
    return found


def test_a_clean_dataset(tmp_path: Path) -> None:
    report = check(dataset(tmp_path))
    assert report.errors == ()
    assert report.warnings == ()
    assert report.counts == {
        "passages": 3, "queries": 3, "labelled queries in test": 1, "positives in test": 1,
        "labelled queries in train": 1, "positives in train": 1,
    }  # fmt: skip
    assert only(report, "unlabelled-query").examples == ("q3",)
    assert only(report, "passage-characters").details["max"] == 5
    assert only(report, "query-words").details["median"] == 1


def test_report_for_tables_and_json(tmp_path: Path) -> None:
    report = check(dataset(tmp_path, queries=jsonl(("q1", ""), ("q2", "b"))))
    assert [row[0] for row in report.rows()] == sorted([row[0] for row in report.rows()], key="error warning info".find)
    assert report.rows()[0][:3] == ("error", "empty-query", 1)
    plain = json.loads(json.dumps(report.to_dict()))
    assert plain["errors"] == 1
    assert plain["findings"][0]["examples"] == [f"{tmp_path}/queries.jsonl:1: q1"]
    assert all(finding.fix for finding in report.errors + report.warnings)


def test_malformed_rows_are_all_collected(tmp_path: Path) -> None:
    folder = dataset(
        tmp_path, corpus=jsonl(("p1", "one"), ("p2", "two")) + "{\n[]\n{}\n", train="q1\tp1\tx\nq1\tp1\t1\n"
    )
    report = check(folder)
    found = [finding for finding in report.findings if finding.code == "malformed-row"]
    assert {finding.level for finding in found} == {"error"}
    assert sum(finding.count for finding in found) == 4
    examples = " ".join(example for finding in found for example in finding.examples)
    for place in ("corpus.jsonl:3", "corpus.jsonl:4", "corpus.jsonl:5", "train.tsv:2"):
        assert place in examples
    assert report.counts["passages"] == 2


def test_duplicates(tmp_path: Path) -> None:
    corpus = jsonl(("p1", "one"), ("p2", "Two"), ("p1", "else"), ("p4", " two "))
    report = check(dataset(tmp_path, corpus, jsonl(("q1", "A"), ("q2", "b"), ("q1", "a"))))
    ids, texts = only(report, "duplicate-passage-id"), only(report, "duplicate-passage-text")
    assert (ids.level, ids.count, ids.examples) == ("error", 1, (f"{tmp_path}/corpus.jsonl:3: p1",))
    assert (texts.level, texts.count) == ("warning", 1)
    assert texts.examples == (f"{tmp_path}/corpus.jsonl:4: p4 has the text of p2",)
    assert only(report, "duplicate-query-id").level == "error"
    assert only(report, "duplicate-query-text").count == 1


def test_empty_texts(tmp_path: Path) -> None:
    report = check(dataset(tmp_path, jsonl(("p1", "one"), ("p2", " \n"), ("p3", "")), jsonl(("q1", ""), ("q2", "b"))))
    assert (only(report, "empty-passage").level, only(report, "empty-passage").count) == ("warning", 2)
    assert only(report, "empty-query").level == "error"
    assert not [finding for finding in report.findings if finding.code == "duplicate-passage-text"]


def test_no_rows_at_all(tmp_path: Path) -> None:
    report = check(dataset(tmp_path, "\n", "\n", train=""))
    assert {finding.code for finding in report.errors} == {"no-passage", "no-query"}
    assert only(report, "unlabelled-split").examples == ("train",)
    assert only(report, "no-train-split").level == "warning"


def test_labels_that_point_nowhere(tmp_path: Path) -> None:
    nfc = "문서"
    corpus = jsonl(("p1", "one"), ("p2", "two"), (unicodedata.normalize("NFD", nfc), "three"))
    report = check(
        dataset(tmp_path, corpus, train=f"q1\tp1\t1\nq1\tgone\t1\nnobody\tp1\t1\nq1\t{nfc}\t1\n", test="q2\tp2\t1\n")
    )
    passages, queries = only(report, "unknown-passage"), only(report, "unknown-query")
    assert (passages.level, passages.count) == ("error", 2)
    assert passages.examples[0] == f"{tmp_path}/qrels/train.tsv:3: gone"
    assert "1 would match in another Unicode form" in passages.message
    assert queries.examples == (f"{tmp_path}/qrels/train.tsv:4: nobody",)


@pytest.mark.parametrize(("one", "two", "level"), [("train", "test", "error"), ("dev", "test", "warning")])
def test_a_query_in_two_splits(tmp_path: Path, one: str, two: str, level: str) -> None:
    queries = jsonl(("q1", "Same  words"), ("q2", "same words"), ("q3", "c"))
    report = check(dataset(tmp_path, "", queries, **{one: "q1\tp1\t1\nq3\tp3\t1\n", two: "q2\tp2\t1\nq3\tp2\t1\n"}))
    assert (only(report, "query-in-two-splits").level, only(report, "query-in-two-splits").count) == (level, 1)
    same = only(report, "query-text-in-two-splits")
    assert (same.level, same.count) == ("warning", 1)
    assert {"q1", "q2"} <= set(same.examples[0].split())


def test_positives_seen_in_training_by_text(tmp_path: Path) -> None:
    corpus = jsonl(("p1", "one"), ("p2", "ONE"), ("p3", "three"), ("p4", "four"))
    report = check(dataset(tmp_path, corpus, train="q1\tp1\t1\nq1\tp4\t0\n", test="q2\tp2\t1\nq2\tp3\t1\nq3\tp4\t1\n"))
    leak = only(report, "positive-seen-in-training")
    assert (leak.level, leak.count, leak.examples) == ("warning", 1, ("p2 of 'test'",))  # p4 is no positive in train
    assert leak.details["share"] == pytest.approx(1 / 3)


def test_unlabelled_split_and_query_without_positive(tmp_path: Path) -> None:
    write(tmp_path / "collection.tsv", "p1\tone\np2\ttwo\n")
    write(tmp_path / "queries.train.tsv", "q1\ta\nq2\tb\n")
    write(tmp_path / "queries.eval.tsv", "q3\tc\n")
    write(tmp_path / "qrels.train.tsv", "q1 0 p1 1\nq2 0 p2 0\n")
    report = check(tmp_path)
    assert only(report, "unlabelled-split").examples == ("eval",)
    found = only(report, "query-without-positive")
    assert found.examples == ("train: q2",)
    assert "left out of every measure's mean" in found.fix


def test_korean_from_macos(tmp_path: Path) -> None:
    nfd = unicodedata.normalize("NFD", "한국어")
    report = check(
        dataset(tmp_path, jsonl(("p1", "한국어"), ("p2", nfd), ("p3", "cafe\u0301")), jsonl(("q1", nfd), ("q2", "b")))
    )
    found = only(report, "passage-not-nfc")
    assert (found.level, found.count, found.details["hangul"]) == ("warning", 2, 1)
    assert found.examples[0] == f"{tmp_path}/corpus.jsonl:2: p2"
    assert "1 with decomposed Korean" in found.message
    assert only(report, "query-not-nfc").count == 1
    assert only(report, "duplicate-passage-text").examples[0].endswith("p2 has the text of p1")


def test_lengths_against_the_model(tmp_path: Path) -> None:
    folder = dataset(tmp_path, jsonl(*((f"p{n}", "w " * n) for n in range(1, 11))))
    report = check(folder, tokenizer_lengths=lambda texts: [len(text.split()) + 2 for text in texts], max_length=10)
    cut = only(report, "passage-truncated")
    assert (cut.level, cut.count, cut.details["share"]) == ("warning", 2, pytest.approx(0.2))
    assert cut.examples[0] == f"{tmp_path}/corpus.jsonl:9: p9 (11 tokens)"
    assert only(report, "passage-tokens").details["max"] == 12
    assert not [finding for finding in report.findings if finding.code == "query-truncated"]
    arrays = check(folder, tokenizer_lengths={"passage": [50] * 10}, max_length=10)
    assert only(arrays, "passage-truncated").count == 10
    assert not [finding for finding in arrays.findings if finding.code == "query-tokens"]


def test_every_layout_can_be_checked_and_nothing_to_check_is_an_error(tmp_path: Path) -> None:
    context = {"title": "", "text": "x", "passage_id": "1"}
    write(tmp_path / "dpr/train.json", json.dumps([{"question": "w", "positive_ctxs": [context]}, {"question": ""}]))
    report = check(tmp_path / "dpr")
    assert report.counts["positives in train"] == 1
    assert only(report, "empty-query").examples[0].endswith("train.json:1: train-1")
    assert check(beir_files(tmp_path / "beir", end=".gz")).errors == ()
    with pytest.raises(InputError, match="no such dataset"):
        check(tmp_path / "none")
