"""Dropout and embedding look-ups that cost less in training on a CPU, for whatever model runs inside.

torch draws a dropout mask on the CPU one value after another, a third of a training step of a small BERT; and every
look-up in an embedding table makes a gradient as large as the table, one for each chunk of a batch. Both are replaced
while the mode is on: masks come from 16 random bits a value, and all chunks share one look-up of the rows they need.
The model itself stays as it is.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

LEVELS = 1 << 16
_PATTERNS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


_own = threading.local()


def alias_of(value: Tensor) -> Tensor:
    """The same numbers at the end of a graph of their own."""
    return value.detach().requires_grad_(value.requires_grad)


def training_on_cpu(
    model: nn.Module, chunks: Sequence[dict[str, Tensor]]
) -> AbstractContextManager[CpuTraining | None]:
    """The mode for a forward of these chunks when ``model`` trains on a CPU; otherwise nothing."""
    if model.training and next(model.parameters()).device.type == "cpu":
        return CpuTraining([inputs["input_ids"] for inputs in chunks])
    return nullcontext()


class CpuTraining(TorchFunctionMode):
    """Replaces ``functional``'s dropout, attention with dropout, and embedding look-ups of ``ids``.

    Args:
        ids: the token ids of every chunk that the model will read, as the very tensors that it will read.
    """

    def __init__(self, ids: Sequence[Tensor]) -> None:
        super().__init__()
        self.places: dict[int, Tensor] = {}
        self.rows: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
        """By the table's id: the table, its rows that all chunks share, and these as the chunks see them."""
        self._cut = False
        self._lock = threading.Lock()
        if len(ids) > 1 and torch.is_grad_enabled():
            self.distinct, places = torch.unique(torch.cat([chunk.reshape(-1) for chunk in ids]), return_inverse=True)
            parts = places.split([chunk.numel() for chunk in ids])
            self.places = {id(chunk): part.view(chunk.shape) for chunk, part in zip(ids, parts, strict=True)}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is functional.dropout:
            return _dropout(*args, **kwargs)
        if func is functional.embedding and id(args[0]) in self.places:
            return self._look_up(*args, **kwargs)
        if func is functional.scaled_dot_product_attention and _replaceable(**kwargs):
            return _attention(*args, **kwargs)
        return func(*args, **kwargs)

    def _look_up(self, ids: Tensor, weight: Tensor, *settings: Any, **options: Any) -> Tensor:
        """Rows of the distinct ids once, with the gradient of the whole table; rows of a chunk from those."""
        with self._lock:  # chunks may be side by side
            if id(weight) not in self.rows:
                found = functional.embedding(self.distinct, weight, *settings, **options)
                self.rows[id(weight)] = weight, found, alias_of(found) if self._cut else found
        return functional.embedding(self.places[id(ids)], self.rows[id(weight)][2])

    @contextmanager
    def cut(self) -> Iterator[None]:
        """Rows that are looked up meanwhile end the graphs of the chunks that use them."""
        self._cut = True
        try:
            yield
        finally:
            self._cut = False

    def shared(self) -> list[tuple[Tensor, Tensor]]:
        """What `cut` has cut: rows, and what stands for them in the chunks."""
        return [(value, alias) for _, value, alias in self.rows.values() if alias is not value]


@contextmanager
def masks_of(seed: int) -> Iterator[None]:
    """Masks that this thread draws meanwhile depend on the seed and on nothing that other threads do."""
    _own.seeds = np.random.default_rng(seed)
    try:
        yield
    finally:
        del _own.seeds


def keep_mask(shape: Sequence[int], p: float, dtype: torch.dtype) -> Tensor:
    """0 with probability p (rounded to 1/65536), otherwise the factor that keeps the mean 1.

    Seeded by torch's global generator, so that the same state there gives the same mask; in `masks_of`, by its seed.
    """
    dropped = round(p * LEVELS)
    own = getattr(_own, "seeds", None)
    seed = int(torch.randint(2**63 - 1, ())) if own is None else int(own.integers(2**63 - 1))
    if dropped == LEVELS:
        return torch.zeros(tuple(shape), dtype=dtype)
    count = math.prod(shape)
    bits = np.random.SFC64(seed).random_raw((count + 3) // 4).view(np.int16)[:count]
    keep, factor = bits >= np.int16(dropped - LEVELS // 2), torch.tensor(LEVELS / (LEVELS - dropped), dtype=dtype)
    pattern = factor.view(_PATTERNS[factor.element_size()]).numpy()  # NumPy has no bfloat16: its bits, or none of them
    return torch.from_numpy(np.multiply(keep, pattern)).view(dtype).view(tuple(shape))


def dropped(values: Tensor, p: float) -> Tensor:
    """Dropout with probability p; 0 is none."""
    return values * keep_mask(values.shape, p, values.dtype) if p else values


def _dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    if not training or p == 0:
        return input
    return input.mul_(keep_mask(input.shape, p, input.dtype)) if inplace else dropped(input, p)


def _replaceable(
    attn_mask: Tensor | None = None, dropout_p: float = 0.0, is_causal: bool = False, enable_gqa: bool = False, **_: Any
) -> bool:
    """Attention as encoders call it; without dropout torch has a faster kernel."""
    return dropout_p > 0 and not is_causal and not enable_gqa and (attn_mask is None or attn_mask.dtype == torch.bool)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
    **_: Any,
) -> Tensor:
    """``functional.scaled_dot_product_attention`` with dropout; ``attn_mask`` is True where a token may look.

    A row that may look nowhere looks everywhere (torch gives 0 there); padded batches have no such row.
    """
    scores = (query * (query.shape[-1] ** -0.5 if scale is None else scale)) @ key.transpose(-2, -1)
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, torch.finfo(scores.dtype).min)
    weights = functional.softmax(scores, dim=-1)
    return (weights * keep_mask(weights.shape, dropout_p, weights.dtype)) @ value
