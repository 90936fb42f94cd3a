"""The arms of a comparison: a recipe, with settings that differ from the others', at one budget."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from sparring.recipes.competition import RECIPES
from sparring.recipes.rocketqav2 import RocketQAv2Config
from sparring.recipes.settings import RoundsConfig, TurnsConfig
from sparring.types import InputError

FACTORS = (1.0, 0.5, 2.0, 0.25, 4.0)
"""Factors on both learning rates that an arm may try on dev, in this order: the same for every arm."""

JOINT = ("rocketqav2", "ar2", "duet")
"""Recipes in which a model learns from the other while both change."""


@dataclass(frozen=True)
class Arm:
    """One arm: ``ar2:adv_lambda=0`` is the recipe ar2 with one setting of its own."""

    name: str
    recipe: str
    settings: tuple[tuple[str, str], ...] = ()

    @property
    def folder(self) -> str:
        """The name as a folder's: one part of a path, of at most 100 bytes."""
        plain = re.sub(r"[^\w.=+-]", "-", self.name)
        if len(plain.encode("utf-8", "replace")) <= 100:
            return plain
        return f"{plain[:20]}-{hashlib.sha256(self.name.encode('utf-8', 'replace')).hexdigest()[:16]}"

    def assignments(self) -> list[str]:
        """``recipe.key=value`` of each setting."""
        return [f"{self.recipe}.{key}={value}" for key, value in self.settings]


def parse_arms(text: str) -> list[Arm]:
    """``separate,ar2,ar2:adv_lambda=0,variant=paper``: a part with ``=`` and no ``:`` belongs to the arm before it.

    Raises: InputError for an unknown recipe or setting, with those that there are; for an arm given twice.
    """
    arms: list[Arm] = []
    for part in (part.strip() for part in text.split(",")):
        recipe, colon, rest = part.partition(":")
        if not colon and "=" in part and arms:
            last = arms.pop()
            arms.append(_arm(last.recipe, [*last.settings, _setting(last.recipe, part)]))
        else:
            arms.append(_arm(recipe, [_setting(recipe, rest)] if colon else []))
    twice = sorted({arm.folder for arm in arms if sum(a.folder == arm.folder for a in arms) > 1})
    if twice:
        raise InputError("an arm is given twice", where="--recipes", expected="each arm once", got=", ".join(twice))
    return arms


def _arm(recipe: str, settings: Sequence[tuple[str, str]]) -> Arm:
    if recipe not in RECIPES:
        raise InputError("unknown recipe", where="--recipes", expected=", ".join(RECIPES), got=recipe or "nothing")
    told = ",".join(f"{key}={value}" for key, value in settings)
    return Arm(f"{recipe}:{told}" if told else recipe, recipe, tuple(settings))


def _setting(recipe: str, text: str) -> tuple[str, str]:
    if recipe not in RECIPES:
        raise InputError("unknown recipe", where="--recipes", expected=", ".join(RECIPES), got=recipe or "nothing")
    key, equals, value = text.partition("=")
    known = [field.name for field in fields(RECIPES[recipe][0])]
    if not equals or key.strip() not in known:
        raise InputError(
            f"unknown setting of {recipe}", where="--recipes", expected=f"key=value with a key of {', '.join(known)}",
            got=text, fix="settings of the run and of the warm start are shared by all arms: give them with --set",
        )  # fmt: skip
    return key.strip(), value.strip()


def at_budget(configs: Mapping[str, RoundsConfig], budget: int) -> dict[str, Any]:
    """The arms' configurations with so many updates that each model is trained on ``budget`` query-passage forwards.

    0 leaves the updates as configured. A model that an arm does not train after the warm start (`static`) stays at 0.

    Raises: InputError when an arm cannot meet the budget exactly, or when the arms' own budgets differ.
    """
    if not budget:
        own = {name: trained_forwards(config) for name, config in configs.items()}
        if len({count for pair in own.values() for count in pair}) > 1:
            told = "; ".join(f"{name}: retriever {a:,}, ranker {b:,}" for name, (a, b) in own.items())
            raise InputError(
                "the arms are not trained on equally many query-passage forwards", where="--recipes", got=told,
                expected="one number", fix="give it with --budget: rounds x updates x lists x passages",
            )  # fmt: skip
        return dict(configs)
    units = {name: config.rounds * config.batch * (1 + config.negatives) for name, config in configs.items()}
    unmet = [f"{name} ({unit:,})" for name, unit in units.items() if budget % unit]
    if unmet:
        common = math.lcm(*units.values())
        raise InputError(
            "the budget is no multiple of an arm's rounds x lists x passages", where="--budget",
            expected=f"a multiple of {common:,}, for example {max(1, round(budget / common)) * common:,}",
            got=f"{budget:,}; not met by {', '.join(unmet)}",
        )  # fmt: skip
    return {name: with_updates(config, budget // units[name]) for name, config in configs.items()}


def with_updates(config: RoundsConfig, updates: int) -> RoundsConfig:
    """The configuration with this many updates of each model a round."""
    if isinstance(config, RocketQAv2Config):
        return replace(config, steps=updates)
    assert isinstance(config, TurnsConfig)
    return replace(config, retriever_steps=updates, ranker_steps=updates)


def trained_forwards(config: RoundsConfig) -> tuple[int, int]:
    """Query-passage forwards that train the retriever and the ranker, as configured."""
    unit = config.rounds * config.batch * (1 + config.negatives)
    if isinstance(config, RocketQAv2Config):
        return unit * config.steps, unit * config.steps
    assert isinstance(config, TurnsConfig)
    return unit * config.retriever_steps, unit * config.ranker_steps


def with_rates(config: RoundsConfig, factor: float) -> RoundsConfig:
    """Both learning rates multiplied."""
    return replace(config, retriever_lr=config.retriever_lr * factor, ranker_lr=config.ranker_lr * factor)
