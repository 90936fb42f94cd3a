"""Run and comparison folders written by hand: small, complete, with numbers that are easy to find again in a page.

Queries in several scripts, some of them hostile: a page that shows them must show them as text.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from sparring.phases.slices import by_length, by_script, measured, script
from sparring.phases.stats import interval, paired_test
from sparring.types import CASCADE, FIXED, RETRIEVER

ROWS = (RETRIEVER, FIXED, CASCADE)
MEASURES = ("RR@10", "nDCG@10", "R@10")
HOSTILE = '<script>alert("x")</script> & <b>"bold"</b> {{ 7 * 7 }} $x^2$'
TEXTS = (
    "how do I delete a bucket that still has objects in it?", "비밀번호를 어떻게 재설정하나요", "删除存储桶",
    "バケットを削除する方法", "EC2 인스턴스 중지", "list keys", "rotate an access key for a user without downtime",
    "what does error 403 mean when I call PutObject", "удалить пользователя", HOSTILE, "404",
    "متى تنتهي صلاحية المفتاح",
)  # fmt: skip
"""Repeated, with a number behind them."""


def cell(values: np.ndarray) -> list[float]:
    return list(interval(values))


def scores(seed: int, mean: float, count: int) -> np.ndarray:
    """Reciprocal ranks with about this mean."""
    rng = np.random.default_rng(seed)
    ranks = rng.geometric(min(0.95, mean), count)
    return np.where(ranks <= 10, 1.0 / ranks, 0.0)


def values_of(seed: int, level: float, count: int) -> dict[str, dict[str, np.ndarray]]:
    """Row -> measure -> values."""
    found = {}
    for place, row in enumerate(ROWS):
        base = scores(seed * 10 + place, level + 0.08 * place, count)
        found[row] = {"RR@10": base, "nDCG@10": np.sqrt(base), "R@10": np.sign(base)}
    return found


def rows_of(values: dict[str, dict[str, np.ndarray]], prefix: str = "") -> list[dict[str, Any]]:
    return [
        {"name": prefix + row, "queries": len(found["RR@10"]), **{m: cell(v) for m, v in found.items()}}
        for row, found in values.items()
    ]


def write(file: Path, value: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(value, ensure_ascii=False, indent=1), encoding="utf-8")


def write_run(
    folder: Path, *, rounds: int = 3, queries: int = 60, seed: int = 0, gain: float = 0.12, best: str = "",
    recipe: str = "ar2", audit: bool = True, evidence: bool = True,
) -> SimpleNamespace:  # fmt: skip
    """A finished run; returns the values behind it: ``before``, ``after`` (row -> measure -> values) and ``best``."""
    rng = np.random.default_rng(seed)
    best = best or f"round {rounds}"
    states = ["warm start", *(f"round {k}" for k in range(1, rounds + 1))]
    dev = {name: values_of(seed + 100 + n, 0.35 + gain * n / rounds, 40) for n, name in enumerate(states)}
    before = values_of(seed + 1, 0.35, queries)
    after = before if best == "warm start" else values_of(seed + 2, 0.35 + gain, queries)
    tested = [("warm start", before)] if after is before else [("warm start", before), (best, after)]
    baselines = [
        {"name": name, "queries": 40, **{m: cell(scores(seed + n, 0.2, 40)) for m in MEASURES}}
        for n, name in enumerate(("BM25", "zero-shot retriever"), 7)
    ]
    forwards = {"retriever_trained": 2560, "ranker_trained": 2560, "retriever_teacher": 0, "ranker_teacher": 1280}
    sentences = [
        f"After training ({best}) the retriever is better than the warm start's on test.",
        "The ranker improves on its own retriever <really>.",
    ]
    write(folder / "results.json", {
        "best": best, "select_by": "RR@10", "forwards": forwards, "sentences": sentences,
        "dev": baselines + [row for name in states for row in rows_of(dev[name], f"{name}: ")],
        "test": [{**b, "queries": queries} for b in baselines]
        + [row for name, values in tested for row in rows_of(values, f"{name}: ")],
    })  # fmt: skip
    write(folder / "environment.json", {
        "command": "sparring train my-data --recipe ar2 --set 'x=<y>'",
        "versions": {"python": "3.11.9", "sparring": "0.1.0", "torch": "2.13.0"},
        "hardware": {"device": ["cpu", "no GPU is visible to torch"], "precision": ["fp32", "asked for"]},
        "data": {"source": "/somewhere/help & desk", "fingerprint": "abc", "passages": 18908, "queries": 6073},
        "models": {"retriever": "11ff", "ranker": "22ee"}, "scoring": {"similarity": "cosine", "scale": 20.0},
    })  # fmt: skip
    (folder / "config.toml").write_text(
        f'recipe = "{recipe}"\n\n[run]\nseed = {seed}\nrerank_depth = 20\nfixed_candidates = "warm"\n'
        'measures = ["RR@10", "nDCG@10", "R@10"]\n\n[ar2]\nrounds = 3\nnegatives = 7\nvariant = "mean"\n'
    )
    write_metrics(folder / "metrics.jsonl", rng, rounds)
    if evidence:
        write_evidence(folder / "evidence.json", tested, rng)
    if audit:
        write_audit(folder / "audit.json", rng)
    return SimpleNamespace(before=before, after=after, best=best, dev=dev, folder=folder)


def write_metrics(file: Path, rng: np.random.Generator, rounds: int) -> None:
    """Phases, steps and refreshes of an AR2 run, 10 s apart."""
    records: list[dict[str, Any]] = []
    clock = iter(range(10, 10_000_000, 2))

    def add(kind: str, **values: Any) -> None:
        records.append({"kind": kind, "seconds": float(next(clock)), **values})

    def phase(name: str, took: float) -> None:
        add("phase", name=name, took=took, peak_memory_mb=1536)

    def fit(name: str, steps: int, terms: dict[str, float]) -> None:
        for step in range(steps):
            decay = 0.4 + 0.6 * math.exp(-3 * step / steps)
            add("step", phase=name, step=step, **{t: v * decay + 0.05 * rng.random() for t, v in terms.items()})
        phase(name, 1.5 * steps)
        add("fit", phase=name, steps=steps, queries_per_step=16, passages_per_list=8, lists=400, lists_too_short=0,
            forwards={}, **terms)  # fmt: skip

    phase("tokenise", 5.0)
    phase("zero-shot-encode", 30.0)
    phase("bm25-index", 3.0)
    fit("warm-retriever", 60, {"retriever_in_batch": 2.0})
    fit("warm-ranker", 60, {"ranker_supervised": 1.8, "reward": -0.5, "ranker_prefers_negative": 0.6})
    for k in range(1, rounds + 1):
        fit(f"{k}-ranker", 30, {"ranker_supervised": 1.2, "reward": -0.4, "ranker_prefers_negative": 0.5})
        fit(f"{k}-retriever", 30, {
            "adversarial": 9.0, "distillation": 2.4, "retriever_entropy": 1.4, "reward": -0.4,
            "ranker_prefers_negative": 0.45, "retriever_prefers_negative": 0.5,
        })  # fmt: skip
        phase(f"{k}-encode", 30.0)
        phase(f"{k}-index", 0.5)
        phase(f"{k}-mine", 1.25)
        add("refresh", generation=str(k), pool_overlap=0.9 - 0.05 * k)
        phase(f"round {k}-evaluate", 8.0)
    phase("export", 12.0)
    file.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def write_evidence(file: Path, tested: list[tuple[str, dict[str, Any]]], rng: np.random.Generator) -> None:
    """evidence.json to its documented fields, built without the code that writes it in a run."""
    count = len(tested[0][1][CASCADE]["RR@10"])
    texts = [TEXTS[n % len(TEXTS)] + ("" if n < len(TEXTS) else f" {n}") for n in range(count)]
    lengths = [len(text.split()) + 2 for text in texts]
    ids = [f"q{n}" for n in range(count)]
    names = [name for name, _ in tested]
    ranks = {name: [round(1 / v) if v else None for v in rows[CASCADE]["RR@10"]] for name, rows in tested}
    top = {name: [[f"p{(n * 7 + k * (s + 1)) % 90}" for k in range(3)] for n in range(count)]
           for s, name in enumerate(names)}  # fmt: skip
    labelled = [[f"p{(n * 7) % 90}"] for n in range(count)]
    passages = {
        f"p{n}": {"title": f"aws s3 rb {n}" if n % 9 else HOSTILE, "text": f"Passage {n}: " + "an empty bucket; " * 15}
        for n in range(90)
    }  # fmt: skip
    before, after = tested[0][1], tested[-1][1]
    moved = after[CASCADE]["RR@10"] - before[CASCADE]["RR@10"]
    order = np.argsort(-moved, kind="stable")
    first, last = ({row: values["RR@10"] for row, values in rows.items()} for rows in (before, after))
    compared = last if len(tested) > 1 else None
    groups = {"length": by_length(lengths), "script": by_script(texts)}
    parts = ("before", "after", "difference")
    slices = {
        by: [
            {"name": s.name, "queries": len(s.rows),
             **{part: {row: [None if math.isnan(v) else v for v in e] for row, e in getattr(s, part).items()}
                for part in parts}}
            for s in measured(found, first, compared)
        ]
        for by, found in groups.items()
    }  # fmt: skip
    tests = []
    for row in ROWS if len(tested) > 1 else ():
        for measure in MEASURES:
            a, b = after[row][measure], before[row][measure]
            test, change = paired_test(a, b), interval(a - b)
            tests.append({
                "row": row, "measure": measure, "before": names[0], "after": names[-1], "difference": change.mean,
                "low": change.low, "high": change.high, "p_randomisation": test.p_randomisation, "p_t": test.p_t,
                "queries": test.queries,
            })  # fmt: skip
    write(file, {
        "format": 1, "split": "test", "measures": list(MEASURES), "select_by": "RR@10", "states": names,
        "length_unit": "retriever tokens",
        "queries": [
            {"id": i, "text": text, "length": n, "script": script(text), "labelled": known, "labelled_count": 1}
            for i, text, n, known in zip(ids, texts, lengths, labelled, strict=True)
        ],
        "values": {
            name: {row: {m: v.tolist() for m, v in ms.items()} for row, ms in rows.items()} for name, rows in tested
        },
        "rank": ranks, "top": top, "passages": passages,
        "improved": [ids[n] for n in order[:10] if moved[n] > 0],
        "worsened": [ids[n] for n in order[::-1][:10] if moved[n] < 0],
        "worst": [ids[n] for n in np.argsort(last[CASCADE], kind="stable")[:10]],
        "slices": slices, "tests": tests,
    })  # fmt: skip


def write_audit(file: Path, rng: np.random.Generator) -> None:
    """audit.json with two refreshes."""
    edges = np.linspace(-8, 8, 17)
    refreshes = []
    for name in ("warm", "1"):
        positives, negatives = rng.normal(2, 2, 100), rng.normal(-3, 2.2, 1000)
        refreshes.append({
            "generation": name, "counts": {"known positives removed": 4411, "same text as a positive": 12},
            "lists": 100, "candidates": 1000, "pairs_scored": 1100, "median_positive": float(np.median(positives)),
            "histogram": {
                "edges": edges.tolist(), "positives": np.histogram(positives, edges)[0].tolist(),
                "negatives": np.histogram(negatives, edges)[0].tolist(),
            },
            "likely": 17, "file": f"audit/{name}.tsv",
            "examples": [
                {"query_id": f"t{n}", "passage_id": f"p{n}", "query": HOSTILE if n == 0 else "stop a server at night",
                 "title": f"aws ec2 stop-instances {n}", "text": "Stops an Amazon EBS-backed instance. " * 5,
                 "score": 4.25 - n / 10, "rank": n + 1}
                for n in range(15)
            ],
        })  # fmt: skip
    write(file, {"refreshes": refreshes})


ARMS = (
    ("separate", "separate", {}, 0.08),
    ("frozen-teacher", "frozen-teacher", {}, 0.1),
    ("ar2", "ar2", {"adv_lambda": 0.5}, 0.16),
    ("ar2:adv_lambda=0", "ar2", {"adv_lambda": 0.0}, 0.13),
    ("rocketqav2", "rocketqav2", {"lists": "hybrid"}, 0.14),
)


def write_comparison(folder: Path, *, evidence: bool = True, seeds: int = 3) -> dict[str, Any]:
    """A comparison of five arms over seeds; returns what was written to comparison.json."""
    arms, values = [], {}
    for name, recipe, settings, gain in ARMS:
        own = [f"seed-{seed}/{name.replace(':', '-')}" for seed in range(seeds)]
        runs = [
            write_run(folder / path, seed=50 + seed, gain=gain, recipe=recipe, audit=False, evidence=evidence)
            for seed, path in enumerate(own)
        ]
        values[name] = [run.after for run in runs]
        arms.append({
            "name": name, "recipe": recipe, "settings": settings,
            "tuning": [{"factor": f, "dev": 0.7 + gain / 10 - abs(f - 1) / 50} for f in (0.5, 1.0, 2.0)],
            "factor": 1.0, "rows": over_seeds(values[name]), "seconds": 412.0 + 100 * gain, "peak_memory_mb": 3400,
            "forwards": {
                "retriever_trained": 25600, "ranker_trained": 25600, "retriever_teacher": 0, "ranker_teacher": 12800,
            },
            "kept": ["round 3"] * seeds, "folders": own,
        })  # fmt: skip
    warm = [write_run(folder / "scratch", seed=50, audit=False, evidence=False).before] * seeds
    references = [
        {"name": name, "rows": {name: over_seeds([values_of(90 + n, 0.3 - n / 8, 60)])[RETRIEVER]}}
        for n, name in enumerate(("BM25", "zero-shot retriever"))
    ]
    references.append({"name": "warm start", "rows": over_seeds(warm)})
    tests = []
    for name, *_ in ARMS[1:]:
        for row in ROWS:
            a, b = (np.mean([run[row]["RR@10"] for run in values[arm]], axis=0) for arm in (name, "separate"))
            test, change = paired_test(a, b), interval(a - b)
            tests.append({
                "arm": name, "against": "separate", "row": row, "measure": "RR@10", "difference": change.mean,
                "low": change.low, "high": change.high, "p_randomisation": test.p_randomisation, "p_t": test.p_t,
                "p_holm": min(1.0, 12 * test.p_randomisation), "queries": 60,
            })  # fmt: skip
    written = {
        "kind": "comparison", "version": "0.1.0", "command": "sparring compare my-data --out runs/compare",
        "data": {
            "source": "/somewhere/help & desk", "passages": 18908, "queries": 6073, "dev_queries": 40,
            "test_queries": 60,
        },
        "hardware": {"device": ["cpu", "no GPU is visible to torch"]},
        "versions": {"python": "3.11.9", "sparring": "0.1.0"}, "budget": 25600,
        "counts": "Trained query-passage forwards of each model after the warm start.", "seeds": list(range(seeds)),
        "baseline": "separate", "measure": "RR@10", "measures": list(MEASURES), "references": references, "arms": arms,
        "tests": tests, "warnings": ["Dev has 40 queries: tuning on so few is noisy <careful>."],
        "verdict": {
            "ship": {"arm": "ar2", "seed": 1, "folder": "seed-1/ar2"},
            "sentences": ["Use ar2: its cascade is the best on test.", "No joint method is proven better."],
        },
    }  # fmt: skip
    write(folder / "comparison.json", written)
    return written


def over_seeds(runs: list[dict[str, dict[str, np.ndarray]]]) -> dict[str, Any]:
    """Row -> measure -> mean with interval over queries, and each seed's mean."""
    found: dict[str, Any] = {}
    for row in ROWS:
        found[row] = {}
        for measure in MEASURES:
            per_seed = [float(run[row][measure].mean()) for run in runs]
            mean, low, high = interval(np.mean([run[row][measure] for run in runs], axis=0))
            sd = float(np.std(per_seed, ddof=1)) if len(runs) > 1 else None
            found[row][measure] = {"mean": mean, "low": low, "high": high, "seed_sd": sd, "per_seed": per_seed}
    return found
