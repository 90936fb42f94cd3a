"""The estimate of a focused refresh against counting everything, and what it must never do."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparring.phases.focus import entered, hidden, missed, outside, union


def brute_lists(queries: np.ndarray, vectors: np.ndarray, k: int) -> np.ndarray:
    """The k best rows of every query by sorting all scores."""
    return np.argsort(-(queries @ vectors.T), axis=1, kind="stable")[:, :k]


def moved(seed: int, passages: int = 200, drift: float = 0.3) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Queries [20, 8], and passages before and after the model moved [N, 8]."""
    rng = np.random.default_rng(seed)
    old = rng.standard_normal((passages, 8)).astype(np.float32)
    new = old + np.float32(drift) * rng.standard_normal(old.shape).astype(np.float32)
    return rng.standard_normal((20, 8)).astype(np.float32), old, new


def closed(queries: np.ndarray, old: np.ndarray, new: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Lists that hold fresh passages alone, and which passages are fresh: what `refocus` reaches."""
    fresh = np.zeros(len(old), dtype=bool)
    fresh[brute_lists(queries, old, k).ravel()] = True
    while True:
        mixed = np.where(fresh[:, None], new, old)
        found = brute_lists(queries, mixed, k)
        if fresh[found].all():
            return found, fresh
        fresh[found.ravel()] = True


def hidden_entries(queries: np.ndarray, new: np.ndarray, found: np.ndarray, fresh: np.ndarray) -> np.ndarray:
    """y_p of every stale passage, one score at a time in float64."""
    exact = queries.astype(np.float64) @ new.astype(np.float64).T
    thresholds = [min(exact[q, p] for p in row) for q, row in enumerate(found)]
    return np.array([sum(exact[q, p] > t for q, t in enumerate(thresholds)) for p in np.flatnonzero(~fresh)])


def test_union_and_outside() -> None:
    rows = union([np.array([[3, -1], [1, 3]]), np.array([5])], 8)
    assert rows.tolist() == [1, 3, 5]
    fresh = np.isin(np.arange(8), rows)
    drawn = outside(fresh, 3, seed=1)
    assert len(set(drawn.tolist())) == 3
    assert not fresh[drawn].any()
    assert drawn.tolist() == outside(fresh, 3, seed=1).tolist()
    assert outside(fresh, 99, seed=1).tolist() == [0, 2, 4, 6, 7]


def test_every_stale_passage_is_drawn_equally_often() -> None:
    fresh = np.isin(np.arange(10), [0, 4])
    drawn = np.concatenate([outside(fresh, 2, seed) for seed in range(4000)])
    share = np.bincount(drawn, minlength=10) / 4000
    assert share[[0, 4]].tolist() == [0, 0]
    assert np.allclose(np.delete(share, [0, 4]), 0.25, atol=0.04)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), k=st.integers(1, 15), drift=st.floats(0, 1))
def test_a_census_counts_what_is_missing(seed: int, k: int, drift: float) -> None:
    queries, old, new = moved(seed, drift=drift)
    found, fresh = closed(queries, old, new, k)
    thresholds = np.take_along_axis(queries @ np.where(fresh[:, None], new, old).T, found, 1)[:, -1]
    counts = entered(queries, thresholds, new[~fresh])
    assert counts.tolist() == hidden_entries(queries, new, found, fresh).tolist()
    estimate = missed(counts, len(counts), found.size)
    truth = hidden(found, brute_lists(queries, new, k))
    assert estimate.share == estimate.upper, "nothing is left to chance"
    assert truth <= estimate.share + 1e-9
    assert (truth == 0) == (estimate.share == 0), "0 exactly where nothing is missing"


def test_the_estimate_is_unbiased_and_its_bound_holds() -> None:
    queries, old, new = moved(5, passages=2000, drift=0.7)
    found, fresh = closed(queries, old, new, 10)
    counts = hidden_entries(queries, new, found, fresh)
    truth = counts.sum() / found.size
    assert (counts > 0).mean() > 0.005, "the case is not trivial"
    rng = np.random.default_rng(0)
    draws = [missed(rng.choice(counts, 150, replace=False), len(counts), found.size) for _ in range(2000)]
    shares = np.array([draw.share for draw in draws])
    assert abs(shares.mean() - truth) < 4 * shares.std() / np.sqrt(len(shares))
    assert np.mean([draw.upper >= truth for draw in draws]) >= 0.95


@pytest.mark.parametrize("busy", [0.001, 0.01, 0.05])
@pytest.mark.parametrize("size", ["one", "geometric"])
def test_the_bound_holds_for_rare_and_common_misses(busy: float, size: str) -> None:
    rng = np.random.default_rng(7)
    counts = (rng.random(20_000) < busy) * (1 if size == "one" else rng.geometric(0.4, 20_000))
    truth = counts.sum() / 50_000
    held = [missed(rng.choice(counts, 500, replace=False), len(counts), 50_000).upper >= truth for _ in range(1000)]
    assert np.mean(held) >= 0.93


@given(counts=st.lists(st.integers(0, 30), min_size=0, max_size=40), more=st.integers(0, 1000))
def test_the_bound_is_above_the_estimate(counts: list[int], more: int) -> None:
    found = missed(np.array(counts, dtype=np.int64), len(counts) + more, 10_000)
    assert found.share >= 0
    assert found.upper >= found.share
    assert found.hits == sum(count > 0 for count in counts)


def test_nothing_stale_nothing_missed_and_no_sample_says_nothing() -> None:
    assert missed(np.empty(0, np.int64), 0, 100).upper == 0
    assert missed(np.empty(0, np.int64), 5, 100).upper == 1
    assert "0 of 3" in str(missed(np.zeros(3, np.int64), 5, 100))


def test_hidden_by_hand() -> None:
    whole = np.array([[1, 2, 3], [4, 5, -1]])
    assert hidden(np.array([[3, 2, 9], [1, 4, 5]]), whole) == pytest.approx(1 / 5)
    assert hidden(whole, whole) == 0
    assert hidden(np.array([[4, 5, 6], [1, 2, 3]]), whole) == 1, "another query's entries do not count"
