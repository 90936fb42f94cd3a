"""Does joint training help? Every recipe from the same warm start, at equal trained forwards, on the AWS set.

    python benchmarks/quality.py run --seed 0 --out runs/quality      # once a seed; minutes to hours
    python benchmarks/quality.py report --out runs/quality            # the tables of docs/results.md

A run warms one pair up, then trains every recipe from it (weights put back in between). Settings are those of
benchmarks/quality.toml for all seeds; dev selects the pair of each recipe, test is read once a recipe, at its end.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np

RECIPES = ("separate", "frozen-teacher", "rocketqav2", "ar2", "ar2:adv_lambda=0")
CONFIG = Path(__file__).with_name("quality.toml")


def run(seed: int, out: Path, recipes: list[str], settings: list[str]) -> None:
    """One seed: warm start, then every recipe; a JSON and a .npz of per-query values each."""
    from sparring.data.demo import prepare_aws, prepare_minilm
    from sparring.recipes.competition import compete, prepare
    from sparring.recipes.train import resolve_config, set_up

    settings = [f"run.seed={seed}", *settings]
    objects = resolve_config("ar2", CONFIG, settings)
    model = prepare_minilm()
    x = set_up(prepare_aws(), model, model, out=out / f"seed-{seed}", recipe="ar2", objects=objects)
    start = time.monotonic()
    baselines = prepare(x, objects["warmup"])
    warm = {"seconds": time.monotonic() - start, "forwards": x.forwards.to_dict()}
    for arm in recipes:
        recipe, _, extra = arm.partition(":")
        config = resolve_config(recipe, CONFIG, [*settings, *(f"{recipe}.{pair}" for pair in extra.split(",") if pair)])
        start = time.monotonic()
        outcome = compete(x, recipe, config[recipe], baselines)
        facts = {
            "arm": arm, "seed": seed, "seconds": time.monotonic() - start, "warm": warm,
            "hardware": hardware(), **outcome.to_dict(x.forwards.to_dict()),
        }  # fmt: skip
        save(stem(out, arm, seed), facts, outcome)


def stem(out: Path, arm: str, seed: int) -> Path:
    """Where an arm's results of one seed lie, without the ending."""
    return out / f"{arm.replace(':', '-')}-{seed}"


def save(path: Path, facts: dict, outcome: object) -> None:
    """Facts as JSON and every row's per-query values, test and dev, as .npz."""
    values = {}
    for split, rows, tables in (
        ("dev", outcome.dev_rows, outcome.dev_tables),
        ("test", outcome.test_rows, outcome.test_tables),
    ):
        named = [(row.name, row) for row in rows]
        named += [(f"{'warm start' if i == 0 else 'best'}|{row.name}", row)
                  for i, (_, table) in enumerate(tables) for row in table.rows]  # fmt: skip
        for name, row in named:
            values |= {f"{split}|{name}|{measure}": per_query for measure, per_query in row.values.items()}
    Path(f"{path}.json").write_text(json.dumps(facts, indent=1, ensure_ascii=False))
    np.savez_compressed(f"{path}.npz", **values)


def hardware() -> str:
    """CPU cores, precision units and threads, as text."""
    import torch

    from sparring.distributed import cpu_bf16_units

    units = f" with {cpu_bf16_units()}" if cpu_bf16_units() else ""
    return f"{os.cpu_count()} x86 cores{units}, {torch.get_num_threads()} thread(s), torch {torch.__version__}, " + (
        f"{platform.system()}"
    )


def report(out: Path, measures: tuple[str, ...] = ("RR@10", "nDCG@10", "R@10")) -> str:
    """Tables over all seeds: mean [95 % interval over queries] (spread of the seeds), tests against `separate`."""
    from sparring.log import table
    from sparring.phases.evaluate import CASCADE, FIXED, RETRIEVER
    from sparring.phases.stats import interval, paired_test

    facts = [json.loads(path.read_text()) for path in sorted(out.glob("*.json"))]
    if not facts:
        raise SystemExit(f"{out}: no results; run `python benchmarks/quality.py run --seed 0 --out {out}` first")
    arms = [arm for arm in RECIPES if any(f["arm"] == arm for f in facts)]
    loaded = {(f["arm"], f["seed"]): dict(np.load(f"{stem(out, f['arm'], f['seed'])}.npz")) for f in facts}
    seeds = sorted({seed for _, seed in loaded})

    def of(arm: str, row: str, measure: str) -> list[np.ndarray]:
        found = []
        for seed in seeds:
            values = loaded[arm, seed]
            key = f"test|best|{row}|{measure}"
            found.append(values[key] if key in values else values[f"test|warm start|{row}|{measure}"])
        return found

    def cell(per_seed: list[np.ndarray]) -> str:
        mean = interval(np.mean(per_seed, axis=0))
        spread = [float(v.mean()) for v in per_seed]
        return f"{mean.mean:.3f} [{mean.low:.3f}, {mean.high:.3f}] ({min(spread):.3f}..{max(spread):.3f})"

    def plain(name: str, measure: str) -> list[np.ndarray]:
        return [loaded[arms[0], seed][f"test|{name}|{measure}"] for seed in seeds]

    rows = [[name, *(cell(plain(name, m)) for m in measures)] for name in ("BM25", "zero-shot retriever")]
    for row in (RETRIEVER, FIXED, CASCADE):
        rows.append([f"warm start: {row}", *(cell(plain(f"warm start|{row}", m)) for m in measures)])
    for arm in arms:
        rows += [[f"{arm}: {row}", *(cell(of(arm, row, m)) for m in measures)] for row in (RETRIEVER, FIXED, CASCADE)]
    tests = []
    for arm in arms:
        for row in (RETRIEVER, CASCADE):
            after = np.mean(of(arm, row, "RR@10"), axis=0)
            against = {"warm start": np.mean(plain(f"warm start|{row}", "RR@10"), axis=0)}
            if arm != "separate" and "separate" in arms:
                against["separate"] = np.mean(of("separate", row, "RR@10"), axis=0)
            for name, before in against.items():
                test = paired_test(after, before)
                numbers = (f"{test.difference:+.4f}", f"{test.p_randomisation:.4f}", f"{test.p_t:.4f}")
                tests.append([arm, row, name, *numbers])
    costs = []
    for arm in arms:
        own = [f for f in facts if f["arm"] == arm]
        names = ("retriever_trained", "ranker_trained", "ranker_teacher")
        counts = [f"{own[0]['forwards'][n]:,}" for n in names]
        kept = ", ".join(f["best"] for f in own)
        costs.append([arm, *counts, f"{np.median([f['seconds'] for f in own]):.0f}", kept])
    queries = len(next(iter(loaded.values()))["test|BM25|RR@10"])
    return "\n\n".join([
        f"{queries} test queries, seeds {', '.join(map(str, seeds))}; {facts[0]['hardware']}.",
        table(rows, ["system", *measures], markdown=True),
        table(tests, ["recipe", "row", "against", "RR@10 difference", "p (randomisation)", "p (t)"], markdown=True),
        table(costs, ["recipe", "retriever trained", "ranker trained", "teacher", "median s", "kept"], markdown=True),
    ])  # fmt: skip


def main() -> None:
    """Parse and go."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["run", "report"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES))
    parser.add_argument("--set", dest="settings", action="append", default=[])
    arguments = parser.parse_args()
    if arguments.command == "report":
        print(report(arguments.out))
        return
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("sparring").setLevel(logging.INFO)
    arguments.out.mkdir(parents=True, exist_ok=True)
    run(arguments.seed, arguments.out, arguments.recipes, arguments.settings)


if __name__ == "__main__":
    main()
