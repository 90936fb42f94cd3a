"""Training on a CPU: cheap dropout is dropout, shared look-ups give the same values and gradients."""

import pytest
import torch
from torch.nn import functional

from sparring.models import load_ranker, load_retriever
from sparring.models.cpu import CpuTraining, keep_mask, training_on_cpu

TEXTS = ["create a bucket", "how to reset a password " * 4, "서울", "what is the answer", "list a key policy"]


def gradients(model, run):
    model.zero_grad(set_to_none=True)
    output = run()
    (output * torch.arange(1.0, output.numel() + 1).view(output.shape)).sum().backward()
    return output.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def without_dropout(model):
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "dropout_prob", None), float):
            module.dropout_prob = 0.0
    return model.train()


def forward(model, store, rows, budget):
    """Under the mode, and chunk by chunk without it, in row order."""
    if hasattr(model, "embed"):
        batches = model.batches(store, rows, "passage", token_budget=budget)
        return lambda: model(batches, "passage"), lambda: torch.cat(
            [model.embed(chunk, "passage") for chunk in batches.inputs]
        )[batches.restore]
    batches = model.batches(store, rows, store, rows[::-1], token_budget=budget)
    return lambda: model(batches), lambda: torch.cat([model.logits(c) for c in batches.inputs])[batches.restore]


@pytest.mark.parametrize("kind", ["tiny_st", "tiny_st_unigram", "tiny_ce"])
def test_chunks_share_look_ups_and_nothing_changes(kind, request):
    load = load_ranker if kind == "tiny_ce" else load_retriever
    model = without_dropout(load(request.getfixturevalue(kind)))
    store = model.tokenize(TEXTS, *(("passage",) if kind != "tiny_ce" else ()), None)
    run, plain = forward(model, store, [3, 0, 1, 4, 2, 0], 30)
    (found, found_gradients), (expected, expected_gradients) = gradients(model, run), gradients(model, plain)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert found_gradients.keys() == expected_gradients.keys()
    for name, gradient in expected_gradients.items():
        torch.testing.assert_close(found_gradients[name], gradient, rtol=1e-4, atol=2e-5, msg=name)


@pytest.mark.parametrize("p", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_mask_keeps_the_mean(p, dtype):
    torch.manual_seed(1)
    mask = keep_mask((300, 401), p, dtype)
    kept = (mask != 0).float().mean()
    assert mask.shape == (300, 401)
    assert abs(float(kept) - (1 - p)) < 0.005
    torch.testing.assert_close(mask[mask != 0], torch.full_like(mask[mask != 0], 1 / (1 - p) if p < 1 else 0.0))
    assert torch.corrcoef(mask.float()[:, :2].T)[0, 1].abs() < 0.2 if p < 1 else True


def test_the_same_random_state_gives_the_same_dropout(tiny_ce):
    ranker = load_ranker(tiny_ce).train()
    store = ranker.tokenize(TEXTS, None)
    batches = ranker.batches(store, [0, 1, 2], store, [1, 2, 3], token_budget=40)
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(ranker(batches).detach())
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


HIDDEN = torch.arange(7).lt(5).expand(2, 1, 5, 7)


@pytest.mark.parametrize("mask", [None, HIDDEN])
def test_attention_is_torchs_but_for_its_dropout(mask):
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 3, n, 4, generator=generator) for n in (5, 7, 7))
    expected = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=0.3)
    with CpuTraining([]):
        tiny = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=1e-9, scale=0.3)
        torch.testing.assert_close(tiny, expected)
        draws = [
            functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=0.3, scale=0.3)
            for _ in range(3000)
        ]
    torch.testing.assert_close(torch.stack(draws).mean(0), expected, atol=0.06, rtol=0)


def test_off_in_evaluation(tiny_ce):
    ranker = load_ranker(tiny_ce).eval()
    assert not isinstance(training_on_cpu(ranker, []), CpuTraining)
    x = torch.ones(4)
    with CpuTraining([]):
        assert torch.equal(functional.dropout(x, 0.5, training=False), x)
        assert functional.dropout(x, 1.0, inplace=True) is x
    assert torch.equal(x, torch.zeros(4))
