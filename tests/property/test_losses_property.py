"""What holds for every list of scores, whatever the numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor

from sparring import losses
from sparring.losses.adversarial import adversarial

Loss = Callable[..., Tensor]
quick = settings(max_examples=25, deadline=None, derandomize=True)


def ar2(variant: Any) -> Loss:
    return lambda z, s, queries=None: losses.ar2(z, s, adv_lambda=0.4, variant=variant, queries=queries).total


def rocketqav2(**keywords: Any) -> Loss:
    return lambda z, s, queries=None: losses.rocketqav2(z, s, queries=queries, **keywords).total


MEANS: dict[str, Loss] = {
    "ar2 paper": ar2("paper"),
    "ar2 mean": ar2("mean"),
    "rocketqav2 official": rocketqav2(variant="official"),
    "rocketqav2 query mean": rocketqav2(
        variant="custom", kl_direction="de_ce", detach_teacher=False, kl_reduction="query_mean"
    ),
    "list_softmax": lambda z, s, queries=None: losses.list_softmax(s, queries=queries) + 0 * z.sum(),
}
"""Losses that do not see the size of the batch."""

SUMS: dict[str, Loss] = {
    "ar2 official": ar2("official"),
    "rocketqav2 paper": rocketqav2(variant="paper"),
}
"""Losses with a part that is a sum over queries."""

LISTWISE = MEANS | SUMS
EVERY = LISTWISE | {"rocketqav2 pointwise": rocketqav2(variant="official", supervised="pointwise")}


def every(table: dict[str, Loss]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("loss", table.values(), ids=table.keys())


@st.composite
def pairs(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Retriever's and ranker's scores of 1 to 4 lists of 2 to 6 passages."""
    shape = draw(st.integers(1, 4)), draw(st.integers(2, 6))
    numbers = hnp.arrays(np.float64, shape, elements=st.floats(-30, 30))
    return torch.from_numpy(draw(numbers)), torch.from_numpy(draw(numbers))


def with_gradients(loss: Loss, z: Tensor, s: Tensor, queries: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    z, s = z.clone().requires_grad_(), s.clone().requires_grad_()
    value = loss(z, s, queries=queries)
    to_z, to_s = torch.autograd.grad(value, (z, s), allow_unused=True, materialize_grads=True)
    return value.detach(), to_z, to_s


def assert_same(got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> None:
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@every(LISTWISE)
@quick
@given(scores=pairs(), seed=st.integers(0, 9))
def test_a_constant_added_to_a_row_changes_nothing(loss: Loss, scores: tuple[Tensor, Tensor], seed: int) -> None:
    z, s = scores
    shift = torch.randn((2, len(z), 1), generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 10
    assert_same(with_gradients(loss, z + shift[0], s + shift[1]), with_gradients(loss, z, s))


@every(LISTWISE)
@quick
@given(scores=pairs())
def test_rows_of_every_gradient_sum_to_zero(loss: Loss, scores: tuple[Tensor, Tensor]) -> None:
    _, to_z, to_s = with_gradients(loss, *scores)
    for gradient in (to_z, to_s):
        torch.testing.assert_close(
            gradient.sum(dim=1), torch.zeros(len(gradient), dtype=torch.float64), atol=1e-9, rtol=0
        )


@every(EVERY)
@quick
@given(scores=pairs(), seed=st.integers(0, 9))
def test_negatives_have_no_order(loss: Loss, scores: tuple[Tensor, Tensor], seed: int) -> None:
    z, s = scores
    shuffled = torch.randperm(z.shape[1] - 1, generator=torch.Generator().manual_seed(seed)) + 1
    order = torch.cat([torch.zeros(1, dtype=torch.int64), shuffled])
    value, to_z, to_s = with_gradients(loss, z, s)
    assert_same(with_gradients(loss, z[:, order], s[:, order]), (value, to_z[:, order], to_s[:, order]))


@every(EVERY)
@quick
@given(scores=pairs(), cut=st.integers(0, 4))
def test_micro_batches_add_up(loss: Loss, scores: tuple[Tensor, Tensor], cut: int) -> None:
    """Any split, an empty share included: values add up and gradients are the rows of the whole batch's."""
    z, s = scores
    cut = min(cut, len(z))
    first = with_gradients(loss, z[:cut], s[:cut], queries=len(z))
    second = with_gradients(loss, z[cut:], s[cut:], queries=len(z))
    joined = first[0] + second[0], torch.cat([first[1], second[1]]), torch.cat([first[2], second[2]])
    assert_same(joined, with_gradients(loss, z, s))


@every(MEANS)
@quick
@given(scores=pairs())
def test_a_batch_twice_is_the_same_mean(loss: Loss, scores: tuple[Tensor, Tensor]) -> None:
    z, s = scores
    torch.testing.assert_close(loss(torch.cat([z, z]), torch.cat([s, s])), loss(z, s), rtol=1e-9, atol=1e-9)


@quick
@given(scores=pairs())
def test_a_batch_twice_doubles_the_sums(scores: tuple[Tensor, Tensor]) -> None:
    z, s = scores
    zz, ss = torch.cat([z, z]), torch.cat([s, s])
    assert_same((adversarial(zz, ss, "official"),), (2 * adversarial(z, s, "official"),))
    once, twice = (losses.rocketqav2(*pair, variant="paper").parts for pair in ((z, s), (zz, ss)))
    assert_same((twice["kl"], twice["supervised"]), (2 * once["kl"], once["supervised"]))


@quick
@given(scores=pairs())
def test_bounds(scores: tuple[Tensor, Tensor]) -> None:
    """Rewards and the paper's J are at most 0, divergences at least 0; the ln n bound holds for the entropy."""
    z, s = scores
    reward = losses.reward(s)
    assert bool((reward <= 0).all())
    assert reward[:, 1:].min() - 1e-12 <= adversarial(z, s, "paper") <= 0
    assert adversarial(z, s, "mean") >= 0
    for variant in ("paper", "official"):
        assert losses.static(z, s, variant=variant).total >= -1e-12
        assert losses.static(z, z, variant=variant).total.item() == pytest.approx(0, abs=1e-12)
    watched = losses.diagnostics(z, s)
    assert -1e-12 <= watched["retriever_entropy"] <= np.log(z.shape[1]) + 1e-12
    assert all(0 <= watched[f"{model}_prefers_negative"] <= 1 for model in ("retriever", "ranker"))


@quick
@given(scores=pairs())
def test_diagnostics_of_micro_batches_add_up(scores: tuple[Tensor, Tensor]) -> None:
    z, s = scores
    parts = [losses.diagnostics(z[q : q + 1], s[q : q + 1], queries=len(z)) for q in range(len(z))]
    for name, value in losses.diagnostics(z, s).items():
        torch.testing.assert_close(torch.stack([part[name] for part in parts]).sum(), value)


@st.composite
def batches(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor]:
    """Groups of P columns (repeats and padding among them), known positives of B queries, labelled columns."""
    columns, queries, known = draw(st.integers(1, 8)), draw(st.integers(1, 4)), draw(st.integers(0, 3))
    groups = draw(st.lists(st.integers(-1, 5), min_size=columns, max_size=columns))
    positives = draw(hnp.arrays(np.int64, (queries, known), elements=st.integers(-1, 6)))
    labels = draw(st.lists(st.integers(0, columns - 1), min_size=queries, max_size=queries))
    for label in labels:
        groups[label] = max(groups[label], 0)
    return torch.tensor(groups), torch.from_numpy(positives), torch.tensor(labels)


@quick
@given(batch=batches())
def test_known_positive_mask_says_what_its_words_say(batch: tuple[Tensor, Tensor, Tensor]) -> None:
    """Column by column in plain Python."""
    groups, positive_groups, positive = batch
    got = losses.known_positive_mask(groups, positive_groups, positive)
    texts = groups.tolist()
    for q, label in enumerate(positive.tolist()):
        known = {texts[label], *(g for g in positive_groups[q].tolist() if g >= 0)}
        want = [j != label and (g < 0 or g in known or g in texts[:j]) for j, g in enumerate(texts)]
        assert got[q].tolist() == want


@quick
@given(batch=batches(), seed=st.integers(0, 9))
def test_in_batch_with_a_mask_is_the_batch_without_those_columns(
    batch: tuple[Tensor, Tensor, Tensor], seed: int
) -> None:
    groups, positive_groups, positive = batch
    masked = losses.known_positive_mask(groups, positive_groups, positive)
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(masked.shape, generator=generator, dtype=torch.float64, requires_grad=True)
    loss = losses.in_batch(scores, positive, masked)
    rows = []
    for q, label in enumerate(positive.tolist()):
        kept = [j for j in range(len(groups)) if j == label or not masked[q, j]]
        rows.append(scores[q, kept].logsumexp(0) - scores[q, label])
    torch.testing.assert_close(loss, torch.stack(rows).mean())
    (gradient,) = torch.autograd.grad(loss, scores)
    assert bool((gradient[masked] == 0).all())
