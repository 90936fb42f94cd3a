"""Supervised losses on hard labels: the listwise cross-entropy of a ranker and the in-batch loss of a retriever."""

from __future__ import annotations

import torch
from torch import Tensor

from sparring.losses.terms import denominator, widen


def list_softmax(scores: Tensor, valid: Tensor | None = None, queries: int | None = None) -> Tensor:
    r"""Listwise cross-entropy on column 0, mean over queries.

    $L = -\frac1B \sum_q \log\frac{\exp s_{q0}}{\sum_{i<n} \exp s_{qi}}$: AR2's ranker step (AR2 Eq. 7, minimised here
    because the paper maximises the log-likelihood), RocketQAv2's supervised term (RocketQAv2 Eq. 5), D0 of the warm up.

    Args:
        scores: [B, n], column 0 the positive.
        valid: bool [B, n], False where a list has no passage; column 0 must be True. None: all are valid.
        queries: what the mean divides by; default B.

    Returns:
        [] in float32 at least; its gradient reaches all valid scores.

    Raises:
        ValueError: ``valid`` marks a positive as missing.
    """
    scores = widen(scores)
    if valid is not None:
        if not bool(valid[:, 0].all()):
            raise ValueError("column 0 holds the positive of each list: expected valid[:, 0] all True, got a False")
        scores = scores.masked_fill(~valid, float("-inf"))
    return -scores.log_softmax(dim=1)[:, 0].sum() / denominator(scores, queries)


def in_batch(scores: Tensor, positive: Tensor, masked: Tensor, queries: int | None = None) -> Tensor:
    r"""Cross-entropy of each query's positive among all passages of the batch, mean over queries.

    $L = -\frac1B \sum_q \log\frac{\exp s_{q,d^+}}{\sum_{j \notin \mathrm{masked}_q} \exp s_{qj}}$: DPR's in-batch loss,
    and RocketQA's cross-batch one (its step 1) when the P passages were gathered across processes.

    Args:
        scores: [B, P], each query against every passage at hand.
        positive: int64 [B], the column of each query's labelled positive (offset by process when gathered).
        masked: bool [B, P], columns to leave out (see `known_positive_mask`). The labelled column is never left out.
        queries: what the mean divides by; default B.

    Returns:
        [] in float32 at least; masked scores get a zero gradient.
    """
    scores, labelled = widen(scores), positive[:, None]
    masked = masked.scatter(1, labelled, False)
    log_p = scores.masked_fill(masked, float("-inf")).log_softmax(dim=1)
    return -log_p.gather(1, labelled).sum() / denominator(scores, queries)


def known_positive_mask(groups: Tensor, positive_groups: Tensor, positive: Tensor) -> Tensor:
    """The columns of an in-batch score matrix that are no negatives of their query.

    Passages with the same group have the same normalised text. A column is masked for a query when it

    - belongs to a group of one of the query's known positives, or to the labelled column's group;
    - repeats the group of an earlier column: one text counts once in a denominator, however often the batch holds it;
    - is padding (group -1).

    The labelled column itself is never masked.

    Args:
        groups: int64 [P], the group of each column's passage; -1 marks padding.
        positive_groups: int64 [B, K], the groups of each query's known positives, padded with -1.
        positive: int64 [B], the labelled column of each query.

    Returns:
        bool [B, P], True where the column is to be left out.
    """
    columns = torch.arange(len(groups), device=groups.device)
    distinct, inverse = torch.unique(groups, return_inverse=True)
    first = torch.full_like(distinct, len(groups)).scatter_reduce(0, inverse, columns, "amin")
    never = (first[inverse] != columns) | (groups < 0)
    masked = never | (groups == groups[positive][:, None])
    for known in positive_groups.unbind(dim=1):
        masked = masked | (groups == known[:, None])
    return masked.scatter(1, positive[:, None], False)
