"""What a training set of many queries costs in memory and time: reading, labels, the lists that the ranker trains on.

``python benchmarks/many_queries.py 1000000`` writes synthetic MS MARCO files (so many queries, one label each, 1,000
passages), loads them, takes the positives, makes pools 20 deep and draws lists from them, and prints JSON: seconds, and
bytes of resident memory a query, above what the process had before, at its peak by the kernel's count.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np

from sparring.data import load
from sparring.log import peak_memory_bytes
from sparring.phases.mine import positives_of
from sparring.phases.pools import Pools
from sparring.phases.sample import ListSampler

PASSAGES = 1000
DEPTH = 20
POOL = 16 + 4 + 8 + DEPTH * 12
"""Bytes that pools hold a list: query, head, its score, offset, and 12 a candidate."""


def write(folder: Path, queries: int) -> Path:
    """Synthetic files."""
    folder.mkdir(parents=True)
    with (folder / "collection.tsv").open("w") as file:
        file.writelines(f"{row}\tpassage {row} about topic {row % 97}\n" for row in range(PASSAGES))
    with (folder / "queries.train.tsv").open("w") as file:
        file.writelines(f"{row}\twhat is known about topic {row % 97} in case {row}\n" for row in range(queries))
    with (folder / "qrels.train.tsv").open("w") as file:
        file.writelines(f"{row}\t0\t{row % PASSAGES}\t1\n" for row in range(queries))
    return folder


def pools_of(positives: dict[int, np.ndarray]) -> Pools:
    """A pool of the next passages for every query."""
    rows = np.fromiter(positives, dtype=np.int64, count=len(positives))
    heads = np.array([positives[row][0] for row in rows.tolist()], dtype=np.int64)
    candidates = (heads[:, None] + 1 + np.arange(DEPTH)[None]) % PASSAGES
    return Pools(
        rows, heads, np.arange(len(rows) + 1, dtype=np.int64) * DEPTH, candidates.reshape(-1),
        np.zeros(len(rows) * DEPTH, np.float32), np.zeros(len(rows), np.float32), "bm25", DEPTH,
    )  # fmt: skip


def measure(folder: Path, queries: int) -> dict[str, float]:
    """Seconds, and bytes a query at the peak, of each step."""
    base, found = peak_memory_bytes(), {}

    def note(name: str, began: float) -> None:
        found[f"{name}, s"] = round(time.monotonic() - began, 2)
        found[f"{name}, peak bytes a query"] = round((peak_memory_bytes() - base) / queries)

    began = time.monotonic()
    data = load(folder, cache=folder / "cache")
    note("read and convert", began)
    began = time.monotonic()
    positives = positives_of(data.split("train"), data.queries, data.corpus)
    note("positives", began)
    began = time.monotonic()
    sampler = ListSampler(pools_of(positives), 15, seed=0)
    drawn = [sampler.batch(step, 64) for step in range(100)]
    note("pools, and 100 batches of lists", began)
    assert len(sampler) == len(positives) == queries
    assert all((drawn[0][1][:, 0] == drawn[0][0] % PASSAGES).tolist())
    return found


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("queries", type=int)
    queries = parser.parse_args().queries
    with tempfile.TemporaryDirectory() as place:
        found = measure(write(Path(place) / "data", queries), queries)
    print(json.dumps({"queries": queries, **found}, indent=2))


if __name__ == "__main__":
    main()
