"""Metrics as JSON lines, tables, and a bar that is silent where nobody looks."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest

from sparring.log import Metrics, peak_memory_bytes, progress, table


def test_records_are_lines_of_json(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path / "metrics.jsonl")
    metrics.write("fit", phase="1-ranker", loss=0.5, lists=3)
    metrics.write("refresh", generation="한국", counts={"a": 1})
    found = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert found == metrics.records
    assert found[0]["kind"] == "fit"
    assert found[1]["generation"] == "한국"
    assert 0 <= found[0]["seconds"] <= found[1]["seconds"]


def test_numbers_that_are_not_finite_are_null(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path / "metrics.jsonl")
    metrics.write("x", a=float("nan"), b=[float("inf"), 1.0], c={"d": -float("inf")})
    record = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert (record["a"], record["b"], record["c"]) == (None, [None, 1.0], {"d": None})


def test_without_a_file_records_are_kept_in_memory() -> None:
    metrics = Metrics(None)
    metrics.write("x", a=1)
    assert metrics.records[0]["a"] == 1


def test_a_tracker_gets_the_numbers() -> None:
    seen: list[Mapping[str, float]] = []
    metrics = Metrics(None, seen.append)
    metrics.write("step", phase="1-ranker", loss=0.5, step=3)
    metrics.write("note", text="no numbers")
    assert seen == [{"step/loss": 0.5, "step/step": 3.0}]


def test_a_table_shows_numbers_as_they_are_written() -> None:
    plain = table([["a", "0.10"], ["b", "1e-5"]], ["system", "RR@10"])
    assert plain.splitlines()[0].split() == ["system", "RR@10"]
    assert "0.10" in plain
    assert "1e-5" in plain
    markdown = table([["a", "0.10"]], ["system", "RR@10"], markdown=True)
    assert markdown.splitlines()[0].startswith("| system")
    assert set(markdown.splitlines()[1]) <= set("|-: ")


def test_the_bar_is_silent_when_nobody_looks(capfd: pytest.CaptureFixture[str]) -> None:
    with progress("work", 3, "steps") as bar:
        for _ in range(3):
            bar.update(1)
    assert capfd.readouterr() == ("", "")


def test_the_bar_is_closed_after_an_error() -> None:
    with pytest.raises(ZeroDivisionError), progress("work", 3) as bar:
        _ = 1 / 0
    assert bar.disable


def test_peak_memory_is_in_bytes() -> None:
    block = bytearray(64 * 2**20)
    assert len(block) < peak_memory_bytes() < 2**40
