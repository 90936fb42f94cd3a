r"""AR2: adversarial retriever-ranker (Zhang et al., ICLR 2022), Algorithm 1.

$\min_\theta \max_\phi\ \mathbb{E}_{D_q^- \sim G_\theta} \log p_\phi(d^+ \mid q; D_q)$ (Eq. 5): in every round the
ranker learns to pick the positive among what the retriever finds, and the retriever learns from the frozen ranker:
rewarded for passages that fool it, and distilled towards its distribution. Then the index is refreshed.

Deviations from the paper and from the released code: docs/ar2.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from sparring.config import above, one_of, within
from sparring.losses import Terms, diagnostics
from sparring.losses import ar2 as ar2_loss
from sparring.phases.fit import ListBatch, Scorer, Step
from sparring.recipes.experiment import Experiment, Generation
from sparring.recipes.settings import TurnsConfig
from sparring.recipes.steps import ranker_step


@dataclass(frozen=True)
class AR2Config(TurnsConfig):
    """Settings of AR2 beyond those that every recipe has."""

    adv_lambda: float = 0.5
    """Weight of the adversarial term; 1 - adv_lambda weighs the distillation. 0 is distillation alone."""
    variant: Literal["mean", "paper", "official"] = "mean"
    """Which of the three adversarial losses (docs/ar2.md)."""
    temperature: float = 1.0
    """Above 0. `official` and `mean`: divides the teacher's logits of the distillation term. `paper`: divides all
    logits of both models."""
    order: Literal["official", "paper"] = "official"
    """Phases of a round: ranker, retriever, refresh (released code) or retriever, refresh, ranker (paper)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        within(0, 1, adv_lambda=self.adv_lambda)
        above(0, temperature=self.temperature)
        one_of("variant", self.variant, ("mean", "paper", "official"))
        one_of("order", self.order, ("official", "paper"))


def retriever_step(cfg: AR2Config) -> Step:
    r"""$\lambda J + (1-\lambda) J_R$ with the ranker frozen and its dropout off (Eq. 9, 10, 12)."""

    def function(batch: ListBatch, score: Scorer) -> tuple[Terms, dict[str, Tensor]]:
        retriever, ranker = score.retriever(batch), score.ranker(batch)
        terms = ar2_loss(
            retriever, ranker,
            adv_lambda=cfg.adv_lambda, variant=cfg.variant, temperature=cfg.temperature, queries=batch.total,
        )  # fmt: skip
        return terms, diagnostics(retriever, ranker)

    return Step("retriever", ("retriever",), function, teachers=("ranker",))


def ar2(x: Experiment, cfg: AR2Config, warm: Generation) -> None:
    """Rounds of ranker and retriever updates with a refreshed index (Algorithm 1)."""
    x.team(retriever=cfg.retriever_rates(), ranker=cfg.ranker_rates())
    pools, found = warm.pools, warm
    for k in range(1, cfg.rounds + 1):
        of = cfg.mined_by(k, warm.name)
        if cfg.order == "official":
            x.fit(f"{k}-ranker", ranker_step(), pools, generation=of, steps=cfg.ranker_steps, **cfg.drawing())
        x.fit(
            f"{k}-retriever", retriever_step(cfg), pools, generation=of, steps=cfg.retriever_steps, **cfg.drawing()
        )  # fmt: skip
        found = x.refresh(f"{k}", previous=found)
        pools = found.pools if cfg.refresh else warm.pools
        if cfg.order == "paper":
            of = cfg.mined_by(k + 1, warm.name)
            x.fit(f"{k}-ranker", ranker_step(), pools, generation=of, steps=cfg.ranker_steps, **cfg.drawing())
        x.evaluate(f"round {k}", found)
