"""Every way a dataset can be wrong gives one InputError: file:line, what was expected, what was there, what to do."""

from __future__ import annotations

import errno
import gzip
from pathlib import Path

import pytest
from dataset_files import write

from sparring.data import beir as beir_format
from sparring.data import formats, load, read_qrels, read_run, save_beir, save_msmarco, trec, write_run
from sparring.data.dpr import questions
from sparring.files import DiskError
from sparring.types import InputError

HEADER = "query-id\tcorpus-id\tscore\n"
GOOD = '{"_id": "1", "text": "t"}\n'
ITEM = '{"question": "w", "positive_ctxs": [{"text": "t", "passage_id": "1"}]}'

MALFORMED = [
    ("corpus.jsonl", GOOD + "{not json}\n", 2, "{not json}"),
    ("corpus.jsonl", GOOD + "\n" + "[1]\n", 3, "a JSON list"),
    ("corpus.jsonl", '{"id": "1", "text": "t"}\n', 1, "the keys 'id', 'text'"),
    ("corpus.jsonl", '{"_id": 1.5, "text": "t"}\n', 1, "_id 1.5"),
    ("corpus.jsonl", '{"_id": true, "text": "t"}\n', 1, "_id True"),
    ("corpus.jsonl", '{"_id": "", "text": "t"}\n', 1, "an empty id"),
    ("corpus.jsonl", '{"_id": "a\\tb", "text": "t"}\n', 1, "a tab"),
    ("corpus.jsonl", '{"_id": "a", "text": null}\n', 1, "text None"),
    ("corpus.jsonl", '{"_id": "a", "text": "t", "title": 3}\n', 1, "title 3"),
    ("corpus.jsonl", '{"_id": "a", "text": "\\ud800"}\n', 1, "surrogate"),
    ("corpus.jsonl", '{"_id": "\\ud800", "text": "t"}\n', 1, "not valid Unicode"),
    ("corpus.jsonl.gz", GOOD * 2 + "{\n", 3, "{"),
    ("corpus.tsv", "1\ta\n2\n", 2, "1 columns: 2"),
    ("corpus.tsv", "1\ta\n2\tb\tc\n", 2, "3 columns"),
    ("corpus.tsv", "1\tT\ta\n2\tb\n", 2, "2 columns"),
    ("corpus.tsv", "1\ta\tb\tc\n", 1, "4 columns"),
    ("corpus.tsv", "\ta\n", 1, "an empty id"),
    ("psgs_w100.tsv", "id\ttext\ttitle\n1\tx\ty\n2\tx\n", 3, "2 columns"),
    ("psgs_w100.tsv", 'id\ttext\ttitle\n1\t"a\n\nb"\tT\n\tx\ty\n', 5, "an empty id"),
]


@pytest.mark.parametrize(("name", "content", "line", "got"), MALFORMED)
def test_malformed_passages(tmp_path: Path, name: str, content: str, line: int, got: str) -> None:
    path = write(tmp_path / name, content)
    with pytest.raises(InputError) as caught:
        list(formats.passages(path))
    assert caught.value.where == f"{path}:{line}"
    assert got in caught.value.got
    assert caught.value.expected
    assert caught.value.fix


@pytest.mark.parametrize(
    ("name", "content", "line", "got"),
    [
        ("queries.tsv", "1\ta\n2\tb\tc\n", 2, "3 columns"),
        ("queries.jsonl", '{"_id": "1"}\n', 1, "the keys '_id'"),
        ("topics.txt", "<top>\n<title> x\n</top>\n", 1, "<title> x"),
        ("topics.txt", "<top>\n<num> 1\n<title> x\n\n<top>\n<num> 2 <title> y\n</top>\n", 1, "<num> 1"),
        ("topics.txt", "<top>\n<num> 1\n<title> x\n</top>\n<top>\n<num> 2\n", 5, "<num> 2"),
    ],
)
def test_malformed_queries(tmp_path: Path, name: str, content: str, line: int, got: str) -> None:
    path = write(tmp_path / name, content)
    with pytest.raises(InputError) as caught:
        list(formats.queries(path))
    assert (caught.value.where, got in caught.value.got) == (f"{path}:{line}", True)


@pytest.mark.parametrize(
    ("content", "line", "got"),
    [
        (HEADER + "q\tp\n", 2, "2 columns"),
        (HEADER + "q\tp\tyes\n", 2, "the score 'yes'"),
        (HEADER + "q\tp\t1\nq\t0\tp\t1\n", 3, "4 columns"),
        ("q 0 p 1.5\n", 1, "the relevance '1.5'"),
        ("a b c d e\n", 1, "5 columns"),
        (HEADER + "\tp\t1\n", 2, "an empty id"),
        (HEADER + "q\tp\t1\nr\tp\t1\nq\tp\t2\n", 4, "grade 1 before, 2 here"),
    ],
)
def test_malformed_qrels(tmp_path: Path, content: str, line: int, got: str) -> None:
    path = write(tmp_path / "qrels.tsv", content)
    with pytest.raises(InputError) as caught:
        read_qrels(path)
    assert (caught.value.where, got in caught.value.got) == (f"{path}:{line}", True)


@pytest.mark.parametrize(
    ("content", "got"),
    [
        ("q Q0 p 1 2.0 t\nq Q0 p2 2\n", "4 columns"),
        ("q Q0 p 1 2.0 t\nq Q0 p2 2 high t\n", "the score 'high'"),
        ("q Q0 p 1 2.0 t\nq Q0 p2 2 nan t\n", "the score 'nan'"),
        ("q Q0 p 1 2.0 t\nq Q0 p 2 1.0 t\n", "'p' again"),
    ],
)
def test_malformed_run(tmp_path: Path, content: str, got: str) -> None:
    path = write(tmp_path / "run", content)
    with pytest.raises(InputError) as caught:
        read_run(path)
    assert (caught.value.where, got in caught.value.got) == (f"{path}:2", True)


@pytest.mark.parametrize(
    ("content", "line", "got"),
    [
        (f"[{ITEM},\n{ITEM},\n{{'bad'}}]", 3, "Expecting property name"),
        (f"[{ITEM},\n{ITEM}\n", 3, "the end of the file"),
        (f"[{ITEM},\n{ITEM[:-4]}", 2, "Unterminated string"),
        (f"\n{ITEM}\n", 2, "Expecting '['"),
        ("", 1, "the end of the file"),
        (f'[{ITEM},\n{{"q": 1}}]', 2, "the keys 'q'"),
        (f"[{ITEM},\n7]", 2, "a JSON int"),
        ('[{"question": "w", "positive_ctxs": [{"title": "t"}]}]', 1, "a context without text"),
        (
            '[{"question": "w", "positive_ctxs": [{"text": "t", "passage_id": "a\\nb"}]}]',
            1,
            "a context in positive_ctxs",
        ),
        ('[{"question": "w", "positive_ctxs": "no"}]', 1, "positive_ctxs 'no'"),
        ('[{"question": "w", "answers": [1]}]', 1, "answers [1]"),
        ('[{"question": "w", "id": null}]', 1, "the id None"),
        ('[{"question": "\\udc00"}]', 1, "surrogate"),
    ],
)
def test_malformed_dpr_list(tmp_path: Path, content: str, line: int, got: str) -> None:
    path = write(tmp_path / "train.json", content)
    with pytest.raises(InputError) as caught:
        list(questions(path, "train"))
    assert (caught.value.where, got in caught.value.got) == (f"{path}:{line}", True)


def test_one_passage_id_with_two_texts_in_dpr(tmp_path: Path, cache: Path) -> None:
    write(
        tmp_path / "train.json",
        f'[{ITEM},\n{{"question": "v", "positive_ctxs": [{{"text": "other", "passage_id": "1"}}]}}]',
    )
    with pytest.raises(InputError, match="stands for two texts") as caught:
        load(tmp_path, cache=cache)
    assert caught.value.where.endswith("train.json:2")


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    path = tmp_path / "corpus.tsv"
    path.write_bytes(b"1\tok\n2\t\xff\xfe\n")
    with pytest.raises(InputError) as caught:
        list(formats.passages(path))
    assert (caught.value.where, "0xff" in caught.value.got) == (f"{path}:2", True)
    json_list = tmp_path / "train.json"
    json_list.write_bytes(b'[{"question": "\xff"}]')
    with pytest.raises(InputError, match="not UTF-8"):
        list(questions(json_list, "train"))


def test_damaged_gzip(tmp_path: Path) -> None:
    path = tmp_path / "corpus.tsv.gz"
    path.write_bytes(gzip.compress(b"1\ta\n" * 10000)[:-20])
    with pytest.raises(InputError, match="damaged or cut off"):
        list(formats.passages(path))
    path.write_bytes(b"1\tplain text\n")
    with pytest.raises(InputError, match="damaged or cut off"):
        list(formats.passages(path))


def replaced(beir: Path, name: str, content: str) -> Path:
    return write(beir / name, content)


def test_empty_corpus_and_no_queries(beir: Path, cache: Path) -> None:
    path = replaced(beir, "corpus.jsonl", "\n")
    with pytest.raises(InputError, match="no passage") as caught:
        load(beir, cache=cache)
    assert str(path) in caught.value.where
    replaced(beir, "corpus.jsonl", GOOD)
    path = replaced(beir, "queries.jsonl", "")
    with pytest.raises(InputError, match="no query") as caught:
        load(beir, cache=cache)
    assert str(path) in caught.value.where


def test_query_without_text(beir: Path, cache: Path) -> None:
    path = replaced(beir, "queries.jsonl", GOOD + '\n{"_id": "q9", "text": " \\n"}\n')
    with pytest.raises(InputError, match="query has no text") as caught:
        load(beir, cache=cache)
    assert caught.value.where == f"{path}:3"
    assert "'q9'" in caught.value.got


def test_duplicate_ids(beir: Path, cache: Path) -> None:
    path = replaced(beir, "corpus.jsonl", GOOD + '{"_id": "2", "text": "u"}\n' + GOOD)
    with pytest.raises(InputError, match="'1' occurs twice in the corpus") as caught:
        load(beir, cache=cache)
    assert caught.value.where == f"{path}:3"
    assert f"{path}:1" in caught.value.got
    loose = load(beir, cache=cache, strict=False)
    assert len(loose.corpus) == 3
    with pytest.raises(InputError, match="occurs twice"):  # loading loosely does not make it valid
        load(beir, cache=cache)


def test_same_query_id_with_another_text(tmp_path: Path, cache: Path) -> None:
    write(tmp_path / "collection.tsv", "1\ta\n")
    write(tmp_path / "queries.dev.tsv", "1\tone\n")
    path = write(tmp_path / "queries.train.tsv", "2\ttwo\n1\tother\n")
    with pytest.raises(InputError, match="two texts") as caught:
        load(tmp_path, cache=cache)
    assert caught.value.where == f"{path}:2"


@pytest.mark.parametrize(("row", "kind"), [("q1\tnope\t1", "passage"), ("nope\t007\t0", "query")])
def test_labels_that_point_nowhere(beir: Path, cache: Path, row: str, kind: str) -> None:
    path = replaced(beir, "qrels/train.tsv", f"{HEADER}q1\t007\t1\n{row}\n{row.replace('nope', 'nope2')}\n")
    with pytest.raises(InputError, match=f"name a {kind} that does not exist") as caught:
        load(beir, cache=cache)
    assert caught.value.where == f"{path}:3"
    assert "'nope'; 2 such rows" in caught.value.got
    assert "sparring check" in caught.value.fix


def test_splits(beir: Path, cache: Path) -> None:
    write(beir / "qrels/dev.tsv", HEADER)
    write(beir / "qrels/zero.tsv", HEADER + "q1\t007\t0\n")
    data = load(beir, cache=cache)
    with pytest.raises(InputError, match=r"train \(2 queries\)"):
        data.split("validation")
    for split in ("dev", "zero"):
        with pytest.raises(InputError, match="no positive label"):
            data.split(split)


def test_what_was_looked_for_and_what_is_there(tmp_path: Path, cache: Path) -> None:
    with pytest.raises(InputError, match="no such dataset"):
        load(tmp_path / "nothing", cache=cache)
    with pytest.raises(InputError, match="an empty folder"):
        load(tmp_path, cache=cache)
    write(tmp_path / "passages.jsonl", GOOD)
    with pytest.raises(InputError) as caught:
        load(tmp_path, cache=cache)
    assert "corpus.jsonl" in caught.value.expected
    assert "passages.jsonl" in caught.value.got
    with pytest.raises(InputError, match="one file is not a dataset"):
        load(tmp_path / "passages.jsonl", cache=cache)
    with pytest.raises(InputError, match="no file for queries"):
        load(tmp_path, corpus="passages.jsonl", cache=cache)
    with pytest.raises(InputError, match="no file for a corpus and queries"):
        load(cache=cache)
    with pytest.raises(InputError, match="file for corpus does not exist"):
        load(tmp_path, corpus="nope.jsonl", cache=cache)


def test_two_files_for_one_role(beir: Path, cache: Path) -> None:
    write(beir / "corpus.tsv", "1\ta\n")
    with pytest.raises(InputError, match="two files could be the corpus") as caught:
        load(beir, cache=cache)
    assert caught.value.got == "corpus.jsonl, corpus.tsv"
    with pytest.raises(InputError, match="names of their splits"):
        load(beir, corpus="corpus.jsonl", qrels=["a", "b"], cache=cache)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("corpus = [", "not TOML"),
        ('corpsu = "x"', "did you mean 'corpus'"),
        ("corpus = 3", "'corpus' cannot be used"),
        ('qrels = "x"', "'qrels' cannot be used"),
        ('titles = "no"', "'titles' cannot be used"),
        ('corpus = "absent.tsv"', "file for corpus does not exist"),
        ("titles = true", "no file for a corpus and queries"),
    ],
)
def test_manifest_errors(tmp_path: Path, cache: Path, text: str, message: str) -> None:
    path = write(tmp_path / "dataset.toml", text)
    with pytest.raises(InputError, match=message) as caught:
        load(path, cache=cache)
    assert str(tmp_path) in caught.value.where


def test_writers_refuse_what_they_cannot_hold(tmp_path: Path, beir: Path, cache: Path) -> None:
    data = load(beir, cache=cache)
    with pytest.raises(InputError, match="already used"):
        save_beir(data, beir)
    write(beir / "corpus.jsonl", '{"_id": "007", "text": "two\\nlines"}\n')
    write(beir / "qrels/train.tsv", HEADER + "q1\t007\t1\n")
    (beir / "qrels/test.tsv").unlink()
    with pytest.raises(InputError, match="cannot hold this text") as caught:
        save_msmarco(load(beir, cache=cache), tmp_path / "m")
    assert caught.value.where == "passage 007"
    assert not (tmp_path / "m/collection.tsv").exists()
    with pytest.raises(InputError, match="a topics file cannot hold"):
        trec.write_topics([("1", "a < b")], tmp_path / "t")
    with pytest.raises(InputError, match="NaN"):
        write_run({"q": {"p": float("nan")}}, tmp_path / "run")
    with pytest.raises(InputError, match="cannot be written"):
        beir_format.write_passages([], beir / "corpus.jsonl" / "below.jsonl")
    assert not list(tmp_path.rglob("*.part"))


def test_a_cache_that_cannot_be_written(beir: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="SPARRING_CACHE"):
        load(beir, cache=write(tmp_path / "file", "not a folder"))


@pytest.mark.parametrize("name", ["rest.json", "corpus/table.json", "queries/text.arrow", "corpus/groups.npy"])
def test_a_damaged_cache_is_made_again(
    name: str, beir: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = load(beir, cache=cache)
    (folder,) = (cache / "data").iterdir()
    for damage in ("cut", "flip", "gone"):
        content = bytearray((folder / name).read_bytes())
        content[len(content) // 2] ^= 4
        (folder / name).unlink()
        if damage != "gone":
            (folder / name).write_bytes(content if damage == "flip" else content[: len(content) // 2])
        caplog.clear()
        again = load(beir, cache=cache)
        assert "made again" in caplog.text
        assert (again.fingerprint, again.qrels) == (whole.fingerprint, whole.qrels)
        assert [p.name for p in (cache / "data").iterdir()] == [folder.name]


@pytest.mark.parametrize(
    ("place", "error", "expected"),
    [("sparring.data.table.np.load", OSError(errno.EIO, "Input/output error"), DiskError),
     ("sparring.data.table.mmap.mmap", OSError(errno.ENOMEM, "Cannot allocate memory"), DiskError),
     ("sparring.data.loading.TextTable.open", InputError("something else"), InputError)],
)  # fmt: skip
def test_what_is_no_damage_leaves_the_cache(
    place: str, error: Exception, expected: type[Exception], beir: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = load(beir, cache=cache)
    files = sorted((path, path.stat().st_mtime_ns) for path in (cache / "data").rglob("*"))

    def refused(*_: object, **__: object) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(place, refused)
        with pytest.raises(expected) as caught:
            load(beir, cache=cache)
        assert type(caught.value) is expected
    assert sorted((path, path.stat().st_mtime_ns) for path in (cache / "data").rglob("*")) == files
    assert load(beir, cache=cache).fingerprint == whole.fingerprint


def test_two_processes_may_convert_at_once(beir: Path, cache: Path) -> None:
    from sparring.data.layout import find
    from sparring.data.loading import convert, open_converted

    layout = find(beir, corpus=None, queries=None, qrels=None, titles=True)
    convert(layout, cache / "same")
    first = open_converted(layout, cache / "same")
    convert(layout, cache / "same")  # the second to finish leaves the first one's folder
    assert open_converted(layout, cache / "same").fingerprint == first.fingerprint
    assert [path.name for path in cache.iterdir()] == ["same"]
