"""The same seed gives the same bits; two processes give the loss curve of one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_fixtures import write_toy
from test_processes import ended, free_port
from test_resume import numbers
from test_train import CONFIG, DIAGNOSTICS, records

from forms import chosen, marked

pytestmark = pytest.mark.slow
WORKER = Path(__file__).with_name("curve_worker.py")
RECIPES, SHORT = ("ar2", "rocketqav2"), ("ar2",)


def without_dropout(folder: Path, target: Path) -> Path:
    """A copy of a model whose configuration has dropout 0: how dropout is switched off for a run."""
    import shutil

    shutil.copytree(folder, target)
    for file in target.rglob("config.json"):
        config = json.loads(file.read_text())
        if "hidden_dropout_prob" in config:
            config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
            file.write_text(json.dumps(config))
    return target


def start(job: Path, processes: int) -> None:
    """Run the worker as so many processes on gloo."""
    shared = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1"}
    shared |= {"MASTER_PORT": str(free_port()), "ACCELERATE_USE_CPU": "true", "GLOO_SOCKET_IFNAME": "lo"}
    started = []
    for rank in range(processes):
        several = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {}
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **several}
        with job.with_suffix(f".{rank}.log").open("w") as log:
            command = [sys.executable, str(WORKER), str(job)]
            started.append(subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT))
    try:
        codes = [ended(process) for process in started]
    finally:
        for process in started:
            process.kill()
    assert codes == [0] * processes, job.with_suffix(".0.log").read_text()[-3000:]


@pytest.fixture(scope="module")
def folders(
    tmp_path_factory: pytest.TempPathFactory, tiny_st: Path, tiny_ce: Path, pytestconfig: pytest.Config
) -> Path:
    """Each recipe with one process and with two (no dropout), and AR2 with dropout twice."""
    folder, recipes = tmp_path_factory.mktemp("curves"), chosen(RECIPES, SHORT, pytestconfig)
    still = [without_dropout(path, folder / path.name) for path in (tiny_st, tiny_ce)]
    data, cache = str(write_toy(folder / "toy")), str(folder / "cache")

    def job(name: str, recipe: str, pair: list[Path]) -> dict[str, Any]:
        first, second = map(str, pair)
        return {
            "data": data, "retriever": first, "ranker": second, "cache": cache, "recipe": recipe,
            "config": CONFIG, "out": str(folder / name),
        }  # fmt: skip

    one = [job(f"{recipe} 1", recipe, still) for recipe in recipes]
    one += [job(f"again {n}", "ar2", [tiny_st, tiny_ce]) for n in (1, 2)]
    for processes, jobs in ((1, one), (2, [job(f"{recipe} 2", recipe, still) for recipe in recipes])):
        file = folder / f"job-{processes}.json"
        file.write_text(json.dumps(jobs))
        start(file, processes)
    return folder


@pytest.mark.parametrize("recipe", marked(RECIPES, SHORT))
def test_two_processes_give_the_loss_curve_of_one(recipe: str, folders: Path) -> None:
    """Warm start and two rounds, in fp32 without dropout: every loss term of every update, and the pools between."""
    curves = []
    for processes in (1, 2):
        run = folders / f"{recipe} {processes}"
        assert json.loads((run / "environment.json").read_text())["hardware"]["precision"][0] == "fp32"
        steps = [{k: v for k, v in r.items() if k != "seconds"} for r in records(run, "step")]
        curves.append(steps)
    assert len(curves[0]) == len(curves[1]) == (12 if recipe == "ar2" else 8)
    compared = 0
    for one, other in zip(*curves, strict=True):
        assert one.keys() == other.keys()
        assert (one["phase"], one["step"]) == (other["phase"], other["step"])
        for term in one.keys() - {"kind", "phase", "step"}:
            assert other[term] == pytest.approx(one[term], abs=1e-5), (one["phase"], one["step"], term)
            compared += term not in DIAGNOSTICS
    assert compared >= len(curves[0])
    fits = [records(folders / f"{recipe} {processes}", "fit") for processes in (1, 2)]
    for one, other in zip(*fits, strict=True):
        assert [one[k] for k in ("phase", "lists", "forwards")] == [other[k] for k in ("phase", "lists", "forwards")]


def test_the_same_seed_gives_the_same_bits(folders: Path) -> None:
    """With dropout on."""
    runs = [folders / f"again {n}" for n in (1, 2)]
    assert numbers(runs[0]) == numbers(runs[1])
    for model in ("retriever", "ranker"):
        one, other = (torch.load(run / model / "weights.pt", weights_only=True) for run in runs)
        assert all(torch.equal(one[key], other[key]) for key in one)
    still = [r["retriever_in_batch"] for r in records(folders / "ar2 1", "step") if "retriever_in_batch" in r]
    assert still != [r["retriever_in_batch"] for r in records(runs[0], "step") if "retriever_in_batch" in r]
