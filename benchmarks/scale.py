"""Time and memory by corpus size: synthetic passages from a JSONL file to mined pools, each stage in its own process.

    python benchmarks/scale.py --passages 10000 100000 1000000 --out runs/scale
    python benchmarks/scale.py --passages 10000000 --threads 1 --out runs/scale       # about 10 GB of disk
    python benchmarks/scale.py --report --out runs/scale --figure docs/scale.svg

The stages are those of a run: convert (files to tables), tokenise, encode (to a file), mine (exact, from the file, 500
queries, top 100). A passage has 8 to 12 words of a vocabulary of 5,000, the encoder one layer of 64 dimensions: what
is measured is everything around the products. A stage that finished is not run again; one that was killed goes on
where its own code does (`encode` at the shard, `tokenise` at the last 2^18 texts, `convert` from the start). Memory is
of the whole process tree, sampled four times a second, and of it what is no mapped file.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import psutil

WORDS, QUERIES, DEPTH, DIM = 5000, 500, 100, 64
STAGES = ("convert", "tokenise", "encode", "mine")
_CHUNK = 50_000


def words() -> list[str]:
    """The vocabulary; one token each."""
    return [f"w{number}" for number in range(WORDS)]


def write_corpus(folder: Path, passages: int, seed: int = 0) -> Path:
    """A BEIR folder: so many passages, and queries that have half the words of a passage that is labelled."""
    rng, known = np.random.default_rng(seed), words()
    (folder / "qrels").mkdir(parents=True, exist_ok=True)
    asked = set(np.linspace(0, passages - 1, QUERIES).astype(int).tolist())
    queries: list[tuple[str, str]] = []
    part = folder / "corpus.part"
    with part.open("w", encoding="utf-8") as file:
        for start in range(0, passages, _CHUNK):
            size = min(_CHUNK, passages - start)
            lengths, drawn = rng.integers(8, 13, size), rng.integers(0, WORDS, (size, 12)).tolist()
            for row, (length, numbers) in enumerate(zip(lengths.tolist(), drawn, strict=True), start):
                text = [known[number] for number in numbers[:length]]
                file.write(f'{{"_id": "p{row}", "title": "", "text": "{" ".join(text)}"}}\n')
                if row in asked:
                    queries.append((f"p{row}", " ".join(text[::2])))
    lines = [json.dumps({"_id": f"q{n}", "text": text}) for n, (_, text) in enumerate(queries)]
    (folder / "queries.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    for split in ("train", "dev", "test"):
        rows = [f"q{n}\t{passage}\t1" for n, (passage, _) in enumerate(queries)]
        head = "query-id\tcorpus-id\tscore\n"
        (folder / "qrels" / f"{split}.tsv").write_text(head + "\n".join(rows) + "\n", encoding="utf-8")
    os.replace(part, folder / "corpus.jsonl")
    return folder


def write_encoder(folder: Path, seed: int = 0) -> Path:
    """A random BERT of one layer with one token a word."""
    import torch
    from transformers import BertConfig, BertModel, BertTokenizerFast

    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words()]
    config = BertConfig(
        vocab_size=len(pieces), hidden_size=DIM, num_hidden_layers=1, num_attention_heads=2, intermediate_size=4 * DIM,
        max_position_embeddings=32,
    )  # fmt: skip
    torch.manual_seed(seed)
    BertModel(config).save_pretrained(folder)
    tokenizer = BertTokenizerFast(vocab={p: i for i, p in enumerate(pieces)}, do_lower_case=True, model_max_length=32)
    tokenizer.save_pretrained(folder)
    return folder


# --- stages, each in a process of its own -----------------------------------------------------------------------------


def stage(name: str, place: Path, threads: int, shown: Callable[[str], None]) -> None:
    """One stage of a size's folder."""
    import torch

    from sparring.data import load

    torch.set_num_threads(threads)
    dataset = load(place / "data", cache=place / "cache")
    shown(f"{len(dataset.corpus):,} passages")
    if name == "convert":
        return
    from sparring.distributed import cpu_bf16_units
    from sparring.models import load_retriever
    from sparring.phases.encode import encode
    from sparring.phases.index import build_index
    from sparring.phases.mine import mine, positives_of

    retriever = load_retriever(str(place / "encoder"), similarity="cosine")
    store = retriever.tokenize(dataset.corpus, "passage", place / "cache" / "tokens")
    if name == "tokenise":
        return
    dtype, out = torch.bfloat16 if cpu_bf16_units() else None, place / "passages.npy"
    if name == "encode":
        encode(retriever, store, "passage", out=out, token_budget=2048, dtype=dtype)
        return
    corpus = np.load(out, mmap_mode="r")
    asked = encode(retriever, retriever.tokenize(dataset.queries, "query", None), "query", dtype=dtype)
    positives = positives_of(dataset.split("train"), dataset.queries, dataset.corpus)
    rows = np.array(sorted(positives))
    pools = mine(asked[rows], rows, positives, build_index(corpus), dataset.corpus.groups, depth=DEPTH)
    shown(f"{len(pools)} lists, median head score {np.median(pools.head_scores):.3f}")


def measured(command: list[str]) -> dict[str, float]:
    """Run a process to its end: seconds, CPU seconds, and the largest memory of its tree in bytes."""
    before, start = os.times(), time.monotonic()
    process = subprocess.Popen(command)
    peak = own = 0
    while process.poll() is None:
        rss, anonymous = resident(process.pid)
        peak, own = max(peak, rss), max(own, anonymous)
        time.sleep(0.25)  # looking for children reads all of /proc
    after = os.times()
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return {"seconds": time.monotonic() - start, "cpu": cpu, "rss": peak, "anonymous": own}


def resident(pid: int) -> tuple[int, int]:
    """Resident bytes of a process and its children; of them, those that are no mapped file."""
    rss = anonymous = 0
    with contextlib.suppress(psutil.Error):
        top = psutil.Process(pid)
        for process in [top, *top.children(recursive=True)]:
            with contextlib.suppress(psutil.Error):
                info = process.memory_info()
                rss, anonymous = rss + info.rss, anonymous + info.rss - getattr(info, "shared", 0)
    return rss, anonymous


def run(passages: int, out: Path, threads: int) -> None:
    """All stages of one size; what is done already stays."""
    place, found = out / str(passages), out / f"{passages}.json"
    facts: dict[str, Any] = json.loads(found.read_text("utf-8")) if found.is_file() else {"passages": passages}
    if not (place / "data" / "corpus.jsonl").is_file():
        write_corpus(place / "data", passages)
    if not (place / "encoder").is_dir():
        write_encoder(place / "encoder")
    for name in STAGES:
        if name in facts:
            continue
        command = [sys.executable, __file__, "--stage", name, "--out", str(place), "--threads", str(threads)]
        facts[name] = measured(command)
        facts["disk"] = sum(file.stat().st_size for file in place.rglob("*") if file.is_file())
        facts["threads"] = threads
        found.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
        print(f"{passages:,} {name}: {facts[name]['seconds']:.0f} s, {facts[name]['rss'] / 2**30:.2f} GiB", flush=True)


# --- report -----------------------------------------------------------------------------------------------------------


def sizes(out: Path) -> Iterator[dict[str, Any]]:
    """What was measured, the smallest corpus first."""
    files = [json.loads(file.read_text("utf-8")) for file in out.glob("*.json")]
    yield from sorted((f for f in files if set(STAGES) <= set(f)), key=lambda f: f["passages"])


def text(out: Path) -> str:
    """The table, as markdown. What a further passage costs is the difference to the size before."""
    from tabulate import tabulate

    rows: list[list[str]] = []
    before: dict[str, Any] | None = None
    for facts in sizes(out):
        n, stages = facts["passages"], [facts[name] for name in STAGES]
        cells = []
        for name in STAGES:
            cell = f"{facts[name]['cpu']:.0f}"
            if before is not None:
                further = (facts[name]["cpu"] - before[name]["cpu"]) / (n - before["passages"])
                cell += f" ({1e6 * further:.1f})"
            cells.append(cell)
        rows.append([
            f"{n:,}", *cells, f"{sum(s['seconds'] for s in stages):.0f}",
            f"{max(s['rss'] for s in stages) / 2**30:.2f}", f"{max(s['anonymous'] for s in stages) / 2**30:.2f}",
            f"{facts['disk'] / 1e9:.2f}",
        ])  # fmt: skip
        before = facts
    head = ["passages", *(f"{name}, CPU s (us a further passage)" for name in STAGES),
            "all, s by the clock", "peak RSS, GiB", "of it no mapped file", "disk, GB"]  # fmt: skip
    return str(tabulate(rows, head, tablefmt="github", disable_numparse=True))


def figure(out: Path, path: Path) -> None:
    """CPU seconds of each stage and the largest memory, by passages."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    found = list(sizes(out))
    counts = [facts["passages"] for facts in found]
    style = {"svg.hashsalt": "0", "svg.fonttype": "none", "font.size": 9.0, "axes.grid": True, "grid.linewidth": 0.4}
    with rc_context(style):
        canvas = Figure(figsize=(8.2, 3.0), layout="constrained")
        FigureCanvasSVG(canvas)
        time_, memory = canvas.subplots(1, 2)
        for name, marker in zip(STAGES, "os^D", strict=True):
            time_.loglog(counts, [facts[name]["cpu"] for facts in found], marker=marker, label=name)
        time_.set(xlabel="passages", ylabel="CPU seconds, one thread")
        for label, key, marker in (("resident", "rss", "o"), ("without mapped files", "anonymous", "s")):
            peak = [max(facts[name][key] for name in STAGES) / 2**30 for facts in found]
            memory.semilogx(counts, peak, marker=marker, label=label)
        memory.axhline(4, linestyle="--", color="grey", label="the limit, 4 GiB")
        memory.set(xlabel="passages", ylabel="largest memory, GiB", ylim=(0, 4.4))
        for axes in (time_, memory):
            axes.legend()
        canvas.savefig(path, format="svg", metadata={"Date": None})


def main() -> None:
    """Parse and go."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--passages", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--out", type=Path, default=Path("runs/scale"))
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--remove", action="store_true", help="remove a size's files once it is measured")
    parser.add_argument("--report", action="store_true", help="only the table of what was measured")
    parser.add_argument("--figure", type=Path, help="write the plot here (SVG)")
    parser.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.stage:
        stage(given.stage, given.out, given.threads, print)
        return
    for count in () if given.report else given.passages:
        run(count, given.out, given.threads)
        if given.remove:
            shutil.rmtree(given.out / str(count))
    print(text(given.out))
    if given.figure:
        figure(given.out, given.figure)


if __name__ == "__main__":
    main()
