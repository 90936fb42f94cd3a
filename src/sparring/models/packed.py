"""Encoders on a GPU without padding: the tokens of a chunk one after another, through torch's own flash attention.

While the mode is on (`sparring.models.lean.lean_encoders`), an encoder's layers get the real tokens of a chunk as one
row, and attention is told where each text begins. Layers, embeddings, pooling and heads stay the library's. In bf16 and
fp16 only, as flash attention is. Before its first use, attention is compared with the padded one on the GPU at hand;
where they do not agree, padding stays, and the log says so.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

NAME = "sparring_packed"
HALF = (torch.bfloat16, torch.float16)
DIM, CAPABILITY = 256, (8, 0)
"""The largest head, and the least compute capability, of flash attention."""
TOLERANCE = 0.02
"""Of attention in half precision: the largest difference from float32, of the largest value."""

_own = threading.local()


@dataclass(frozen=True)
class Rows:
    """Where the tokens of a chunk are. On the CPU, so that the GPU need not be asked.

    Attributes:
        shape: rows and their padded length, R and L.
        places: int64 (T,), the real tokens among all R * L.
        starts: int32 (R + 1,), the first of each text among the real ones, and T.
        longest: tokens of the longest text.
    """

    shape: tuple[int, int]
    places: Tensor
    starts: Tensor
    longest: int

    @classmethod
    def of(cls, mask: Tensor) -> Rows:
        """Of an attention mask (R, L)."""
        lengths = mask.sum(1)
        starts = functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
        return cls((mask.shape[0], mask.shape[1]), mask.reshape(-1).nonzero().squeeze(1), starts, int(lengths.max()))


@contextmanager
def rows_of(mask: Tensor, device: torch.device) -> Iterator[None]:
    """The chunk that is computed meanwhile on a device, by its attention mask (R, L) on the CPU."""
    _own.rows = Rows.of(mask) if _packs(device) else None
    try:
        yield
    finally:
        _own.rows = None


def _packs(device: torch.device) -> bool:
    return device.type == "cuda"


def packed_forward(module: Any) -> Callable[..., Any]:
    """What replaces the forward of an encoder: the same one, on packed hidden states."""
    return _Packed(module, module.forward)


def obstacle(module: Any, dtype: torch.dtype) -> str:
    """Why an encoder on a GPU is not packed in this compute precision; "" where it is."""
    device, attention = next(module.parameters()).device, module.layer[0].attention.self
    if any(getattr(child, "gradient_checkpointing", False) for child in module.modules()):
        return "gradient checkpointing runs its layers again, elsewhere"
    if dtype not in HALF:
        return f"flash attention does not compute in {str(dtype).removeprefix('torch.')}"
    if attention.attention_head_size > DIM or attention.attention_head_size % 8:
        return f"flash attention has no heads of {attention.attention_head_size} dimensions"
    return _unproven(device, dtype, attention.num_attention_heads, attention.attention_head_size)


class _Packed:
    """An encoder's forward without padding.

    Args:
        module: the encoder.
        forward: its own forward.
    """

    def __init__(self, module: Any, forward: Callable[..., Any]) -> None:
        self.module, self.forward = module, forward

    def __call__(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, *args: Any, **options: Any
    ) -> BaseModelOutputWithPastAndCrossAttentions:
        """(R, L, H) of the chunk that `rows_of` knows -> last hidden states (R, L, H), zero where there is padding."""
        rows: Rows | None = getattr(_own, "rows", None)
        if rows is None or hidden_states.shape[:2] != rows.shape:  # not one of our chunks
            own: BaseModelOutputWithPastAndCrossAttentions = self.forward(
                hidden_states, attention_mask, *args, **options
            )
            return own
        device, flat = hidden_states.device, hidden_states.flatten(0, 1)
        places, starts = (x.to(device, non_blocking=True) for x in (rows.places, rows.starts))
        with _attention_of(self.module, NAME):
            found = self.forward(
                flat.index_select(0, places)[None], None, packed_starts=starts, packed_longest=rows.longest
            ).last_hidden_state[0]
        whole = found.new_zeros(flat.shape).index_copy(0, places, found)
        return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=whole.view(hidden_states.shape))


@contextmanager
def _attention_of(module: nn.Module, name: str) -> Iterator[None]:
    """The attention of an encoder's layers by its name in the library; the one before comes back."""
    config: Any = module.config
    before = config._attn_implementation
    config._attn_implementation = name
    try:
        yield
    finally:
        config._attn_implementation = before


def _attend(
    _module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    _mask: Tensor | None,
    *,
    packed_starts: Tensor,
    packed_longest: int,
    dropout: float = 0.0,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """The library's interface: (1, h, T, d) three times -> (1, T, h, d)."""
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    return flash(q, k, v, packed_starts, packed_longest, dropout, scaling)[None], None


AttentionInterface.register(NAME, _attend)


def flash(
    query: Tensor, key: Tensor, value: Tensor, starts: Tensor, longest: int, dropout: float, scale: float | None
) -> Tensor:
    """Attention of each text to itself, by the operator that `torch.nn.attention.varlen` calls, which has no dropout.

    Args:
        query, key, value: (T, h, d), half precision, of all texts one after another.
        starts: int32 (R + 1,), first token of each text, and T.
        longest: tokens of the longest text.
        dropout: its probability.
        scale: of the scores.

    Returns: (T, h, d)
    """
    found: Tensor = torch.ops.aten._flash_attention_forward(
        query, key, value, starts, starts, longest, longest, dropout, False, False, scale=scale
    )[0]
    return found


@cache
def _unproven(device: torch.device, dtype: torch.dtype, heads: int, dim: int) -> str:
    """Why `flash` is not used on this device; "" where its values, gradients and dropout are as they should be."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < CAPABILITY:
        return "this GPU has no flash attention"
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.enable_grad():
            apart = _apart(device, dtype, heads, dim)
    except (RuntimeError, NotImplementedError, AttributeError) as error:
        return f"flash attention failed: {(str(error) or type(error).__name__).splitlines()[0]}"
    return "" if apart <= TOLERANCE else f"flash attention is {apart:.2g} from the padded one, relatively"


def _apart(device: torch.device, dtype: torch.dtype, heads: int, dim: int) -> float:
    """The largest relative difference of values and gradients from float32 attention, row by row; inf where dropout
    does not keep the mean."""
    lengths, scale, draws = [70, 1, 33, 128], dim**-0.5, torch.Generator().manual_seed(0)
    edges = [sum(lengths[:n]) for n in range(len(lengths) + 1)]
    values = torch.randn(4, edges[-1], heads, dim, generator=draws).to(device, dtype)
    starts = torch.tensor(edges, dtype=torch.int32, device=device)

    def gradients(inputs: list[Tensor], attended: Callable[..., Tensor]) -> list[Tensor]:
        found = attended(*inputs)
        slope = values[3].to(found.dtype)
        return [x.detach().float() for x in (found, *torch.autograd.grad(found, inputs, slope))]

    def packed(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return flash(query, key, value, starts, max(lengths), 0.0, scale)

    def padded(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        rows = []
        for three in zip(*(x.transpose(0, 1).split(lengths, dim=1) for x in (query, key, value)), strict=True):
            q, k, v = three
            rows.append(functional.scaled_dot_product_attention(q, k, v, scale=scale))
        return torch.cat(rows, dim=1).transpose(0, 1)

    own = gradients([x.detach().clone().requires_grad_() for x in values[:3]], packed)
    right = gradients([x.detach().float().requires_grad_() for x in values[:3]], padded)
    ones = flash(values[0], values[1], torch.ones_like(values[2]), starts, max(lengths), 0.5, scale).float()
    if not 0.8 < float(ones.mean()) < 1.2 or not float(ones.std()) > 0:
        return float("inf")
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(own, right, strict=True))
