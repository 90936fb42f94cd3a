"""Arms of a comparison: how they are read, and that they meet one budget."""

from __future__ import annotations

import pytest

from sparring.recipes.ar2 import AR2Config
from sparring.recipes.arms import Arm, at_budget, parse_arms, trained_forwards, with_rates
from sparring.recipes.controls import SeparateConfig
from sparring.recipes.rocketqav2 import RocketQAv2Config
from sparring.types import InputError


def test_a_part_with_a_key_and_no_recipe_belongs_to_the_arm_before_it() -> None:
    arms = parse_arms("separate, ar2:adv_lambda=0,variant=paper ,rocketqav2,ar2")
    assert arms == [
        Arm("separate", "separate"),
        Arm("ar2:adv_lambda=0,variant=paper", "ar2", (("adv_lambda", "0"), ("variant", "paper"))),
        Arm("rocketqav2", "rocketqav2"),
        Arm("ar2", "ar2"),
    ]
    assert arms[1].assignments() == ["ar2.adv_lambda=0", "ar2.variant=paper"]
    assert arms[1].folder == "ar2-adv_lambda=0-variant=paper"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("separate,ar3", "ar2, rocketqav2, duet, separate, frozen-teacher"),
        ("", "ar2, rocketqav2, duet, separate, frozen-teacher"),
        ("separate,,ar2", "ar2, rocketqav2, duet, separate, frozen-teacher"),
        ("rounds=3", "ar2, rocketqav2, duet, separate, frozen-teacher"),
        ("ar2:adv=0", "adv_lambda"),
        ("ar2:adv_lambda", "adv_lambda"),
        ("ar2:", "adv_lambda"),
        ("separate:adv_lambda=0", "retriever_lr"),
        ("ar2:seed=3", "adv_lambda"),
        ("ar2,separate,ar2", "each arm once"),
        ("ar2:variant=paper,ar2:variant=paper", "each arm once"),
    ],
)
def test_what_is_unknown_is_refused_with_what_there_is(text: str, expected: str) -> None:
    with pytest.raises(InputError) as error:
        parse_arms(text)
    assert expected in str(error.value)
    assert "--recipes" in str(error.value)


def test_a_budget_gives_every_model_of_every_arm_the_same_forwards() -> None:
    configs = {
        "a": SeparateConfig(rounds=2, batch=16, negatives=7),
        "b": AR2Config(rounds=4, batch=8, negatives=15),
        "c": RocketQAv2Config(rounds=1, batch=16, negatives=31),
    }
    found = at_budget(configs, 5120)
    assert {name: trained_forwards(config) for name, config in found.items()} == dict.fromkeys(configs, (5120, 5120))
    assert (found["a"].retriever_steps, found["a"].ranker_steps) == (20, 20)  # 2 x 20 x 16 x 8 = 5,120
    assert (found["b"].retriever_steps, found["b"].ranker_steps) == (10, 10)  # 4 x 10 x 8 x 16 = 5,120
    assert found["c"].steps == 10  # 1 x 10 x 16 x 32 = 5,120


def test_a_budget_that_an_arm_cannot_meet_is_refused_with_one_that_all_can() -> None:
    configs = {"a": SeparateConfig(rounds=2, batch=16, negatives=7), "b": AR2Config(rounds=3, batch=16, negatives=7)}
    with pytest.raises(InputError) as error:
        at_budget(configs, 5120)
    assert "b (384)" in str(error.value)
    assert "multiple of 768, for example 5,376" in str(error.value)
    assert at_budget(configs, 5376)["b"].ranker_steps == 14


def test_without_a_budget_the_arms_own_ones_must_agree() -> None:
    same = {"a": SeparateConfig(), "b": RocketQAv2Config()}
    assert at_budget(same, 0) == same
    with pytest.raises(InputError, match="not trained on equally many"):
        at_budget({**same, "c": AR2Config(ranker_steps=499)}, 0)


def test_a_factor_multiplies_both_learning_rates_and_nothing_else() -> None:
    config = with_rates(AR2Config(retriever_lr=2e-5, ranker_lr=4e-5), 0.5)
    assert config == AR2Config(retriever_lr=1e-5, ranker_lr=2e-5)
