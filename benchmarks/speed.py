"""Every speed goal in one command: sentence-transformers, ports of the official steps, faiss, and the machine's peak.

    python benchmarks/speed.py                       # `make bench`; about half an hour on two free cores
    python benchmarks/speed.py --quick               # the same on a toy: whether it runs, not how fast
    python benchmarks/speed.py --rows encoding mining --out runs/speed
    python benchmarks/speed.py --device cuda --passages 18000 --steps 20    # the same rows on a GPU

Each row runs in a process of its own and writes OUT/NAME.json; OUT/table.md is made of all that are there.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")

NAMES = ("encoding", "mining", "refresh", "ranker", "joint", "ar2step", "round", "memory")
QUICK = {
    "passages": 60, "queries": 20, "ranker_layers": 2, "retriever_length": 24, "ranker_length": 40, "batch": 4,
    "steps": 2, "list_size": 4, "depth": 20, "search_passages": 3000, "search_queries": 50, "dim": 32,
    "round_steps": 2, "round_passages": 40, "round_queries": 15, "joint_lists": 2, "joint_size": 4,
    "ar2_lists": 2, "ar2_size": 4, "query_length": 16, "passage_length": 32, "pair_length": 40,
    "memory_passages": [300, 600], "repetitions": 1,
}  # fmt: skip


def parser() -> argparse.ArgumentParser:
    """The options; defaults are those of the table in docs/performance.md."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--rows", nargs="+", choices=NAMES, default=list(NAMES))
    made.add_argument("--out", type=Path, default=Path("runs/speed"))
    made.add_argument("--quick", action="store_true", help="toy sizes, a random encoder, no network")
    made.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="of models; search stays on the CPU")
    made.add_argument("--row", choices=NAMES, help=argparse.SUPPRESS)
    for name, value, text in (
        ("repetitions", 5, "timed repetitions of every arm (a round: two fewer)"),
        ("threads", len(os.sched_getaffinity(0)), "CPU threads"),
        ("seed", 0, "of what is drawn"),
        ("layers", 2, "encoder layers of the retriever; 0 keeps all"),
        ("ranker-layers", 3, "encoder layers of the ranker; 0 keeps all"),
        ("passages", 1000, "passages encoded and mined"),
        ("queries", 500, "training queries mined"),
        ("retriever-length", 128, "tokens of a passage"),
        ("ranker-length", 160, "tokens of a pair"),
        ("batch", 16, "lists an update"),
        ("steps", 2, "updates that are timed"),
        ("list-size", 8, "passages a list in training"),
        ("depth", 50, "passages mined a query in a round"),
        ("search-passages", 100_000, "vectors searched"),
        ("search-queries", 10_000, "vectors searched for"),
        ("dim", 384, "of these vectors"),
        ("joint-lists", 4, "lists of the joint step; the released one has 12 a device"),
        ("joint-size", 32, "passages of such a list"),
        ("ar2-lists", 4, "lists of AR2's updates"),
        ("ar2-size", 16, "passages of such a list"),
        ("round-steps", 8, "updates of each model in a round of AR2"),
        ("round-passages", 300, "passages of its refresh"),
        ("round-queries", 100, "queries of it"),
        ("query-length", 32, "tokens to which the port pads a query"),
        ("passage-length", 128, "a passage"),
        ("pair-length", 160, "a pair"),
        ("memory-tokens", 8, "tokens of a synthetic passage"),
    ):
        made.add_argument(f"--{name}", type=int, default=value, help=f"{text} ({value})")
    made.add_argument("--memory-passages", type=int, nargs="+", default=[10_000, 100_000])
    made.add_argument("--scratch", help="folder for the embeddings of the memory row")
    return made


def run_row(options: argparse.Namespace) -> None:
    """One row, in this process."""
    import torch

    from harness import hardware
    from material import Material
    from rows import ROWS

    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    with tempfile.TemporaryDirectory() as place:
        found = ROWS[options.row](Material.of(options, Path(place)))
    shown = {k: str(v) for k, v in vars(options).items()}
    result = {"hardware": hardware(), "options": shown, "rows": [row.to_dict() for row in found]}
    (options.out / f"{options.row}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def table(out: Path) -> str:
    """All rows that are there, as markdown."""
    from tabulate import tabulate

    from rows import met, spread

    lines, machines = [], []
    for name in NAMES:
        file = out / f"{name}.json"
        if not file.is_file():
            continue
        found = json.loads(file.read_text(encoding="utf-8"))
        machines.append(found["hardware"])
        for row in found["rows"]:
            goals = [f"{row['goal']:g}" if row["goal"] else "", f"{row['share_goal']:.0%}" if row["share_goal"] else ""]
            lines.append([
                row["what"], row["against"], spread(row["ratio"]), spread(row["share"], share=True),
                ", ".join(g for g in goals if g), met(row), f"{row['peak_gib']:.1f}", row["check"], row["note"],
            ])  # fmt: skip
    head = ["what", "against", "times as fast", "share of the peak", "goal", "met", "peak GiB", "checked first", "note"]
    return f"{tabulate(lines, head, tablefmt='github', disable_numparse=True)}\n\n{'; '.join(sorted(set(machines)))}\n"


def main() -> None:
    """Every row in a process of its own, then the table."""
    given = parser()
    options = given.parse_args()
    if options.quick:
        given.set_defaults(**QUICK)
        options = given.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.row:
        run_row(options)
        return
    for name in options.rows:
        print(f"== {name}", flush=True)
        subprocess.run([sys.executable, __file__, *sys.argv[1:], "--row", name], check=True)
    text = table(options.out)
    (options.out / "table.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
