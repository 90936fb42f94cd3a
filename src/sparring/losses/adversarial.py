"""AR2: Adversarial Retriever-Ranker for dense text retrieval (Zhang et al., ICLR 2022).

The ranker step is `sparring.losses.contrastive.list_softmax`. The retriever step, with the ranker frozen, minimises

    adv_lambda * adversarial(z, s) + (1 - adv_lambda) * distillation(z, s)

with z the retriever's scores and s the ranker's, [B, n], column 0 the positive. Three variants, never mixed up:

- ``paper``: Eq. 9-10 and Eq. 12. The adversarial softmax spans the negatives only.
- ``official``: the released code to the letter. All columns, SUM over queries, log(p + 1e-7).
- ``mean``: the code's form with a mean over queries and a log-softmax. The default of the recipes.

docs/ar2.md sets each equation beside its function and lists every deviation.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor
from torch.nn.functional import logsigmoid

from sparring.losses.terms import Terms, denominator, widen, widen_pair

Variant = Literal["paper", "official", "mean"]

OFFICIAL_EPS = 1e-7
"""What the released code adds to a probability before its logarithm."""


def reward(ranker: Tensor) -> Tensor:
    r"""$r_i = \log p_\phi(d^+ \mid q; \{d^+, d_i\}) = \log\sigma(s^+ - s_i) \le 0$ (AR2 Eq. 9-10).

    Every column gets one; column 0, the positive against itself, gets $\log\frac12$. A document that fools the ranker
    has a reward far below zero.

    Args:
        ranker: [B, n] scores, column 0 the positive.

    Returns:
        [B, n] in float32 at least. Differentiable; `adversarial` stops the gradient.
    """
    ranker = widen(ranker)
    return logsigmoid(ranker[:, :1] - ranker)


def adversarial(retriever: Tensor, ranker: Tensor, variant: Variant, queries: int | None = None) -> Tensor:
    r"""The retriever's half of the game: make the ranker's task harder. Minimised in every variant.

    - ``paper``: $J = \frac1B\sum_q \sum_{i \ge 1} p_\theta(d_i \mid q; D_q^-)\, r_i$ (AR2 Eq. 9-10); softmax over the
      negatives only, so the positive's score has no gradient.
    - ``official``: $\sum_q \sum_{i \ge 0} r_i \log(p_\theta(d_i \mid q; D_q) + 10^{-7})$, a SUM over queries.
    - ``mean``: $\frac1B\sum_q \sum_{i \ge 0} r_i \log p_\theta(d_i \mid q; D_q)$.

    Args:
        retriever: [B, n] scores z.
        ranker: [B, n] scores s; the gradient stops here.
        variant: which of the three.
        queries: what the means of ``paper`` and ``mean`` divide by; default B. ``official`` has no denominator.

    Returns:
        [] at most 0 for ``paper``; at least 0 for ``mean``, and for ``official`` but for the 1e-7.
    """
    retriever, ranker = widen_pair(retriever, ranker)
    r = reward(ranker.detach())
    match variant:
        case "paper":
            p = retriever[:, 1:].softmax(dim=1)
            return (p * r[:, 1:]).sum() / denominator(retriever, queries)
        case "official":
            return (r * (retriever.softmax(dim=1) + OFFICIAL_EPS).log()).sum()
        case "mean":
            return (r * retriever.log_softmax(dim=1)).sum() / denominator(retriever, queries)
    raise _unknown(variant)


def distillation(
    retriever: Tensor, ranker: Tensor, variant: Variant, temperature: float = 1.0, queries: int | None = None
) -> Tensor:
    r"""Cross-entropy of the retriever against the ranker's distribution, mean over queries (AR2 Eq. 12).

    $J_R = -\frac1B \sum_q \sum_i t_i \log p_\theta(d_i \mid q; D_q)$ with
    $t = \mathrm{softmax}(s / \tau)$ over the whole list; ``official`` takes $\log(p + 10^{-7})$.

    Args:
        retriever: [B, n] scores z.
        ranker: [B, n] scores s; the gradient stops here.
        variant: ``official`` or not, see above.
        temperature: tau, divides the teacher's logits only. (For ``paper``, `ar2` divides all logits beforehand.)
        queries: what the mean divides by; default B.

    Returns:
        [] at least the teacher's entropy (``official``: but for the 1e-7).
    """
    retriever, ranker = widen_pair(retriever, ranker)
    target = (ranker.detach() / temperature).softmax(dim=1)
    match variant:
        case "official":
            log_p = (retriever.softmax(dim=1) + OFFICIAL_EPS).log()
        case "paper" | "mean":
            log_p = retriever.log_softmax(dim=1)
        case _:
            raise _unknown(variant)
    return -(target * log_p).sum() / denominator(retriever, queries)


def ar2(
    retriever: Tensor,
    ranker: Tensor,
    *,
    adv_lambda: float,
    variant: Variant,
    temperature: float = 1.0,
    queries: int | None = None,
) -> Terms:
    r"""AR2's retriever step: $\lambda J + (1 - \lambda) J_R$ (AR2 Eq. 9, 10, 12).

    The paper gives no weight between its two terms; the form with lambda is the released code's, for all variants.
    ``adv_lambda = 0`` is distillation alone.

    Args:
        retriever: [B, n] scores z, column 0 the positive.
        ranker: [B, n] scores s of the same lists; the gradient stops here.
        adv_lambda: lambda, from 0 to 1. The released code uses 0.5.
        variant: ``paper``, ``official`` or ``mean``.
        temperature: tau > 0, always a divisor. ``official`` and ``mean`` divide the teacher's logits of the
            distillation term only; ``paper`` divides every logit of both models.
        queries: what the means over queries divide by; default B.

    Returns:
        Terms with the parts ``adversarial`` and ``distillation``, each before its weight.

    Raises:
        ValueError: lambda, temperature, variant or shapes outside the above.
    """
    if not 0 <= adv_lambda <= 1:
        raise ValueError(f"adv_lambda weighs two terms: expected a number from 0 to 1, got {adv_lambda}")
    if not temperature > 0:
        raise ValueError(f"temperature divides logits: expected a number above 0, got {temperature}")
    retriever, ranker = widen_pair(retriever, ranker)
    if variant == "paper":
        retriever, ranker, temperature = retriever / temperature, ranker / temperature, 1.0
    adv = adversarial(retriever, ranker, variant, queries)
    normal = distillation(retriever, ranker, variant, temperature, queries)
    total = adv_lambda * adv + (1 - adv_lambda) * normal
    return Terms(total, {"adversarial": adv.detach(), "distillation": normal.detach()})


def _unknown(variant: str) -> ValueError:
    return ValueError(f"unknown AR2 variant: expected 'paper', 'official' or 'mean', got {variant!r}")
