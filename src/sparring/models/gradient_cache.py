"""Gradient caching (Gao et al. 2021): a batch of any size in the memory of one chunk, for one more forward.

The outputs are computed chunk by chunk without a graph; the loss is differentiated down to them; each chunk is then run
again, with the random state that it had, to carry its share of that gradient to the weights. The gradient is that of
the whole batch, dropout included.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sparring.models.batching import Batches

Call = Callable[[nn.Module, Batches], Tensor]
"""How a model is run on batches; its result has one row for each row of the batches."""


@dataclass(frozen=True)
class CachedForward:
    """One forward without a graph: its inputs in chunks, the random state before each, and its outputs.

    Attributes:
        outputs: a leaf [N, ...] in row order; after the loss's backward it holds the gradient that `replay` carries on.
    """

    model: nn.Module
    call: Call
    dtype: torch.dtype | None
    chunks: list[Batches]
    states: list[tuple[Tensor, Tensor | None]]
    restore: Tensor
    outputs: Tensor

    @classmethod
    def run(cls, model: nn.Module, call: Call, batches: Batches, dtype: torch.dtype | None) -> CachedForward:
        """Compute the outputs without a graph, under autocast to ``dtype`` (None: none)."""
        device = next(model.parameters()).device
        chunks = [_one_chunk(inputs) for inputs in batches.inputs]
        states, parts = [], []
        for chunk in chunks:
            states.append(_random_state(device))
            with torch.no_grad(), torch.autocast(device.type, dtype, enabled=dtype is not None):
                parts.append(call(model, chunk))
        restore = batches.restore.to(device)
        return cls(model, call, dtype, chunks, states, restore, torch.cat(parts)[restore].requires_grad_())

    def replay(self) -> None:
        """Run every chunk again and add its gradient to the weights."""
        assert self.outputs.grad is not None, "a cached output took no part in the loss"
        rows = sum(len(chunk) for chunk in self.chunks)  # more than outputs where `sharding.level` added chunks
        gradient = self.outputs.grad.new_zeros((rows, *self.outputs.grad.shape[1:]))
        gradient[self.restore] = self.outputs.grad
        device, start = self.restore.device, 0
        for chunk, state in zip(self.chunks, self.states, strict=True):
            with _random_state_of(device, state):
                with torch.autocast(device.type, self.dtype, enabled=self.dtype is not None):
                    output = self.call(self.model, chunk)
                output.backward(gradient[start : start + len(output)])
            start += len(output)


def _one_chunk(inputs: dict[str, Tensor]) -> Batches:
    rows, length = inputs["input_ids"].shape
    return Batches([inputs], torch.arange(rows), tokens=int(inputs["attention_mask"].sum()), padded=rows * length)


def _random_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


@contextmanager
def _random_state_of(device: torch.device, state: tuple[Tensor, Tensor | None]) -> Iterator[None]:
    cpu, gpu = state
    with torch.random.fork_rng(devices=[device] if gpu is not None else []):
        torch.set_rng_state(cpu)
        if gpu is not None:
            torch.cuda.set_rng_state(gpu, device)
        yield
