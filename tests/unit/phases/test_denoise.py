"""Denoising by both rules on lists small enough to write down."""

from __future__ import annotations

import math

import numpy as np
import pytest

from sparring.phases.denoise import denoise
from sparring.phases.pools import Pools
from sparring.types import InputError


def logit(p: float) -> float:
    return math.log(p / (1 - p))


def pools() -> Pools:
    """Query 7 has two positives (so two lists with the same pool), query 8 one."""
    return Pools(
        queries=np.array([7, 7, 8]), heads=np.array([0, 1, 2]), offsets=np.array([0, 4, 8, 10]),
        candidates=np.array([10, 11, 12, 13, 10, 11, 12, 13, 10, 20]),
        scores=np.arange(10, 0, -1).astype(np.float32), head_scores=np.zeros(3, dtype=np.float32),
        generation="g", depth=5,
    )  # fmt: skip


SCORES = np.array([logit(p) for p in (0.95, 0.05, 0.5, 0.02, 0.95, 0.05, 0.5, 0.02, 0.09, 0.11)], dtype=np.float32)
HEADS = np.array([-2.0, 0.0, 4.0], dtype=np.float32)


def lists_of(found: Pools) -> list[tuple[int, int, list[int]]]:
    return [(int(found.queries[i]), int(found.heads[i]), found.pool(i).tolist()) for i in range(len(found))]


def test_absolute_rule() -> None:
    """Negatives: sigmoid < .1. Passage 10 (> .9) heads one list of query 7, once though it was in two pools."""
    found = denoise(pools(), SCORES, HEADS)
    assert lists_of(found.pools) == [(7, 0, [11, 13]), (7, 1, [11, 13]), (8, 2, [10]), (7, 10, [11, 13])]
    assert (found.queries.tolist(), found.passages.tolist()) == ([7], [10])
    assert found.negative_threshold == pytest.approx(logit(0.1))
    assert found.positive_threshold == pytest.approx(logit(0.9))
    assert found.counts == {"negatives kept": 3, "uncertain dropped": 2, "promoted": 1}
    np.testing.assert_array_equal(found.pools.scores, np.array([9, 7, 5, 3, 2, 9, 7], dtype=np.float32))
    assert found.pools.head_scores[3] == 10
    assert found.pools.generation == "g denoised"


def test_absolute_rule_with_other_thresholds() -> None:
    found = denoise(pools(), SCORES, HEADS, negative=0.04, positive=0.96)
    assert lists_of(found.pools) == [(7, 0, [13]), (7, 1, [13]), (8, 2, [])]


def test_calibrated_rule_uses_quantiles_of_the_known_positives() -> None:
    """Heads score -2, 0, 4: the .25 quantile is -1, the .75 quantile 2. Their own sigmoid plays no part."""
    found = denoise(pools(), SCORES, HEADS, rule="calibrated", negative=0.25, positive=0.75)
    assert (found.negative_threshold, found.positive_threshold) == (-1.0, 2.0)
    shifted = denoise(pools(), SCORES + 100, HEADS + 100, rule="calibrated", negative=0.25, positive=0.75)
    assert lists_of(shifted.pools) == lists_of(found.pools)
    assert lists_of(found.pools) == [(7, 0, [11, 13]), (7, 1, [11, 13]), (8, 2, [10, 20]), (7, 10, [11, 13])]
    assert denoise(pools(), SCORES, HEADS, rule="calibrated").negative_threshold == pytest.approx(-1.8)


def test_equal_texts_are_promoted_once_and_never_negatives() -> None:
    """12 and 13 have the text of 10: neither may oppose the promoted passage, nor head a list of its own."""
    groups = np.arange(30)
    groups[[10, 12, 13]] = 10
    scores = SCORES.copy()
    scores[[2, 6]] = 9.0  # passage 12 is the best of the three
    found = denoise(pools(), scores, HEADS, groups=groups)
    assert lists_of(found.pools) == [(7, 0, [11]), (7, 1, [11]), (8, 2, [10]), (7, 12, [11])]


def test_a_promoted_passage_of_one_query_may_be_a_negative_of_another() -> None:
    found = denoise(pools(), SCORES, HEADS)
    assert 10 in found.pools.pool(2)


def test_thresholds_are_strict() -> None:
    scores = np.full(10, logit(0.1))
    scores[8] = logit(0.9)
    found = denoise(pools(), scores, HEADS)
    assert found.counts == {"negatives kept": 0, "uncertain dropped": 6, "promoted": 0}


def test_bad_input() -> None:
    with pytest.raises(InputError, match="impossible"):
        denoise(pools(), SCORES, HEADS, negative=0.9, positive=0.1)
    with pytest.raises(InputError, match="unknown denoising rule"):
        denoise(pools(), SCORES, HEADS, rule="relative")
    with pytest.raises(InputError, match="do not fit"):
        denoise(pools(), SCORES[:-1], HEADS)
    with pytest.raises(InputError, match="NaN"):
        denoise(pools(), np.full(10, np.nan), HEADS)


def test_sure_negatives_stay_whatever_the_ranker_says() -> None:
    """Query 7: passage 10 (.95) would be promoted, 12 (.5) dropped as uncertain. Query 8's passage 10 is not meant."""
    found = denoise(pools(), SCORES, HEADS, sure_negatives={7: np.array([10, 12, 99]), 3: np.array([20])})
    assert lists_of(found.pools) == [(7, 0, [10, 11, 12, 13]), (7, 1, [10, 11, 12, 13]), (8, 2, [10])]
    assert found.counts == {"negatives kept": 5, "uncertain dropped": 1, "promoted": 0}


def test_sure_negatives_are_meant_with_equal_texts() -> None:
    """Passage 99 has the text of passage 10, which the ranker would promote."""
    groups = np.arange(100)
    groups[99] = 10
    found = denoise(pools(), SCORES, HEADS, groups=groups, sure_negatives={7: np.array([99])})
    assert lists_of(found.pools) == [(7, 0, [10, 11, 13]), (7, 1, [10, 11, 13]), (8, 2, [10])]
