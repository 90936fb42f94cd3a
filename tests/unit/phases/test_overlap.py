"""Work ahead and behind: what runs at the same time, in which order, and where errors come out."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from sparring.models import TokenStore, load_ranker, load_retriever
from sparring.models.memory import Budget
from sparring.phases import encode as encode_module
from sparring.phases import rerank
from sparring.phases.encode import encode
from sparring.phases.overlap import ahead, behind
from sparring.phases.rerank import score_pairs

WAIT = 20  # seconds after which a test that waits for another thread fails


def test_the_next_is_made_while_one_is_used() -> None:
    made, threads = {key: threading.Event() for key in "abc"}, set()

    def make(key: str, tokens: int) -> str:
        threads.add(threading.get_ident())
        made[key].set()
        return f"{key}{tokens}"

    with ahead(make, "abc", Budget(8, "a test")) as ready:
        one = next(ready)
        assert made["b"].wait(WAIT), "b is made while a is in use"
        assert not made["c"].wait(0.2), "no more than one ahead"
        assert one(8) == "a8"
        assert [next(ready)(8), next(ready)(8)] == ["b8", "c8"]
        with pytest.raises(StopIteration):
            next(ready)
    assert threading.get_ident() not in threads


def test_inputs_for_another_budget_are_made_again() -> None:
    calls, budget = [], Budget(8, "a test")

    def make(key: int, tokens: int) -> tuple[int, int]:
        calls.append((key, tokens))
        return key, tokens

    with ahead(make, [0, 1, 2], budget) as ready:
        first = next(ready)
        assert first(8) == (0, 8)
        assert first(8) == (0, 8), "another attempt makes them again"
        assert first(4) == (0, 4)
        budget.tokens = 4
        assert next(ready)(4) == (1, 4), "was made for 8"
        assert next(ready)(4) == (2, 4)
    assert sorted(calls) == [(0, 4), (0, 8), (0, 8), (1, 4), (1, 8), (2, 4)]


def test_an_error_of_what_is_made_comes_at_its_turn_and_once() -> None:
    tries = []

    def make(key: int, tokens: int) -> int:
        tries.append(key)
        if key == 1 and tries.count(1) == 1:
            raise MemoryError("too much at once")
        return key

    with ahead(make, [0, 1], Budget(128, "a test")) as ready:
        assert next(ready)(128) == 0
        second = next(ready)
        with pytest.raises(MemoryError, match="at once"):
            second(128)
        assert second(64) == 1
    with ahead(make, [], Budget(8, "a test")) as ready:
        assert list(ready) == []


def test_work_is_done_behind_in_order_and_all_of_it() -> None:
    done, go = [], threading.Event()

    def first() -> None:
        go.wait(WAIT)
        done.append(1)

    with behind() as later:
        later(first)
        assert done == [], "the caller goes on"
        go.set()
        later(lambda: done.append(2))
        assert done[0] == 1, "work is not taken before the work before it is done"
    assert done == [1, 2]


def test_an_error_behind_is_raised_at_the_next_work_or_at_the_end() -> None:
    def fails() -> None:
        raise OSError("disk full")

    def works(*works: Callable[[], None], then: type[Exception] | None = None) -> None:
        with behind() as later:
            for work in works:
                later(work)
            if then is not None:
                raise then

    done: list[int] = []
    with pytest.raises(OSError, match="disk full"):
        works(fails, lambda: done.append(1))
    assert done == []
    with pytest.raises(OSError, match="disk full"):
        works(fails)
    with pytest.raises(KeyError):
        works(lambda: done.append(2), then=KeyError)
    assert done == [2]
    with pytest.raises(KeyError):
        works(fails, then=KeyError)


def test_a_shard_is_written_and_the_next_is_made_while_one_is_computed(
    tiny_st: Path, tmp_path: Path, monkeypatch
) -> None:
    """The forward of the second shard waits for both: without overlap it would wait in vain."""
    retriever = load_retriever(tiny_st)
    store = retriever.tokenize([f"word {n}" for n in range(30)], "passage", None)
    expected = encode(retriever, store, "passage", shard=10)
    written, third, forwards = threading.Event(), threading.Event(), []
    save, batches, embeddings = encode_module._save, retriever.batches, retriever.embeddings

    def saved(parts, start, vectors):
        found = save(parts, start, vectors)
        if start == 0:
            written.set()
        return found

    def made(given: TokenStore, rows: np.ndarray, *args, **kwargs):
        if rows[0] == 20:
            third.set()
        return batches(given, rows, *args, **kwargs)

    def computed(inputs, kind):
        forwards.append(len(inputs))
        if len(forwards) == 2:
            assert written.wait(WAIT)
            assert third.wait(WAIT)
        return embeddings(inputs, kind)

    monkeypatch.setattr(encode_module, "_save", saved)
    monkeypatch.setattr(retriever, "batches", made)
    monkeypatch.setattr(retriever, "embeddings", computed)
    found = encode(retriever, store, "passage", shard=10, out=tmp_path / "e.npy")
    assert forwards == [10, 10, 10]
    np.testing.assert_array_equal(found, expected)


def test_a_shard_that_cannot_be_written_ends_the_encoding(tiny_st: Path, tmp_path: Path, monkeypatch) -> None:
    retriever = load_retriever(tiny_st)
    store = retriever.tokenize([f"word {n}" for n in range(30)], "passage", None)

    def saved(parts, start, vectors):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(encode_module, "_save", saved)
    with pytest.raises(OSError, match="No space"):
        encode(retriever, store, "passage", shard=10, out=tmp_path / "e.npy")
    assert not (tmp_path / "e.npy").exists()


def test_what_was_made_for_another_budget_is_let_go_before_it_is_made_again() -> None:
    alive: weakref.WeakSet[np.ndarray] = weakref.WeakSet()
    seen: list[list[tuple[int, int]]] = []

    def make(key: int, tokens: int) -> np.ndarray:
        seen.append(sorted((int(one[0]), int(one[1])) for one in alive))
        found = np.array([key, tokens]).view(Held)
        alive.add(found)
        return found

    budget = Budget(8, "a test")
    with ahead(make, [0, 1], budget) as ready:
        one = next(ready)
        assert one(8)[1] == 8
        budget.tokens = 4
        second = next(ready)
        assert second(4)[1] == 4
    assert (1, 8) not in seen[-1]


class Held(np.ndarray):
    """An array that can be referred to weakly and hashed."""

    __hash__ = object.__hash__

    def __eq__(self, other: object) -> bool:  # type: ignore[override]
        return self is other


def test_the_next_pairs_are_made_while_some_are_scored(tiny_ce: Path, monkeypatch) -> None:
    ranker = load_ranker(tiny_ce)
    store = ranker.tokenize([f"text number {n}" for n in range(9)], None)
    monkeypatch.setattr(rerank, "_PAIRS", 3)
    batches, forward, made, order = ranker.batches, ranker.forward, threading.Event(), []

    def making(*args, **kwargs):
        order.append("made")
        if len(order) > 1:
            made.set()
        return batches(*args, **kwargs)

    def scoring(inputs):
        assert made.wait(WAIT), "the second piece is made while the first is scored"
        return forward(inputs)

    monkeypatch.setattr(ranker, "batches", making)
    monkeypatch.setattr(ranker, "forward", scoring)
    assert len(score_pairs(ranker, store, store, np.arange(9), np.arange(9))) == 9
    assert order == ["made"] * 3


def test_scores_in_pieces_are_those_of_one_piece_also_after_a_halving(tiny_ce: Path, monkeypatch) -> None:
    ranker = load_ranker(tiny_ce)
    queries = ranker.tokenize([f"query {n}" for n in range(6)], None, "query")
    passages = ranker.tokenize([f"passage number {n} " + "long " * n for n in range(9)], None, "passage")
    rows = np.repeat(np.arange(6), 9), np.tile(np.arange(9), 6)
    expected = score_pairs(ranker, queries, passages, *rows)
    monkeypatch.setattr(rerank, "_PAIRS", 20)
    forward, calls = ranker.forward, []

    def scarce(batches):
        calls.append(batches.padded)
        if len(calls) == 2:
            raise MemoryError
        return forward(batches)

    monkeypatch.setattr(ranker, "forward", scarce)
    found = score_pairs(ranker, queries, passages, *rows, token_budget=1024)
    assert len(calls) == 4
    np.testing.assert_allclose(found, expected, atol=1e-6)
