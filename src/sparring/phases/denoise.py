"""Denoised lists by a ranker's thresholds: RocketQA's denoised negatives, RocketQAv2's denoised positives."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from sparring.phases.pools import Pools
from sparring.types import InputError

DEFAULTS: Mapping[str, tuple[float, float]] = {"calibrated": (0.05, 0.75), "absolute": (0.1, 0.9)}
"""Rule -> its thresholds: a negative lies below the first, a positive above the second."""


@dataclass(frozen=True, eq=False)
class Denoised:
    """Pools after denoising.

    Attributes:
        pools: one row for each old list, then one for each promoted passage; candidates are only those that the
            ranker is sure are negatives. Some may be empty: that is counted by ``mine.report``.
        queries, passages: the promoted pairs, int64; they are the last rows' queries and heads.
        negative_threshold, positive_threshold: as raw ranker scores (logits).
        counts: pairs (distinct within a query) kept as negatives, dropped as uncertain, promoted.
    """

    pools: Pools
    queries: np.ndarray
    passages: np.ndarray
    negative_threshold: float
    positive_threshold: float
    counts: Mapping[str, int]


def denoise(
    pools: Pools,
    ranker_scores: np.ndarray,
    head_ranker_scores: np.ndarray,
    *,
    rule: str = "absolute",
    negative: float | None = None,
    positive: float | None = None,
    groups: np.ndarray | None = None,
    sure_negatives: Mapping[int, np.ndarray] | None = None,
) -> Denoised:
    """Keep sure negatives; a candidate that is a sure positive heads a list of its own.

    Args:
        ranker_scores: raw logits of the candidates, float [len(pools.candidates)].
        head_ranker_scores: raw logits of the heads, float [R].
        rule: ``absolute``: negative where sigmoid(score) < ``negative`` (.1), positive where > ``positive`` (.9).
            ``calibrated``: the thresholds are quantiles ``negative`` (.05) and ``positive`` (.75) of the known
            positives' scores: for rankers whose sigmoid means nothing, as after a list-wise softmax.
        groups: passages of equal text; one of them is promoted for a query, none stays as its negative.
        sure_negatives: query row -> passage rows that stay negatives whatever the ranker says (with equal texts).

    Raises:
        InputError: thresholds outside (0, 1) or in the wrong order, scores that do not fit the pools or are NaN.
    """
    low, high = _thresholds(head_ranker_scores, rule, negative, positive)
    _check_scores(pools, ranker_scores, head_ranker_scores)
    pair_queries, pair_groups = pools.pair_queries(), pools.candidates if groups is None else groups[pools.candidates]
    marked = {q: rows if groups is None else groups[rows] for q, rows in (sure_negatives or {}).items()}
    base = 1 + max([int(pair_groups.max(initial=0)), *(int(texts.max(initial=0)) for texts in marked.values())])
    keys = pair_queries * base + pair_groups
    sure_keys = [np.empty(0, dtype=np.int64), *(query * base + texts for query, texts in marked.items())]
    by_hand = np.isin(keys, np.concatenate(sure_keys))
    sure = (ranker_scores > high) & ~by_hand
    best = np.flatnonzero(sure)[np.argsort(-ranker_scores[sure], kind="stable")]
    promoted = np.sort(best[np.unique(keys[best], return_index=True)[1]])  # the best-scored of each text
    keep = by_hand | ((ranker_scores < low) & ~np.isin(keys, keys[promoted]))
    kept = pools.keep(keep)
    extra = _heads(kept, pools, promoted)
    distinct = np.unique(keys, return_index=True)[1]
    counts = {
        "negatives kept": int(keep[distinct].sum()),
        "uncertain dropped": int((~keep & ~np.isin(keys, keys[promoted]))[distinct].sum()),
        "promoted": len(promoted),
    }
    joined = _append(kept, extra, counts)
    return Denoised(joined, extra.queries, extra.heads, low, high, counts)


def _thresholds(heads: np.ndarray, rule: str, negative: float | None, positive: float | None) -> tuple[float, float]:
    if rule not in DEFAULTS:
        expected = " or ".join(DEFAULTS)
        raise InputError("unknown denoising rule", where="denoise rule", expected=expected, got=str(rule))
    low = DEFAULTS[rule][0] if negative is None else negative
    high = DEFAULTS[rule][1] if positive is None else positive
    if not 0 < low <= high < 1:
        expected = "0 < negative <= positive < 1"
        raise InputError("impossible denoising thresholds", where="denoise", expected=expected, got=f"{low}, {high}")
    if rule == "absolute":
        return math.log(low / (1 - low)), math.log(high / (1 - high))
    if not len(heads) or not np.isfinite(heads).all():
        raise InputError("calibrated denoising needs the ranker's scores of the known positives", where="denoise")
    return float(np.quantile(heads, low)), float(np.quantile(heads, high))


def _check_scores(pools: Pools, candidates: np.ndarray, heads: np.ndarray) -> None:
    if candidates.shape != pools.candidates.shape or heads.shape != pools.heads.shape:
        got = f"{candidates.shape[0]} and {heads.shape[0]}"
        expected = f"{len(pools.candidates)} candidate and {len(pools)} head scores"
        raise InputError("ranker scores do not fit the pools", expected=expected, got=got)
    if np.isnan(candidates).any() or np.isnan(heads).any():
        raise InputError("the ranker's scores contain NaN", where="denoise", fix="look at the ranker's training loss")


def _heads(kept: Pools, pools: Pools, promoted: np.ndarray) -> Pools:
    """One list for each promoted candidate (flat positions), with the negatives of the list it came from."""
    source = np.searchsorted(pools.offsets, promoted, side="right") - 1
    lists = kept.select(source)
    return replace(lists, heads=pools.candidates[promoted], head_scores=pools.scores[promoted])


def _append(first: Pools, second: Pools, counts: Mapping[str, int]) -> Pools:
    return Pools(
        queries=np.concatenate([first.queries, second.queries]),
        heads=np.concatenate([first.heads, second.heads]),
        offsets=np.concatenate([first.offsets, first.offsets[-1] + second.offsets[1:]]),
        candidates=np.concatenate([first.candidates, second.candidates]),
        scores=np.concatenate([first.scores, second.scores]),
        head_scores=np.concatenate([first.head_scores, second.head_scores]),
        generation=f"{first.generation} denoised".strip(),
        depth=first.depth,
        counts={**first.counts, **counts},
    )
