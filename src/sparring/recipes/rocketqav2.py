r"""RocketQAv2: joint training by dynamic listwise distillation (Ren et al., EMNLP 2021).

Both models score the same candidate list; the retriever follows the ranker's distribution while the ranker keeps
learning from the labels: $L = KL(p_{de}, p_{ce}) - \frac1N \sum_q \log p_{ce}(p^+)$ (Eq. 4-6), both updated at every
step.
The lists are hybrid: undenoised ones (the labelled positive and random draws from the retriever's top) and denoised
ones (negatives that the ranker scores low; passages that it scores high head lists of their own), mixed by list.

Deviations from the paper and from the released code: docs/rocketqav2.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypedDict

from torch import Tensor

from sparring.config import at_least, one_of
from sparring.losses import Terms, diagnostics, static
from sparring.losses import rocketqav2 as rocketqav2_loss
from sparring.phases.fit import ListBatch, Scorer, Step
from sparring.phases.pools import Pools
from sparring.recipes.experiment import Experiment, Generation
from sparring.recipes.settings import RoundsConfig
from sparring.types import InputError

_ALLOWED: dict[str, tuple[object, ...]] = {
    "variant": ("paper", "official", "custom"),
    "kl_direction": ("", "de_ce", "ce_de"),
    "detach_teacher": ("", True, False),
    "kl_reduction": ("", "sum", "query_mean", "element_mean"),
    "teacher_dropout": ("auto", "on", "off"),
    "supervised": ("listwise", "pointwise"),
    "lists": ("hybrid", "denoised", "undenoised"),
    "denoise_rule": ("calibrated", "absolute"),
}


class KLOptions(TypedDict, total=False):
    """What only `custom` decides about the KL, beside its gradient."""

    kl_direction: Literal["de_ce", "ce_de"]
    kl_reduction: Literal["sum", "query_mean", "element_mean"]


@dataclass(frozen=True)
class RocketQAv2Config(RoundsConfig):
    """Settings of RocketQAv2 beyond those that every recipe has."""

    steps: int = 500
    """Joint updates per round; each updates both models."""
    refresh: bool = False
    """Mine and denoise again after every round (a deviation: the paper builds its lists once)."""
    variant: Literal["paper", "official", "custom"] = "official"
    """KL as in the paper's equations, as in the released code, or from the three fields below (docs/rocketqav2.md)."""
    kl_direction: Literal["", "de_ce", "ce_de"] = ""
    """custom only: KL(retriever || ranker) or KL(ranker || retriever)."""
    detach_teacher: bool | Literal[""] = ""
    """custom only: whether the KL's gradient stops at the ranker; not set means true."""
    kl_reduction: Literal["", "sum", "query_mean", "element_mean"] = ""
    """custom only: sum over queries and passages, mean over queries, or mean over queries x passages."""
    teacher_dropout: Literal["auto", "on", "off"] = "auto"
    """custom with a detached teacher only: dropout in the scores that the KL reads as its target. off: a second forward
    of the ranker, without gradient, beside the training forward of its supervised loss. on: one forward for both. auto:
    off, but on in `official` (as released) and wherever the KL's gradient reaches the ranker (`paper`, or
    detach_teacher=false), whose scores are then no mere target."""
    supervised: Literal["listwise", "pointwise"] = "listwise"
    """The ranker's own loss; pointwise is the paper's ablation. Not beside static=true, which has no such loss."""
    static: bool = False
    """Freeze the ranker and distil only (the paper's ablation "static")."""
    lists: Literal["hybrid", "denoised", "undenoised"] = "hybrid"
    """Which kinds of list are trained on."""
    denoise_rule: Literal["calibrated", "absolute"] = "calibrated"
    """Ranker thresholds as quantiles of the known positives' scores, or as probabilities."""
    denoise_negative: float = 0.05
    """Keep as negative below this quantile (calibrated) or probability (absolute; RocketQA used 0.1)."""
    denoise_positive: float = 0.75
    """Promote to positive above this quantile (calibrated) or probability (absolute; RocketQA used 0.9)."""
    denoise_depth: int = 50
    """Top passages of each list head that the ranker scores for denoising."""
    denoise_heads: int = 0
    """List heads to denoise, drawn at random; 0 denoises all of them."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(1, steps=self.steps, denoise_depth=self.denoise_depth)
        at_least(0, denoise_heads=self.denoise_heads)
        for name, allowed in _ALLOWED.items():
            one_of(name, getattr(self, name), allowed)
        if not 0 < self.denoise_negative <= self.denoise_positive < 1:
            raise InputError(
                "impossible denoising thresholds", where="denoise_negative, denoise_positive",
                expected="0 < denoise_negative <= denoise_positive < 1",
                got=f"{self.denoise_negative:g}, {self.denoise_positive:g}",
            )  # fmt: skip
        self._check_choices()

    def _check_choices(self) -> None:
        """Options of the KL belong to `custom`: nothing runs under a name with something else inside."""
        chosen = {"kl_direction": self.kl_direction, "kl_reduction": self.kl_reduction}
        if self.variant == "custom":
            missing = [name for name, value in chosen.items() if not value]
            if missing:
                raise InputError(
                    "variant custom has no choices of its own", where="variant=custom", expected="values for both",
                    got="not set: " + ", ".join(missing), fix="set them, or take the variant paper or official",
                )  # fmt: skip
        extra = [name for name, value in chosen.items() if value]
        extra += ["detach_teacher"] if self.detach_teacher != "" else []
        extra += ["teacher_dropout"] if self.teacher_dropout != "auto" else []
        if self.variant != "custom" and extra:
            raise InputError(
                f"variant {self.variant} decides {', '.join(extra)} itself", where=f"variant={self.variant}",
                expected="these keys only beside variant=custom", fix="remove them, or set variant=custom",
            )  # fmt: skip
        self._check_static()
        if self.detach_teacher is False and (self.static or self.teacher_dropout == "off"):
            other = "static=true" if self.static else "teacher_dropout=off"
            raise InputError(
                f"detach_teacher=false contradicts {other}: the gradient cannot reach a ranker that is only a target",
                where="detach_teacher", expected="true", got="false",
            )  # fmt: skip

    def _check_static(self) -> None:
        """A ranker at rest has no loss of its own and no dropout: keys about these would be dropped in silence."""
        unused = ["supervised"] if self.supervised != "listwise" else []
        unused += ["teacher_dropout"] if self.teacher_dropout != "auto" else []
        if self.static and unused:
            raise InputError(
                f"static=true leaves {' and '.join(unused)} without effect: the ranker is frozen, its dropout off",
                where=", ".join(unused), expected="the defaults (supervised=listwise, teacher_dropout=auto)",
                got=", ".join(f"{name}={getattr(self, name)}" for name in unused), fix="remove them, or static=true",
            )  # fmt: skip

    @property
    def second_forward(self) -> bool:
        """Whether the KL's target is a forward of its own with dropout off, beside the one that is trained."""
        if self.teacher_dropout != "auto":
            return self.teacher_dropout == "off"
        return self.variant == "custom" and self.detach_teacher is not False

    def kl_options(self) -> KLOptions:
        """The keywords of `sparring.losses.rocketqav2` that only `custom` takes."""
        if self.variant != "custom":
            return {}
        assert self.kl_direction
        assert self.kl_reduction
        return {"kl_direction": self.kl_direction, "kl_reduction": self.kl_reduction}


def joint_step(cfg: RocketQAv2Config) -> Step:
    """Both models at once on one list. Where the teacher's dropout is off, its target is a forward of its own."""
    detach = cfg.detach_teacher is not False if cfg.variant == "custom" else None

    def function(batch: ListBatch, score: Scorer) -> tuple[Terms, dict[str, Tensor]]:
        retriever, ranker = score.retriever(batch), score.ranker(batch)
        teacher = score.ranker(batch, as_teacher=True) if cfg.second_forward else None
        terms = rocketqav2_loss(
            retriever, ranker, variant=cfg.variant, supervised=cfg.supervised, queries=batch.total,
            detach_teacher=detach, teacher=teacher, **cfg.kl_options(),
        )  # fmt: skip
        return terms, diagnostics(retriever, ranker if teacher is None else teacher)

    return Step("joint", ("retriever", "ranker"), function)


def static_step(cfg: RocketQAv2Config) -> Step:
    """Distillation from a ranker that does not move, dropout off: the ablation."""

    def function(batch: ListBatch, score: Scorer) -> tuple[Terms, dict[str, Tensor]]:
        retriever, ranker = score.retriever(batch), score.ranker(batch)
        terms = static(retriever, ranker, variant=cfg.variant, queries=batch.total, **cfg.kl_options())
        return terms, diagnostics(retriever, ranker)

    return Step("static", ("retriever",), function, teachers=("ranker",))


def build_lists(x: Experiment, cfg: RocketQAv2Config, generation: Generation) -> Pools:
    """Hybrid data: undenoised and denoised list heads side by side, shuffled together when drawn."""
    if cfg.lists == "undenoised":
        return generation.pools
    denoised = x.denoise(
        generation.pools, rule=cfg.denoise_rule, negative=cfg.denoise_negative, positive=cfg.denoise_positive,
        depth=cfg.denoise_depth, heads=cfg.denoise_heads, label=f"{generation.name}-denoise",
    )  # fmt: skip
    return denoised if cfg.lists == "denoised" else x.hybrid(generation.pools, denoised)


def rocketqav2(x: Experiment, cfg: RocketQAv2Config, warm: Generation) -> None:
    """Joint updates on hybrid lists; a round here is what lies between two evaluations."""
    updates = cfg.rounds * cfg.steps
    x.team(retriever=cfg.rates(cfg.retriever_lr, updates), ranker=cfg.rates(cfg.ranker_lr, updates))
    step = static_step(cfg) if cfg.static else joint_step(cfg)
    generation, lists = warm, build_lists(x, cfg, warm)
    for k in range(1, cfg.rounds + 1):
        of = f"{k - 1}" if cfg.refresh and k > 1 else warm.name
        x.fit(f"{k}-joint", step, lists, generation=of, steps=cfg.steps, **cfg.drawing())
        generation = x.refresh(f"{k}", previous=generation)
        if cfg.refresh and k < cfg.rounds:
            lists = build_lists(x, cfg, generation)
        x.evaluate(f"round {k}", generation)
