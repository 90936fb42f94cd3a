"""Chunks side by side: the same results in the same order, and nothing left behind."""

import threading
import time
from functools import partial

import pytest
import torch
from sentence_transformers.sentence_transformer import modules as models

from sparring.models import Ranker, Retriever, load_ranker, load_retriever, parallel
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
    ("threads", "chunks", "most", "expected"),
    [(1, 9, 8, 1), (2, 9, 8, 2), (2, 1, 8, 1), (6, 9, 8, 6), (6, 9, 4, 3), (6, 5, 8, 3), (12, 99, 8, 6), (7, 3, 8, 1)],
)
def test_how_many_at_a_time(threads, chunks, most, expected, tiny_ce, monkeypatch):
    ranker = load_ranker(tiny_ce)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    with evaluating(ranker):
        assert parallel._abreast(ranker, chunks, most) == expected
    monkeypatch.undo()


def test_one_after_another_with_gradients_at_rest_and_with_a_forward_of_others(tiny_ce):
    ranker = load_ranker(tiny_ce).eval()

    def threads():
        return set(over_chunks(ranker, lambda _: threading.current_thread().name, range(4)))

    assert threads() == {"MainThread"}, "gradients are on, and the forward is the library's"
    with torch.no_grad():
        assert threads() == {"MainThread"}, "the forward is the library's"
    with evaluating(ranker):
        assert "MainThread" not in threads()
        with torch.enable_grad():
            assert threads() == {"MainThread"}
        ranker.model.append(torch.nn.Identity())
        assert threads() == {"MainThread"}, "a module of others"


# --- training -------------------------------------------------------------------------------------------------------


def texts_of(lengths):
    return [" ".join(["list bucket copy object user"] * n) for n in lengths]


LONG = texts_of([1, 2, 3, 4] * 4)


def trained(model, monkeypatch, most, dtype=None, seed=0):
    """Outputs and gradients of one forward in several chunks, at most so many at a time."""
    monkeypatch.setattr(parallel, "MOST_TRAINED", most)
    model.train()
    model.zero_grad()
    torch.manual_seed(seed)
    rows = range(len(LONG))
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype is not None):
        if isinstance(model, Ranker):
            store = model.tokenize(LONG, None)
            batches = model.batches(store, rows, store, rows, token_budget=64)
            found = model(batches)
        else:
            batches = model.batches(model.tokenize(LONG, "passage", None), rows, "passage", token_budget=64)
            found = model(batches, "passage")
    assert len(batches.inputs) > 4
    weights = torch.arange(found.numel(), dtype=torch.float32).view(found.shape).cos()
    (found * weights).sum().backward()
    return found.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def both(tiny_st, tiny_ce):
    return load_retriever(tiny_st), load_ranker(tiny_ce)


def test_training_has_the_gradient_of_one_after_another(tiny_st, tiny_ce, monkeypatch):
    """Dropout on: a chunk's masks are its own, however many are under way."""
    for model in both(tiny_st, tiny_ce):
        assert any(isinstance(m, torch.nn.Dropout) and m.p > 0 for m in model.modules())
        alone, expected = trained(model, monkeypatch, 1)
        beside, found = trained(model, monkeypatch, 4)
        torch.testing.assert_close(beside, alone, rtol=1e-6, atol=1e-6)
        assert found.keys() == expected.keys()
        largest = max(float(g.abs().max()) for g in expected.values())
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-6 * largest, msg=name)
        other, _ = trained(model, monkeypatch, 4, seed=1)
        assert not torch.allclose(other, beside, atol=1e-4), "the same masks again"


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_training_has_the_same_bits_whichever_thread_is_faster(dtype, tiny_ce, monkeypatch):
    ranker, late = load_ranker(tiny_ce), iter([0.0, 0.02, 0.0, 0.005] * 100)
    first = trained(ranker, monkeypatch, 4, dtype)
    logits = ranker.logits
    monkeypatch.setattr(ranker, "logits", lambda inputs: (time.sleep(next(late)), logits(inputs))[1])
    for _ in range(5):
        output, gradients = trained(ranker, monkeypatch, 4, dtype)
        assert torch.equal(output, first[0])
        assert all(torch.equal(gradients[name], value) for name, value in first[1].items())


def test_training_is_side_by_side(tiny_st, monkeypatch):
    """Two chunks are under way at once, forward and backward; weights at rest get no gradient."""
    retriever, names = load_retriever(tiny_st), {"forward": set(), "backward": set()}
    frozen = retriever.get_parameter("model.0.model.encoder.layer.0.output.dense.weight")
    frozen.requires_grad_(False)
    meet = {way: threading.Barrier(2, timeout=20) for way in names}
    embed = retriever.embed

    def note(way):
        if len(names[way]) < 2 and threading.current_thread().name not in names[way]:
            names[way].add(threading.current_thread().name)
            meet[way].wait()  # passes only where two are under way
        assert torch.get_num_threads() == 1

    def watched(inputs, kind):
        note("forward")
        found = embed(inputs, kind)
        found.register_hook(lambda _: note("backward"))
        return found

    monkeypatch.setattr(retriever, "embed", watched)
    _, gradients = trained(retriever, monkeypatch, 4)
    assert all(len(found) == 2 and "MainThread" not in found for found in names.values())
    assert "model.0.model.encoder.layer.0.output.dense.weight" not in gradients
    assert "model.0.model.encoder.layer.0.output.dense.bias" in gradients


def equal_in_turn(model, monkeypatch, run):
    """Gradients of ``run`` with chunks side by side and in turn."""
    found = []
    for most in (1, 2):
        monkeypatch.setattr(parallel, "MOST_TRAINED", most)
        model.train()
        model.zero_grad()
        torch.manual_seed(0)
        run(model)
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    assert found[0]
    largest = max(float(g.abs().max()) for g in found[0].values())
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-5, atol=1e-6 * largest, msg=name)


def embedded(model, *kinds):
    return torch.cat([
        model(model.batches(model.tokenize(LONG, kind, None), range(len(LONG)), kind, token_budget=64), kind)
        for kind in kinds
    ])  # fmt: skip


def squares(*kinds):
    return lambda model: (embedded(model, *kinds)[:, ::2] ** 3).sum().backward()


@pytest.mark.parametrize("frozen", [False, True])
def test_two_towers_one_of_them_at_rest(frozen, tiny_st, monkeypatch):
    retriever = load_retriever(tiny_st, two_towers=True)
    for name, parameter in retriever.named_parameters():
        parameter.requires_grad_(not frozen or "document" not in name)
    equal_in_turn(retriever, monkeypatch, squares("query", "passage"))


def test_a_weight_that_is_used_in_two_ways(tiny_st, tiny_ce, monkeypatch):
    """By all chunks together and by each chunk: word embeddings in a head, an encoder's weight in a pooler, in bf16."""
    retriever = load_retriever(tiny_st)
    table = retriever.get_parameter("model.0.model.embeddings.word_embeddings.weight")
    head = models.Dense(table.shape[1], table.shape[0])
    head.linear.weight = table
    retriever.model.append(head)
    retriever.dim = table.shape[0]
    equal_in_turn(retriever, monkeypatch, squares("passage"))
    ranker = load_ranker(tiny_ce)
    bert = ranker.get_submodule("model.0.model.bert")
    bert.pooler.dense.weight = bert.encoder.layer[0].attention.output.dense.weight
    rows = range(len(LONG))

    def run(model):
        store = model.tokenize(LONG, None)
        with torch.autocast("cpu", torch.bfloat16):
            found = model(model.batches(store, rows, store, rows, token_budget=64))
        (found**2).sum().backward()

    with pytest.MonkeyPatch.context() as patch:  # bf16 gradients are added in another order
        patch.setattr(torch.testing, "assert_close", partial(roughly, torch.testing.assert_close))
        equal_in_turn(ranker, monkeypatch, run)


def roughly(close, got, expected, *, atol, msg, **_):
    close(got, expected, rtol=0.02, atol=1e4 * atol, msg=msg)


def test_a_table_that_is_computed(tiny_st, monkeypatch):
    class Twice(torch.nn.Module):
        def forward(self, weight):
            return 2 * weight

    retriever = load_retriever(tiny_st)
    words = retriever.get_submodule("model.0.model.embeddings.word_embeddings")
    torch.nn.utils.parametrize.register_parametrization(words, "weight", Twice())
    equal_in_turn(retriever, monkeypatch, squares("passage"))


def test_a_hook_on_a_weight_sees_the_whole_gradient_once(tiny_st, monkeypatch):
    retriever, told = load_retriever(tiny_st), []
    weight = retriever.get_parameter("model.0.model.encoder.layer.1.output.dense.weight")
    weight.register_hook(lambda gradient: told.append(gradient.clone()) or gradient * 0.5)
    equal_in_turn(retriever, monkeypatch, squares("passage"))
    assert len(told) == 2
    torch.testing.assert_close(weight.grad, 0.5 * told[1])


def test_a_second_backward_is_refused(tiny_st, monkeypatch):
    retriever = load_retriever(tiny_st).train()
    found = embedded(retriever, "passage").sum()
    found.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="before: their graphs are gone"):
        found.backward()


def test_an_error_in_a_backward_is_raised(tiny_st, monkeypatch):
    retriever, embed = load_retriever(tiny_st), Retriever.embed

    def broken(self, inputs, kind):
        found = embed(self, inputs, kind)
        if len(inputs["input_ids"]) < 5:
            found.register_hook(refuse)
        return found

    def refuse(_):
        raise MemoryError("too large")

    monkeypatch.setattr(Retriever, "embed", broken)
    with pytest.raises(MemoryError, match="too large"):
        squares("passage")(retriever.train())
    assert torch.get_num_threads() == 2


def test_an_error_in_training_ends_it(tiny_ce, monkeypatch):
    ranker = load_ranker(tiny_ce)

    def broken(_):
        raise MemoryError("too large")

    monkeypatch.setattr(ranker, "logits", broken)
    with pytest.raises(MemoryError, match="too large"):
        trained(ranker, monkeypatch, 4)
    monkeypatch.undo()
    assert torch.isfinite(trained(ranker, monkeypatch, 4)[0]).all()
