r"""The warm start that both methods begin from (RocketQA steps 1 and 2; AR2's G0 and D0).

1. BM25 finds negatives for every training query.
2. The retriever learns from them and from the passages of the other queries in the batch (of all processes):
   G0 = $M_D^{(0)}$, $L = -\log \frac{\exp s(q,d^+)}{\sum_{d} \exp s(q,d)}$.
3. The retriever's own top passages become the ranker's negatives, listwise: D0 = $M_C$ (AR2 Eq. 7).

Deviations: docs/rocketqav2.md and docs/ar2.md, section "Warm start".
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from sparring.config import at_least, one_of, within
from sparring.recipes.experiment import Experiment, Generation
from sparring.recipes.settings import Rates
from sparring.recipes.steps import in_batch_step, ranker_step


@dataclass(frozen=True)
class WarmupConfig:
    """Settings of the warm start. A step count of 0 leaves that model as it came."""

    retriever_steps: int = 1000
    """Updates of the retriever."""
    retriever_batch: int = 64
    """Queries per update; in-batch negatives grow with it."""
    retriever_negatives: int = 1
    """BM25 negatives per query."""
    retriever_lr: float = 3e-5
    """Peak learning rate."""
    bm25_depth: int = 50
    """BM25 passages per query from which negatives are drawn."""
    ranker_steps: int = 1000
    """Updates of the ranker."""
    ranker_batch: int = 16
    """Queries (lists) per update."""
    ranker_negatives: int = 7
    """Negatives per list, drawn from the warmed retriever's pool."""
    ranker_depth: int = 1000
    """Passages per query from which the ranker's negatives are drawn (RocketQA: top 1000). Deeper ones are easier: a
    new head learns from them first."""
    ranker_lr: float = 3e-5
    """Peak learning rate."""
    schedule: Literal["linear", "constant"] = "linear"
    """Learning rate after the warm-up share: falling to 0, or constant."""
    warmup: float = 0.1
    """Share of a model's updates in which its rate rises from 0."""
    weight_decay: float = 0.01
    """AdamW's decay, on matrices only."""
    clip: float = 2.0
    """Largest gradient norm; 0 does not clip."""

    def __post_init__(self) -> None:
        at_least(0, retriever_steps=self.retriever_steps, ranker_steps=self.ranker_steps)
        at_least(1, retriever_batch=self.retriever_batch, ranker_batch=self.ranker_batch)
        at_least(1, retriever_negatives=self.retriever_negatives, ranker_negatives=self.ranker_negatives)
        at_least(1, bm25_depth=self.bm25_depth, ranker_depth=self.ranker_depth)
        at_least(0, retriever_lr=self.retriever_lr, ranker_lr=self.ranker_lr)
        at_least(0, weight_decay=self.weight_decay, clip=self.clip)
        within(0, 1, warmup=self.warmup)
        one_of("schedule", self.schedule, ("linear", "constant"))


def warmup(x: Experiment, cfg: WarmupConfig) -> Generation:
    """Warm both models up and return the warm retriever's generation: index searched, pools mined."""
    shape = cfg.schedule, cfg.warmup, cfg.weight_decay, cfg.clip
    x.team(
        retriever=Rates(cfg.retriever_lr, cfg.retriever_steps, *shape),
        ranker=Rates(cfg.ranker_lr, cfg.ranker_steps, *shape),
    )
    if cfg.retriever_steps:
        pools = x.bm25_pools(cfg.bm25_depth)
        x.fit(
            "warm-retriever", in_batch_step(), pools, generation="bm25",
            steps=cfg.retriever_steps, batch=cfg.retriever_batch, negatives=cfg.retriever_negatives, accumulate=1,
        )  # fmt: skip
    warm = x.refresh("warm", depth=cfg.ranker_depth) if cfg.retriever_steps or x.start is None else x.start
    if cfg.ranker_steps:
        x.fit(
            "warm-ranker", ranker_step(), warm.pools.top(cfg.ranker_depth), generation=warm.name,
            steps=cfg.ranker_steps, batch=cfg.ranker_batch, negatives=cfg.ranker_negatives,
        )  # fmt: skip
    return replace(warm, pools=warm.pools.top(x.config.mine_depth))
