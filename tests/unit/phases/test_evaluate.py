"""Every measure against a second implementation; one rule for ties; the three rows and the verdict."""

from __future__ import annotations

import math
from collections.abc import Mapping

import ir_measures
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparring.phases.evaluate import (
    CASCADE,
    FIXED,
    RETRIEVER,
    Row,
    distinct_scores,
    evaluate,
    fused,
    judged,
    measure_names,
    per_query,
    run_of,
    strictly_descending,
    three_rows,
    verdict,
)
from sparring.phases.stats import interval
from sparring.types import InputError

MEASURES = ("RR@10", "RR@2", "nDCG@10", "nDCG@3", "R@1", "R@5", "Success@1", "Success@4")


def by_hand(labels: Mapping[str, int], scores: Mapping[str, float], measure: str) -> float:
    """Plain Python, from the definitions; ties as in trec_eval: float32 score, then id, both descending."""
    kind, k = measure.split("@")
    order = sorted(scores, key=lambda p: (float(np.float32(scores[p])), p), reverse=True)[: int(k)]
    gains = [max(0, labels.get(p, 0)) for p in order]
    ideal = sorted((g for g in labels.values() if g > 0), reverse=True)
    if kind == "RR":
        return next((1 / (i + 1) for i, g in enumerate(gains) if g > 0), 0.0)
    if kind == "R":
        return sum(g > 0 for g in gains) / len(ideal)
    if kind == "Success":
        return float(any(gains))
    dcg = [sum(g / math.log2(i + 2) for i, g in enumerate(x[: int(k)])) for x in (gains, ideal)]
    return dcg[0] / dcg[1]


passage = st.sampled_from(["p1", "p2", "p10", "P3", "ㄱ", "é", "z"])
queries = st.sampled_from(["q1", "q2", "q10", "q3"])
qrels_strategy = st.dictionaries(queries, st.dictionaries(passage, st.integers(-1, 3), max_size=5), max_size=4)
scores_strategy = st.sampled_from([0.0, 1.0, 1.0 + 1e-9, 2.0, -3.5, 1e30])  # two of them are one 32-bit number
run_strategy = st.dictionaries(queries, st.dictionaries(passage, scores_strategy, max_size=7), max_size=4)


@settings(max_examples=150, deadline=None)
@given(qrels_strategy, run_strategy)
def test_all_measures_agree_with_plain_python(
    qrels: dict[str, dict[str, int]], run: dict[str, dict[str, float]]
) -> None:
    """Ties, several positives, grades, empty results, queries without positives or missing from the run."""
    expected = sorted(q for q, labels in qrels.items() if any(g > 0 for g in labels.values()))
    assert list(judged(qrels)) == expected
    if not expected:
        with pytest.raises(InputError, match="no query has a positive"):
            per_query(qrels, run, MEASURES)
        return
    found = per_query(qrels, run, MEASURES)
    for measure in MEASURES:
        wanted = [by_hand(qrels[q], run.get(q, {}), measure) for q in expected]
        np.testing.assert_allclose(found[measure], wanted, atol=1e-9, err_msg=measure)


def test_the_libraries_disagree_on_ties_and_here_they_do_not() -> None:
    """If ir_measures ever gives all measures one rule, this test tells us."""
    qrels, run = {"q": {"b": 1}}, {"q": {"a": 1.0, "b": 1.0}}
    plain = ir_measures.calc_aggregate([ir_measures.RR @ 10, ir_measures.Success @ 1], qrels, run)
    assert plain == {ir_measures.RR @ 10: 0.5, ir_measures.Success @ 1: 1.0}
    ours = per_query(qrels, run, ["RR@10", "Success@1"])
    assert (ours["RR@10"], ours["Success@1"]) == (1.0, 1.0)


def test_order_is_trec_evals() -> None:
    """nDCG of runs full of ties, straight through trec_eval, against ours."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        ids = [f"d{i}" for i in rng.permutation(30)]
        run = {"q": {i: float(s) for i, s in zip(ids, rng.integers(0, 4, 30), strict=True)}}
        qrels = {"q": {i: int(g) for i, g in zip(ids, rng.integers(0, 3, 30), strict=True)}} | {"r": {"x": 1}}
        plain = ir_measures.pytrec_eval.iter_calc([ir_measures.nDCG @ 10, ir_measures.R @ 5], qrels, run)
        ours = per_query(qrels, run, ["nDCG@10", "R@5"])
        for metric in plain:
            assert ours[str(metric.measure)][0 if metric.query_id == "q" else 1] == pytest.approx(metric.value)


def test_a_mean_is_over_all_queries_with_a_positive() -> None:
    qrels = {"a": {"x": 1}, "b": {"x": 1}, "c": {"x": 1}, "no": {"x": 0}}
    row = evaluate("name", qrels, {"a": {"x": 1.0}, "b": {}, "other": {"x": 1.0}}, ["RR@10"], 0)
    assert row.mean("RR@10") == pytest.approx(1 / 3)
    assert row.as_dict()["queries"] == 3
    with pytest.raises(InputError, match="not evaluated"):
        row.mean("R@3")


def test_measure_names_stop_at_the_depth() -> None:
    assert measure_names(20) == ("RR@10", "nDCG@10", "R@1", "R@5", "R@20", "Success@1", "Success@5", "Success@20")
    assert measure_names(50, (50, 1000)) == ("RR@10", "nDCG@10", "R@50", "Success@50")


def test_bad_input() -> None:
    for bad in ("MAP@3", "R", "R@x", "R@0", "recall@5"):
        with pytest.raises(InputError, match="unknown measure"):
            per_query({"q": {"x": 1}}, {}, [bad])
    with pytest.raises(InputError, match=r"(?s)not a number.*query q"):
        per_query({"q": {"x": 1}}, {"q": {"x": math.nan}}, ["R@5"])


@given(st.lists(st.floats(-(2.0**80), 2.0**80, width=32), min_size=1, max_size=30))
def test_strictly_descending(scores: list[float]) -> None:
    values = -np.sort(-np.array(scores, dtype=np.float32))
    result = strictly_descending(values)
    assert result.dtype == np.float32
    assert (np.diff(result) < 0).all()
    assert (result <= values).all()
    if (np.diff(values) < 0).all():
        np.testing.assert_array_equal(result, values)
    else:
        np.testing.assert_allclose(result, values, rtol=1e-5, atol=1e-40)


def names(prefix: str):
    return lambda rows: [f"{prefix}{int(row)}" for row in rows]


def test_runs_keep_the_order_of_the_arrays() -> None:
    """Equal and rising scores, ids in an order that any tie rule would change; row -1 is left out."""
    rows = np.array([[5, 40, 3, 9], [2, -1, -1, -1], [-1, -1, -1, -1]])
    scores = np.array([[1, 1, 1, 2], [7, -np.inf, -np.inf, -np.inf], [-np.inf] * 4])
    run = run_of(["q0", "q1", "q2"], names("p"), scores, rows)
    assert list(run) == ["q0", "q1"]
    assert list(distinct_scores(run["q0"], 10)) == ["p5", "p40", "p3", "p9"]
    assert sorted(run["q0"], key=lambda p: -run["q0"][p]) == ["p5", "p40", "p3", "p9"]
    assert run["q1"] == {"p2": 7.0}


def three(depth: int, seed: int = 0, fusion: float = 0.0):
    rng = np.random.default_rng(seed)
    truth = rng.standard_normal((30, 50)).astype(np.float32)
    retrieved, fixed = (np.stack([rng.permutation(50)[:k] for _ in range(30)]) for k in (20, 8))
    fixed[0, 3:] = -1
    calls = []

    def score(query_rows: np.ndarray, passage_rows: np.ndarray) -> np.ndarray:
        calls.append(list(zip(query_rows.tolist(), passage_rows.tolist(), strict=True)))
        return truth[query_rows - 100, passage_rows]

    query_rows = np.arange(100, 130)
    down = -np.tile(np.arange(20, dtype=np.float32), (30, 1))
    qrels = {f"q{100 + i}": {f"p{truth[i].argmax()}": 1} for i in range(30)}
    result = three_rows(
        qrels, names("q")(query_rows), query_rows, names("p"), (down, retrieved), (down[:, :8], fixed), score,
        depth=depth, fusion=fusion,
    )  # fmt: skip
    return result.table, result.runs, retrieved, fixed, truth, calls


def test_three_rows_are_the_three_rankings() -> None:
    table, runs, retrieved, fixed, truth, calls = three(depth=6)
    assert [row.name for row in table.rows] == [RETRIEVER, FIXED, CASCADE] == list(runs)
    for i in range(30):
        found = {name: [int(p[1:]) for p in distinct_scores(run[f"q{100 + i}"], 99)] for name, run in runs.items()}
        assert found[RETRIEVER] == retrieved[i].tolist()
        kept = fixed[i][:6][fixed[i][:6] >= 0]
        rest = fixed[i][6:][fixed[i][6:] >= 0]  # below the depth the first stage's order continues, as in the cascade
        assert found[FIXED] == [*kept[np.argsort(-truth[i, kept])].tolist(), *rest.tolist()]
        top = retrieved[i][:6]
        assert found[CASCADE] == [*top[np.argsort(-truth[i, top])].tolist(), *retrieved[i][6:].tolist()]
    assert len(calls) == 1
    assert len(set(calls[0])) == len(calls[0])
    wanted = {(100 + i, int(p)) for i in range(30) for p in (*retrieved[i][:6], *fixed[i][:6]) if p >= 0}
    assert set(calls[0]) == wanted
    assert table.measures[-1] == "Success@20"
    cells = table.cells(["R@20"])
    assert cells[0][1] == cells[2][1]  # the cascade only re-orders
    assert [row.as_dict()["name"] for row in table.rows] == [RETRIEVER, FIXED, CASCADE]


def test_a_cascade_with_fusion_orders_by_the_weighted_sum() -> None:
    _, plain, retrieved, _, truth, _ = three(depth=6)
    first = -np.arange(6)  # the retriever's scores in `three`
    _, runs, *_ = three(depth=6, fusion=0.3)
    assert runs[RETRIEVER] == plain[RETRIEVER]
    assert runs[FIXED] == plain[FIXED], "the ranker's own row stays the ranker's"
    moved = 0
    for i in range(30):
        found = [int(p[1:]) for p in distinct_scores(runs[CASCADE][f"q{100 + i}"], 99)]
        top = retrieved[i][:6]
        assert found == [*top[np.argsort(-(truth[i, top] + 0.3 * first))].tolist(), *retrieved[i][6:].tolist()]
        moved += found != [int(p[1:]) for p in distinct_scores(plain[CASCADE][f"q{100 + i}"], 99)]
    assert moved > 10


def test_fused_scores_leave_places_without_a_result_at_the_end() -> None:
    ranker = np.array([[1.0, -np.inf]], dtype=np.float32)
    np.testing.assert_array_equal(fused(ranker, np.array([[2.0, -np.inf]]), 0.5), [[2.0, -np.inf]])
    np.testing.assert_array_equal(fused(ranker, np.array([[2.0, np.nan]]), 0.5), [[2.0, -np.inf]])
    assert fused(ranker, np.array([[2.0, -np.inf]]), 0.0) is ranker


def test_a_perfect_ranker_improves_and_the_verdict_says_so() -> None:
    table, *_ = three(depth=20)
    retriever, cascade = table.row(RETRIEVER), table.row(CASCADE)
    assert cascade.mean("RR@10") >= retriever.mean("RR@10")
    assert verdict(retriever, cascade).startswith("The ranker improves on its own retriever (RR@10 ")
    assert verdict(cascade, retriever).startswith("The ranker HURTS its own retriever")
    with pytest.raises(InputError, match="no such row"):
        table.row("bm25")


def test_without_significance_the_verdict_claims_no_improvement() -> None:
    def row(values: list[float]) -> Row:
        return Row("x", {"RR@10": interval(np.array(values))}, {"RR@10": np.array(values)})

    better, worse = row([1, 1, 1, 0.5]), row([0.5, 0.5, 0.5, 0.5])  # three wins of four: p = 2/8
    said = verdict(worse, better)
    assert "does NOT improve" in said
    assert "p = 0.2500 on 4 queries" in said
    assert "does NOT improve" in verdict(better, better)


def test_lists_that_do_not_fit_are_refused() -> None:
    one, two = ((np.ones((n, 1)), np.zeros((n, 1), dtype=int)) for n in (1, 2))
    with pytest.raises(InputError, match="another number of queries"):
        three_rows({}, ["q"], np.array([1]), names("p"), one, two, np.multiply, depth=1)
    with pytest.raises(InputError, match="re-ranks nothing"):
        three_rows({}, ["q"], np.array([1]), names("p"), one, one, np.multiply, depth=0)


def test_queries_without_any_result_leave_the_rows_standing() -> None:
    none = np.full((1, 3), -np.inf), np.full((1, 3), -1)
    result = three_rows({"q": {"p1": 1}}, ["q"], np.array([0]), names("p"), none, none, np.multiply, depth=2)
    assert [row.mean("RR@10") for row in result.table.rows] == [0, 0, 0]
    assert result.table.rows[0].as_dict()["RR@10"] == [0, None, None]
