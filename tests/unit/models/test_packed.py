"""The packed forward without a GPU: with attention written out on a CPU, and torch's own on tensors without numbers."""

from __future__ import annotations

import copy
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from sparring.models import lean, load_ranker, load_retriever, packed
from sparring.models.lean import lean_encoders

KINDS = ["tiny_st", "tiny_ce", "tiny_st_unigram", "tiny_ce_unigram"]  # BERT and XLM-RoBERTa
TEXTS = ["one", "two of them", "a rather longer passage about nothing at all", "three words here", "x y"]


def loaded(kind: str, request: pytest.FixtureRequest) -> Any:
    return (load_retriever if "_st" in kind else load_ranker)(request.getfixturevalue(kind))


def chunks(model: Any, budget: int = 40) -> list[dict[str, torch.Tensor]]:
    rows = list(range(len(TEXTS)))
    if hasattr(model, "embed"):
        return model.batches(model.tokenize(TEXTS, "passage", None), rows, "passage", token_budget=budget).inputs
    store = model.tokenize(TEXTS, None)
    return model.batches(store, rows, store, rows, token_budget=budget).inputs


def computed(model: Any, inputs: list[dict[str, torch.Tensor]]) -> torch.Tensor:
    return torch.cat([model.embed(c, "passage") if hasattr(model, "embed") else model.logits(c) for c in inputs])


def written_out(query, key, value, starts, longest, dropout, scale):
    """Attention of each text by a product, a softmax and a product; starts and longest are checked on the way."""
    edges = starts.tolist()
    assert starts.dtype == torch.int32
    assert edges[0] == 0
    assert edges[-1] == len(query)
    assert longest == max(b - a for a, b in pairwise(edges))
    found = []
    for a, b in pairwise(edges):
        scores = torch.einsum("qhd,khd->hqk", query[a:b], key[a:b]) * scale
        weights = functional.dropout(torch.softmax(scores, -1), dropout)
        found.append(torch.einsum("hqk,khd->qhd", weights, value[a:b]))
    return torch.cat(found)


@pytest.fixture
def on_this_cpu(monkeypatch):
    """Encoders on this CPU are treated as if they were on a GPU, in any precision."""
    monkeypatch.setattr(packed, "flash", written_out)
    monkeypatch.setattr(packed, "_packs", lambda _: True)
    monkeypatch.setattr(lean, "_device", lambda _: "cuda")
    monkeypatch.setattr(lean, "_dtype", lambda _: torch.float32)
    monkeypatch.setattr(packed, "obstacle", lambda *_: "")


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients_are_the_librarys(kind, attention, request, on_this_cpu) -> None:
    model = loaded(kind, request).eval()
    for module in model.modules():
        if hasattr(module, "config") and hasattr(module.config, "_attn_implementation"):
            module.config._attn_implementation = attention
    inputs = chunks(model)
    assert len(inputs) > 1
    assert any((one["attention_mask"] == 0).any() for one in inputs), "there is padding to leave out"

    def gradients() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        model.zero_grad(set_to_none=True)
        found = computed(model, inputs)
        (found * torch.arange(1.0, found.numel() + 1).view(found.shape)).sum().backward()
        return found.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    expected, slopes = gradients()
    seen = []
    encoder = next(m for m in model.modules() if type(m) in lean.ENCODERS)
    handle = encoder.layer[0].attention.self.query.register_forward_hook(lambda *a: seen.append(a[1][0].shape))
    obstacle = lean._obstacle
    lean._obstacle = lambda _: ""  # the hook that counts tokens is one
    try:
        with lean_encoders(model) as replaced:
            found, own = gradients()
    finally:
        lean._obstacle = obstacle
        handle.remove()
    assert replaced == 1
    assert [shape[:2] for shape in seen] == [(1, int(one["attention_mask"].sum())) for one in inputs], "no padding"
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert own.keys() == slopes.keys()
    for name, slope in slopes.items():
        assert float((own[name] - slope).norm()) <= 1e-5 * float(slope.norm()) + 1e-6, name
    assert encoder.config._attn_implementation == attention
    assert "forward" not in vars(encoder)


def test_dropout_of_attention_is_asked_for_in_training_only(tiny_ce: Path, on_this_cpu, monkeypatch) -> None:
    model, asked = load_ranker(tiny_ce), []
    monkeypatch.setattr(packed, "flash", lambda *a: asked.append(a[5]) or written_out(*a))
    for training in (True, False):
        model.train(training)
        with lean_encoders(model), torch.no_grad():
            computed(model, chunks(model)[:1])
    config = next(m for m in model.modules() if type(m) in lean.ENCODERS).config
    each = config.num_hidden_layers
    assert asked == [config.attention_probs_dropout_prob] * each + [0.0] * each
    assert config.attention_probs_dropout_prob > 0


def test_a_call_that_is_none_of_ours_is_padded(tiny_st: Path, on_this_cpu, monkeypatch) -> None:
    """The library's own encode, whose masks nobody announced."""
    model = load_retriever(tiny_st).eval()
    expected = model.model.encode(TEXTS)
    monkeypatch.setattr(packed, "flash", None)
    with lean_encoders(model) as replaced:
        found = model.model.encode(TEXTS)
    assert replaced == 1
    torch.testing.assert_close(torch.from_numpy(found), torch.from_numpy(expected))


class Recorder(TorchDispatchMode):
    """Names of the operators that run elsewhere than on the CPU, and what flash attention was given."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.flash: list[tuple[Any, ...]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not any(isinstance(x, torch.Tensor) and x.device.type == "cpu" for x in args):
            self.names.append(str(func))
        if "_flash_attention_forward" in str(func):
            self.flash.append(args)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", KINDS)
def test_torchs_operator_is_called_forward_and_backward_as_it_wants_to_be(kind, request, monkeypatch) -> None:
    """In bf16 on torch's device without numbers: the operator's signature, its gradient, and what it is given."""
    monkeypatch.setattr(packed, "_unproven", lambda *_: "")
    monkeypatch.setattr(packed, "_packs", lambda _: True)
    monkeypatch.setattr(lean, "_device", lambda _: "cuda")
    monkeypatch.setattr(lean, "_dtype", lambda _: torch.bfloat16)
    monkeypatch.setattr(lean, "_obstacle", lambda _: "")
    plain = loaded(kind, request)
    inputs = chunks(plain, 10**6)[0]
    tokens = int(inputs["attention_mask"].sum())
    (own,) = (module for module in plain.modules() if type(module) in lean.ENCODERS)
    heads, layers, size = own.config.num_attention_heads, own.config.num_hidden_layers, own.config.hidden_size
    with torch.device("meta"):
        encoder = type(own)(own.config).bfloat16().train()
        hidden = torch.empty(*inputs["input_ids"].shape, size, dtype=torch.bfloat16, requires_grad=True)
    chunk = packed.rows_of(inputs["attention_mask"], hidden.device)
    with chunk, lean_encoders(encoder) as replaced, Recorder() as seen:
        found = encoder(hidden).last_hidden_state
        found.float().sum().backward()
    assert replaced == 1
    assert found.shape == hidden.shape
    assert len(seen.flash) == layers
    for query, _, _, starts, other, longest, most, dropout, *_ in seen.flash:
        assert query.shape == (tokens, heads, size // heads)
        assert query.dtype == torch.bfloat16
        assert (starts.dtype, starts.shape, starts.device.type) == (torch.int32, (len(TEXTS) + 1,), "meta")
        assert other is starts
        assert longest == most == int(inputs["attention_mask"].sum(1).max())
        assert dropout == own.config.attention_probs_dropout_prob
    assert sum("_flash_attention_backward" in name for name in seen.names) == layers
    assert all(p.grad is not None for p in encoder.parameters())
    assert not any("_local_scalar_dense" in name for name in seen.names), "the encoder does not wait for the GPU"


def attend(dtype: torch.dtype = torch.bfloat16) -> str:
    packed._unproven.cache_clear()
    try:
        return packed._unproven(torch.device("cpu"), dtype, 2, 16)
    finally:
        packed._unproven.cache_clear()


def half(query, key, value, starts, longest, dropout, scale):
    return written_out(query.float(), key.float(), value.float(), starts, longest, dropout, scale).to(query.dtype)


def nan_slopes(found: torch.Tensor) -> torch.Tensor:
    if found.requires_grad:
        found.register_hook(lambda slope: slope * float("nan"))
    return found


class OtherMask(torch.autograd.Function):
    """Attention whose dropout is drawn anew in the backward."""

    @staticmethod
    def forward(ctx, q, k, v, *a):
        ctx.save_for_backward(q, k, v)
        ctx.a = a
        return half(q, k, v, *a)

    @staticmethod
    def backward(ctx, slope):
        with torch.enable_grad():
            three = [x.detach().requires_grad_() for x in ctx.saved_tensors]
            return (*torch.autograd.grad(half(*three, *ctx.a), three, slope), *[None] * 4)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, lambda: torch.autocast("cpu", torch.bfloat16)])
def test_it_is_proven_whatever_the_callers_modes_are(mode, monkeypatch) -> None:
    seen = []
    attention = functional.scaled_dot_product_attention
    monkeypatch.setattr(packed, "flash", half)
    monkeypatch.setattr(
        functional, "scaled_dot_product_attention", lambda *a, **k: seen.append(attention(*a, **k)) or seen[-1]
    )
    with mode():
        assert attend() == ""
    assert {found.dtype for found in seen} == {torch.float32}, "what it is compared with"


def test_too_little_memory_says_nothing_about_attention(monkeypatch) -> None:
    monkeypatch.setattr(packed, "flash", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA out of memory")))
    with pytest.raises(torch.OutOfMemoryError):
        attend()
    monkeypatch.setattr(packed, "flash", half)
    assert attend() == ""


def test_the_log_says_whether_it_is_used(monkeypatch, caplog) -> None:
    monkeypatch.setattr(packed, "flash", half)
    with caplog.at_level("INFO", logger="sparring"):
        attend()
        monkeypatch.setattr(packed, "flash", None)
        attend()
    assert "in bfloat16: used" in caplog.messages[0]
    assert "flash attention failed" in caplog.messages[1]


def test_attention_is_proven_before_it_is_used(monkeypatch) -> None:
    before = torch.get_rng_state()
    monkeypatch.setattr(packed, "flash", half)
    assert attend() == ""
    assert attend(torch.float16) == ""
    assert torch.equal(torch.get_rng_state(), before), "nobody's random numbers are used up"


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (lambda *a: half(*a[:6], 2 * a[6]), "from the padded one"),
        (lambda *a: half(*a[:5], 0.0, a[6]), "inf from"),
        (lambda q, k, v, s, n, p, c: half(q, k, v, s, n, p, c) * (1 - p), "0.05 from"),
        (lambda q, k, v, s, n, p, c: half(q, k.detach(), v, s, n, p, c), "failed"),
        (lambda q, k, v, *a: half(q, k + 0 * v, v.detach() + 0 * v, *a), "from the padded one"),
        (lambda q, *a: half(torch.cat([q[1:], q[:1]]), *a), "from the padded one"),
        (lambda q, k, v, *a: nan_slopes(half(q, k, v, *a)), "nan from"),
        (lambda q, k, v, *a: half(q, k, v, *a) if a[2] == 0 else OtherMask.apply(q, k, v, *a), "from the padded one"),
    ],
)
def test_what_is_not_attention_is_not_used(wrong, words, monkeypatch) -> None:
    """Another scale, no dropout, dropout that is not scaled up, no gradient of the keys or values, other rows,
    gradients that are no numbers, another mask backward than forward."""
    monkeypatch.setattr(packed, "flash", wrong)
    assert words in attend()


def test_where_there_is_none_padding_stays_and_the_log_says_why(tiny_st: Path, monkeypatch) -> None:
    packed._unproven.cache_clear()
    assert "flash attention failed" in packed._unproven(torch.device("cpu"), torch.bfloat16, 2, 16)  # none on a CPU
    packed._unproven.cache_clear()
    model = load_retriever(tiny_st)
    encoder = next(m for m in model.modules() if type(m) in lean.ENCODERS)
    assert "does not compute in float32" in packed.obstacle(encoder, torch.float32)
    attention = encoder.layer[0].attention.self
    monkeypatch.setattr(attention, "attention_head_size", 12)
    assert "heads of 12" in packed.obstacle(encoder, torch.bfloat16)
    monkeypatch.setattr(attention, "attention_head_size", 512)
    assert "heads of 512" in packed.obstacle(encoder, torch.bfloat16)
    monkeypatch.setattr(attention, "attention_head_size", 16)
    monkeypatch.setattr(packed, "_unproven", lambda *_: "no such luck")
    monkeypatch.setattr(lean, "_device", lambda _: "cuda")
    assert lean.forward_of(model) == "the library's forward (no such luck)"
    with lean_encoders(model) as replaced:
        assert replaced == 0
    monkeypatch.setattr(packed, "_unproven", lambda *_: "")
    assert lean.forward_of(model).startswith("packed forward in bf16, without padding (BertEncoder on a GPU)")
    encoder.layer[0].gradient_checkpointing = True
    assert "checkpointing" in packed.obstacle(encoder, torch.bfloat16)
    monkeypatch.setattr(attention, "config", copy.deepcopy(encoder.config))
    assert "of their own" in packed.obstacle(encoder, torch.bfloat16)
