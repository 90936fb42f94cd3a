"""Hard negatives: a retriever's (or BM25's) top passages of each training query, without any known positive.

Known positives are removed by id and by equal normalised text; passages that contain an answer string can be removed
too. Nothing is ever put in to fill a short pool: short pools are counted, and reported.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Protocol

import numpy as np

from sparring.machine import give_back
from sparring.phases.denoise import Denoised, denoise
from sparring.phases.pools import Method, Pools, draw, hybrid, pool_overlap, take, trainable
from sparring.phases.vectors import Embeddings
from sparring.types import InputError, Qrels

__all__ = [
    "Denoised",
    "Method",
    "MineReport",
    "Pools",
    "denoise",
    "draw",
    "hybrid",
    "mine",
    "pool_overlap",
    "pools_from_lists",
    "positives_of",
    "report",
    "trainable",
]

Positives = Mapping[int, Sequence[int] | np.ndarray]
"""Query row -> passage rows."""

_BLOCK = 8192
_UNSPACED = re.compile(r"[\u1100-\u11ff\u3040-\u30ff\u3130-\u318f\u3400-\u9fff\uac00-\ud7ff\uf900-\ufaff]")


class Searcher(Protocol):
    """What mining needs of an index."""

    def search(self, queries: Embeddings, k: int, *, progress: str = "search") -> tuple[np.ndarray, np.ndarray]: ...

    def vectors(self, rows: np.ndarray) -> np.ndarray: ...


class Rows(Protocol):
    """What :func:`positives_of` needs of a table."""

    def rows(self, ids: Sequence[str]) -> np.ndarray: ...


def mine(
    query_embeddings: Embeddings,
    query_rows: np.ndarray,
    positives: Positives,
    index: Searcher,
    groups: np.ndarray,
    *,
    depth: int,
    scale: float = 1.0,
    known: Positives | None = None,
    answers: Mapping[int, tuple[str, ...]] | None = None,
    passage_text: Callable[[int], str] | None = None,
    generation: str = "",
    progress: str = "mine",
) -> Pools:
    """Pools from the retriever's top ``depth`` of each query (AR2, Algorithm 1: "retrieve").

    Args:
        query_embeddings: [Q, d]; row i belongs to ``query_rows[i]``.
        query_rows: distinct query rows, int64 [Q].
        positives: the passages that head a list; a query without any gives none.
        index: searches the passages' embeddings.
        groups: int64 [N]; equal for passages of equal normalised text.
        depth: passages retrieved for a query before positives are removed.
        scale: the retriever's score is ``scale * dot``.
        known: more passages that are no negatives (they head no list).
        answers: answer strings of query rows; a passage that contains one is no negative. Needs ``passage_text``.
        generation: name of the model and refresh, kept with the pools.

    Returns:
        One list row for each (query, positive), the scores of heads outside the top included.

    Raises:
        InputError: no list head, depth < 1, repeated query rows, or shapes that do not agree.
    """
    query_rows = _checked(query_rows, len(query_embeddings), depth)
    scores, rows = index.search(query_embeddings, depth, progress=progress)
    pools = pools_from_lists(
        rows,
        scores * np.float32(scale),
        query_rows,
        positives,
        groups,
        known=known,
        answers=answers,
        passage_text=passage_text,
        generation=generation,
    )
    order = np.argsort(query_rows)
    of_query = order[np.searchsorted(query_rows[order], pools.queries)]
    head_scores = np.empty(len(pools), dtype=np.float32)
    for start in range(0, len(pools), _BLOCK):
        part = slice(start, start + _BLOCK)
        queries = np.asarray(query_embeddings[of_query[part]], dtype=np.float32)
        head_scores[part] = scale * np.einsum("ij,ij->i", queries, index.vectors(pools.heads[part]))
        give_back(query_embeddings)
    return replace(pools, head_scores=head_scores, depth=depth)


def pools_from_lists(
    rows: np.ndarray,
    scores: np.ndarray,
    query_rows: np.ndarray,
    positives: Positives,
    groups: np.ndarray,
    *,
    known: Positives | None = None,
    answers: Mapping[int, tuple[str, ...]] | None = None,
    passage_text: Callable[[int], str] | None = None,
    generation: str = "",
) -> Pools:
    """Pools from ranked lists that exist already: BM25's, or a run file's.

    Args:
        rows: passage rows, best first, int64 [Q, k]; -1 where a list is shorter.
        scores: their scores, [Q, k].

    The other arguments are those of :func:`mine`. A head that is not in its list has the score NaN.
    """
    query_rows = _checked(query_rows, len(rows), rows.shape[1])
    keep, counts = _keep(rows, query_rows, positives, known or {}, groups)
    if answers:
        counts["answer removed"] = _remove_answers(keep, rows, query_rows, answers, passage_text)
    heads = [np.unique(np.asarray(positives.get(int(q), ()), dtype=np.int64)) for q in query_rows]
    of_list = np.repeat(np.arange(len(query_rows)), [len(h) for h in heads])
    if not len(of_list):
        fix = "check the qrels of the training split with `sparring check`"
        raise InputError("no query has a positive passage: there is no list to train on", where="qrels", fix=fix)
    flat_heads = np.concatenate(heads)
    offsets = np.concatenate([[0], np.cumsum(keep.sum(axis=1))]).astype(np.int64)
    flat, list_offsets = take(offsets, of_list)
    head_scores = _scores_in_lists(rows, scores, of_list, flat_heads)
    counts["positives retrieved"] = int((~np.isnan(head_scores)).sum())
    return Pools(
        queries=query_rows[of_list],
        heads=flat_heads,
        offsets=list_offsets,
        candidates=rows[keep].astype(np.int64)[flat],
        scores=scores[keep].astype(np.float32)[flat],
        head_scores=head_scores,
        generation=generation,
        depth=rows.shape[1],
        counts=counts,
    )


def positives_of(qrels: Qrels, queries: Rows, corpus: Rows) -> dict[int, np.ndarray]:
    """Passage rows of every grade above 0, by query row: the form in which mining takes qrels."""
    kept = {q: [p for p, grade in judged.items() if grade > 0] for q, judged in qrels.items()}
    kept = {q: passages for q, passages in kept.items() if passages}
    query_rows = queries.rows(list(kept))
    passage_rows = corpus.rows([p for passages in kept.values() for p in passages])
    parts = np.split(passage_rows, np.cumsum([len(p) for p in kept.values()])[:-1]) if kept else []
    return {int(q): np.asarray(part) for q, part in zip(query_rows, parts, strict=True)}


@dataclass(frozen=True)
class MineReport:
    """What mining found, for lists of 1 + n."""

    lists: int
    queries: int
    n: int
    short: int
    empty: int
    smallest: int
    median: float
    largest: int
    counts: Mapping[str, int]

    def __str__(self) -> str:
        text = (
            f"{self.lists} lists of {self.queries} queries; pools of {self.smallest} to {self.largest} negatives "
            f"(median {self.median:g}); {self.short} too short for {self.n} negatives, {self.empty} of them empty"
        )
        return "; ".join([text, *(f"{name}: {count}" for name, count in self.counts.items())])


def report(pools: Pools, n: int) -> MineReport:
    """Sizes and shortfalls of pools, when n negatives are drawn from each."""
    sizes = pools.sizes if len(pools) else np.zeros(1, dtype=np.int64)
    return MineReport(
        lists=len(pools),
        queries=len(np.unique(pools.queries)),
        n=n,
        short=pools.short(n),
        empty=pools.short(1),
        smallest=int(sizes.min()),
        median=float(np.median(sizes)),
        largest=int(sizes.max()),
        counts=pools.counts,
    )


def _checked(query_rows: np.ndarray, lists: int, depth: int) -> np.ndarray:
    query_rows = np.asarray(query_rows, dtype=np.int64)
    if depth < 1:
        raise InputError("mining needs at least one passage", where="depth", expected="1 or more", got=str(depth))
    if len(query_rows) != lists:
        raise InputError("queries and their lists differ in number", expected=str(len(query_rows)), got=str(lists))
    if len(np.unique(query_rows)) != len(query_rows):
        raise InputError("a query is there twice", where="query rows", expected="distinct rows")
    return query_rows


def _keep(
    rows: np.ndarray, query_rows: np.ndarray, positives: Positives, known: Positives, groups: np.ndarray
) -> tuple[np.ndarray, dict[str, int]]:
    """Which cells of the lists are possible negatives, bool [Q, k]. Equal id implies equal group."""
    base = int(groups.max(initial=0)) + 1
    keep = rows >= 0
    counts = {"known positives removed": 0, **({"excluded removed": 0} if known else {})}
    for start in range(0, len(rows), _BLOCK):
        part = slice(start, start + _BLOCK)
        keys = np.arange(len(rows[part]))[:, None] * base + groups[np.maximum(rows[part], 0)]
        for name, source in zip(counts, (positives, known), strict=False):
            banned = [
                i * base + np.asarray(groups[np.asarray(source[int(q)], dtype=np.int64)])
                for i, q in enumerate(query_rows[part])
                if len(source.get(int(q), ()))
            ]
            hit = np.isin(keys, np.concatenate(banned)) & keep[part] if banned else np.zeros_like(keep[part])
            counts[name] += int(hit.sum())
            keep[part] &= ~hit
    return keep, counts


def _scores_in_lists(rows: np.ndarray, scores: np.ndarray, of_list: np.ndarray, heads: np.ndarray) -> np.ndarray:
    """Scores of heads that are in their query's list, NaN for the others; float32 [R]."""
    result = np.full(len(heads), np.nan, dtype=np.float32)
    for start in range(0, len(heads), _BLOCK):
        part = slice(start, start + _BLOCK)
        at = rows[of_list[part]] == heads[part, None]
        found = np.flatnonzero(at.any(axis=1))
        result[start + found] = scores[of_list[part][found], at[found].argmax(axis=1)]
    return result


def _remove_answers(
    keep: np.ndarray,
    rows: np.ndarray,
    query_rows: np.ndarray,
    answers: Mapping[int, tuple[str, ...]],
    passage_text: Callable[[int], str] | None,
) -> int:
    """Take out of ``keep`` the passages that contain an answer; how many they were."""
    if passage_text is None:
        raise InputError("the answer filter needs the passages' texts", where="passage_text")
    text = lru_cache(maxsize=65536)(lambda row: normalised(passage_text(row)))
    removed = 0
    for i, query in enumerate(query_rows):
        wanted = [normalised(answer) for answer in answers.get(int(query), ())]
        for j in np.flatnonzero(keep[i]) if wanted else ():
            if any(contains(text(int(rows[i, j])), answer) for answer in wanted):
                keep[i, j] = False
                removed += 1
    return removed


def normalised(text: str) -> str:
    """Tokens joined by single spaces, with one at each end: NFKC, case folded; a token is a word or one other sign."""
    return " ".join(["", *re.findall(r"\w+|[^\w\s]", unicodedata.normalize("NFKC", text).casefold()), ""])


def contains(passage: str, answer: str) -> bool:
    """Whether a passage has an answer as consecutive tokens (DPR's rule); both :func:`normalised`.

    Korean particles stick to words, and Chinese and Japanese have no spaces: an answer in these scripts may also be
    a part of a token. An empty answer is in no passage.
    """
    if not answer.strip():
        return False
    return answer in passage or (_UNSPACED.search(answer) is not None and answer.strip() in passage)
