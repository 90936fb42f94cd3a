"""The order in which candidate lists are visited: a pure function of the seed and the step."""

from __future__ import annotations

import functools
from typing import Literal

import numpy as np

from sparring.phases.pools import Method, Pools, draw, trainable
from sparring.types import InputError

Visit = Literal["list", "query"]
"""What an epoch visits once: every list head, or every query with one of its heads, which take turns."""

_ORDER, _DRAW, _TURNS = 0, 1, 2  # independent streams of random numbers


class ListSampler:
    """Endless epochs over the list rows of pools, shuffled globally in each, with fresh negatives at each visit.

    A batch depends on (pools, n, method, seed, step, B) alone: neither a resumed run nor the number of processes
    changes what is seen. Every process draws the whole batch and takes its slice.

    Args:
        pools: rows with fewer than n candidates are left out; ``short`` counts them.
        n: negatives in a list.
        seed: any non-negative integer, or several (a run's seed and a round's number).
        method, a, b: see :func:`sparring.phases.pools.draw`.
        visit: "query" gives every query the same share of the updates, however many heads it has; its heads come in a
            random order, each once before any comes again.

    Raises:
        InputError: no pool has n candidates.
    """

    def __init__(
        self,
        pools: Pools,
        n: int,
        seed: int | tuple[int, ...],
        method: Method = "uniform",
        *,
        a: float = 0.5,
        b: float = 0.0,
        visit: Visit = "list",
    ) -> None:
        self.pools, self.n, self.method, self.a, self.b = pools, n, method, a, b
        self.seed = (seed,) if isinstance(seed, int) else tuple(seed)
        self.rows = trainable(pools, n)
        self.short = len(pools) - len(self.rows)
        self._turns = self._take_turns() if visit == "query" else None
        self._order = functools.lru_cache(maxsize=4)(self._shuffled)

    def __len__(self) -> int:
        """Lists in an epoch."""
        return len(self.rows) if self._turns is None else len(self._turns[1])

    def _take_turns(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Rows grouped by query, in random order inside each; each group's first place and size."""
        mixed = self.rows[np.random.default_rng((*self.seed, _TURNS)).permutation(len(self.rows))]
        grouped = mixed[np.argsort(self.pools.queries[mixed], kind="stable")]
        _, first, size = np.unique(self.pools.queries[grouped], return_index=True, return_counts=True)
        return grouped, first, size

    def _visited(self, epoch: int) -> np.ndarray:
        """Rows of an epoch, in the order of queries."""
        if self._turns is None:
            return self.rows
        grouped, first, size = self._turns
        return grouped[first + epoch % size]

    def _shuffled(self, epoch: int) -> np.ndarray:
        return self._visited(epoch)[np.random.default_rng((*self.seed, _ORDER, epoch)).permutation(len(self))]

    def list_rows(self, step: int, size: int) -> np.ndarray:
        """Rows of ``pools`` visited in a step (from 0), int64 [B]. A batch may run on into the next epoch."""
        if step < 0 or size < 1:
            raise InputError("no such batch", expected="step 0 or more, at least one list", got=f"{step}, {size}")
        places = np.arange(step * size, (step + 1) * size)
        result = np.empty(size, dtype=np.int64)
        for epoch in range(int(places[0]) // len(self), int(places[-1]) // len(self) + 1):
            inside = places // len(self) == epoch
            result[inside] = self._order(epoch)[places[inside] % len(self)]
        return result

    def batch(self, step: int, size: int) -> tuple[np.ndarray, np.ndarray]:
        """The lists of one step: (query rows int64 [B], passage rows int64 [B, 1 + n], column 0 the positive)."""
        rows = self.list_rows(step, size)
        rng = np.random.default_rng((*self.seed, _DRAW, step))
        return self.pools.queries[rows], draw(self.pools, rows, self.n, rng, method=self.method, a=self.a, b=self.b)
