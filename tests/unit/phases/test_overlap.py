"""Work ahead and behind: what runs at the same time, in which order, and where errors come out."""

from __future__ import annotations

import threading
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
        assert not made["c"].is_set(), "no more than one ahead"
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


def test_pairs_are_made_ahead_too(tiny_ce: Path, monkeypatch) -> None:
    """Scores in pieces are those of one piece, also where the budget is halved between."""
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
