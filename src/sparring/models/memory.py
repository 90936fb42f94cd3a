"""Too little memory: how it is told from other errors, and the same work done in smaller pieces."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch

from sparring.log import release_memory
from sparring.types import InputError

logger = logging.getLogger("sparring")

T = TypeVar("T")

SMALLEST = 64
"""The least padded tokens of a chunk: halving ends here. Also the least value of the settings."""

_SIGNS = (
    "can't allocate memory", "not enough memory", "out of memory", "Cannot allocate memory", "std::bad_alloc",
    "CUBLAS_STATUS_ALLOC_FAILED",
)  # fmt: skip


class TooLittleMemory(InputError):
    """Memory does not suffice even for the smallest pieces of a batch."""


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory could not be had: Python's, the GPU's, or that of torch's CPU allocator."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS)


def forget(error: BaseException) -> str:
    """Let go of everything that a failed attempt held, its traceback's tensors included. -> the error's first line"""
    text = (str(error) or type(error).__name__).splitlines()[0]
    error.__traceback__ = error.__context__ = error.__cause__ = None
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    release_memory()
    return text


@dataclass(frozen=True)
class Pieces:
    """In which pieces a batch is worked through. The gradient is the whole batch's in all of them.

    Attributes:
        tokens: padded tokens of a chunk.
        accumulate: micro-batches.
        gradient_cache: whether only one chunk's activations are held.
    """

    tokens: int
    accumulate: int
    gradient_cache: bool

    def smaller(self, joins_queries: bool, share: int) -> Pieces | None:
        """The next smaller ones, or None: half the tokens, and twice the micro-batches up to one query each; where
        these cannot be (in-batch negatives, or one query each already), gradient caching.

        Args:
            joins_queries: the step's own.
            share: queries of this process.
        """
        tokens = max(SMALLEST, self.tokens // 2)
        if joins_queries or self.accumulate >= share:
            found = Pieces(tokens, self.accumulate, True)
        else:
            found = Pieces(tokens, min(2 * self.accumulate, share), self.gradient_cache)
        return None if found == self else found

    def at_most(self, other: Pieces) -> Pieces:
        """The smaller of both in each respect."""
        cached = self.gradient_cache or other.gradient_cache
        return Pieces(min(self.tokens, other.tokens), max(self.accumulate, other.accumulate), cached)


@contextmanager
def enough_memory() -> Iterator[None]:
    """Turn what is left of memory errors into one message."""
    try:
        yield
    except Exception as error:
        if not out_of_memory(error):
            raise
        raise TooLittleMemory(
            "too little memory", where="outside of what can be made smaller", got=forget(error),
            fix="free memory, then run the same command again: it goes on from what is finished",
        ) from None  # fmt: skip


class Budget:
    """Padded tokens of one forward without gradient, halved for good whenever memory does not suffice.

    Args:
        tokens: the budget to begin with.
        work: what is done with it, for the log.
        setting: the setting that says it.
        halves: False where other processes would have to halve it too: too little memory is an error then.
    """

    def __init__(self, tokens: int, work: str, setting: str = "run.encode_tokens", *, halves: bool = True) -> None:
        self.tokens, self.work, self.setting, self.halves = tokens, work, setting, halves

    def run(self, call: Callable[[int], T]) -> T:
        """``call`` with the budget, again with half of it as long as memory does not suffice.

        Raises: TooLittleMemory at the smallest budget.
        """
        while True:
            try:
                return call(self.tokens)
            except Exception as error:
                if not out_of_memory(error):
                    raise
                text = forget(error)
            if self.tokens <= SMALLEST or not self.halves:
                raise TooLittleMemory(
                    f"too little memory: {self.work}", where=self.setting,
                    got=f"{text}, at {self.tokens} tokens a forward",
                    fix="free memory or shorten the inputs (max_length), then run the same command again",
                )  # fmt: skip
            half = max(SMALLEST, self.tokens // 2)
            logger.warning(
                "%s: too little memory (%s): from here on %d padded tokens a forward instead of %d",
                self.work, text, half, self.tokens,
            )  # fmt: skip
            self.tokens = half
