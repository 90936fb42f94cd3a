"""What every loss shares: its result, its precision and its denominator.

A loss takes scores of shape [B, n]: B queries, n passages in each candidate list, column 0 the labelled positive.
A mean over queries divides by ``queries``, the number of queries in the whole optimiser batch (all micro-batches, all
processes). So the losses of the parts add up to the loss of the whole, and so do their gradients.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Terms(NamedTuple):
    """A loss to minimise and the terms that it is made of.

    Attributes:
        total: [] the value to call ``backward`` on.
        parts: name -> [] detached, each before its weight; for the log.
    """

    total: Tensor
    parts: dict[str, Tensor]


def widen(scores: Tensor) -> Tensor:
    """Scores in float32 at least; float64 stays float64. Any shape.

    Raw inner products reach the hundreds, where bfloat16 has a step of 1 to 4: a softmax of such scores is taken in
    float32, inside autocast too (nothing in this package calls an operation that autocast narrows).
    """
    return scores if scores.dtype == torch.float64 else scores.float()


def denominator(scores: Tensor, queries: int | None) -> int:
    """The number that a mean over queries divides by: ``queries``, or B = ``len(scores)`` when it is None.

    Raises:
        ValueError: it is below 1, so a mean over queries does not exist.
    """
    count = scores.shape[0] if queries is None else queries
    if count < 1:
        raise ValueError(f"a mean over queries needs at least one query: expected queries >= 1, got {count}")
    return count


def widen_pair(retriever: Tensor, ranker: Tensor) -> tuple[Tensor, Tensor]:
    """Both models' scores of the same candidate lists, [B, n] each, checked and in float32 at least.

    Raises:
        ValueError: the shapes differ, are not [B, n], or leave no negative beside column 0.
    """
    if retriever.shape != ranker.shape or retriever.dim() != 2 or retriever.shape[1] < 2:
        raise ValueError(
            "retriever and ranker must score the same candidate lists: expected two tensors [B, n] with n >= 2, "
            f"got {list(retriever.shape)} and {list(ranker.shape)}"
        )
    return widen(retriever), widen(ranker)
