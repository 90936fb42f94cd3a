"""Shards and spans that workers make, without a cluster: the same lists, whoever found what first, and only once."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparring.files import Busy
from sparring.models import load_retriever
from sparring.phases import sharded
from sparring.phases.encode import encode
from sparring.phases.index import build_index, merged
from sparring.phases.sharded import ModelFiles, ShardedIndex, SpanSearcher, on_cluster, search_splits, span_of
from sparring.types import InputError


@dataclass
class OneProcess:
    """A `Cluster` whose workers take turns in this process, in an order that is drawn."""

    workers: int = 2
    shard: int = 32
    stop_after: int = 10**9
    done: list[int] = field(default_factory=list)

    def map(
        self,
        make: Callable[..., Any],
        arguments: tuple[Any, ...],
        items: Sequence[Mapping[str, Any]],
        *,
        threads: bool = False,
    ) -> Generator[dict[str, Any], None, None]:
        assert threads == (make is SpanSearcher), "search is the CPU's work"
        rng = np.random.default_rng(len(items))
        team = [make(*arguments) for _ in range(self.workers)]
        for i in rng.permutation(len(items)):
            if len(self.done) == self.stop_after:
                raise InputError("stopped")
            self.done.append(items[i]["start"])
            yield team[rng.integers(len(team))](items[i])


@pytest.fixture
def passages(tmp_path: Path) -> Path:
    """300 embeddings with few distinct values: equal scores everywhere, also across spans."""
    rng = np.random.default_rng(0)
    np.save(tmp_path / "p.npy", rng.integers(-2, 3, (300, 4)).astype(np.float32))
    return tmp_path / "p.npy"


QUERIES = np.random.default_rng(1).integers(-2, 3, (25, 4)).astype(np.float32)


@pytest.mark.parametrize("workers", [1, 2, 5])
@pytest.mark.parametrize("k", [1, 10, 31, 64, 300, 1000])
def test_lists_with_equal_scores(passages: Path, workers: int, k: int) -> None:
    everything = QUERIES.astype(np.float64) @ np.load(passages).T.astype(np.float64)
    order = np.lexsort((np.broadcast_to(np.arange(300), everything.shape), -everything), axis=1)[:, :k]
    index = ShardedIndex(passages, OneProcess(workers), span=32)  # type: ignore[arg-type]
    scores, rows = index.search(QUERIES, k)
    np.testing.assert_array_equal(rows, order)
    np.testing.assert_array_equal(scores, np.take_along_axis(everything, order, 1))
    assert not list(passages.parent.glob(".p.npy*"))
    np.testing.assert_array_equal(index.vectors(rows[0]), np.load(passages)[rows[0]])


def test_what_the_running_top_k_has_beaten_is_not_written(passages: Path) -> None:
    alone = OneProcess(1, stop_after=9)
    with pytest.raises(InputError, match="stopped"):
        ShardedIndex(passages, alone, span=32).search(QUERIES, 8)  # type: ignore[arg-type]
    sizes = {int(path.name[:12]): len(np.load(path)["rows"]) for path in passages.parent.glob(".p.npy*/*.npz")}
    assert len(sizes) == 9
    assert sizes[alone.done[0]] == 8 * len(QUERIES), "the first span's whole lists"
    assert np.mean([sizes[start] for start in alone.done[4:]]) < 6 * len(QUERIES), "later ones' survivors"


def test_a_stopped_search_goes_on_and_damage_is_found(passages: Path) -> None:
    expected = build_index(np.load(passages)).search(QUERIES, 8)
    with pytest.raises(InputError, match="stopped"):
        ShardedIndex(passages, OneProcess(stop_after=6), span=32).search(QUERIES, 8)  # type: ignore[arg-type]
    files = sorted(passages.parent.glob(".p.npy*/*.npz"))
    files[2].write_bytes(files[2].read_bytes()[:-1] + b"?")
    kept = {int(path.name[:12]) for path in files} - {int(files[2].name[:12])}
    second = OneProcess()
    found = ShardedIndex(passages, second, span=32).search(QUERIES, 8)  # type: ignore[arg-type]
    np.testing.assert_array_equal(found[1], expected[1])
    assert set(second.done) == set(range(0, 300, 32)) - kept


def test_other_queries_do_not_use_these_spans(passages: Path) -> None:
    with pytest.raises(InputError, match="stopped"):
        ShardedIndex(passages, OneProcess(stop_after=6), span=32).search(QUERIES, 8)  # type: ignore[arg-type]
    other = OneProcess()
    ShardedIndex(passages, other, span=32).search(QUERIES + 1, 8)  # type: ignore[arg-type]
    assert len(other.done) == 10


@pytest.mark.parametrize(
    ("queries", "passages", "span", "k", "zero"),
    [(1024, 2048, 32, 25, True), (4000, 1600, 8, 1, False)],
    ids=["one query ties with all", "offsets are most of the files"],
)
def test_merging_stays_within_a_bound(
    tmp_path: Path, queries: int, passages: int, span: int, k: int, zero: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At most: the files that wait, 12 bytes a result and 8 a query (256 KiB here, or as much as the lists, and one
    file), and 100 bytes for each of the 4,096 results that are sorted together. With a block of all queries as wide
    as the widest it was 40 MB; with files that wait until they have enough results, 8.7 MB."""
    monkeypatch.setattr(sharded, "WAITING", 2**18)
    monkeypatch.setattr(sharded, "CELLS", 4096)
    rng = np.random.default_rng(0)
    np.save(tmp_path / "p.npy", rng.standard_normal((passages, 2)).astype(np.float32))
    asked = rng.standard_normal((queries, 2)).astype(np.float32)
    if zero:
        asked[7] = 0
    joined, peaks, waited = sharded.joined, [], []

    def watched(best: Any, paths: Sequence[Path], k: int) -> Any:
        waited.append(sum(path.stat().st_size for path in paths))
        tracemalloc.start()
        found = joined(best, paths, k)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        return found

    monkeypatch.setattr(sharded, "joined", watched)
    scores, rows = ShardedIndex(tmp_path / "p.npy", OneProcess(1), span=span).search(asked, k)  # type: ignore[arg-type]
    expected = build_index(np.load(tmp_path / "p.npy")).search(asked, k)
    np.testing.assert_array_equal(rows, expected[1])
    np.testing.assert_array_equal(scores, expected[0])
    lists = queries * (12 * k + 8)
    assert max(peaks) < max(2**18, lists) + lists + 100 * 4096
    assert min(waited[:-1], default=2**18) >= 2**18, "sorted together"


@pytest.mark.parametrize(("kept", "jobs"), [(10**7, [40]), (100, [8, 40])])
def test_a_split_is_searched_no_deeper_than_it_asks_where_that_costs_much(
    passages: Path, kept: int, jobs: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """15 training queries at depth 8 beside dev and test at 40 would keep 480 entries more than are asked for."""
    monkeypatch.setattr(sharded, "_MORE", kept)
    depths: list[int] = []
    search = ShardedIndex.search

    def noted(self: ShardedIndex, queries: np.ndarray, k: int, **more: Any) -> Any:
        depths.append(k)
        return search(self, queries, k, **more)

    monkeypatch.setattr(ShardedIndex, "search", noted)
    rows = {"dev": np.array([20, 3]), "test": np.arange(4, 12), "train": np.r_[0:3, 12:20, 21:25]}
    asked = {split: (some, 8 if split == "train" else 40) for split, some in rows.items()}
    index = ShardedIndex(passages, OneProcess(), span=32)  # type: ignore[arg-type]
    found = search_splits(index, QUERIES, asked)
    assert depths == jobs
    assert set(found) == set(rows)
    alone = build_index(np.load(passages))
    for split, (some, depth) in asked.items():
        expected = alone.search(QUERIES[some], depth)
        np.testing.assert_array_equal(found[split][0], expected[0])
        np.testing.assert_array_equal(found[split][1], expected[1])


def test_splits_whose_second_search_was_stopped_go_on_with_it(passages: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharded, "_MORE", 10)
    asked = {"dev": (np.arange(3), 40), "train": (np.arange(3, 25), 8)}
    first, second = OneProcess(stop_after=14), OneProcess()  # ten spans each; the shallower search comes first
    with pytest.raises(InputError, match="stopped"):
        search_splits(ShardedIndex(passages, first, span=32), QUERIES, asked)  # type: ignore[arg-type]
    found = search_splits(ShardedIndex(passages, second, span=32), QUERIES, asked)  # type: ignore[arg-type]
    assert sorted(second.done) == sorted(set(range(0, 300, 32)) - set(first.done[10:])), "six of the second's"
    for split, (rows, depth) in asked.items():
        expected = build_index(np.load(passages)).search(QUERIES[rows], depth)
        np.testing.assert_array_equal(found[split][1], expected[1])
    assert [path.name for path in passages.parent.iterdir()] == ["p.npy"]


def test_the_same_search_twice_at_once_is_refused(passages: Path) -> None:
    class Meanwhile(OneProcess):
        def map(self, *arguments: Any, **more: Any) -> Any:
            with pytest.raises(Busy, match="another process"):
                ShardedIndex(passages, OneProcess(), span=32).search(QUERIES, 8)  # type: ignore[arg-type]
            ShardedIndex(passages, OneProcess(), span=32).search(QUERIES, 9)  # type: ignore[arg-type]
            yield from super().map(*arguments, **more)

    found = ShardedIndex(passages, Meanwhile(), span=32).search(QUERIES, 8)  # type: ignore[arg-type]
    np.testing.assert_array_equal(found[1], build_index(np.load(passages)).search(QUERIES, 8)[1])
    assert [path.name for path in passages.parent.iterdir()] == ["p.npy"]


def test_the_folder_is_read_once_for_all_spans(passages: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="stopped"):
        ShardedIndex(passages, OneProcess(stop_after=9), span=32).search(QUERIES, 8)  # type: ignore[arg-type]
    read: list[str] = []
    glob = Path.glob
    monkeypatch.setattr(Path, "glob", lambda self, pattern: read.append(pattern) or glob(self, pattern))
    ShardedIndex(passages, OneProcess(1), span=32).search(QUERIES, 8)  # type: ignore[arg-type]
    assert len(read) == 2, "once before, once by the worker for its one span"


def test_no_number_is_named_by_its_row(tmp_path: Path) -> None:
    vectors = np.ones((100, 4), dtype=np.float32)
    vectors[77, 2] = np.nan
    np.save(tmp_path / "p.npy", vectors)
    with pytest.raises(InputError, match="NaN") as error:
        ShardedIndex(tmp_path / "p.npy", OneProcess(), span=32).search(QUERIES, 3)  # type: ignore[arg-type]
    assert error.value.where == "passage row 77"


def test_another_dimension(passages: Path) -> None:
    with pytest.raises(InputError, match="different dimensions"):
        ShardedIndex(passages, OneProcess(), span=32).search(QUERIES[:, :3], 3)  # type: ignore[arg-type]


def test_merging_keeps_no_result_last() -> None:
    one = np.array([[5.0, 3.0, -np.inf]], np.float32), np.array([[7, 1, -1]])
    other = np.array([[5.0, 3.0, 1.0]], np.float32), np.array([[2, 0, 9]])
    scores, rows = merged(one, other, 5)
    assert rows.tolist() == [[2, 7, 0, 1, 9]]
    assert scores.tolist() == [[5, 5, 3, 3, 1]]


@pytest.mark.parametrize(
    ("rows", "least", "span"),
    [(100, 32, 32), (1000, 8192, 8192), (10**6, 8192, 16384), (10**7, 8192, 262144), (21 * 10**6, 8192, 393216)],
)
def test_spans(rows: int, least: int, span: int) -> None:
    assert span_of(rows, least) == span
    assert -(-rows // span) <= 64


@pytest.mark.parametrize("queries", [1, 10_000, 500_000, 2_000_000])
def test_no_span_takes_long(queries: int) -> None:
    """At 100 GFLOP/s, 21 million passages of 768 dimensions; the time limit of a shard is 1,800 s."""
    span = span_of(21 * 10**6, 8192, queries * 768)
    assert 2 * span * queries * 768 / 1e11 < 300
    assert span % 8192 == 0


def test_shards_of_the_same_model_alone(tiny_st: Path, tmp_path: Path) -> None:
    retriever = load_retriever(tiny_st)
    store = retriever.tokenize([f"how to list key {i}" for i in range(90)], "passage", tmp_path / "tokens")
    one = OneProcess()
    model = ModelFiles.saved(retriever, tmp_path / "model", trust_remote_code=False)
    found = encode(
        retriever, store, "passage", out=tmp_path / "p.npy", shard=32, elsewhere=on_cluster(one, model, store)  # type: ignore[arg-type]
    )  # fmt: skip
    np.testing.assert_array_equal(found, encode(retriever, store, "passage", shard=32))
    assert sorted(one.done) == [0, 32, 64]
    other = ModelFiles(str(tiny_st), "0" * 64)
    with pytest.raises(InputError, match="another model"):
        encode(
            retriever, store, "passage", out=tmp_path / "o.npy", shard=32, elsewhere=on_cluster(one, other, store)  # type: ignore[arg-type]
        )  # fmt: skip
    with pytest.raises(InputError, match="tokens in memory"):
        on_cluster(one, model, store.select(np.arange(3)))  # type: ignore[arg-type]
