"""Every format read and written: gz, CRLF, BOM, Korean in both forms, leading zeros, spaces in ids."""

from __future__ import annotations

import csv
import json
import os
import tempfile
from pathlib import Path

import pytest
from dataset_files import KOREAN, PASSAGES, QRELS, QUERIES, beir_files, write
from hypothesis import given, settings
from hypothesis import strategies as st

from sparring.data import (
    Dataset,
    formats,
    load,
    read_qrels,
    read_run,
    save_beir,
    save_dpr,
    save_msmarco,
    trec,
    write_qrels,
    write_run,
)
from sparring.types import InputError


def passages(data: Dataset) -> list[tuple[str, str, str]]:
    return list(formats.rows_of(data.corpus))


def queries(data: Dataset) -> list[tuple[str, str]]:
    return [(id, text) for id, _, text in formats.rows_of(data.queries)]


@pytest.mark.parametrize("end", ["", ".gz"])
@pytest.mark.parametrize(("crlf", "bom"), [(False, False), (True, True)])
def test_beir(tmp_path: Path, cache: Path, end: str, crlf: bool, bom: bool) -> None:
    data = load(beir_files(tmp_path / "d", end=end, crlf=crlf, bom=bom), cache=cache)
    assert passages(data) == PASSAGES
    assert queries(data) == QUERIES
    assert data.qrels == QRELS
    assert data.corpus.body(data.corpus.row("k2")) == KOREAN  # kept in NFD, as it came
    again = load(save_beir(data, tmp_path / "copy", gz=bool(end)), cache=cache)
    assert again.fingerprint == data.fingerprint


@pytest.mark.parametrize("end", ["", ".gz"])
@pytest.mark.parametrize("with_titles", [True, False])
def test_msmarco(tmp_path: Path, cache: Path, end: str, with_titles: bool) -> None:
    data = load(beir_files(tmp_path / "d"), cache=cache, titles=with_titles)
    folder = save_msmarco(data, tmp_path / "m", gz=bool(end))
    assert {path.name for path in folder.iterdir()} == {
        f"{'corpus' if with_titles else 'collection'}.tsv{end}", f"queries.tsv{end}", f"qrels.train.tsv{end}",
        f"qrels.test.tsv{end}",
    }  # fmt: skip
    again = load(folder, cache=cache)
    assert passages(again) == passages(data)
    assert again.fingerprint == data.fingerprint


def test_msmarco_as_distributed(tmp_path: Path, cache: Path) -> None:
    write(tmp_path / "collection.tsv", "0\tfirst\n007\tsecond 한글\n", crlf=True)
    write(tmp_path / "queries.train.tsv", "10\tone\n", bom=True)
    write(tmp_path / "queries.dev.tsv", "20\ttwo\n30\tthree\n")
    write(tmp_path / "queries.dev.small.tsv", "20\ttwo\n")  # a part of dev: the same query, not a duplicate
    write(tmp_path / "qrels.train.tsv", "10\t0\t007\t1\n")
    write(tmp_path / "qrels.dev.small.tsv", "20\t0\t0\t1\n")
    data = load(tmp_path, cache=cache)
    assert passages(data) == [("0", "", "first"), ("007", "", "second 한글")]
    assert queries(data) == [("20", "two"), ("30", "three"), ("10", "one")]
    assert data.split("train") == {"10": {"007": 1}}
    assert data.split("dev.small") == {"20": {"0": 1}}
    with pytest.raises(InputError, match=r"dev\.small \(1 queries\)"):
        data.split("dev")


@pytest.mark.parametrize("end", ["", ".gz"])
def test_dpr_written_and_read(tmp_path: Path, cache: Path, end: str) -> None:
    data = load(beir_files(tmp_path / "d"), cache=cache)
    again = load(save_dpr(data, tmp_path / "dpr", gz=bool(end)), cache=cache)
    assert passages(again) == PASSAGES
    positives = {s: {q: {p: 1 for p, g in r.items() if g > 0} for q, r in qrels.items()} for s, qrels in QRELS.items()}
    assert again.qrels == positives
    assert sorted(queries(again)) == sorted(QUERIES)


def dpr_item(question: str, positives: list[dict], negatives: list[dict] | None = None, **more: object) -> dict:
    item = {
        "dataset": "nq",
        "question": question,
        "answers": ["a", "b"],
        "positive_ctxs": positives,
        "negative_ctxs": [],
    }
    return item | {"hard_negative_ctxs": negatives or []} | more


def test_dpr_union_of_contexts_and_stable_ids(tmp_path: Path, cache: Path) -> None:
    one, two = {"title": "T", "text": "x", "passage_id": "12"}, {"title": "", "text": "y", "psg_id": "013"}
    bare = {"title": "", "text": "no id"}
    items = [dpr_item("who", [one], [two, bare]), dpr_item("what", [two], [one]), dpr_item("nothing", [])]
    write(tmp_path / "biencoder-nq-train.json", json.dumps(items, indent=4))
    write(tmp_path / "biencoder-nq-dev.json.gz", json.dumps([dpr_item("when", [one], id="q-dev")]))
    data = load(tmp_path, cache=cache)
    found = passages(data)
    assert found[:2] == [("12", "T", "x"), ("013", "", "y")]
    assert len(found) == 3
    assert next(id for id, _, text in found if text == "no id").startswith("ctx-")
    assert data.qrels == {"train": {"train-0": {"12": 1}, "train-1": {"013": 1}}, "dev": {"q-dev": {"12": 1}}}
    assert data.answers["train-0"] == ("a", "b")
    assert data.queries.text(data.queries.row("train-2")) == "nothing"
    assert load(save_beir(data, tmp_path / "b"), cache=cache).answers == data.answers
    assert load(tmp_path / "biencoder-nq-train.json", cache=cache).qrels == {"train": data.qrels["train"]}


def test_dpr_table_quotes_as_csv_does(tmp_path: Path, cache: Path) -> None:
    text = 'He said "yes"\tand\n\nleft'
    with open(tmp_path / "psgs_w100.tsv", "w", encoding="utf-8", newline="") as file:
        csv.writer(file, delimiter="\t").writerows([["id", "text", "title"], ["1", text, "A title"], ["02", "x", ""]])
    write(tmp_path / "queries.tsv", "q\tw\n")
    write(tmp_path / "qrels.train.tsv", "q 0 02 1\n")
    assert passages(load(tmp_path, cache=cache)) == [("1", "A title", text), ("02", "", "x")]


def test_dpr_lists_are_streamed_over_piece_borders(tmp_path: Path) -> None:
    from sparring.data import dpr

    items = [
        dpr_item("가" * (n % 700), [{"title": "", "text": "é" * 3000, "passage_id": str(n)}]) for n in range(1, 500)
    ]
    path = write(tmp_path / "train.json", json.dumps(items, ensure_ascii=False))  # several MiB
    assert [row.text for row in dpr.queries(path, "train")] == [item["question"] for item in items]
    for pad in range(8):  # the border between two pieces falls on every place of  the list
        lists = [dpr_item("x" * pad, [], answers=["ab"] * 300_000), dpr_item("y", [])]
        many = write(tmp_path / "many-train.json", json.dumps(lists))
        assert [(row.text, len(row.answers)) for row in dpr.queries(many, "t")] == [("x" * pad, 300_000), ("y", 2)]
    huge = write(tmp_path / "huge-train.json", json.dumps([dpr_item("a" * 3_000_000, []), dpr_item("b", [])]))
    assert [len(row.text) for row in dpr.queries(huge, "train")] == [3_000_000, 1]


def test_trec_topics_qrels_runs(tmp_path: Path, cache: Path) -> None:
    topics = (
        "\n<top>\n<num> Number: 301\n<title> International\n  Organized Crime\n\n<desc> Description:\nwords\n</top>\n"
        "<top><num>0302</num><title>한국어 질의</title></top>\n"
    )
    write(tmp_path / "topics.txt", topics, crlf=True)
    write(tmp_path / "corpus.tsv", "FBIS3-1\ta\nd2\tb\n")
    write(tmp_path / "qrels.txt", "301 0 FBIS3-1 1\n301 0 d2 -1\n0302  0   d2\t2\n", bom=True)
    data = load(tmp_path, cache=cache)
    assert queries(data) == [("301", "International Organized Crime"), ("0302", "한국어 질의")]
    assert data.split("test") == {"301": {"FBIS3-1": 1, "d2": -1}, "0302": {"d2": 2}}
    trec.write_topics(queries(data), tmp_path / "out.txt.gz")
    assert [(row.id, row.text) for row in formats.queries(tmp_path / "out.txt.gz")] == queries(data)


@pytest.mark.parametrize("name", ["run.txt", "run.txt.gz"])
def test_runs_round_trip_exactly(tmp_path: Path, name: str) -> None:
    run = {"q 3": {"odd id": 0.1 + 0.2, "b": -3.5, "c": 7.0}, "한": {"007": 1e-300, "7": float("inf")}}
    write_run(run, tmp_path / name, tag="t")
    assert read_run(tmp_path / name) == run
    assert list(read_run(tmp_path / name)["q 3"]) == ["c", "odd id", "b"]  # best first
    plain = write(tmp_path / "plain.run", "1 Q0 d1 1 2.5 x\n1  Q0\td2  2 2.5 x\n", crlf=True)
    assert read_run(plain) == {"1": {"d1": 2.5, "d2": 2.5}}
    write_run({"1": {"b": 1.0, "a": 1.0}}, tmp_path / "ties")
    assert (tmp_path / "ties").read_text() == "1\tQ0\tb\t1\t1.0\tsparring\n1\tQ0\ta\t2\t1.0\tsparring\n"


@pytest.mark.parametrize("style", ["beir", "trec"])
@pytest.mark.parametrize("end", ["", ".gz"])
def test_qrels_round_trip(tmp_path: Path, style: str, end: str) -> None:
    for split, qrels in QRELS.items():
        write_qrels(qrels, tmp_path / f"{split}{end}", style=style)  # type: ignore[arg-type]
        assert read_qrels(tmp_path / f"{split}{end}") == qrels


def test_qrels_without_header_and_repeated_rows(tmp_path: Path) -> None:
    path = write(tmp_path / "q.tsv", "q\t007\t1\nq\t007\t1\nr\ta\t0\n\n")
    assert read_qrels(path) == {"q": {"007": 1}, "r": {"a": 0}}


def test_equal_content_gives_equal_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_qrels(QRELS["train"], tmp_path / name / "x.gz")
    assert (tmp_path / "a/x.gz").read_bytes() == (tmp_path / "b/x.gz").read_bytes()


def test_explicit_files_and_manifest(tmp_path: Path, beir: Path, cache: Path) -> None:
    whole = load(beir, cache=cache)
    named = load(
        corpus=beir / "corpus.jsonl",
        queries=[beir / "queries.jsonl"],
        qrels={"train": beir / "qrels/train.tsv", "test": beir / "qrels/test.tsv"},
        cache=cache,
    )
    assert named.fingerprint == whole.fingerprint
    assert set(load(beir, qrels={"mine": "qrels/test.tsv"}, cache=cache).qrels) == {"mine"}
    toml = 'corpus = "beir/corpus.jsonl"\nqueries = "beir/queries.jsonl"\ntitles = false\n'
    toml += '[qrels]\ndev = "beir/qrels/test.tsv"\n'
    write(tmp_path / "dataset.toml", toml)
    for source in (tmp_path, tmp_path / "dataset.toml"):
        data = load(source, cache=cache)
        assert data.split("dev") == QRELS["test"]
        assert data.corpus.text(0) == "shaken, not stirred"
        assert data.fingerprint != whole.fingerprint


def test_second_load_only_maps(beir: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = load(beir, cache=cache)
    made = sorted(path for path in cache.rglob("*") if path.is_file())
    times = [path.stat().st_mtime_ns for path in made]
    assert load(beir, cache=cache).fingerprint == first.fingerprint
    assert [path.stat().st_mtime_ns for path in made] == times
    write(beir / "qrels/test.tsv", "query-id\tcorpus-id\tscore\nq1\t7\t1\n")
    assert load(beir, cache=cache).qrels["test"] == {"q1": {"7": 1}}
    path = write(beir / "qrels/test.tsv", "query-id\tcorpus-id\tscore\nq1\t7\t3\n")  # the same size
    os.utime(path, ns=(1, 1))
    assert load(beir, cache=cache).qrels["test"] == {"q1": {"7": 3}}
    write(path, "query-id\tcorpus-id\tscore\nq1\t7\t2\n")
    os.utime(path, ns=(1, 1))  # the same size and time, as `rsync -t` and `tar` leave them
    assert load(beir, cache=cache).qrels["test"] == {"q1": {"7": 2}}
    monkeypatch.setenv("SPARRING_CACHE", str(cache / "elsewhere"))
    load(beir)
    assert (cache / "elsewhere" / "data").is_dir()


def test_importing_data_is_light() -> None:
    import subprocess
    import sys

    code = "import sys, sparring.data; sys.exit(any(m in sys.modules for m in ('torch', 'transformers', 'faiss')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


TEXT = st.text(st.characters(codec="utf-8"), min_size=1)
ID = TEXT.filter(lambda id: not any(c in id for c in "\t\n\r\ufeff"))


@settings(max_examples=30, deadline=None)
@given(
    st.dictionaries(ID, st.tuples(TEXT, TEXT), min_size=1, max_size=5),
    st.dictionaries(ID, TEXT.filter(lambda text: bool(text.strip())), min_size=1, max_size=4),
    st.integers(0, 3),
)
def test_random_unicode_survives_beir(corpus: dict, texts: dict, grade: int) -> None:
    from sparring.data import beir as files

    with tempfile.TemporaryDirectory() as name:
        folder, rows = Path(name) / "d", [(id, title, text) for id, (title, text) in corpus.items()]
        files.write_passages(rows, folder / "corpus.jsonl.gz")
        files.write_queries(((id, text, (text,)) for id, text in texts.items()), folder / "queries.jsonl")
        qrels = {query: {next(iter(corpus)): grade} for query in texts}
        write_qrels(qrels, folder / "qrels/train.tsv")
        data = load(folder, cache=Path(name) / "c")
        assert passages(data) == rows
        assert queries(data) == list(texts.items())
        assert data.qrels == {"train": qrels}
        assert data.answers == {id: (text,) for id, text in texts.items()}


@settings(max_examples=30, deadline=None)
@given(st.dictionaries(ID, st.tuples(TEXT, TEXT), min_size=1, max_size=5))
def test_random_unicode_survives_dpr_and_tsv(corpus: dict) -> None:
    from sparring.data import dpr, msmarco

    rows = [(id, title, text) for id, (title, text) in corpus.items() if "\r" not in title + text]
    flat = [(id, title, text) for id, title, text in rows if not set("\t\n") & set(title + text)]
    with tempfile.TemporaryDirectory() as name:
        dpr.write_table(rows, Path(name) / "psgs.tsv")
        assert [row[1:] for row in formats.passages(Path(name) / "psgs.tsv")] == rows
        msmarco.write_passages(flat, Path(name) / "corpus.tsv", titles=True)
        assert [row[1:] for row in msmarco.passages(Path(name) / "corpus.tsv")] == flat
