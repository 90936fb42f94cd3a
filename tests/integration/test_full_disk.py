"""A disk that gets full, or closed to writing, in the middle of a run: one message, and the same command goes on."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from cli_fixtures import call, settings, write_toy
from disk_worker import BROKEN, STOPPED, plant
from test_resume import SETTINGS, numbers
from test_train import CONFIG

from forms import chosen, marked
from sparring.files import CLOSED, FULL

pytestmark = pytest.mark.slow
WORKER = Path(__file__).with_name("disk_worker.py")
KINDS = {
    "config": ("config.toml.part", errno.ENOSPC),
    "environment": ("environment.json.part", errno.EDQUOT),
    "metrics": ("metrics.jsonl", errno.ENOSPC),
    "journal": ("journal.jsonl", errno.ENOSPC),
    "result": ("journal/*-1.npz.part", errno.ENOSPC),
    "lists": ("journal/*bm25*.part", errno.EACCES),
    "checkpoint": ("checkpoint/*.safetensors.part", errno.ENOSPC),
    "note": ("checkpoint/checkpoint.json.part", errno.EROFS),
    "weights": ("states/best/*.part", errno.ENOSPC),
    "shard": ("index/warm-0/.passages*.tmp", errno.ENOSPC),
    "embeddings": ("index/1-0/.passages.npy.*.tmp", errno.ENOSPC),
    "embeddings-note": ("index/zero-shot-0/passages.npy.json.part", errno.ENOSPC),
    "run": ("runs/.dev-round-1*.part", errno.ENOSPC),
    "round": ("rounds/warm-start.md.part", errno.EDQUOT),
    "audit": ("audit/.1.tsv.*.part", errno.ENOSPC),
    "audit-json": ("audit.json.part", errno.ENOSPC),
    "results": ("results.json.part", errno.ENOSPC),
    "evidence": ("evidence.json.part", errno.EROFS),
    "card": (".export-*/retriever/README.md", errno.ENOSPC),
}
"""Each place that writes into a run folder: a pattern of the file, and how the disk refuses it."""
SHORT = {"config", "metrics", "journal", "lists", "checkpoint", "weights", "shard", "run", "evidence", "card"}
SIZES = (0.55, 0.1, 0.3, 0.7, 0.85)
"""Of a small tmpfs, in shares of what a run needs on it; the first one is also made read-only."""
SHORT_SIZES = SIZES[:2]


def can_mount(folder: Path) -> bool:
    """Whether this user may mount a tmpfs (root on Linux, as a rule)."""
    try:
        command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        return False
    subprocess.run(["umount", str(folder)], check=True)
    return True


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="module")
def tried(
    tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config, toy: Path, tiny_st: Path, tiny_ce: Path
) -> dict[str, Any]:
    """How every trial ended, and its folder, by name."""
    folder = tmp_path_factory.mktemp("disk")
    arguments = {
        "data": str(toy), "retriever": str(tiny_st), "ranker": str(tiny_ce), "cache": str(folder / "cache"),
        "recipe": "ar2", "config": CONFIG, "assignments": [*SETTINGS, "ar2.rounds=1"], "command": "a command",
    }  # fmt: skip
    sizes = chosen(SIZES, SHORT_SIZES, pytestconfig) if can_mount(folder) else []
    kinds = {name: KINDS[name] for name in chosen(KINDS, SHORT, pytestconfig)}
    job = {"arguments": arguments, "folder": str(folder), "kinds": kinds, "sizes": sizes, "needs": 3_000_000}
    (folder / "job.json").write_text(json.dumps(job))
    with (folder / "log.txt").open("w") as log:
        command = [sys.executable, str(WORKER), str(folder / "job.json")]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=log, text=True, timeout=590)
    assert done.returncode == 0, (folder / "log.txt").read_text()[-3000:]
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    return {"folder": folder, **{line["name"]: line for line in lines}}


def assert_same(run: Path, whole: Path) -> None:
    """The same files with the same contents, times aside."""
    names = [{str(p.relative_to(r)) for p in r.rglob("*") if p.is_file()} for r in (run, whole)]
    assert names[0] == names[1]
    assert numbers(run) == numbers(whole)
    timed = {"metrics.jsonl", "results.json", "summary.md", "environment.json", "config.toml"}
    for name in sorted(names[0] - timed):
        assert (run / name).read_bytes() == (whole / name).read_bytes(), name


def test_a_run_with_room_ends(tried: dict[str, Any]) -> None:
    assert tried["whole"]["codes"] == [0]
    assert (tried["folder"] / "whole" / "retriever" / "model.safetensors").is_file()


@pytest.mark.parametrize("name", marked(KINDS, SHORT))
def test_a_refused_write_stops_the_run_and_the_same_command_ends_it(name: str, tried: dict[str, Any]) -> None:
    found = tried[name]
    assert found["codes"] == [STOPPED, 0], found["messages"]
    message = found["messages"][0]
    assert message.splitlines()[0] == (CLOSED if KINDS[name][1] in (errno.EROFS, errno.EACCES) else FULL)
    assert f"where: {tried['folder'] / name}" in message
    assert "then run the same command again" in message
    assert not found["left"], "half-written files lie about"
    assert_same(tried["folder"] / name, tried["folder"] / "whole")


@pytest.mark.parametrize("share", marked(SIZES, SHORT_SIZES))
def test_a_run_on_a_full_disk_goes_on_when_there_is_room(share: float, tried: dict[str, Any]) -> None:
    if f"disk-{share}" not in tried:
        pytest.skip("this user may not mount a tmpfs")
    found = tried[f"disk-{share}"]
    assert found["codes"] == [STOPPED, 0], found["messages"]
    assert found["messages"][0].startswith(f"{FULL}\n  where: {tried['folder'] / f'disk-{share}' / 'run'}")
    assert not found["left"]
    assert_same(tried["folder"] / f"kept-{share}", tried["folder"] / "whole")


def test_a_folder_that_became_read_only_is_named(tried: dict[str, Any]) -> None:
    if "read-only" not in tried:
        pytest.skip("this user may not mount a tmpfs")
    found = tried["read-only"]
    assert found["codes"] == [STOPPED] != [BROKEN], found["messages"]
    assert found["messages"][0].startswith(f"{CLOSED}\n  where: {tried['folder'] / f'disk-{SIZES[0]}' / 'run'}")


@pytest.mark.parametrize(
    ("verb", "pattern"), [("train", "environment.json.part"), ("compare", "shared.json.part"), ("encode", "*.tmp")]
)
def test_the_command_line_says_it_in_one_message(
    verb: str, pattern: str, toy: Path, tiny_st: Path, tiny_ce: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPARRING_CACHE", str(tmp_path / "cache"))
    out = tmp_path / "out"
    pair = ("--retriever", tiny_st, "--ranker", tiny_ce, *settings()) if verb != "encode" else ("--retriever", tiny_st)
    plant(out if verb != "encode" else tmp_path, pattern, errno.ENOSPC, monkeypatch.setattr)
    result = call(verb, toy, *pair, "--out", out if verb != "encode" else tmp_path / "out.npy")
    assert result.exit_code == 2, result.output
    assert f"sparring: {FULL}\n  where: {tmp_path}" in result.stderr
    assert f"got: {os.strerror(errno.ENOSPC)}" in result.stderr
    assert "Traceback" not in result.output
