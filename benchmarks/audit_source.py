"""A collection that grew after it was labelled: does an audit before training find what the labels miss, and does
training on the corrected labels help?

    python benchmarks/audit_source.py --out runs/audit-source               # minutes a seed; a seed in OUT is read

Labels are of an older source; six needs in ten have an answer in a newer one, too, which no label names
(`planted.py`, labels by source). A pair is trained beforehand on another help desk in the same language, with labels
that favour no source: other passages and queries about the same needs. Then, as a user would: audit that pair here
(`sparring audit`); a reviewer who knows the truth judges the rows of that table and nothing else; the pair is trained
on the labels as they are and on the corrected ones (`--corrections`), with as many updates. The arm "all" is given
every planted pair: what a perfect audit could bring. Test labels are complete; every run reads them once, at its end.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np

from audit import CONFIG, DEPTH, LONG_WARMUP, MEASURES, ROWS, Found, against, measured, review, totals
from planted import World, write_encoder, write_planted

DATA, BEFORE = World(labels="source", sources=True), World(sources=True)
OTHER = 1000
"""What is added to a seed for the help desk on which the pair is trained beforehand."""
ARMS = ("positive", "all")
UNTRAINED = ("retriever", "cascade")
"""Rows of the pair before training."""
STATES = ("zero-shot", "warm", "1", "2")
"""Refreshes of a run, each with an audit."""


def run(seed: int, out: Path) -> dict[str, Any]:
    """One seed: the pair from elsewhere, its audit, and the runs.  -> what was found, and test by query"""
    from sparring.data import load
    from sparring.recipes.standalone import audit_to
    from sparring.recipes.train import train

    start = time.monotonic()
    encoder = str(write_encoder(out / "encoder", seed, DATA))
    other = write_planted(out / "other", seed + OTHER, BEFORE)
    data = write_planted(out / "data", seed, DATA)
    settings = {**CONFIG, "run": {**CONFIG["run"], "seed": seed}}
    long = {**settings, "warmup": {**CONFIG["warmup"], **LONG_WARMUP}}
    train(other.folder, encoder, encoder, out=out / "pair", recipe="warmup", config=long, cache=out / "cache")
    pair = str(out / "pair" / "retriever"), str(out / "pair" / "ranker")
    audit_to(
        load(data.folder, cache=out / "cache"), *pair, out / "audit", lists=10**6, depth=DEPTH,
        mine_depth=CONFIG["run"]["mine_depth"], seed=seed, precision="fp32",
    )  # fmt: skip
    table = out / "audit" / "audit" / "pair.tsv"
    rows = flagged(table)
    passages = {passage for _, passage in rows & data.planted}
    verdicts = {"positive": review(table, data.planted, out / "positive.tsv", "positive"), "all": out / "all.tsv"}
    lines = ["verdict\tquery_id\tpassage_id", *(f"positive\t{q}\t{p}" for q, p in sorted(data.planted))]
    verdicts["all"].write_text("\n".join(lines) + "\n", encoding="utf-8")
    facts: dict[str, Any] = {"seed": seed, "found": vars(compared(rows, data.planted)), "arms": {}}
    for arm in ("uncorrected", *ARMS):
        done = train(
            data.folder, *pair, out=out / arm, recipe="separate", config=settings, cache=out / "cache",
            corrections=[verdicts[arm]] if arm in verdicts else [],
        )  # fmt: skip
        facts["arms"][arm] = measured(done)
        if arm == "uncorrected":
            queries = done.experiment.query_ids(done.experiment.test.rows)
            facts["touched"] = [bool(data.truth[query] & passages) for query in queries]
            facts["later"] = {
                file.stem: vars(compared(flagged(file), data.planted)) for file in (done.path / "audit").glob("*.tsv")
            }
            first = {row.name: row for row in done.outcome.test_rows}
            facts["arms"]["before training"] = {
                "test": {m: {row: first[f"zero-shot {row}"].values[m].tolist() for row in UNTRAINED} for m in MEASURES}
            }
    return {**facts, "seconds": time.monotonic() - start}


def flagged(table: Path) -> set[tuple[str, str]]:
    """The (query id, passage id) pairs of an audit's table."""
    rows = [line.split("\t") for line in table.read_text("utf-8").splitlines()[1:]]
    return {(query, passage) for _, query, passage, *_ in rows}


def compared(pairs: set[tuple[str, str]], planted: frozenset[tuple[str, str]]) -> Found:
    """Of all planted pairs, whether among the audited candidates or not."""
    return Found(len(pairs), len(pairs & planted), len(planted))


def report(results: list[dict[str, Any]]) -> str:
    """What the audit found, then test, over the seeds."""
    from sparring.log import table

    found = [["before training, `sparring audit`", *totals([Found(**facts["found"]) for facts in results])]]
    for state in [name for name in STATES if all(name in facts["later"] for facts in results)]:
        counts = [Found(**facts["later"][state]) for facts in results]
        found.append([f"uncorrected run, refresh `{state}`", *totals(counts)])
    pairs = [("before training", "uncorrected"), *(("uncorrected", arm) for arm in ARMS)]
    rows = [
        against(results, *pair, measure, row)
        for measure in MEASURES
        for row in ROWS
        for pair in pairs
        if row in UNTRAINED or pair != pairs[0]
    ]
    parts = [
        [name, *against(results, "uncorrected", "positive", measure, row, touched)]
        for measure in ("RR@10", "nDCG@10")
        for row in ("retriever", "cascade")
        for name, touched in (("judged", True), ("others", False))
    ]
    head = ["arm", "against", "test, complete labels", "before", "after", "difference", "p", "by seed"]
    seeds, seconds = ", ".join(str(f["seed"]) for f in results), np.median([f["seconds"] for f in results])
    return "\n\n".join([
        f"Seeds {seeds}, {sum(len(f['touched']) for f in results)} test queries in all; median {seconds:.0f} s a seed.",
        table(found, ["audit", "pairs", "planted", "precision", "share of all planted"], markdown=True),
        table(rows, head, markdown=True),
        "`positive` against `uncorrected`, t test over the seeds' means: " + "; ".join(over_seeds(results)) + ".",
        "`positive` against `uncorrected` by whether the query's need has a judged passage:",
        table(parts, ["needs", *head], markdown=True),
    ])  # fmt: skip


def over_seeds(results: list[dict[str, Any]]) -> list[str]:
    """For each measure and row the mean difference of the corrected labels, and p with a seed as the unit."""
    from scipy.stats import ttest_1samp

    told = []
    for measure in ("RR@10", "nDCG@10"):
        for row in ROWS:
            before, after = (
                np.array([np.mean(f["arms"][arm]["test"][measure][row]) for f in results])
                for arm in ("uncorrected", "positive")
            )
            gains = after - before
            told.append(f"{measure}, {row} {gains.mean():+.3f} (p {ttest_1samp(gains, 0).pvalue:.3f})")
    return told


def main() -> None:
    """Parse and go."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[51, 52, 53, 54, 55, 56])
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("sparring").setLevel(logging.INFO)
    results = []
    for seed in arguments.seeds:
        file = arguments.out / str(seed) / "facts.json"
        if not file.exists():
            shutil.rmtree(file.parent, ignore_errors=True)  # of one that was stopped
            file.parent.mkdir(parents=True)
            file.write_text(json.dumps(run(seed, file.parent)) + "\n", encoding="utf-8")
        results.append(json.loads(file.read_text(encoding="utf-8")))
    print(report(results))


if __name__ == "__main__":
    main()
