"""Every kind of bad input: one clear message, exit code 2, no traceback, nothing of an earlier run touched."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from cli_fixtures import call, settings, write_jsonl, write_toy


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARRING_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    return write_toy(tmp_path / "toy")


def train(toy: Path, retriever: Path, ranker: Path, out: Path, *more: object) -> str:
    """Call train, demand exit code 2 and one message without traceback; return the message."""
    result = call("-q", "train", toy, "--retriever", retriever, "--ranker", ranker, "--out", out, *settings(), *more)
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    assert result.stderr.count("sparring: ") == 1
    assert not result.stdout
    return result.stderr


def rewrite(path: Path, change: Callable[[list[dict]], list[dict]]) -> None:
    write_jsonl(path, change([json.loads(line) for line in path.read_text().splitlines()]))


def test_empty_corpus(toy: Path, tiny_st: Path, tiny_bert: Path, tmp_path: Path) -> None:
    (toy / "corpus.jsonl").write_text("")
    message = train(toy, tiny_st, tiny_bert, tmp_path / "run")
    assert "corpus.jsonl" in message
    assert not (tmp_path / "run").exists()


def test_no_train_labels(toy: Path, tiny_st: Path, tiny_bert: Path, tmp_path: Path) -> None:
    (toy / "qrels" / "train.tsv").unlink()
    message = train(toy, tiny_st, tiny_bert, tmp_path / "run")
    assert "train" in message
    assert "dev" in message, "the known splits are named"


def test_query_without_text(toy: Path, tiny_st: Path, tiny_bert: Path, tmp_path: Path) -> None:
    rewrite(toy / "queries.jsonl", lambda rows: [{**rows[0], "text": " "}, *rows[1:]])
    assert "queries.jsonl:1" in train(toy, tiny_st, tiny_bert, tmp_path / "run")


def test_labels_to_unknown_ids(toy: Path, tiny_st: Path, tiny_bert: Path, tmp_path: Path) -> None:
    with (toy / "qrels" / "train.tsv").open("a") as file:
        file.write("q1\tnowhere\t1\n")
    message = train(toy, tiny_st, tiny_bert, tmp_path / "run")
    assert "train.tsv:42" in message
    assert "nowhere" in message


def test_list_longer_than_pool(toy: Path, tiny_st: Path, tiny_bert: Path, tmp_path: Path) -> None:
    message = train(toy, tiny_st, tiny_bert, tmp_path / "run", "--set", "duet.negatives=40")
    assert "40" in message


def test_model_folder_without_weights(toy: Path, tiny_st: Path, tiny_bert: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(tiny_bert, bare)
    (bare / "model.safetensors").unlink()
    assert str(bare) in train(toy, bare, tiny_bert, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_model_that_is_nowhere(toy: Path, tiny_bert: Path, tmp_path: Path) -> None:
    assert "no-such-model" in train(toy, Path("no-such-model"), tiny_bert, tmp_path / "run")


def test_not_finite_loss_names_queries(toy: Path, tiny_st: Path, tiny_bert: Path, tmp_path: Path) -> None:
    message = train(toy, tiny_st, tiny_bert, tmp_path / "run", "--set", "warmup.retriever_lr=1e38")
    assert "not finite" in message or "NaN" in message
    assert "q" in message


def test_used_output_is_left_alone(toy: Path, tiny_st: Path, tiny_bert: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    out.mkdir()
    (out / "mine.txt").write_text("precious")
    assert str(out) in train(toy, tiny_st, tiny_bert, out)
    assert [p.name for p in out.iterdir()] == ["mine.txt"]
    assert (out / "mine.txt").read_text() == "precious"


def test_output_that_cannot_be_written(toy: Path, tiny_st: Path, tiny_bert: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    assert "file" in train(toy, tiny_st, tiny_bert, tmp_path / "file" / "run")
    if os.geteuid() != 0:
        locked = tmp_path / "locked"
        locked.mkdir(mode=0o500)
        assert "locked" in train(toy, tiny_st, tiny_bert, locked / "run")


def test_wrong_key_gets_a_suggestion(toy: Path, tiny_st: Path, tiny_bert: Path, tmp_path: Path) -> None:
    message = train(toy, tiny_st, tiny_bert, tmp_path / "run", "--set", "duet.techer=0.1", "--set", "duet.round=2")
    assert "'teacher'" in message
    assert "'rounds'" in message, "both problems at once"


def test_compiling_without_a_gpu(toy: Path, tiny_st: Path, tiny_bert: Path, tmp_path: Path) -> None:
    message = train(toy, tiny_st, tiny_bert, tmp_path / "run", "--set", "run.compile=true")
    assert "compiling is for GPUs" in message
    assert "run.compile" in message
    assert not (tmp_path / "run").exists()


def test_wrong_value_and_broken_file(toy: Path, tiny_st: Path, tiny_bert: Path, tmp_path: Path) -> None:
    assert "expected int" in train(toy, tiny_st, tiny_bert, tmp_path / "run", "--set", "duet.rounds=many")
    (tmp_path / "c.toml").write_text("[duet\nrounds = 1\n")
    assert "line 1" in train(toy, tiny_st, tiny_bert, tmp_path / "run", "--config", tmp_path / "c.toml")
    assert "nothing.toml" in train(toy, tiny_st, tiny_bert, tmp_path / "run", "--config", tmp_path / "nothing.toml")


def test_data_that_is_nowhere(tiny_st: Path, tiny_bert: Path, tmp_path: Path) -> None:
    assert "no-data" in train(tmp_path / "no-data", tiny_st, tiny_bert, tmp_path / "run")


def test_outputs_of_phases_are_never_overwritten(toy: Path, tiny_ce: Path, tmp_path: Path) -> None:
    run, out = tmp_path / "run.trec", tmp_path / "out.trec"
    run.write_text("q0 Q0 p0 1 1.0 x\n")
    out.write_text("precious")
    result = call("-q", "rerank", toy, "--ranker", tiny_ce, "--run", run, "--out", out)
    assert result.exit_code == 2
    assert out.read_text() == "precious"


def refused(*arguments: object) -> str:
    """Exit code 2 and a message without traceback."""
    result = call("-q", *arguments)
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    return result.stderr


@pytest.mark.parametrize("line", ["q0 Q0 nowhere 1 1.0 x\n", "nowhere Q0 p0 1 1.0 x\n"])
def test_run_with_unknown_ids(line: str, toy: Path, tiny_st: Path, tiny_ce: Path, tmp_path: Path) -> None:
    run, out = tmp_path / "run.trec", tmp_path / "out"
    run.write_text(line)
    pair = ("--retriever", tiny_st, "--ranker", tiny_ce)
    for command in (
        ("rerank", toy, "--ranker", tiny_ce, "--run", run, "--out", out),
        ("mine", toy, "--run", run, "--out", out),
        ("evaluate", "--data", toy, *pair, "--candidates", run),
    ):
        message = refused(*command)
        assert "run.trec" in message
        assert "'nowhere'" in message
        assert not out.exists()


def test_run_without_queries_of_the_split(toy: Path, tmp_path: Path) -> None:
    run = tmp_path / "run.trec"
    for text in ("", "q1 Q0 p0 1 1.0 x\n"):
        run.write_text(text)
        assert "no query of split dev" in refused("mine", toy, "--split", "dev", "--run", run, "--out", tmp_path / "o")
    message = refused("mine", toy, "--run", run, "--answer-filter", "--out", tmp_path / "o")
    assert "answer" in message


def test_numbers_out_of_range(toy: Path, tmp_path: Path) -> None:
    mine = ("mine", toy, "--run", tmp_path / "r", "--out", tmp_path / "o")
    for option, value in (("--seed", -1), ("--negatives", 0), ("--simans-a", -1)):
        assert option in refused(*mine, option, value)
    assert "--denoise" in refused(*mine, "--negative-below", 0.1)
    assert "--batch-tokens" in refused("encode", toy, "--retriever", "x", "--out", "o", "--batch-tokens", -1)
    assert "--depth" in refused("rerank", toy, "--ranker", "x", "--run", "r", "--out", "o", "--depth", 0)


def test_evaluate_checks_what_is_cheap_before_the_models(toy: Path, tmp_path: Path) -> None:
    evaluate = ("evaluate", "--data", toy, "--retriever", "./nowhere", "--ranker", "./nowhere")
    assert "unknown measure" in refused(*evaluate, "--measures", "MAP@10")
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "x").write_text("precious")
    assert "--runs" in refused(*evaluate, "--runs", tmp_path / "runs")
    assert "--data is missing" in refused("evaluate", *evaluate[3:])


def test_configuration_of_another_shape(toy: Path, tiny_st: Path, tiny_bert: Path, tmp_path: Path) -> None:
    assert str(tmp_path) in train(toy, tiny_st, tiny_bert, tmp_path / "run", "--config", tmp_path)
    (tmp_path / "c.toml").write_text("duet = 3\n")
    message = train(toy, tiny_st, tiny_bert, tmp_path / "run", "--config", tmp_path / "c.toml")
    assert "[duet] must be a table" in message


def test_data_options_that_say_nothing(toy: Path) -> None:
    assert "DATA is missing" in refused("check")
    assert "needs a split" in refused("check", toy, "--qrels", "=x")
    assert "twice" in refused("check", toy, "--qrels", "test=x", "--qrels", "test=y")


@pytest.mark.parametrize("text", ["{", "[]"])
def test_damaged_json(text: str, toy: Path, tiny_st: Path, tiny_bert: Path, tmp_path: Path) -> None:
    bert, st = tmp_path / "bert", tmp_path / "st"
    shutil.copytree(tiny_bert, bert)
    shutil.copytree(tiny_st, st)
    (bert / "config.json").write_text(text)
    (st / "modules.json").write_text(text)
    assert "bert" in train(toy, tiny_st, bert, tmp_path / "run")
    assert "st" in train(toy, st, tiny_bert, tmp_path / "run")
    assert str(st) in train(toy, tiny_st, st, tmp_path / "run")


def test_damaged_note(toy: Path, tiny_st: Path, tmp_path: Path) -> None:
    out = tmp_path / "q.npy"
    out.write_text("precious")
    (tmp_path / "q.npy.json").write_text("{")
    assert "q.npy.json" in refused("encode", toy, "--retriever", tiny_st, "--kind", "query", "--out", out)
    assert out.read_text() == "precious"
    assert not (tmp_path / "q.npy.ids.txt").exists()
