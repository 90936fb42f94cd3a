"""Mining never gives a known positive; heads keep their scores; nothing is filled in."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparring.phases.index import build_index
from sparring.phases.mine import contains, mine, normalised, pools_from_lists, positives_of, report
from sparring.phases.pools import Pools, pool_overlap
from sparring.types import InputError

SEEDS = st.integers(0, 100_000)


def problem(seed: int) -> tuple[np.ndarray, np.ndarray, dict[int, list[int]], np.ndarray, np.ndarray]:
    """Query embeddings and rows, positives, text groups (with repeated texts), passage embeddings."""
    rng = np.random.default_rng(seed)
    queries, passages = int(rng.integers(1, 12)), int(rng.integers(2, 40))
    groups = rng.integers(0, passages, passages)
    embeddings = rng.standard_normal((passages, 5), dtype=np.float32)[groups]  # equal text, equal vector
    rows = rng.permutation(50)[:queries]
    positives = {int(q): rng.choice(passages, rng.integers(0, min(4, passages)), replace=False).tolist() for q in rows}
    positives[int(rows[0])] = [int(rng.integers(passages))]
    return rng.standard_normal((queries, 5), dtype=np.float32), rows, positives, groups, embeddings


@settings(max_examples=60, deadline=None)
@given(SEEDS, st.integers(1, 45))
def test_pools_are_the_top_without_known_positives(seed: int, depth: int) -> None:
    vectors, rows, positives, groups, embeddings = problem(seed)
    pools = mine(vectors, rows, positives, build_index(embeddings), groups, depth=depth, scale=3.0, generation="g")
    expected_heads = sorted((q, p) for q, ps in positives.items() for p in ps)
    assert sorted(zip(pools.queries.tolist(), pools.heads.tolist(), strict=True)) == expected_heads
    _, found = build_index(embeddings).search(vectors, depth)
    place = {int(q): i for i, q in enumerate(rows)}
    for row in range(len(pools)):
        query = int(pools.queries[row])
        banned = set(groups[positives[query]].tolist())
        expected = [int(p) for p in found[place[query]] if groups[p] not in banned]
        assert pools.pool(row).tolist() == expected
        part = slice(pools.offsets[row], pools.offsets[row + 1])
        np.testing.assert_allclose(
            pools.scores[part], 3 * embeddings[pools.pool(row)] @ vectors[place[query]], atol=1e-4
        )
        head = 3 * embeddings[pools.heads[row]] @ vectors[place[query]]
        np.testing.assert_allclose(pools.head_scores[row], head, atol=1e-4)
    assert (pools.generation, pools.depth) == ("g", depth)


def test_short_pools_are_counted_and_not_filled() -> None:
    """Four passages; query 0 knows two of them, query 1 one: pools of 2, 2 and 3."""
    pools = mine(np.eye(2), np.array([0, 1]), {0: [0, 1], 1: [2]}, build_index(np.eye(4, 2)), np.arange(4), depth=10)
    assert pools.sizes.tolist() == [2, 2, 3]
    assert pools.short(3) == 2
    found = report(pools, 3)
    assert (found.lists, found.queries, found.short, found.empty, found.smallest, found.largest) == (3, 2, 2, 0, 2, 3)
    assert found.counts == {"known positives removed": 3, "positives retrieved": 3}
    assert "2 too short for 3 negatives" in str(found)


def test_other_known_passages_are_removed_but_head_no_list() -> None:
    args = (np.eye(1, 2), np.array([4]), {4: [0]}, build_index(np.eye(5, 2)), np.array([0, 1, 2, 3, 1]))
    pools = mine(*args, depth=5, known={4: [1], 9: [2]})
    assert pools.heads.tolist() == [0]
    assert pools.pool(0).tolist() == [2, 3]  # row 4 has the text of row 1
    assert pools.counts == {"known positives removed": 1, "excluded removed": 2, "positives retrieved": 1}


def test_lists_of_another_searcher() -> None:
    """A head outside its list has no score; row -1 is no candidate."""
    rows = np.array([[3, 1, 0], [2, -1, -1]])
    scores = np.array([[9.0, 8.0, 7.0], [5.0, -np.inf, -np.inf]])
    pools = pools_from_lists(rows, scores, np.array([7, 5]), {5: [0], 7: [1, 2]}, np.arange(4), generation="bm25")
    assert pools.queries.tolist() == [7, 7, 5]
    assert [pools.pool(i).tolist() for i in range(3)] == [[3, 0], [3, 0], [2]]
    np.testing.assert_array_equal(pools.head_scores, np.array([8, np.nan, np.nan], dtype=np.float32))
    assert pools.scores.tolist() == [9, 7, 9, 7, 5]


def test_passages_with_an_answer_are_no_negatives() -> None:
    texts = ["the capital", "It is Paris, France.", "comparison", "London", "PARIS"]
    rows = np.arange(5)[None]
    pools = pools_from_lists(
        rows, -rows.astype(float), np.array([0]), {0: [0]}, np.arange(5), answers={0: ("Paris",)},
        passage_text=texts.__getitem__,
    )  # fmt: skip
    assert pools.pool(0).tolist() == [2, 3]
    assert pools.counts["answer removed"] == 2
    with pytest.raises(InputError, match="texts"):
        pools_from_lists(rows, rows, np.array([0]), {0: [0]}, np.arange(5), answers={0: ("x",)})


@pytest.mark.parametrize(
    ("passage", "answer", "expected"),
    [
        ("in 1984.", "1984", True),
        ("in 19845", "1984", False),
        ("New  YORK city", "new york", True),
        ("new, york", "new york", False),
        ("서울은 수도다", "서울", True),
        ("我住在北京市", "北京", True),
        ("anything", "", False),
        ("anything", "  ", False),
        ("a fine", "fi", False),
        ("a ﬁne day", "fine", True),
    ],
)
def test_answer_strings(passage: str, answer: str, expected: bool) -> None:
    assert contains(normalised(passage), normalised(answer)) is expected


def test_positives_of_qrels_are_the_grades_above_zero() -> None:
    class Ids:
        def rows(self, ids: list[str]) -> np.ndarray:
            return np.array([int(i[1:]) for i in ids], dtype=np.int64)

    found = positives_of({"q3": {"p1": 0}, "q1": {"p5": 2, "p4": -1, "p0": 1}, "q2": {"p9": 1}}, Ids(), Ids())
    assert {q: rows.tolist() for q, rows in found.items()} == {1: [5, 0], 2: [9]}
    assert positives_of({}, Ids(), Ids()) == {}


def test_bad_input() -> None:
    index, groups = build_index(np.eye(3)), np.arange(3)
    with pytest.raises(InputError, match="no query has a positive"):
        mine(np.eye(1, 3), np.array([0]), {}, index, groups, depth=2)
    with pytest.raises(InputError, match="twice"):
        mine(np.ones((2, 3)), np.array([0, 0]), {0: [1]}, index, groups, depth=2)
    with pytest.raises(InputError, match="differ in number"):
        mine(np.ones((2, 3)), np.array([0]), {0: [1]}, index, groups, depth=2)
    with pytest.raises(InputError, match="depth"):
        mine(np.ones((1, 3)), np.array([0]), {0: [1]}, index, groups, depth=0)


def test_overlap_of_two_refreshes() -> None:
    """Query 0 keeps 1 of 2 candidates, query 1 all of 3: (1/2 + 1) / 2. Query 5 was not there before."""

    def pools(lists: dict[int, list[int]]) -> Pools:
        flat = np.concatenate([np.array(x, dtype=np.int64) for x in lists.values()])
        offsets = np.cumsum([0, *(len(x) for x in lists.values())])
        queries = np.array(list(lists))
        return Pools(queries, queries + 100, offsets, flat, flat.astype(np.float32), np.zeros(len(lists), np.float32))

    old, new = pools({0: [1, 2, 3], 1: [4, 5, 6]}), pools({1: [6, 4, 5], 0: [9, 3], 5: [1]})
    assert pool_overlap(old, new) == pytest.approx(0.75)
    assert pool_overlap(old, old) == 1.0
    assert pool_overlap(old, pools({0: [70], 1: [80]})) == 0.0
    assert np.isnan(pool_overlap(old, pools({8: [1]})))
