r"""Duet: both models trained for the sum of their scores, $s_{ce} + w\,s_{de}$. Sparring's own, from no paper.

A sum of logits is a product of experts (Hinton 2002): a passage has to convince both. Training one expert beside the
other at rest, so that it learns what the other lacks, is how CLEAR trains a retriever beside BM25 (Gao et al., ECIR
2021); here it is the ranker beside its retriever.
"""

from __future__ import annotations

from torch import Tensor

from sparring.losses.contrastive import in_batch, list_softmax
from sparring.losses.distillation import kl
from sparring.losses.terms import Terms, widen_pair


def complement(retriever: Tensor, ranker: Tensor, *, fusion: float, queries: int | None = None) -> Terms:
    r"""The ranker's step: $-\frac1B \sum_q \log \mathrm{softmax}(s_{ce} + w\,\bar s_{de})_{q0}$, no gradient to the
    retriever.

    Args:
        retriever: [B, n] scores s_de, column 0 the positive.
        ranker: [B, n] scores s_ce of the same lists.
        fusion: w, the retriever's weight; 0 is `list_softmax` of the ranker.
        queries: what the mean divides by; default B.

    Returns: Terms with the part ``complement``.
    """
    retriever, ranker = widen_pair(retriever, ranker)
    loss = list_softmax(ranker + fusion * retriever.detach(), queries=queries)
    return Terms(loss, {"complement": loss.detach()})


def follow(
    everyone: Tensor,
    positive: Tensor,
    masked: Tensor,
    retriever: Tensor,
    ranker: Tensor | None,
    *,
    fusion: float,
    teacher: float,
    queries: int | None = None,
) -> Terms:
    r"""The retriever's step: $(1-\alpha) L_{in-batch} + \alpha\, KL(\mathrm{softmax}(\bar s_{ce} + w\,\bar s_{de}) \|
    p_{de})$, the KL over each query's own list and a mean over queries; the target has no gradient.

    Args:
        everyone, positive, masked: [B, P], [B], [B, P], as in `in_batch`.
        retriever: [B, n] scores s_de of the queries' own lists.
        ranker: [B, n] scores s_ce of the same lists; None only where ``teacher`` is 0.
        fusion: w, the retriever's weight in the sum.
        teacher: alpha, 0 to 1.
        queries: what both means divide by; default B.

    Returns: Terms with the parts ``retriever_in_batch`` and, unless ``teacher`` is 0, ``retriever_kl``.
    Raises: ValueError without ranker scores where ``teacher`` is above 0, or shapes that do not agree.
    """
    label = in_batch(everyone, positive, masked, queries)
    if not teacher:
        return Terms(label, {"retriever_in_batch": label.detach()})
    if ranker is None:
        raise ValueError("teacher is above 0: expected the ranker's scores, got None")
    retriever, ranker = widen_pair(retriever, ranker)
    both = ranker + fusion * retriever.detach()
    common = kl(retriever, both, direction="ce_de", detach_teacher=True, reduction="query_mean", queries=queries)
    parts = {"retriever_in_batch": label.detach(), "retriever_kl": common.detach()}
    return Terms((1 - teacher) * label + teacher * common, parts)
