"""Encoding passages: `sparring.phases.encode` against `SentenceTransformer.encode`, same model, texts, precision.

    python benchmarks/encode.py

The SentenceTransformer's batch size is chosen so that its batches hold as many padded tokens as ours. It tokenises on
every call; ours reads tokens stored once. Both are shown: with our tokenisation in the time, and without.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")

import numpy as np
import torch
from sentence_transformers import SentenceTransformer

from harness import arguments, interleave, ratio, report
from sparring.data import load
from sparring.data.demo import prepare_aws, prepare_minilm
from sparring.models import Retriever, TokenStore, load_retriever
from sparring.phases.encode import encode

PRECISIONS: dict[str, torch.dtype | None] = {"fp32": None, "bf16": torch.bfloat16}


def sample_texts(count: int, seed: int) -> list[str]:
    """Passages of the AWS set, drawn at random: all lengths."""
    corpus = load(prepare_aws()).corpus
    rows = np.random.default_rng(seed).choice(len(corpus), count, replace=False)
    return corpus.texts(rows)


def autocast(dtype: torch.dtype | None) -> AbstractContextManager[object]:
    return nullcontext() if dtype is None else torch.autocast("cpu", dtype)


def theirs(model: SentenceTransformer, texts: list[str], batch: int, dtype: torch.dtype | None = None) -> np.ndarray:
    with autocast(dtype):
        return model.encode_document(texts, batch_size=batch, show_progress_bar=False)


def batch_of(retriever: Retriever, texts: list[str], store: TokenStore, budget: int) -> tuple[int, float, float]:
    """The batch size nearest to our padded tokens a batch; padded tokens a batch of ours and of theirs."""
    own = retriever.batches(store, np.arange(len(store)), "passage", token_budget=budget)
    ours = own.padded / len(own.inputs)
    read = retriever.inputs["passage"]
    lengths = np.minimum(store.true_lengths + read.template.single.overhead, read.max_length)
    order = np.argsort([-len(text) for text in texts])  # SentenceTransformer.encode sorts by characters

    def padded(size: int) -> float:
        parts = np.array_split(lengths[order], range(size, len(order), size))
        return float(np.mean([len(part) * part.max() for part in parts]))

    size = min(range(8, 1025, 8), key=lambda size: abs(padded(size) - ours))
    return size, ours, padded(size)


def arms_of(
    retriever: Retriever, texts: list[str], store: TokenStore, budget: int, batch: int, precision: str
) -> dict[str, Callable[[], Any]]:
    dtype = PRECISIONS[precision]

    def with_tokens() -> np.ndarray:
        fresh = retriever.tokenize(texts, "passage", None)
        return encode(retriever, fresh, "passage", token_budget=budget, dtype=dtype)

    found: dict[str, Callable[[], Any]] = {
        "ours": lambda: encode(retriever, store, "passage", token_budget=budget, dtype=dtype),
        "ours, tokenising too": with_tokens,
        "SentenceTransformer": lambda: theirs(retriever.model, texts, batch, dtype),
    }
    if dtype is not None:
        cast = copy.deepcopy(retriever.model).to(dtype)
        found["SentenceTransformer, weights cast"] = lambda: theirs(cast, texts, batch)
    return found


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--passages", type=int, default=1000, help="passages drawn from the AWS set")
    parser.add_argument("--max-length", type=int, default=64, help="tokens of a passage")
    parser.add_argument("--token-budget", type=int, default=2048, help="padded tokens of one of our batches")
    parser.add_argument("--precision", choices=[*PRECISIONS, "both"], default="both")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    texts = sample_texts(options.passages, options.seed)
    retriever = load_retriever(prepare_minilm(), layers=options.layers, max_length=options.max_length).eval()
    store = retriever.tokenize(texts, "passage", None)
    batch, own, other = batch_of(retriever, texts, store, options.token_budget)
    rows: list[list[object]] = []
    result: dict[str, Any] = {"options": {k: str(v) for k, v in vars(options).items()}, "batch_size": batch}
    for precision in PRECISIONS if options.precision == "both" else (options.precision,):
        arms = arms_of(retriever, texts, store, options.token_budget, batch, precision)
        difference = float(np.abs(arms["ours"]() - arms["SentenceTransformer"]()).max())
        if precision == "fp32" and difference > 1e-4:
            raise SystemExit(f"the embeddings differ by {difference:g}: nothing to compare")
        seconds = interleave(arms, options.repetitions)
        for name in [name for name in arms if name.startswith("Sentence")]:
            faster, paid = ratio(seconds, name, "ours"), ratio(seconds, name, "ours, tokenising too")
            rate = options.passages / float(np.median(seconds["ours"]))
            rows.append([precision, name, f"{rate:.0f}", str(faster), str(paid), f"{difference:.1e}"])
            result[f"{precision}: {name}"] = {
                "without_tokenising": faster.to_dict(), "with_tokenising": paid.to_dict(), "difference": difference,
            }  # fmt: skip
        result[f"{precision}: seconds"] = seconds
    head = ["precision", "against", "our passages/s", "times as fast, tokens stored", "tokenising too", "apart by"]
    notes = [
        f"{options.passages} passages, {options.layers or 'all'} layers of MiniLM, up to {options.max_length} tokens; "
        f"padded tokens a batch: ours {own:.0f}, theirs {other:.0f} (batch_size={batch}).",
        "bf16: autocast on both sides; 'weights cast' is SentenceTransformer with bfloat16 weights (less precise).",
        f"Ratios: median (lowest .. highest) of {options.repetitions} interleaved repetitions.",
    ]
    report("Encoding: SentenceTransformer's time over ours", rows, head, notes, result, options.out)


if __name__ == "__main__":
    main()
