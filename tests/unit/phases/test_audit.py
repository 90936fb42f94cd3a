"""The audit against plain loops over dictionaries, and on pools small enough to write down."""

from __future__ import annotations

import statistics

import numpy as np
import pytest

from sparring.phases.audit import audit, choose, dropped
from sparring.phases.pools import Pools
from sparring.types import InputError


def pools(sizes: list[int], queries: list[int], seed: int = 0) -> Pools:
    """Lists whose candidates are drawn from 30 passages; lists of one query have the same pool."""
    rng = np.random.default_rng(seed)
    of_query = {q: rng.choice(30, size, replace=False) for q, size in zip(queries, sizes, strict=True)}
    parts = [of_query[q] for q in queries]
    offsets = np.cumsum([0, *map(len, parts)])
    return Pools(
        queries=np.array(queries), heads=30 + np.arange(len(queries)), offsets=offsets,
        candidates=np.concatenate(parts), scores=np.zeros(offsets[-1], dtype=np.float32),
        head_scores=np.zeros(len(queries), dtype=np.float32), counts={"known positives removed": 4, "else": 9},
    )  # fmt: skip


@pytest.mark.parametrize("seed", range(20))
def test_against_loops(seed: int) -> None:
    """Query 5 has two list heads with one pool: its pairs count once. Passages 2k and 2k + 1 have the same text."""
    made = pools([6, 6, 0, 9, 4], [5, 5, 1, 8, 2], seed)
    rng = np.random.default_rng(seed)
    of_pair = {(q, p): rng.normal() for q in (1, 2, 5, 8) for p in range(40)}
    pairs = list(zip(made.pair_queries().tolist(), made.candidates.tolist(), strict=True))
    scores = np.array([of_pair[pair] for pair in pairs], dtype=np.float32)
    head_pairs = zip(made.queries.tolist(), made.heads.tolist(), strict=True)
    heads = np.array([of_pair[pair] for pair in head_pairs], dtype=np.float32)
    groups, judged = np.arange(40) // 2 * 2, int(made.pool(3)[0])
    found = audit(made, scores, heads, groups=groups, settled={8: np.array([judged])})

    negatives = {pair: np.float32(of_pair[pair]) for pair in pairs}
    median = statistics.median(heads.astype(float).tolist())
    assert (found.lists, found.candidates, found.pairs) == (5, len(negatives), len(negatives) + 5)
    assert found.median_positive == pytest.approx(median)
    expected = []
    for (query, passage), score in sorted(negatives.items(), key=lambda item: -item[1]):
        text = query, passage // 2
        if score > median and text not in {(q, p // 2) for q, p, _ in expected} and text != (8, judged // 2):
            expected.append((query, passage, score))
    assert list(zip(found.queries.tolist(), found.passages.tolist(), found.scores, strict=True)) == expected
    for query, passage, rank in zip(found.queries, found.passages, found.ranks, strict=True):
        row = made.queries.tolist().index(query)
        assert made.pool(row)[rank - 1] == passage
    inside = np.searchsorted(found.edges[1:-1], np.array(list(negatives.values()), dtype=float), side="right")
    assert found.negatives.tolist() == np.bincount(inside, minlength=len(found.negatives)).tolist()
    assert found.positives.sum() == 5
    assert found.dropped == {"known positive": 4}


def test_the_median_itself_is_not_above_it() -> None:
    made = pools([3, 1, 1], [0, 1, 2])
    found = audit(made, np.array([2.0, 1.0, 3.0, 2.0, 0.0]), np.array([1.0, 2.0, 5.0]))
    assert found.median_positive == 2.0
    assert found.scores.tolist() == [3.0]
    assert (int(found.queries[0]), int(found.passages[0]), int(found.ranks[0])) == (0, int(made.candidates[2]), 3)


def test_pools_without_candidates_have_no_likely_ones() -> None:
    found = audit(pools([0, 0], [0, 1]), np.empty(0), np.array([1.0, 1.0]))
    assert (found.candidates, found.pairs, len(found.queries), found.positives.sum()) == (0, 2, 0, 2)


def test_lists_are_drawn_once_by_the_seed_and_cut() -> None:
    made = pools([5] * 12, list(range(12)))
    first, again, other = choose(made, 4, 2, 7), choose(made, 4, 2, 7), choose(made, 4, 2, 8)
    assert first.queries.tolist() == again.queries.tolist() != other.queries.tolist()
    assert len(set(first.queries.tolist())) == 4
    assert first.sizes.tolist() == [2] * 4
    for row, query in enumerate(first.queries):
        assert first.pool(row).tolist() == made.pool(int(query))[:2].tolist()
    assert choose(made, 12, 9, 0).queries.tolist() == choose(made, 99, 9, 0).queries.tolist() == list(range(12))


def test_only_what_was_dropped_is_counted() -> None:
    counts = {
        "known positives removed": 1, "excluded removed": 2, "answer removed": 3, "positives retrieved": 4,
        "negatives kept": 5, "uncertain dropped": 6, "promoted": 7,
    }  # fmt: skip
    assert sorted(dropped(counts).values()) == [1, 2, 3, 6, 7]


@pytest.mark.parametrize(
    ("scores", "heads", "problem"),
    [([1.0], [1.0], "fit"), ([1.0, np.nan], [1.0], "finite"), ([1.0, 2.0], [np.inf], "finite")],
)
def test_scores_that_do_not_fit_are_refused(scores: list[float], heads: list[float], problem: str) -> None:
    with pytest.raises(InputError, match=problem):
        audit(pools([2], [0]), np.array(scores), np.array(heads))


def test_nothing_to_audit_is_refused() -> None:
    with pytest.raises(InputError, match="lists and candidates"):
        choose(pools([2], [0]), 0, 1, 0)
    with pytest.raises(InputError, match="no list"):
        audit(pools([2], [0]).select(np.array([], dtype=np.int64)), np.empty(0), np.empty(0))
