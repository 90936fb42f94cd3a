"""Comparisons and encodings that are killed go on with the same command and end with the same bits.

Longest form: ``make test-long ARGS="tests/integration/test_kills.py --kills 200 --timeout 7200"``: a tenth of the kills
for comparisons.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_fixtures import write_toy
from test_compare import assert_same
from test_train import CONFIG

from forms import chosen, marked

pytestmark = pytest.mark.slow
WORKER = Path(__file__).with_name("kill_worker.py")
COMPARISON = (
    "kept weights 1", "kept weights 4", "stored result 1", "stored result 5", "checkpoint 4", "encode shard 3",
    "index 3", "checkpoint 20",
)  # fmt: skip
SHORT = {"kept weights 4": "seed-0/shared", "checkpoint 4": "tuning/separate-1", "checkpoint 20": "seed-0/separate"}
"""In a warm start, in a trial and in an arm, and where that lies; the others are in the long form."""
ENCODING = ("encode shard 0", "encode shard 7", "assembled 0")


def worked(job: dict[str, Any], runs: Path) -> dict[str, Any]:
    """How every trial of a job ended each time, and what it left, by name."""
    runs.mkdir()
    (runs / "job.json").write_text(json.dumps({**job, "runs": str(runs), "whole": True}))
    done = subprocess.run(
        [sys.executable, str(WORKER), str(runs / "job.json")], capture_output=True, text=True, timeout=7200
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    return {line["name"]: {**line, "out": runs / line["name"], "log": done.stderr} for line in lines}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, tiny_st: Path) -> dict[str, str]:
    toy, cache = write_toy(tmp_path_factory.mktemp("toy")), tmp_path_factory.mktemp("cache")
    return {"data": str(toy), "cache": str(cache), "retriever": str(tiny_st)}


@pytest.fixture(scope="module")
def compared(
    base: dict[str, str], tiny_ce: Path, tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config
) -> dict[str, Any]:
    arguments = {**base, "ranker": str(tiny_ce), "config": CONFIG, "recipes": "separate,ar2", "seeds": 1}
    arguments |= {"budget": 64, "trials": 2, "command": "a command"}
    points = chosen(COMPARISON, SHORT, pytestconfig)
    job = {"does": "compare", "arguments": arguments, "points": points}
    job["seeds"] = list(range(-(-pytestconfig.getoption("--kills") // 10)))
    return worked(job, tmp_path_factory.mktemp("compared") / "runs")


@pytest.fixture(scope="module")
def encoded(
    base: dict[str, str], tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config
) -> dict[str, Any]:
    job = {"does": "encode", "arguments": base, "points": ENCODING}
    job["seeds"] = list(range(pytestconfig.getoption("--kills")))
    return worked(job, tmp_path_factory.mktemp("encoded") / "runs")


def assert_same_comparison(one: Path, other: Path) -> None:
    """Every number of every arm, the pair to ship, and no file more or less."""
    assert_same(one, other)
    pages = {"report.html"}
    names = [{str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()} - pages for out in (one, other)]
    assert names[0] == names[1]
    for model in ("retriever", "ranker"):
        weights = [torch.load(out / "best" / model / "weights.pt", weights_only=True) for out in (one, other)]
        assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


@pytest.mark.parametrize("point", marked(COMPARISON, SHORT))
def test_a_comparison_killed_while_it_writes(point: str, compared: dict[str, Any]) -> None:
    line = compared[point.replace(" ", "-")]
    assert line["codes"] == [-9, 0], line["log"][-3000:]
    assert line["at"] == [SHORT[point]] or point not in SHORT
    assert_same_comparison(line["out"], compared["whole"]["out"])


def test_a_comparison_killed_at_any_moment_ends_with_the_same_bits(compared: dict[str, Any]) -> None:
    random = [line for name, line in compared.items() if name.startswith("seed-")]
    for line in random:
        assert set(line["codes"][:-1]) <= {-9}, line
        assert line["codes"][-1] == 0, line
        assert_same_comparison(line["out"], compared["whole"]["out"])
    assert sum(line["left"] for line in random) >= len(random) / 2, "hardly any had something to go on from"


@pytest.mark.parametrize("point", ENCODING)
def test_an_encoding_killed_while_it_writes(point: str, encoded: dict[str, Any]) -> None:
    line = encoded[point.replace(" ", "-")]
    assert line["codes"] == [-9, 0], line["log"][-3000:]
    assert line["out"].read_bytes() == encoded["whole"]["out"].read_bytes()


def test_an_encoding_killed_at_any_moment_ends_with_the_same_bits(encoded: dict[str, Any]) -> None:
    whole = encoded["whole"]["out"]
    random = [line for name, line in encoded.items() if name.startswith("seed-")]
    for line in random:
        assert set(line["codes"][:-1]) <= {-9}, line
        assert line["codes"][-1] == 0, line["log"][-3000:]
        for ending in ("", ".ids.txt", ".json"):
            assert Path(f"{line['out']}{ending}").read_bytes() == Path(f"{whole}{ending}").read_bytes()
    left = {path.name for path in whole.parent.iterdir() if path.name.startswith(".")}
    assert not left, "shards, locks and halves are gone"
    assert sum(line["left"] for line in random) >= len(random) / 2, "hardly any had something to go on from"
