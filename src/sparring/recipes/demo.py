"""The embedded default: the AWS CLI help-desk set, MiniLM's first layers, one recipe, three questions."""

from __future__ import annotations

import importlib.resources
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from sparring.data import Dataset, default_cache, load
from sparring.data.demo import prepare_aws, prepare_minilm
from sparring.distributed import choose_tokens
from sparring.log import table
from sparring.models import Retriever, load_retriever
from sparring.phases.encode import encode
from sparring.phases.index import build_index
from sparring.phases.rerank import score_pairs
from sparring.recipes.train import Trained, resolve_config, train
from sparring.rundir import require_unused

QUESTIONS = (
    "stop paying for a server that nobody uses at night",
    "let another account read my bucket",
    "who changed my security settings last week?",
)
"""Asked in a user's words, not in the documentation's."""

CONFIG = importlib.resources.files("sparring") / "configs" / "demo.toml"


def run_demo(recipe: str, out: Path, assignments: Sequence[str], *, cache: Path | None, command: str) -> Trained:
    """Get data and weights (cached, hash-checked), train, evaluate, export."""
    with importlib.resources.as_file(CONFIG) as config:
        resolve_config(recipe, config, assignments)
        require_unused(out)
        data, model = prepare_aws(cache), prepare_minilm(cache)
        return train(
            data, model, model,
            out=out, recipe=recipe, config=config, assignments=assignments, cache=cache, command=command,
        )  # fmt: skip


def ask(result: Trained, questions: Sequence[str] = QUESTIONS, *, cache: Path | None = None, top: int = 3) -> str:
    """The questions' top passages by the retriever before, the retriever after, and the cascade, side by side."""
    dataset = load(prepare_aws(cache), cache=cache)
    run = result.experiment
    settings = run.config
    before = load_retriever(
        prepare_minilm(cache), layers=settings.retriever_layers or settings.layers,
        max_length=settings.retriever_max_length,
    )  # fmt: skip
    folder = (Path(cache) if cache is not None else default_cache()) / "tokens"
    found_before = _search(before, dataset, questions, top, folder, run.dtype)
    depth = settings.rerank_depth
    found_after = _search(run.retriever, dataset, questions, depth, folder, run.dtype)
    ranker = run.ranker
    queries = ranker.tokenize(questions, None, "query")
    pairs = np.repeat(np.arange(len(questions)), depth), found_after.reshape(-1)
    scores = score_pairs(ranker, queries, run.feed.ranker_passages, *pairs, dtype=run.dtype)
    order = np.argsort(-scores.reshape(len(questions), depth), axis=1, kind="stable")[:, :top]
    cascade = np.take_along_axis(found_after, order, 1)
    blocks = []
    for number, question in enumerate(questions):
        columns = [[dataset.corpus.title(int(row)) for row in found[number][:top]] for found in
                   (found_before, found_after, cascade)]  # fmt: skip
        rows = [[rank + 1, *cells] for rank, cells in enumerate(zip(*columns, strict=True))]
        headers = ["", "retriever before", "retriever after", "cascade (retriever + ranker)"]
        blocks.append(f"> {question}\n\n{table(rows, headers)}")
    return "\n\n".join(blocks)


def _search(
    retriever: Retriever, dataset: Dataset, questions: Sequence[str], top: int, cache: Path, dtype: torch.dtype | None
) -> np.ndarray:
    """Passage rows [questions, top]."""
    budget = choose_tokens(0, retriever.device.type, 16384)
    store = retriever.tokenize(dataset.corpus, "passage", cache)
    passages = encode(retriever, store, "passage", token_budget=budget, dtype=dtype)
    asked = retriever.tokenize(questions, "query", None)
    queries = encode(retriever, asked, "query", token_budget=budget, dtype=dtype)
    return build_index(passages).search(queries, top)[1]

