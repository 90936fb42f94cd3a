"""Encoders on a GPU without padding: the tokens of a chunk one after another, through torch's own flash attention.

While the mode is on (`sparring.models.lean.lean_encoders`), an encoder's layers get the real tokens of a chunk as one
row, and attention is told where each text begins. Layers, embeddings, pooling and heads stay the library's. In bf16 and
fp16 only, as flash attention is. Before its first use in a process, attention is compared with the padded one on the
GPU at hand; where they do not agree, padding stays. The log says which.
"""

from __future__ import annotations

import logging
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

from sparring.models.memory import out_of_memory

logger = logging.getLogger("sparring")

NAME = "sparring_packed"
HALF = (torch.bfloat16, torch.float16)
DIM, CAPABILITY = 256, (8, 0)
"""The largest head, and the least compute capability, of flash attention."""
TOLERANCE = 0.02
"""Of attention in half precision: the largest difference from float32, of the largest value."""

_own = threading.local()


@dataclass(frozen=True)
class Rows:
    """Where the tokens of a chunk are. On the CPU, so that packing need not ask the GPU.

    Attributes:
        places: int64 (T,), the real tokens among all R * L.
        starts: int32 (R + 1,), the first of each text among the real ones, and T.
        longest: tokens of the longest text.
    """

    places: Tensor
    starts: Tensor
    longest: int

    @classmethod
    def of(cls, mask: Tensor) -> Rows:
        """Of an attention mask (R, L)."""
        lengths = mask.sum(1)
        starts = functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
        return cls(mask.reshape(-1).nonzero().squeeze(1), starts, int(lengths.max()))


@contextmanager
def rows_of(mask: Tensor, device: torch.device) -> Iterator[None]:
    """The chunk that is computed meanwhile on a device, by its attention mask (R, L) on the CPU."""
    _own.mask = mask if _packs(device) else None
    try:
        yield
    finally:
        _own.mask = None


def _packs(device: torch.device) -> bool:
    return device.type == "cuda"


def obstacle(module: Any, dtype: torch.dtype) -> str:
    """Why an encoder on a GPU is not packed in this compute precision; "" where it is."""
    device, attention = next(module.parameters()).device, module.layer[0].attention.self
    if any(layer.attention.self.config is not module.config for layer in module.layer):
        return "its layers have configurations of their own"
    if any(getattr(child, "gradient_checkpointing", False) for child in module.modules()):
        return "gradient checkpointing runs its layers again, elsewhere"
    if dtype not in HALF:
        return f"flash attention does not compute in {str(dtype).removeprefix('torch.')}"
    if attention.attention_head_size > DIM or attention.attention_head_size % 8:
        return f"flash attention has no heads of {attention.attention_head_size} dimensions"
    return _unproven(device, dtype, attention.num_attention_heads, attention.attention_head_size)


class Packed:
    """What replaces the forward of an encoder: the same one, on packed hidden states."""

    def __init__(self, module: Any) -> None:
        self.module, self.forward = module, module.forward

    def __call__(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, *args: Any, **options: Any
    ) -> BaseModelOutputWithPastAndCrossAttentions:
        """(R, L, H) of the chunk that `rows_of` knows -> last hidden states (R, L, H), zero where there is padding."""
        mask: Tensor | None = getattr(_own, "mask", None)
        if mask is None or hidden_states.shape[:2] != mask.shape:  # not one of our chunks
            own: BaseModelOutputWithPastAndCrossAttentions = self.forward(
                hidden_states, attention_mask, *args, **options
            )
            return own
        rows, device, flat = Rows.of(mask), hidden_states.device, hidden_states.flatten(0, 1)
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
    """Why `flash` is not used on this device; "" where its values, gradients and dropout are as they should be.

    Raises: whatever says that memory does not suffice, which says nothing about attention.
    """
    reason = _refusal(device, dtype, heads, dim)
    name = str(dtype).removeprefix("torch.")
    logger.info("attention without padding on %s in %s: %s", device, name, reason or "used; it agrees with the padded")
    return reason


def _refusal(device: torch.device, dtype: torch.dtype, heads: int, dim: int) -> str:
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < CAPABILITY:
        return "this GPU has no flash attention"
    devices = [device] if device.type == "cuda" else []
    try:
        with (
            torch.random.fork_rng(devices=devices), torch.inference_mode(False), torch.enable_grad(),
            torch.autocast(device.type, enabled=False),
        ):  # fmt: skip
            apart = _apart(device, dtype, heads, dim)
    except Exception as error:  # whatever it is, there is another way
        if out_of_memory(error):
            raise
        return f"flash attention failed: {(str(error) or type(error).__name__).splitlines()[0]}"
    return "" if apart <= TOLERANCE else f"flash attention is {apart:.2g} from the padded one, relatively"


def _apart(device: torch.device, dtype: torch.dtype, heads: int, dim: int) -> float:
    """How far `flash` is from what it should be, relatively; nan where anything is.

    The largest difference of values and gradients from attention in float32, text by text, of the largest value of all
    texts. With dropout: of the mean, over ten; and of what the gradient says of the output, which is linear in the
    values as long as the mask is the same forward and backward.
    """
    lengths, scale, draws = [70, 1, 300, 33, 128], dim**-0.5, torch.Generator().manual_seed(0)
    edges = [sum(lengths[:n]) for n in range(len(lengths) + 1)]
    *inputs, slope = torch.randn(4, edges[-1], heads, dim, generator=draws).to(device, dtype)
    starts = torch.tensor(edges, dtype=torch.int32, device=device)

    def gradients(given: list[Tensor], attended: Callable[..., Tensor]) -> list[Tensor]:
        given = [x.detach().clone().requires_grad_() for x in given]
        found = attended(*given)
        return [x.detach().float() for x in (found, *torch.autograd.grad(found, given, slope.to(found.dtype)))]

    def packed(query: Tensor, key: Tensor, value: Tensor, dropout: float = 0.0) -> Tensor:
        return flash(query, key, value, starts, max(lengths), dropout, scale)

    def padded(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        rows = []
        for three in zip(*(x.transpose(0, 1).split(lengths, dim=1) for x in (query, key, value)), strict=True):
            q, k, v = three
            rows.append(functional.scaled_dot_product_attention(q, k, v, scale=scale))
        return torch.cat(rows, dim=1).transpose(0, 1)

    own, right = gradients(inputs, packed), gradients([x.float() for x in inputs], padded)
    apart = [(a - b).abs().max() / b.abs().max() for a, b in zip(own, right, strict=True)]

    query, key, value = (x.detach().clone().requires_grad_() for x in inputs)
    dropped = packed(query, key, value, 0.5)
    slopes = torch.autograd.grad(dropped, (query, key, value), dropped.detach())
    length = dropped.detach().double().square().sum()
    apart.append((length - (value.detach().double() * slopes[2].double()).sum()).abs() / length)
    apart += [x.float().abs().max() * 0 for x in slopes]  # nan, or infinity, if that is in them
    ones = packed(query.detach(), key.detach(), torch.ones_like(slopes[2]), 0.5).float()
    apart.append((ones.mean() - 1).abs() / 10)
    apart.append(torch.where(ones.std() > 0, 0.0, torch.inf))  # it drops something
    return float(torch.stack([x.cpu().double() for x in apart]).max())
