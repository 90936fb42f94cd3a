"""One training phase in a process whose memory is really limited (RLIMIT_AS), beside the same without a limit.

``python memory_worker.py RETRIEVER RANKER OUT``: prints what was noted, and how far the weights of both runs are apart.
"""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch
from accelerate import Accelerator

from fit_fixtures import load_pair
from sparring.log import Metrics
from sparring.phases.fit import Feed, fit
from sparring.recipes.steps import ranker_step

QUERIES, LISTS, PASSAGES = 96, 96, 8
WORDS = ("delete", "bucket", "user", "key", "policy", "password", "file", "folder", "reset", "commit")
ROOM = 30 * 2**20


def texts(count: int, words: int, seed: int) -> list[str]:
    """Sentences of so many words."""
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, words)) for _ in range(count)]


def draw(number: int, batch: int) -> tuple[np.ndarray, np.ndarray]:
    """Lists of random passages."""
    rng = np.random.default_rng(number)
    return np.arange(batch) % QUERIES, rng.integers(0, QUERIES, (batch, PASSAGES))


def used() -> int:
    """Bytes of this process's address space."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def trained(retriever: Path, ranker: Path, limit: int) -> tuple[dict[str, torch.Tensor], list[dict]]:
    """Weights of the ranker after two updates, and what was noted about memory."""
    pair = load_pair(retriever, ranker, dropout=False)
    queries = pair.ranker.tokenize(texts(QUERIES, 12, 0), None)
    passages = pair.ranker.tokenize(texts(QUERIES, 40, 1), None)
    pair.feed = Feed(pair.feed.retriever_queries, pair.feed.retriever_passages, queries, passages, 8192)
    team, step, metrics = pair.team(Accelerator(cpu=True)), ranker_step(), Metrics(None)
    scorer = pair.scorer(team, step)
    small = 2  # warm the allocator and every library up before the limit
    fit(team, scorer, step, draw, steps=1, batch=small, seed=1)
    if limit:
        resource.setrlimit(resource.RLIMIT_AS, (used() + limit, resource.RLIM_INFINITY))
    fit(team, scorer, step, draw, steps=2, batch=LISTS, seed=2, metrics=metrics)
    noted = [record for record in metrics.records if record["kind"] == "memory"]
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    return {name: value.clone() for name, value in pair.ranker.state_dict().items()}, noted


def main(retriever: str, ranker: str) -> None:
    """First with little memory, so that none is kept from a run with much."""
    torch.set_num_threads(1)
    got, noted = trained(Path(retriever), Path(ranker), ROOM)
    expected, none = trained(Path(retriever), Path(ranker), 0)
    dead = ("key.bias", "classifier.bias")  # gradient 0 but for rounding
    apart = max(float((got[k] - expected[k]).abs().max()) for k in got if not k.endswith(dead))
    print(json.dumps({"noted": noted, "unlimited": len(none), "apart": apart}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
