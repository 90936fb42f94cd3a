"""What each kind of index costs to build and to search, and what it loses: the numbers behind `--index faiss`.

    python benchmarks/index_rule.py --sizes 25000 100000 --queries 500

Clustered unit vectors; one line of JSON for every size and kind. CPU seconds on one thread, one run each: what other
processes do disturbs them least, and the rule needs their ratios only.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from typing import get_args

os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")

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
    parser.add_argument("--sizes", type=int, nargs="+", default=[25_000, 100_000])
    parser.add_argument("--queries", type=int, default=500)
    parser.add_argument("--dim", type=int, default=384)
    parser.add_argument("--kinds", nargs="+", default=list(get_args(Kind)))
    parser.add_argument("-k", type=int, default=100)
    o = parser.parse_args()
    asked = clustered(o.queries, o.dim, 2)
    for size in o.sizes:
        passages, truth, exact = clustered(size, o.dim, 1), None, 0.0
        build_index(passages[:1000]).search(asked[:10], 1)  # libraries are loaded
        for kind in o.kinds:
            start = time.process_time()
            index = build_index(passages, kind=kind)
            built = time.process_time()
            rows = index.search(asked, o.k)[1]
            ended = time.process_time()
            truth = rows if truth is None else truth
            found = np.mean([len(np.intersect1d(a, b)) / o.k for a, b in zip(rows, truth, strict=True)])
            facts = {"passages": size, "kind": kind, "build_s": round(built - start, 2)}
            facts |= {"search_ms_per_query": round(1000 * (ended - built) / len(asked), 3), "recall": round(found, 4)}
            exact = exact or (ended - built) / len(asked)
            facts |= {"builds_cost_exact_queries": round((built - start) / exact)}
            print(json.dumps(facts), flush=True)


if __name__ == "__main__":
    main()
