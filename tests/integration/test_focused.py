"""Focused refreshes in whole runs: what is encoded, what is mixed, where test is read, and going on after a stop."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_fixtures import write_toy
from kill_worker import save_weights
from test_train import CONFIG, records

from sparring.config import build
from sparring.phases.encode import encode
from sparring.recipes import train as train_module
from sparring.recipes.competition import compete, prepare
from sparring.recipes.experiment import Experiment
from sparring.recipes.generation import Generation
from sparring.recipes.settings import RunConfig
from sparring.recipes.train import resolve_config, set_up, train
from sparring.types import InputError

pytestmark = pytest.mark.slow
FOCUSED = ["run.reencode=focused", "run.focus_depth=2", "run.focus_sample=40", "run.focus_missed=1"]
SHALLOW = ["run.rerank_depth=2", "run.checkpoint_seconds=0", "run.audit_lists=0", "ar2.retriever_lr=1e-4"]


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory, tiny_st: Path, tiny_ce: Path) -> dict[str, Any]:
    """Arguments of every run: the toy with 400 passages more, that are no answer to anything."""
    toy = write_toy(tmp_path_factory.mktemp("toy"))
    rng = np.random.default_rng(0)
    words = ("the", "a", "of", "is", "in", "to", "how", "what", "where", "undo", "change", "search", "query", "rank")
    with (toy / "corpus.jsonl").open("a", encoding="utf-8") as file:
        for number in range(400):
            text = " ".join(rng.choice(words, 6))
            file.write(json.dumps({"_id": f"f{number}", "title": "", "text": text}) + "\n")
    return {
        "data": str(toy), "retriever": str(tiny_st), "ranker": str(tiny_ce),
        "cache": str(tmp_path_factory.mktemp("cache")), "recipe": "ar2", "config": CONFIG,
    }  # fmt: skip


def begun(start: dict[str, Any], out: Path, *more: str) -> tuple[Experiment, Any, Any]:
    """An experiment and its configuration, before anything has run."""
    objects = resolve_config("ar2", CONFIG, [*FOCUSED, *SHALLOW, *more])
    given = {key: start[key] for key in ("data", "retriever", "ranker", "cache")}
    return set_up(**given, out=out, recipe="ar2", objects=objects), objects["warmup"], objects["ar2"]


def assert_fresh(x: Experiment, generation: Generation, fresh: np.ndarray) -> None:
    """The kept embeddings of these rows are those of the current weights."""
    assert generation.vectors is not None
    now = encode(x.retriever, x.feed.retriever_passages, "passage")
    kept = np.load(generation.vectors.checked())
    same = np.isclose(kept, now, atol=1e-5).all(axis=1)
    assert same[fresh].all()
    assert not same[~fresh].any(), "the weights moved, so what is stale differs"


@pytest.fixture(scope="module")
def rounds(start: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Experiment, list[Generation]]:
    """AR2 with every generation noted, each checked against its own weights."""
    x, warm, config = begun(start, tmp_path_factory.mktemp("runs") / "focused")
    baselines, found = prepare(x, warm), []
    real = x.refresh

    def noted(*args: Any, **kwargs: Any) -> Generation:
        found.append(real(*args, **kwargs))
        assert_fresh(x, found[-1], found[-1].vectors.fresh)
        return found[-1]

    x.refresh = noted  # type: ignore[method-assign]
    x.selected = lambda _: float(len(x.tables))  # type: ignore[method-assign]  # the last round is the best
    compete(x, "ar2", config, baselines)
    return x, found


def test_a_focused_refresh_is_a_mix_and_says_so(rounds: tuple[Experiment, list[Generation]]) -> None:
    x, found = rounds
    assert [generation.name for generation in found] == ["1", "2", "2-full"]
    for generation in found[:2]:
        assert generation.mixed
        assert set(generation.lists) == {"dev"}, "test is not even searched in a mix"
    told = {r["generation"]: r for r in records(x.run.path, "refresh")}
    assert "encoded" not in told["warm"]
    for name, generation in zip(("1", "2"), found, strict=False):
        record, vectors = told[name], generation.vectors
        assert vectors is not None
        assert 0 < record["encoded"] < 464
        assert record["encoded"] == record["in_lists"] + record["sampled"] == vectors.fresh.sum()
        assert record["encoded_by"] == vectors.counts()
        assert sum(vectors.counts().values()) == 464
        assert 0 <= record["train_missed"] <= record["train_missed_upper"]
    assert found[1].vectors is not None
    assert set(found[1].vectors.counts()) <= {"warm", "1", "2"}


def test_what_lists_hold_is_freshly_encoded(rounds: tuple[Experiment, list[Generation]]) -> None:
    for generation in rounds[1][:2]:
        assert generation.vectors is not None
        fresh = generation.vectors.fresh
        assert fresh[generation.pools.top(1).candidates].all()
        assert fresh[generation.pools.heads[~np.isnan(generation.pools.head_scores)]].sum() > 0
        assert fresh[generation.lists["dev"][1][:, :2]].all()
        assert not fresh[generation.lists["dev"][1]].all(), "deeper than the cascade looks"


def test_test_is_read_from_embeddings_of_one_retriever(rounds: tuple[Experiment, list[Generation]]) -> None:
    x, found = rounds
    whole = found[-1]
    assert not whole.mixed
    assert set(whole.lists) == {"dev", "test"}
    record = records(x.run.path, "refresh")[-1]
    assert found[1].vectors is not None
    assert record["encoded"] == (~found[1].vectors.fresh).sum(), "what the best round had encoded is taken over"
    vectors = encode(x.retriever, x.feed.retriever_passages, "passage")
    queries = encode(x.retriever, x.feed.retriever_queries, "query")
    for split in (x.dev, x.test):
        exact = x.retriever.scale * np.sort(-(queries[split.rows] @ vectors.T), axis=1)[:, :100]
        assert np.allclose(-exact, whole.lists[split.name][0], atol=1e-3)


def test_embeddings_that_no_refresh_needs_are_removed(rounds: tuple[Experiment, list[Generation]]) -> None:
    names = {file.stem for file in (rounds[0].run.path / "vectors").iterdir()}
    assert names == {"zero-shot", "warm", "2", "2-full"}


def test_too_much_missed_is_a_full_refresh(start: dict[str, Any], tmp_path: Path) -> None:
    x, warm, config = begun(start, tmp_path / "strict", "run.focus_missed=0", "ar2.rounds=1")
    outcome = compete(x, "ar2", config, prepare(x, warm))
    told = records(x.run.path, "refresh")
    assert [r["generation"] for r in told] == ["zero-shot", "warm", "1"], "nothing is left to complete"
    assert (told[-1]["whole"], told[-1]["encoded"], told[-1]["encoded_by"]) == (True, 464, {"1": 464})
    assert outcome.test_tables


class Cut(Exception):
    """Where a test stops a run."""


def test_a_stopped_run_goes_on_with_the_same_mix(
    start: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at: Any = train_module
    monkeypatch.setattr(at, "export", save_weights)
    monkeypatch.setattr(at, "write_report", lambda _: None)
    arguments = {**start, "assignments": [*FOCUSED, *SHALLOW], "command": "a command"}
    train(**arguments, out=tmp_path / "whole")
    real, calls = Experiment._focus, iter(range(9))

    def cut(self: Experiment, *args: Any, **kwargs: Any) -> Any:
        found = real(self, *args, **kwargs)
        if next(calls) == 1:  # the second focused refresh: all is encoded, nothing noted
            raise Cut
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Experiment, "_focus", cut)
        with pytest.raises(Cut):
            train(**arguments, out=tmp_path / "cut")
    (kept,) = (tmp_path / "cut" / "vectors").glob("1.npy")
    content = kept.read_bytes()
    kept.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(InputError, match="damaged") as error:
        train(**arguments, out=tmp_path / "cut")
    assert kept.name in str(error.value)
    kept.write_bytes(content)
    train(**arguments, out=tmp_path / "cut")
    for name in ("results.json", "evidence.json", *sorted(f"runs/{p.name}" for p in (tmp_path / "cut/runs").iterdir())):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    timed = {"seconds", "took", "cpu", "peak_memory_mb"}
    lines = [
        [{k: v for k, v in json.loads(line).items() if k not in timed} for line in text.read_text().splitlines()]
        for text in (tmp_path / "cut/metrics.jsonl", tmp_path / "whole/metrics.jsonl")
    ]
    assert lines[0] == lines[1]
    assert not (tmp_path / "cut" / "vectors").exists()


def test_focus_needs_exact_search() -> None:
    with pytest.raises(InputError, match="searches exactly"):
        build({"run": RunConfig}, ("config", {"run": {"reencode": "focused", "index": "hnsw"}}))
