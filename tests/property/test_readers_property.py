"""Readers and writers on files that nobody would write by hand: the short form of tests/fuzz.py, and round trips."""

from __future__ import annotations

import gzip
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fuzz import CORPUS, READERS, by_lines, search, text_case
from sparring.config import build, read_toml, to_toml
from sparring.data import beir, dpr, formats, load, msmarco, read_qrels, read_run, trec, write_qrels, write_run
from sparring.data.corrections import Corrections, read_corrections
from sparring.data.rows import PassageRow, QueryRow
from sparring.log import Metrics, read_metrics
from sparring.phases.evaluate import Row
from sparring.phases.stats import Estimate
from sparring.recipes.journal import Journal
from sparring.recipes.settings import RunConfig
from sparring.recipes.store import load_rows, save_rows
from sparring.types import InputError

ROUNDS = {"page": 2, "comparison": 4, "data set, corpus": 30, "data set, queries": 40, "data set, qrels": 40,
          "run, results": 60, "run, evidence": 40, "run, metrics": 60, "run, audit": 40}  # fmt: skip


@pytest.mark.filterwarnings("ignore:Reading `.npy`:UserWarning")
@pytest.mark.parametrize("name", READERS)
def test_a_damaged_file_gives_our_own_error_or_all_its_rows(name: str) -> None:
    tried, _, wrong = search(name, inputs=ROUNDS.get(name, 120), seconds=20)
    assert wrong is None, wrong
    assert tried >= 2


# --- round trips: any Unicode ---------------------------------------------------------------------------------------

TEXT = st.text(st.characters(codec="utf-8"))
PLAIN = st.text(st.characters(codec="utf-8", exclude_characters="\t\n\r"))
ID = st.text(st.characters(codec="utf-8", exclude_characters="\t\n\r"), min_size=1)
QRELS = st.dictionaries(ID, st.dictionaries(ID, st.integers(-9, 9), min_size=1, max_size=3), max_size=4)
NAMES = st.sampled_from(["x", "x.gz"])
each = settings(max_examples=40, deadline=None)


def passed(name: str, write: Callable[[Path], Any], read: Callable[[Path], Any]) -> Any:
    """What is read of a file that was just written, beside which nothing else may lie."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        write(path)
        assert [found.name for found in Path(folder).iterdir()] == [name]
        return read(path)


@each
@given(st.lists(st.tuples(ID, TEXT, TEXT), max_size=5), NAMES)
def test_beir_passages(rows: list[tuple[str, str, str]], name: str) -> None:
    found = passed(name, lambda p: beir.write_passages(rows, p), lambda p: list(beir.passages(p)))
    assert [(row.id, row.title, row.text) for row in found] == rows


@each
@given(st.lists(st.tuples(ID, TEXT, st.lists(TEXT, max_size=3).map(tuple)), max_size=5), NAMES)
def test_beir_queries(rows: list[tuple[str, str, tuple[str, ...]]], name: str) -> None:
    found = passed(name, lambda p: beir.write_queries(rows, p), lambda p: list(beir.queries(p)))
    assert [(row.id, row.text, row.answers) for row in found] == rows


@each
@given(st.lists(st.tuples(ID, PLAIN, PLAIN), max_size=5), NAMES)
def test_msmarco(rows: list[tuple[str, str, str]], name: str) -> None:
    found = passed(name, lambda p: msmarco.write_passages(rows, p, titles=True), lambda p: list(msmarco.passages(p)))
    assert [(row.id, row.title, row.text) for row in found] == rows
    pairs = [(id, text) for id, _, text in rows]
    queries = passed(name, lambda p: msmarco.write_queries(pairs, p), lambda p: list(msmarco.queries(p)))
    assert [(row.id, row.text) for row in queries] == pairs


@each
@given(QRELS, NAMES, st.sampled_from(["beir", "trec"]))
def test_qrels(qrels: dict[str, dict[str, int]], name: str, style: Any) -> None:
    assert passed(name, lambda p: write_qrels(qrels, p, style=style), read_qrels) == qrels


SCORES = st.floats(allow_nan=False)


@each
@given(st.dictionaries(ID, st.dictionaries(ID, SCORES, min_size=1, max_size=3), max_size=4), NAMES)
def test_runs(run: dict[str, dict[str, float]], name: str) -> None:
    found = passed(name, lambda p: write_run(run, p), read_run)
    assert found == run
    assert all(list(found[q].values()) == sorted(run[q].values(), reverse=True) for q in run)


@each
@given(st.lists(st.tuples(ID, TEXT), max_size=5), NAMES)
def test_topics_are_read_back_or_refused(rows: list[tuple[str, str]], name: str) -> None:
    for id, text in rows:
        if "<" in id + text or text != " ".join(text.split()) or id != "".join(id.split()):
            with pytest.raises(InputError, match="a topics file cannot hold"):
                passed(name, lambda p, row=(id, text): trec.write_topics([row], p), str)
        else:
            found = passed(name, lambda p, row=(id, text): trec.write_topics([row], p), lambda p: list(trec.topics(p)))
            assert [(one.id, one.text) for one in found] == [(id, text)]


@pytest.mark.parametrize("text", ["Topic: a", "topic:topic: b", "Number: 3"])
def test_topics_that_look_like_markup(text: str, tmp_path: Path) -> None:
    trec.write_topics([("Number:1", text)], tmp_path / "t.txt")
    assert [(one.id, one.text) for one in trec.topics(tmp_path / "t.txt")] == [("Number:1", text)]


PASSAGE = st.tuples(ID, TEXT, TEXT).map(lambda row: PassageRow(0, *row))


@each
@given(st.lists(st.tuples(ID, TEXT, st.lists(PASSAGE, max_size=2), st.lists(PASSAGE, max_size=2)), max_size=3), NAMES)
def test_dpr_lists(items: list[Any], name: str) -> None:
    written = [(QueryRow(0, id, text), positives, others) for id, text, positives, others in items]
    found = passed(name, lambda p: dpr.write_list(written, p), lambda p: list(dpr.questions(p, "train")))
    assert [(q.row.id, q.row.text) for q in found] == [(query.id, query.text) for query, _, _ in written]
    for question, (_, positives, others) in zip(found, written, strict=True):
        assert [p._replace(line=0) for p in question.positives] == positives
        assert [p._replace(line=0) for p in question.others] == others


@each
@given(st.lists(st.tuples(ID, TEXT, TEXT), max_size=5), NAMES)
def test_dpr_tables_are_read_back_or_refused(rows: list[tuple[str, str, str]], name: str) -> None:
    if any("\r" in title + text for _, title, text in rows):
        with pytest.raises(InputError, match="cannot hold"):
            passed(name, lambda p: dpr.write_table(rows, p), str)
        return
    found = passed(name, lambda p: dpr.write_table(rows, p), lambda p: list(dpr.table(p)))
    assert [(row.id, row.title, row.text) for row in found] == rows


@each
@given(st.dictionaries(ID, TEXT, min_size=1, max_size=4), st.sampled_from(["positive", "drop", "keep"]))
def test_corrections(texts: dict[str, str], verdict: str) -> None:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        rows = [("labelled", "", "a passage that is labelled"), *((i, "", f"{n} {t}") for n, (i, t) in
                enumerate(texts.items()) if i != "labelled")]  # fmt: skip
        beir.write_passages(rows, folder / "d" / "corpus.jsonl")
        beir.write_queries([("q\ufeff", "a query", ())], folder / "d" / "queries.jsonl")
        beir.write_qrels({"q\ufeff": {"labelled": 1}}, folder / "d" / "qrels" / "train.tsv")
        data = load(folder / "d", cache=folder / "cache")
        given_ = Corrections({("q\ufeff", id): verdict for id, _, _ in rows[1:]})
        given_.write(folder / "verdicts.tsv")
        found = read_corrections([folder / "verdicts.tsv"], data)
    assert (found.verdicts, found.fingerprint()) == (given_.verdicts, given_.fingerprint())


@each
@given(st.text(st.characters(codec="utf-8")))
def test_settings_that_are_texts(text: str) -> None:
    made = {"run": RunConfig(dev_split=text, measures=("RR@10", text))}
    toml = to_toml(made, {"recipe": "ar2"})
    tables = passed("c.toml", lambda p: p.write_bytes(toml.encode()), read_toml)
    assert tables.pop("recipe") == "ar2"
    assert build({"run": RunConfig}, ("c.toml", tables)) == made


VALUES = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), TEXT)


@each
@given(st.lists(st.dictionaries(ID.filter(lambda k: k not in ("kind", "seconds")), VALUES, max_size=4), max_size=4))
def test_metrics(records: list[dict[str, Any]]) -> None:
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "metrics.jsonl"
        metrics = Metrics(path)
        for record in records:
            metrics.take({"kind": "x", "seconds": 1.0, **record})
        mark = metrics.mark()
        assert (read_metrics(path) if records else []) == metrics.records
        if records:
            path.write_bytes(path.read_bytes() + b'{"kind": "half')
            again = Metrics(path)
            again.go_on(mark)
            assert (again.records, again.mark()) == (metrics.records, mark)


@each
@given(st.lists(st.tuples(TEXT, TEXT, st.dictionaries(TEXT.filter(lambda k: k not in ("seal", "before")), VALUES)),
                max_size=4))  # fmt: skip
def test_journals(lines: list[tuple[str, str, dict[str, Any]]]) -> None:
    with tempfile.TemporaryDirectory() as place:
        journal = Journal(Path(place))
        for kind, name, facts in lines:
            journal.add(kind, name, **{f"own {key}": value for key, value in facts.items()})
        assert Journal(Path(place)).entries == journal.entries


@each
@given(TEXT, st.lists(st.floats(), min_size=1, max_size=5), st.dictionaries(TEXT, VALUES, max_size=3))
def test_result_rows(name: str, values: list[float], facts: dict[str, Any]) -> None:
    row = Row(name, {"RR@10": Estimate(0.5, 0.25, 0.75)}, {"RR@10": np.array(values)})
    (found,), told = passed("x.npz", lambda p: save_rows(p, [row], facts), load_rows)
    assert (found.name, found.estimates, told) == (row.name, row.estimates, facts)
    assert found.values["RR@10"].tobytes() == row.values["RR@10"].tobytes()


# --- defects that were found ----------------------------------------------------------------------------------------

DEEP = "[" * 200_000
READ: dict[str, Callable[[Path], Any]] = {
    "corpus.jsonl": lambda p: list(beir.passages(p)), "queries.jsonl": lambda p: list(beir.queries(p)),
    "train.json": lambda p: list(dpr.questions(p, "train")), "psgs.tsv": lambda p: list(dpr.table(p)),
    "qrels.tsv": lambda p: list(formats.labels(p)), "topics.txt": lambda p: list(trec.topics(p)),
    "run.trec": read_run, "c.toml": read_toml, "metrics.jsonl": read_metrics,
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("corpus.jsonl", DEEP), ("train.json", DEEP), ("c.toml", f"a = {DEEP}"), ("metrics.jsonl", DEEP + "\n"),
        ("corpus.jsonl", '{"_id": ' + "9" * 5000 + ', "text": ""}'), ("train.json", "[" + "9" * 5000 + "]"),
        ("c.toml", "a = " + "9" * 5000),
        ("queries.jsonl", '{"_id": "q", "text": "t", "metadata": {"answers": ["\\ud800"]}}'),
        ("train.json", '[{"question": "a"}]\n[{"question": "b"}]'), ("train.json", '[{"id": true, "question": "a"}]'),
        ("train.json", '[{"question": "a", "positive_ctxs": [{"text": "t", "passage_id": ["1"]}]}]'),
        ("psgs.tsv", 'id\ttext\ttitle\n1\tx\t"never closed\n2\ty\tt\n'), ("psgs.tsv", '1\t"x" y\tt\n'),
        ("qrels.tsv", "q 1\t0\td 2\n"), ("qrels.tsv", "q\td\t1_0\n"), ("qrels.tsv", "q\td\t99999999999\n"),
        ("qrels.tsv", "\r"), ("run.trec", "q 1\tQ0\td\t1\t0.5\n"),
        ("topics.txt", "<top> <num> 1 <title> a </top> <top> <num> 2 <title> b </top>\n"),
        ("topics.txt", "<top> <num> 1 <title> a\n</top> <top>\n<num> 2 <title> b </top>\n"),
        ("topics.txt", "2\tanother form\n<top> <num> 1 <title> a </top>\n"), ("metrics.jsonl", "[]\n"),
    ],
)  # fmt: skip
def test_what_once_crashed_or_lost_rows_is_refused(name: str, content: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content.encode())
    with pytest.raises(InputError) as error:
        READ[name](path)
    assert name in error.value.where


def test_ids_with_spaces_need_tabs_and_get_them(tmp_path: Path) -> None:
    (tmp_path / "q.tsv").write_text("a b\tc d\t1\n")
    assert read_qrels(tmp_path / "q.tsv") == {"a b": {"c d": 1}}


@pytest.mark.parametrize("name", ["corpus.jsonl.gz", "run.trec.gz", "train.json.gz"])
def test_a_gzip_file_cut_anywhere_is_refused(name: str, tmp_path: Path) -> None:
    contents = {"corpus.jsonl.gz": b'{"_id": "1", "text": "x"}\n', "run.trec.gz": b"q Q0 d 1 1 t\n"}
    path, whole = tmp_path / name, gzip.compress(contents.get(name, b'[{"question": "a"}]'))
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(InputError, match="damaged or cut off"):
            READ[name.removesuffix(".gz")](path)


def test_a_line_of_a_megabyte(tmp_path: Path) -> None:
    text = "가나" * 200_000
    assert passed("c.jsonl", lambda p: beir.write_passages([("i", "", text)], p),
                  lambda p: next(beir.passages(p)).text) == text  # fmt: skip
    assert passed("t.tsv", lambda p: dpr.write_table([("i", "", text)], p), lambda p: next(dpr.table(p)).text) == text


def test_half_of_a_surrogate_pair_is_refused_on_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not valid Unicode"):
        write_run({"\ud800": {"p": 1.0}}, tmp_path / "run")
    with pytest.raises(InputError, match="not valid Unicode"):
        beir.write_passages([("1", "", "\udfff")], tmp_path / "c.jsonl")
    assert not list(tmp_path.iterdir())


def test_a_byte_order_mark_before_toml(tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_bytes(b"\xef\xbb\xbf[run]\r\nseed = 1\r\n")
    assert read_toml(tmp_path / "c.toml") == {"run": {"seed": 1}}
    assert json.dumps(read_toml(tmp_path / "c.toml"))


@pytest.mark.parametrize(
    ("read", "told"),
    [
        (lambda path: [json.loads(line) for line in path.read_bytes().splitlines()], "Error"),
        (lambda path: list(beir.passages(path))[:1], "not whole"),
        (lambda path: list(beir.passages(path, lambda _: None)), "not whole"),
    ],
)
def test_the_search_finds_a_reader_that_crashes_or_loses_rows(
    read: Any, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(READERS, "broken", text_case("c.jsonl", CORPUS, read, by_lines()))  # type: ignore[arg-type]
    _, _, wrong = search("broken", inputs=300)
    assert wrong is not None
    assert told in wrong[1]
