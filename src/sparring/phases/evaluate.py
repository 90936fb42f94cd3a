"""How good are the retriever, the ranker, and the two together. The only home of ir_measures.

One rule for ties. ir_measures hands each measure to whichever library supports it, and they break ties differently:
trec_eval (nDCG, R, Success) puts equal scores in descending order of passage id, MS MARCO's script (RR@10) in
ascending order. Here every run is first put in trec_eval's order (score as a 32-bit float, then id, both descending)
and given distinct scores, so that all measures see that one ranking. Runs made from our own arrays keep their order:
:func:`run_of` makes scores strictly descending.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sparring.phases.stats import Estimate, interval, paired_test
from sparring.types import CASCADE, FIXED, RETRIEVER, InputError, Qrels, Run

Ids = Callable[[np.ndarray], Sequence[str]]
"""Ids of rows."""

Lists = tuple[np.ndarray, np.ndarray]
"""Ranked lists: scores float32 [Q, k] and passage rows int64 [Q, k], best first; row -1 is no result."""

CUTOFFS = (1, 5, 20, 100)


def measure_names(depth: int, cutoffs: Sequence[int] = CUTOFFS) -> tuple[str, ...]:
    """RR@10 and nDCG@10, then R@k (share of the positives found) and Success@k (is any found) for cutoffs <= depth."""
    kept = [k for k in cutoffs if k <= depth]
    return ("RR@10", "nDCG@10", *(f"R@{k}" for k in kept), *(f"Success@{k}" for k in kept))


def judged(qrels: Qrels) -> dict[str, dict[str, int]]:
    """Positives of the queries that have any, query ids sorted: what every mean is taken over."""
    kept = {q: {p: int(g) for p, g in qrels[q].items() if g > 0} for q in sorted(qrels)}
    return {q: positives for q, positives in kept.items() if positives}


def per_query(qrels: Qrels, run: Mapping[str, Mapping[str, float]], measures: Sequence[str]) -> dict[str, np.ndarray]:
    """Every measure of every query with a positive, float64 [Q], aligned to ``list(judged(qrels))``.

    A query that the run lacks, or gives no passage, counts 0. Unjudged passages count as not relevant.

    Raises:
        InputError: no positive in the qrels, an unknown measure, or a score that is not a number.
    """
    import ir_measures

    positives = judged(qrels)
    if not positives:
        raise InputError("no query has a positive passage", where="qrels", expected="at least one grade above 0")
    parsed = {_measure(name): name for name in measures}
    deepest = max(measure["cutoff"] for measure in parsed)
    rankings = {q: distinct_scores(run[q], deepest, q) for q in positives if run.get(q)}
    row = {q: i for i, q in enumerate(positives)}
    values = {name: np.zeros(len(positives)) for name in measures}
    for found in ir_measures.iter_calc(list(parsed), positives, rankings):
        values[parsed[found.measure]][row[found.query_id]] = found.value
    return values


def distinct_scores(ranking: Mapping[str, float], depth: int, query_id: str = "") -> dict[str, float]:
    """The first ``depth`` passages in trec_eval's order with the scores depth, depth - 1, ...: no tie is left."""
    ids = list(ranking)
    scores = np.array([ranking[i] for i in ids], dtype=np.float32)
    if np.isnan(scores).any():
        raise InputError("a score in the run is not a number", where=f"query {query_id}")
    order = sorted(range(len(ids)), key=lambda i: (scores[i], ids[i]), reverse=True)[:depth]
    return {ids[i]: float(depth - rank) for rank, i in enumerate(order)}


def check_measures(measures: Sequence[str], depth: int) -> None:
    """Refuse unknown measures, and cutoffs that lists of ``depth`` passages cannot fill."""
    for name in measures:
        if _measure(name)["cutoff"] > depth:
            raise InputError(
                f"{name} needs longer lists", where="measures", expected=f"a cutoff of at most {depth}", got=name,
                fix="search deeper (run.search_depth), or leave this measure out",
            )  # fmt: skip


@functools.cache
def _measure(name: str) -> Any:
    import ir_measures

    known = {"RR": ir_measures.RR, "nDCG": ir_measures.nDCG, "R": ir_measures.R, "Success": ir_measures.Success}
    kind, _, cutoff = name.partition("@")
    if kind not in known or not cutoff.isdecimal() or int(cutoff) < 1:
        expected = "RR@k, nDCG@k, R@k or Success@k"
        raise InputError("unknown measure", where="measures", expected=expected, got=name)
    return known[kind] @ int(cutoff)


def run_of(query_ids: Sequence[str], passage_ids: Ids, scores: np.ndarray, rows: np.ndarray) -> Run:
    """A run in the order of the arrays.

    Args:
        query_ids: id of each list.
        passage_ids: ids of passage rows (``corpus.ids``).
        scores, rows: [Q, k], best first; row -1 is no result.

    Scores are 32-bit floats; where two are equal (or not descending) the later is lowered to the next smaller one, so
    that any evaluation program sees the same order. A query without results is left out.
    """
    run: Run = {}
    for query, row, score in zip(query_ids, rows, scores, strict=True):
        found = row >= 0
        if found.any():
            run[query] = dict(zip(passage_ids(row[found]), strictly_descending(score[found]).tolist(), strict=True))
    return run


def strictly_descending(scores: np.ndarray) -> np.ndarray:
    """float32 [k] scores of which each is smaller than the one before; only those that are not are lowered."""
    result = np.asarray(scores, dtype=np.float32).copy()
    for i in np.flatnonzero(np.diff(result) >= 0) + 1:
        while i < len(result) and result[i] >= result[i - 1]:
            result[i] = np.nextafter(result[i - 1], np.float32(-np.inf))
            i += 1
    return result


@dataclass(frozen=True, eq=False)
class Row:
    """One system: means with intervals, and the values of each query that tests need (aligned to sorted ids)."""

    name: str
    estimates: Mapping[str, Estimate]
    values: Mapping[str, np.ndarray]

    def mean(self, measure: str) -> float:
        """The mean of one measure; InputError with the measures that there are."""
        if measure not in self.estimates:
            raise InputError("measure not evaluated", expected=", ".join(self.estimates), got=measure)
        return self.estimates[measure].mean

    def as_dict(self) -> dict[str, Any]:
        """Name, number of queries and ``measure: [mean, low, high]`` (None for no interval), ready for JSON."""
        cells = {m: [None if math.isnan(x) else x for x in estimate] for m, estimate in self.estimates.items()}
        return {"name": self.name, "queries": len(next(iter(self.values.values()))), **cells}


@dataclass(frozen=True, eq=False)
class Table:
    """Systems on the same queries."""

    rows: tuple[Row, ...]
    measures: tuple[str, ...]

    def row(self, name: str) -> Row:
        """The row of that name; InputError with the names that there are."""
        for row in self.rows:
            if row.name == name:
                return row
        raise InputError("no such row", expected=", ".join(row.name for row in self.rows), got=name)

    def cells(self, measures: Sequence[str] = ()) -> list[list[str]]:
        """Row name and ``mean [low, high]`` for each measure, for a printed table."""
        return [[row.name, *(str(row.estimates[m]) for m in measures or self.measures)] for row in self.rows]


def evaluate(
    name: str, qrels: Qrels, run: Mapping[str, Mapping[str, float]], measures: Sequence[str], seed: int
) -> Row:
    """One system's row, with 95 % bootstrap intervals over the queries that have a positive."""
    values = per_query(qrels, run, measures)
    return Row(name, {m: interval(v, seed) for m, v in values.items()}, values)


@dataclass(frozen=True, eq=False)
class ThreeRows:
    """The pair's three rows and the runs behind them, by row name."""

    table: Table
    runs: Mapping[str, Run]


def three_rows(
    qrels: Qrels,
    query_ids: Sequence[str],
    query_rows: np.ndarray,
    passage_ids: Ids,
    retrieved: Lists,
    fixed: Lists,
    score: Callable[[np.ndarray, np.ndarray], np.ndarray],
    *,
    depth: int,
    measures: Sequence[str] = (),
    seed: int = 0,
    fusion: float = 0.0,
) -> ThreeRows:
    """Retriever alone; ranker on fixed candidates; cascade: the retriever's top ``depth`` re-ranked by the ranker.

    Args:
        query_ids, query_rows: the evaluated queries, [Q].
        passage_ids: ids of passage rows (``corpus.ids``).
        retrieved: the retriever's (scores, rows) [Q, K]; below ``depth`` its order continues in the cascade.
        fixed: (scores, rows) [Q, F]: the same lists in all rounds (BM25's or the warm start's); below ``depth`` their
            order continues likewise, so that a column means the same in every row.
        score: ranker scores of pairs (query rows, passage rows); called once, with each distinct pair once.
        measures: default :func:`measure_names` of K.
        fusion: the cascade orders by ranker score + fusion x retriever score; 0 is the ranker's order.

    Returns:
        Rows and runs named :data:`RETRIEVER`, :data:`FIXED`, :data:`CASCADE`.

    Raises:
        InputError: as :func:`per_query`; depth < 1; lists of another number of queries.
    """
    if depth < 1:
        raise InputError("the cascade re-ranks nothing", where="depth", expected="1 or more", got=str(depth))
    counts = {"queries": len(query_rows), "retrieved": len(retrieved[1]), "fixed": len(fixed[1])}
    if len({*counts.values(), len(query_ids)}) > 1:
        raise InputError("lists of another number of queries", expected=str(len(query_ids)), got=str(counts))
    measures = tuple(measures) or measure_names(retrieved[1].shape[1])
    top = retrieved[1][:, :depth]
    fixed_top = fixed[1][:, :depth]
    top_scores, fixed_scores = _pair_scores(np.asarray(query_rows), (top, fixed_top), score)
    top_scores = fused(top_scores, retrieved[0][:, :depth], fusion)
    lists = {
        RETRIEVER: retrieved,
        FIXED: _continued(_ordered(fixed_scores, fixed_top), fixed),
        CASCADE: _continued(_ordered(top_scores, top), retrieved),
    }
    runs = {name: run_of(query_ids, passage_ids, *found) for name, found in lists.items()}
    rows = tuple(evaluate(name, qrels, run, measures, seed) for name, run in runs.items())
    return ThreeRows(Table(rows, measures), runs)


def fused(ranker: np.ndarray, retriever: np.ndarray, weight: float) -> np.ndarray:
    """Ranker scores + weight x retriever scores of the same pairs, -inf where the ranker's is.  -> float32 [Q, K]"""
    if not weight:
        return ranker
    scored = np.isfinite(ranker)
    return np.where(scored, ranker + np.float32(weight) * np.where(scored, retriever, 0), -np.inf).astype(np.float32)


def _pair_scores(
    query_rows: np.ndarray, lists: Sequence[np.ndarray], score: Callable[[np.ndarray, np.ndarray], np.ndarray]
) -> list[np.ndarray]:
    """Scores of every (query, passage) of several lists [Q, *], each distinct pair scored once; -inf at row -1."""
    base = max(int(rows.max(initial=0)) for rows in lists) + 1
    keys = [query_rows[:, None] * base + rows for rows in lists]
    pairs = np.unique(np.concatenate([key[rows >= 0] for key, rows in zip(keys, lists, strict=True)]))
    found = score(pairs // base, pairs % base)
    result = []
    for key, rows in zip(keys, lists, strict=True):
        scores = np.full(key.shape, -np.inf, dtype=np.float32)
        scores[rows >= 0] = found[np.searchsorted(pairs, key[rows >= 0])]
        result.append(scores)
    return result


def _ordered(scores: np.ndarray, rows: np.ndarray) -> Lists:
    """Lists by descending score, equal scores in the order they had."""
    order = np.argsort(-scores, axis=1, kind="stable")
    return np.take_along_axis(scores, order, 1), np.take_along_axis(rows, order, 1)


def _continued(head: Lists, whole: Lists) -> Lists:
    """Re-ranked lists, then the rest of the first stage, its scores moved to start 1 below the last re-ranked one."""
    rest, rest_rows = (part[:, head[1].shape[1] :] for part in whole)
    if not rest_rows.shape[1]:
        return head
    lowest = np.where(head[1] >= 0, head[0], np.inf).min(axis=1, keepdims=True)
    with np.errstate(invalid="ignore"):  # -inf - -inf where there is no result
        moved = lowest - 1 + (rest - rest[:, :1])
    return np.concatenate([head[0], moved], axis=1), np.concatenate([head[1], rest_rows], axis=1)


def verdict(retriever: Row, cascade: Row, *, measure: str = "RR@10", seed: int = 0, alpha: float = 0.05) -> str:
    """One plain sentence: does the ranker improve on its own retriever? Yes only at p < .05 in a paired test."""
    before, after = retriever.mean(measure), cascade.mean(measure)
    test = paired_test(cascade.values[measure], retriever.values[measure], seed)
    numbers = f"{measure} {before:.4f} -> {after:.4f}, randomisation test p = {test.p_randomisation:.4f}"
    numbers += f" on {test.queries} queries"
    if test.p_randomisation >= alpha:
        return f"The ranker does NOT improve on its own retriever: no significant difference ({numbers})."
    if test.difference < 0:
        return f"The ranker HURTS its own retriever: use the retriever alone ({numbers})."
    return f"The ranker improves on its own retriever ({numbers})."
