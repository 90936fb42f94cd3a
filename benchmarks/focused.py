"""What a focused refresh saves, what it misses, and what that does to the pair in the end.

    python benchmarks/focused.py run --seed 0 --out runs/focused       # once a seed; minutes to hours
    python benchmarks/focused.py report --out runs/focused

A seed warms one pair up and trains the recipe twice from it: every refresh encodes all passages, or only those that can
matter. After each focused refresh everything is encoded with the same weights too (not timed with it), so that its
pools can be compared with those it would have had. Data: a subset of the AWS set, or all of it with --passages 0.
"""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np

from harness import hardware
from subset import subset

HERE = Path(__file__).parent
ARMS = ("all", "focused")


def run(seed: int, options: argparse.Namespace) -> None:
    """One seed, both arms; a JSON and a .npz of test values."""
    from sparring.data.demo import prepare_aws, prepare_minilm
    from sparring.phases.evaluate import CASCADE, RETRIEVER
    from sparring.recipes.competition import compete, prepare
    from sparring.recipes.train import resolve_config, set_up

    data = prepare_aws()
    if options.passages:
        queries = {split: int(count) for split, count in (part.split("=") for part in options.queries.split(","))}
        data = subset(data, options.out / "data", passages=options.passages, queries=queries)
    focus = [f"run.focus_depth={options.depth}", f"run.focus_sample={options.sample}", "run.reencode=focused"]
    assignments = [*focus, f"run.seed={seed}", *options.settings]
    objects = resolve_config(options.recipe, HERE / "small.toml", assignments)
    model = prepare_minilm()
    x = set_up(data, model, model, out=options.out / f"seed-{seed}", recipe=options.recipe, objects=objects)
    baselines = prepare(x, objects["warmup"])
    facts: dict[str, Any] = {"seed": seed, "hardware": hardware(), "passages": len(x.dataset.corpus)}
    facts |= {"train_queries": len(x.train_rows), "settings": assignments}
    values = {}
    for arm in ARMS:
        branch = x.branch(options.out / f"seed-{seed}-{arm}")
        branch.config = replace(branch.config, reencode=arm)
        truth: dict[str, dict[str, float]] = {}
        if arm == "focused":
            watch(branch, truth)
        outcome = compete(branch, options.recipe, objects[options.recipe], baselines)
        facts[arm] = {"best": outcome.best, "refreshes": refreshes(branch, truth)}
        for row in (RETRIEVER, CASCADE):
            values[f"{arm}|{row}"] = outcome.best_test.row(row).values[branch.config.select_by]
    np.savez(options.out / f"{options.recipe}-{seed}.npz", **values)
    (options.out / f"{options.recipe}-{seed}.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


def watch(x: Any, truth: dict[str, dict[str, float]]) -> None:
    """After each focused refresh, the whole one from the same weights, and how the two differ."""
    from sparring.phases.focus import hidden
    from sparring.phases.mine import pool_overlap

    real = x.refresh

    def refresh(name: str, previous: Any = None, depth: int = 0, *, complete: bool = False) -> Any:
        found = real(name, previous, depth, complete=complete)
        if previous is not None and not complete:
            x.config = replace(x.config, reencode="all")
            whole = real(f"{name}-check", None, depth)
            x.config = replace(x.config, reencode="focused")
            top = x.config.focus_depth or None
            truth[name] = {"pool_overlap": pool_overlap(found.pools, whole.pools)}
            truth[name]["top_overlap"] = pool_overlap(found.pools.top(top or 10**9), whole.pools.top(top or 10**9))
            dev = x.dev.name
            truth[name]["dev_hidden"] = hidden(found.lists[dev][1][:, :10], whole.lists[dev][1][:, :10])
        return found

    x.refresh = refresh


def refreshes(x: Any, truth: dict[str, dict[str, float]]) -> list[dict[str, Any]]:
    """Every refresh of an arm that its training paid for: what it encoded, how long it took, what it missed."""
    took = {r["name"]: r["took"] for r in x.run.metrics.records if r["kind"] == "phase"}
    own = len([r for r in x.run.metrics.records if r["kind"] == "refresh" and r["generation"] in ("zero-shot", "warm")])
    records = [r for r in x.run.metrics.records if r["kind"] == "refresh"][own:]
    kept = ("encoded", "in_lists", "passes", "train_missed", "train_missed_upper", "dev_missed", "whole")
    return [
        {
            "name": r["generation"], "encoded": len(x.dataset.corpus), **{key: r[key] for key in kept if key in r},
            "seconds": took[f"{r['generation']}-encode"] + took.get(f"{r['generation']}-index", 0.0),
            **truth.get(r["generation"], {}),
        }
        for r in records
        if not r["generation"].endswith("-check")
    ]  # fmt: skip


def report(options: argparse.Namespace) -> str:
    """Refreshes of every seed, and the pair in the end with and without."""
    from sparring.log import table
    from sparring.phases.evaluate import CASCADE, RETRIEVER
    from sparring.phases.stats import interval, paired_test

    files = sorted(options.out.glob(f"{options.recipe}-*.json"))
    found = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    rows = []
    for facts in found:
        for arm in ARMS:
            for r in facts[arm]["refreshes"]:
                share = f"{r['encoded']:,} ({r['encoded'] / facts['passages']:.0%})"
                missed = f"{r['train_missed']:.4f} (<= {r['train_missed_upper']:.4f})" if "train_missed" in r else ""
                overlap = [f"{r[key]:.4f}" if key in r else "" for key in ("top_overlap", "pool_overlap", "dev_hidden")]
                rows.append([facts["seed"], arm, r["name"], share, f"{r['seconds']:.1f}", missed, *overlap])
    mixes = [r for one in found for r in one["focused"]["refreshes"] if "train_missed" in r]
    kinds = {
        "encoded, share": [r["encoded"] / found[0]["passages"] for r in mixes],
        "missed, estimate": [r["train_missed"] for r in mixes],
        "its upper end": [r["train_missed_upper"] for r in mixes],
        "missing, top": [1 - r["top_overlap"] for r in mixes], "missing, pool": [1 - r["pool_overlap"] for r in mixes],
    }  # fmt: skip
    middle = [[name, *(f"{f(v):.3f}" for f in (np.median, min, max))] for name, v in kinds.items() if v]
    head = ["seed", "arm", "refresh", "encoded", "s", "missed, estimate", "overlap, top", "overlap, pool", "dev top 10"]
    values = [np.load(file.with_suffix(".npz")) for file in files]
    ends = []
    for row in (RETRIEVER, CASCADE):
        one, two = (np.mean([value[f"{arm}|{row}"] for value in values], axis=0) for arm in ARMS)
        test, moved = paired_test(two, one), interval(two - one)
        difference = f"{moved.mean:+.4f} [{moved.low:+.4f}, {moved.high:+.4f}]"
        ends.append([row, str(interval(one)), str(interval(two)), difference, f"{test.p_randomisation:.3f}"])
    facts = found[0]
    return "\n\n".join([
        f"{options.recipe}, {facts['passages']:,} passages, {facts['train_queries']:,} training queries, "
        f"{len(values[0][f'all|{CASCADE}'])} test queries, {len(found)} seed(s); {facts['hardware']}",
        table(rows, head, markdown=True),
        table(middle, [f"{len(mixes)} focused refreshes", "median", "lowest", "highest"], markdown=True),
        table(ends, ["test", "all", "focused", "difference", "p"], markdown=True),
    ])  # fmt: skip


def main() -> None:
    """Parse and go."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["run", "report"])
    parser.add_argument("--seed", type=int, action="append", help="repeatable; default 0")
    parser.add_argument("--out", type=Path, default=Path("runs/focused"))
    parser.add_argument("--recipe", default="ar2")
    parser.add_argument("--passages", type=int, default=6000, help="size of the subset; 0 is the whole set")
    parser.add_argument("--queries", default="train=500,dev=100,test=300")
    parser.add_argument("--depth", type=int, default=20, help="run.focus_depth")
    parser.add_argument("--sample", type=int, default=300, help="run.focus_sample")
    parser.add_argument("--set", dest="settings", action="append", default=[])
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.command == "report":
        print(report(options))
    else:
        for seed in options.seed or [0]:
            run(seed, options)


if __name__ == "__main__":
    main()
