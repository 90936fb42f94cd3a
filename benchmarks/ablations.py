"""The papers' ablations at one budget, each one `sparring compare` that goes on where it stopped.

    python benchmarks/ablations.py list
    python benchmarks/ablations.py run static --data aws --out runs/ablations         # or all; --data NAME=FOLDER
    python benchmarks/ablations.py report --out runs/ablations                        # the tables of docs/results.md

They run on small sets of 4,000 passages, 1,600 training, 200 dev and 400 test queries (benchmarks/subset.py) with the
settings of benchmarks/small.toml; `--whole` takes the data set as it is and benchmarks/quality.toml. Dev selects each
arm's pair, test is read once by each arm and seed. The column "paper" is the sign that the paper reports for the arm
against the first one.
"""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import dataclass
from pathlib import Path

from subset import subset

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

ROWS = ("retriever", "cascade")
HERE = Path(__file__).parent
PASSAGES, QUERIES = 4000, {"train": 1600, "dev": 200, "test": 400}


@dataclass(frozen=True)
class Ablation:
    """Arms, the first of which the others are tested against, and what the paper says of each."""

    question: str
    arms: str
    paper: tuple[str, ...]
    budget: int = 4096
    settings: tuple[str, ...] = ()


KL = "rocketqav2:variant=custom,kl_reduction=query_mean"
LONG = "rounds=4,retriever_steps=64,ranker_steps=64"
ABLATIONS = {
    "recipes": Ablation(
        "Does joint training help at all?",
        "separate,frozen-teacher,rocketqav2,ar2,ar2:adv_lambda=0,separate:fusion=1,duet",
        ("not reported", "+ (against static distillation)", "+ (against ANCE)", "not reported", "ours", "ours"),
    ),
    "rate": Ablation(
        "A larger learning rate of the retriever?",
        "separate,separate:retriever_lr=2e-4,separate:fusion=1,retriever_lr=4e-4,duet,duet:retriever_lr=2e-4,"
        "duet:retriever_lr=4e-4",
        ("not reported", "ours", "ours", "ours", "ours"),
    ),
    "budget": Ablation(
        "Four times the budget?",
        f"separate:{LONG},separate:fusion=1,retriever_lr=4e-4,{LONG},duet:retriever_lr=4e-4,{LONG}", ("ours", "ours"),
        budget=16384,
    ),
    "static": Ablation("Dynamic or static distillation?", "rocketqav2,rocketqav2:static=true", ("-",)),
    "pointwise": Ablation("A listwise or pointwise ranker?", "rocketqav2,rocketqav2:supervised=pointwise", ("-",)),
    "lists": Ablation(
        "Hybrid, denoised or undenoised lists?", "rocketqav2,rocketqav2:lists=denoised,rocketqav2:lists=undenoised",
        ("-", "-"),
    ),
    "length": Ablation(
        "How long a list?",
        "rocketqav2,rocketqav2:negatives=3,rocketqav2:negatives=15,rocketqav2:negatives=31",
        ("-", "+", "+"),
    ),
    "kl": Ablation(
        "Which KL, and does its gradient reach the ranker?",
        ",".join(f"{KL},kl_direction={d},detach_teacher={t}" for d in ("de_ce", "ce_de") for t in ("false", "true")),
        ("not reported",) * 3,
    ),
    "lambda": Ablation(
        "How much adversary?", "ar2:adv_lambda=0,ar2:adv_lambda=0.2,ar2", ("not reported",) * 2
    ),
    "variants": Ablation(
        "Which adversarial loss?", "ar2,ar2:variant=paper,ar2:variant=official", ("not reported",) * 2
    ),
    "rounds": Ablation(
        "How many rounds, with and without refresh?", "ar2:rounds=5,ar2:rounds=5,refresh=false", ("not reported",),
        budget=5120,
    ),
    "sampling": Ablation(
        "Which negatives of the pool?",
        "ar2:adv_lambda=0,ar2:adv_lambda=0,sampling=simans", ("+",),
    ),
    "large-ranker": Ablation("A ranker larger than the retriever", "separate,ar2,rocketqav2", ("+", "+"),
                             settings=("run.ranker_layers=6",)),
}  # fmt: skip


def run(name: str, data: str, seeds: int, out: Path, settings: list[str], whole: bool) -> None:
    """One ablation on one data set. Those with the same shared settings use one folder, and so one warm start a seed;
    an arm that an earlier ablation trained is not trained again. Its own result goes to ``out/DATA/NAME.json``."""
    from sparring.data.demo import prepare_aws, prepare_minilm
    from sparring.recipes.compare import compare

    label, _, folder = data.partition("=")
    ablation, model = ABLATIONS[name], prepare_minilm()
    source = Path(folder) if folder else prepare_aws()
    if not whole:
        source = subset(source, out / label / "data", passages=PASSAGES, queries=QUERIES)
    found = compare(
        source, model, model,
        out=out / label / (name if ablation.settings else "shared"), recipes=ablation.arms, seeds=seeds,
        budget=ablation.budget, trials=1, config=HERE / ("quality.toml" if whole else "small.toml"),
        assignments=[*ablation.settings, *settings],
        command=f"python benchmarks/ablations.py run {name} --data {label}" + " --whole" * whole,
    )  # fmt: skip
    (out / label / f"{name}.json").write_text(json.dumps(found.to_dict(), indent=1), encoding="utf-8")
    print(found.text())


def report(out: Path) -> str:
    """For each data set and ablation a table: every arm's retriever and cascade, against the ablation's first arm."""
    blocks = []
    for data in sorted(path for path in out.iterdir() if path.is_dir()):
        for name, ablation in ABLATIONS.items():
            if (data / f"{name}.json").is_file():
                found = json.loads((data / f"{name}.json").read_text(encoding="utf-8"))
                folder = data / (name if ablation.settings else "shared")
                blocks.append(block(ablation, found, folder, data.name, curves=name == "rounds"))
    return "\n\n".join(blocks)


def block(ablation: Ablation, found: dict, folder: Path, data: str, *, curves: bool) -> str:
    """One ablation on one data set: the table, tests against another arm than the first, dev's curve by round."""
    from sparring.log import table

    measure, first = found["measure"], found["arms"][0]["name"]
    tests = {(t["arm"], t["against"], t["row"]): t for t in found["tests"]}
    warm = next(one["rows"] for one in found["references"] if one["name"] == "warm start")
    rows = [["warm start", *(cell for row in ROWS for cell in (mean(warm[row][measure]), "")), "", ""]]
    for place, arm in enumerate(found["arms"]):
        cells = []
        for row in ROWS:
            test = tests.get((arm["name"], first, row)) if place else None
            cells += [mean(arm["rows"][row][measure]), difference(test) if test else ""]
        rows.append([arm["name"], *cells, f"{arm['seconds']:.0f}", ablation.paper[place - 1] if place else ""])
    lines = [
        f"**{ablation.question}** {data}, {found['budget']:,} forwards, {len(found['seeds'])} seed(s), "
        f"{found['data']['test_queries']} test queries", "",
        table(rows, ["arm", "retriever", "difference", "cascade", "difference", "s", "paper"], markdown=True),
    ]  # fmt: skip
    others = {(t["arm"], t["against"]) for t in found["tests"]} - {(a["name"], b) for a in found["arms"]
                                                                     for b in (first, a["name"])}  # fmt: skip
    for arm, against in sorted(others):
        told = "; ".join(f"{row} {difference(tests[arm, against, row])}" for row in ROWS)
        lines += ["", f"`{arm}` against `{against}`: {told}."]
    if curves:
        head = f"{measure} on dev after each round, retriever / cascade, means of the seeds:"
        lines += ["", head, "", curve(found, folder)]
    return "\n".join(lines)


def mean(cell: dict) -> str:
    """A mean over seeds with the seeds' standard deviation."""
    return f"{cell['mean']:.3f} ±{cell['seed_sd'] or 0:.3f}"


def difference(test: dict) -> str:
    """A difference with its adjusted p."""
    return f"{test['difference']:+.3f} (p {test['p_holm']:.3f})"


def curve(found: dict, folder: Path) -> str:
    """Dev's measure after each round, from the arms' run folders."""
    from sparring.log import read_metrics, table

    rows = []
    for arm in found["arms"]:
        seeds = [
            {
                record["name"]: [r[found["measure"]][0] for r in record["rows"] if r["name"] in ROWS]
                for record in read_metrics(folder / place / "metrics.jsonl")
                if record["kind"] == "evaluate" and record["split"] == "dev"
            }
            for place in arm["folders"]
        ]
        states = list(seeds[0])
        cells = [
            " / ".join(f"{sum(seed[state][i] for seed in seeds) / len(seeds):.3f}" for i in range(len(ROWS)))
            for state in states
        ]
        rows.append([arm["name"], *cells])
    return table(rows, ["arm", *states], markdown=True)


def main() -> None:
    """Parse and go."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["list", "run", "report"])
    parser.add_argument("name", nargs="?", default="all", choices=["all", *ABLATIONS])
    parser.add_argument("--data", default="aws", help="aws, or NAME=FOLDER")
    parser.add_argument("--whole", action="store_true", help="the whole data set, with benchmarks/quality.toml")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("runs/ablations"))
    parser.add_argument("--set", dest="settings", action="append", default=[])
    arguments = parser.parse_args()
    if arguments.command == "list":
        for name, ablation in ABLATIONS.items():
            print(f"{name:13} {ablation.question}\n{'':13} {ablation.arms}")
    elif arguments.command == "report":
        print(report(arguments.out))
    else:
        for name in ABLATIONS if arguments.name == "all" else [arguments.name]:
            run(name, arguments.data, arguments.seeds, arguments.out, arguments.settings, arguments.whole)


if __name__ == "__main__":
    main()
