"""A focused refresh: encode what can be in a list, measure what that misses, encode all where it misses too much.

1. Encode the passages of the last generation's lists (training's pools with their positives, dev's lists); all others
   keep the embedding of the last time they were encoded.
2. Search; encode stale passages that turn up in a list; again, until the lists hold freshly encoded passages alone.
3. Encode a random sample of the passages that are stale still: `sparring.phases.focus.missed`.
4. Where the upper end of that estimate is above the threshold: encode the rest too, which is a full refresh.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from sparring.phases.focus import Missed, entered, missed, outside, union
from sparring.phases.index import Index, build_index
from sparring.phases.sharded import ShardedIndex
from sparring.phases.vectors import Embeddings
from sparring.recipes.generation import Generation, Lists

logger = logging.getLogger("sparring")

Encoder = Callable[[np.ndarray, str], np.ndarray]
"""Passage rows and a name -> their embeddings by the current weights."""


@dataclass(frozen=True)
class Wanted:
    """Queries of one kind: embeddings [Q, d], passages searched for each, and how many of these must be fresh."""

    queries: Embeddings
    depth: int
    closed: int


@dataclass(frozen=True, eq=False)
class Refocused:
    """What a refresh leaves; a whole one has searched dev alone yet, and tells no facts.

    Attributes:
        vectors: [N, d], all rows; ``fresh`` (bool [N]) those of the current weights.
        lists: what each kind of query found.
        facts: for the metrics.
    """

    vectors: np.ndarray
    fresh: np.ndarray
    index: Index | ShardedIndex
    lists: Mapping[str, Lists]
    facts: Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class Searched:
    """An index that has been asked already: what mining needs of it."""

    index: Index | ShardedIndex
    lists: Lists

    def search(self, queries: Embeddings, k: int, *, progress: str = "") -> Lists:  # noqa: ARG002
        """The lists that are known; for the same queries and no deeper."""
        assert len(queries) == len(self.lists[0])
        assert min(k, len(self.index)) <= self.lists[0].shape[1]
        return self.lists[0][:, :k], self.lists[1][:, :k]

    def vectors(self, rows: np.ndarray) -> np.ndarray:
        """Embeddings of passage rows."""
        return self.index.vectors(rows)


def last_lists(previous: Generation, dev: str, wanted: Mapping[str, Wanted]) -> list[np.ndarray]:
    """Passages of the last generation's lists, as deep as the new ones must be fresh: pools, their positives, dev's."""
    pools = previous.pools.top(wanted["train"].closed)
    return [pools.candidates, pools.heads, previous.lists[dev][1][:, : wanted["dev"].closed]]


def refocus(
    focus: np.ndarray,
    encode: Encoder,
    vectors: np.ndarray,
    wanted: Mapping[str, Wanted],
    *,
    sample: int,
    threshold: float,
    seed: int,
) -> Refocused:
    """Steps 1 to 4 above.

    Args:
        focus: passage rows to encode first.
        vectors: earlier embeddings, float32 [N, d], written to.
        wanted: "train" and other kinds of query; train decides.
        sample: passages drawn at random from the stale ones.
        threshold: largest upper bound of training's missed share; 1 or more bounds nothing.
    """
    fresh = np.zeros(len(vectors), dtype=bool)

    def renew(rows: np.ndarray, name: str) -> None:
        vectors[rows] = encode(rows, name)
        fresh[rows] = True

    renew(focus, "focus")
    index, lists, passes = *search(vectors, wanted), 0
    while len(stale := stale_in((found[1][:, : wanted[kind].closed] for kind, found in lists.items()), fresh)):
        passes += 1
        renew(stale, f"pass {passes}")
        index, lists = search(vectors, wanted)
    in_lists = int(fresh.sum())
    rows, left = outside(fresh, sample, seed), int((~fresh).sum())
    renew(rows, "sample")
    estimates = {kind: estimate(w, lists[kind][0], vectors[rows], left) for kind, w in wanted.items()}
    whole = threshold < 1 and estimates["train"].upper > threshold
    if whole:
        renew(np.flatnonzero(~fresh), "rest")
    if len(rows):
        index, lists = search(vectors, wanted)
    logger.info("%d of %d passages are in lists; missed entries: %s", in_lists, len(vectors), estimates["train"])
    if whole:
        logger.warning("more than %g may be missed: all passages are encoded", threshold)
    facts = {"in_lists": in_lists, "passes": passes, "whole": whole, **described(estimates)}
    return Refocused(vectors, fresh, index, lists, facts)


def search(vectors: np.ndarray, wanted: Mapping[str, Wanted]) -> tuple[Index, dict[str, Lists]]:
    """An exact index of all passages, and every kind of query's lists in it."""
    index = build_index(vectors)
    return index, {kind: index.search(w.queries, w.depth, progress=f"search {kind}") for kind, w in wanted.items()}


def stale_in(lists: Iterable[np.ndarray], fresh: np.ndarray) -> np.ndarray:
    """Passages of the lists that are not fresh."""
    rows = union(lists, len(fresh))
    return rows[~fresh[rows]]


def estimate(wanted: Wanted, scores: np.ndarray, sampled: np.ndarray, stale: int) -> Missed:
    """What the lists miss, from the fresh embeddings of the sampled passages."""
    depth = min(wanted.closed, scores.shape[1])
    return missed(entered(wanted.queries, scores[:, depth - 1], sampled), stale, depth * len(scores))


def described(estimates: Mapping[str, Missed]) -> dict[str, float]:
    """Estimates as numbers for the metrics."""
    facts: dict[str, float] = {}
    for kind, found in estimates.items():
        facts |= {f"{kind}_missed": found.share, f"{kind}_missed_upper": found.upper, f"{kind}_hits": found.hits}
        facts |= {"sampled": found.sampled}
    return facts
