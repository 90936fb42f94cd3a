"""What a training set of many queries costs in memory and time: from reading to what the ranker is given.

``python benchmarks/many_queries.py 1000000`` writes synthetic MS MARCO files (so many queries, one label each, 1,000
passages), loads them, takes the positives, makes pools 20 deep, draws lists from them, tokenises, encodes the queries
into a file, and draws 100 batches of 64 lists of 16 from the ranker's feed, as training does. Models are random, of one
layer and 64 dimensions. It prints JSON: seconds; bytes of resident memory a query at the peak so far, by the kernel's
count, and of no mapped file at each step's end, both above what the process had with both models loaded and used once;
and how much of that is known. Few queries show what the work takes besides: a constant, which many queries share.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import BertConfig, BertForSequenceClassification, BertModel, BertTokenizerFast

from sparring.data import load
from sparring.log import peak_memory_bytes, release_memory, reset_peak_memory
from sparring.models import Ranker, Retriever, TokenStore, load_ranker, load_retriever
from sparring.phases.encode import encode
from sparring.phases.fit import Feed
from sparring.phases.mine import positives_of
from sparring.phases.pools import Pools
from sparring.phases.rerank import score_pairs
from sparring.phases.sample import ListSampler

PASSAGES = 1000
DEPTH = 20
BATCHES, BATCH, LIST = 100, 64, 16
DIM, BUDGET = 64, 2048
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


def write_models(folder: Path) -> tuple[Path, Path]:
    """A random retriever and a random ranker of one layer that know the words of the texts.  -> their folders"""
    words = ["passage", "about", "topic", "what", "is", "known", "in", "case"]
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words, *"0123456789", *(f"##{n}" for n in range(10))]
    config = BertConfig(
        vocab_size=len(pieces), hidden_size=DIM, num_hidden_layers=1, num_attention_heads=2, intermediate_size=4 * DIM,
        max_position_embeddings=64, num_labels=1,
    )  # fmt: skip
    tokenizer = BertTokenizerFast(vocab={p: i for i, p in enumerate(pieces)}, do_lower_case=True, model_max_length=64)
    torch.manual_seed(0)
    for name, kind in (("retriever", BertModel), ("ranker", BertForSequenceClassification)):
        kind(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder / "retriever", folder / "ranker"


def not_mapped() -> int:
    """Bytes of this process's resident memory that are of no file."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


def size(store: TokenStore) -> int:
    """Bytes of a token store's files."""
    return store.ids.nbytes + store.offsets.nbytes + store.true_lengths.nbytes


def warm(retriever: Retriever, ranker: Ranker) -> None:
    """Use both models once: what libraries set up at their first call is no query's."""
    few = [f"what is known about topic {row} in case {row}" for row in range(BATCH)]
    store = retriever.tokenize(few, "query", None)
    encode(retriever, store, "query", token_budget=BUDGET)
    rows = np.arange(BATCH)
    stores = ranker.tokenize(few, None, "query"), ranker.tokenize(few, None)
    score_pairs(ranker, *stores, rows, rows, token_budget=BUDGET)


def measure(folder: Path, queries: int, models: tuple[Path, Path]) -> dict[str, Any]:
    """Seconds, and bytes a query, of each step."""
    retriever, ranker = load_retriever(str(models[0]), similarity="cosine"), load_ranker(str(models[1]))
    warm(retriever, ranker)
    release_memory()
    if not reset_peak_memory():
        raise SystemExit("this system does not let the peak of memory start again (/proc/self/clear_refs)")
    base, unmapped, found, began = peak_memory_bytes(), not_mapped(), dict[str, Any](), time.monotonic()

    def note(name: str) -> None:
        nonlocal began
        found[f"{name}, s"] = round(time.monotonic() - began, 2)
        found[f"{name}, peak bytes a query"] = round((peak_memory_bytes() - base) / queries)
        found[f"{name}, then held, no mapped file, bytes a query"] = round((not_mapped() - unmapped) / queries)
        began = time.monotonic()

    data = load(folder, cache=folder / "cache")
    note("read and convert")
    positives = positives_of(data.split("train"), data.queries, data.corpus)
    note("positives")
    sampler = ListSampler(pools_of(positives), LIST - 1, seed=0)
    drawn = [sampler.batch(step, BATCH) for step in range(BATCHES)]
    note("pools, and 100 batches of lists")
    assert len(sampler) == len(positives) == queries
    assert all((drawn[0][1][:, 0] == drawn[0][0] % PASSAGES).tolist())
    cache = folder / "cache" / "tokens"
    feed = Feed(
        retriever.tokenize(data.queries, "query", cache), retriever.tokenize(data.corpus, "passage", cache),
        ranker.tokenize(data.queries, cache, "query"), ranker.tokenize(data.corpus, cache), BUDGET,
    )  # fmt: skip
    note("tokens")
    vectors = encode(retriever, feed.retriever_queries, "query", out=folder / "queries.npy", token_budget=BUDGET)
    note("queries encoded into a file")
    for rows, passages in drawn:  # the call of `sparring.phases.fit.Scorer.ranker`
        pairs = ranker.batches(
            feed.ranker_queries, np.repeat(rows, LIST), feed.ranker_passages, passages.reshape(-1),
            token_budget=feed.token_budget,
        )  # fmt: skip
        assert sum(len(inputs["input_ids"]) for inputs in pairs.inputs) == BATCH * LIST
    note("100 batches of the ranker")
    assert vectors.shape == (queries, DIM)
    stores = {store.folder: store for store in (feed.retriever_queries, feed.ranker_queries)}
    found["in it, bytes a query"] = {
        "pools, in memory": POOL,
        "tokens of queries, mapped": round(sum(map(size, stores.values())) / queries),
        "embeddings of queries, mapped": 4 * DIM,
    }
    return found


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("queries", type=int)
    queries = parser.parse_args().queries
    with tempfile.TemporaryDirectory() as place:
        found = measure(write(Path(place) / "data", queries), queries, write_models(Path(place)))
    print(json.dumps({"queries": queries, **found}, indent=2))


if __name__ == "__main__":
    main()
