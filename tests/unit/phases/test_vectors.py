"""Embeddings of a file, block by block: the same numbers, and little memory."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from sparring.phases import index, mine, sharded, vectors
from sparring.phases.index import build_index
from sparring.phases.vectors import Chosen, blocks, finite
from sparring.types import InputError


@pytest.fixture
def mapped(tmp_path: Path) -> np.ndarray:
    """50,000 x 128 float32, 25.6 MB."""
    np.save(tmp_path / "q.npy", np.random.default_rng(0).standard_normal((50_000, 128), dtype=np.float32))
    array: np.ndarray = np.load(tmp_path / "q.npy", mmap_mode="r")
    return array


def test_chosen_rows_are_those_of_the_array(mapped: np.ndarray) -> None:
    array, rows = np.array(mapped), np.array([7, 49_999, 7, 0, 31])
    chosen = Chosen(mapped, rows)
    assert (len(chosen), chosen.shape) == (5, (5, 128))
    for part in (slice(1, 3), slice(4, 9), slice(9, 9), np.array([2, 0]), np.arange(0)):
        assert np.array_equal(chosen[part], array[rows][part])
        assert type(chosen[part]) is np.ndarray, "a copy, no view of the file"


@pytest.mark.parametrize("size", [1, 7, 25, 100])
def test_blocks_are_all_rows_in_order(size: int) -> None:
    array = np.random.default_rng(0).standard_normal((25, 3))[:, ::-1]
    found = list(blocks(array, size))
    assert np.array_equal(np.concatenate(found), array.astype(np.float32))
    assert all(block.flags.c_contiguous and len(block) <= size for block in found)
    assert list(blocks(array[:0], size)) == []


@pytest.mark.parametrize("row", [0, 16_383, 16_384, 40_000])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_one_number_that_is_none_is_found(row: int, value: float) -> None:
    array = np.zeros((40_001, 2), np.float32)
    assert finite(array)
    array[row, 1] = value
    assert not finite(array)
    assert finite(Chosen(array, np.array([r for r in (0, 16_383, 16_384, 40_000) if r != row])))
    with pytest.raises(InputError, match="NaN or infinity"):
        build_index(np.ones((3, 2), np.float32)).search(array, 1)


def file_kilobytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssFile"))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's account of resident memory")
@pytest.mark.parametrize("where", ["memory map", "chosen rows"])
def test_mining_holds_blocks_of_queries_not_all(
    where: str, mapped: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """20,000 are mined (10.2 MB) in blocks of 1,024 (0.5 MB); lists and pools themselves are 5.5 MB."""
    monkeypatch.setattr(index, "BLOCK", 1024)
    monkeypatch.setattr(vectors, "BLOCK", 1024)
    monkeypatch.setattr(blocks, "__defaults__", (1024,))
    monkeypatch.setattr(mine, "_BLOCK", 1024)
    rows = np.arange(20_000) if where == "memory map" else np.arange(0, 40_000, 2)
    asked = mapped[:20_000] if where == "memory map" else Chosen(mapped, rows)
    positives = {row: [row % 50] for row in rows.tolist()}
    passages = np.random.default_rng(1).standard_normal((50, 128), dtype=np.float32)
    found = build_index(passages)
    found.search(asked[:100], 2)  # libraries are loaded
    before = file_kilobytes()
    tracemalloc.start()
    scores, found_rows = found.search(asked, 2)
    lists = tracemalloc.get_traced_memory()[1]
    tracemalloc.reset_peak()
    pools = mine.mine(asked, rows, positives, found, np.arange(50), depth=2)
    pooled = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert lists < 2_500_000
    assert pooled < 8_000_000
    assert file_kilobytes() - before < 6_000
    array = np.array(mapped[rows])
    exact = array @ passages.T
    order = np.argsort(-exact, axis=1)[:, :2]
    assert np.array_equal(found_rows, order)
    assert np.allclose(scores, np.take_along_axis(exact, order, 1), atol=1e-4)
    heads = np.take_along_axis(exact, (rows % 50)[:, None], 1)[:, 0]
    assert np.allclose(pools.head_scores, heads[np.searchsorted(rows, pools.queries)], atol=1e-4)


def test_workers_read_the_chosen_rows_from_a_file(mapped: np.ndarray, tmp_path: Path) -> None:
    from test_sharded import OneProcess

    np.save(tmp_path / "p.npy", np.random.default_rng(2).standard_normal((300, 128), dtype=np.float32))
    rows = np.random.default_rng(3).permutation(50_000)[:40]
    spread = sharded.ShardedIndex(tmp_path / "p.npy", OneProcess(2), span=32)  # type: ignore[arg-type]
    one = build_index(np.load(tmp_path / "p.npy")).search(np.array(mapped[rows]), 9)
    for lists in (spread.search(Chosen(mapped, rows), 9), spread.search(np.array(mapped[rows]), 9)):
        assert np.array_equal(lists[1], one[1])
        np.testing.assert_allclose(lists[0], one[0], rtol=1e-5)
    assert not list(tmp_path.glob(".*.search"))
