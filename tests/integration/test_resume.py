"""A run that was killed goes on with the same command and ends with the same bits.

Longest form: ``make test-long ARGS="tests/integration/test_resume.py --kills 200 --timeout 7200"``.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli_fixtures import write_toy
from kill_worker import save_weights
from test_train import CONFIG

from forms import chosen, marked
from sparring.files import Lock
from sparring.recipes import train as train_module
from sparring.recipes.experiment import Experiment, Progressed
from sparring.recipes.train import train
from sparring.rundir import Stop
from sparring.types import InputError

pytestmark = pytest.mark.slow
WORKER = Path(__file__).with_name("kill_worker.py")
SETTINGS = ["run.checkpoint_seconds=0"]
POINTS = (
    "checkpoint 0", "checkpoint 9", "kept weights 0", "kept weights 5", "stored result 4", "stored result 9",
    "encode shard 0", "encode shard 2", "journal line 0", "journal line 12", "journal line 30", "index 2",
    "end 0", "end 4", "end 6",
)  # fmt: skip
SHORT = (
    "checkpoint 9", "kept weights 5", "stored result 4", "encode shard 2", "journal line 12", "index 2", "end 4",
)  # fmt: skip
TIMED = {"seconds", "took", "cpu", "peak_memory_mb"}


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory, tiny_st: Path, tiny_ce: Path) -> dict[str, Any]:
    """Arguments of every run here: AR2, a checkpoint after every update."""
    return {
        "data": str(write_toy(tmp_path_factory.mktemp("toy"))), "retriever": str(tiny_st), "ranker": str(tiny_ce),
        "cache": str(tmp_path_factory.mktemp("cache")), "recipe": "ar2", "config": CONFIG, "assignments": SETTINGS,
        "command": "a command",
    }  # fmt: skip


@pytest.fixture(scope="module")
def killed(
    start: dict[str, Any], tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config
) -> dict[str, Any]:
    """How every run ended each time, and its folder, by name."""
    folder = tmp_path_factory.mktemp("killed")
    seeds = list(range(pytestconfig.getoption("--kills")))
    points = chosen(POINTS, SHORT, pytestconfig)
    told: dict[str, Any] = {}
    workers = []
    for half in (0, 1):  # one for each core
        runs = folder / f"half-{half}"
        runs.mkdir()
        job = {"arguments": start, "runs": str(runs), "points": points[half::2], "seeds": seeds[half::2]}
        job["whole"] = True
        (runs / "job.json").write_text(json.dumps(job))
        with (runs / "log.txt").open("w") as log, (runs / "told.jsonl").open("w") as out:
            command = [sys.executable, str(WORKER), str(runs / "job.json")]
            workers.append((runs, subprocess.Popen(command, stdout=out, stderr=log)))
    for runs, worker in workers:
        assert worker.wait(timeout=7200) == 0, (runs / "log.txt").read_text()[-3000:]
        lines = [json.loads(line) for line in (runs / "told.jsonl").read_text().splitlines()]
        told |= {line["name"]: {**line, "folder": runs / line["name"]} for line in lines}
    assert len(told) == 1 + len(points) + len(seeds)
    return told


def numbers(run: Path) -> Any:
    """Everything that a run recorded, times and memory aside."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items() if k not in TIMED}
        return [plain(v) for v in value] if isinstance(value, list) else value

    records = [plain(json.loads(line)) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return records, plain(json.loads((run / "results.json").read_text()))


def assert_same(run: Path, whole: Path) -> None:
    """Weights, metrics, results, run files: the same to the bit; nothing half or left over."""
    names = [{str(p.relative_to(r)) for p in r.rglob("*") if p.is_file()} for r in (run, whole)]
    assert names[0] == names[1]
    assert numbers(run) == numbers(whole)
    for model in ("retriever", "ranker"):
        one, other = (torch.load(r / model / "weights.pt", weights_only=True) for r in (run, whole))
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)
    for file in [*sorted((whole / "runs").iterdir()), whole / "evidence.json", whole / "audit.json"]:
        assert (run / file.relative_to(whole)).read_bytes() == file.read_bytes(), file.name


def test_a_run_killed_at_any_moment_ends_with_the_same_bits(killed: dict[str, Any]) -> None:
    random = {name: line for name, line in killed.items() if name.startswith("seed-")}
    for line in random.values():
        assert set(line["codes"][:-1]) <= {-9}, line
        assert line["codes"][-1] == 0, (line, (line["folder"].parent / "log.txt").read_text()[-3000:])
        assert_same(line["folder"], killed["whole"]["folder"])
    kills, left = (sum(line[key] for line in random.values()) for key in ("kills", "left"))
    assert left >= len(random) / 2, "hardly any run had something to go on from"
    print(f"{len(random)} runs survived {kills} kills, {left} of them with something to go on from")  # with pytest -rP


@pytest.mark.parametrize("point", marked(POINTS, SHORT))
def test_a_run_killed_while_it_writes_ends_with_the_same_bits(point: str, killed: dict[str, Any]) -> None:
    line = killed[point.replace(" ", "-")]
    assert line["codes"] == [-9, 0], (line["folder"].parent / "log.txt").read_text()[-3000:]
    assert_same(line["folder"], killed["whole"]["folder"])


def test_a_run_killed_in_its_export_exports_again(
    killed: dict[str, Any], start: dict[str, Any], tmp_path: Path
) -> None:
    from sentence_transformers import CrossEncoder, SentenceTransformer

    job = {"arguments": start, "runs": str(tmp_path), "points": ["export 0"], "seeds": []}
    job |= {"exports": True, "whole": False}
    (tmp_path / "job.json").write_text(json.dumps(job))
    done = subprocess.run(
        [sys.executable, str(WORKER), str(tmp_path / "job.json")], capture_output=True, text=True, timeout=500
    )
    assert [json.loads(line)["codes"] for line in done.stdout.splitlines()] == [[-9, 0]], done.stderr[-3000:]
    run = tmp_path / "export-0"
    assert numbers(run) == numbers(killed["whole"]["folder"])
    assert (run / "report.html").is_file()
    assert not (run / "journal.jsonl").exists()
    SentenceTransformer(str(run / "retriever"))
    CrossEncoder(str(run / "ranker"))


class Cut(Exception):
    """Where a test stops a run."""


@pytest.fixture
def stopped(start: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run that stopped in its second round's ranker phase."""
    real = Progressed.ended

    def cut(self: Progressed, *arguments: Any, **options: Any) -> None:
        real(self, *arguments, **options)
        if self.x.run.metrics.records[-1]["phase"] == "2-ranker":
            raise Cut

    monkeypatch.setattr(Progressed, "ended", cut)
    out = tmp_path / "stopped"
    with pytest.raises(Cut):
        train(**start, out=out)
    monkeypatch.setattr(Progressed, "ended", real)
    return out


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"recipe": "separate"}, "recipe: there 'ar2', here 'separate'"),
        ({"assignments": [*SETTINGS, "ar2.ranker_lr=2e-3"]}, "config.ar2.ranker_lr: there 0.001, here 0.002"),
        ({"assignments": [*SETTINGS, "run.seed=1"]}, "config.run.seed: there 0, here 1"),
    ],
)
def test_an_unfinished_run_with_other_settings_is_refused(
    change: dict[str, Any], named: str, stopped: Path, start: dict[str, Any]
) -> None:
    before = {p: p.stat().st_mtime_ns for p in stopped.rglob("*") if p.is_file()}
    with pytest.raises(InputError) as error:
        train(**{**start, **change}, out=stopped)
    assert named in str(error.value)
    assert {p: p.stat().st_mtime_ns for p in stopped.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize("damage", ["cut", "flip", "gone"])
@pytest.mark.parametrize("pattern", ["journal/*-warm.npz", "checkpoint/checkpoint-*.safetensors"])
def test_a_damaged_file_is_refused_by_name(damage: str, pattern: str, stopped: Path, start: dict[str, Any]) -> None:
    (path,) = stopped.glob(pattern)
    content = bytearray(path.read_bytes())
    if damage == "gone":
        path.unlink()
    else:
        content[len(content) // 2] ^= 1
        path.write_bytes(content if damage == "flip" else content[: len(content) // 2])
    with pytest.raises(InputError, match="damaged") as error:
        train(**start, out=stopped)
    assert path.name in str(error.value)


def test_kept_weights_that_changed_are_refused_by_name(stopped: Path, start: dict[str, Any]) -> None:
    path = stopped / "states" / "best" / "ranker.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    real = Experiment.selected

    def selected(self: Experiment, table: Any) -> float:
        return -1.0 if self.tables[-1][0] == "round 2" else real(self, table)

    with pytest.MonkeyPatch.context() as patch:  # no later round may become the best and overwrite it
        patch.setattr(Experiment, "selected", selected)
        with pytest.raises(InputError, match="damaged") as error:
            train(**start, out=stopped)
    assert "ranker.safetensors" in str(error.value)


def test_a_second_process_on_a_run_folder_is_refused(stopped: Path, start: dict[str, Any]) -> None:
    held = Lock(stopped)
    with pytest.raises(InputError, match="another process"):
        train(**start, out=stopped)
    held.close()


def test_ctrl_c_ends_the_update_and_the_same_command_goes_on(
    killed: dict[str, Any], start: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first Ctrl-C comes in the middle of an update of the retriever's first turn."""
    from sparring.phases.fit import Scorer

    real, calls = Scorer.retriever, iter(range(100))
    teach, taught = Scorer._score_shared, []

    def note(self: Scorer, *pairs: Any) -> Any:
        taught.append(pairs)
        return teach(self, *pairs)

    monkeypatch.setattr(Scorer, "_score_shared", note)

    def interrupt(self: Scorer, batch: Any) -> Any:
        if next(calls) == 0:
            os.kill(os.getpid(), signal.SIGINT)
        return real(self, batch)

    out = tmp_path / "interrupted"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Scorer, "retriever", interrupt)
        with pytest.raises(KeyboardInterrupt):
            train(**start, out=out)
    facts = json.loads((out / "checkpoint" / "checkpoint.json").read_text())["facts"]
    steps = [r for r in map(json.loads, (out / "metrics.jsonl").read_text().splitlines()) if r["kind"] == "step"]
    assert facts["done"] == steps[-1]["step"] + 1, "the update that was under way is finished and kept"
    assert np.isfinite(list(facts["sums"].values())).all()
    assert facts["teachers"] == ["ranker"]
    assert len(taught) == 1, "all pairs of a phase as small as this one are scored before its first update"
    at: Any = train_module
    monkeypatch.setattr(at, "export", save_weights)
    monkeypatch.setattr(at, "write_report", lambda _: None)
    train(**start, out=out)
    assert_same(out, killed["whole"]["folder"])
    assert len(taught) == CONFIG["ar2"]["rounds"], "the phase that goes on has its teacher's scores"


def interrupted(times: int) -> list[bool]:
    """What `Stop` said after each Ctrl-C."""
    told = []
    with pytest.raises(KeyboardInterrupt), Stop() as stop:  # noqa: PT012
        for _ in range(times):
            os.kill(os.getpid(), signal.SIGINT)
            told.append(stop.asked)
    return told


def test_a_second_ctrl_c_stops_at_once() -> None:
    assert interrupted(1) == [True], "raised at the end: there was no update left to end"
    assert interrupted(3) == [True], "the second one was raised where it came"
