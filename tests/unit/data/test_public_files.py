"""Small samples in exactly the form of MS MARCO's, RocketQA's and DPR's public files; the script that joins them."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path

import pytest

from sparring.data import load, read_qrels, read_run
from sparring.data.dpr import answer_list, answered
from sparring.data.msmarco import candidates, with_titles
from sparring.types import InputError

sys.path.insert(0, str(Path(__file__).parents[3] / "benchmarks"))
import full_scale

COLLECTION = (
    "0\tThe presence of communication amid scientific minds was equally important.\n"
    "1\tThe Manhattan Project\n"
    "2\tA \"quoted\" text, it's fine\n"
    "3\tLe café\n"
)
PSGS = (
    "id\ttext\ttitle\n"
    '1\t"Aaron Aaron ( or ; ""Ahärôn"") is a prophet, high priest, and the brother of Moses."\tAaron\n'
    '2\t"God at Sinai granted Aaron the priesthood for himself."\tAaron\n'
    "3\tWilhelm Röntgen received the first Nobel Prize in Physics.\tNobel Prize in Physics\n"
    '4\t"Ernest Hemingway wrote ""The Old Man and the Sea""."\tErnest Hemingway\n'
)
NQ_TEST = (
    "who got the first nobel prize in physics\t['Wilhelm Conrad Röntgen', 'Wilhelm Röntgen']\n"
    "when is the next deadpool movie being released\t['May 18 , 2018']\n"
    'who wrote it\t"[""Hemingway\'s friend"", \'Ernest Hemingway\']"\n'
)
TRIVIA_TEST = (
    "Who was the man behind The Chipmunks?\t['David Seville', 'david seville']\n"
    '"Which ""prophet"" was the brother of Moses?"\t[\'Aaron\']\n'
)


def nq_item(question: str, positive: str, *, key: str = "passage_id") -> dict:
    """An item as biencoder-nq-train.json has it; trivia's contexts say ``psg_id``."""
    context = {"title": "Aaron", "text": "God at Sinai granted Aaron the priesthood for himself.", "score": 1000}
    positives = [{**context, "title_score": 1, key: positive}] if positive else []
    negative = {"title": "Aaron", "text": "Aaron is a prophet", "score": 12.3, "title_score": 0, key: "1"}
    return {
        "dataset": "nq_train_psgs_w100", "question": question, "answers": ["Aaron"], "positive_ctxs": positives,
        "negative_ctxs": [negative], "hard_negative_ctxs": [negative],
    }  # fmt: skip


@pytest.fixture
def marco(tmp_path: Path) -> Path:
    folder = tmp_path / "msmarco"
    folder.mkdir()
    (folder / "collection.tsv").write_text(COLLECTION)
    (folder / "queries.train.tsv").write_text("121352\tdefine extreme\n634306\twhat does chattel mean\n")
    (folder / "queries.dev.tsv").write_text("1048578\tcost of endless pools\n2\tandrogen receptor define\n")
    (folder / "queries.dev.small.tsv").write_text("2\tandrogen receptor define\n")
    (folder / "qrels.train.tsv").write_text("121352\t0\t0\t1\n634306\t0\t1\t1\n634306\t0\t3\t1\n")
    (folder / "qrels.dev.tsv").write_text("1048578\t0\t2\t1\n2\t0\t3\t1\n")
    (folder / "qrels.dev.small.tsv").write_text("2\t0\t3\t1\n")
    return folder


def test_ms_marco_as_it_is_downloaded_is_a_data_set(marco: Path, tmp_path: Path) -> None:
    """dev.small's queries are in dev as well, with the same text; both have labels."""
    data = load(marco, cache=tmp_path / "cache")
    assert data.corpus.text(0) == "The presence of communication amid scientific minds was equally important."
    assert data.corpus.text(2) == 'A "quoted" text, it\'s fine'
    assert data.qrels["train"] == {"121352": {"0": 1}, "634306": {"1": 1, "3": 1}}
    assert data.qrels["dev.small"] == {"2": {"3": 1}}
    assert len(data.queries) == 4


def test_the_prepared_ms_marco_has_splits_that_share_no_query(marco: Path, tmp_path: Path) -> None:
    made = full_scale.marco(marco, tmp_path / "data")
    data = load(tmp_path / "data", cache=tmp_path / "cache")
    assert made == tmp_path / "data" / "dataset.toml"
    assert {split: set(labels) for split, labels in data.qrels.items()} == {
        "train": {"121352", "634306"}, "dev": {"1048578"}, "test": {"2"},
    }  # fmt: skip
    assert not data.corpus.title(0)


def test_titles_of_rocketqa_are_joined_by_id(marco: Path, tmp_path: Path) -> None:
    """Not every passage has a title."""
    (tmp_path / "para.txt").write_text(COLLECTION)
    (tmp_path / "para.title.txt").write_text("0\tScientific minds - study\n2\tQuotes\n3\tCafé\n")
    full_scale.main(
        ["marco", str(marco), "--out", str(tmp_path / "data"), "--para", str(tmp_path / "para.txt"),
         "--titles", str(tmp_path / "para.title.txt")]
    )  # fmt: skip
    data = load(tmp_path / "data", cache=tmp_path / "cache")
    assert [data.corpus.title(row) for row in range(4)] == ["Scientific minds - study", "", "Quotes", "Café"]
    assert data.corpus.text(3) == "Café Le café"
    assert load(tmp_path / "data", cache=tmp_path / "cache", titles=False).corpus.text(3) == "Le café"


@pytest.mark.parametrize(
    ("titles", "line"),
    [("0\ta\n7\tb\n", 2), ("2\ta\n1\tb\n", 2), ("0\ta\n0\tb\n", 2), ("x\ta\n", 1), ("0\ta\tb\n", 1), ("9\ta\n", 1)],
)
def test_a_title_that_fits_no_passage_is_named(titles: str, line: int, tmp_path: Path) -> None:
    (tmp_path / "para.txt").write_text(COLLECTION)
    (tmp_path / "para.title.txt").write_text(titles)
    with pytest.raises(InputError) as caught:
        list(with_titles(tmp_path / "para.txt", tmp_path / "para.title.txt"))
    assert caught.value.where == f"{tmp_path / 'para.title.txt'}:{line}"


def test_top1000_has_four_columns_and_becomes_a_run(tmp_path: Path) -> None:
    lines = "188714\t1000052\tfoods and supplements\tWatch portion sizes\n188714\t7\tfoods and supplements\tB\n"
    lines += "2\t7\tandrogen\tB\n"
    with gzip.open(tmp_path / "top1000.dev.tsv.gz", "wt") as file:
        file.write(lines)
    rows = list(candidates(tmp_path / "top1000.dev.tsv.gz"))
    assert rows[0][1:] == ("188714", "1000052", "foods and supplements", "Watch portion sizes")
    full_scale.main(["top1000", str(tmp_path / "top1000.dev.tsv.gz"), "--out", str(tmp_path / "run.trec")])
    assert {q: list(p) for q, p in read_run(tmp_path / "run.trec").items()} == {"188714": ["1000052", "7"], "2": ["7"]}
    (tmp_path / "bad.tsv").write_text("1\t2\tthree columns\n")
    with pytest.raises(InputError, match=r"bad\.tsv:1"):
        list(candidates(tmp_path / "bad.tsv"))


@pytest.mark.parametrize(("name", "key"), [("nq", "passage_id"), ("trivia", "psg_id")])
def test_dprs_files_become_three_splits(name: str, key: str, tmp_path: Path) -> None:
    """A question that has no positive (TriviaQA has 18,000 of them) trains nothing and labels nothing."""
    folder = tmp_path / "dpr"
    folder.mkdir()
    with gzip.open(folder / "psgs_w100.tsv.gz", "wt", encoding="utf-8") as file:
        file.write(PSGS)
    lists = {"train": [("a", "2"), ("b", ""), ("c", "1")], "dev": [("d", "2"), ("e", "1"), ("f", ""), ("g", "2")]}
    for split, items in lists.items():
        file_of_split = folder / f"biencoder-{name}-{split}.json"
        file_of_split.write_text(json.dumps([nq_item(q, p, key=key) for q, p in items], indent=4))
    full_scale.main(["dpr", str(folder), "--name", name, "--out", str(tmp_path / "data")])
    data = load(tmp_path / "data", cache=tmp_path / "cache")
    assert data.qrels == {
        "train": {"train-0": {"2": 1}, "train-2": {"1": 1}},
        "dev": {"dev-0": {"2": 1}}, "test": {"dev-1": {"1": 1}, "dev-3": {"2": 1}},
    }  # fmt: skip
    assert (
        data.corpus.text(0) == 'Aaron Aaron Aaron ( or ; "Ahärôn") is a prophet, high priest, and the brother of Moses.'
    )
    assert data.answers["train-0"] == ("Aaron",)


@pytest.mark.parametrize(
    ("name", "text", "answers"),
    [
        ("nq-test.qa.csv", NQ_TEST, [
            ("Wilhelm Conrad Röntgen", "Wilhelm Röntgen"), ("May 18 , 2018",),
            ("Hemingway's friend", "Ernest Hemingway"),
        ]),
        ("trivia-test.qa.csv", TRIVIA_TEST, [("David Seville", "david seville"), ("Aaron",)]),
    ],
)  # fmt: skip
def test_questions_with_answers_are_a_split_without_labels(
    name: str, text: str, answers: list[tuple[str, ...]], tmp_path: Path
) -> None:
    (tmp_path / "psgs_w100.tsv").write_text(PSGS, encoding="utf-8")
    (tmp_path / name).write_text(text, encoding="utf-8")
    data = load(tmp_path, cache=tmp_path / "cache")
    assert [data.answers[f"test-{place}"] for place in range(len(answers))] == answers
    assert data.qrels == {}
    assert not any(character in data.queries.text(0) for character in "\t[]")
    if name.startswith("trivia"):
        assert data.queries.text(1) == 'Which "prophet" was the brother of Moses?'


def test_a_list_of_the_same_split_is_taken_in_place_of_the_questions(tmp_path: Path) -> None:
    (tmp_path / "psgs_w100.tsv").write_text(PSGS, encoding="utf-8")
    (tmp_path / "nq-dev.qa.csv").write_text("another text\t['x']\n")
    (tmp_path / "biencoder-nq-dev.json").write_text(json.dumps([nq_item("who", "2")]))
    data = load(tmp_path, cache=tmp_path / "cache")
    assert data.queries.text(0) == "who"
    assert data.qrels == {"dev": {"dev-0": {"2": 1}}}


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('true')",
        "['a'] * 9",
        "('a',)",
        "[1]",
        "['a'",
        "{'a': 1}",
        "[" * 5000,
        "",
        "f'a'",
        "['\\ud800']",
    ],
)
def test_answers_are_read_as_a_literal_list_of_texts_and_nothing_is_run(text: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no list of"):
        answer_list(text)
    (tmp_path / "nq-test.qa.csv").write_text(f"a question\t{text}\n", errors="surrogatepass")
    with pytest.raises(InputError, match=r"nq-test\.qa\.csv:1"):
        list(answered(tmp_path / "nq-test.qa.csv", "test"))


def test_recall_is_counted_by_answers_over_all_questions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand: the first question's answer is in passage 3, the third's in 4; the second has none."""
    (tmp_path / "psgs_w100.tsv").write_text(PSGS, encoding="utf-8")
    (tmp_path / "nq-test.qa.csv").write_text(NQ_TEST, encoding="utf-8")
    run = {"test-0": {"1": 3.0, "3": 2.0}, "test-1": {"1": 1.0}, "test-2": {"4": 9.0, "1": 1.0}}
    monkeypatch.setenv("SPARRING_CACHE", str(tmp_path / "cache"))
    found = full_scale.answered(run, tmp_path / "psgs_w100.tsv", tmp_path / "nq-test.qa.csv", (1, 2))
    assert found == {1: pytest.approx(1 / 3), 2: pytest.approx(2 / 3)}
    with pytest.raises(InputError, match="without answers"):
        full_scale.answered({"other": {"1": 1.0}}, tmp_path / "psgs_w100.tsv", tmp_path / "nq-test.qa.csv")


def test_a_missing_public_file_is_named(marco: Path, tmp_path: Path) -> None:
    (marco / "qrels.dev.small.tsv").unlink()
    with pytest.raises(InputError, match=r"qrels\.dev\.small\.tsv"):
        full_scale.marco(marco, tmp_path / "data")
    assert read_qrels(marco / "qrels.dev.tsv")
    assert not (tmp_path / "data").exists()
