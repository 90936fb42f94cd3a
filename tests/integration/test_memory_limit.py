"""Memory that is really too little: the kernel refuses it, and the update is done in smaller pieces."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="needs /proc and a limit on the address space"),
]
WORKER = Path(__file__).with_name("memory_worker.py")


def test_an_update_under_a_real_limit_has_the_gradient_of_the_whole_batch(tiny_st: Path, tiny_ce: Path) -> None:
    command = [sys.executable, str(WORKER), str(tiny_st), str(tiny_ce)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["unlimited"] == 0, "the batch must fit without a limit"
    assert found["noted"], "the limit was never met"
    assert found["noted"][-1]["accumulate"] > 1
    assert found["apart"] < 1e-5
