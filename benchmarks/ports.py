"""What ports of official steps share: padded inputs, our step beside them, lists, and the comparison of the two.

A port runs each model once on the whole batch, in the library's own forward, on inputs that are padded to fixed
lengths. Its tokens are given to it, so the tokenisation that an official reader pays is not counted.
"""

from __future__ import annotations

import argparse
import copy
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from harness import arguments, interleave, ratio
from sparring.data import Dataset, load
from sparring.data.demo import prepare_aws, prepare_minilm
from sparring.data.loading import default_cache
from sparring.distributed import make_accelerator
from sparring.models import Batches, Ranker, Retriever, load_ranker, load_retriever
from sparring.models.retriever import Kind
from sparring.phases.fit import Feed, ListBatch, Name, Scorer, Step, Trainee, fit, make_trainee
from sparring.recipes.train import tokenise

RATE = 1e-5
UNCUT = 1 << 40  # a token budget that keeps everything in one batch

Batch = tuple[np.ndarray, np.ndarray]
"""Query rows [b] and passage rows [b, m], column 0 labelled."""


@dataclass(frozen=True)
class Lengths:
    """Fixed lengths of a port, special tokens included."""

    query: int
    passage: int
    pair: int


@dataclass(frozen=True)
class Padded:
    """Both models on one big batch each, padded to fixed lengths; ``lengths`` None: to the longest of the batch."""

    retriever: Retriever
    ranker: Ranker
    feed: Feed
    lengths: Lengths | None
    precision: str

    def autocast(self) -> AbstractContextManager[Any]:
        """To bf16 where that is the precision. Around a whole step, so that each weight is cast once."""
        return torch.autocast(self.retriever.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    def embed(self, rows: np.ndarray, kind: Kind) -> Tensor:
        """Embeddings in the order of the rows, repeated rows as often as they are there.  -> [N, d] float32"""
        store = self.feed.retriever_queries if kind == "query" else self.feed.retriever_passages
        made = self.retriever.batches(store, rows, kind, token_budget=UNCUT)
        return self.retriever.embed(self._pad(made, kind), kind)[made.restore]

    def logits(self, queries: np.ndarray, passages: np.ndarray) -> Tensor:
        """The ranker's logits of the passages [b, m] of every query [b].  -> [b, m] float32"""
        every, flat = np.repeat(queries, passages.shape[1]), passages.reshape(-1)
        made = self.ranker.batches(
            self.feed.ranker_queries, every, self.feed.ranker_passages, flat, token_budget=UNCUT
        )  # fmt: skip
        return self.ranker.logits(self._pad(made, "pair"))[made.restore].view(passages.shape)

    def _pad(self, made: Batches, kind: str) -> dict[str, Tensor]:
        (one,) = made.inputs
        if self.lengths is None:
            return one
        fills = {"input_ids": self.ranker.input.template.pad_id}
        missing = getattr(self.lengths, kind) - one["input_ids"].shape[1]
        if missing < 0:
            raise SystemExit(f"an input is longer than {getattr(self.lengths, kind)} tokens: choose larger --lengths")
        return {name: functional.pad(values, (0, missing), value=fills.get(name, 0)) for name, values in one.items()}


class Side(Protocol):
    """Ours or a port: one update of ``loss`` is a ``step``."""

    retriever: Retriever
    ranker: Ranker

    def loss(self, queries: np.ndarray, passages: np.ndarray) -> Tensor: ...
    def step(self, queries: np.ndarray, passages: np.ndarray) -> None: ...


class Ours:
    """Our step, through the training loop itself."""

    def __init__(self, retriever: Retriever, ranker: Ranker, feed: Feed, precision: str, method: Step, *,
                 clip: float, weight_decay: float = 0.01) -> None:  # fmt: skip
        accelerator = make_accelerator(retriever.device.type)
        self.retriever, self.ranker, self.method = retriever, ranker, method
        models: dict[Name, Retriever | Ranker] = {"retriever": retriever, "ranker": ranker}
        self.team: dict[Name, Trainee] = {
            name: make_trainee(model, accelerator, lr=RATE, updates=10**6, schedule="constant", warmup=0.0, clip=clip,
                               weight_decay=weight_decay)
            for name, model in models.items()
        }  # fmt: skip
        self.scorer = Scorer(self.team, feed, method.trains, precision=precision)

    def loss(self, queries: np.ndarray, passages: np.ndarray) -> Tensor:
        terms, _ = self.method.function(ListBatch(queries, passages, len(queries)), self.scorer)
        return terms.total

    def step(self, queries: np.ndarray, passages: np.ndarray) -> None:
        fit(self.team, self.scorer, self.method, lambda _, __: (queries, passages), steps=1, batch=len(queries))


def compare(ours: Side, port: Side, batch: Batch) -> tuple[float, float]:
    """With dropout off: relative difference of the losses, and of the gradients (norm of difference over norm)."""
    losses, gradients = [], []
    for side in (ours, port):
        models = (side.retriever, side.ranker)
        for model in models:
            model.eval()
        loss = side.loss(*batch)
        loss.backward()
        losses.append(float(loss.detach()))
        gradients.append(torch.cat([p.grad.reshape(-1) for m in models for p in m.parameters() if p.grad is not None]))
        for model in models:
            model.zero_grad(set_to_none=True)
    apart = float((gradients[0] - gradients[1]).norm() / gradients[1].norm())
    return abs(losses[0] - losses[1]) / abs(losses[1]), apart


def lists(dataset: Dataset, feed: Feed, count: int, size: int, lengths: Lengths, seed: int) -> Batch:
    """Query rows and passage rows [count, size]: a labelled passage in column 0, random ones after it."""
    rng = np.random.default_rng(seed)
    labels = dataset.split("train")
    rows = dataset.queries.rows(list(labels))
    fits = [i for i, row in enumerate(rows) if feed.retriever_queries.true_lengths[row] + 2 <= lengths.query]
    chosen = rng.choice(fits, count, replace=False)
    positives = dataset.corpus.rows([next(iter(list(labels.values())[i])) for i in chosen])
    passages = rng.integers(0, len(dataset.corpus), (count, size))
    passages[:, 0] = positives
    return rows[chosen], passages


def options(description: str, size: int, papers: str) -> argparse.ArgumentParser:
    """The options that the commands of ports have; ``size``: passages a list, and how many ``papers`` say."""
    parser = arguments(description, repetitions=5)
    parser.add_argument("--lists", type=int, default=4, help="queries a step")
    parser.add_argument("--size", type=int, default=size, help=f"passages a list; the papers use {papers}")
    parser.add_argument("--lengths", type=int, nargs=3, default=[32, 128, 160], help="query, passage, pair tokens")
    parser.add_argument("--train-tokens", type=int, default=2048, help="our padded tokens a forward")
    parser.add_argument("--no-dropout", action="store_true", help="leave dropout out on both sides")
    parser.add_argument("--precision", choices=["fp32", "bf16", "both"], default="both")
    return parser


@dataclass(frozen=True)
class Setting:
    """Two models, their tokens and one batch of lists of the AWS set."""

    retriever: Retriever
    ranker: Ranker
    feed: Feed
    lengths: Lengths
    batch: Batch

    @classmethod
    def of(cls, chosen: argparse.Namespace) -> Setting:
        """MiniLM for both, as the options say."""
        torch.set_num_threads(chosen.threads)
        torch.manual_seed(chosen.seed)
        lengths, dataset, folder = Lengths(*chosen.lengths), load(prepare_aws()), prepare_minilm()
        retriever = load_retriever(folder, layers=chosen.layers, max_length=lengths.passage)
        ranker = load_ranker(folder, layers=chosen.layers, max_length=lengths.pair)
        if chosen.no_dropout:
            for module in [*retriever.modules(), *ranker.modules()]:
                if isinstance(module, torch.nn.Dropout):
                    module.p = 0.0
        feed = tokenise(dataset, retriever, ranker, default_cache() / "tokens", chosen.train_tokens)
        batch = lists(dataset, feed, chosen.lists, chosen.size, lengths, chosen.seed)
        return cls(retriever, ranker, feed, lengths, batch)

    def models(self) -> tuple[Retriever, Ranker, Feed]:
        """Copies of both models, and the tokens."""
        return copy.deepcopy(self.retriever), copy.deepcopy(self.ranker), self.feed


HEAD = ["port, s", "ours, s", "times as fast", "loss apart", "gradients apart"]
"""Columns that `contest` fills."""


def precisions(chosen: argparse.Namespace) -> tuple[str, ...]:
    """Those asked for."""
    return ("fp32", "bf16") if chosen.precision == "both" else (chosen.precision,)


def contest(ours: Side, port: Side, batch: Batch, precision: str, repetitions: int) -> tuple[list[object], Any]:
    """Whether the sides agree, then their times.  -> the cells of `HEAD`, and the same for JSON"""
    loss, gradient = compare(ours, port, batch)
    if precision == "fp32" and max(loss, gradient) > 1e-4:
        raise SystemExit(f"loss apart by {loss:g}, gradients by {gradient:g} (relative): nothing to compare")
    seconds = interleave({"ours": partial(ours.step, *batch), "port": partial(port.step, *batch)}, repetitions)
    faster = ratio(seconds, "port", "ours")
    medians = [f"{np.median(seconds[name]):.2f}" for name in ("port", "ours")]
    cells: list[object] = [*medians, str(faster), f"{loss:.1e}", f"{gradient:.1e}"]
    return cells, {"ratio": faster.to_dict(), "loss": loss, "gradient": gradient, "seconds": seconds}


def notes(chosen: argparse.Namespace, padding: str) -> list[str]:
    """What stands below the table; ``padding``: what the port pads to."""
    return [
        f"{chosen.lists} queries x {chosen.size} passages, {chosen.layers or 'all'} layers of MiniLM for both; "
        f"the port pads to {padding}, ours to the longest of at most {chosen.train_tokens} tokens.",
        "Apart: relative, dropout off, before training. bf16 is autocast on both sides: gradients differ by rounding.",
        f"Ratios: median (lowest .. highest) of {chosen.repetitions} interleaved repetitions.",
    ]
