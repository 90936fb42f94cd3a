"""The controls that the two methods are measured against, on the same lists, phases and forwards.

``separate``: hard negatives refreshed each round, hard labels for both models, no signal between them (ANCE-like).
``frozen-teacher``: the ranker is trained to its full budget first and then frozen; the retriever is distilled from it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from sparring.config import one_of
from sparring.losses import Terms, diagnostics, static
from sparring.phases.fit import ListBatch, Scorer, Step
from sparring.recipes.experiment import Experiment, Generation
from sparring.recipes.settings import TurnsConfig
from sparring.recipes.steps import ranker_step, retriever_step


@dataclass(frozen=True)
class SeparateConfig(TurnsConfig):
    """Settings of the separate control: those that every recipe has."""


@dataclass(frozen=True)
class FrozenTeacherConfig(TurnsConfig):
    """Settings of the frozen-teacher control."""

    kl_direction: Literal["ce_de", "de_ce"] = "ce_de"
    """KL(ranker || retriever), the usual distillation, or KL(retriever || ranker)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("kl_direction", self.kl_direction, ("ce_de", "de_ce"))


def separate(x: Experiment, cfg: SeparateConfig, warm: Generation) -> None:
    """Rounds of hard-label updates of both models, each on the refreshed negatives."""
    x.team(retriever=cfg.retriever_rates(), ranker=cfg.ranker_rates())
    pools, found = warm.pools, warm
    for k in range(1, cfg.rounds + 1):
        of = cfg.mined_by(k, warm.name)
        x.fit(f"{k}-ranker", ranker_step(), pools, generation=of, steps=cfg.ranker_steps, **cfg.drawing())
        x.fit(f"{k}-retriever", retriever_step(), pools, generation=of, steps=cfg.retriever_steps, **cfg.drawing())
        found = x.refresh(f"{k}", previous=found)
        pools = found.pools if cfg.refresh else warm.pools
        x.evaluate(f"round {k}", found)


def distillation_step(cfg: FrozenTeacherConfig) -> Step:
    r"""$KL(p_{ce} \| p_{de})$ per query, the ranker frozen with its dropout off, no hard label."""

    def function(batch: ListBatch, score: Scorer) -> tuple[Terms, dict[str, Tensor]]:
        retriever, ranker = score.retriever(batch), score.ranker(batch)
        terms = static(
            retriever, ranker,
            variant="custom", kl_direction=cfg.kl_direction, kl_reduction="query_mean", queries=batch.total,
        )  # fmt: skip
        return terms, diagnostics(retriever, ranker)

    return Step("distillation", ("retriever",), function, teachers=("ranker",))


def frozen_teacher(x: Experiment, cfg: FrozenTeacherConfig, warm: Generation) -> None:
    """All of the ranker's updates on the warm start's negatives, then rounds of distillation from it."""
    x.team(retriever=cfg.retriever_rates(), ranker=cfg.ranker_rates())
    x.fit(
        "teacher", ranker_step(), warm.pools,
        generation=warm.name, steps=cfg.rounds * cfg.ranker_steps, **cfg.drawing(),
    )  # fmt: skip
    pools, found = warm.pools, warm
    for k in range(1, cfg.rounds + 1):
        x.fit(
            f"{k}-retriever", distillation_step(cfg), pools,
            generation=cfg.mined_by(k, warm.name), steps=cfg.retriever_steps, **cfg.drawing(),
        )  # fmt: skip
        found = x.refresh(f"{k}", previous=found)
        pools = found.pools if cfg.refresh else warm.pools
        x.evaluate(f"round {k}", found)
