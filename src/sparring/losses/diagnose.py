"""What to watch while two models train on each other's scores."""

from __future__ import annotations

import torch
from torch import Tensor

from sparring.losses.adversarial import reward
from sparring.losses.terms import denominator, widen_pair


@torch.no_grad()
def diagnostics(retriever: Tensor, ranker: Tensor, queries: int | None = None) -> dict[str, Tensor]:
    r"""Four means over queries that say how the game stands.

    - ``retriever_entropy``: $-\sum_i p_\theta(d_i \mid q; D_q) \log p_\theta(d_i \mid q; D_q)$ in nats, at most
      $\ln n$. AR2 reports 1.70 without the distillation term and 2.10 with it.
    - ``reward``: the mean of $r_i$ over the n - 1 negatives; near 0 means that the ranker is never fooled.
    - ``ranker_prefers_negative``: the share of lists in which some negative scores strictly above column 0.
    - ``retriever_prefers_negative``: the same for the retriever.

    Args:
        retriever: [B, n] scores, column 0 the positive.
        ranker: [B, n] scores of the same lists.
        queries: what the means divide by; default B. Values of micro-batches add up.

    Returns:
        name -> [] in float32 at least, without gradient.
    """
    retriever, ranker = widen_pair(retriever, ranker)
    log_p = retriever.log_softmax(dim=1)
    per_query = {
        "retriever_entropy": -(log_p.exp() * log_p).sum(dim=1),
        "reward": reward(ranker)[:, 1:].mean(dim=1),
        "ranker_prefers_negative": (ranker[:, 1:].amax(dim=1) > ranker[:, 0]).to(ranker.dtype),
        "retriever_prefers_negative": (retriever[:, 1:].amax(dim=1) > retriever[:, 0]).to(retriever.dtype),
    }
    return {name: values.sum() / denominator(retriever, queries) for name, values in per_query.items()}
