"""What a refresh pays for tokenisation: nothing after the first time.

    python benchmarks/refresh.py

Counts every text that reaches a tokenizer, and the seconds spent there, while a cold run tokenises, refreshes twice
(with the retriever changed in between) and a second run on the same data starts. The cache is a new, empty folder.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch

from harness import arguments, report
from sparring.data import Dataset, load
from sparring.data.demo import prepare_aws, prepare_minilm
from sparring.models import Retriever, load_ranker, load_retriever, tokens
from sparring.phases.encode import encode
from sparring.phases.fit import Feed
from sparring.phases.index import build_index
from sparring.phases.mine import mine, positives_of
from sparring.recipes.train import tokenise


class Counter:
    """Texts that went through a tokenizer, and the seconds they took."""

    def __init__(self) -> None:
        self.texts, self.seconds = 0, 0.0

    @contextmanager
    def counting(self) -> Iterator[None]:
        plain = tokens.encode_plain

        def counted(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
            start = time.perf_counter()
            found = plain(tokenizer, texts)
            self.texts, self.seconds = self.texts + len(texts), self.seconds + time.perf_counter() - start
            return found

        tokens.encode_plain = counted
        try:
            yield
        finally:
            tokens.encode_plain = plain


def refresh(dataset: Dataset, retriever: Retriever, feed: Feed, out: Path, budget: int) -> None:
    """What lies between two rounds: encode passages and queries, index, mine the training queries."""
    corpus = encode(retriever, feed.retriever_passages, "passage", out=out, token_budget=budget, dtype=torch.bfloat16)
    queries = encode(retriever, feed.retriever_queries, "query", token_budget=budget, dtype=torch.bfloat16)
    positives = positives_of(dataset.split("train"), dataset.queries, dataset.corpus)
    rows = np.array(sorted(positives), dtype=np.int64)
    mine(queries[rows], rows, positives, build_index(corpus), dataset.corpus.groups, depth=50, scale=retriever.scale)


def main() -> None:
    parser = arguments(__doc__.splitlines()[0], repetitions=1)
    parser.add_argument("--max-length", type=int, default=16, help="tokens of a passage")
    parser.add_argument("--token-budget", type=int, default=2048, help="padded tokens of one batch")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    dataset, folder = load(prepare_aws()), prepare_minilm()
    retriever = load_retriever(folder, layers=options.layers, max_length=options.max_length)
    ranker = load_ranker(folder, layers=options.layers)
    assert len(dataset.corpus.groups) == len(dataset.corpus)  # made once per data set; no part of this
    rows: list[list[object]] = []
    result: dict[str, Any] = {"options": {k: str(v) for k, v in vars(options).items()}}

    def measure(name: str, phase: Callable[..., Any], *args: Any) -> Any:
        counter, start = Counter(), time.perf_counter()
        with counter.counting():
            found = phase(*args)
        seconds = time.perf_counter() - start
        rows.append([name, f"{seconds:.2f}", counter.texts, f"{counter.seconds:.2f}"])
        result[name] = {"seconds": seconds, "texts_tokenised": counter.texts, "seconds_tokenising": counter.seconds}
        return found

    with tempfile.TemporaryDirectory() as place:
        cache = Path(place) / "tokens"
        feed = measure("first run: tokenise", tokenise, dataset, retriever, ranker, cache, options.token_budget)
        measure("round 1: refresh", refresh, dataset, retriever, feed, Path(place) / "1.npy", options.token_budget)
        with torch.no_grad():
            next(retriever.parameters()).mul_(1.01)  # as if it had been trained
        measure("round 2: refresh", refresh, dataset, retriever, feed, Path(place) / "2.npy", options.token_budget)
        measure("second run: tokenise", tokenise, dataset, retriever, ranker, cache, options.token_budget)
    paid = sum(result[name]["texts_tokenised"] for name in result if name not in ("options", "first run: tokenise"))
    notes = [
        f"{len(dataset.corpus)} passages and {len(dataset.queries)} queries, one tokenizer for both models; "
        f"{options.layers or 'all'} layers, up to {options.max_length} tokens.",
        f"Texts tokenised after the first time: {paid}.",
    ]
    head = ["phase", "seconds", "texts tokenised", "seconds tokenising"]
    report("Tokenisation in a first and a second round", rows, head, notes, result, options.out)
    if paid:
        raise SystemExit(f"{paid} texts were tokenised again")


if __name__ == "__main__":
    main()
