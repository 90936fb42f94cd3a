"""`make bench` on a toy: every row runs, its arms agree, and the table says what was found."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from forms import marked

ROOT = Path(__file__).parents[2]


ROWS = {"encoding": 2, "mining": 1, "refresh": 2, "ranker": 2, "joint": 2, "ar2step": 4, "round": 3, "memory": 2}
"""Rows of the table by name of the benchmark."""
SHORT = ("encoding", "mining", "ranker")


@pytest.mark.slow
@pytest.mark.timeout(1600)
@pytest.mark.parametrize("names", marked([SHORT, tuple(ROWS)], [SHORT]))
def test_the_quick_bench_checks_and_reports(names, tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(ROOT / "benchmarks/speed.py"), "--quick", "--out", str(tmp_path), "--threads", "1"]
    command += ["--rows", *names]
    subprocess.run(command, check=True, env=environment, capture_output=True, timeout=1500)
    assert {p.name for p in tmp_path.iterdir()} == {*(f"{name}.json" for name in names), "table.md"}
    for file in tmp_path.glob("*.json"):
        for row in json.loads(file.read_text())["rows"]:
            assert row["check"] or file.stem == "memory"
            assert row["peak_gib"] > 0
            for value in (row["ratio"], row["share"]):
                assert value is None or 0 < value["min"] <= value["median"] <= value["max"]
    lines = (tmp_path / "table.md").read_text().splitlines()
    assert len([line for line in lines if line.startswith("| ")]) == 1 + sum(ROWS[name] for name in names)


def test_an_arm_may_measure_its_own_seconds(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from harness import Roofline, interleave, ratio

    seconds = interleave({"a": lambda: 2.0, "b": lambda: 0.5}, 3)
    assert ratio(seconds, "a", "b").to_dict() == {"median": 4.0, "min": 4.0, "max": 4.0, "repetitions": 3}
    import torch

    roofline = Roofline(torch.float32)
    assert roofline.flops in {2 * m * k * n for m, k, n in Roofline.SHAPES}
