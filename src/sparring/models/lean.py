"""The layers of a BERT or XLM-RoBERTa encoder on a CPU, without padding and without casts: same weights, same result.

While the mode is on, the encoder's own ``forward`` is replaced; embeddings, pooling and heads stay the library's. The
tokens of a chunk lie one after another, so that no product is spent on padding; rows of one length attend together,
which needs no mask; query, key and value are one product. In bf16 each weight is cast once, and what lies between two
products stays bf16 (autocast casts every input of every product again and adds in fp32). Without gradients, weights
are laid out as oneDNN reads them before the first chunk, and bias, GELU and residual are part of the product: in bf16,
and in fp32 on AMD's CPUs with AVX-512, where oneDNN multiplies faster than the library that torch takes.

An encoder that is anything but plain (another class, hooks, adapters, cross-attention, another activation's module)
keeps its own forward.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional
from transformers.activations import GELUActivation
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions
from transformers.models.bert.modeling_bert import BertEncoder
from transformers.models.roberta.modeling_roberta import RobertaEncoder
from transformers.models.xlm_roberta.modeling_xlm_roberta import XLMRobertaEncoder

from sparring.distributed import cpu_bf16_units, cpu_is_amd_avx512
from sparring.models import packed
from sparring.models.cpu import alias_of, dropped, keep_mask

STEP = 64
"""oneDNN's products get a multiple of so many tokens: it generates code for every new shape and keeps that of the
last 1,024, which takes time in every chunk and memory by the hundred megabytes."""
ENCODERS = (BertEncoder, RobertaEncoder, XLMRobertaEncoder)


@dataclass(frozen=True)
class Run:
    """Neighbouring rows of one length in a packed chunk."""

    rows: int
    length: int


@dataclass(frozen=True)
class Product:
    """A linear layer in the compute precision; its weight is as torch or as oneDNN lays it out."""

    weight: Tensor
    bias: Tensor
    packed: bool

    @classmethod
    def of(cls, linears: Sequence[nn.Linear], dtype: torch.dtype, fused: bool) -> Product:
        """One product for the layers that read the same input, their outputs side by side."""
        weight = torch.cat([one.weight for one in linears]) if len(linears) > 1 else linears[0].weight
        bias = torch.cat([one.bias for one in linears]) if len(linears) > 1 else linears[0].bias
        weight, bias = weight.to(dtype), bias.to(dtype)
        if fused:
            weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), None)
        return cls(weight, bias, fused)

    def __call__(self, x: Tensor) -> Tensor:
        """(T, in) -> (T, out)"""
        if not self.packed:
            return functional.linear(x, self.weight, self.bias)
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")  # type: ignore[no-any-return]

    def activated(self, x: Tensor, activation: nn.Module) -> Tensor:
        """The product, and the activation of it."""
        if not self.packed or type(activation) is not GELUActivation:
            return activation(self(x))  # type: ignore[no-any-return]
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "gelu", [], "none")  # type: ignore[no-any-return]

    def added(self, x: Tensor, residual: Tensor, p: float) -> Tensor:
        """The product with dropout of probability p, plus the residual."""
        if self.packed:
            return torch.ops.mkldnn._linear_pointwise.binary(x, residual, self.weight, self.bias, "add")  # type: ignore[no-any-return]
        return dropped(self(x), p) + residual


@dataclass(frozen=True)
class Layer:
    """One encoder layer: its module, and its four products in the compute precision."""

    module: Any
    projections: Product
    attended: Product
    up: Product
    down: Product


@contextmanager
def lean_encoders(model: nn.Module, *, fuse: bool = True) -> Iterator[int]:
    """Replace the forward of every plain encoder in ``model``, on a CPU by the one of this file and on a GPU by a
    packed one (`packed`); it comes back afterwards.

    The precision is autocast's where that is on, else the weights'. Gradients reach the weights as usual. On a CPU,
    without gradients, weights are those of this moment until the mode ends.

    Args:
        fuse: use oneDNN's products where they pay. To lay weights out takes as long as some hundred tokens.

    Yields: how many encoders were replaced.
    """
    replaced = []
    for encoder in filter(is_plain, encoders(model)):
        if _device(encoder) == "cpu":
            encoder.forward = partial(_forward, _layers(encoder, fuse))
        elif packed.obstacle(encoder, _dtype(encoder)):
            continue
        else:
            encoder.forward = packed.Packed(encoder)
        replaced.append(encoder)
    try:
        yield len(replaced)
    finally:
        for encoder in replaced:
            del encoder.forward


def is_lean(model: nn.Module) -> bool:
    """Whether every encoder of a model has the forward of this file at the moment, and there is one."""
    found = [vars(module).get("forward") for module in encoders(model)]
    return bool(found) and all(isinstance(forward, partial) and forward.func is _forward for forward in found)


@contextmanager
def cut(model: nn.Module) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """What the encoders of a model made of weights ends the graphs of the chunks that are computed meanwhile.

    Yields: each such tensor with a gradient to carry on, and what stands for it in the chunks.
    """
    made: dict[int, tuple[Tensor, Tensor]] = {}

    def alias(value: Tensor) -> Tensor:
        if value.is_leaf or not value.requires_grad:
            return value
        return made.setdefault(id(value), (value, alias_of(value)))[1]

    def of(product: Product) -> Product:
        return replace(product, weight=alias(product.weight), bias=alias(product.bias))

    found = [module for module in encoders(model) if "forward" in vars(module)]
    before = [module.forward for module in found]
    for module in found:
        layers = [
            Layer(one.module, of(one.projections), of(one.attended), of(one.up), of(one.down))
            for one in module.forward.args[0]
        ]
        module.forward = partial(_forward, layers)
    try:
        yield list(made.values())
    finally:
        for module, forward in zip(found, before, strict=True):
            module.forward = forward


def encoders(model: nn.Module) -> list[Any]:
    """The encoders of a model that are of one of these kinds."""
    return [module for module in model.modules() if type(module) in ENCODERS]


def is_plain(module: nn.Module) -> bool:
    """Whether this is an encoder whose layers do here what they do in their library, on a CPU or a GPU."""
    return type(module) in ENCODERS and not _obstacle(module)


def forward_of(model: nn.Module) -> str:
    """Which forward the encoders of a model get, and why it is the library's where it is: a line for the log."""
    found = encoders(model)
    if not found:
        configured = [type(module).__name__ for module in model.modules() if hasattr(module, "config")]
        names = ", ".join(kind.__name__ for kind in ENCODERS)
        return f"the library's forward ({configured[-1] if configured else 'this model'} is none of {names})"
    reasons = {_obstacle(m) or ("" if _device(m) == "cpu" else packed.obstacle(m, torch.bfloat16)) for m in found}
    if reasons != {""}:
        return f"the library's forward ({'; '.join(sorted(reasons - {''}))})"
    if _device(found[0]) != "cpu":
        return f"packed forward in bf16, without padding ({type(found[0]).__name__} on a GPU); else the library's"
    return f"lean forward, without padding and casts ({type(found[0]).__name__} on a CPU)"


def _device(module: nn.Module) -> str:
    return next(module.parameters()).device.type


def _dtype(module: nn.Module) -> torch.dtype:
    """The compute precision: autocast's where that is on, else the weights'."""
    device = _device(module)
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else next(module.parameters()).dtype


def _obstacle(module: nn.Module) -> str:
    """Why the forward of one of `ENCODERS` is left alone; "" where it can be replaced."""
    config: Any = module.config
    linears = [child for child in module.modules() if hasattr(child, "in_features")]
    devices = {p.device.type for p in module.parameters()}
    found = {
        "its forward was replaced before": "forward" in vars(module),
        f"it is on {', '.join(sorted(devices))}": devices not in ({"cpu"}, {"cuda"}),
        "it is a decoder or has cross-attention": config.is_decoder or config.add_cross_attention,
        "its feed-forward is chunked": bool(config.chunk_size_feed_forward),
        "all hidden states or attentions are asked for": getattr(config, "output_hidden_states", False)
        or getattr(config, "output_attentions", False),
        f"its attention is {config._attn_implementation}": config._attn_implementation not in ("sdpa", "eager"),
        "some of its linear layers are not plain ones, an adapter's perhaps": any(
            type(child) is not nn.Linear or child.bias is None for child in linears
        ),
        "hooks hang on it": any(child._forward_hooks or child._forward_pre_hooks for child in module.modules()),
        "it is spread over several processes": any(isinstance(p, DTensor) for p in module.parameters()),
    }
    return next((reason for reason, true in found.items() if true), "")


def _layers(encoder: Any, fuse: bool) -> list[Layer]:
    """The encoder's layers; ``fuse``: at rest and without gradients in the form that oneDNN multiplies fastest."""
    dtype = _dtype(encoder)
    fused = fuse and not torch.is_grad_enabled() and not encoder.training and _pays(dtype)
    with torch.autocast("cpu", enabled=False):
        layers = []
        for module in encoder.layer:
            attention = module.attention.self
            groups = (
                [attention.query, attention.key, attention.value], [module.attention.output.dense],
                [module.intermediate.dense], [module.output.dense],
            )  # fmt: skip
            layers.append(Layer(module, *(Product.of(group, dtype, fused) for group in groups)))
        return layers


def has_fused_products(dtype: torch.dtype) -> bool:
    """Whether this torch has oneDNN's products, and this CPU units for them in this precision."""
    ops = ("_linear_pointwise", "_reorder_linear_weight")
    units = {torch.bfloat16: bool(cpu_bf16_units()), torch.float32: True}
    return units.get(dtype, False) and all(hasattr(torch.ops.mkldnn, name) for name in ops)


def _pays(dtype: torch.dtype) -> bool:
    """Whether this CPU is one on which fused products are faster than torch's own, as far as that was measured."""
    return has_fused_products(dtype) and (dtype == torch.bfloat16 or cpu_is_amd_avx512())


def _forward(
    layers: Sequence[Layer], hidden_states: Tensor, attention_mask: Tensor | None = None, *_: Any, **__: Any
) -> BaseModelOutputWithPastAndCrossAttentions:
    """(R, L, H) with a mask (R, 1, L or 1, L) -> last hidden states (R, L, H), zero where there is padding."""
    rows, width, size = hidden_states.shape
    keep = _kept(attention_mask)
    x, places, runs = hidden_states.reshape(-1, size), None, [Run(rows, width)]
    with torch.autocast("cpu", enabled=False):
        if keep is not None:
            runs = [Run(len(list(group)), length) for length, group in groupby(keep.sum(1).tolist())]
            places = keep.reshape(-1).nonzero().squeeze(1)
            x = x.index_select(0, places)
        x = _encode(layers, x, runs)
        if places is not None:
            x = x.new_zeros(rows * width, size).index_copy(0, places, x)
    return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=x.view(rows, width, size))


def _kept(mask: Tensor | None) -> Tensor | None:
    """Which tokens are no padding, bool (R, L); None for all. Every token of a row may look at the same ones."""
    if mask is None:
        return None
    seen = mask[:, 0, 0]
    keep = seen if seen.dtype == torch.bool else seen == 0
    return None if bool(keep.all()) else keep


def _encode(layers: Sequence[Layer], x: Tensor, runs: Sequence[Run]) -> Tensor:
    """Packed hidden states through all layers, back in their own precision.  (T, H) -> (T, H)"""
    kind, tokens = x.dtype, len(x)
    x = x.to(layers[0].up.bias.dtype)
    if x.dtype == torch.bfloat16 or layers[0].up.packed:
        x = functional.pad(x, (0, 0, 0, -tokens % STEP))
    for layer in layers:
        module, first, second = layer.module, layer.module.attention.output, layer.module.output
        attended = _attention(layer.projections(x), module.attention.self, runs)
        x = _norm(first.LayerNorm, layer.attended.added(attended, x, _p(first.dropout)))
        inner = layer.up.activated(x, module.intermediate.intermediate_act_fn)
        x = _norm(second.LayerNorm, layer.down.added(inner, x, _p(second.dropout)))
    return x[:tokens].to(kind)


def _p(dropout: nn.Module) -> float:
    return float(dropout.p) if dropout.training else 0.0  # type: ignore[arg-type]


def _norm(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    return functional.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)


def _attention(projected: Tensor, module: Any, runs: Sequence[Run]) -> Tensor:
    """Every row attends to itself.  (T, 3 H) -> (T, H), zero after the last row"""
    heads, scale, p = module.num_attention_heads, float(module.scaling), _p(module.dropout)
    if torch.is_grad_enabled() or p:
        found: Tensor = _Attention.apply(projected, runs, heads, scale, p)  # type: ignore[no-untyped-call]
        return found
    found, start = projected.new_empty(len(projected), projected.shape[1] // 3), 0
    for run in runs:
        part = slice(start, start := start + run.rows * run.length)
        query, key, value = projected[part].view(run.rows, run.length, 3, heads, -1).permute(2, 0, 3, 1, 4)
        attended = functional.scaled_dot_product_attention(query, key, value, scale=scale)
        found[part] = attended.transpose(1, 2).reshape(run.rows * run.length, -1)
    found[start:] = 0
    return found


class _Attention(torch.autograd.Function):
    r"""$\mathrm{dropout}(\mathrm{softmax}(s\,QK^\top))\,V$ of every row, with its gradient written out: what is kept
    for it are the weights and the mask, and all rows write into one result. In float32 also where the projections are
    bf16: these products are small, of a shape for every length, and oneDNN's code for a new bf16 shape costs more."""

    @staticmethod
    def forward(ctx: Any, projected: Tensor, runs: Sequence[Run], heads: int, scale: float, p: float) -> Tensor:
        found, start = projected.new_empty(len(projected), projected.shape[1] // 3), 0
        projected = _wide(projected)
        kept: list[Tensor] = []
        for run in runs:
            part = slice(start, start := start + run.rows * run.length)
            three = _by_head(projected[part], run, 3, heads)
            query, key, value = three
            weights = functional.softmax(_scores(query, key, scale), dim=-1)
            mask = keep_mask(weights.shape, p, weights.dtype) if p else None
            _from_heads(torch.bmm(weights * mask if mask is not None else weights, value), run, heads, found[part])
            kept += [three, weights, *([mask] if mask is not None else [])]
        found[start:] = 0
        ctx.save_for_backward(*kept)
        ctx.runs, ctx.heads, ctx.scale, ctx.each = runs, heads, scale, 3 if p else 2
        return found

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None, None]:
        (gradient,) = gradients
        found, start = gradient.new_empty(len(gradient), 3 * gradient.shape[1]), 0
        gradient = _wide(gradient)
        saved = ctx.saved_tensors
        for number, run in enumerate(ctx.runs):
            part = slice(start, start := start + run.rows * run.length)
            (query, key, value), weights, *mask = saved[number * ctx.each : (number + 1) * ctx.each]
            (output,) = _by_head(gradient[part], run, 1, ctx.heads)
            used = weights * mask[0] if mask else weights
            slope = torch.bmm(output, value.transpose(1, 2))
            slope = torch._softmax_backward_data(slope.mul_(mask[0]) if mask else slope, weights, -1, weights.dtype)
            three = torch.empty((3, *query.shape), dtype=query.dtype)
            empty = query.new_empty(()).expand(query.shape)
            torch.baddbmm(empty, slope, key, beta=0, alpha=ctx.scale, out=three[0])
            torch.baddbmm(empty, slope.transpose(1, 2), query, beta=0, alpha=ctx.scale, out=three[1])
            torch.bmm(used.transpose(1, 2), output, out=three[2])
            _from_heads(three, run, ctx.heads, found[part])
        found[start:] = 0
        return found, None, None, None, None


def _wide(x: Tensor) -> Tensor:
    """bf16 as float32; everything else as it is."""
    return x.float() if x.dtype == torch.bfloat16 else x


def _scores(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """(R h, L, d) twice -> (R h, L, L)"""
    shape = (len(query), query.shape[1], query.shape[1])
    return torch.baddbmm(query.new_empty(()).expand(shape), query, key.transpose(1, 2), beta=0, alpha=scale)


def _by_head(part: Tensor, run: Run, kinds: int, heads: int) -> Tensor:
    """(R L, kinds h d) -> (kinds, R h, L, d), contiguous"""
    split = part.view(run.rows, run.length, kinds, heads, -1).permute(2, 0, 3, 1, 4)
    return split.reshape(kinds, run.rows * heads, run.length, -1)


def _from_heads(values: Tensor, run: Run, heads: int, out: Tensor) -> None:
    """(kinds, R h, L, d) into ``out`` (R L, kinds h d)"""
    split = values.view(-1, run.rows, heads, run.length, values.shape[-1]).permute(1, 3, 0, 2, 4)
    out.view(split.shape).copy_(split)
