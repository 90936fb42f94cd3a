"""A resting model's scores, made ahead: the same numbers, each pair once, also after a stop."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from fit_fixtures import PASSAGES, STEPS, Pair, assert_close, draw, load_pair, state
from sparring.phases import fit as loop
from sparring.phases.checkpoint import Checkpoint
from sparring.phases.fit import Reached, Scorer, Step, fit
from sparring.phases.teacher import TeacherScores
from sparring.recipes.controls import FrozenTeacherConfig, distillation_step
from sparring.recipes.duet import DuetConfig
from sparring.recipes.duet import ranker_step as duet_ranker
from sparring.recipes.duet import retriever_step as duet_retriever

TAUGHT: dict[str, Callable[[], Step]] = {
    "ar2 mean": STEPS["ar2 mean"],
    "frozen teacher": lambda: distillation_step(FrozenTeacherConfig()),
    "duet ranker": lambda: duet_ranker(DuetConfig()),
    "duet retriever": lambda: duet_retriever(DuetConfig()),
}
STEPS_RUN, BATCH = 5, 8


@pytest.fixture(scope="module")
def accelerator() -> Accelerator:
    return Accelerator(cpu=True)


@pytest.fixture
def load(tiny_st: Path, tiny_ce: Path) -> Callable[[], Pair]:
    return lambda: load_pair(tiny_st, tiny_ce, dropout=True)


def pairs(first: int, last: int) -> set[tuple[int, int]]:
    """Distinct pairs of these updates."""
    found = set()
    for number in range(first, last):
        queries, passages = draw(number, BATCH)
        found |= {(int(q), int(p)) for q, row in zip(queries, passages, strict=True) for p in row}
    return found


def watched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Every pair that a teacher scores from now on."""
    told: list[tuple[int, int]] = []
    real = Scorer._score_shared

    def note(self: Scorer, name: Any, queries: np.ndarray, passages: np.ndarray) -> np.ndarray:
        told.extend(zip(queries.tolist(), passages.tolist(), strict=True))
        return real(self, name, queries, passages)

    monkeypatch.setattr(Scorer, "_score_shared", note)
    return told


def test_scores_are_found_again_and_nothing_else_is() -> None:
    rng, known, expected = np.random.default_rng(0), TeacherScores(50), {}
    for _ in range(6):
        lists = rng.integers(0, 20, 4), rng.integers(0, 50, (4, 6))
        missing = known.missing(lambda _, lists=lists: lists, 0, 1, 10**6)  # type: ignore[misc]
        asked = {(int(q), int(p)) for q, row in zip(*lists, strict=True) for p in row}
        rows = list(zip(*(x.tolist() for x in known.pairs(missing)), strict=True))
        assert set(rows) == asked - expected.keys()
        assert len(rows) == len(set(rows))
        values = rng.standard_normal(len(missing)).astype(np.float32)
        known.add(missing, values)
        expected |= dict(zip(rows, values.tolist(), strict=True))
        by_hand = [[expected[int(q), int(p)] for p in row] for q, row in zip(*lists, strict=True)]
        np.testing.assert_array_equal(known.of(*lists), np.array(by_hand, np.float32))
    assert len(known) == len(expected)
    for unknown in (np.array([[49]]), np.array([[0]])):
        with pytest.raises(KeyError, match="not asked for"):
            TeacherScores(50, known.keys[1:-1], known.scores[1:-1]).of(np.array([25]), unknown)


def test_a_lookup_costs_as_much_as_the_lists_and_not_as_what_is_known() -> None:
    """Sorting what is known again, 3 million pairs, takes seconds."""
    known = TeacherScores(10**6, np.arange(0, 6_000_000, 2), np.zeros(3_000_000, np.float32))
    lists = np.arange(64), np.tile(np.arange(16), (64, 1))
    start = time.process_time()
    for _ in range(20):
        known.missing(lambda _: lists, 0, 1, 1)
    assert (time.process_time() - start) / 20 < 0.02


def test_a_model_that_trains_is_no_teacher() -> None:
    with pytest.raises(AssertionError, match="no teacher at rest"):
        Step("both", ("ranker",), STEPS["ar2 mean"]().function, teachers=("ranker",))


def test_how_far_ahead_it_looks() -> None:
    def lists(number: int) -> tuple[np.ndarray, np.ndarray]:
        return np.array([number // 2]), np.array([[0, 1 + number]])  # two updates share a pair

    known = TeacherScores(100)
    assert known.missing(lists, 0, 9, least=1).tolist() == [0, 1]
    assert known.missing(lists, 0, 9, least=3).tolist() == [0, 1, 2]
    assert known.missing(lists, 0, 9, least=4).tolist() == [0, 1, 2, 100, 103]
    assert known.missing(lists, 7, 9, least=99).tolist() == [300, 308, 400, 409]
    known.add(np.array([0, 1]), np.zeros(2))
    assert not len(known.missing(lists, 0, 9, least=99)), "nothing is done ahead before something is needed"


@pytest.mark.parametrize("name", TAUGHT)
def test_training_is_that_of_scores_made_in_every_update(
    name: str, load: Callable[[], Pair], accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against the model itself, asked in each update for that update's lists: gradients' means agree and counts do."""
    step, found = TAUGHT[name](), {}
    (teacher,) = step.teachers
    assert teacher not in step.trains
    told = watched(monkeypatch)
    for way in ("ahead", "in the update"):
        pair = load()
        team = pair.team(accelerator)
        scorer = pair.scorer(team, step)
        if way == "in the update":
            monkeypatch.setattr(Scorer, "rest", lambda *_: None)
        means = fit(team, scorer, step, draw, steps=STEPS_RUN, batch=BATCH, seed=3)
        moments = {f"{n} {k}": v for n, t in team.items() for k, v in state(t).items() if k.endswith("exp_avg")}
        found[way] = moments, means, scorer.forwards.to_dict()
    assert_close(found["ahead"][0], found["in the update"][0], rtol=1e-4)
    assert found["ahead"][1] == pytest.approx(found["in the update"][1], rel=1e-5, abs=1e-6)
    assert found["ahead"][2] == found["in the update"][2]
    assert found["ahead"][2][f"{teacher}_teacher"] == STEPS_RUN * BATCH * 4
    assert len(told) == len(set(told)), "a pair was scored twice"
    assert set(told) == pairs(0, STEPS_RUN)
    assert not scorer.teachers, "the next phase's teacher is another one"


def test_a_phase_that_goes_on_knows_what_was_scored(
    load: Callable[[], Pair], accelerator: Accelerator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped after each update, with a checkpoint: the bits of a run that was not, and no pair is scored again."""
    monkeypatch.setattr(loop, "AHEAD", 40)  # more than an update's pairs, less than all
    step = TAUGHT["ar2 mean"]()
    whole = load()
    expected = whole.team(accelerator)
    fit(expected, whole.scorer(expected, step), step, draw, steps=STEPS_RUN, batch=BATCH, seed=3)
    told = watched(monkeypatch)

    class Stopped(Exception):
        pass

    class Once:
        """One update a life."""

        def __init__(self, team: Any) -> None:
            self.team, self.store = team, Checkpoint(tmp_path, 0)

        def begun(self) -> Reached:
            facts = self.store.facts()
            if not facts:
                return Reached()
            arrays = self.store.load(self.team)
            known = TeacherScores(len(PASSAGES), arrays["ranker|keys"], arrays["ranker|scores"])
            return Reached(facts["done"], facts["sums"], None, {"ranker": known})

        def ended(self, reached: Reached, *, keep: bool = False) -> None:  # noqa: ARG002
            known = reached.teachers["ranker"]
            arrays = {"ranker|keys": known.keys, "ranker|scores": known.scores}
            self.store.save(self.team, {"done": reached.done, "sums": reached.sums}, arrays)
            if reached.done < STEPS_RUN:
                raise Stopped

    for _ in range(STEPS_RUN):
        pair = load()
        team = pair.team(accelerator)
        try:
            fit(
                team, pair.scorer(team, step), step, draw, steps=STEPS_RUN, batch=BATCH, seed=3, progressed=Once(team)
            )
        except Stopped:
            continue
    for name, trainee in expected.items():
        own = state(team[name])
        assert all(torch.equal(own[key], value) for key, value in state(trainee).items())
    assert len(told) == len(set(told))
    assert set(told) == pairs(0, STEPS_RUN)
