"""What the rows of speed.py work on: texts of distinct content, one labelled passage a query, two models, tokens."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from planted import World, write_encoder, write_planted
from sparring.data import Dataset, load
from sparring.models import Ranker, Retriever, load_ranker, load_retriever
from sparring.phases.fit import Feed

QUICK = World(subjects=12, aspects=4)


@dataclass(frozen=True)
class Material:
    """N passages, Q training queries, and the row of each query's labelled passage; ``model`` is a folder."""

    passages: list[str]
    queries: list[str]
    labelled: np.ndarray
    model: Path
    options: Namespace

    @classmethod
    def of(cls, options: Namespace, place: Path) -> Material:
        """The AWS set and MiniLM; with ``--quick`` a synthetic set and a random encoder, without a network."""
        if options.quick:
            data, model = write_planted(place / "data", options.seed, QUICK).folder, place / "encoder"
            write_encoder(model, options.seed, QUICK)
        else:
            from sparring.data.demo import prepare_aws, prepare_minilm

            data, model = prepare_aws(), prepare_minilm()
        return cls(*_texts(load(data), options), model, options)

    def smaller(self, passages: int, queries: int) -> Material:
        """The first queries, their labelled passages, and others up to so many."""
        labelled = [self.passages[row] for row in self.labelled[:queries]]
        kept = list(dict.fromkeys([*labelled, *self.passages]))[: max(passages, len(set(labelled)))]
        place = {text: row for row, text in enumerate(kept)}
        rows = np.array([place[text] for text in labelled])
        return Material(kept, self.queries[:queries], rows, self.model, self.options)

    def retriever(self) -> Retriever:
        """A fresh one, dropout as its configuration says."""
        o = self.options
        made = load_retriever(str(self.model), layers=o.layers, max_length=o.retriever_length, similarity="cosine")
        return made.to(o.device)

    def ranker(self) -> Ranker:
        """A fresh one. A new head is drawn with a fixed seed and made larger, so that scores differ from each other."""
        layers = self.options.ranker_layers
        ranker = load_ranker(str(self.model), layers=layers, max_length=self.options.ranker_length)
        if ranker.new_head:
            with torch.no_grad():
                ranker.get_submodule("model.0.model.classifier").weight.mul_(20)
        return ranker.to(self.options.device)

    @property
    def budget(self) -> int:
        """Padded tokens of a forward, ours by default on such a device."""
        return 2048 if self.options.device == "cpu" else 8192

    def feed(self, retriever: Retriever, ranker: Ranker) -> Feed:
        """Tokens of all texts for both models."""
        return Feed(
            retriever.tokenize(self.queries, "query", None), retriever.tokenize(self.passages, "passage", None),
            ranker.tokenize(self.queries, None, "query"), ranker.tokenize(self.passages, None),
            token_budget=self.budget,
        )  # fmt: skip

    def lists(self, count: int, size: int) -> tuple[np.ndarray, np.ndarray]:
        """Query rows [count] and passage rows [count, size]: the labelled one, then random others."""
        rng = np.random.default_rng(self.options.seed)
        queries = rng.choice(len(self.queries), count, replace=count > len(self.queries))
        others = rng.integers(1, len(self.passages), (count, size))
        passages = (others + self.labelled[queries][:, None]) % len(self.passages)
        passages[:, 0] = self.labelled[queries]
        return queries, passages


def _texts(dataset: Dataset, options: Namespace) -> tuple[list[str], list[str], np.ndarray]:
    """Training queries with a label each, their passages, and random others up to the size asked for."""
    rng = np.random.default_rng(options.seed)
    labels = {q: next(p for p, grade in found.items() if grade > 0) for q, found in dataset.split("train").items()}
    chosen = rng.permutation(sorted(labels))[: options.queries]
    wanted = dataset.corpus.rows([labels[query] for query in chosen])
    others = rng.permutation(len(dataset.corpus))
    texts = dict.fromkeys(dataset.corpus.texts(np.concatenate([wanted, others])))  # distinct, in this order
    kept = list(texts)[: max(options.passages, len(set(wanted.tolist())))]
    place = {text: row for row, text in enumerate(kept)}
    labelled = np.array([place[text] for text in dataset.corpus.texts(wanted)])
    return kept, dataset.queries.texts(dataset.queries.rows(list(chosen))), labelled


def without_dropout(*models: torch.nn.Module) -> None:
    """Dropout off for good, so that results can be compared."""
    for model in models:
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
