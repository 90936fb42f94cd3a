"""Where the time goes: operations of one encoding or one ranker update, by kind; or what padding takes on a device.

    python benchmarks/where.py encode --precision fp32
    python benchmarks/where.py ranker --precision bf16
    python benchmarks/where.py padding --passages 8192 --queries 500

The profiler's own cost is in the total and not in the operations' shares of each other. Chunks are computed in turn,
not side by side. With oneDNN's fused products, bias, activation and residual are in the products.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
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


def padding(m: Material) -> str:
    """Share of padded tokens in forwards as large as on a GPU, and what it takes to make their tensors."""
    retriever, ranker, rng = m.retriever(), m.ranker(), np.random.default_rng(0)
    feed, rows = m.feed(retriever, ranker), []

    def pairs(lists: int, size: int) -> Any:
        queries = np.repeat(rng.integers(0, len(m.queries), lists), size)
        passages = rng.integers(0, len(m.passages), lists * size)
        return ranker.batches(feed.ranker_queries, queries, feed.ranker_passages, passages, token_budget=8192)

    def texts(count: int, budget: int) -> Any:
        chosen = rng.permutation(len(m.passages))[:count]
        return retriever.batches(feed.retriever_passages, chosen, "passage", token_budget=budget)

    for name, make in (
        ("encoding, all passages, 16,384 tokens a forward", lambda: texts(len(m.passages), 16384)),
        ("a teacher, 2,048 pairs, 8,192", lambda: pairs(128, 16)),
        ("training, 16 lists of 16, 8,192", lambda: pairs(16, 16)), ("64 lists of 16, 8,192", lambda: pairs(64, 16)),
    ):  # fmt: skip
        made = [make() for _ in range(20)]
        start = time.process_time()
        for _ in range(20):
            make()
        seconds = (time.process_time() - start) / 20
        share = np.mean([1 - one.tokens / one.padded for one in made])
        rows.append([name, f"{share:.0%}", f"{1e6 * seconds / len(made[0]):.1f}"])
    return tabulate(rows, ["forwards", "padding", "CPU us a row to make"], "github", disable_numparse=True)


def main() -> None:
    """Profile one of the two, after a warm-up, or count padding."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["encode", "ranker", "padding"])
    parser.add_argument("--precision", choices=list(DTYPES), default="bf16")
    parser.add_argument("--passages", type=int, default=400)
    parser.add_argument("--queries", type=int, default=100)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    options = speed.parser().parse_args(["--passages", str(given.passages), "--queries", str(given.queries)])
    with tempfile.TemporaryDirectory() as place:
        m = Material.of(options, Path(place))
    if given.what == "padding":
        print(f"{padding(m)}\n\n{hardware()}")
        return
    retriever, ranker = m.retriever().eval(), m.ranker()
    feed, lists = m.feed(retriever, ranker), m.lists(options.batch, options.list_size)

    def run() -> Any:
        if given.what == "encode":
            return encode(retriever, feed.retriever_passages, "passage", token_budget=2048,
                          dtype=DTYPES[given.precision])  # fmt: skip
        return train({"ranker": ranker}, feed, ranker_step(), lists, options.batch, given.precision)

    parallel.MOST = parallel.MOST_TRAINED = 1  # chunks in turn: the profiler sees this thread's operations alone
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
