"""A large training set: what a query costs in memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "many_queries.py"
FEW, MANY = 20_000, 100_000


def measured(queries: int) -> dict[str, Any]:
    command = [sys.executable, str(SCRIPT), str(queries)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=400)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.slow
def test_what_is_known_of_a_querys_bytes() -> None:
    assert_known(measured(2_000)["in it, bytes a query"])


def assert_known(known: dict[str, float]) -> None:
    assert known["pools, in memory"] == 268
    assert known["embeddings of queries, mapped"] == 4 * 64
    assert 12 + 4 * 8 < known["tokens of queries, mapped"] < 12 + 4 * 20, "8 words and a number of up to 5 digits"


@pytest.mark.slow
@pytest.mark.long
def test_a_query_costs_so_many_bytes() -> None:
    """By the kernel's count of fresh processes, beyond what does not grow with queries: until lists are drawn (pools
    20 deep are 268 bytes of it), and with tokens, which are pages of files."""
    few, many = measured(FEW), measured(MANY)

    def each(name: str) -> float:
        return (many[name] * MANY - few[name] * FEW) / (MANY - FEW)

    drawn = "pools, and 100 batches of lists, peak bytes a query"
    assert 268 < each(drawn) < 1150, "1,015 when this was written"
    assert 268 < each("tokens, then held, no mapped file, bytes a query") < 870, "786; with tokens 70 more"
    assert many["100 batches of the ranker, peak bytes a query"] < 2400, "with 90 MB that all queries share"
    assert_known(many["in it, bytes a query"])
