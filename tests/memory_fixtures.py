"""An allocator that refuses what is larger than a limit, in place of a machine with little memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from sparring.models import Ranker, Retriever

ERRORS: tuple[Callable[[], Exception], ...] = (
    lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    MemoryError,
    lambda: RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: 4096 bytes"),
)
"""How Python, a GPU and torch's CPU allocator say it."""


class Allocator:
    """Counts the padded tokens that are held, and refuses those above ``limit``.

    A forward without gradient holds one chunk; one with gradient holds all its chunks until ``freed``.

    Attributes:
        refused: how often it did.
    """

    def __init__(self, limit: int, error: Callable[[], Exception] = MemoryError) -> None:
        self.limit, self.error, self.held, self.refused = limit, error, 0, 0

    def take(self, inputs: dict[str, torch.Tensor]) -> None:
        """Memory for one chunk's forward."""
        tokens = inputs["input_ids"].numel()
        if self.held + tokens > self.limit:
            self.refused += 1
            self.held = 0
            raise self.error()
        self.held += tokens if torch.is_grad_enabled() else 0

    def freed(self) -> None:
        """A backward let go of everything."""
        self.held = 0


@contextmanager
def little_memory(allocator: Allocator) -> Iterator[None]:
    """Every chunk of both models asks the allocator."""

    def asking(real: Callable[..., Any]) -> Callable[..., Any]:
        def forward(self: Any, inputs: dict[str, torch.Tensor], *rest: Any) -> Any:
            allocator.take(inputs)
            return real(self, inputs, *rest)

        return forward

    real = torch.Tensor.backward

    def backward(self: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        real(self, *args, **kwargs)
        allocator.freed()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Retriever, "embed", asking(Retriever.embed))
        patch.setattr(Ranker, "logits", asking(Ranker.logits))
        patch.setattr(torch.Tensor, "backward", backward)
        yield
