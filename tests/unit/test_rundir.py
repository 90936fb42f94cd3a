"""The run folder: never over an earlier one, every phase recorded, files whole or not there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sparring.rundir import PACKAGES, RunDir, require_unused, versions
from sparring.types import InputError


def test_a_new_or_an_empty_folder_is_taken(tmp_path: Path) -> None:
    run = RunDir.create(tmp_path / "a" / "b")
    assert run.path == tmp_path / "a" / "b"
    assert list(run.path.iterdir()) == []
    (tmp_path / "empty").mkdir()
    RunDir.create(tmp_path / "empty")
    assert list((tmp_path / "empty").iterdir()) == []


def test_a_used_folder_or_a_file_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "kept.txt").write_text("kept")
    for place in (tmp_path, tmp_path / "kept.txt"):
        with pytest.raises(InputError, match="already used") as caught:
            RunDir.create(place)
        assert caught.value.where == str(place)
        assert "nothing was overwritten" in caught.value.fix
    assert [p.name for p in tmp_path.iterdir()] == ["kept.txt"]
    assert (tmp_path / "kept.txt").read_text() == "kept"
    require_unused(tmp_path / "nothing")


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written") as caught:
        RunDir.create(tmp_path / "file" / "run")
    assert caught.value.where == str(tmp_path / "file" / "run")


def test_phases_are_timed_and_recorded(tmp_path: Path) -> None:
    run = RunDir.create(tmp_path / "run")
    assert run.phase("add", lambda a, *, b: a + b, 1, b=2) == 3
    ((name, seconds, memory),) = run.phases
    assert (name, seconds >= 0, memory > 2**20) == ("add", True, True)
    (line,) = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    record = json.loads(line)
    assert (record["kind"], record["name"]) == ("phase", "add")
    assert record["peak_memory_mb"] == memory // 2**20


def test_a_phase_that_fails_is_no_finished_phase(tmp_path: Path) -> None:
    run = RunDir.create(tmp_path / "run")
    with pytest.raises(ZeroDivisionError):
        run.phase("divide", lambda: 1 / 0)
    assert run.phases == []
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_files_are_renamed_into_place(tmp_path: Path) -> None:
    run = RunDir.create(tmp_path / "run")
    assert run.write_text("a/b.md", "글자\n").read_text(encoding="utf-8") == "글자\n"
    run.write_json("c.json", {"값": [1, None]})
    assert json.loads((run.path / "c.json").read_text(encoding="utf-8")) == {"값": [1, None]}
    assert "값" in (run.path / "c.json").read_text(encoding="utf-8")
    with pytest.raises(TypeError):
        run.write_json("c.json", {"bad": object()})
    assert json.loads((run.path / "c.json").read_text(encoding="utf-8")) == {"값": [1, None]}
    assert not list(run.path.rglob("*.part"))


def test_versions_name_every_package(tmp_path: Path) -> None:
    found = versions()
    assert {"python", "platform", *PACKAGES} == set(found)
    assert all(found.values())
    assert found["numpy"] != "not installed"
