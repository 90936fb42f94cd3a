"""Which passages can be among a query's best: found by bf16 products, with a bound on their error that is proven.

A CPU with units for bf16 multiplies it about twice as fast as fp32, or more. Every passage whose fp32 score may reach
the k-th best passes; all others are shown not to. Who ranks those few by fp32 scores (`index`) has the exact lists.

With q~ and c~ the bf16 values of a query q and of a passage less the mean of some, c = p - m (which takes the same from
all scores of a query, so no order changes):

    |q~ c~ - (q p - q m)| <= |q - q~| |c| + |q~| |c - c~| + rounding of sums of d terms

The norms on the right are measured, not assumed. Sums of d terms are rounded by at most (d + 3) 2^-24 of |q| |p|, in
any order; four times that is allowed. The mean is taken off because the embeddings of many models share a large part,
which would be most of the error and none of the differences.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sparring.models.lean import has_fused_products
from sparring.models.parallel import at_a_time, side_by_side

QUERIES, PASSAGES, DIM = 512, 1 << 15, 128
"""The least of each with which `pays` says yes."""
RESULTS = 256
"""Passages for each result that are needed: with fewer, too many of them come into question."""
NONE = -1
"""Fills up rows of candidates."""

_QUERIES, _PASSAGES = 512, 8192  # of one product: its scores are 8 MB
_GROUP = 16  # scores of which only the greatest is compared, until it is too great
_SAMPLE = 4  # products whose scores say what the k-th best of all may be
_MOST, _ABREAST = 4096, 16  # candidates of a query; products at a time
_LARGE = 1e15  # norms whose products may overflow
_FLUSHED, _UNSEEN = 2.0**-120, 2.0**-62  # more than a product that may count as 0; than a component whose square may


def suits(passages: int, dim: int) -> bool:
    """Whether this CPU has units for bf16, and such passages may be worth it."""
    return passages >= PASSAGES and dim >= DIM and has_fused_products(torch.bfloat16)


def pays(queries: int, passages: int, dim: int, k: int) -> bool:
    """Whether a search for the best k is large enough to gain by the sieve, on such a CPU."""
    return queries >= QUERIES and passages >= RESULTS * k and suits(passages, dim)


def candidates(
    queries: np.ndarray, passages: np.ndarray, k: int, floor: np.ndarray
) -> Generator[tuple[slice, np.ndarray, np.ndarray], None, None]:
    """The passages that can be among the best k of a query and can reach its floor.

    Args:
        queries: float32 [Q, d], finite.
        passages: float32 [N, d], finite; memory for half as much again is taken.
        k: at most N.
        floor: float32 [Q], scores below which a passage is not wanted; -inf wants the best k in any case.

    Yields:
        (part, rows, open) for some queries at a time, in order: which of them; int64 [q, M], of each query the
        passages in no order, then `NONE`; and the numbers, in the part, of those that are left open, because too many
        passages come into question or numbers are too large: they have no rows. The rows of the others hold their
        best k by fp32 inner product, and all that are equal to the k-th, less those below the floor.
    """
    size = min(_QUERIES, -(-len(queries) // torch.get_num_threads()))
    parts = [slice(start, start + size) for start in range(0, len(queries), size)]
    abreast, passing = at_a_time(len(parts), _ABREAST), _Passages(passages, k, size)
    with closing(side_by_side(lambda part: passing.of(queries[part], floor[part]), parts, abreast)) as found:
        for part, (rows, open_) in zip(parts, found, strict=True):
            yield part, rows, open_


@contextmanager
def _plain() -> Iterator[None]:
    """No gradients, and fp32 as it is, whatever the caller's modes are."""
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        yield


@dataclass(frozen=True)
class _Tile:
    """Passages of one product: rows ``first``, ``first + step``, ... of them, ``count`` in all.

    Attributes:
        weight: c~, as oneDNN reads it; passages of zeros fill up the last group.
    """

    first: int
    step: int
    count: int
    weight: Tensor


class _Passages:
    """Passages in bf16, and what bounds the error of their scores. Every tile is a sample of all."""

    @_plain()
    def __init__(self, passages: np.ndarray, k: int, at_once: int) -> None:
        count = len(passages)
        step = -(-count // _PASSAGES)
        self.k, self.dim, self.count, self.at_once = k, passages.shape[1], count, at_once
        self.centred = self.rest = 0.0
        with np.errstate(over="ignore", invalid="ignore"):  # what is too large for fp32 is left open
            self.mean = passages[:: max(1, count // _PASSAGES)].mean(axis=0)
            self.tiles = [self._tile(passages[first::step], first, step) for first in range(step)]
        self.norm = self.centred + float(_lengths(torch.from_numpy(self.mean[None]))[0])

    def _tile(self, passages: np.ndarray, first: int, step: int) -> _Tile:
        centred = torch.from_numpy(np.subtract(passages, self.mean))
        rounded = centred.bfloat16()
        self.centred = max(self.centred, float(_lengths(centred).max()))
        self.rest = max(self.rest, float(_lengths(centred.sub_(rounded)).max()))
        filled = torch.nn.functional.pad(rounded, (0, 0, 0, -len(rounded) % _GROUP))
        return _Tile(first, step, len(passages), torch.ops.mkldnn._reorder_linear_weight(filled, self.at_once))

    @_plain()
    def of(self, queries: np.ndarray, floor: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Rows and open queries, as `candidates` gives them, of one part."""
        q = torch.from_numpy(np.array(queries))
        nothing = np.empty((len(q), 0), dtype=np.int64), np.arange(len(q))
        if self.count < RESULTS * self.k or not max(self.norm, float(_lengths(q).max())) < _LARGE:
            return nothing
        bound = self._bound(q)
        lowest = _lowest(floor - queries @ self.mean, bound)
        rounded, sample, sieve = q.bfloat16(), list[tuple[_Tile, Tensor, Tensor]](), _Sieve(lowest.copy())
        for number, tile in enumerate(self.tiles):
            scores = torch.ops.mkldnn._linear_pointwise(rounded, tile.weight, None, "none", [], "")
            scores = scores.view(len(q), _GROUP, -1)
            greatest = scores.amax(1)
            if number < _SAMPLE:
                sample.append((tile, scores, greatest))
                if number + 1 < min(_SAMPLE, len(self.tiles)):
                    continue
                np.maximum(lowest, self._guess(sample, bound), out=sieve.needed)
                for one in sample:
                    sieve.take(*one)
                sample.clear()
                if 2 * np.count_nonzero(np.isposinf(sieve.needed)) > len(q):  # as all alike are: the rest is spared
                    return nothing
            else:
                sieve.take(tile, scores, greatest)
        return sieve.rows(self.k, lowest, bound)

    def _bound(self, queries: Tensor) -> np.ndarray:
        """How far a score of ours, before it is rounded to bf16, may be from the fp32 score less q m.  [Q]"""
        length, rest = _lengths(queries), _lengths(queries - queries.bfloat16())
        sums = (self.dim + 3) * 2.0**-22 * (length + rest) * (self.centred + self.norm)
        flushed = self.dim * _FLUSHED * (1 + length + self.centred)
        bound: np.ndarray = (1.001 * (rest * self.centred + (length + rest) * self.rest + sums) + flushed).numpy()
        return bound

    def _guess(self, sample: Sequence[tuple[_Tile, Tensor, Tensor]], bound: np.ndarray) -> np.ndarray:
        """A score that the best k of all will reach, by what a sample of them has; `_Sieve.rows` sees whether.  [Q]"""
        share = sum(tile.count for tile, _, _ in sample) / self.count
        expected = self.k * share
        greatest = torch.cat([greatest for _, _, greatest in sample], dim=1)
        rank = self.k if share == 1 else min(self.k, int(expected + 4 * expected**0.5) + 4)
        rank = min(rank, greatest.shape[1])
        return _reaching(greatest.topk(rank, dim=1, sorted=False).values.amin(1).float().numpy(), bound)


class _Sieve:
    """Candidates of some queries, collected product by product.

    Args:
        needed: float32 [Q], the least score, in bf16 products, that passes; inf where nothing more is wanted.
    """

    def __init__(self, needed: np.ndarray) -> None:
        self.needed, self.found = needed, np.zeros(len(needed), dtype=np.int64)
        self.parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []

    def take(self, tile: _Tile, scores: Tensor, greatest: Tensor) -> None:
        """Scores [Q, group, groups] of one product, and the greatest of each group [Q, groups]."""
        groups = greatest.shape[1]
        query, group = np.divmod(np.flatnonzero(greatest.float().numpy() >= self.needed[:, None]), groups)
        some = scores.transpose(1, 2)[torch.from_numpy(query), torch.from_numpy(group)].float().numpy()
        hits = np.flatnonzero(some >= self.needed[query, None])
        at, member = np.divmod(hits, scores.shape[1])
        column = member * groups + group[at]
        real = column < tile.count
        who, values = query[at][real], some.reshape(-1)[hits][real]
        self.parts.append((who, tile.first + tile.step * column[real], values))
        self.found += np.bincount(who, minlength=len(self.found))
        self.needed[self.found > _MOST] = np.inf

    def rows(self, k: int, lowest: np.ndarray, bound: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """As `candidates`: those that can be among the best k of all that passed.

        Args:
            lowest: [Q], scores that can reach the floor.
            bound: [Q], of the error.
        """
        who, row, score = (np.concatenate(parts) for parts in zip(*self.parts, strict=True))
        who, row, score, place = _lists(who, row, score, self.found)
        table = np.full((len(self.found), max(k, int(self.found.max()))), -np.inf, dtype=np.float32)
        table[who, place] = score
        kth = -np.partition(-table, k - 1, axis=1)[:, k - 1]
        best = np.maximum(_reaching(kth, bound), lowest)
        open_ = best < self.needed  # what did not pass might have been needed
        kept = (score >= best[who]) & ~open_[who]
        number = np.bincount(who[kept], minlength=len(self.found))
        who, row, _, place = _lists(who[kept], row[kept], score[kept], number)
        rows = np.full((len(number), int(number.max())), NONE, dtype=np.int64)
        rows[who, place] = row
        return rows, np.flatnonzero(open_)


def _lists(who: np.ndarray, row: np.ndarray, score: np.ndarray, number: np.ndarray) -> tuple[np.ndarray, ...]:
    """Sorted by query, and each one's place in its list; ``number`` is how long the lists are.  all [M]"""
    order = np.argsort(who.astype(np.uint16), kind="stable")  # short numbers are sorted by counting
    who = who[order]
    return who, row[order], score[order], np.arange(len(who)) - (np.cumsum(number) - number)[who]


def _reaching(kth: np.ndarray, bound: np.ndarray) -> np.ndarray:
    """The least bf16 result of a passage whose score can reach those of the best k, ``kth`` their least result."""
    result = torch.from_numpy(kth).bfloat16()
    before = torch.nextafter(result, torch.full_like(result, -torch.inf))
    return _lowest((result.float() + before.float()).numpy() / 2 - bound, bound)


def _lowest(score: np.ndarray, bound: np.ndarray) -> np.ndarray:
    """The least bf16 result that a passage of this score, less q m, can have: rounding keeps the order of numbers."""
    lowest: np.ndarray = torch.from_numpy((score - bound).astype(np.float32)).bfloat16().float().numpy()
    return lowest


def _lengths(vectors: Tensor) -> Tensor:
    """Norms [N], at least: squares that are too small to be seen are added."""
    return torch.linalg.vector_norm(vectors, dim=1) + vectors.shape[1] ** 0.5 * _UNSEEN
