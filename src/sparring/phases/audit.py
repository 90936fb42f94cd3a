"""The negative audit: what each rule dropped, and which mined negatives a ranker takes for right answers.

Labels are incomplete, so some mined negatives answer their query. Here they are only found and counted: whether one is
right is a person's decision (docs/audit.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from sparring.phases.pools import Pools
from sparring.types import InputError

RULES: Mapping[str, str] = {
    "known positives removed": "known positive",
    "excluded removed": "dropped by a correction",
    "answer removed": "contains an answer",
    "uncertain dropped": "denoising: uncertain",
    "promoted": "denoising: promoted to positive",
}
"""A count of mining or denoising -> the rule that it is shown as. Other counts are of nothing that was dropped."""

BINS = 20


@dataclass(frozen=True, eq=False)
class Audit:
    """What a ranker says of mined negatives.

    Attributes:
        dropped: candidates that each rule took out of the pools, by rule.
        lists: list heads that were looked at.
        candidates: distinct (query, mined negative) pairs of these lists.
        pairs: distinct pairs that the ranker scored, positives included.
        median_positive: median score (logit) of the distinct (query, positive) pairs.
        edges: of the histogram's bins, float64 [BINS + 1], common to both.
        positives, negatives: distinct pairs in each bin, int64 [BINS].
        queries, passages: rows of the likely unlabelled positives, best score first, int64 [L].
        scores: their ranker scores, float32 [L].
        ranks: their places in their query's pool, from 1: the retriever's order without known positives; int64 [L].
    """

    dropped: Mapping[str, int]
    lists: int
    candidates: int
    pairs: int
    median_positive: float
    edges: np.ndarray
    positives: np.ndarray
    negatives: np.ndarray
    queries: np.ndarray
    passages: np.ndarray
    scores: np.ndarray
    ranks: np.ndarray


def dropped(counts: Mapping[str, int]) -> dict[str, int]:
    """Those of a phase's counts that are of dropped candidates, by the names of `RULES`."""
    return {RULES[name]: count for name, count in counts.items() if name in RULES}


def choose(pools: Pools, lists: int, depth: int, seed: int) -> Pools:
    """``lists`` list heads drawn at random (all, if there are no more), with the top ``depth`` of their pools.

    Raises:
        InputError: lists or depth below 1.
    """
    if lists < 1 or depth < 1:
        got = f"{lists} lists, depth {depth}"
        raise InputError("an audit needs lists and candidates", where="audit", expected="1 or more of both", got=got)
    rows = np.arange(len(pools))
    if lists < len(rows):
        rows = np.sort(np.random.default_rng(seed).choice(rows, lists, replace=False))
    return pools.select(rows).top(depth)


def audit(
    pools: Pools,
    ranker_scores: np.ndarray,
    head_ranker_scores: np.ndarray,
    *,
    groups: np.ndarray | None = None,
    settled: Mapping[int, np.ndarray] | None = None,
) -> Audit:
    """Compare the ranker's scores of mined negatives with those of the labelled positives.

    A likely unlabelled positive is a mined negative that scores above the median of the positives.

    Args:
        pools: as `choose` gives them.
        ranker_scores: raw logits of the candidates, float [len(pools.candidates)].
        head_ranker_scores: raw logits of the heads, float [R].
        groups: passages of equal text: of these one, the best-scored, stands for all among a query's likely ones.
        settled: query row -> passages that a person has judged already: they are counted, but not likely.

    Raises:
        InputError: no list, or scores that do not fit the pools or are not finite.
    """
    _check(pools, ranker_scores, head_ranker_scores)
    queries = pools.pair_queries()
    places = np.arange(len(queries)) - np.repeat(pools.offsets[:-1], pools.sizes) + 1
    pairs, heads = _first(queries, pools.candidates), _first(pools.queries, pools.heads)
    negatives, positives = ranker_scores[pairs].astype(np.float64), head_ranker_scores[heads].astype(np.float64)
    median, edges = float(np.median(positives)), np.histogram_bin_edges(np.concatenate([positives, negatives]), BINS)
    high = pairs[negatives > median]
    high = high[np.lexsort((places[high], queries[high], -ranker_scores[high].astype(np.float64)))]
    texts = pools.candidates if groups is None else groups[pools.candidates]
    high = high[np.sort(_first(queries[high], texts[high]))]
    high = high[~_settled(queries[high], texts[high], settled or {}, groups)]
    return Audit(
        dropped=dropped(pools.counts), lists=len(pools), candidates=len(pairs), pairs=len(pairs) + len(heads),
        median_positive=median, edges=edges, positives=np.histogram(positives, edges)[0],
        negatives=np.histogram(negatives, edges)[0], queries=queries[high], passages=pools.candidates[high],
        scores=ranker_scores[high], ranks=places[high],
    )  # fmt: skip


def _check(pools: Pools, candidates: np.ndarray, heads: np.ndarray) -> None:
    if not len(pools):
        raise InputError("there is no list to audit", where="audit", expected="pools with at least one list head")
    if candidates.shape != pools.candidates.shape or heads.shape != pools.heads.shape:
        got = f"{candidates.shape[0]} and {heads.shape[0]}"
        expected = f"{len(pools.candidates)} candidate and {len(pools)} head scores"
        raise InputError("ranker scores do not fit the pools", where="audit", expected=expected, got=got)
    if not (np.isfinite(candidates).all() and np.isfinite(heads).all()):
        raise InputError("the ranker's scores are not finite", where="audit", fix="look at the ranker's training loss")


def _first(queries: np.ndarray, passages: np.ndarray) -> np.ndarray:
    """Where each distinct (query, passage) stands first."""
    return np.unique(queries * (int(passages.max(initial=0)) + 1) + passages, return_index=True)[1]


def _settled(
    queries: np.ndarray, texts: np.ndarray, settled: Mapping[int, np.ndarray], groups: np.ndarray | None
) -> np.ndarray:
    """Which of these pairs a person has judged, by text; bool."""
    judged = {q: set((rows if groups is None else groups[rows]).tolist()) for q, rows in settled.items()}
    found = [int(text) in judged.get(int(query), ()) for query, text in zip(queries, texts, strict=True)]
    return np.array(found, dtype=bool)
