"""Where the time goes: operations of one encoding or one ranker update, by kind.

    python benchmarks/where.py encode --precision fp32
    python benchmarks/where.py ranker --precision bf16

The profiler's own cost is in the total and not in the operations' shares of each other. Chunks are encoded in turn, not
side by side. With oneDNN's fused products, bias, activation and residual are in the products.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from tabulate import tabulate
from torch.profiler import ProfilerActivity, profile

import speed
from harness import hardware
from material import Material
from rows import DTYPES, train
from sparring.models import parallel
from sparring.phases.encode import encode
from sparring.recipes.steps import ranker_step

KINDS = {
    "matrix products": ("addmm", "mm", "linear", "_linear_pointwise", "mkldnn"),
    "attention: its products": ("bmm", "baddbmm", "scaled_dot", "flash_attention"),
    "attention: softmax": ("softmax",),
    "attention: masks and the rest of its function": ("_Attention",),
    "copies and casts": ("copy_", "cat", "index_select", "index_copy", "fill_", "zero_", "clone"),
    "activation": ("gelu", "tanh"),
    "layer norm": ("layer_norm",),
    "sums and products by element": ("add", "mul", "sum", "div"),
    "embeddings": ("embedding",),
    "optimiser": ("adam", "norm", "foreach", "clip"),
}


def kind(name: str) -> str:
    """The first kind one of whose words is in the operation's name; exact names for short ones."""
    short = name.removeprefix("aten::").removeprefix("mkldnn::").rstrip("_")
    for found, parts in KINDS.items():
        if short in [part.rstrip("_") for part in parts] or any(len(p) > 4 and p in name for p in parts):
            return found
    return "the rest"


def main() -> None:
    """Profile one of the two, after a warm-up."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["encode", "ranker"])
    parser.add_argument("--precision", choices=list(DTYPES), default="bf16")
    parser.add_argument("--passages", type=int, default=400)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    options = speed.parser().parse_args(["--passages", str(given.passages), "--queries", "100"])
    with tempfile.TemporaryDirectory() as place:
        m = Material.of(options, Path(place))
    retriever, ranker = m.retriever().eval(), m.ranker()
    feed, lists = m.feed(retriever, ranker), m.lists(options.batch, options.list_size)

    def run() -> Any:
        if given.what == "encode":
            return encode(retriever, feed.retriever_passages, "passage", token_budget=2048,
                          dtype=DTYPES[given.precision])  # fmt: skip
        return train({"ranker": ranker}, feed, ranker_step(), lists, options.batch, given.precision)

    parallel.MOST = 1  # chunks in turn: the profiler sees this thread's operations alone
    run()
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        run()
    times: Counter[str] = Counter()
    for event in profiled.key_averages():
        times[kind(event.key)] += event.self_cpu_time_total
    total = sum(times.values())
    print(f"{given.what}, {given.precision}\n")
    print(
        tabulate([[name, f"{value / total:.0%}"] for name, value in times.most_common()], ["kind", "share"], "github")
    )
    print(f"\n{hardware()}")


if __name__ == "__main__":
    main()
