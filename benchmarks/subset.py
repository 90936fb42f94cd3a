"""A smaller data set of the same kind: some queries of each split, all their labelled passages, and random others.

    python benchmarks/subset.py DATA OUT --passages 4000 --queries train=1600,dev=200,test=400

The same seed gives the same subset. Unlabelled positives of the whole set that are drawn stay unlabelled.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from sparring.data import Dataset, load
from sparring.data.beir import write_passages, write_qrels, write_queries


def subset(data: str | Path, out: Path, *, passages: int, queries: dict[str, int], seed: int = 0) -> Path:
    """Write the subset as a BEIR folder; what is there already is taken as it is.  -> the folder

    Args:
        passages: size of the corpus; at least what the queries' labels need.
        queries: labelled queries to draw from each split.
    """
    if (out / "corpus.jsonl").is_file():
        return out
    whole = load(data)
    rng = np.random.default_rng(seed)
    qrels = {split: drawn(whole, split, count, rng) for split, count in queries.items()}
    needed = sorted({p for labels in qrels.values() for grades in labels.values() for p in grades})
    others = np.setdiff1d(np.arange(len(whole.corpus)), whole.corpus.rows(needed))
    if not 0 <= passages - len(needed) <= len(others):
        raise SystemExit(f"--passages must be {len(needed)} to {len(whole.corpus)} for these queries")
    chosen = rng.choice(others, passages - len(needed), replace=False)
    rows = np.sort(np.concatenate([whole.corpus.rows(needed), chosen]))
    for split, labels in qrels.items():
        write_qrels(labels, out / "qrels" / f"{split}.tsv")
    asked = [query for labels in qrels.values() for query in labels]
    texts = zip(asked, whole.queries.rows(asked).tolist(), strict=True)
    write_queries(((query, whole.queries.text(row), ()) for query, row in texts), out / "queries.jsonl")
    corpus, names = whole.corpus, zip(whole.corpus.ids(rows), rows.tolist(), strict=True)
    write_passages(((name, corpus.title(row), corpus.body(row)) for name, row in names), out / "corpus.jsonl")
    return out


def drawn(whole: Dataset, split: str, count: int, rng: np.random.Generator) -> dict[str, dict[str, int]]:
    """So many labelled queries of a split, in their order there; all of them where there are fewer."""
    labels = whole.split(split)
    names = list(labels)
    rows = np.sort(rng.choice(len(names), min(count, len(names)), replace=False))
    return {names[row]: dict(labels[names[row]]) for row in rows}


def main() -> None:
    """Parse and go."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("out", type=Path)
    parser.add_argument("--passages", type=int, default=4000)
    parser.add_argument("--queries", default="train=1600,dev=200,test=400")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    queries = {split: int(count) for split, count in (part.split("=") for part in arguments.queries.split(","))}
    print(subset(arguments.data, arguments.out, passages=arguments.passages, queries=queries, seed=arguments.seed))


if __name__ == "__main__":
    main()
