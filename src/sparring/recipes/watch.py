"""What goes wrong in a run without an error: noticed within the round, named, and written down.

Each look writes the numbers that it took (``health`` in metrics.jsonl) and a ``warning`` for each that is out of
bounds, which the log, the summary and the report show. Nothing here changes what a run does. The thresholds and their
reasons: docs/reliability.md, "Numbers that go wrong".
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np

from sparring.distributed import rank
from sparring.log import Metrics
from sparring.phases.pools import Pools

logger = logging.getLogger("sparring")

LEAST_SPREAD = 1e-3
"""Of embeddings: with the scale of 20 that cosines get, scores then differ by 0.02 at most, a flat softmax."""
LARGEST_SCORE, GROWN_SCORE, GROWTH = 1e4, 100.0, 10.0
"""Scores explode above the first, or above the second and the third times what they were when first seen. In bfloat16
numbers above 100 are 0.5 and more apart, those above 10,000 are 64."""
LEAST_RANGE = 1e-3
"""Between a list's highest and lowest ranker logit: below it, what is left of the order is rounding."""
LEAST_CHANGE, FEWEST_UPDATES = 1e-6, 5
"""A loss over different batches is never the same to a millionth, unless the scores do not depend on the texts."""
MOST_EMPTY = 0.5
"""Share of denoised lists without a negative; of mined ones none may be empty."""
SAMPLE = 2048

_NO_LOSS = {
    "kind", "seconds", "phase", "step", "retriever_entropy", "reward", "ranker_prefers_negative",
    "retriever_prefers_negative",
}  # fmt: skip


class Watch:
    """Looks at the numbers of one run.

    Args:
        metrics: where what is found is written, and what was found before is read.
    """

    def __init__(self, metrics: Metrics) -> None:
        self.metrics = metrics

    def warnings(self) -> list[str]:
        """Everything that was found so far, one sentence each."""
        return [f"{record['at']}: {record['text']}" for record in self.metrics.records if record["kind"] == "warning"]

    def retriever(self, at: str, embeddings: np.ndarray, pools: Pools, queries: Sequence[str]) -> None:
        """A refresh: the passages' embeddings [N, d], the pools mined with them, and the ids of the pools' queries."""
        spread, largest = spread_of(embeddings), _largest(pools.scores, pools.head_scores)
        self.metrics.write("health", at=at, model="retriever", embedding_spread=spread, largest_score=largest)
        if spread < LEAST_SPREAD:
            text = f"the embeddings are collapsed: all passages are nearly one vector (spread {spread:.2g})"
            self._warn(at, "collapsed embeddings", text, "lower the retriever's learning rate; use more negatives")
        self._scores(at, "retriever", largest)
        self.empty(at, pools, queries, 0.0)

    def empty(self, at: str, pools: Pools, queries: Sequence[str], most: float = MOST_EMPTY) -> None:
        """Lists without any negative, where their share is above ``most``."""
        without = np.flatnonzero(pools.sizes == 0)
        if len(without) > most * len(pools):
            some = ", ".join(dict.fromkeys(queries[row] for row in without[:5].tolist()))
            text = f"{len(without)} of {len(pools)} lists have an empty pool, e.g. those of {some}"
            self._warn(at, "empty pools", text, "mine deeper (run.mine_depth), or denoise less")

    def ranker(self, at: str, query_rows: np.ndarray, scores: np.ndarray) -> None:
        """The logits of evaluated pairs, [N] each, of which those of one query are a list."""
        order = np.argsort(query_rows, kind="stable")
        starts = np.flatnonzero(np.diff(query_rows[order], prepend=-1))
        sizes = np.diff(starts, append=len(order))
        sorted_ = scores[order]
        ranges = np.maximum.reduceat(sorted_, starts) - np.minimum.reduceat(sorted_, starts)
        ranges = ranges[sizes > 1]
        middle, largest = float(np.median(ranges)) if len(ranges) else None, _largest(scores)
        self.metrics.write("health", at=at, model="ranker", score_range=middle, largest_score=largest)
        if middle is not None and middle < LEAST_RANGE:
            text = f"the ranker gives all passages of a query the same score (median range {middle:.2g})"
            self._warn(at, "constant ranker", text, "lower its learning rate, and check that its head was trained")
        self._scores(at, "ranker", largest)

    def losses(self, phase: str) -> None:
        """A training phase that ended."""
        steps = [r for r in self.metrics.records if r["kind"] == "step" and r["phase"] == phase]
        if len(steps) < FEWEST_UPDATES:
            return
        for term in [name for name in steps[0] if name not in _NO_LOSS]:
            values = np.array([step[term] for step in steps if step.get(term) is not None], dtype=np.float64)
            if len(values) and np.ptp(values) <= LEAST_CHANGE * max(1e-3, float(np.abs(values).max())):
                text = f"the loss {term} has not moved: {values[0]:.6g} in all {len(values)} updates"
                self._warn(phase, "unmoved loss", text, "the scores do not depend on the texts: is the encoder dead?")

    def _scores(self, at: str, model: str, largest: float) -> None:
        seen = [r["largest_score"] for r in self.metrics.records if r["kind"] == "health" and r["model"] == model]
        first = next((value for value in seen if value is not None), largest)
        if largest > LARGEST_SCORE or (largest > GROWN_SCORE and largest > GROWTH * first):
            text = f"the {model}'s scores explode: {largest:.4g} is the largest, {first:.4g} when first seen"
            self._warn(at, "exploding scores", text, f"lower the {model}'s learning rate")

    def _warn(self, at: str, name: str, text: str, advice: str) -> None:
        self.metrics.write("warning", at=at, name=name, text=f"{text}; {advice}")
        if rank() == 0 and not self.metrics.muted():
            logger.warning("%s: %s; %s", at, text, advice)


def spread_of(embeddings: np.ndarray) -> float:
    r"""$1 - \|\bar x\|^2 / \overline{\|x\|^2}$ of a seeded sample: the share of their squared length in which vectors
    differ from their mean. 0 where all are alike; 1 minus the mean pairwise cosine for unit vectors.

    Args:
        embeddings: [N, d].
    """
    count = len(embeddings)
    rows = np.sort(np.random.default_rng(0).choice(count, min(SAMPLE, count), replace=False))
    sample = np.asarray(embeddings[rows], dtype=np.float64)
    length = float((sample**2).sum(axis=1).mean())
    mean = sample.mean(axis=0)
    return float(((sample - mean) ** 2).sum(axis=1).mean()) / length if length else 0.0


def _largest(*scores: np.ndarray) -> float:
    """The largest finite absolute value; 0 of none."""
    return max(float(np.abs(part[np.isfinite(part)]).max(initial=0.0)) for part in scores)
