"""A large training set: what a query costs in memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "many_queries.py"
QUERIES, LISTS, ALL = 20_000, 2_300, 5_000


@pytest.mark.slow
def test_a_query_costs_so_many_bytes() -> None:
    """By the kernel's count of a fresh process: read, converted, labelled, pools 20 deep (268 bytes of it); then with
    tokens, embeddings in a file, and the ranker's batches. About 20 MB and 50 MB of it are there with fewer, too."""
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(QUERIES)], capture_output=True, text=True, check=True, timeout=400
    )
    found = json.loads(done.stdout)
    assert found["queries"] == QUERIES
    peaks = [value for name, value in found.items() if name.endswith("peak bytes a query")]
    assert len(peaks) == 6
    assert peaks == sorted(peaks)
    assert 268 < peaks[2] <= LISTS
    assert peaks[5] <= ALL
    known = found["in it, bytes a query"]
    assert known["pools, in memory"] == 268
    assert known["embeddings of queries, mapped"] == 4 * 64
    assert 12 + 4 * 8 < known["tokens of queries, mapped"] < 12 + 4 * 20, "8 words and a number of up to 5 digits"
