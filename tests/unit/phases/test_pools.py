"""Draws have the distributions that they claim; batches depend on seed and step alone."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from sparring.phases.pools import Pools, draw, hybrid, trainable
from sparring.phases.sample import ListSampler
from sparring.types import InputError


def make(sizes: list[int], seed: int = 0, generation: str = "g") -> Pools:
    rng = np.random.default_rng(seed)
    offsets = np.cumsum([0, *sizes])
    scores = -np.sort(-rng.standard_normal(offsets[-1]).astype(np.float32))
    heads = 10_000 + np.arange(len(sizes))
    return Pools(
        queries=np.arange(len(sizes)) // 2, heads=heads, offsets=offsets, candidates=rng.permutation(offsets[-1]),
        scores=scores, head_scores=rng.standard_normal(len(sizes)).astype(np.float32), generation=generation, depth=20,
    )  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(2, 9), min_size=1, max_size=8),
    st.integers(1, 2),
    st.sampled_from(["uniform", "simans", "top"]),
    st.integers(0, 99),
)
def test_draws_are_distinct_members_of_the_pool(sizes: list[int], n: int, method: str, seed: int) -> None:
    pools = make(sizes)
    rows = np.random.default_rng(seed).integers(0, len(sizes), 13)
    lists = draw(pools, rows, n, np.random.default_rng(seed), method=method)  # type: ignore[arg-type]
    assert lists.shape == (13, 1 + n)
    assert lists.dtype == np.int64
    for row, found in zip(rows, lists, strict=True):
        assert found[0] == pools.heads[row]
        assert len(set(found[1:])) == n
        assert set(found[1:]) <= set(pools.pool(row).tolist())
        if method == "top":
            assert found[1:].tolist() == pools.pool(row)[:n].tolist()
    again = draw(pools, rows, n, np.random.default_rng(seed), method=method)  # type: ignore[arg-type]
    np.testing.assert_array_equal(lists, again)


def counts_of(lists: np.ndarray, pool: np.ndarray) -> np.ndarray:
    return (lists[:, None] == pool[None, :]).sum(axis=0)


def test_uniform_draws_are_uniform() -> None:
    """Pools of different size in one call, so that padding would show; every column on its own, and all pairs."""
    pools = make([7, 3, 12])
    lists = draw(pools, np.array([0] * 12_000 + [2]), 2, np.random.default_rng(0))[:-1]
    for column in (1, 2):
        assert chisquare(counts_of(lists[:, column], pools.pool(0))).pvalue > 1e-3
    pairs = np.sort(lists[:, 1:], axis=1) @ [1000, 1]
    assert chisquare(np.unique(pairs, return_counts=True)[1]).pvalue > 1e-3
    assert len(np.unique(pairs)) == 21


@pytest.mark.parametrize(("a", "b"), [(0.5, 0.0), (2.0, -0.7)])
def test_simans_draws_have_the_papers_frequencies(a: float, b: float) -> None:
    """First draw p_i; ordered pairs p_i p_j / (1 - p_i): the chances of drawing one after the other."""
    pools = make([5, 2])
    weight = np.exp(-a * (pools.scores[:5].astype(np.float64) - float(pools.head_scores[0]) - b) ** 2)
    p = weight / weight.sum()
    rng = np.random.default_rng(1)
    lists = draw(pools, np.zeros(20_000, dtype=np.int64), 2, rng, method="simans", a=a, b=b)
    assert chisquare(counts_of(lists[:, 1], pools.pool(0)), 20_000 * p).pvalue > 1e-3
    place = {int(c): i for i, c in enumerate(pools.pool(0))}
    seen = np.zeros((5, 5))
    for first, second in lists[:, 1:]:
        seen[place[int(first)], place[int(second)]] += 1
    expected = p[:, None] * p[None, :] / (1 - p[:, None])
    off = ~np.eye(5, dtype=bool)
    assert seen[~off].sum() == 0
    assert chisquare(seen[off], 20_000 * expected[off]).pvalue > 1e-3


def test_simans_with_large_scores_is_finite() -> None:
    pools = make([4])
    pools.scores[:] = [1e4, 5e3, -1e4, 0]
    lists = draw(pools, np.zeros(50, dtype=int), 1, np.random.default_rng(0), method="simans")
    assert set(lists[:, 1]) == {int(pools.pool(0)[3])}  # the head's score is about 0


@pytest.mark.parametrize("spoilt", ["score", "head", "a", "b"])
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_simans_never_draws_from_outside_of_a_pool(spoilt: str, value: float) -> None:
    """Where a number is not finite, no place in a pool is ahead of the empty ones behind its end any more."""
    pools, options = make([3, 9]), {"a": 0.5, "b": 0.0}
    if spoilt in options:
        options[spoilt] = value
    else:
        (pools.scores if spoilt == "score" else pools.head_scores)[0] = value
    with pytest.raises(InputError, match="SimANS needs"):
        draw(pools, np.array([0, 1]), 3, np.random.default_rng(0), method="simans", **options)


def test_a_short_pool_is_never_filled() -> None:
    pools = make([4, 2, 0])
    assert trainable(pools, 2).tolist() == [0, 1]
    assert trainable(pools, 4).tolist() == [0]
    with pytest.raises(InputError, match="more negatives than its pool"):
        draw(pools, np.array([0, 1]), 3, np.random.default_rng(0))
    with pytest.raises(InputError, match=r"(?s)at least 5 negatives.*top 20, the largest has 4"):
        trainable(pools, 5)
    with pytest.raises(InputError, match="0 negatives"):
        draw(pools, np.array([0]), 0, np.random.default_rng(0))
    with pytest.raises(InputError, match="unknown way"):
        draw(pools, np.array([0]), 1, np.random.default_rng(0), method="best")  # type: ignore[arg-type]


def test_simans_without_scores_of_the_heads_is_refused() -> None:
    pools = make([3])
    pools.head_scores[:] = math.nan
    with pytest.raises(InputError, match="score of every positive"):
        draw(pools, np.array([0]), 1, np.random.default_rng(0), method="simans")
    assert draw(pools, np.array([0]), 1, np.random.default_rng(0)).shape == (1, 2)


def test_select_top_and_hybrid_keep_rows_together() -> None:
    a, b = make([3, 0, 2], generation="a"), make([1, 4], seed=1, generation="b")
    part = a.select(np.array([2, 0, 2]))
    assert [part.pool(i).tolist() for i in range(3)] == [a.pool(i).tolist() for i in (2, 0, 2)]
    assert part.heads.tolist() == a.heads[[2, 0, 2]].tolist()
    assert [a.top(2).pool(i).tolist() for i in range(3)] == [a.pool(i)[:2].tolist() for i in range(3)]
    both = hybrid(a, b)
    assert [both.pool(i).tolist() for i in range(5)] == [p.pool(i).tolist() for p in (a, b) for i in range(len(p))]
    assert both.heads.tolist() == [*a.heads, *b.heads]
    assert both.generation == "a+b"
    assert both.pair_queries().tolist() == [0, 0, 0, 1, 1, 0, 0, 0, 0, 0]


def test_an_epoch_visits_every_trainable_list_once_in_a_new_order() -> None:
    pools = make([3] * 10 + [1])
    sampler = ListSampler(pools, 2, seed=5)
    assert (len(sampler), sampler.short) == (10, 1)
    visits = np.concatenate([sampler.list_rows(step, 4) for step in range(10)])  # batches cross the epochs' ends
    epochs = visits.reshape(4, 10)
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs.tolist())
    assert len({tuple(epoch) for epoch in epochs.tolist()}) == 4


def test_by_query_every_query_has_the_same_share_and_its_heads_take_turns() -> None:
    pools = make([3] * 7 + [1])  # queries 0, 0, 1, 1, 2, 2, 3 and one list too short
    heads = np.array([0, 0, 0, 1, 1, 2, 3, 3])
    pools = dataclasses.replace(pools, queries=heads)
    sampler = ListSampler(pools, 2, seed=3, visit="query")
    assert (len(sampler), sampler.short) == (4, 1)
    epochs = np.concatenate([sampler.list_rows(step, 6) for step in range(8)]).reshape(12, 4)
    assert all(sorted(heads[epoch].tolist()) == [0, 1, 2, 3] for epoch in epochs)
    visits = np.bincount(epochs.reshape(-1), minlength=8)
    assert visits.tolist() == [4, 4, 4, 6, 6, 12, 12, 0], "12 visits a query, shared evenly by its heads"
    assert len({tuple(heads[epoch]) for epoch in epochs}) > 6, "queries come in a new order"
    orders = {tuple(ListSampler(pools, 2, seed=s, visit="query")._visited(0)[:1]) for s in range(20)}
    assert len(orders) == 3, "which head is first depends on the seed"


def test_with_one_head_a_query_both_ways_of_visiting_are_one() -> None:
    pools = dataclasses.replace(make([4] * 9), queries=np.arange(9))
    one, other = (ListSampler(pools, 2, seed=8, visit=visit) for visit in ("list", "query"))
    for step in range(9):
        for a, b in zip(one.batch(step, 4), other.batch(step, 4), strict=True):
            np.testing.assert_array_equal(a, b)


def test_a_batch_larger_than_an_epoch() -> None:
    rows = ListSampler(make([3, 3, 3]), 2, seed=0).list_rows(1, 7)
    assert len(rows) == 7
    assert np.bincount(rows, minlength=3).min() >= 2


def test_batches_depend_on_seed_and_step_alone() -> None:
    pools = make([6] * 9)
    forward, backward = ListSampler(pools, 3, seed=(1, 2)), ListSampler(pools, 3, seed=(1, 2))
    batches = [forward.batch(step, 4) for step in range(6)]
    for step in reversed(range(6)):  # as after a resume: in any order, from a fresh object
        for found, expected in zip(backward.batch(step, 4), batches[step], strict=True):
            np.testing.assert_array_equal(found, expected)
    queries, passages = batches[0]
    assert passages.shape == (4, 4)
    np.testing.assert_array_equal(queries, (passages[:, 0] - 10_000) // 2)
    other = ListSampler(pools, 3, seed=(1, 3)).batch(0, 4)[1]
    assert not np.array_equal(other, passages)


def test_a_list_gets_fresh_negatives_at_each_visit() -> None:
    sampler = ListSampler(make([12]), 3, seed=0)
    assert len({tuple(sorted(sampler.batch(step, 1)[1][0, 1:])) for step in range(20)}) > 10


def test_sampler_needs_a_trainable_list() -> None:
    with pytest.raises(InputError, match="no candidate list"):
        ListSampler(make([1, 2]), 3, seed=0)
    with pytest.raises(InputError, match="no such batch"):
        ListSampler(make([3]), 3, seed=0).batch(-1, 2)


def test_a_batch_depends_on_its_step_alone() -> None:
    """Nothing was drawn before it, by whomever: there is no state that a worker or an earlier step could change."""
    pools = make([5, 7, 4, 9, 6])
    fresh = [ListSampler(pools, 3, seed=11).batch(step, 4) for step in range(12)]
    one = ListSampler(pools, 3, seed=11)
    for step in (7, 2, 2, 11, 0, 5, 1, 10, 3, 4, 6, 8, 9):
        np.random.default_rng().random(100)
        np.random.seed(step)  # noqa: NPY002
        queries, passages = one.batch(step, 4)
        assert np.array_equal(queries, fresh[step][0])
        assert np.array_equal(passages, fresh[step][1])
    assert any(not np.array_equal(fresh[0][1], other[1]) for other in fresh[1:])
