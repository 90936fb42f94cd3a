"""RocketQAv2's losses on one list of two passages, where every logarithm can be written down.

s_de = [0, 0]        p_de = (1/2, 1/2)
s_ce = [0, ln 3]     p_ce = (1/4, 3/4)
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from sparring.losses import rocketqav2, static
from sparring.losses.distillation import kl, pointwise

DE = torch.tensor([[0.0, 0.0]], dtype=torch.float64)
CE = torch.tensor([[0.0, math.log(3)]], dtype=torch.float64)
LN2, LN3 = math.log(2), math.log(3)


def gradients(total: Tensor, de: Tensor, ce: Tensor) -> tuple[list[float], list[float] | None]:
    to_de, to_ce = torch.autograd.grad(total, (de, ce), allow_unused=True)
    return to_de[0].tolist(), None if to_ce is None else to_ce[0].tolist()


def leaves() -> tuple[Tensor, Tensor]:
    return DE.clone().requires_grad_(), CE.clone().requires_grad_()


def test_paper() -> None:
    """KL(de||ce) = 1/2 ln 2 + 1/2 ln(2/3) = ln 2 - 1/2 ln 3; supervised -ln(1/4) = 2 ln 2.

    To s_de: p_j (log p_de/p_ce - KL) = 1/2 (ln 2 - ln 2 + 1/2 ln 3) = 1/4 ln 3 and its opposite.
    To s_ce: the KL gives p_ce - p_de = (-1/4, 1/4), the supervised term p_ce - (1, 0) = (-3/4, 3/4).
    """
    de, ce = leaves()
    terms = rocketqav2(de, ce, variant="paper")
    assert terms.parts["kl"].item() == pytest.approx(LN2 - LN3 / 2, abs=1e-12)
    assert terms.parts["supervised"].item() == pytest.approx(2 * LN2, abs=1e-12)
    assert terms.total.item() == pytest.approx(3 * LN2 - LN3 / 2, abs=1e-12)
    to_de, to_ce = gradients(terms.total, de, ce)
    assert to_de == pytest.approx([LN3 / 4, -LN3 / 4], abs=1e-12)
    assert to_ce == pytest.approx([-1.0, 1.0], abs=1e-12)


def test_official() -> None:
    """KL(ce||de) = 1/4 ln(1/2) + 3/4 ln(3/2) = 3/4 ln 3 - ln 2, halved by the mean over one query x two passages.

    To s_de: (p_de - p_ce) / 2 = (1/8, -1/8). To s_ce: the supervised term alone, (-3/4, 3/4).
    """
    de, ce = leaves()
    terms = rocketqav2(de, ce, variant="official")
    assert terms.parts["kl"].item() == pytest.approx((0.75 * LN3 - LN2) / 2, abs=1e-12)
    to_de, to_ce = gradients(terms.total, de, ce)
    assert to_de == pytest.approx([1 / 8, -1 / 8], abs=1e-12)
    assert to_ce == pytest.approx([-3 / 4, 3 / 4], abs=1e-12)


def test_sum_and_means_of_three_equal_lists() -> None:
    """One list has KL(de||ce) = K. Three: the paper's sum is 3K, the mean over queries K, over elements K/2."""
    de, ce, one = DE.repeat(3, 1), CE.repeat(3, 1), LN2 - LN3 / 2
    assert rocketqav2(de, ce, variant="paper").parts["kl"].item() == pytest.approx(3 * one, abs=1e-12)
    for reduction, expected in (("sum", 3 * one), ("query_mean", one), ("element_mean", one / 2)):
        value = kl(de, ce, direction="de_ce", detach_teacher=True, reduction=reduction)  # type: ignore[arg-type]
        assert value.item() == pytest.approx(expected, abs=1e-12)


def test_static_teaches_the_retriever_as_paper_does_and_leaves_the_ranker_alone() -> None:
    """The same value and the same (1/4 ln 3, -1/4 ln 3) to the retriever; no graph at all to the ranker."""
    de, ce = leaves()
    total = static(de, ce).total
    assert total.item() == pytest.approx(LN2 - LN3 / 2, abs=1e-12)
    to_de, to_ce = gradients(total, de, ce)
    assert to_de == pytest.approx([LN3 / 4, -LN3 / 4], abs=1e-12)
    assert to_ce is None


def test_pointwise() -> None:
    """sigma(0) = 1/2 for the positive, sigma(ln 3) = 3/4 for the negative: (ln 2 + ln 4) / 2 = 3/2 ln 2.

    Gradient (sigma - label) / 2 = (-1/4, 3/8).
    """
    ce = CE.clone().requires_grad_()
    loss = pointwise(ce)
    assert loss.item() == pytest.approx(1.5 * LN2, abs=1e-12)
    (slope,) = torch.autograd.grad(loss, ce)
    assert slope[0].tolist() == pytest.approx([-1 / 4, 3 / 8], abs=1e-12)
