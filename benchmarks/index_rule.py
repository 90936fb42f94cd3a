"""What each kind of index costs to build and to search, and what it loses: the numbers behind `--index faiss`.

    python benchmarks/index_rule.py --sizes 50000 200000 --queries 2000

Clustered unit vectors; one line of JSON for every size and kind. Seconds by the clock, one run each.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import get_args

import numpy as np

from sparring.phases.index import Kind, build_index


def clustered(count: int, dim: int, seed: int) -> np.ndarray:
    """Unit vectors around shared centres, one for every 50 of them, float32 [count, dim]."""
    centres = np.random.default_rng(0).standard_normal((4096, dim), dtype=np.float32)
    rng = np.random.default_rng(seed)
    found = centres[rng.integers(0, len(centres), count)]
    found += rng.standard_normal((count, dim), dtype=np.float32)
    found /= np.linalg.norm(found, axis=1, keepdims=True)
    return found


def main() -> None:
    """Every kind at every size."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=[50_000, 200_000])
    parser.add_argument("--queries", type=int, default=2000)
    parser.add_argument("--dim", type=int, default=384)
    parser.add_argument("--kinds", nargs="+", default=list(get_args(Kind)))
    parser.add_argument("-k", type=int, default=100)
    o = parser.parse_args()
    asked = clustered(o.queries, o.dim, 2)
    for size in o.sizes:
        passages, truth = clustered(size, o.dim, 1), None
        build_index(passages[:1000]).search(asked[:10], 1)  # libraries are loaded
        for kind in o.kinds:
            start = time.perf_counter()
            index = build_index(passages, kind=kind)
            built = time.perf_counter()
            rows = index.search(asked, o.k)[1]
            ended = time.perf_counter()
            truth = rows if truth is None else truth
            found = np.mean([len(np.intersect1d(a, b)) / o.k for a, b in zip(rows, truth, strict=True)])
            facts = {"passages": size, "kind": kind, "build_s": round(built - start, 2)}
            facts |= {"search_ms_per_query": round(1000 * (ended - built) / len(asked), 3), "recall": round(found, 4)}
            print(json.dumps(facts), flush=True)


if __name__ == "__main__":
    main()
