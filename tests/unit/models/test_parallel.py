"""Chunks side by side: the same results in the same order, and nothing left behind."""

import threading

import pytest
import torch

from sparring.models import load_ranker, load_retriever, parallel
from sparring.models.modes import evaluating
from sparring.models.parallel import over_chunks

TEXTS = ["bucket", "list all buckets of an account", "a", "delete the bucket", "copy one object to another place"] * 3


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    assert torch.get_num_threads() == 2, "left as it was"
    torch.set_num_threads(before)


def alone(monkeypatch):
    monkeypatch.setattr(parallel, "_abreast", lambda *_: 1)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_embeddings_and_scores_are_those_of_one_after_another(dtype, tiny_st, tiny_ce, monkeypatch):
    retriever, ranker = load_retriever(tiny_st), load_ranker(tiny_ce)
    store = retriever.tokenize(TEXTS, "passage", None)
    pairs = ranker.tokenize(TEXTS, None), range(len(TEXTS))
    names, found, embed = set(), [], retriever.embed

    def watched(*given, **named):
        names.add(threading.current_thread().name)
        return embed(*given, **named)

    monkeypatch.setattr(retriever, "embed", watched)
    for _ in range(2):
        with evaluating(retriever, dtype), evaluating(ranker, dtype):
            one = retriever(retriever.batches(store, range(len(TEXTS)), "passage", token_budget=12), "passage")
            two = ranker(ranker.batches(pairs[0], pairs[1], pairs[0], pairs[1], token_budget=30))
        assert not one.requires_grad
        assert not two.requires_grad
        found.append((one, two))
        if len(found) == 1:
            assert "MainThread" not in names
            alone(monkeypatch)
    assert "MainThread" in names
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


def test_order_is_the_chunks_and_each_thread_has_one_core(tiny_ce):
    ranker, together = load_ranker(tiny_ce), threading.Barrier(2, timeout=20)

    def compute(chunk):
        if chunk < 2:
            together.wait()  # passes only where two are under way
        return chunk, torch.get_num_threads(), torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")

    with evaluating(ranker, torch.bfloat16):
        found = list(over_chunks(ranker, compute, range(9)))
    assert found == [(chunk, 1, False, True) for chunk in range(9)]


def test_an_error_ends_it(tiny_ce):
    ranker, begun = load_ranker(tiny_ce), []

    def compute(chunk):
        begun.append(chunk)
        if chunk == 1:
            raise MemoryError("too large")
        return chunk

    with evaluating(ranker), pytest.raises(MemoryError, match="too large"):
        list(over_chunks(ranker, compute, range(10_000)))
    assert len(begun) < 10_000


@pytest.mark.parametrize(
    ("threads", "chunks", "expected"), [(1, 9, 1), (2, 9, 2), (2, 1, 1), (6, 9, 6), (6, 5, 3), (12, 99, 6), (7, 3, 1)]
)
def test_how_many_at_a_time(threads, chunks, expected, tiny_ce, monkeypatch):
    ranker = load_ranker(tiny_ce)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    with evaluating(ranker):
        assert parallel._abreast(ranker, chunks) == expected
    monkeypatch.undo()


def test_one_after_another_in_training_and_with_a_forward_of_others(tiny_ce):
    ranker = load_ranker(tiny_ce)
    assert parallel._abreast(ranker.eval(), 9) == 1, "gradients are on, and the forward is the library's"
    with torch.no_grad():
        assert parallel._abreast(ranker, 9) == 1, "the forward is the library's"
    with evaluating(ranker):
        assert parallel._abreast(ranker, 9) == 2
        with torch.enable_grad():
            assert parallel._abreast(ranker, 9) == 1
        ranker.model.append(torch.nn.Identity())
        assert parallel._abreast(ranker, 9) == 1, "a module of others"
