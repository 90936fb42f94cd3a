"""Score query-passage pairs with a ranker, and re-order lists by the scores."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import torch

from sparring.log import progress as progress_bar
from sparring.models import Ranker, TokenStore
from sparring.models.batching import Batches
from sparring.models.memory import Budget
from sparring.models.modes import evaluating
from sparring.models.sharding import is_sharded
from sparring.phases.overlap import ahead
from sparring.types import InputError

_PAIRS = 8192  # pairs padded and held at a time


def score_pairs(
    ranker: Ranker,
    query_store: TokenStore,
    passage_store: TokenStore,
    query_rows: np.ndarray,
    passage_rows: np.ndarray,
    *,
    token_budget: int = 16384,
    dtype: torch.dtype | None = None,
    progress: str = "score pairs",
) -> np.ndarray:
    """Raw ranker logits of N pairs, float32 [N], in the given order; a pair that is there twice is scored once.

    Dropout is off and no gradient is kept; the ranker's training mode is as before afterwards.

    Args:
        query_store, passage_store: token stores made by the ranker's tokenizer.
        token_budget: tokens of a model batch, padding included; halved where memory does not suffice.
        dtype: autocast to it; None for the weights' own.
        progress: label of the progress bar over the distinct pairs.

    Raises:
        InputError: rows of different lengths, or a logit that is not finite (with the rows of its pair).
    """
    query_rows, passage_rows = np.asarray(query_rows, dtype=np.int64), np.asarray(passage_rows, dtype=np.int64)
    if query_rows.shape != passage_rows.shape or query_rows.ndim != 1:
        got = f"{list(query_rows.shape)} and {list(passage_rows.shape)}"
        raise InputError("pairs need as many queries as passages", expected="two flat arrays", got=got)
    base = int(passage_rows.max(initial=0)) + 1
    keys, inverse = np.unique(query_rows * base + passage_rows, return_inverse=True)
    pairs = keys // base, keys % base
    lengths = np.asarray(query_store.lengths)[pairs[0]] + np.asarray(passage_store.lengths)[pairs[1]]
    order = np.argsort(-lengths, kind="stable")  # longest first: too little memory shows at once
    scores = np.empty(len(keys), dtype=np.float32)
    budget = Budget(token_budget, f"scoring pairs ({progress})", halves=not is_sharded(ranker))
    parts = [order[start : start + _PAIRS] for start in range(0, len(order), _PAIRS)]

    def made(part: np.ndarray, tokens: int) -> Batches:
        rows = pairs[0][part], pairs[1][part]
        return ranker.batches(query_store, rows[0], passage_store, rows[1], token_budget=tokens)

    def logits(inputs: Callable[[int], Batches], tokens: int) -> np.ndarray:
        found: np.ndarray = ranker(inputs(tokens)).float().cpu().numpy()
        return found

    bar = progress_bar(progress, total=len(keys), unit="pairs")
    with evaluating(ranker, dtype), bar as seen, ahead(made, parts, budget) as ready:
        for part, inputs in zip(parts, ready, strict=True):
            scores[part] = budget.run(partial(logits, inputs))
            seen.update(len(part))
    bad = np.flatnonzero(~np.isfinite(scores))
    if len(bad):
        where = f"query row {pairs[0][bad[0]]}, passage row {pairs[1][bad[0]]}"
        raise InputError("the ranker's score is not finite", where=where, got=str(scores[bad[0]]), fix="try fp32")
    return scores[inverse]


def rerank(rows: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Lists in the order of new scores: (scores float32 [Q, k], rows int64 [Q, k]), best first.

    Equal scores keep the order of ``rows`` (so the first stage decides). Row -1 is no result and stays at the end.
    """
    scores = np.where(rows < 0, -np.inf, scores).astype(np.float32)
    order = np.argsort(-scores, axis=1, kind="stable")
    return np.take_along_axis(scores, order, 1), np.take_along_axis(rows, order, 1).astype(np.int64)
