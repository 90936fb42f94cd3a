"""Chunks side by side on a CPU: a core computes a chunk of its own instead of a part of every product of one chunk.

An encoder's operations are small, and cores that share one wait for each other at its end. Results do not depend on
it but by what a product of another number of threads rounds otherwise; their order is that of the chunks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import nn

from sparring.models.lean import is_lean

Chunk = TypeVar("Chunk")
Result = TypeVar("Result")
MOST = 8
"""Chunks at a time: each needs the memory of its hidden states."""


def over_chunks(model: nn.Module, compute: Callable[[Chunk], Result], chunks: Sequence[Chunk]) -> Iterator[Result]:
    """``map(compute, chunks)``, several at a time where ``model`` is at rest on a CPU with a forward of ours (`lean`).

    Args:
        compute: a forward of the model on one chunk; it must not change anything that chunks share.

    Raises: what ``compute`` raises, at that chunk; chunks after it are not begun.
    """
    abreast = _abreast(model, len(chunks))
    if abreast < 2:
        yield from map(compute, chunks)
        return
    on, dtype = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")

    def computed(chunk: Chunk) -> Result:  # modes of torch are each thread's own
        with torch.no_grad(), torch.autocast("cpu", dtype=dtype, enabled=on):
            return compute(chunk)

    with _threads(torch.get_num_threads() // abreast), ThreadPoolExecutor(abreast) as pool:
        yield from pool.map(computed, chunks)


def _abreast(model: nn.Module, chunks: int) -> int:
    """How many chunks at a time: a divisor of torch's threads, so that all of these have work."""
    if chunks < 2 or torch.is_grad_enabled() or model.training or not is_lean(model) or not _is_librarys(model):
        return 1
    threads = torch.get_num_threads()
    return max(number for number in range(1, MOST + 1) if threads % number == 0 and number <= chunks)


def _is_librarys(model: Any) -> bool:
    """Whether the modules around the encoder are the library's: of others it is not known what calls share."""
    return all(type(module).__module__.startswith("sentence_transformers.") for module in model.model.children())


@contextmanager
def _threads(number: int) -> Iterator[None]:
    """So many threads for each new thread's products, and for torch as a whole the old number afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
