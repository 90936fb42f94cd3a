"""Chunks side by side on a CPU: a core computes a chunk of its own instead of a part of every product of one chunk.

An encoder's operations are small, and cores that share one wait for each other at its end. Results, in the order of
the chunks, are others only by rounding (products by another number of threads, gradients added in another order), and
the same every time.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from sparring.models.cpu import CpuTraining, masks_of
from sparring.models.lean import cut, is_lean

Chunk = TypeVar("Chunk")
Result = TypeVar("Result")
MOST = 8
"""Chunks at a time: each needs the memory of its hidden states."""
MOST_TRAINED = 2
"""Chunks at a time in training: each needs the memory of a gradient of all weights."""


def over_chunks(model: nn.Module, compute: Callable[[Chunk], Result], chunks: Sequence[Chunk]) -> Iterator[Result]:
    """``map(compute, chunks)``, several at a time where ``model`` is at rest on a CPU with a forward of ours (`lean`).

    Args:
        compute: a forward of the model on one chunk; it must not change anything that chunks share.

    Raises: what ``compute`` raises, at that chunk; chunks after it are not begun.
    """
    at_rest = not torch.is_grad_enabled() and not model.training
    abreast = _abreast(model, len(chunks), MOST) if at_rest else 1
    if abreast < 2:
        yield from map(compute, chunks)
        return
    yield from side_by_side(compute, chunks, abreast)


def joined(
    model: nn.Module, compute: Callable[[Chunk], Tensor], chunks: Sequence[Chunk], training: CpuTraining | None
) -> Tensor:
    """``torch.cat(list(map(compute, chunks)))`` with its gradient, several chunks at a time forward and backward where
    ``model`` trains on a CPU with a forward of ours; at rest, as `over_chunks`. Every chunk's dropout comes from one
    number that torch's generator draws, so that a chunk alone, without or with a gradient, has it too.

    Args:
        training: the mode that is on, if it is.

    Raises: what ``compute`` raises; in a second backward through chunks that were side by side, RuntimeError.
    """
    if training is None or not is_lean(model):
        return torch.cat(list(over_chunks(model, compute, chunks)))
    seeds = torch.randint(2**63 - 1, (len(chunks),)).tolist()

    def one(number: int) -> Tensor:
        with masks_of(seeds[number]):
            return compute(chunks[number])

    abreast = _abreast(model, len(chunks), MOST_TRAINED) if _may_cut(model) else 1
    if abreast < 2:
        return torch.cat([one(number) for number in range(len(chunks))])
    failed = threading.Event()

    def share(first: int) -> list[Tensor]:
        found = []
        for number in range(first, len(chunks), abreast):
            if failed.is_set():  # elsewhere: no more memory is asked for
                break
            try:
                with training:
                    found.append(one(number))
            except BaseException:
                failed.set()
                raise
        return found

    with cut(model) as made, training.cut():
        shares = list(side_by_side(share, range(abreast), abreast))
    outputs = [shares[number % abreast][number // abreast] for number in range(len(chunks))]
    if not all(output.requires_grad for output in outputs):
        return torch.cat(outputs)
    shared = [*made, *training.shared()]
    own = [p for p in model.parameters() if p.requires_grad]
    graphs = _Graphs(outputs, [*own, *(alias for _, alias in shared)], abreast)
    joint: Tensor = _Joined.apply(graphs, *own, *(value for value, _ in shared))  # type: ignore[no-untyped-call]
    return joint


def _may_cut(model: nn.Module) -> bool:
    """Whether a gradient is wanted that may come in parts: a hook on a weight expects it whole, and once."""
    return torch.is_grad_enabled() and not any(p._backward_hooks for p in model.parameters())


class _Graphs:
    """Outputs of chunks, each with a graph of its own that ends at ``inputs``: weights, and what stands for shared
    values."""

    def __init__(self, outputs: list[Tensor], inputs: list[Tensor], abreast: int) -> None:
        self.outputs, self.inputs, self.abreast = outputs, inputs, abreast


class _Joined(torch.autograd.Function):
    """The outputs one after another. Forward and backward, a thread has every n-th chunk, for the engine adds gradients
    in the order in which a thread made their graphs."""

    @staticmethod
    def forward(ctx: Any, graphs: _Graphs, *_: Tensor) -> Tensor:
        ctx.graphs = graphs
        return torch.cat([output.detach() for output in graphs.outputs])

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        graphs: _Graphs = ctx.graphs
        outputs, graphs.outputs = graphs.outputs, []
        if not outputs:
            raise RuntimeError("a gradient was carried through these chunks before: their graphs are gone")
        parts = gradients[0].split([len(output) for output in outputs])

        def carried(first: int) -> list[Tensor | None]:
            own = slice(first, None, graphs.abreast)
            return list(torch.autograd.grad(outputs[own], graphs.inputs, parts[own], allow_unused=True))

        total, *others = side_by_side(carried, range(graphs.abreast), graphs.abreast)
        for other in others:
            for place, gradient in enumerate(other):
                before, other[place] = total[place], None  # a gradient's memory goes as it is added
                total[place] = gradient if before is None else before if gradient is None else before + gradient
        return None, *total


def side_by_side(
    compute: Callable[[Chunk], Result], chunks: Sequence[Chunk], abreast: int
) -> Generator[Result, None, None]:
    """``map(compute, chunks)``, so many at a time, each with its part of the threads; modes of torch go with them."""
    on, dtype = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")
    gradients = torch.is_grad_enabled()

    def computed(chunk: Chunk) -> Result:  # modes of torch are each thread's own
        cast = torch.autocast("cpu", dtype=dtype, enabled=on, cache_enabled=False)
        with torch.set_grad_enabled(gradients), cast:
            return compute(chunk)

    with _threads(torch.get_num_threads() // abreast), ThreadPoolExecutor(abreast) as pool:
        yield from pool.map(computed, chunks)


def _abreast(model: nn.Module, chunks: int, most: int) -> int:
    """How many chunks of this model at a time."""
    if chunks < 2 or not is_lean(model) or not _is_librarys(model):
        return 1
    return at_a_time(chunks, most)


def at_a_time(chunks: int, most: int) -> int:
    """How many of the chunks side by side: a divisor of torch's threads, so that all of these have work."""
    threads = torch.get_num_threads()
    return max(number for number in range(1, most + 1) if threads % number == 0 and number <= chunks)


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
