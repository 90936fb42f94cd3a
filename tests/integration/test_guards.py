"""Whole runs with something wrong in them: what goes wrong is named in the round in which it does."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cli_fixtures import write_toy
from kill_worker import save_weights
from test_resume import numbers
from test_train import CONFIG, records

from memory_fixtures import Allocator, little_memory
from sparring.phases.fit import NotFinite, Scorer
from sparring.recipes import train as train_module
from sparring.recipes.experiment import Experiment, Progressed
from sparring.recipes.forecast import forecast
from sparring.recipes.train import train
from sparring.types import InputError

pytestmark = pytest.mark.slow
LONGER = {**CONFIG, "ar2": {**CONFIG["ar2"], "retriever_steps": 5, "ranker_steps": 5}}


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory, tiny_st: Path, tiny_ce: Path) -> dict[str, Any]:
    """Arguments of every run here."""
    return {
        "data": str(write_toy(tmp_path_factory.mktemp("toy"))), "retriever": str(tiny_st), "ranker": str(tiny_ce),
        "cache": str(tmp_path_factory.mktemp("cache")), "recipe": "ar2", "config": LONGER,
        "assignments": ["run.checkpoint_seconds=0"],
    }  # fmt: skip


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights are saved as they are: the export's fresh process and the page take longer than a run."""
    at: Any = train_module
    monkeypatch.setattr(at, "export", save_weights)
    monkeypatch.setattr(at, "write_report", lambda _: None)


@pytest.fixture(scope="module")
def whole(start: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in which nothing is wrong."""
    out = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch:
        at: Any = train_module
        patch.setattr(at, "export", save_weights)
        patch.setattr(at, "write_report", lambda _: None)
        train(**start, out=out)
    return out


def weights(run: Path) -> dict[str, torch.Tensor]:
    """Both models' weights at the end."""
    found = {m: torch.load(run / m / "weights.pt", weights_only=True) for m in ("retriever", "ranker")}
    return {f"{model} {key}": value for model, state in found.items() for key, value in state.items()}


# --- numbers that go wrong ----------------------------------------------------------------------------------------


def test_a_healthy_run_gives_no_warning(whole: Path) -> None:
    assert not records(whole, "warning")
    assert [r["at"] for r in records(whole, "health") if r["model"] == "retriever"] == ["zero-shot", "warm", "1", "2"]
    states = ["zero-shot", "warm start", "round 1", "round 2"]
    assert [r["at"] for r in records(whole, "health") if r["model"] == "ranker"] == states
    assert "WARNING" not in (whole / "summary.md").read_text()


def broken_after_warm(break_: Callable[[Experiment], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Do something to the models after the first round's training."""
    real = Experiment.refresh

    def refresh(self: Experiment, name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "1":
            with torch.no_grad():
                break_(self)
        return real(self, name, *args, **kwargs)

    monkeypatch.setattr(Experiment, "refresh", refresh)


def collapse(x: Experiment) -> None:
    """The last layer's norm gives its bias, whatever comes in."""
    norms = [module for module in x.retriever.modules() if isinstance(module, torch.nn.LayerNorm)]
    norms[-1].weight.mul_(1e-3)
    norms[-1].bias.add_(1.0)


def flatten(x: Experiment) -> None:
    """The ranker's head gives a constant."""
    head = [module for module in x.ranker.modules() if isinstance(module, torch.nn.Linear)][-1]
    head.weight.zero_()


def explode(x: Experiment) -> None:
    """The ranker's head gives huge logits."""
    head = [module for module in x.ranker.modules() if isinstance(module, torch.nn.Linear)][-1]
    head.weight.mul_(1e6)


@pytest.mark.parametrize(
    ("break_", "name", "at"),
    [
        (collapse, "collapsed embeddings", "1"),
        (flatten, "constant ranker", "round 1"),
        (explode, "exploding scores", "round 1"),
    ],
)
def test_a_broken_model_is_named_in_its_round(
    break_: Callable[[Experiment], None], name: str, at: str, start: dict[str, Any], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    broken_after_warm(break_, monkeypatch)
    with caplog.at_level(logging.WARNING, "sparring"):
        train(**start, out=tmp_path / "run")
    found = records(tmp_path / "run", "warning")
    assert (name, at) == (found[0]["name"], found[0]["at"])
    assert found[0]["text"] in (tmp_path / "run" / "summary.md").read_text()
    assert any(found[0]["text"] in record.message for record in caplog.records)
    order = [r["kind"] for r in map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())]
    assert order.index("warning") < len(order) - order[::-1].index("fit") - 1, "before the next round's training"


def test_a_ranker_that_does_not_see_the_texts_has_an_unmoved_loss(
    start: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Scorer.ranker
    monkeypatch.setattr(Scorer, "ranker", lambda self, *a, **k: real(self, *a, **k) * 0.0)
    train(**start, out=tmp_path / "run")
    found = [r for r in records(tmp_path / "run", "warning") if r["name"] == "unmoved loss"]
    assert [r["at"] for r in found if "ranker_supervised" in r["text"]] == ["1-ranker", "2-ranker"]


def test_a_loss_that_is_no_number_leaves_its_batch(
    start: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = Scorer.retriever, iter(range(100))

    def spoilt(self: Scorer, batch: Any) -> Any:
        return real(self, batch) * (float("nan") if next(calls) == 3 else 1.0)

    out = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Scorer, "retriever", spoilt)
        with pytest.raises(NotFinite) as error:
            train(**start, out=out)
    saved = json.loads((out / "not-finite.json").read_text())
    assert str(out / "not-finite.json") in str(error.value)
    assert (saved["phase"], saved["update"], saved["loss"]) == ("1-retriever", 3, "NaN")
    assert set(saved["terms"]) == {"adversarial", "distillation"}
    steps = [r for r in records(out, "step") if r["phase"] == "1-retriever"]
    assert [r["step"] for r in steps] == [0, 1, 2]
    for entry in saved["lists"]:
        assert entry["query"] in str(error.value)
        assert entry["passages"][0] == entry["query"].replace("q", "p"), "the positive heads its list"
        assert len(set(entry["passages"])) == 4
    assert len(saved["lists"]) == 4
    train(**start, out=out)  # the same command, without what spoilt it
    assert (out / "results.json").is_file()


def test_training_on_lists_of_another_generation_is_refused(
    start: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A recipe that forgets to take the refreshed pools."""
    first: list[Any] = []
    real = Experiment.fit

    def stale(self: Experiment, name: str, step: Any, pools: Any, **options: Any) -> None:
        first.extend([pools] if name == "1-ranker" else [])
        real(self, name, step, first[0] if name == "2-retriever" else pools, **options)

    monkeypatch.setattr(Experiment, "fit", stale)
    with pytest.raises(InputError, match="another generation") as error:
        train(**start, out=tmp_path / "run")
    assert (error.value.expected, error.value.got) == ("lists of '1'", "lists of 'warm'")
    assert "2-retriever" in error.value.where


# --- memory -------------------------------------------------------------------------------------------------------


def short_of_memory(start: dict[str, Any], out: Path, phase: str = "1-retriever") -> None:
    """A run in which one phase, from its third update on, has too little memory for whole batches."""
    real, calls = Scorer.retriever, iter(range(1000))

    def hungry(self: Scorer, batch: Any) -> Any:
        at = self.trains == ("retriever",) and next(calls) >= 2
        if at and len(batch.queries) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Scorer, "retriever", hungry)
        train(**start, out=out)


def test_a_run_short_of_memory_ends_and_says_what_it_did(whole: Path, start: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "run"
    short_of_memory(start, out)
    noted = records(out, "memory")
    assert [(r["phase"], r["step"], r["accumulate"]) for r in noted] == [("1-retriever", 2, 2), ("2-retriever", 0, 2)]
    steps = [[r for r in records(run, "step") if r["phase"] == "1-retriever"] for run in (out, whole)]
    assert [r["adversarial"] for r in steps[0][:2]] == [r["adversarial"] for r in steps[1][:2]]
    assert [r["phase"] for r in records(out, "fit")] == [r["phase"] for r in records(whole, "fit")]


def test_it_goes_on_in_the_smaller_pieces_and_ends_with_the_same_bits(
    start: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped right after the update that was repeated; memory is plenty when it goes on."""
    whole, out = tmp_path / "whole", tmp_path / "stopped"
    short_of_memory(start, whole)

    class Cut(Exception):
        pass

    real = Progressed.ended

    def cut(self: Progressed, done: int, *args: Any, keep: bool = False) -> None:
        real(self, done, *args, keep=keep)
        if keep and self.x.run.metrics.records[-1].get("phase") == "1-retriever":
            raise Cut

    with monkeypatch.context() as patch:
        patch.setattr(Progressed, "ended", cut)
        with pytest.raises(Cut):
            short_of_memory(start, out)
    facts = json.loads((out / "checkpoint" / "checkpoint.json").read_text())["facts"]
    assert facts["done"] == 2
    assert facts["pieces"]["accumulate"] == 2
    real_retriever, calls = Scorer.retriever, iter(range(1000))

    def later(self: Scorer, batch: Any) -> Any:
        """The second round's phase is short of memory again, as in the whole run."""
        if self.trains == ("retriever",) and next(calls) >= 6 and len(batch.queries) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real_retriever(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Scorer, "retriever", later)
        train(**start, out=out)
    assert numbers(out) == numbers(whole)
    found, expected = weights(out), weights(whole)
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_without_any_memory_left_the_run_stops_and_goes_on_with_other_pieces(
    whole: Path, start: dict[str, Any], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    with little_memory(Allocator(40)), pytest.raises(InputError, match="too little memory"):
        train(**start, out=out)
    assert (out / "journal.jsonl").is_file()
    train(**{**start, "assignments": [*start["assignments"], "run.train_tokens=64", "ar2.accumulate=2"]}, out=out)
    for one, other in zip(records(out, "fit"), records(whole, "fit"), strict=True):
        assert (one["phase"], one["steps"], one["forwards"]) == (other["phase"], other["steps"], other["forwards"])


# --- disk ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recipe", "kept"), [("ar2", "run"), ("rocketqav2", "rounds"), ("warmup", "none")], ids=lambda v: v
)
def test_the_forecast_is_near_what_a_run_wrote_at_its_peak(
    recipe: str, kept: str, start: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Measured whenever a file takes its place; with the real export and the real page."""
    import sparring.phases.export as exporting
    from sparring.phases.export import export
    from sparring.report import write_report

    at: Any = train_module
    monkeypatch.setattr(at, "export", export)
    monkeypatch.setattr(exporting, "verify_export", lambda *_, **__: 0.0)  # a fresh process, which writes nothing here
    monkeypatch.setattr(at, "write_report", write_report)
    out, cache = tmp_path / "run", tmp_path / "cache"
    sizes, told, real = [0], [], os.replace

    def size(folder: Path) -> int:
        return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())

    def replace(source: Any, target: Any) -> None:
        sizes.append(size(out))
        real(source, target)

    def keep(*args: Any) -> Any:
        told.append(forecast(*args))
        return told[-1]

    monkeypatch.setattr(os, "replace", replace)
    monkeypatch.setattr(at, "forecast", keep)
    arguments = {**start, "recipe": recipe, "cache": cache}
    arguments["assignments"] = [*start["assignments"], f"run.checkpoints={kept}"]
    train(**arguments, out=out)
    print(recipe, repr(told[0]), max(sizes), size(out), size(cache / "tokens"))
    assert told[0].most == pytest.approx(max(sizes), rel=0.3)
    assert told[0].stays == pytest.approx(size(out), rel=0.3)
    assert told[0].cache == pytest.approx(size(cache / "tokens"), rel=0.3)


def test_a_disk_that_is_too_small_is_said_at_the_start(
    start: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from sparring.recipes import forecast as forecasting

    monkeypatch.setattr(forecasting.shutil, "disk_usage", lambda _: SimpleNamespace(free=10**6))
    for wanted, level in ((forecasting.Forecast(2 * 10**6, 0, 0), "WARNING"), (forecasting.Forecast(10, 5, 5), "INFO")):
        caplog.clear()
        with caplog.at_level(logging.INFO, "sparring"):
            forecasting.tell(wanted, tmp_path / "out", tmp_path)
        assert [record.levelname for record in caplog.records] == [level]
    assert "1.0 MB are free" in caplog.text


@pytest.mark.parametrize("kept", ["none", "rounds"])
def test_what_is_kept_is_what_was_asked_for(kept: str, whole: Path, start: dict[str, Any], tmp_path: Path) -> None:
    out, seen = tmp_path / "run", set()
    real = Progressed.__init__

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Progressed, "__init__", lambda self, *a: (real(self, *a), seen.add(1), None)[-1])
        train(**{**start, "assignments": [*start["assignments"], f"run.checkpoints={kept}"]}, out=out)
    found, expected = weights(out), weights(whole)
    assert all(torch.equal(found[key], expected[key]) for key in expected), "it changes nothing in training"
    folders = {p.name for p in (out / "states").iterdir()} if (out / "states").is_dir() else set()
    assert folders == ({"zero-shot", "warm start", "best", "round 1", "round 2"} if kept == "rounds" else set())
    assert bool(seen) is (kept == "rounds")
    assert not any((out / name).exists() for name in ("journal", "checkpoint", "journal.jsonl", "index"))


def test_a_stopped_run_that_keeps_nothing_is_refused(start: dict[str, Any], tmp_path: Path) -> None:
    lean = {**start, "assignments": [*start["assignments"], "run.checkpoints=none"]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Experiment, "evaluate", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(**lean, out=tmp_path / "run")
    with pytest.raises(InputError, match="already used"):
        train(**lean, out=tmp_path / "run")
