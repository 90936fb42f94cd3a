"""What a comparison concludes, on values made by hand."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from scipy import stats as scipy_stats

from sparring.phases.evaluate import CASCADE, FIXED, RETRIEVER, Row
from sparring.phases.stats import interval
from sparring.recipes.arms import parse_arms
from sparring.recipes.comparison import Comparison, Evidence, conclude

ENVIRONMENT = {
    "command": "sparring compare", "hardware": {"device": ["cpu", "none"]}, "versions": {},
    "data": {"source": "toy", "passages": 5, "queries": 90},
}  # fmt: skip


def row(name: str, values: np.ndarray) -> Row:
    return Row(name, {"RR@10": interval(values)}, {"RR@10": values})


def evidence(lifts: dict[str, float], *, seeds: int = 3, queries: int = 60, dev: dict[str, list[float]] | None = None,
             kept: str = "round 1", noise: float = 0.05) -> Evidence:  # fmt: skip
    """Arms whose cascade lies ``lift`` above the warm start's, plus noise; retriever and fixed rows likewise."""
    rng = np.random.default_rng(0)
    base = rng.uniform(0.2, 0.6, queries)
    results: dict[str, Any] = {}
    for name, lift in lifts.items():
        of_seeds = []
        for seed in range(seeds):
            warm = [row(r, base + rng.normal(0, 0.01, queries)) for r in (RETRIEVER, FIXED, CASCADE)]
            own = [row(r, base + lift * share + rng.normal(0, noise, queries))
                   for r, share in ((RETRIEVER, 0.5), (FIXED, 0.7), (CASCADE, 1.0))]  # fmt: skip
            facts = {
                "references": 1, "dev": (dev or {}).get(name, [lift + seed / 100] * seeds)[seed], "kept": kept,
                "seconds": 10.0 + seed, "peak_memory_mb": 100 + seed, "factor": 1.0, "seed": seed,
                "settings": {"fusion": 1.0} if name == "duet" or "fusion=1" in name else {},
                "forwards": {"retriever_trained": 64, "ranker_trained": 64, "ranker_teacher": 0},
                "dev_queries": 20, "test_queries": queries,
            }  # fmt: skip
            of_seeds.append(([row("BM25", base), *warm, *own], facts))
        results[name] = of_seeds
    arms = parse_arms(",".join(lifts))
    return Evidence(arms, range(seeds), arms[0].name, 64, "RR@10", ("RR@10",), results, {}, ENVIRONMENT)


def test_a_cell_is_the_mean_over_seeds_and_queries_with_the_spread_of_both() -> None:
    made = evidence({"separate": 0.1, "ar2": 0.2})
    cell = conclude(made).result("ar2").cells[CASCADE]["RR@10"]
    values = np.array([rows[-1].values["RR@10"] for rows, _ in made.results["ar2"]])
    assert cell.estimate.mean == pytest.approx(values.mean())
    assert cell.estimate == interval(values.mean(axis=0))
    assert cell.per_seed == pytest.approx(values.mean(axis=1))
    assert cell.seed_sd == pytest.approx(np.std(values.mean(axis=1), ddof=1))


def test_tests_are_paired_over_queries_and_holm_adjusted_as_one_family() -> None:
    made = evidence({"separate": 0.1, "ar2": 0.11, "rocketqav2": 0.1}, noise=0.08)
    found = [t for t in conclude(made).tests if t.against == "separate" and t.arm != "separate"]
    assert [(t.arm, t.row) for t in found] == [
        (a, r) for a in ("ar2", "rocketqav2") for r in (RETRIEVER, FIXED, CASCADE)
    ]
    for test in found:
        place = -3 + [RETRIEVER, FIXED, CASCADE].index(test.row)
        a, b = (
            np.mean([rows[place].values["RR@10"] for rows, _ in made.results[n]], axis=0)
            for n in (test.arm, "separate")
        )
        assert test.difference == pytest.approx((a - b).mean())
        assert test.p_t == pytest.approx(scipy_stats.ttest_rel(a, b).pvalue)
        assert test.low < test.difference < test.high
    raw = sorted((t.p_randomisation, t.p_holm) for t in found)
    expected, least = [], 0.0
    for place, (p, _) in enumerate(raw):
        least = max(least, min(1.0, p * (6 - place)))
        expected.append(least)
    assert [adjusted for _, adjusted in raw] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("lift", "sentence"),
    [(0.2, "Joint training earned its cost here."), (-0.1, "did NOT earn its cost here: it lost quality"),
     (0.1, "did NOT earn its cost here: no significant difference")],
)  # fmt: skip
def test_a_manager_reads_whether_joint_training_earned_its_cost(lift: float, sentence: str) -> None:
    told = " ".join(conclude(evidence({"separate": 0.1, "ar2": lift})).sentences)
    assert sentence in told
    assert "at 1.0 times the training time" in told


def test_a_joint_arm_that_orders_by_both_scores_is_tested_against_one_that_does_so_too() -> None:
    both = conclude(evidence({"separate": 0.1, "separate:fusion=1": 0.2, "duet": 0.2}))
    told = " ".join(both.sentences)
    assert "did NOT earn its cost here: no significant difference" in told, "the sum of the scores did it"
    assert "duet, against separate:fusion=1" in told
    family = [t for t in both.tests if t.arm != t.against]
    assert [(t.arm, t.against) for t in family[::3]] == [
        ("separate:fusion=1", "separate"), ("duet", "separate"), ("duet", "separate:fusion=1")
    ]  # fmt: skip
    least = min(family, key=lambda t: t.p_randomisation)
    assert least.p_holm == pytest.approx(min(1, least.p_randomisation * len(family)))
    alone = " ".join(conclude(evidence({"separate": 0.1, "duet": 0.2})).sentences)
    assert "Joint training earned its cost here" in alone
    assert "The arm separate:fusion=1 tells." in alone


def test_the_pair_to_ship_is_chosen_on_dev_though_test_says_otherwise() -> None:
    made = evidence({"separate": 0.3, "ar2": 0.1}, dev={"separate": [0.5, 0.6, 0.5], "ar2": [0.6, 0.5, 0.7]})
    found = conclude(made)
    assert (found.shipped.arm.name, found.shipped.seed, found.shipped.dev) == ("ar2", 2, 0.7)
    assert found.sentences[0].startswith("Ship the pair of ar2, seed 2: the best on dev.")
    assert found.shipped_rows()[CASCADE]["RR@10"] == made.results["ar2"][2][0][-1].estimates["RR@10"]


def test_few_seeds_or_queries_and_a_kept_warm_start_are_warned_of() -> None:
    assert conclude(evidence({"separate": 0.1, "ar2": 0.2})).warnings == []
    found = conclude(evidence({"separate": 0.1, "ar2": 0.2}, seeds=1, queries=29, kept="warm start")).warnings
    assert [text.split(":")[0] for text in found[:2]] == ["1 seed", "29 test queries"]
    assert "ar2, seed 0" in found[2]
    assert "WARNING: 1 seed" in conclude(evidence({"separate": 0.1}, seeds=1)).text()


def test_without_both_kinds_of_arm_the_question_is_not_answered() -> None:
    for arms in ({"separate": 0.1, "frozen-teacher": 0.2}, {"ar2": 0.1, "rocketqav2": 0.2}):
        assert "was not asked" in " ".join(conclude(evidence(arms)).sentences)


def test_the_json_holds_the_numbers_of_the_table_and_no_nan() -> None:
    found: Comparison = conclude(evidence({"separate": 0.1, "ar2": 0.2}, seeds=1))
    told = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert [arm["name"] for arm in told["arms"]] == ["separate", "ar2"]
    cell = told["arms"][1]["rows"][CASCADE]["RR@10"]
    assert cell["seed_sd"] is None
    assert f"{cell['mean']:.3f} [{cell['low']:.3f}, {cell['high']:.3f}]" in found.text()
    bm25 = told["references"][0]["rows"]["BM25"]["RR@10"]
    assert bm25["mean"] == pytest.approx(np.mean(bm25["per_seed"]))
    assert told["verdict"]["ship"] == {"arm": "ar2", "seed": 0, "folder": "seed-0/ar2"}
    assert told["verdict"]["sentences"] == found.sentences
