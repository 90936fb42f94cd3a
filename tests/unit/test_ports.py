"""The ports that `make bench` times: what they run, and that they compute what the released code does and ours does."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import ar2_step
import joint_step
from fit_fixtures import Pair, draw, load_pair
from material import without_dropout
from ports import Lengths, compare

LENGTHS = Lengths(query=20, passage=24, pair=44)
KINDS = ["retriever", "ranker", "joint"]


@pytest.fixture(scope="module")
def pair(tiny_st: Path, tiny_ce: Path) -> Pair:
    """With dropout; the ranker's head is larger, so that its scores differ from each other."""
    made = load_pair(tiny_st, tiny_ce, dropout=True)
    with torch.no_grad():
        made.ranker.get_submodule("model.0.model.classifier").weight.mul_(20)
    return made


def parts(pair: Pair) -> tuple[Any, Any, Any]:
    return copy.deepcopy(pair.retriever), copy.deepcopy(pair.ranker), pair.feed


def sides(kind: Any, pair: Pair, lengths: Lengths | None = LENGTHS) -> tuple[Any, Any]:
    """Ours and the port, in fp32."""
    if kind == "joint":
        return joint_step.our_side(*parts(pair), "fp32"), joint_step.Port(*parts(pair), lengths, "fp32")  # type: ignore[arg-type]
    return ar2_step.our_side(kind, *parts(pair), "fp32"), ar2_step.Port(kind, *parts(pair), lengths, "fp32")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lengths", [LENGTHS, None])
def test_a_port_has_our_loss_and_gradient(kind: str, lengths: Lengths | None, pair: Pair) -> None:
    assert max(compare(*sides(kind, pair, lengths), draw(0, 4))) < 1e-4


def released(z: np.ndarray, s: np.ndarray) -> float:
    """By hand in float64: lambda sum r log(p + e) - (1 - lambda) mean t log(p + e), r = log(sigma(s_0 - s_i) + e)."""
    total = 0.0
    for own, teacher in zip(z, s, strict=True):
        p, t = np.exp(own) / np.exp(own).sum(), np.exp(teacher) / np.exp(teacher).sum()
        beaten = np.exp(teacher[0]) / (np.exp(teacher[0]) + np.exp(teacher))
        total += 0.5 * np.log(beaten + 1e-7) @ np.log(p + 1e-7) - 0.5 * t @ np.log(p + 1e-7) / len(z)
    return total


def test_the_loss_of_the_retrievers_update_is_the_released_one(pair: Pair) -> None:
    _, port = sides("retriever", pair)
    port.retriever.eval()
    port.ranker.eval()
    z, s = (scores.detach().double().numpy() for scores in port.scores(*draw(1, 4)))
    assert min(np.ptp(z, axis=1).mean(), np.ptp(s, axis=1).mean()) > 0.2
    assert float(port.loss(*draw(1, 4)).detach()) == pytest.approx(released(z, s), rel=1e-6)


def test_the_loss_of_the_rankers_update_is_the_released_one(pair: Pair) -> None:
    _, port = sides("ranker", pair)
    port.ranker.eval()
    z, s = port.scores(*draw(1, 4))
    assert z is None
    s = s.detach().double().numpy()
    expected = np.mean([np.log(np.exp(row).sum()) - row[0] for row in s])
    assert float(port.loss(*draw(1, 4)).detach()) == pytest.approx(expected, rel=1e-6)


def test_the_golden_value_of_the_method_notes_and_scores_where_the_epsilon_tells() -> None:
    z, s = np.array([[2, 1, 0.5, 0], [0, 1, -1, 2]]), np.array([[3, 1, 2, -1], [1, 2, 0, -2.0]])
    assert released(z, s) == pytest.approx(3.689211, abs=1e-5)
    for own, teacher in ((z, s), (np.array([[40, 20, 0, 0.0]]), np.array([[0, 1, 3, 30.0]]))):
        loss = float(ar2_step.retriever_loss(torch.from_numpy(own), torch.from_numpy(teacher)))
        assert loss == pytest.approx(released(own, teacher), rel=1e-12)


@pytest.mark.parametrize("kind", KINDS[:2])
def test_an_update_moves_one_model_as_ours_does_and_leaves_the_other(kind: str, pair: Pair) -> None:
    moved = {}
    for name, side in zip(("ours", "port"), sides(kind, pair), strict=True):
        without_dropout(side.retriever, side.ranker)
        side.step(*draw(2, 4))
        changes = {}
        for model, before in (("retriever", pair.retriever), ("ranker", pair.ranker)):
            weights = zip(getattr(side, model).parameters(), before.parameters(), strict=True)
            changes[model] = torch.cat([(a - b).detach().reshape(-1) for a, b in weights])
        moved[name] = changes
    other = "ranker" if kind == "retriever" else "retriever"
    assert not any(changes[other].any() for changes in moved.values())
    ours, port = moved["ours"][kind], moved["port"][kind]
    assert float(port.abs().max()) == pytest.approx(1e-5, rel=0.05)  # AdamW's first step is the rate
    assert float(((ours - port).abs() < 1e-7).float().mean()) > 0.99


def noted(side: Any, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Filled by every forward: shape of its tokens, whether the model is in training mode, whether gradients are on."""
    ran: list[Any] = []

    def noting(model: Any, run: Any) -> Any:
        def run_and_note(inputs: Any, *rest: Any) -> Any:
            ran.append((tuple(inputs["input_ids"].shape), model.training, torch.is_grad_enabled()))
            return run(inputs, *rest)

        return run_and_note

    monkeypatch.setattr(side.retriever, "embed", noting(side.retriever, side.retriever.embed))
    monkeypatch.setattr(side.ranker, "logits", noting(side.ranker, side.ranker.logits))
    return ran


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_port_runs(kind: str, pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each pair in one batch at the fixed length; AR2 encodes a query once, RocketQAv2 once per passage."""
    _, port = sides(kind, pair)
    ran = noted(port, monkeypatch)
    port.step(*draw(3, 4))
    expected = {
        "retriever": [((4, 20), True, True), ((16, 24), True, True), ((16, 44), False, False)],
        "ranker": [((16, 44), True, True)],
        "joint": [((16, 20), True, True), ((16, 24), True, True), ((16, 44), True, True)],
    }
    assert sorted(ran) == sorted(expected[kind])


@pytest.mark.parametrize("kind", KINDS)
def test_ours_runs_as_much_in_every_step(kind: str, pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is kept from one timed step to the next, a teacher's scores neither."""
    ours, _ = sides(kind, pair)
    ran, counts = noted(ours, monkeypatch), []
    for _ in range(3):
        ours.step(*draw(3, 4))
        counts.append(sorted(ran))
        ran.clear()
    assert counts[0]
    assert counts[0] == counts[1] == counts[2]
    if kind == "retriever":
        assert any(not training for _, training, _ in counts[0])


def test_what_is_longer_than_its_fixed_length_is_refused(pair: Pair) -> None:
    _, port = sides("retriever", pair, Lengths(query=20, passage=4, pair=44))
    with pytest.raises(SystemExit, match="an input is longer than 4 tokens"):
        port.loss(*draw(0, 4))
