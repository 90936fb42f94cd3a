"""The same command under torchrun and accelerate, with a sharded ranker; a run that changes its processes' number.

Every run is compared with one process on the combined batch, in fp32 without dropout.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_fixtures import settings, write_toy
from safetensors.torch import load_file
from test_determinism import start, without_dropout
from test_processes import free_port
from test_train import CONFIG, records

from sparring.distributed import make_accelerator
from sparring.types import InputError

pytestmark = [pytest.mark.slow, pytest.mark.long]
LAUNCH = 400
"""Seconds after which a launch is given up."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_st: Path, tiny_ce: Path) -> Path:
    """Data and both models without dropout."""
    folder = tmp_path_factory.mktemp("launch")
    write_toy(folder / "toy")
    for name, model in (("st", tiny_st), ("ce", tiny_ce)):
        without_dropout(model, folder / name)
    return folder


def train_command(place: Path, out: str, *more: str) -> list[str]:
    """``sparring train`` with settings of seconds, as a module for launchers."""
    pair = ["--retriever", str(place / "st"), "--ranker", str(place / "ce")]
    options = settings("duet.retriever_steps=2", "duet.ranker_steps=2", "run.checkpoint_seconds=0", *more)
    return ["-m", "sparring", "train", str(place / "toy"), *pair, "--out", str(place / out), *options]


def environment(place: Path) -> dict[str, str]:
    own = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "SPARRING_CACHE": str(place / "cache")}
    return {**os.environ, **own, "ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1"}


def launched(place: Path, *commands: list[str]) -> None:
    """Run all commands at the same time to their end; none outlives this."""
    started, logs = [], []
    for number, command in enumerate(commands):
        logs.append(place / f"{number}.log")
        with logs[-1].open("w") as log:
            started.append(
                subprocess.Popen(
                    [sys.executable, *command], env=environment(place), stdout=log, stderr=subprocess.STDOUT, cwd=place,
                    start_new_session=True,
                )
            )  # fmt: skip
    try:
        codes = [process.wait(timeout=LAUNCH) for process in started]
    finally:
        for process in started:
            if process.poll() is None:
                os.killpg(process.pid, 9)
                process.wait()
    assert codes == [0] * len(codes), "\n".join(log.read_text()[-3000:] for log in logs)


@pytest.fixture(scope="module")
def alone(place: Path) -> Path:
    """One process."""
    launched(place, train_command(place, "alone"))
    return place / "alone"


def steps(run: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in record.items() if k != "seconds"} for record in records(run, "step")]


def assert_same_curve(run: Path, expected: Path) -> None:
    """Every term of every update, and the loaded weights of the exported pair."""
    ours, theirs = steps(run), steps(expected)
    assert [(one["phase"], one["step"]) for one in ours] == [(one["phase"], one["step"]) for one in theirs]
    for one, other in zip(ours, theirs, strict=True):
        for term in other.keys() - {"kind", "phase", "step"}:
            assert one[term] == pytest.approx(other[term], abs=1e-5), (one["phase"], one["step"], term)


def assert_same_models(run: Path, expected: Path) -> None:
    for model in ("retriever", "ranker"):
        files = sorted(path.relative_to(expected) for path in (expected / model).rglob("*.safetensors"))
        assert files
        for file in files:
            assert_same_weights(load_file(run / file), load_file(expected / file))


def assert_same_weights(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    """But for biases whose gradient is 0 except for rounding, which Adam scales up."""
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        if not name.endswith(("key.bias", "classifier.bias")):
            torch.testing.assert_close(ours[name], value, rtol=0, atol=3e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_two_agents_meet_and_train_a_sharded_ranker(place: Path, alone: Path) -> None:
    """Two torchrun agents by rendezvous, as on two machines: the retriever replicated, the ranker sharded; exported."""
    meeting = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{free_port()}", "--rdzv-id", "sparring"]
    agent = ["-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", *meeting]
    command = [*agent, "--local-addr", "127.0.0.1", *train_command(place, "agents", "run.shard_ranker=true")]
    launched(place, command, command)
    run = place / "agents"
    assert all("spread over 2 processes" in (place / f"{number}.log").read_text() for number in (0, 1))
    assert_same_curve(run, alone)
    assert_same_models(run, alone)
    assert (run / "report.html").is_file()


def test_accelerate_starts_the_same_command(place: Path, alone: Path) -> None:
    """Two processes of one machine, both models replicated."""
    launcher = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1"]
    launcher += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", str(free_port())]
    launched(place, [*launcher, *train_command(place, "accelerated")])
    assert_same_curve(place / "accelerated", alone)
    assert_same_models(place / "accelerated", alone)


def test_a_run_goes_on_with_another_number_of_processes(place: Path) -> None:
    """One process, then two, then one, each stopped inside a training phase; once with a replicated and once with a
    sharded ranker. The curve and the weights are those of a run that was never stopped."""

    def job(name: str, stop: int) -> dict[str, Any]:
        run = {**CONFIG["run"], "shard_ranker": name == "sharded", "checkpoint_seconds": 0}
        return {
            "data": str(place / "toy"), "retriever": str(place / "st"), "ranker": str(place / "ce"), "recipe": "ar2",
            "cache": str(place / "cache"), "config": {**CONFIG, "run": run}, "out": str(place / name), "stop": stop,
        }  # fmt: skip

    kinds = ("replicated", "sharded")
    for number, (processes, stop) in enumerate(((1, 5), (2, 4), (1, 0))):
        jobs = [job(name, stop) for name in kinds] + ([job("whole", 0)] if number == 0 else [])
        file = place / f"switch-{number}.json"
        file.write_text(json.dumps(jobs))
        start(file, processes)
        assert not (place / "replicated" / "results.json").exists() or number == 2
    expected = [torch.load(place / "whole" / m / "weights.pt", weights_only=True) for m in ("retriever", "ranker")]
    for name in kinds:
        assert_same_curve(place / name, place / "whole")
        for model, weights in zip(("retriever", "ranker"), expected, strict=True):
            assert_same_weights(torch.load(place / name / model / "weights.pt", weights_only=True), weights)


def test_accelerates_own_fsdp_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would shard the retriever, too, and cannot prepare a model without its optimiser."""
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(InputError, match=r"run\.shard_ranker=true"):
        make_accelerator("cpu")
