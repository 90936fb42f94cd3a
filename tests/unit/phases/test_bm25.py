"""BM25 against its formula in plain Python, and tokens of several scripts."""

from __future__ import annotations

import math
import unicodedata
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparring.phases.bm25 import Bm25, bm25, tokens
from sparring.types import InputError


class Table:
    """Texts in memory."""

    def __init__(self, *texts: str) -> None:
        self._texts = texts

    def __len__(self) -> int:
        return len(self._texts)

    def texts(self, rows: Sequence[int] | np.ndarray) -> list[str]:
        return [self._texts[int(row)] for row in rows]


def formula(corpus: list[str], query: str, k1: float = 1.5, b: float = 0.75) -> list[float]:
    """Lucene's: sum over query tokens of log(1 + (N - df + .5) / (df + .5)) * tf / (tf + k1 (1 - b + b l / mean))."""
    bags = [Counter(text.split()) for text in corpus]
    mean = sum(bag.total() for bag in bags) / len(bags)
    scores = []
    for bag in bags:
        norm = k1 * (1 - b + b * bag.total() / mean)
        score = 0.0
        for token in query.split():
            df = sum(token in other for other in bags)
            score += math.log(1 + (len(bags) - df + 0.5) / (df + 0.5)) * bag[token] / (bag[token] + norm)
        scores.append(score)
    return scores


words = st.lists(st.sampled_from(["a", "b", "c", "d", "e"]), max_size=6).map(" ".join)


@settings(max_examples=60, deadline=None)
@given(st.lists(words, min_size=1, max_size=12), st.lists(words, min_size=1, max_size=4), st.integers(1, 15))
def test_scores_and_order_follow_the_formula(corpus: list[str], queries: list[str], k: int) -> None:
    scores, rows = bm25(Table(*corpus), Table(*queries), np.arange(len(queries)), k)
    assert scores.shape == rows.shape == (len(queries), min(k, len(corpus)))
    assert (scores.dtype, rows.dtype) == (np.float32, np.int64)
    for query, score, row in zip(queries, scores, rows, strict=True):
        expected = formula(corpus, query) if any(corpus) else [0.0] * len(corpus)
        matched = sorted(s for s in expected if s > 0)[::-1][:k]
        found = row[row >= 0]
        np.testing.assert_allclose(score[: len(found)], matched, rtol=1e-5)
        np.testing.assert_allclose([expected[r] for r in found], matched, rtol=1e-5)
        assert (row[len(found) :] == -1).all()
        assert np.isneginf(score[len(found) :]).all()


def test_equal_scores_are_ordered_by_row() -> None:
    _, rows = bm25(Table(*["x y", "z", *["x y"] * 40]), Table("y"), np.array([0]), 4)
    assert rows.tolist() == [[0, 2, 3, 4]]


def test_a_query_without_known_tokens_finds_nothing() -> None:
    _, rows = bm25(Table("alpha", "beta"), Table("alpha", "gamma", "", "!?"), np.array([1, 2, 3, 0]), 2)
    assert rows.tolist() == [[-1, -1], [-1, -1], [-1, -1], [0, -1]]


def test_passages_without_any_token() -> None:
    assert bm25(Table("!!", ""), Table("a"), np.array([0]), 5)[1].tolist() == [[-1, -1]]
    with pytest.raises(InputError, match="no passages"):
        Bm25([], 0)
    with pytest.raises(InputError, match="at least one result"):
        bm25(Table("a"), Table("a"), np.array([0]), 0)


def test_korean_matches_through_particles_and_both_normal_forms() -> None:
    corpus = Table("데이터베이스를 백업합니다", "서버에서 파일을 복사한다", "unrelated words")
    queries = Table("데이터베이스", unicodedata.normalize("NFD", "데이터베이스는 어떻게"), "복사하는 방법")
    _, rows = bm25(corpus, queries, np.arange(3), 3)
    assert rows[:, 0].tolist() == [0, 0, 1]
    assert 2 not in rows


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Copy-Files to S3에서!", ["copy", "files", "to", "s3", "에서"]),
        ("데이터를", ["데이터를", "데이", "이터", "터를"]),
        ("서버 a", ["서버", "a"]),
        ("検索 엔진", ["検索", "엔진"]),
        ("हिन्दी भाषा", ["हिन्दी", "भाषा"]),
        ("Ünïcode u\u0308ber", ["ünïcode", "über"]),
        ("--dry_run=1", ["dry_run", "1"]),
        ("한A글", ["한", "a", "글"]),
        ("、。 ・", []),
    ],
)
def test_tokens(text: str, expected: list[str]) -> None:
    assert tokens(text) == expected
