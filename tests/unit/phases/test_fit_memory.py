"""An update for which memory does not suffice is repeated in smaller pieces, with the whole batch's gradient."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from fit_fixtures import STEPS, Pair, draw, load_pair, state
from memory_fixtures import ERRORS, Allocator, little_memory
from sparring.log import Metrics
from sparring.models import Ranker
from sparring.models.memory import Pieces, TooLittleMemory
from sparring.phases.fit import Reached, Scorer, fit

Load = Callable[..., Pair]
WHOLE = Pieces(512, 1, False)


@pytest.fixture(scope="module")
def accelerator() -> Accelerator:
    return Accelerator(cpu=True)


@pytest.fixture(autouse=True)
def chunks_in_turn() -> Iterator[None]:
    """The allocator counts what is held; of chunks side by side it would be a race which one is refused."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def load(tiny_st: Path, tiny_ce: Path) -> Load:
    return lambda dropout=False, token_budget=512: load_pair(
        tiny_st, tiny_ce, dropout=dropout, token_budget=token_budget
    )


class Kept:
    """A `Progress` that remembers what it was told."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, Pieces, bool]] = []
        self.sums: dict[str, float] = {}

    def begun(self) -> Reached:
        return Reached()

    def ended(self, reached: Reached, *, keep: bool = False) -> None:
        assert reached.pieces is not None
        self.calls.append((reached.done, reached.pieces, keep))
        self.sums = dict(reached.sums)


def trained(
    pair: Pair, accelerator: Accelerator, name: str, pieces: Pieces = WHOLE, allocator: Allocator | None = None,
    seed: int | None = 7, **options: Any,
) -> tuple[dict[str, Any], dict[str, float], Scorer]:  # fmt: skip
    """Weights and optimiser states after a few updates, the means, and the scorer."""
    step = STEPS[name]()
    team = pair.team(accelerator)
    scorer = pair.scorer(team, step, gradient_cache=pieces.gradient_cache)
    torch.manual_seed(3)
    with little_memory(allocator or Allocator(10**9)):
        means = fit(team, scorer, step, draw, steps=3, batch=8, accumulate=pieces.accumulate, seed=seed, **options)
    return {f"{n} {k}": v for n, t in team.items() for k, v in state(t).items()}, means, scorer


def assert_same_weights(one: Mapping[str, Any], other: Mapping[str, Any]) -> None:
    """Of weights whose gradient is more than rounding, and of the optimisers' mean gradients.

    AdamW's first step is the learning rate, 1e-3, however small a gradient is: one weight whose gradient was as small
    as AdamW's eps may be a part of that apart, where pieces of a batch are rounded otherwise.
    """
    assert one.keys() == other.keys()
    dead = ("key.bias", "classifier.bias")

    def apart(keys: Iterable[str]) -> torch.Tensor:
        return torch.cat([(one[k].double() - other[k].double()).abs().reshape(-1) for k in keys])

    weights = apart(k for k in one if not k.endswith(dead) and "optimizer" not in k)
    assert int((weights >= 1e-5).sum()) <= 1
    assert float(weights.max()) < 1e-4
    assert float(apart(k for k in one if k.endswith("exp_avg")).max()) < 1e-6


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("name", ["ar2 mean", "rocketqav2 paper", "in-batch"])
def test_the_weights_are_those_of_the_run_that_never_failed(
    name: str, error: Callable[[], Exception], load: Load, accelerator: Accelerator, caplog: pytest.LogCaptureFixture
) -> None:
    expected, means, whole = trained(load(), accelerator, name)
    allocator, metrics, progress = Allocator(150, error), Metrics(None), Kept()
    got, found, scorer = trained(
        load(), accelerator, name, allocator=allocator, metrics=metrics, progressed=progress
    )  # fmt: skip
    assert allocator.refused
    assert_same_weights(got, expected)
    assert found == pytest.approx(means, rel=1e-5, abs=1e-6)
    assert scorer.forwards.to_dict() == whole.forwards.to_dict(), "attempts that failed were counted"
    noted = [record for record in metrics.records if record["kind"] == "memory"]
    assert len(noted) == allocator.refused == sum("too little memory" in r.message for r in caplog.records)
    kept = [(done, pieces) for done, pieces, keep in progress.calls if keep]
    assert [(n["step"], Pieces(n["tokens"], n["accumulate"], n["gradient_cache"])) for n in noted] == kept
    last = kept[-1][1]
    assert last.gradient_cache if name == "in-batch" else last.accumulate > 1
    assert progress.calls[-1] == (3, last, False), "it lasts for the phase"


@pytest.mark.parametrize("error", ERRORS)
def test_with_chunks_side_by_side_too(
    error: Callable[[], Exception], load: Load, accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a thread the same errors are known, and the weights are those of the run that never failed."""
    torch.set_num_threads(2)
    expected, means, _ = trained(load(token_budget=64), accelerator, "rocketqav2 paper", Pieces(64, 1, False))
    real, calls, threads = Ranker.logits, itertools.count(), []

    def refused_once(self: Ranker, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        if next(calls) == 1:
            threads.append(threading.current_thread().name)
            raise error()
        return real(self, inputs)

    monkeypatch.setattr(Ranker, "logits", refused_once)
    metrics = Metrics(None)
    got, found, _ = trained(
        load(token_budget=64), accelerator, "rocketqav2 paper", Pieces(64, 1, False), metrics=metrics
    )  # fmt: skip
    assert threads
    assert "MainThread" not in threads
    assert len([record for record in metrics.records if record["kind"] == "memory"]) == 1
    assert_same_weights(got, expected)
    assert found == pytest.approx(means, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize(
    ("name", "seed"), [("ar2 mean", 7), ("rocketqav2 official", 7), ("in-batch", 7), ("in-batch", None)]
)
def test_the_bits_are_those_of_a_run_in_the_smaller_pieces(
    name: str, seed: int | None, load: Load, accelerator: Accelerator
) -> None:
    """Dropout on: a failed attempt leaves no trace in weights, optimisers, schedules or random numbers."""
    metrics = Metrics(None)
    got, means, _ = trained(
        load(dropout=True), accelerator, name, allocator=Allocator(70), metrics=metrics, seed=seed
    )  # fmt: skip
    noted = [record for record in metrics.records if record["kind"] == "memory"]
    assert noted
    assert {record["step"] for record in noted} == {0}
    last = Pieces(noted[-1]["tokens"], noted[-1]["accumulate"], noted[-1]["gradient_cache"])
    pair = load(dropout=True, token_budget=last.tokens)
    expected, expected_means, _ = trained(pair, accelerator, name, last, seed=seed)
    assert means == expected_means
    assert all(torch.equal(got[key], expected[key]) for key in expected)


def test_when_nothing_is_left_to_halve_it_says_so_and_the_weights_are_untouched(
    load: Load, accelerator: Accelerator
) -> None:
    pair = load()
    before = {name: value.clone() for name, value in pair.retriever.state_dict().items()}
    with pytest.raises(TooLittleMemory) as error:
        trained(pair, accelerator, "ar2 mean", allocator=Allocator(3))
    assert "Pieces(tokens=64, accumulate=8, gradient_cache=True)" in str(error.value)
    assert "gradient_cache=true" in error.value.fix
    assert all(torch.equal(before[name], value) for name, value in pair.retriever.state_dict().items())
    assert all(p.grad is None for p in pair.retriever.parameters())


def test_an_optimiser_without_memory_is_an_error_and_no_repetition(
    load: Load, accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def refuse(*_: Any, **__: Any) -> None:
        calls.append(1)
        raise MemoryError

    monkeypatch.setattr(torch.optim.AdamW, "step", refuse)
    with pytest.raises(TooLittleMemory, match="optimiser"):
        trained(load(), accelerator, "ar2 mean")
    assert len(calls) == 1


def test_other_errors_are_not_caught(load: Load, accelerator: Accelerator) -> None:
    allocator = Allocator(100, lambda: RuntimeError("a shape is wrong"))
    with pytest.raises(RuntimeError, match="a shape is wrong"):
        trained(load(), accelerator, "ar2 mean", allocator=allocator)
    assert allocator.refused == 1


def test_a_phase_goes_on_in_the_pieces_it_stopped_in(load: Load, accelerator: Accelerator) -> None:
    """The whole phase in small pieces, and its second part begun with those that a checkpoint held: the same bits."""
    small = Pieces(64, 2, True)
    expected, means, _ = trained(load(dropout=True, token_budget=64), accelerator, "ar2 mean", small)

    class Stopped(Kept):
        def begun(self) -> Reached:
            return Reached(pieces=small)

    got, found, _ = trained(load(dropout=True), accelerator, "ar2 mean", progressed=Stopped())
    assert found == means
    assert all(torch.equal(got[key], expected[key]) for key in expected)


@pytest.mark.parametrize(
    ("joins", "expected"),
    [
        (False, [(256, 2, False), (128, 4, False), (64, 6, False), (64, 6, True)]),
        (True, [(256, 1, True), (128, 1, True), (64, 1, True)]),
    ],
)
def test_the_order_of_the_pieces(joins: bool, expected: list[tuple[int, int, bool]]) -> None:
    found, pieces = [], WHOLE.smaller(joins, 6)
    while pieces is not None:
        found.append((pieces.tokens, pieces.accumulate, pieces.gradient_cache))
        pieces = pieces.smaller(joins, 6)
    assert found == expected
