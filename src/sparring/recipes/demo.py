"""The embedded default: the AWS CLI help-desk set, MiniLM's first layers, one recipe, three questions."""

from __future__ import annotations

import importlib.resources
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sparring.data.demo import prepare_aws, prepare_minilm
from sparring.data.table import TextTable
from sparring.log import table
from sparring.models import Retriever
from sparring.phases.encode import encode
from sparring.phases.evaluate import Lists, fused
from sparring.phases.index import build_index
from sparring.phases.rerank import rerank, score_pairs
from sparring.recipes.experiment import Experiment
from sparring.recipes.train import Trained, configured_retriever, resolve_config, train
from sparring.rundir import require_unused, unfinished

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
        if not unfinished(out):
            require_unused(out)
        data, model = prepare_aws(cache), prepare_minilm(cache)
        return train(
            data, model, model,
            out=out, recipe=recipe, config=config, assignments=assignments, cache=cache, command=command,
        )  # fmt: skip


def ask(result: Trained, questions: Sequence[str] = QUESTIONS, *, cache: Path | None = None, top: int = 3) -> str:
    """The questions' top passages by the retriever before, the retriever after, and the cascade, side by side.

    On the run's own data, tokens and settings; ``before`` is the retriever that it started from.
    """
    run = result.experiment
    before = _untrained(run, prepare_minilm(cache))
    found_before = _search(run, before, questions, top)[1]
    similarity, found_after = _search(run, run.retriever, questions, max(top, run.config.rerank_depth))
    count, depth = found_after.shape
    queries = run.ranker.tokenize(questions, None, "query")
    scores = score_pairs(
        run.ranker, queries, run.feed.ranker_passages, np.repeat(np.arange(count), depth), found_after.reshape(-1),
        token_budget=run.encode_tokens, dtype=run.dtype, progress="ask: rank",
    )  # fmt: skip
    both = fused(scores.reshape(count, depth), similarity * run.retriever.scale, result.outcome.fusion)
    cascade = rerank(found_after, both)[1][:, :top]
    blocks = []
    for number, question in enumerate(questions):
        lists = (found[number][:top] for found in (found_before, found_after, cascade))
        columns = [[_label(run.dataset.corpus, int(row)) for row in found] for found in lists]
        rows = [[rank + 1, *cells] for rank, cells in enumerate(zip(*columns, strict=True))]
        headers = ["", "retriever before", "retriever after", "cascade (retriever + ranker)"]
        blocks.append(f"> {question}\n\n{table(rows, headers)}")
    return "\n\n".join(blocks)


def _label(corpus: TextTable, row: int) -> str:
    """The title, or the id where the run leaves titles out."""
    return corpus.title(row) or corpus.id(row)


def _untrained(run: Experiment, model: Path) -> Retriever:
    """The retriever that the run started from, as the run's settings make it, on the run's device."""
    return configured_retriever(model, run.config).to(run.retriever.device)


def _search(run: Experiment, retriever: Retriever, questions: Sequence[str], top: int) -> Lists:
    """Similarities and passage rows [questions, top]. The stored tokens serve every retriever with the run's tokenizer
    and prompts."""
    shared: dict[str, Any] = {"token_budget": run.encode_tokens, "dtype": run.dtype}
    passages = encode(retriever, run.feed.retriever_passages, "passage", **shared, progress="ask: encode passages")
    asked = retriever.tokenize(questions, "query", None)
    queries = encode(retriever, asked, "query", **shared, progress="ask: encode questions")
    return build_index(passages).search(queries, top)
