"""A plan against the run that it predicts: the same phases, and times, memory and disk within a factor."""

from __future__ import annotations

import copy
import json
import os
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_fixtures import call, settings, write_toy
from test_train import CONFIG, records

from forms import marked
from sparring.recipes.plan import Plan, plan
from sparring.recipes.scaling import scaled
from sparring.recipes.train import train

pytestmark = pytest.mark.slow
FACTOR = 3
"""How far a tiny run may be off: it is over in seconds, of which most are started processes and written files."""
STEPS = ["warmup.retriever_steps=30", "warmup.ranker_steps=30", "run.checkpoint_seconds=300"]


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory, tiny_st: Path, tiny_ce: Path) -> dict[str, Any]:
    """Arguments of plan and run."""
    return {
        "data": str(write_toy(tmp_path_factory.mktemp("toy"))), "retriever": str(tiny_st), "ranker": str(tiny_ce),
        "config": CONFIG, "assignments": STEPS,
    }  # fmt: skip


def cpu_seconds() -> float:
    """Of this process and those it has started."""
    own, children = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime


@pytest.fixture(scope="module", params=marked(["ar2", "rocketqav2"], ["ar2"]))
def both(
    request: pytest.FixtureRequest, start: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Plan, Path, float]:
    """A plan, then the run folder and its CPU seconds, which depend little on what else the machine does."""
    arguments = {**start, "recipe": request.param, "cache": tmp_path_factory.mktemp("cache")}
    out = tmp_path_factory.mktemp("runs") / "run"
    before = sorted(Path(arguments["cache"]).rglob("tokens-*"))
    found = plan(**arguments, out=out, seconds=10)
    assert not out.exists(), "a plan writes no run folder"
    assert sorted(Path(arguments["cache"]).rglob("tokens-*")) == before
    used = cpu_seconds()
    train(**arguments, out=out)
    return found, out, cpu_seconds() - used


def test_every_phase_of_the_run_is_in_the_plan_and_in_its_order(both: tuple[Plan, Path, float]) -> None:
    found, out, *_ = both
    done = [r["name"] for r in records(out, "phase")]
    planned = list(dict.fromkeys(line.phase for line in found.lines))
    kept = [name for name in planned if name in done]
    timed_with_others = {"zero-shot-evaluate"}  # part of no phase of its own in a run
    assert kept == [name for name in done if name in kept]
    assert set(done) - set(planned) == set(), "everything that a run times is priced"
    assert {line.phase for line in found.lines if line.category == "training"} <= set(done)
    assert {name for name in planned if name.endswith(("-encode", "-mine", "-index", "-evaluate"))} <= (
        set(done) | timed_with_others
    )


def test_cpu_time_is_within_a_factor(both: tuple[Plan, Path, float]) -> None:
    found, _, used = both
    start = next(line.cost for line in found.lines if line.phase == "start")  # this process has started already
    assert used / FACTOR < found.total.cpu - start.cpu < used * FACTOR


def test_updates_are_within_a_factor(both: tuple[Plan, Path, float]) -> None:
    found, out, *_ = both
    took = {r["name"]: r["cpu"] for r in records(out, "phase")}
    for name in ("warm-retriever", "warm-ranker"):
        predicted = next(line.cost.cpu for line in found.lines if line.phase == name)
        assert took[name] / FACTOR < predicted < took[name] * FACTOR, name


def test_room_is_within_a_factor(both: tuple[Plan, Path, float]) -> None:
    found, out, *_ = both
    peak = max(r["peak_memory_mb"] for r in records(out, "phase")) * 2**20
    assert peak / 2 < found.room.memory < peak * 2
    left = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    assert 0.7 * left < found.room.out_end < 1.3 * left
    assert found.room.out_end <= found.room.out_peak
    assert found.room.cache > 0


def test_a_plan_changes_no_model(start: dict[str, Any], tmp_path: Path) -> None:
    from sentence_transformers import CrossEncoder, SentenceTransformer

    pair = SentenceTransformer(start["retriever"], device="cpu"), CrossEncoder(start["ranker"], device="cpu")
    before = [copy.deepcopy(model.state_dict()) for model in pair]
    threads, random = torch.get_num_threads(), torch.get_rng_state()
    given = {**start, "retriever": pair[0], "ranker": pair[1]}
    found = plan(**given, recipe="separate", cache=tmp_path, seconds=3)
    for model, state in zip(pair, before, strict=True):
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), random)
    assert found.by_category()["training"].wall > 0


def test_the_command_prints_tables_or_json(start: dict[str, Any], tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("SPARRING_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    arguments = ["plan", start["data"], "--retriever", start["retriever"], "--ranker", start["ranker"], *settings()]
    result = call(*arguments, "--out", tmp_path / "run", "--recipe", "ar2", "--passages", "100e6", "--workers", "64")
    assert result.exit_code == 0, result.output
    for word in ("threads", "asked for", "refresh", "total", "memory, at its peak", "run folder, at its peak",
                 "what binds", "100,000,000"):  # fmt: skip
        assert word in result.stdout
    sizes = ["--passages", "100e6", "--passages", "1e10", "--workers", "0.8e1"]
    told = json.loads(call(*arguments, "--recipe", "ar2", "--json", *sizes).stdout)
    small, large = told["scales"]
    assert large["compute"] == pytest.approx(100 * small["compute"], rel=0.02), "the busiest worker's spans and shards"
    assert (large["passages"], large["workers"], large["kind"]) == (10**10, 8, "exact")
    for wrong in (("--passages", "1.5"), ("--passages", "1e6", "--workers", "1.5"), ("--workers", "0")):
        refused = call(*arguments, *wrong)
        assert refused.exit_code == 2
        assert "not a whole number" in refused.output
    for setting in ("run.index=hnsw", "run.index=faiss", "run.reencode=focused"):
        refused = call(*arguments, "--set", setting, "--passages", "1e6", "--workers", "2")
        assert refused.exit_code == 2
        assert "the workers of a cluster encode all passages and search exactly" in refused.output
        assert "one worker" in refused.output
    refused = call(*arguments, "--passages", "4", "--workers", "8")
    assert refused.exit_code == 2
    assert "nothing to plan" in refused.output
    for network in ("nan", "inf", "0"):
        refused = call(*arguments, "--passages", "1e6", "--network", network)
        assert refused.exit_code == 2
        assert "nothing to plan" in refused.output
    assert 0 < told["share_of_refresh"] < 1
    assert told["seconds"] == pytest.approx(sum(phase["wall"] for phase in told["phases"]))
    assert set(told["hardware"]) == {"device", "precision", "threads", "processes"}
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


def test_what_does_not_fit_is_said(start: dict[str, Any], tmp_path: Path, monkeypatch: Any) -> None:
    import shutil

    from sparring.recipes import plan as module

    nothing_free = shutil.disk_usage("/")._replace(free=1000)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: nothing_free)
    monkeypatch.setattr(module, "memory_available", lambda: 1000)
    monkeypatch.setattr(module, "resident_bytes", lambda: 1000)
    monkeypatch.setattr(module, "others", lambda: 1.5)
    monkeypatch.setattr(os, "getloadavg", lambda: (2.5, 0, 0))
    found = plan(**{**start, "assignments": [*STEPS, "run.threads=64"]}, recipe="warmup", cache=tmp_path, seconds=2)
    text = "\n".join(found.warnings)
    for word in ("memory: about", "run folder:", "cache:", "1.5 of", "64 threads were asked for"):
        assert word in text
    assert "WARNING: memory" in found.text()


def test_larger_corpora_are_told_from_the_units_of_the_plan(both: tuple[Plan, Path, float]) -> None:
    found = both[0]
    here = scaled(found.rates, found.sizes.passages, 1)
    encoding = [line for line in found.lines if line.phase.endswith("-encode")]
    assert any(line.cost.wall == pytest.approx(found.sizes.passages * found.rates.encode) for line in encoding)
    refresh = found.by_category()["refresh"].wall
    assert 0 < here.compute * here.refreshes <= refresh * 1.001
    assert scaled(found.rates, 10**8, 64).compute > 1000 * here.compute
    rates = found.rates
    for name in ("convert", "tokenise", "index", "join", "digest", "merge", "disk"):
        assert getattr(rates, name) > 0, name
    assert rates.merge < 1e-3
    assert rates.join < 1e-6, "over a megabyte a second"
    assert (rates.wanted, rates.gpus, rates.shard) == ("exact", 0, 8192)
    assert {split: count for split, (count, _) in rates.asked.items()} == {"dev": 12, "test": 12, "train": 40}
    assert rates.asked["dev"][1] == rates.asked["test"][1] >= 100, "of a larger corpus, not of the toy's few passages"
    assert rates.asked["train"][1] >= 20, "run.mine_depth"
    assert rates.read <= rates.tokens
