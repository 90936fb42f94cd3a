"""The lean forward of encoders is the library's: values, gradients, dropout. What is not plain keeps its own."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from sparring.distributed import cpu_bf16_units
from sparring.models import lean, load_ranker, load_retriever
from sparring.models.lean import Run, lean_encoders
from sparring.models.modes import evaluating
from sparring.types import InputError

TEXTS = ["create a bucket", "how to reset a password " * 4, "서울", "what is the answer", "list a key policy", "서울"]
ROWS = [3, 0, 1, 4, 2, 0, 5]
KINDS = ["tiny_st", "tiny_st_unigram", "tiny_ce"]


def loaded(kind, request):
    return (load_ranker if kind == "tiny_ce" else load_retriever)(request.getfixturevalue(kind))


def chunks(model, budget):
    if hasattr(model, "embed"):
        store = model.tokenize(TEXTS, "passage", None)
        return model.batches(store, ROWS, "passage", token_budget=budget).inputs
    store = model.tokenize(TEXTS, None)
    return model.batches(store, ROWS, store, ROWS[::-1], token_budget=budget).inputs


def outputs(model, inputs):
    return torch.cat([model.embed(c, "passage") if hasattr(model, "embed") else model.logits(c) for c in inputs])


def gradients(model, inputs):
    model.zero_grad(set_to_none=True)
    found = outputs(model, inputs)
    (found * torch.arange(1.0, found.numel() + 1).view(found.shape)).sum().backward()
    return found.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("budget", [30, 10**6])
@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients_are_the_librarys(kind, budget, attention, request):
    model = loaded(kind, request).eval()
    for module in model.modules():
        if hasattr(module, "config") and hasattr(module.config, "_attn_implementation"):
            module.config._attn_implementation = attention
    inputs = chunks(model, budget)
    expected, slopes = gradients(model, inputs)
    with lean_encoders(model) as replaced:
        found, own = gradients(model, inputs)
    assert replaced == 1
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert own.keys() == slopes.keys()
    for name, slope in slopes.items():
        assert float((own[name] - slope).norm()) <= 1e-5 * float(slope.norm()) + 1e-6, name
    with lean_encoders(model), torch.no_grad():
        torch.testing.assert_close(outputs(model, inputs), expected, rtol=1e-5, atol=1e-6)


def test_the_librarys_forward_comes_back(tiny_st):
    model = load_retriever(tiny_st)
    encoder = next(module for module in model.modules() if lean.is_plain(module))
    own = encoder.forward
    with lean_encoders(model), lean_encoders(model) as nested:
        assert nested == 0
        assert encoder.forward != own
    assert encoder.forward == own
    with pytest.raises(InputError), evaluating(model):
        model.batches(model.tokenize(TEXTS, "passage", None), [99], "passage", token_budget=9)
    assert encoder.forward == own


@pytest.mark.parametrize("kind", KINDS)
def test_in_bf16_it_is_about_as_near_to_fp32_as_autocast(kind, request):
    model = loaded(kind, request).eval()
    inputs = chunks(model, 10**6)
    with torch.no_grad():
        exact = outputs(model, inputs)
        with torch.autocast("cpu", torch.bfloat16):
            autocast = outputs(model, inputs)
    with evaluating(model, torch.bfloat16):
        found = outputs(model, inputs)
    assert found.dtype == torch.float32
    assert float((found - exact).norm()) <= 3 * float((autocast - exact).norm())
    assert not torch.equal(found, exact)


@pytest.mark.parametrize("p", [0.0, 0.4])
def test_the_gradient_of_attention_is_its_derivative(p):
    torch.manual_seed(5)
    runs = [Run(2, 3), Run(1, 4), Run(3, 1)]
    projected = torch.randn(13, 3 * 2 * 4, dtype=torch.float64, requires_grad=True)

    def attention(values):
        torch.manual_seed(7)  # the same mask every time
        return lean._Attention.apply(values, runs, 2, 0.5, p)

    assert torch.autograd.gradcheck(attention, (projected,))


def test_attention_is_torchs():
    torch.manual_seed(5)
    runs, heads = [Run(2, 3), Run(1, 4)], 2
    projected = torch.randn(10, 3 * heads * 4)
    found = lean._Attention.apply(projected, runs, heads, 0.5, 0.0)
    expected, start = [], 0
    for run in runs:
        for _ in range(run.rows):
            row = projected[start : start + run.length].view(run.length, 3, heads, 4).transpose(0, 2)
            attended = functional.scaled_dot_product_attention(row[:, 0], row[:, 1], row[:, 2], scale=0.5)
            expected.append(attended.transpose(0, 1).reshape(run.length, -1))
            start += run.length
    torch.testing.assert_close(found, torch.cat(expected))


def test_dropout_keeps_the_mean(tiny_ce):
    """A linear read-out of one attention: its mean over masks is the value without dropout."""
    torch.manual_seed(1)
    projected, runs = torch.randn(24, 3 * 8), [Run(4, 6)]
    plain = lean._Attention.apply(projected, runs, 2, 0.5, 0.0)
    drawn = torch.stack([lean._Attention.apply(projected, runs, 2, 0.5, 0.3) for _ in range(3000)])
    error = drawn.std(0) / 3000**0.5
    assert float(((drawn.mean(0) - plain).abs() / error).max()) < 5
    model = load_ranker(tiny_ce).train()
    inputs = chunks(model, 10**6)
    with lean_encoders(model):
        torch.manual_seed(3)
        first, second = outputs(model, inputs), outputs(model, inputs)
        torch.manual_seed(3)
        again = outputs(model, inputs)
    assert torch.equal(first, again)
    assert not torch.equal(first, second)


def test_padding_on_the_left(tiny_st):
    encoder = next(module for module in load_retriever(tiny_st).eval().modules() if lean.is_plain(module))
    torch.manual_seed(2)
    hidden, keep = torch.randn(3, 5, 32), torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 1, 1, 1, 1]]).bool()
    mask = keep[:, None, None, :].expand(3, 1, 5, 5)
    with torch.no_grad():
        expected = encoder(hidden, mask).last_hidden_state
        with lean_encoders(encoder):
            found = encoder(hidden, mask).last_hidden_state
    torch.testing.assert_close(found[keep], expected[keep], rtol=1e-5, atol=1e-6)
    assert not found[~keep].any()


class Adapted(nn.Linear):
    """What an adapter puts in a layer's place."""


@pytest.mark.parametrize("change", ["hook", "hidden states", "adapter", "chunked", "no bias"])
def test_what_is_not_plain_keeps_its_forward(tiny_st, change):
    model = load_retriever(tiny_st).eval()
    encoder = next(module for module in model.modules() if lean.is_plain(module))
    query = encoder.layer[0].attention.self.query
    if change == "hook":
        query.register_forward_hook(lambda *_: None)
    elif change == "hidden states":
        encoder.config.output_hidden_states = True
    elif change == "adapter":
        encoder.layer[0].attention.self.query = Adapted(32, 32)
    elif change == "chunked":
        encoder.config.chunk_size_feed_forward = 2
    else:
        query.bias = None
    with lean_encoders(model) as replaced:
        assert replaced == 0
    assert lean.forward_of(model).startswith("the library's forward (")
    words = {"hook": "hooks", "hidden states": "hidden states", "chunked": "chunked"}.get(change, "linear layers")
    assert words in lean.forward_of(model)


def test_which_forward_is_said_in_words(tiny_st):
    model = load_retriever(tiny_st)
    encoder = next(module for module in model.modules() if lean.is_plain(module))
    name = type(encoder).__name__
    assert lean.forward_of(model) == f"lean forward, without padding and casts ({name} on a CPU)"
    with lean_encoders(model):
        assert "replaced before" in lean.forward_of(model)
    encoder.to("meta")
    assert lean.forward_of(model) == "the library's forward (it is on meta)"
    assert lean.forward_of(nn.Linear(2, 2)).startswith("the library's forward (this model is none of BertEncoder")


OPS = hasattr(torch.ops.mkldnn, "_linear_pointwise") and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
FUSED = [pytest.param(torch.bfloat16, 0.02, id="bf16"), pytest.param(None, 1e-5, id="fp32")]
"""As `evaluating` takes the precision, and how far apart results may be."""


def fused_or_skipped(dtype, monkeypatch):
    """Fused products, also on a CPU on which they would not be chosen in fp32."""
    if not OPS or (dtype == torch.bfloat16 and not cpu_bf16_units()):
        pytest.skip("not on this CPU, or not in this torch")
    monkeypatch.setattr(lean, "_pays", lambda _: True)


@pytest.mark.parametrize(("dtype", "apart"), FUSED)
def test_fused_products_are_the_plain_ones(dtype, apart, tiny_ce, monkeypatch):
    """At rest, with and without oneDNN's fused products: apart by roundings only."""
    fused_or_skipped(dtype, monkeypatch)
    model = load_ranker(tiny_ce).eval()
    inputs, found, calls = chunks(model, 10**6), [], []
    product = lean.Product.activated
    monkeypatch.setattr(lean.Product, "activated", lambda *a: calls.append(a[0].packed) or product(*a))
    for fuse in (True, False):
        with evaluating(model, dtype, fuse=fuse):
            found.append(outputs(model, inputs))
    assert set(calls[: len(calls) // 2]) == {True}
    assert set(calls[len(calls) // 2 :]) == {False}
    torch.testing.assert_close(found[0], found[1], rtol=apart, atol=apart)


@pytest.mark.parametrize(
    ("has", "expected"),
    [({"cpu_name": "AMD EPYC", "avx512_f": True, "avx512_bf16": True}, {torch.float32, torch.bfloat16}),
     ({"cpu_name": "AMD EPYC", "avx512_f": True}, {torch.float32}), ({"cpu_name": "AMD EPYC"}, set()), ({}, set()),
     ({"cpu_name": "Intel(R) Xeon(R)", "avx512_f": True, "amx_bf16": True}, {torch.bfloat16})],
)  # fmt: skip
def test_where_products_are_fused(has, expected, monkeypatch):
    """bf16 where there are units for it; fp32 on the CPUs on which it was faster."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has, raising=False)
    found = {dtype for dtype in (torch.float32, torch.bfloat16, torch.float64) if lean._pays(dtype)}
    assert found == (expected if OPS else set())


@pytest.mark.parametrize(("dtype", "apart"), FUSED)
def test_fused_products_see_few_shapes(dtype, apart, tiny_ce, monkeypatch):
    """Whatever the texts, products get a multiple of STEP tokens, and what is added changes nothing."""
    fused_or_skipped(dtype, monkeypatch)
    model, seen = load_ranker(tiny_ce).eval(), []
    call = lean.Product.__call__
    monkeypatch.setattr(lean.Product, "__call__", lambda self, x: seen.append(len(x)) or call(self, x))
    for budget in (20, 60, 10**6):
        inputs, sizes, found = chunks(model, budget), {}, {}
        for step in (64, 1):
            monkeypatch.setattr(lean, "STEP", step)
            seen.clear()
            with evaluating(model, dtype):
                found[step] = outputs(model, inputs)
            sizes[step] = list(seen)
        assert [size + -size % 64 for size in sizes[1]] == sizes[64]
        assert any(size % 64 for size in sizes[1]), "else there is nothing to see"
        torch.testing.assert_close(found[64], found[1], rtol=apart, atol=apart)
