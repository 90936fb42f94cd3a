"""Two processes on gloo end with the gradients of one process on the combined batch."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from process_worker import CASES, WAYS, pair_of, taught
from safetensors.torch import load_file

from fit_fixtures import assert_close, draw, gradient_of
from sparring.distributed import make_accelerator
from sparring.phases.fit import fit

pytestmark = pytest.mark.slow
WORKER = Path(__file__).with_name("process_worker.py")


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def ended(process: subprocess.Popen[bytes]) -> int | None:
    """The exit code; None of a process that goes on."""
    try:
        return process.wait(timeout=240)
    except subprocess.TimeoutExpired:
        return None


@pytest.fixture(scope="module")
def two(tiny_st: Path, tiny_ce: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder where two processes left their gradients, weights and logs."""
    out = tmp_path_factory.mktemp("two")
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    shared |= {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, str(WORKER), str(tiny_st), str(tiny_ce), str(out)]
    started = []
    for rank in ("0", "1"):
        environment = {**os.environ, **shared, "RANK": rank, "LOCAL_RANK": rank}
        log = (out / f"{rank}.log").open("w")
        started.append(subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT))
        log.close()
    try:
        codes = [ended(process) for process in started]
    finally:
        for process in started:
            process.kill()
    assert codes == [0, 0], "\n".join((out / f"{rank}.log").read_text()[-3000:] for rank in "01")
    return out


def logs(two: Path, rank: int = 0) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((two / f"logs {rank}.json").read_text())
    return found


def test_there_were_two_processes_and_every_model_was_wrapped(two: Path) -> None:
    assert logs(two)["processes"] == 2
    for name, case in CASES.items():
        ranker = "sharded" if case.get("sharded") else "replicated"
        assert logs(two)[f"{name} wrapped"] == ["replicated", ranker]


@pytest.mark.parametrize("name", CASES)
def test_two_processes_give_the_gradient_of_one(name: str, two: Path, tiny_st: Path, tiny_ce: Path) -> None:
    pair, step, options = pair_of(str(tiny_st), str(tiny_ce), {**CASES[name], "gradient_cache": False, "accumulate": 1})
    expected, logged = gradient_of(pair, pair.team(make_accelerator("cpu")), step, **options)
    ends = [load_file(two / f"{name} {rank}.safetensors") for rank in (0, 1)]
    assert_close(ends[0], expected, rtol=1e-6)
    assert all(torch.equal(ends[0][key], ends[1][key]) for key in expected), "the processes differ"
    assert logs(two)[name] == pytest.approx(logged, rel=1e-5)
    assert logs(two, 0)[name] == logs(two, 1)[name]


def test_three_updates_of_a_second_team(two: Path, tiny_st: Path, tiny_ce: Path) -> None:
    """As after a warm start: the models were wrapped before. Both processes hold the weights of a single one."""
    pair, step, _ = pair_of(str(tiny_st), str(tiny_ce), {"step": "rocketqav2 paper"})
    team = pair.team(make_accelerator("cpu"), lr=1e-4)
    scorer = pair.scorer(team, step)
    means = fit(team, scorer, step, draw, steps=3, batch=8)
    ends = [load_file(two / f"weights {rank}.safetensors") for rank in (0, 1)]
    for name, trainee in team.items():
        for key, value in trainee.model.state_dict().items():
            assert torch.equal(ends[0][f"{name} {key}"], ends[1][f"{name} {key}"])
            if not key.endswith(("key.bias", "classifier.bias")):  # gradient 0 but for rounding, which Adam scales up
                torch.testing.assert_close(ends[0][f"{name} {key}"], value, rtol=0, atol=1e-5)
    assert logs(two)["fit"] == pytest.approx(means, rel=1e-4)
    assert logs(two)["forwards"] == scorer.forwards.to_dict()


@pytest.mark.parametrize("way", WAYS)
def test_processes_share_what_a_teacher_scores(way: str, two: Path, tiny_st: Path, tiny_ce: Path) -> None:
    """Each has the scores of all pairs, as one process has them."""
    expected = taught(*pair_of(str(tiny_st), str(tiny_ce), {"step": "ar2 mean"}))
    found = [logs(two, rank)[f"taught, {way}"] for rank in (0, 1)]
    assert found[0] == found[1]
    assert found[0]["keys"] == expected["keys"]
    assert len(found[0]["scores"]) == len(expected["keys"]) > 20
    for name in ("alone", "scores", "means"):
        assert found[0][name] == pytest.approx(expected[name], rel=1e-4, abs=1e-6)


def test_processes_end_without_the_interpreters_own_end(two: Path) -> None:
    """Which aborts them here; what they had printed is there."""
    assert all((two / f"{rank}.log").read_text().endswith("done\n") for rank in (0, 1))


def test_an_error_in_one_process_stops_both(two: Path) -> None:
    assert "of another process" in logs(two, 0)["error"]
    assert "of another process" not in logs(two, 1)["error"]
    assert all("the loss is not finite" in logs(two, rank)["error"] for rank in (0, 1))
