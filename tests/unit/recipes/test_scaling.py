"""Corpus work of larger corpora, worked out by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from sparring.recipes.scaling import Rates, scaled, size, span, text

RATES = Rates(
    tokenise=1e-4, encode=1e-3, score=1e-9, disk=1e-9, network=1e9, text=400, tokens=252, dim=100, queries=32768,
    depth=200, refreshes=4, memory=16 * 10**9, room=10**12,
)  # fmt: skip
"""Two passes of 16,384 queries; a list of 200 rows is 2,400 bytes, a vector 400."""


def test_a_hundred_million_passages_on_fifty_workers() -> None:
    found = scaled(RATES, 10**8, 50)  # 2 million a worker: 0.8 GB of vectors
    assert found.once == pytest.approx(200)
    assert found.compute == pytest.approx(2000 + 65.536)
    assert found.disk == pytest.approx(2.4), "two writes, and one read, for the vectors stay in memory"
    assert found.network == pytest.approx(49 * (78_643_200 + 13_107_200) / 1e9)
    assert found.stored == pytest.approx(2e6 * 652 + 1.6e9)
    assert found.exact == pytest.approx(2 * 131072 * 400 + 13_107_200 + 2 * 78_643_200)
    assert found.hnsw == pytest.approx(1.344e9)
    assert found.ivf == pytest.approx(0.832e9)
    assert found.converted == pytest.approx(1.1e10)
    assert found.refresh == found.compute
    assert found.total == pytest.approx(200 + 4 * 2065.536)
    assert found.binds == "compute"


def test_vectors_larger_than_memory_are_read_in_every_pass() -> None:
    found = scaled(replace(RATES, memory=8 * 10**8), 2 * 10**6, 1)
    assert found.disk == pytest.approx(7 * 0.8), "two writes, three reads before searching, two passes"
    assert found.network == 0, "one worker sends nothing"


def test_a_part_of_a_passage_is_a_whole_one() -> None:
    assert scaled(RATES, 10, 3).once == pytest.approx(4e-4)


@pytest.mark.parametrize(
    ("changed", "passages", "workers", "binds", "words"),
    [
        ({"encode": 0.0, "score": 0.0}, 2 * 10**6, 1, "disk", "disk 2.4 s"),
        ({"network": 1e4}, 4 * 10**6, 2, "network", "compute 34.4 min, disk 2.4 s, network 2.5 h a refresh"),
        ({"room": 3 * 10**9}, 10**8, 50, "disk", "does not fit: 2.7 GiB a worker, 2.8 GiB are free"),
        ({"memory": 10**9}, 10**8, 50, "memory", "converting the texts, on one machine, needs 10.2 GiB"),
        ({"memory": 2 * 10**8}, 10**6, 50, "memory", "exact search"),
        ({"memory": 8 * 10**9, "queries": 10**7}, 10**6, 1000, "memory", "with the lists of all queries, needs 48"),
        ({"memory": None}, 10**8, 50, "compute", "compute 34.4 min"),
    ],
)
def test_what_binds(changed: dict, passages: int, workers: int, binds: str, words: str) -> None:
    found = scaled(replace(RATES, **changed), passages, workers)
    assert found.binds == binds
    assert words in found.reason


def test_twice_the_workers_halve_the_time_and_not_the_network() -> None:
    one, two = scaled(RATES, 10**8, 50), scaled(RATES, 10**8, 100)
    assert two.compute == pytest.approx(one.compute / 2)
    assert two.network == pytest.approx(one.network * 99 / 49)
    assert two.converted == one.converted


def test_the_text_says_what_is_assumed() -> None:
    shown = text([scaled(RATES, 10**8, 50)], RATES)
    assert "100,000,000" in shown
    assert "8 Gbit/s between workers is assumed" in shown
    times = (0.5, 90, 3600, 86400 * 3, 86400 * 800)
    assert [span(s) for s in times] == ["0.5 s", "90 s", "60.0 min", "3.0 days", "2.2 years"]
    assert [size(s) for s in (1 << 20, 1 << 30, 1 << 40)] == ["1 MiB", "1.0 GiB", "1.0 TiB"]
