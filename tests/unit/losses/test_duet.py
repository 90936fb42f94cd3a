"""Duet's two steps against float64 NumPy, and which scores their gradient reaches."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sparring.losses import complement, follow

RNG = np.random.default_rng(7)
B, N, P = 3, 4, 12
RETRIEVER, RANKER, EVERYONE = (RNG.normal(0, 2, shape) for shape in ((B, N), (B, N), (B, P)))
POSITIVE = np.array([0, 4, 8])
MASKED = np.zeros((B, P), dtype=bool)
MASKED[0, 5] = MASKED[2, [0, 1]] = True


def log_softmax(scores: np.ndarray) -> np.ndarray:
    found: np.ndarray = scores - np.log(np.exp(scores).sum(axis=1, keepdims=True))
    return found


def tensor(values: np.ndarray, *, grad: bool = False) -> torch.Tensor:
    return torch.from_numpy(values.copy()).requires_grad_(grad)


def following(retriever: torch.Tensor, everyone: torch.Tensor, ranker: torch.Tensor | None, **options: float) -> object:
    return follow(everyone, torch.from_numpy(POSITIVE), torch.from_numpy(MASKED), retriever, ranker, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("fusion", [0.0, 1.0, 2.5])
def test_the_ranker_learns_from_the_sum_while_the_retriever_rests(fusion: float) -> None:
    retriever, ranker = tensor(RETRIEVER, grad=True), tensor(RANKER, grad=True)
    terms = complement(retriever, ranker, fusion=fusion)
    both = log_softmax(RANKER + fusion * RETRIEVER)
    assert terms.total.item() == pytest.approx(-both[:, 0].mean(), abs=1e-12)
    assert terms.parts["complement"].item() == terms.total.item()
    terms.total.backward()
    assert retriever.grad is None
    label = np.eye(N)[np.zeros(B, dtype=int)]
    np.testing.assert_allclose(ranker.grad.numpy(), (np.exp(both) - label) / B, atol=1e-12)  # type: ignore[union-attr]


def test_what_the_retriever_already_knows_leaves_the_ranker_little_to_learn() -> None:
    ranker = tensor(np.zeros((B, N)), grad=True)
    sure = np.zeros((B, N))
    sure[:, 0] = 20
    complement(tensor(sure), ranker, fusion=1.0).total.backward()
    assert ranker.grad.abs().max() < 1e-7  # type: ignore[union-attr]


@pytest.mark.parametrize(("fusion", "teacher"), [(1.0, 0.5), (0.0, 0.3), (2.0, 1.0), (1.0, 0.0)])
def test_the_retriever_follows_the_sum_and_the_label(fusion: float, teacher: float) -> None:
    retriever, everyone, ranker = tensor(RETRIEVER, grad=True), tensor(EVERYONE, grad=True), tensor(RANKER, grad=True)
    terms = following(retriever, everyone, ranker, fusion=fusion, teacher=teacher)
    target, own = log_softmax(RANKER + fusion * RETRIEVER), log_softmax(RETRIEVER)
    kl = (np.exp(target) * (target - own)).sum() / B
    label = -log_softmax(np.where(MASKED, -np.inf, EVERYONE))[np.arange(B), POSITIVE].mean()
    assert terms.total.item() == pytest.approx((1 - teacher) * label + teacher * kl, abs=1e-12)  # type: ignore[attr-defined]
    terms.total.backward()  # type: ignore[attr-defined]
    assert ranker.grad is None
    expected = teacher * (np.exp(own) - np.exp(target)) / B  # no gradient through the target, though it holds s_de
    np.testing.assert_allclose(retriever.grad.numpy() if teacher else 0, expected, atol=1e-12)  # type: ignore[union-attr]
    assert (everyone.grad[torch.from_numpy(MASKED)] == 0).all()  # type: ignore[index]


def test_means_divide_by_the_queries_of_the_whole_batch() -> None:
    retriever, ranker = tensor(RETRIEVER), tensor(RANKER)
    half = complement(retriever, ranker, fusion=1.0, queries=2 * B).total
    assert half.item() == pytest.approx(complement(retriever, ranker, fusion=1.0).total.item() / 2)
    options = {"fusion": 1.0, "teacher": 0.5}
    half = following(retriever, tensor(EVERYONE), ranker, **options, queries=2 * B).total  # type: ignore[attr-defined]
    assert half.item() == pytest.approx(following(retriever, tensor(EVERYONE), ranker, **options).total.item() / 2)  # type: ignore[attr-defined]


def test_a_teacher_without_scores_is_refused() -> None:
    with pytest.raises(ValueError, match="expected the ranker's scores"):
        following(tensor(RETRIEVER), tensor(EVERYONE), None, fusion=1.0, teacher=0.5)
    assert following(tensor(RETRIEVER), tensor(EVERYONE), None, fusion=1.0, teacher=0.0)
