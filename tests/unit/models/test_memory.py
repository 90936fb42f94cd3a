"""Too little memory is told from other errors, and encoding and scoring go on with half of the tokens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fit_fixtures import PASSAGES, QUERIES
from memory_fixtures import ERRORS, Allocator, little_memory
from sparring.models import load_ranker, load_retriever
from sparring.models.memory import Budget, TooLittleMemory, enough_memory, out_of_memory
from sparring.phases.encode import encode
from sparring.phases.rerank import score_pairs
from sparring.types import InputError


@pytest.mark.parametrize("error", ERRORS)
def test_errors_of_memory_are_known(error: Callable[[], Exception]) -> None:
    assert out_of_memory(error())
    with pytest.raises(TooLittleMemory, match="too little memory"), enough_memory():
        raise error()


@pytest.mark.parametrize("error", [ValueError("out of memory"), RuntimeError("mat1 and mat2"), InputError("memory")])
def test_other_errors_are_not(error: Exception) -> None:
    assert not out_of_memory(error)
    with pytest.raises(type(error)), enough_memory():
        raise error


def test_a_budget_is_halved_for_good_and_ends_at_the_smallest() -> None:
    budget, seen = Budget(1000, "a test"), []

    def call(tokens: int) -> int:
        seen.append(tokens)
        if tokens > 300:
            raise MemoryError
        return tokens

    assert [budget.run(call), budget.run(call)] == [250, 250]
    assert seen == [1000, 500, 250, 250]
    with pytest.raises(TooLittleMemory, match="at 64 tokens"):
        Budget(100, "a test").run(lambda _: (_ for _ in ()).throw(MemoryError()))


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("on_disk", [False, True])
def test_encoding_goes_on_with_half(
    error: Callable[[], Exception], on_disk: bool, tiny_st: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    retriever = load_retriever(tiny_st)
    store = retriever.tokenize(PASSAGES, "passage", None)
    whole = encode(retriever, store, "passage", token_budget=512)
    allocator, out = Allocator(70, error), tmp_path / "e.npy" if on_disk else None
    with little_memory(allocator):
        found = encode(retriever, store, "passage", token_budget=512, out=out, shard=8)
    assert allocator.refused
    np.testing.assert_allclose(found, whole, rtol=0, atol=1e-6)
    assert "passages: too little memory" in caplog.text
    half = encode(retriever, store, "passage", token_budget=64, shard=8)
    assert np.array_equal(found[8:], half[8:]), "from the second shard on it is the smaller budget's work to the bit"


def test_scoring_goes_on_with_half(tiny_ce: Path, caplog: pytest.LogCaptureFixture) -> None:
    ranker = load_ranker(tiny_ce)
    stores = ranker.tokenize(QUERIES, None, "query"), ranker.tokenize(PASSAGES, None, "passage")
    rows = np.repeat(np.arange(len(QUERIES)), 4), np.tile(np.arange(4), len(QUERIES))
    whole = score_pairs(ranker, *stores, *rows, token_budget=2048)
    allocator = Allocator(150)
    with little_memory(allocator):
        found = score_pairs(ranker, *stores, *rows, token_budget=2048)
    assert allocator.refused
    np.testing.assert_allclose(found, whole, rtol=0, atol=1e-6)
    assert np.array_equal(found, score_pairs(ranker, *stores, *rows, token_budget=128))
    with little_memory(Allocator(5)), pytest.raises(TooLittleMemory, match="scoring pairs"):
        score_pairs(ranker, *stores, *rows)
