"""A large training set: what a query costs in memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "many_queries.py"
QUERIES, BYTES = 200_000, 1_800


@pytest.mark.slow
def test_a_query_costs_so_many_bytes() -> None:
    """Read, converted, labelled, with pools 20 deep (268 bytes of it), by the kernel's count of a fresh process."""
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(QUERIES)], capture_output=True, text=True, check=True, timeout=400
    )
    found = json.loads(done.stdout)
    assert found["queries"] == QUERIES
    peaks = [value for name, value in found.items() if name.endswith("peak bytes a query")]
    assert len(peaks) == 3
    assert 268 < max(peaks) <= BYTES
