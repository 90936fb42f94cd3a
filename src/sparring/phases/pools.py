"""The artifact that mining hands to training: a pool of negatives for every (query, positive passage).

A list row is a list HEAD: one query with one positive. Its pool holds passage rows, best first, without any known
positive of the query. Candidate lists [1 + n] are drawn from it at each visit; column 0 is the head.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from sparring.types import InputError

Method = Literal["uniform", "simans", "top"]

_CELLS = 4_000_000  # padded cells that a draw holds at a time
_ARRAYS = ("queries", "heads", "offsets", "candidates", "scores", "head_scores")


@dataclass(frozen=True, eq=False)
class Pools:
    """R list rows with their pools, as one flat array with offsets.

    Attributes:
        queries: query row of each list, int64 [R].
        heads: positive passage row of each list, int64 [R].
        offsets: the pool of list r is ``candidates[offsets[r]:offsets[r + 1]]``, int64 [R + 1].
        candidates: passage rows, best first, int64.
        scores: the retriever's (scaled) scores of the candidates, float32.
        head_scores: its scores of the heads, float32 [R]; NaN where unknown (BM25 lists that miss the head).
        generation: which model and refresh made these pools.
        depth: how many passages a query was given before positives were removed.
        counts: what was removed and found on the way, by name.
    """

    queries: np.ndarray
    heads: np.ndarray
    offsets: np.ndarray
    candidates: np.ndarray
    scores: np.ndarray
    head_scores: np.ndarray
    generation: str = ""
    depth: int = 0
    counts: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        assert len(self.queries) == len(self.heads) == len(self.head_scores) == len(self.offsets) - 1
        assert len(self.candidates) == len(self.scores) == self.offsets[-1]

    def __len__(self) -> int:
        return len(self.queries)

    @property
    def sizes(self) -> np.ndarray:
        """Number of candidates of each list, int64 [R]."""
        return np.diff(self.offsets)

    def pool(self, row: int) -> np.ndarray:
        """Candidates of one list, best first."""
        return self.candidates[self.offsets[row] : self.offsets[row + 1]]

    def short(self, n: int) -> int:
        """Number of lists with fewer than n candidates: they cannot be trained on with lists of 1 + n."""
        return int((self.sizes < n).sum())

    def pair_queries(self) -> np.ndarray:
        """Query row of every candidate (aligned with ``candidates``): the pairs that a ranker scores."""
        return np.repeat(self.queries, self.sizes)

    def select(self, rows: np.ndarray) -> Pools:
        """The given list rows, in the given order."""
        flat, offsets = take(self.offsets, rows)
        return replace(
            self,
            queries=self.queries[rows],
            heads=self.heads[rows],
            head_scores=self.head_scores[rows],
            offsets=offsets,
            candidates=self.candidates[flat],
            scores=self.scores[flat],
        )

    def top(self, depth: int) -> Pools:
        """The same lists with at most the best ``depth`` candidates each."""
        place = np.arange(len(self.candidates)) - np.repeat(self.offsets[:-1], self.sizes)
        return self.keep(place < depth)

    def keep(self, mask: np.ndarray) -> Pools:
        """The same lists with only the candidates where ``mask`` (bool, aligned with ``candidates``) is true."""
        offsets = np.concatenate([[0], np.cumsum(mask)])[self.offsets].astype(np.int64)
        return replace(self, offsets=offsets, candidates=self.candidates[mask], scores=self.scores[mask])


def take(offsets: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Flat positions of the given ragged rows, and the offsets of the result."""
    sizes = np.diff(offsets)[rows]
    result = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    return np.repeat(offsets[:-1][rows] - result[:-1], sizes) + np.arange(result[-1]), result


def hybrid(undenoised: Pools, denoised: Pools) -> Pools:
    """Both kinds of lists together (RocketQAv2, hybrid data): mixed by list; the sampler shuffles globally."""
    counts = {f"undenoised {k}": v for k, v in undenoised.counts.items()}
    counts |= {f"denoised {k}": v for k, v in denoised.counts.items()}
    arrays = {name: np.concatenate([getattr(undenoised, name), getattr(denoised, name)]) for name in _ARRAYS}
    arrays["offsets"] = np.concatenate([undenoised.offsets, undenoised.offsets[-1] + denoised.offsets[1:]])
    generation = f"{undenoised.generation}+{denoised.generation}"
    return Pools(**arrays, generation=generation, depth=max(undenoised.depth, denoised.depth), counts=counts)


def trainable(pools: Pools, n: int) -> np.ndarray:
    """List rows with at least n candidates. InputError when there is none; pools are never filled up."""
    sizes = pools.sizes
    rows = np.flatnonzero(sizes >= n)
    if not len(rows):
        raise InputError(
            "no candidate list can be drawn: every pool is smaller than the list",
            where="list size",
            expected=f"pools of at least {n} negatives",
            got=f"{len(pools)} pools from the top {pools.depth}, the largest has {int(sizes.max(initial=0))}",
            fix="make the lists shorter, mine deeper, or use a larger corpus",
        )
    return rows


def draw(
    pools: Pools,
    list_rows: np.ndarray,
    n: int,
    rng: np.random.Generator,
    *,
    method: Method = "uniform",
    a: float = 0.5,
    b: float = 0.0,
) -> np.ndarray:
    r"""Candidate lists: the head in column 0 and n distinct negatives of its pool.  -> int64 [len(list_rows), 1 + n]

    ``uniform``: equal chances (AR2, the negatives of Eq. 7). ``top``: the n best. ``simans``: chances
    $p_i \propto \exp(-a (s_i - s_{d^+} - b)^2)$, one after the other without replacement (Zhou et al., SimANS,
    EMNLP 2022; drawn by Gumbel top-n).

    Raises:
        InputError: a pool with fewer than n candidates, an unknown method, or SimANS without finite scores.
    """
    list_rows = np.asarray(list_rows, dtype=np.int64)
    _check_draw(pools, list_rows, n, method)
    width = int(pools.sizes[list_rows].max(initial=1))
    step = max(1, _CELLS // width)
    parts = [_draw(pools, list_rows[i : i + step], n, width, rng, method, a, b) for i in range(0, len(list_rows), step)]
    return np.concatenate(parts) if parts else np.empty((0, 1 + n), dtype=np.int64)


def _check_draw(pools: Pools, list_rows: np.ndarray, n: int, method: str) -> None:
    if method not in ("uniform", "simans", "top"):
        raise InputError("unknown way to draw negatives", expected="uniform, simans or top", got=str(method))
    smallest = int(pools.sizes[list_rows].min(initial=n))
    if n < 1 or smallest < n:
        got = f"a pool of {smallest}" if n >= 1 else f"{n} negatives"
        fix = "draw only from the rows that `trainable` returns"
        raise InputError("a list asks for more negatives than its pool has", expected=f"{n} or more", got=got, fix=fix)
    if method == "simans" and np.isnan(pools.head_scores[list_rows]).any():
        fix = "draw uniformly from BM25 pools, or mine with a retriever"
        raise InputError("SimANS needs the score of every positive", got="pools without them", fix=fix)


def _draw(
    pools: Pools, rows: np.ndarray, n: int, width: int, rng: np.random.Generator, method: str, a: float, b: float
) -> np.ndarray:
    columns = np.arange(width)
    inside = columns < pools.sizes[rows][:, None]
    flat = np.where(inside, pools.offsets[rows][:, None] + columns, 0)
    if method == "top":
        chosen = np.broadcast_to(columns[:n], (len(rows), n))
    else:
        keys = rng.gumbel(size=inside.shape)
        if method == "simans":
            gap = pools.scores[flat].astype(np.float64) - pools.head_scores[rows].astype(np.float64)[:, None] - b
            keys -= a * gap * gap
            if not np.isfinite(keys[inside]).all():  # -inf is what marks a place outside of a pool
                raise InputError(
                    "SimANS needs finite scores and settings", where="scores, simans_a, simans_b",
                    expected="finite numbers, not too large", got=f"a = {a:g}, b = {b:g}",
                    fix="look for inf in the run's scores, or draw uniformly",
                )  # fmt: skip
        keys[~inside] = -np.inf
        chosen = np.argpartition(-keys, n - 1, axis=1)[:, :n]
        chosen = np.take_along_axis(chosen, np.argsort(-np.take_along_axis(keys, chosen, 1), axis=1, kind="stable"), 1)
    negatives = pools.candidates[np.take_along_axis(flat, chosen, 1)]
    return np.concatenate([pools.heads[rows][:, None], negatives], axis=1)


def pool_overlap(previous: Pools, current: Pools) -> float:
    """Mean share of a query's current candidates that were in its previous pool, over the queries of both; NaN if none.

    1 means that the refresh changed nothing, 0 that every negative is new.
    """
    base = 1 + max(int(previous.candidates.max(initial=0)), int(current.candidates.max(initial=0)))
    old = np.unique(previous.pair_queries() * base + previous.candidates)
    new = np.unique(current.pair_queries() * base + current.candidates)
    queries, inverse = np.unique(new // base, return_inverse=True)
    share = np.bincount(inverse, np.isin(new, old)) / np.bincount(inverse) if len(queries) else np.empty(0)
    share = share[np.isin(queries, previous.queries)]
    return float(share.mean()) if len(share) else float("nan")
