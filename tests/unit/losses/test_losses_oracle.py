"""Every loss, variant and option against the NumPy oracle and gradcheck, and at the edge of the number formats."""

from __future__ import annotations

from typing import Any

import loss_checks as checks
import loss_oracle as oracle
import numpy as np
import pytest
import torch

from sparring import losses

cases = pytest.mark.parametrize("case", checks.CASES, ids=lambda case: case.name)


@cases
def test_value_and_gradient_agree_with_the_oracle(case: checks.Case) -> None:
    checks.check_case(losses, case)


@cases
def test_bfloat16_scores_under_autocast_are_computed_in_float32(case: checks.Case) -> None:
    checks.check_narrow(losses, case)


@cases
def test_gradcheck(case: checks.Case) -> None:
    """Autograd against central differences, for each input that has a gradient."""
    z, s = (torch.from_numpy(x) for x in checks.scores(2))
    expected = case.expect(z.numpy(), s.numpy())
    if expected.retriever is not None:
        assert torch.autograd.gradcheck(lambda x: case.call(losses, x, s), z.clone().requires_grad_())
    if expected.ranker is not None and not case.stops:
        assert torch.autograd.gradcheck(lambda x: case.call(losses, z, x), s.clone().requires_grad_())


@cases
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
def test_finite_at_ten_thousand(case: checks.Case, dtype: torch.dtype, autocast: bool) -> None:
    """Value and gradients stay finite when scores are +-1e4, whichever model is sure of whichever passage."""
    big = 1e4
    z = torch.tensor([[big, -big, 0, big, -big], [-big, big, big, 0, 0], [-big, -big, -big, -big, big]])
    s = torch.tensor([[-big, big, 0, big, big], [big, -big, -big, -big, 0], [0, 0, 0, 0, -big]])
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        for retriever, ranker in ((z, s), (s, z), (z, z), (z, -z)):
            for result in checks.evaluate(losses, case, retriever.to(dtype), ranker.to(dtype)):
                assert result is None or bool(torch.isfinite(result).all())


def test_parts() -> None:
    checks.check_parts(losses)


def test_diagnostics() -> None:
    checks.check_diagnostics(losses)


def test_known_positive_mask_by_hand() -> None:
    checks.check_mask(losses)


def test_oracle_gradients_are_the_slopes_of_its_values() -> None:
    """The oracle's own analytic gradients against central differences: it is not trusted either."""
    step = 1e-6
    for case in checks.CASES:
        inputs = list(checks.scores(3))
        expected = case.expect(*inputs)
        for which, gradient in enumerate((expected.retriever, expected.ranker)):
            if gradient is None or (which == 1 and case.stops):
                continue
            slope = np.zeros_like(gradient)
            for at in np.ndindex(*slope.shape):
                low, high = ([x.copy() for x in inputs] for _ in range(2))
                low[which][at] -= step
                high[which][at] += step
                slope[at] = (case.expect(*high).value - case.expect(*low).value) / (2 * step)
            np.testing.assert_allclose(gradient, slope, rtol=1e-5, atol=1e-7, err_msg=case.name)


def test_reward_is_differentiable_and_matches_the_oracle() -> None:
    _, s = checks.scores()
    ranker = torch.from_numpy(s).requires_grad_()
    np.testing.assert_allclose(losses.reward(ranker).detach().numpy(), oracle.log_sigmoid(s[:, :1] - s), rtol=1e-12)
    assert losses.reward(ranker).requires_grad


class TestRefusals:
    """Contradictions are errors that say what was expected and what was given."""

    z = torch.zeros(2, 3)

    def test_shapes_that_differ(self) -> None:
        with pytest.raises(ValueError, match=r"\[B, n\] with n >= 2, got \[2, 3\] and \[2, 4\]"):
            losses.ar2(self.z, torch.zeros(2, 4), adv_lambda=0.5, variant="mean")

    def test_a_list_without_negatives(self) -> None:
        with pytest.raises(ValueError, match="n >= 2"):
            losses.rocketqav2(torch.zeros(2, 1), torch.zeros(2, 1))

    @pytest.mark.parametrize("weight", [-0.1, 1.1, float("nan")])
    def test_lambda_outside_its_range(self, weight: float) -> None:
        with pytest.raises(ValueError, match="from 0 to 1"):
            losses.ar2(self.z, self.z, adv_lambda=weight, variant="mean")

    @pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
    def test_temperature(self, temperature: float) -> None:
        with pytest.raises(ValueError, match="above 0"):
            losses.ar2(self.z, self.z, adv_lambda=0.5, variant="mean", temperature=temperature)

    def test_unknown_names(self) -> None:
        with pytest.raises(ValueError, match=r"unknown AR2 variant.*'sum'"):
            losses.ar2(self.z, self.z, adv_lambda=0.5, variant="sum")  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=r"unknown RocketQAv2 variant.*'mean'"):
            losses.rocketqav2(self.z, self.z, variant="mean")  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=r"unknown supervised loss.*'pairwise'"):
            losses.rocketqav2(self.z, self.z, supervised="pairwise")  # type: ignore[arg-type]
        custom = {"variant": "custom", "kl_direction": "de_ce", "detach_teacher": True, "kl_reduction": "sum"}
        with pytest.raises(ValueError, match=r"unknown kl_direction.*'both'"):
            losses.rocketqav2(self.z, self.z, **(custom | {"kl_direction": "both"}))  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=r"unknown kl_reduction.*'mean'"):
            losses.rocketqav2(self.z, self.z, **(custom | {"kl_reduction": "mean"}))  # type: ignore[arg-type]

    def test_a_named_variant_is_never_something_else(self) -> None:
        with pytest.raises(ValueError, match="'official' decides kl_direction, kl_reduction itself"):
            losses.rocketqav2(self.z, self.z, variant="official", kl_direction="de_ce", kl_reduction="sum")

    def test_custom_wants_every_choice(self) -> None:
        with pytest.raises(ValueError, match="give detach_teacher, kl_reduction"):
            losses.rocketqav2(self.z, self.z, variant="custom", kl_direction="de_ce")

    def test_no_query(self) -> None:
        with pytest.raises(ValueError, match="queries >= 1, got 0"):
            losses.list_softmax(torch.zeros(0, 3))

    def test_an_empty_share_of_a_batch_adds_nothing(self) -> None:
        assert losses.list_softmax(torch.zeros(0, 3), queries=4).item() == 0

    def test_a_list_without_its_positive(self) -> None:
        with pytest.raises(ValueError, match="column 0"):
            losses.list_softmax(self.z, torch.tensor([[True, True, True], [False, True, True]]))


def test_a_teachers_own_scores_are_the_target_and_nothing_else() -> None:
    """The KL reads them in place of the ranker's; the supervised term keeps the ranker's; no gradient reaches them."""
    z, s = (torch.from_numpy(array).requires_grad_() for array in checks.scores())
    t = (s.detach() + torch.linspace(-1, 1, s.shape[1], dtype=s.dtype)).requires_grad_()
    custom: dict[str, Any] = {"variant": "custom", "kl_direction": "ce_de", "kl_reduction": "query_mean"}
    found = losses.rocketqav2(z, s, **custom, detach_teacher=True, teacher=t)
    kl = losses.rocketqav2(z, t, **custom, detach_teacher=True, supervised="none").total
    assert torch.equal(found.parts["kl"], kl.detach())
    assert torch.equal(found.parts["supervised"], losses.list_softmax(s).detach())
    to_z, to_s, to_t = torch.autograd.grad(found.total, (z, s, t), allow_unused=True)
    assert to_t is None
    assert torch.equal(to_z, torch.autograd.grad(kl, z)[0])
    assert torch.equal(to_s, torch.autograd.grad(losses.list_softmax(s), s)[0])
    for options in ({"variant": "paper"}, {**custom, "detach_teacher": False}):
        with pytest.raises(ValueError, match="gradient reaches the ranker"):
            losses.rocketqav2(z, s, **options, teacher=t)
