r"""Duet: the two models are trained for the sum of their scores. Sparring's own recipe, from no paper.

The cascade orders by $s_{ce} + w\,s_{de}$ (`fusion` = w), and training knows it. The ranker learns what the retriever
does not: $L_{ce} = -\log \mathrm{softmax}(s_{ce} + w\,\bar s_{de})_{d^+}$, the retriever at rest. The retriever learns
from the label among all passages of the batch, and from both models' common distribution over each list:

$L_{de} = (1-\alpha) L_{in-batch} + \alpha\, KL(\mathrm{softmax}(\bar s_{ce} + w\,\bar s_{de}) \| p_{de})$.

A bar: no gradient.

Why it is here, and what it brought: docs/results.md.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparring.config import within
from sparring.losses import Terms, complement, diagnostics, follow
from sparring.phases.fit import ListBatch, Name, Scorer, Step
from sparring.recipes.experiment import Experiment, Generation
from sparring.recipes.settings import TurnsConfig


@dataclass(frozen=True)
class DuetConfig(TurnsConfig):
    """Settings of duet beyond those that every recipe has."""

    fusion: float = 1.0
    """The cascade orders by ranker score + fusion x retriever score (similarity x scale), and the ranker is trained
    for that sum; 0 trains the ranker alone."""
    teacher: float = 0.5
    """Weight of both models' common distribution in the retriever's loss; the label has the rest."""
    retriever_lr: float = 4e-5
    """Peak learning rate of the retriever: four times the ranker's, which dev preferred (docs/results.md)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        within(0, 1, teacher=self.teacher)


def ranker_step(cfg: DuetConfig) -> Step:
    """The label, scored by the sum of both models, the retriever at rest."""

    def function(batch: ListBatch, score: Scorer) -> tuple[Terms, dict[str, Tensor]]:
        ranker, retriever = score.ranker(batch), score.retriever(batch)
        return complement(retriever, ranker, fusion=cfg.fusion, queries=batch.total), diagnostics(retriever, ranker)

    return Step("ranker duet", ("ranker",), function, teachers=("retriever",))


def retriever_step(cfg: DuetConfig) -> Step:
    """The label among all passages of the batch, and both models' common distribution over the query's own list."""

    def function(batch: ListBatch, score: Scorer) -> tuple[Terms, dict[str, Tensor]]:
        everyone, positive, masked = score.in_batch(batch)
        own = positive[:, None] + torch.arange(batch.passages.shape[1], device=positive.device)
        retriever, ranker = everyone.gather(1, own), score.ranker(batch) if cfg.teacher else None
        terms = follow(
            everyone, positive, masked, retriever, ranker,
            fusion=cfg.fusion, teacher=cfg.teacher, queries=batch.total,
        )  # fmt: skip
        return terms, diagnostics(retriever, ranker) if ranker is not None else {}

    asked: tuple[Name, ...] = ("ranker",) if cfg.teacher else ()
    return Step("retriever duet", ("retriever",), function, teachers=asked, joins_queries=True)


def duet(x: Experiment, cfg: DuetConfig, warm: Generation) -> None:
    """Rounds of ranker and retriever updates on refreshed negatives, each for the sum of both scores."""
    x.team(retriever=cfg.retriever_rates(), ranker=cfg.ranker_rates())
    pools, found = warm.pools, warm
    for k in range(1, cfg.rounds + 1):
        of = cfg.mined_by(k, warm.name)
        x.fit(f"{k}-ranker", ranker_step(cfg), pools, generation=of, steps=cfg.ranker_steps, **cfg.drawing())
        x.fit(f"{k}-retriever", retriever_step(cfg), pools, generation=of, steps=cfg.retriever_steps, **cfg.drawing())
        found = x.refresh(f"{k}", previous=found)
        pools = found.pools if cfg.refresh else warm.pools
        x.evaluate(f"round {k}", found)
