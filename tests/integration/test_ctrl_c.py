"""Ctrl-C at any moment: what the command line says about going on is true."""

from __future__ import annotations

import os
import shlex
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_fixtures import call, settings, write_toy
from click.testing import Result
from kill_worker import save_weights

from forms import marked
from sparring.phases import encode as encode_module
from sparring.phases.fit import Scorer
from sparring.recipes import compare as compare_module
from sparring.recipes import standalone
from sparring.recipes import train as train_module
from sparring.recipes.experiment import Experiment

pytestmark = pytest.mark.slow
GOES_ON = "Stopped; all that is finished is kept. This goes on from there:"
NOTHING = "Stopped before anything was kept."


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data set in ``toy``; no exports and pages, which take longer than the training here."""
    monkeypatch.setenv("SPARRING_CACHE", str(tmp_path / "cache"))
    for module in (train_module, compare_module):
        at: Any = module
        monkeypatch.setattr(at, "export", save_weights)
        monkeypatch.setattr(at, "write_report", lambda path: (path / "report.html").write_text(""))
    write_toy(tmp_path / "toy")
    return tmp_path


def interrupting(target: Any, name: str, number: int, patch: pytest.MonkeyPatch) -> None:
    """Press Ctrl-C when a function is called for the ``number``-th time."""
    real, calls = getattr(target, name), iter(range(10**9))
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in a job that a shell put into the background
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def pressed(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == number:
            os.kill(os.getpid(), signal.SIGINT)
        return real(*args, **kwargs)

    patch.setattr(target, name, pressed)


def stopped(command: list[object], target: Any, name: str, number: int = 0) -> Result:
    """A command in which Ctrl-C is pressed once: exit code 130 and no traceback."""
    with pytest.MonkeyPatch.context() as patch:
        interrupting(target, name, number, patch)
        patch.setattr(sys, "argv", ["sparring", *map(str, command)])
        result = call("-q", *command)
    assert result.exit_code == 130, result.output
    assert "Traceback" not in result.output
    return result


def again(result: Result) -> Result:
    """The command that the message ends with."""
    words = shlex.split(result.stderr.strip().splitlines()[-1])
    assert words[0] == "sparring"
    return call("-q", *words[1:])


@pytest.fixture
def command(folder: Path, tiny_st: Path, tiny_ce: Path) -> list[object]:
    pair = ("--retriever", tiny_st, "--ranker", tiny_ce)
    return ["train", folder / "toy", *pair, "--out", folder / "run", *settings()]


PLACES: dict[str, tuple[Any, str, int]] = {
    "update": (Scorer, "retriever", 1), "evaluation": (Experiment, "evaluate", 1),
    "warm start": (train_module, "prepare", 0), "end": (train_module, "finish", 0),
    "tokens": (train_module, "tokenise", 0), "shard": (encode_module, "_save", 1),
}  # fmt: skip
"""What is interrupted, at which of its calls."""


@pytest.mark.parametrize("place", marked(PLACES, {"update", "tokens"}))
def test_a_run_goes_on_with_the_command_that_it_names(place: str, command: list[object], folder: Path) -> None:
    result = stopped(command, *PLACES[place])
    assert GOES_ON in result.stderr
    assert again(result).exit_code == 0
    assert (folder / "run" / "results.json").is_file()


def test_before_there_is_a_folder_nothing_is_kept(command: list[object], folder: Path) -> None:
    result = stopped(command, train_module, "load_pair")
    assert NOTHING in result.stderr
    assert not (folder / "run").exists()
    assert again(result).exit_code == 0


def test_a_run_that_keeps_nothing_is_not_said_to_go_on(command: list[object], folder: Path) -> None:
    result = stopped([*command, "--set", "run.checkpoints=none"], Experiment, "evaluate")
    assert "nothing was kept to go on from (run.checkpoints)" in result.stderr
    assert GOES_ON not in result.stderr
    refused = again(result)
    assert refused.exit_code == 2
    assert "already used" in refused.stderr


def test_after_its_end_a_run_is_said_to_be_complete(command: list[object], folder: Path) -> None:
    result = stopped(command, Experiment, "let_go")
    assert "is complete" in result.stderr
    assert not (folder / "run" / "journal.jsonl").exists()
    assert (folder / "run" / "report.html").is_file()


@pytest.mark.long
def test_a_comparison_goes_on(command: list[object], folder: Path) -> None:
    asked = ["compare", *command[1:], "--recipes", "separate,ar2", "--seeds", 1, "--trials", 1]
    result = stopped(asked, compare_module, "contend", 1)
    assert GOES_ON in result.stderr
    done = (folder / "run" / "seed-0" / "separate" / "arm.npz").stat().st_mtime_ns
    assert again(result).exit_code == 0
    assert (folder / "run" / "seed-0" / "separate" / "arm.npz").stat().st_mtime_ns == done


def test_encode_goes_on_with_whole_shards(folder: Path, tiny_st: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(standalone, "SHARD", 16)
    encode = ["encode", folder / "toy", "--retriever", tiny_st, "--out"]
    assert call("-q", *encode, folder / "whole.npy").exit_code == 0
    result = stopped([*encode, folder / "p.npy"], encode_module, "_save", 2)
    assert GOES_ON in result.stderr
    encoded: list[int] = []
    real: Callable[..., Any] = encode_module._embedded
    monkeypatch.setattr(encode_module, "_embedded", lambda *args: (encoded.append(args[2]), real(*args))[1])
    assert again(result).exit_code == 0
    assert encoded == [48], "what was written is taken up, the shard too that was being written at Ctrl-C"
    assert (folder / "p.npy").read_bytes() == (folder / "whole.npy").read_bytes()
    assert not list(folder.glob(".p.npy*"))


def test_what_cannot_go_on_only_says_that_it_stopped(folder: Path, tiny_st: Path, tiny_ce: Path) -> None:
    pair = ("--retriever", tiny_st, "--ranker", tiny_ce)
    result = stopped(["evaluate", "--data", folder / "toy", *pair], standalone, "_retrieve")
    assert result.stderr.strip() == "Stopped."
    run = folder / "run.trec"
    run.write_text("q0 Q0 p0 1 1.0 x\nq0 Q0 p1 2 0.5 x\n")
    asked = ["mine", folder / "toy", "--run", run, "--negatives", 1, "--out", folder / "mined.jsonl"]
    result = stopped(asked, standalone, "draw")
    assert result.stderr.strip() == "Stopped."
    assert not list(folder.glob("*mined*"))


def test_the_lock_of_a_killed_encode_does_not_hold(folder: Path, tiny_st: Path) -> None:
    (folder / ".p.npy.lock").touch()
    assert call("-q", "encode", folder / "toy", "--retriever", tiny_st, "--out", folder / "p.npy").exit_code == 0
    assert np.load(folder / "p.npy").shape == (64, 32)
    assert not list(folder.glob(".p.npy*"))
