"""AR2's losses on two small lists, each number derived by hand (float64, tau = 1, column 0 the positive, lambda = 1/2).

    z = [[2, 1, .5, 0], [0, 1, -1, 2]]        retriever
    s = [[3, 1, 2, -1], [1, 2, 0, -2]]        ranker

Row 1: exp(z) = 7.389056, 2.718282, 1.648721, 1, sum 12.756059, so p = .579258, .213097, .129250, .078394.
Row 2: exp(z) = 1, 2.718282, .367879, 7.389056, sum 11.475217, so p = .087144, .236883, .032059, .643914.
Row 1: exp(s) = 20.085537, 2.718282, 7.389056, .367879, sum 30.560754, so t = .657233, .088947, .241782, .012038.
Row 2: exp(s) = 2.718282, 7.389056, 1, .135335, sum 11.242673, so t = .241782, .657233, .088947, .012038.
w_i = softplus(s_i - s_0) = -r_i.
Row 1: s_i - s_0 = 0, -2, -1, -4: w = .693147, .126928, .313262, .018150, sum 1.151487.
Row 2: s_i - s_0 = 0, 1, -1, -3: w = .693147, 1.313262, .313262, .048587, sum 2.368258.
-log p: row 1 .546006, 1.546006, 2.046006, 2.546006; row 2 2.440190, 1.440190, 3.440190, .440190.
"""

from __future__ import annotations

import math
from typing import Literal

import pytest
import torch
from torch import Tensor

from sparring.losses import ar2, list_softmax, reward
from sparring.losses.adversarial import adversarial, distillation

Z = torch.tensor([[2, 1, 0.5, 0], [0, 1, -1, 2]], dtype=torch.float64)
S = torch.tensor([[3, 1, 2, -1], [1, 2, 0, -2]], dtype=torch.float64)


def gradient(loss: Tensor, scores: Tensor) -> Tensor:
    (result,) = torch.autograd.grad(loss, scores)
    return result


def matrix(rows: list[list[float]]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def test_1_official_values() -> None:
    """Sums of the products of the columns above.

    normal: row 1 t.(-log p) = .358853 + .137512 + .494689 + .030648 = 1.021702;
            row 2 .589995 + .946540 + .305994 + .005299 = 1.847828; the mean is 1.434765.
    adv:    row 1 w.(-log p) = .378463 + .196232 + .640935 + .046210 = 1.261840;
            row 2 1.691411 + 1.891346 + 1.077680 + .021388 = 4.681824; the SUM is 5.943664.
    The 1e-7 lowers each -log p by 1e-7 / p: .000003 in adv (5.943661), less than .000001 in normal.
    total:  (5.943661 + 1.434765) / 2 = 3.689213. The golden numbers hold to 1e-5.
    """
    terms = ar2(Z, S, adv_lambda=0.5, variant="official")
    assert terms.parts["distillation"].item() == pytest.approx(1.434765, abs=1e-5)
    assert terms.parts["adversarial"].item() == pytest.approx(5.943658, abs=1e-5)
    assert terms.total.item() == pytest.approx(3.689211, abs=1e-5)


def test_2_gradient_of_the_official_adversarial_term() -> None:
    """d adv/dz_j = -w_j + p_j sum(w). Row 1, column 0: -.693147 + .579258 * 1.151487 = -.026139.

    Row 2, column 3: -.048587 + .643914 * 2.368258 = 1.476368. No division by B: the term is a sum.
    """
    z = Z.clone().requires_grad_()
    expected = [[-0.026139, 0.118451, -0.164432, 0.072120], [-0.486767, -0.752262, -0.237339, 1.476368]]
    torch.testing.assert_close(gradient(adversarial(z, S, "official"), z), matrix(expected), rtol=0, atol=2e-6)


def test_3_gradient_of_the_distillation_term() -> None:
    """d normal/dz_j = (p_j - t_j) / B. Row 1, column 0: (.579258 - .657233) / 2 = -.038987."""
    expected = [[-0.038987, 0.062075, -0.056266, 0.033178], [-0.077319, -0.210175, -0.028444, 0.315938]]
    variants: tuple[Literal["official", "mean", "paper"], ...] = ("official", "mean", "paper")
    for variant in variants:
        z = Z.clone().requires_grad_()
        loss = distillation(z, S, variant)
        torch.testing.assert_close(gradient(loss, z), matrix(expected), rtol=0, atol=1e-6)


def test_4_paper() -> None:
    """J_q = sum_{i>=1} p_i r_i with p over the negatives only; dJ/dz_j = p_j (r_j - J_q) / B, the positive's exactly 0.

    Row 1: exp(z) of the negatives 2.718282, 1.648721, 1, sum 5.367003, p = .506480, .307196, .186324;
    J_1 = -(.506480 * .126928 + .307196 * .313262 + .186324 * .018150) = -.163901.
    Row 2: exp(z) 2.718282, .367879, 7.389056, sum 10.475217, p = .259496, .035119, .705385; J_2 = -.386061.
    Mean -.274981. Column 1 of row 1: .506480 * (-.126928 + .163901) / 2 = .009363.
    """
    z = Z.clone().requires_grad_()
    loss = adversarial(z, S, "paper")
    assert loss.item() == pytest.approx(-0.274981, abs=1e-6)
    expected = [[0, 0.009363, -0.022941, 0.013578], [0, -0.120303, 0.001278, 0.119024]]
    result = gradient(loss, z)
    torch.testing.assert_close(result, matrix(expected), rtol=0, atol=1e-6)
    assert result[:, 0].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("variant", ["paper", "official", "mean"])
def test_5_symmetries(variant: Literal["paper", "official", "mean"]) -> None:
    """Softmaxes see differences only: rows of a logit gradient sum to 0, a constant added to a row of s is invisible.

    Nor has a negative a place: permuting the negatives of both models permutes the gradient.
    """

    def loss_and_gradient(z: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        z = z.clone().requires_grad_()
        loss = ar2(z, s, adv_lambda=0.5, variant=variant).total
        return loss.detach(), gradient(loss, z)

    loss, slope = loss_and_gradient(Z, S)
    torch.testing.assert_close(slope.sum(dim=1), torch.zeros(2, dtype=torch.float64), rtol=0, atol=1e-12)
    shifted, shifted_slope = loss_and_gradient(Z, S + matrix([[5], [-3]]))
    torch.testing.assert_close(shifted, loss, rtol=0, atol=1e-12)
    torch.testing.assert_close(shifted_slope, slope, rtol=0, atol=1e-12)
    order = [0, 3, 1, 2]
    permuted, permuted_slope = loss_and_gradient(Z[:, order], S[:, order])
    torch.testing.assert_close(permuted, loss, rtol=0, atol=1e-12)
    torch.testing.assert_close(permuted_slope, slope[:, order], rtol=0, atol=1e-12)


def test_6_twice_the_batch() -> None:
    """A sum doubles (2 * 5.943658 = 11.887317), a mean stays (5.943658 / 2 = 2.971829)."""
    twice_z, twice_s = torch.cat([Z, Z]), torch.cat([S, S])
    assert adversarial(twice_z, twice_s, "official").item() == pytest.approx(11.887317, abs=1e-5)
    assert adversarial(Z, S, "mean").item() == pytest.approx(2.971829, abs=1e-5)
    assert adversarial(twice_z, twice_s, "mean").item() == pytest.approx(2.971829, abs=1e-5)


def test_7_wide_gaps() -> None:
    """z = [40, 20, 0, 0], s = [0, 1, 3, -1]: the wider the gap, the less is left of the official gradient.

    w = .693147, 1.313262, 3.048587, .313262, sum 5.368258; p = 1, 2e-9, ~0, ~0. With the log-softmax
    -w_j + p_j sum(w) = 4.675, -1.313, -3.049, -.313. With log(p + 1e-7) a weight becomes c_i = w_i p_i / (p_i + 1e-7):
    .693147, 1.313 * .0202 = .02652, 0, 0, and the gradient -c_j + p_j sum(c) is .027, -.027, 0, 0: all but gone.
    Both are finite at 1e3.
    """
    s = matrix([[0, 1, 3, -1]])
    variants: tuple[tuple[Literal["official", "mean"], list[float]], ...] = (
        ("official", [0.027, -0.027, 0, 0]),
        ("mean", [4.675, -1.313, -3.049, -0.313]),
    )
    for variant, expected in variants:
        z = matrix([[40, 20, 0, 0]]).requires_grad_()
        torch.testing.assert_close(gradient(adversarial(z, s, variant), z), matrix([expected]), rtol=0, atol=6e-4)
        far = matrix([[1e3, -1e3, 0, 1e3]]).requires_grad_()
        loss = adversarial(far, s, variant)
        assert bool(torch.isfinite(loss))
        assert bool(torch.isfinite(gradient(loss, far)).all())


def test_8_a_ranker_without_an_opinion() -> None:
    """Equal scores: log sigma(0) = -ln 2 in every column."""
    assert reward(torch.full((2, 3), 7.0)).tolist() == [[pytest.approx(-math.log(2))] * 3] * 2


def test_ranker_step() -> None:
    """-log t_0: row 1 -ln .657233 = .419717, row 2 -ln .241782 = 1.419717, mean .919717."""
    assert list_softmax(S).item() == pytest.approx(0.919717, abs=1e-6)
