"""RocketQAv2: dynamic listwise distillation between a retriever (de) and a ranker (ce) (Ren et al., EMNLP 2021).

One loss trains both models at once: a KL divergence between their distributions over the same list, and a supervised
term on the ranker. Where the released code differs from the paper both are here under their own names:

- ``paper``: KL(de || ce), gradient to both models, SUM over queries and passages (Eq. 4).
- ``official``: KL(ce || de), target detached, mean over queries x passages (the released code).
- ``custom``: the three choices given one by one.

The supervised term (Eq. 5) is a mean over queries in both, added with weight 1 (Eq. 6).
docs/rocketqav2.md sets each equation beside its function and lists every deviation.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from torch import Tensor
from torch.nn.functional import logsigmoid

from sparring.losses.contrastive import list_softmax
from sparring.losses.terms import Terms, denominator, widen, widen_pair

Variant = Literal["paper", "official", "custom"]
Direction = Literal["de_ce", "ce_de"]
Reduction = Literal["sum", "query_mean", "element_mean"]
Supervised = Literal["listwise", "pointwise", "none"]


class KLChoice(NamedTuple):
    """What a variant decides about its KL term."""

    direction: Direction
    detach_teacher: bool
    reduction: Reduction


PAPER = KLChoice("de_ce", False, "sum")
OFFICIAL = KLChoice("ce_de", True, "element_mean")


def kl(
    retriever: Tensor,
    ranker: Tensor,
    *,
    direction: Direction,
    detach_teacher: bool,
    reduction: Reduction,
    queries: int | None = None,
) -> Tensor:
    r"""KL divergence between the two models' softmaxes over each list (RocketQAv2 Eq. 4).

    ``de_ce`` is $\sum_i p_{de,i} \log\frac{p_{de,i}}{p_{ce,i}}$, ``ce_de`` the same with the roles swapped.

    Args:
        retriever: [B, n] scores s_de.
        ranker: [B, n] scores s_ce.
        direction: ``de_ce`` (the paper's) or ``ce_de`` (the released code's).
        detach_teacher: stop the gradient at the ranker's scores.
        reduction: ``sum`` over queries and passages; ``query_mean`` divides it by ``queries``; ``element_mean`` by
            ``queries`` x n.
        queries: the number of queries of the whole batch; default B.

    Returns:
        [] at least 0.

    Raises:
        ValueError: an unknown direction or reduction, or shapes that do not agree.
    """
    retriever, ranker = widen_pair(retriever, ranker)
    de = retriever.log_softmax(dim=1)
    ce = (ranker.detach() if detach_teacher else ranker).log_softmax(dim=1)
    match direction:
        case "de_ce":
            total = (de.exp() * (de - ce)).sum()
        case "ce_de":
            total = (ce.exp() * (ce - de)).sum()
        case _:
            raise ValueError(f"unknown kl_direction: expected 'de_ce' or 'ce_de', got {direction!r}")
    match reduction:
        case "sum":
            return total
        case "query_mean":
            return total / denominator(retriever, queries)
        case "element_mean":
            return total / (denominator(retriever, queries) * retriever.shape[1])
        case _:
            raise ValueError(f"unknown kl_reduction: expected 'sum', 'query_mean' or 'element_mean', got {reduction!r}")


def pointwise(ranker: Tensor, queries: int | None = None) -> Tensor:
    r"""Binary cross-entropy of every pair, column 0 labelled 1 and the rest 0: the ablation's supervised term.

    $L = -\frac{1}{Bn} \sum_q [\log\sigma(s_{q0}) + \sum_{i \ge 1} \log\sigma(-s_{qi})]$: RocketQAv2's ablation
    "pointwise". The mean over pairs is our choice: the paper states no reduction for it.

    Args:
        ranker: [B, n] scores s_ce.
        queries: the number of queries of the whole batch; default B.
    """
    ranker = widen(ranker)
    pairs = denominator(ranker, queries) * ranker.shape[1]
    return -(logsigmoid(ranker[:, 0]).sum() + logsigmoid(-ranker[:, 1:]).sum()) / pairs


def rocketqav2(
    retriever: Tensor,
    ranker: Tensor,
    *,
    variant: Variant = "paper",
    kl_direction: Direction | None = None,
    detach_teacher: bool | None = None,
    kl_reduction: Reduction | None = None,
    supervised: Supervised = "listwise",
    queries: int | None = None,
    teacher: Tensor | None = None,
) -> Terms:
    r"""RocketQAv2's joint loss $L = L_{KL} + L_{sup}$ (RocketQAv2 Eq. 6).

    The retriever learns from the KL only. The ranker learns from the supervised term, and from the KL unless its
    gradient stops there.

    Args:
        retriever: [B, n] scores s_de, column 0 the positive.
        ranker: [B, n] scores s_ce of the same lists.
        variant: ``paper`` or ``official``, which decide the KL's direction, gradient and reduction; or ``custom``.
        kl_direction, detach_teacher, kl_reduction: with ``custom`` all three, otherwise none; see `kl`.
        supervised: ``listwise`` (Eq. 5), ``pointwise`` (the ablation) or ``none``.
        queries: what means over queries divide by; default B. The sum of ``paper``'s KL has no denominator.
        teacher: [B, n] scores of the same lists that the KL reads in place of ``ranker``: a second forward with
            dropout off. Only where the KL's gradient stops at the ranker anyway; the supervised term keeps ``ranker``.

    Returns:
        Terms with the parts ``kl`` and, unless it is none, ``supervised``.

    Raises:
        ValueError: options that contradict the variant, an unknown name, or shapes that do not agree.
    """
    choice = _choose(variant, kl_direction, detach_teacher, kl_reduction)
    if teacher is not None and not choice.detach_teacher:
        raise ValueError("the KL's gradient reaches the ranker: expected no teacher scores of their own, got some")
    divergence = kl(retriever, ranker if teacher is None else teacher, **choice._asdict(), queries=queries)
    match supervised:
        case "listwise":
            labelled = list_softmax(ranker, queries=queries)
        case "pointwise":
            labelled = pointwise(ranker, queries)
        case "none":
            return Terms(divergence, {"kl": divergence.detach()})
        case _:
            raise ValueError(f"unknown supervised loss: expected 'listwise', 'pointwise' or 'none', got {supervised!r}")
    return Terms(divergence + labelled, {"kl": divergence.detach(), "supervised": labelled.detach()})


def static(
    retriever: Tensor,
    ranker: Tensor,
    *,
    variant: Variant = "paper",
    kl_direction: Direction | None = None,
    kl_reduction: Reduction | None = None,
    queries: int | None = None,
) -> Terms:
    """The ablation with a frozen ranker: the KL of `rocketqav2` alone, no gradient to the ranker, no supervised term.

    Shapes and options as in `rocketqav2`; ``custom`` wants ``kl_direction`` and ``kl_reduction``.
    """
    return rocketqav2(
        retriever,
        ranker.detach(),
        variant=variant,
        kl_direction=kl_direction,
        detach_teacher=True if variant == "custom" else None,
        kl_reduction=kl_reduction,
        supervised="none",
        queries=queries,
    )


def _choose(
    variant: Variant, direction: Direction | None, detach_teacher: bool | None, reduction: Reduction | None
) -> KLChoice:
    """The variant's own choice, or the given one: never a named variant with something else inside."""
    given = {"kl_direction": direction, "detach_teacher": detach_teacher, "kl_reduction": reduction}
    if variant == "custom":
        if direction is None or detach_teacher is None or reduction is None:
            missing = ", ".join(name for name, value in given.items() if value is None)
            raise ValueError(f"variant 'custom' has no choices of its own: give {missing}")
        return KLChoice(direction, detach_teacher, reduction)
    extra = ", ".join(name for name, value in given.items() if value is not None)
    if extra:
        raise ValueError(f"variant {variant!r} decides {extra} itself: use variant='custom' to choose them")
    match variant:
        case "paper":
            return PAPER
        case "official":
            return OFFICIAL
    raise ValueError(f"unknown RocketQAv2 variant: expected 'paper', 'official' or 'custom', got {variant!r}")
