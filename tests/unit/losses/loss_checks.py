"""One list of cases for the real losses and for their mutants: what is called, and what the oracle says."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import loss_oracle as oracle
import numpy as np
import pytest
import torch
from torch import Tensor

Losses = Any
"""Anything that has the losses as attributes: the package's or a mutant's."""


class Case(NamedTuple):
    """A loss with its options. ``stops``: a part of it stops at the ranker, so its gradient there is no slope."""

    name: str
    call: Callable[[Losses, Tensor, Tensor], Tensor]
    expect: Callable[[np.ndarray, np.ndarray], oracle.Expected]
    stops: bool = False


def scores(seed: int = 0, queries: int = 3, passages: int = 5) -> tuple[np.ndarray, np.ndarray]:
    """Retriever's and ranker's scores, [B, n] each, float64; the second retriever row has a wide gap (17)."""
    generator = np.random.default_rng(seed)
    z, s = generator.normal(size=(2, queries, passages)) * 2
    z[1, 0] = z[1].max() + 17
    return z, s


VALID = np.array([[1, 1, 1, 1, 1], [1, 0, 1, 0, 1], [1, 1, 0, 0, 0]], bool)
POSITIVE = np.array([2, 0, 4])
MASKED = np.array([[0, 1, 1, 0, 0], [1, 0, 0, 0, 1], [0, 0, 0, 0, 0]], bool)


def ar2_cases() -> Iterator[Case]:
    settings = [(0.5, 1.0, None), (0.0, 2.0, None), (1.0, 1.0, 7), (0.3, 0.5, 7)]
    for variant, (weight, tau, queries) in product(("paper", "official", "mean"), settings):
        keywords: dict[str, Any] = {"adv_lambda": weight, "variant": variant, "temperature": tau, "queries": queries}
        yield Case(f"ar2 {keywords}", partial(_total, "ar2", keywords), partial(oracle.ar2, **keywords))


def kl_cases() -> Iterator[Case]:
    for direction, detach, reduction, queries in product(
        ("de_ce", "ce_de"), (False, True), ("sum", "query_mean", "element_mean"), (None, 7)
    ):
        keywords = {
            "variant": "custom",
            "kl_direction": direction,
            "detach_teacher": detach,
            "kl_reduction": reduction,
            "supervised": "none",
            "queries": queries,
        }
        expect = partial(oracle.kl, direction=direction, detach=detach, reduction=reduction, queries=queries)
        yield Case(f"kl {keywords}", partial(_total, "rocketqav2", keywords), expect)


def rocketqav2_cases() -> Iterator[Case]:
    kinds = {"paper": ("de_ce", False, "sum"), "official": ("ce_de", True, "element_mean")}
    for (variant, kind), supervised, queries in product(kinds.items(), ("listwise", "pointwise", "none"), (None, 7)):
        keywords = {"variant": variant, "supervised": supervised, "queries": queries}
        expect = partial(_joint, kind, supervised, queries)
        call = partial(_total, "rocketqav2", keywords)
        yield Case(f"rocketqav2 {keywords}", call, expect, stops=variant == "official")
    for variant, (direction, _, reduction) in kinds.items():
        expect = partial(oracle.kl, direction=direction, detach=True, reduction=reduction)
        yield Case(f"static {variant}", partial(_total, "static", {"variant": variant}), expect)
    keywords = {"variant": "custom", "kl_direction": "ce_de", "kl_reduction": "query_mean", "queries": 7}
    expect = partial(oracle.kl, direction="ce_de", detach=True, reduction="query_mean", queries=7)
    yield Case("static custom", partial(_total, "static", keywords), expect)


def contrastive_cases() -> Iterator[Case]:
    valid, positive, masked = torch.from_numpy(VALID), torch.from_numpy(POSITIVE), torch.from_numpy(MASKED)
    for queries in (None, 7):
        keywords: dict[str, Any] = {"queries": queries}
        yield Case(
            f"list_softmax {queries}",
            partial(_ranker_only, {}, keywords),
            partial(_oracle_list_softmax, None, queries),
        )
        yield Case(
            f"list_softmax valid {queries}",
            partial(_ranker_only, {"valid": valid}, keywords),
            partial(_oracle_list_softmax, VALID, queries),
        )
        yield Case(
            f"in_batch {queries}",
            partial(_retriever_only, {"positive": positive, "masked": masked}, keywords),
            partial(_oracle_in_batch, queries),
        )


def _ranker_only(tensors: dict[str, Tensor], keywords: dict[str, Any], losses: Losses, _: Tensor, s: Tensor) -> Tensor:
    loss: Tensor = losses.list_softmax(s, **tensors, **keywords)
    return loss


def _retriever_only(
    tensors: dict[str, Tensor], keywords: dict[str, Any], losses: Losses, z: Tensor, _: Tensor
) -> Tensor:
    loss: Tensor = losses.in_batch(z, **tensors, **keywords)
    return loss


def _oracle_list_softmax(
    valid: np.ndarray | None, queries: int | None, _: np.ndarray, s: np.ndarray
) -> oracle.Expected:
    return oracle.list_softmax(s, valid, queries)


def _oracle_in_batch(queries: int | None, z: np.ndarray, _: np.ndarray) -> oracle.Expected:
    return oracle.in_batch(z, POSITIVE, MASKED, queries)


def _total(function: str, keywords: dict[str, Any], losses: Losses, z: Tensor, s: Tensor) -> Tensor:
    terms = getattr(losses, function)(z, s, **keywords)
    assert not any(part.requires_grad for part in terms.parts.values()), "parts are for the log: detached"
    total: Tensor = terms.total
    return total


def _joint(
    kind: tuple[str, bool, str], supervised: str, queries: int | None, z: np.ndarray, s: np.ndarray
) -> oracle.Expected:
    divergence = oracle.kl(z, s, *kind, queries)
    if supervised == "none":
        return divergence
    labelled = oracle.list_softmax(s, None, queries) if supervised == "listwise" else oracle.pointwise(s, queries)
    return divergence + labelled


CASES = [*ar2_cases(), *kl_cases(), *rocketqav2_cases(), *contrastive_cases()]


def evaluate(losses: Losses, case: Case, z: Tensor, s: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The loss and its gradients to both models' scores (None: not connected)."""
    z, s = z.clone().requires_grad_(), s.clone().requires_grad_()
    value = case.call(losses, z, s)
    to_retriever, to_ranker = torch.autograd.grad(value, (z, s), allow_unused=True)
    return value.detach(), to_retriever, to_ranker


def check_case(losses: Losses, case: Case) -> None:
    """Value and both gradients against the oracle in float64, which also demands that float64 stays float64."""
    for seed in (0, 1):
        z, s = scores(seed)
        expected = case.expect(z, s)
        value, to_retriever, to_ranker = evaluate(losses, case, torch.from_numpy(z), torch.from_numpy(s))
        np.testing.assert_allclose(value.numpy(), expected.value, rtol=1e-11, atol=1e-12, err_msg=case.name)
        for got, want in ((to_retriever, expected.retriever), (to_ranker, expected.ranker)):
            assert (got is None) == (want is None), f"{case.name}: a gradient that should stop, or the reverse"
            if got is not None and want is not None:
                np.testing.assert_allclose(got.numpy(), want, rtol=1e-9, atol=1e-12, err_msg=case.name)


def check_narrow(losses: Losses, case: Case) -> None:
    """bfloat16 scores under bfloat16 autocast give the loss of the same numbers in float32."""
    z, s = (torch.from_numpy(x).bfloat16() for x in scores())
    expected = case.expect(z.double().numpy(), s.double().numpy())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value, *_ = evaluate(losses, case, z, s)
    assert value.dtype == torch.float32, case.name
    np.testing.assert_allclose(value.numpy(), expected.value, rtol=2e-5, atol=1e-5, err_msg=case.name)


def check_parts(losses: Losses) -> None:
    """The logged parts are the terms before their weights, under their names."""
    z, s = scores()
    tz, ts = torch.from_numpy(z), torch.from_numpy(s)
    parts = losses.ar2(tz, ts, adv_lambda=0.25, variant="mean", temperature=2.0).parts
    want = {
        "adversarial": oracle.adversarial(z, s, "mean").value,
        "distillation": oracle.distillation(z, s, "mean", 2.0).value,
    }
    assert {k: v.item() for k, v in parts.items()} == _close(want)
    parts = losses.rocketqav2(tz, ts, variant="official").parts
    want = {"kl": oracle.kl(z, s, "ce_de", True, "element_mean").value, "supervised": oracle.list_softmax(s).value}
    assert {k: v.item() for k, v in parts.items()} == _close(want)
    assert set(losses.static(tz, ts).parts) == {"kl"}


def check_diagnostics(losses: Losses) -> None:
    for seed, queries in ((0, None), (1, 7)):
        z, s = scores(seed, queries=4)
        z[0, 1:], s[1, 1:] = z[0, 0] - 1, s[1, 0] - 1
        z[2, 1:], s[2, 1:] = z[2, 0], s[2, 0]  # a tie is no preference
        got = losses.diagnostics(torch.from_numpy(z).requires_grad_(), torch.from_numpy(s), queries)
        assert not any(value.requires_grad for value in got.values())
        assert {k: v.item() for k, v in got.items()} == _close(oracle.diagnostics(z, s, queries))


def check_mask(losses: Losses) -> None:
    """Hand-made: columns 0 and 3 share a text, column 4 is another known positive of query 0, column 5 is padding.

    Query 0 is labelled 0, query 1 is labelled 3 (the repeat), query 2 is labelled 1 and knows group 12 as well.
    """
    groups = torch.tensor([10, 11, 12, 10, 13, -1])
    positive_groups = torch.tensor([[10, 13], [-1, -1], [11, 12]])
    got = losses.known_positive_mask(groups, positive_groups, torch.tensor([0, 3, 1]))
    want = [[0, 0, 0, 1, 1, 1], [1, 0, 0, 0, 0, 1], [0, 0, 1, 1, 0, 1]]
    assert got.tolist() == [[bool(x) for x in row] for row in want]


def check_all(losses: Losses) -> None:
    """Everything that a mutant must not survive."""
    check_mask(losses)
    check_diagnostics(losses)
    check_parts(losses)
    for case in CASES:
        check_case(losses, case)
        check_narrow(losses, case)


def _close(want: dict[str, float]) -> Any:
    return pytest.approx(want, rel=1e-11, abs=1e-12)
