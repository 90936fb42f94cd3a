"""Each thing that can go wrong in numbers is named, and what is in order is not."""

from __future__ import annotations

import logging

import numpy as np
import pytest

from sparring.log import Metrics
from sparring.phases.pools import Pools
from sparring.recipes.experiment import require_generation
from sparring.recipes.watch import Watch, spread_of
from sparring.types import InputError

RNG = np.random.default_rng(0)


def pools(sizes: list[int], score: float = 1.0, generation: str = "1") -> Pools:
    """Lists of these sizes, with scores up to ``score``."""
    total = sum(sizes)
    return Pools(
        np.arange(len(sizes)), np.arange(len(sizes)), np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64),
        np.arange(total), np.linspace(0, score, total, dtype=np.float32), np.ones(len(sizes), np.float32), generation,
    )  # fmt: skip


@pytest.fixture
def watch() -> Watch:
    return Watch(Metrics(None))


def names(watch: Watch) -> list[str]:
    return [record["name"] for record in watch.metrics.records if record["kind"] == "warning"]


def vectors(spread: float, count: int = 500) -> np.ndarray:
    """Unit vectors around one direction: of their squared length about ``spread`` lies off their mean."""
    off = RNG.standard_normal((count, 16)) * np.sqrt(spread / (1 - spread) / 16)
    points = off + np.eye(16)[0]
    return (points / np.linalg.norm(points, axis=1, keepdims=True)).astype(np.float32)


def test_the_spread_is_one_minus_the_mean_cosine() -> None:
    unit = vectors(0.3, 40)
    cosines = unit.astype(np.float64) @ unit.T.astype(np.float64)
    assert spread_of(unit) == pytest.approx(1 - cosines.mean(), abs=1e-7)
    assert spread_of(np.ones((5, 3), np.float32)) == pytest.approx(0, abs=1e-12)
    assert spread_of(np.zeros((5, 3), np.float32)) == 0
    assert spread_of(np.eye(4, dtype=np.float32)) == pytest.approx(0.75)


def test_nothing_is_said_about_what_is_in_order(watch: Watch, caplog: pytest.LogCaptureFixture) -> None:
    """Anisotropic embeddings as of real encoders, unequal scores, lists with negatives, moving losses."""
    for generation, spread in (("zero-shot", 0.02), ("warm", 0.3), ("1", 0.9)):
        watch.retriever(generation, vectors(spread), pools([3, 4], 20), ["a", "b"])
        watch.ranker(generation, np.repeat([0, 1], 5), RNG.standard_normal(10))
    for step in range(6):
        watch.metrics.write("step", phase="1-ranker", step=step, ranker_supervised=1.3 - 1e-4 * step, reward=0.5)
    watch.losses("1-ranker")
    assert names(watch) == []
    assert not caplog.records


def test_collapsed_embeddings(watch: Watch, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "sparring"):
        watch.retriever("2", vectors(1e-5), pools([3, 4]), ["a", "b"])
    assert names(watch) == ["collapsed embeddings"]
    assert "2: the embeddings are collapsed" in caplog.text
    assert watch.warnings()[0].startswith("2: the embeddings are collapsed")


@pytest.mark.parametrize(
    ("scores", "explodes"),
    [([20, 20, 99], False), ([20, 20, 250], True), ([150, 900, 1400], False), ([150, 1600], True), ([2e4], True)],
)
def test_exploding_scores(scores: list[float], explodes: bool, watch: Watch) -> None:
    for number, score in enumerate(scores):
        watch.retriever(str(number), vectors(0.5), pools([3, 4], score), ["a", "b"])
        watch.ranker(str(number), np.repeat([0, 1], 5), np.append(RNG.uniform(-score, score, 9), score))
    assert (names(watch) == ["exploding scores"] * 2) is explodes
    assert (names(watch) == []) is not explodes


@pytest.mark.parametrize("of_query", [[0.0, 0.0], [-3.0, 8.0]])
def test_a_constant_ranker(of_query: list[float], watch: Watch) -> None:
    """Also one whose score depends on the query alone."""
    watch.ranker("round 1", np.repeat([4, 2], 6), np.repeat(of_query, 6) + 1e-5 * RNG.standard_normal(12))
    assert names(watch) == ["constant ranker"]


def test_a_query_with_one_candidate_says_nothing_about_the_ranker(watch: Watch) -> None:
    watch.ranker("round 1", np.array([0, 1, 2, 2]), np.array([1.0, 1.0, 0.0, 2.0]))
    watch.ranker("round 1", np.array([0, 1]), np.array([1.0, 1.0]))
    assert names(watch) == []


def test_empty_pools(watch: Watch) -> None:
    watch.retriever("1", vectors(0.5), pools([3, 0, 4]), ["a", "b", "c"])
    assert names(watch) == ["empty pools"]
    assert "1 of 3 lists" in watch.warnings()[0]
    assert "those of b" in watch.warnings()[0]
    watch.empty("1-denoise", pools([0, 3, 1]), ["a", "b", "c"])
    assert len(names(watch)) == 1, "denoising may empty some"
    watch.empty("1-denoise", pools([0, 0, 1]), ["a", "b", "c"])
    assert len(names(watch)) == 2


@pytest.mark.parametrize(
    ("values", "unmoved"), [([1.386294] * 5, True), ([1.386294] * 4, False), ([1.386294] * 4 + [1.3864], False)]
)
def test_an_unmoved_loss(values: list[float], unmoved: bool, watch: Watch) -> None:
    for step, value in enumerate(values):
        watch.metrics.write("step", phase="1-ranker", step=step, ranker_supervised=value, reward=0.5)
        watch.metrics.write("step", phase="1-retriever", step=step, distillation=float(step), reward=0.5)
    watch.losses("1-ranker")
    watch.losses("1-retriever")
    assert names(watch) == (["unmoved loss"] if unmoved else [])


@pytest.mark.parametrize(
    ("generation", "expected"), [("1", "1"), ("warm denoised", "warm"), ("warm+warm denoised", "warm")]
)
def test_lists_of_the_generation_that_the_recipe_says_are_taken(generation: str, expected: str) -> None:
    require_generation("2-ranker", pools([3], generation=generation), expected)


@pytest.mark.parametrize(("generation", "expected"), [("warm", "1"), ("1", "2"), ("1+2 denoised", "2"), ("", "warm")])
def test_lists_of_another_generation_are_refused(generation: str, expected: str) -> None:
    with pytest.raises(InputError) as error:
        require_generation("2-ranker", pools([3], generation=generation), expected)
    assert "phase 2-ranker" in error.value.where
    assert repr(expected) in error.value.expected
    assert all(part.removesuffix(" denoised") in error.value.got for part in generation.split("+"))
