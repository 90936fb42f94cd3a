r"""Focus: which passages a refresh has to encode again, and what is missed by leaving the others as they were.

Between two rounds a retriever moves little, and a mining list looks at the top of each query only. A focused refresh
encodes the passages of the last lists, and goes on until every entry of the new lists is freshly encoded ("closed").
What can still be wrong is one thing: a passage outside whose fresh vector would enter a list, but whose stale one does
not. Let $O$ be the stale passages, $\tau_q$ the K-th score of query $q$'s closed list, and

$y_p = |\{q : s_{fresh}(q, p) > \tau_q\}|$ for $p \in O$.  Missed entries: $H = \sum_{p \in O} y_p$; share: $H / (QK)$.

A uniform sample $S \subset O$ is encoded too: $\hat H = |O| / |S| \sum_{p \in S} y_p$ is unbiased (Horvitz-Thompson).
$H$ bounds from above how many entries of the lists of a whole refresh are not in the closed lists: a closed list holds
fresh scores alone, so its K-th score is at most the whole refresh's; and $H = 0$ exactly where nothing is missing.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from sparring.phases.stats import largest_mean, largest_share
from sparring.phases.vectors import Embeddings

_CELLS = 8_000_000  # scores held at a time


@dataclass(frozen=True)
class Missed:
    """How many entries of the lists stale vectors hide, from a sample of the stale passages.

    Attributes:
        share: estimated $H / (QK)$; unbiased. 0 where nothing is stale; above 1 where more passages would enter a list
            than it has places.
        upper: upper end of its one-sided 95 % interval (`missed`).
        hits: sampled passages that would enter a list.
        sampled, stale: passages of the sample, and those it stands for.
    """

    share: float
    upper: float
    hits: int
    sampled: int
    stale: int

    def __str__(self) -> str:
        return f"{self.share:.4f} (at most {self.upper:.4f}; {self.hits} of {self.sampled} sampled passages hidden)"


def union(lists: Iterable[np.ndarray], passages: int) -> np.ndarray:
    """Every passage row that is in a list, each once, ascending; int64. Rows of -1 are no result."""
    inside = np.zeros(passages, dtype=bool)
    for rows in lists:
        rows = np.asarray(rows).reshape(-1)
        inside[rows[rows >= 0]] = True
    return np.flatnonzero(inside)


def outside(fresh: np.ndarray, size: int, seed: int) -> np.ndarray:
    """``size`` rows drawn uniformly without replacement from those that are not fresh (all where there are fewer).

    Args:
        fresh: bool [N].

    Returns: int64, ascending.
    """
    rest = np.flatnonzero(~fresh)
    if size >= len(rest):
        return rest
    return np.sort(np.random.default_rng(seed).choice(rest, size, replace=False))


def entered(queries: Embeddings, thresholds: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    """Lists that each passage would enter: int64 [m].

    Args:
        queries: [Q, d].
        thresholds: score of each list's last entry, [Q]; -inf where a list is not full.
        vectors: fresh embeddings of the passages, [m, d].
    """
    counts = np.zeros(len(vectors), dtype=np.int64)
    step = max(1, _CELLS // max(1, len(vectors)))
    for start in range(0, len(queries), step):
        part = slice(start, start + step)
        scores = np.asarray(queries[part], np.float32) @ np.asarray(vectors, np.float32).T
        counts += (scores > thresholds[part, None]).sum(axis=0)
    return counts


def missed(counts: np.ndarray, stale: int, entries: int) -> Missed:
    """The estimate from a sample's counts (`entered`).

    The upper end is a product: the largest share of passages with a hit (exact binomial, which is conservative for a
    sample without replacement) times the largest mean count of such a passage (Student's t over those that were seen;
    with fewer than two, twice the one seen, and 1 where there is none), each at 97.5 %. Where all stale passages are
    in the sample there is nothing to estimate, and it is the share itself.

    Args:
        counts: lists that each sampled passage would enter, [m].
        stale: passages that the sample was drawn from.
        entries: Q x K.
    """
    sampled = len(counts)
    assert sampled <= stale
    if not sampled or not entries:
        return Missed(0.0, 0.0 if not stale else 1.0, 0, sampled, stale)
    hits = counts[counts > 0]
    share = float(counts.mean()) * stale / entries
    if sampled == stale:
        return Missed(share, share, len(hits), sampled, stale)
    size = largest_mean(hits, 0.975) if len(hits) > 1 else float(2 * hits.sum() or 1)
    upper = largest_share(len(hits), sampled, 0.975) * size * stale / entries
    return Missed(share, max(share, upper), len(hits), sampled, stale)


def hidden(found: np.ndarray, whole: np.ndarray) -> float:
    """The truth that `missed` estimates a bound of: share of the whole refresh's entries that are not in the lists.

    Args:
        found, whole: passage rows of the same queries, [Q, K]; -1 is no result.
    """
    assert found.shape == whole.shape
    base = int(max(found.max(initial=0), whole.max(initial=0))) + 1
    place = np.arange(len(whole))[:, None] * base
    real = whole >= 0
    kept = np.isin((place + whole)[real], (place + found)[found >= 0])
    return float(1 - kept.mean()) if kept.size else 0.0
