"""Configurations: from TOML and key=value to objects and back, with every problem named at once."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import pytest

from sparring.config import above, at_least, build, describe, one_of, parse_assignments, read_toml, to_toml, within
from sparring.recipes.ar2 import AR2Config
from sparring.recipes.controls import FrozenTeacherConfig
from sparring.recipes.duet import DuetConfig
from sparring.recipes.rocketqav2 import RocketQAv2Config
from sparring.recipes.settings import RoundsConfig, RunConfig
from sparring.recipes.train import NAMES, resolve_config, sections
from sparring.recipes.warmup import WarmupConfig
from sparring.types import InputError

ROOT = Path(__file__).parents[2]
FILES = sorted([*ROOT.glob("configs/*.toml"), *ROOT.glob("src/sparring/configs/*.toml")])


@dataclass(frozen=True)
class Toy:
    """Every type that a field may have."""

    rate: float = 0.5
    steps: int = 3
    on: bool = False
    name: str = 'a "quoted" 이름 \\'
    kind: Literal["one", "two"] = "one"
    maybe: bool | Literal[""] = ""
    words: tuple[str, ...] = ("a", "b")

    def __post_init__(self) -> None:
        at_least(0, steps=self.steps)


SECTIONS = {"toy": Toy}


# --- round trip ---------------------------------------------------------------------------------------------------


def read_back(objects: dict[str, Any], kinds: dict[str, type]) -> dict[str, Any]:
    return build(kinds, ("file", tomllib.loads(to_toml(objects))))


@pytest.mark.parametrize("toy", [Toy(), Toy(rate=1e-5, on=True, kind="two", maybe=False, words=())])
def test_toml_reads_back(toy: Toy) -> None:
    found = read_back({"toy": toy}, SECTIONS)["toy"]
    assert {f.name: getattr(found, f.name) for f in fields(Toy)} == {
        f.name: getattr(toy, f.name) if f.name != "words" else found.words for f in fields(Toy)
    }
    assert tuple(found.words) == toy.words


def test_the_head_comes_before_the_sections() -> None:
    text = to_toml({"toy": Toy()}, {"recipe": "ar2"})
    assert text.startswith('recipe = "ar2"\n\n[toy]\n')
    assert tomllib.loads(text)["recipe"] == "ar2"


@pytest.mark.parametrize("recipe", NAMES)
def test_defaults_of_every_recipe_read_back(recipe: str) -> None:
    objects = resolve_config(recipe)
    assert list(objects) == list(sections(recipe))
    assert read_back(objects, sections(recipe)) == objects


def test_floats_written_as_whole_numbers_are_floats_afterwards() -> None:
    """rate = 1 in a file and 1.0 in Python are the same configuration."""
    assert build(SECTIONS, ("file", {"toy": {"rate": 1}}))["toy"] == Toy(rate=1.0)


def test_later_layers_win() -> None:
    layers = ("file", {"toy": {"steps": 4, "rate": 2.0}}), ("--set", {"toy": {"steps": 5}})
    assert build(SECTIONS, *layers)["toy"] == Toy(rate=2.0, steps=5)


@pytest.mark.parametrize("cls", [RunConfig, WarmupConfig, AR2Config, RocketQAv2Config, DuetConfig, FrozenTeacherConfig])
def test_every_key_is_described(cls: type) -> None:
    described = describe(cls)
    assert [name for name, _, _ in described] == [f.name for f in fields(cls)]
    assert all(default and kind for _, default, kind in described)


# --- files that are shipped ---------------------------------------------------------------------------------------


def test_there_are_files() -> None:
    names = {path.name for path in FILES}
    assert {"ar2_nq.toml", "ar2_msmarco.toml", "rocketqav2_msmarco.toml", "rocketqav2_nq.toml", "demo.toml"} <= names


@pytest.mark.parametrize("file", FILES, ids=lambda path: path.name)
def test_every_file_parses_for_its_recipe(file: Path) -> None:
    """A file without a ``recipe`` serves every recipe."""
    tables = tomllib.loads(file.read_text(encoding="utf-8"))
    recipes = [tables["recipe"]] if "recipe" in tables else list(NAMES)
    for recipe in recipes:
        objects = resolve_config(recipe, file)
        for section in set(objects) & set(tables):
            for key, value in tables[section].items():
                found = getattr(objects[section], key)
                assert (list(found) if isinstance(found, tuple) else found) == value
    if "recipe" in tables:
        with pytest.raises(InputError, match="for another recipe") as caught:
            resolve_config("separate", file)
        assert str(file) in str(caught.value)


# --- problems -----------------------------------------------------------------------------------------------------


def test_all_problems_are_named_at_once_with_suggestions() -> None:
    file = {"toy": {"stesp": 3, "rate": "fast", "kind": "three", "maybe": "no"}, "tyo": {"rate": 1.0}, "top": 1}
    with pytest.raises(InputError, match=r"7 problem\(s\)") as caught:
        build(SECTIONS, ("my.toml", file), ("--set", {"toy": {"on": 1}}))
    text = caught.value.where
    for part in (
        "my.toml: [toy] unknown key 'stesp' (did you mean 'steps'?)",
        "my.toml: [toy] rate = 'fast': expected float",
        "my.toml: [toy] kind = 'three': expected one of 'one', 'two'",
        "my.toml: [toy] maybe = 'no': expected bool or one of ''",
        "my.toml: unknown section [tyo] (did you mean 'toy'?)",
        "my.toml: unknown section [top]",
        "--set: [toy] on = 1: expected bool",
    ):
        assert part in text


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("steps", 1.5), ("steps", True), ("steps", "3"), ("rate", True), ("rate", None), ("on", 0), ("on", "true"),
        ("name", 3), ("words", "a"), ("words", [1]), ("kind", 1), ("maybe", 0), ("steps", 2**63), ("steps", -(2**64)),
        ("rate", float("nan")), ("rate", float("inf")), ("rate", float("-inf")), ("rate", 10**400),
    ],
)  # fmt: skip
def test_a_wrong_type_is_refused(key: str, value: Any) -> None:
    with pytest.raises(InputError, match=f"{key} = "):
        build(SECTIONS, ("file", {"toy": {key: value}}))


def test_a_value_out_of_range_is_a_problem_among_others() -> None:
    with pytest.raises(InputError, match=r"2 problem\(s\)") as caught:
        build(SECTIONS, ("file", {"toy": {"steps": -1, "nmae": "x"}}))
    assert "steps is too small" in str(caught.value)
    assert "did you mean 'name'" in str(caught.value)


def test_an_unknown_word_lists_what_is_known() -> None:
    with pytest.raises(InputError, match="known: kind, maybe, name, on, rate, steps, words"):
        build(SECTIONS, ("file", {"toy": {"zzzzzz": 1}}))


def test_files_that_are_missing_or_broken(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        read_toml(tmp_path / "nothing.toml")
    broken = tmp_path / "broken.toml"
    broken.write_text("[run]\nseed = = 3\n")
    with pytest.raises(InputError, match="line 2"):
        read_toml(broken)
    broken.write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="not TOML"):
        read_toml(broken)


# --- key=value ----------------------------------------------------------------------------------------------------


def test_assignments_know_their_section_or_find_it() -> None:
    kinds = {"run": RunConfig, "warmup": WarmupConfig, "ar2": AR2Config}
    found = parse_assignments(
        ["rounds=2", "seed=3", "warmup.ranker_steps=5", "clip=1.5", "retriever_batch=8", "variant=paper"],
        kinds, ["ar2", "run", "warmup"],
    )  # fmt: skip
    assert found == {
        "ar2": {"rounds": 2, "clip": 1.5, "variant": "paper"},
        "run": {"seed": 3},
        "warmup": {"ranker_steps": 5, "retriever_batch": 8},
    }


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("true", True), ("2", 2), ("1e-5", 1e-5), ('"two words"', "two words"), ("two words", "two words"), ("", ""),
        ('["a", "b"]', ["a", "b"]), ("a=b", "a=b"), ("RR@10", "RR@10"), ("비밀", "비밀"),
    ],
)  # fmt: skip
def test_values_need_no_quotes(text: str, value: Any) -> None:
    assert parse_assignments([f" toy.name = {text}"], SECTIONS, ["toy"]) == {"toy": {"name": value}}


def test_assignments_that_name_nothing() -> None:
    with pytest.raises(InputError, match="needs key=value"):
        parse_assignments(["rounds"], SECTIONS, ["toy"])
    with pytest.raises(InputError, match="did you mean 'rounds'"):
        resolve_config("ar2", None, ["round=2"])
    with pytest.raises(InputError, match="did you mean 'warmup'"):
        resolve_config("ar2", None, ["warmpu.ranker_steps=2"])
    with pytest.raises(InputError, match="unknown recipe"):
        resolve_config("ar3")


def test_a_value_is_set_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text('recipe = "ar2"\n[ar2]\nrounds = 7\nbatch = 8\n[rocketqav2]\nsteps = 3\n')
    objects = resolve_config("ar2", file, ["rounds=2"])
    assert (objects["ar2"].rounds, objects["ar2"].batch) == (2, 8)
    assert set(objects) == {"run", "warmup", "ar2"}
    file.write_text("[rocketqav2]\nstep = 3\n")
    with pytest.raises(InputError, match="did you mean 'steps'"):
        resolve_config("ar2", file)


# --- values -------------------------------------------------------------------------------------------------------


def test_range_checks() -> None:
    at_least(0, a=0)
    within(0, 1, a=0, b=1)
    above(0, a=1e-9)
    one_of("a", "x", ("x", "y"))
    for call in (
        lambda: at_least(1, a=0), lambda: within(0, 1, a=1.1), lambda: within(0, 1, a=float("nan")),
        lambda: above(0, a=0), lambda: above(0, a=float("nan")), lambda: at_least(0, a=float("nan")),
        lambda: one_of("a", "z", ("x",)),
    ):  # fmt: skip
        with pytest.raises(InputError) as caught:
            call()
        assert caught.value.where == "a"


BAD: list[tuple[type, dict[str, Any], str]] = [
    (AR2Config, {"adv_lambda": 1.5}, "adv_lambda"),
    (AR2Config, {"adv_lambda": -0.1}, "adv_lambda"),
    (AR2Config, {"temperature": 0.0}, "temperature"),
    (AR2Config, {"variant": "means"}, "did you mean 'mean'"),
    (AR2Config, {"order": "papers"}, "did you mean 'paper'"),
    (RoundsConfig, {"rounds": 0}, "rounds"),
    (RoundsConfig, {"clip": -1.0}, "clip"),
    (RoundsConfig, {"warmup": 1.5}, "warmup"),
    (RoundsConfig, {"sampling": "unform"}, "did you mean 'uniform'"),
    (WarmupConfig, {"ranker_negatives": 0}, "ranker_negatives"),
    (WarmupConfig, {"schedule": "cosine"}, "schedule"),
    (RunConfig, {"train_tokens": 1}, "train_tokens"),
    (RunConfig, {"select_by": "RR@5"}, "did you mean 'RR@10'"),
    (RunConfig, {"ranker_layers": -1}, "ranker_layers"),
    (RunConfig, {"pooling": "max"}, "pooling"),
    (FrozenTeacherConfig, {"kl_direction": "ce"}, "kl_direction"),
    (RocketQAv2Config, {"variant": "offical"}, "did you mean 'official'"),
    (RocketQAv2Config, {"lists": "hybird"}, "did you mean 'hybrid'"),
    (RocketQAv2Config, {"denoise_rule": "relative"}, "denoise_rule"),
    (RocketQAv2Config, {"supervised": "none"}, "supervised"),
    (RocketQAv2Config, {"denoise_negative": 0.0}, "denoise_negative"),
    (RocketQAv2Config, {"denoise_positive": 1.0}, "denoise_positive"),
    (RocketQAv2Config, {"denoise_negative": 0.9, "denoise_positive": 0.1}, "denoise_negative"),
    (RocketQAv2Config, {"variant": "custom"}, "not set: kl_direction, kl_reduction"),
    (RocketQAv2Config, {"variant": "custom", "kl_direction": "de_ce"}, "not set: kl_reduction"),
    (RocketQAv2Config, {"variant": "paper", "kl_direction": "de_ce"}, "variant paper decides kl_direction itself"),
    (RocketQAv2Config, {"kl_reduction": "sum"}, "variant official decides kl_reduction itself"),
    (RocketQAv2Config, {"detach_teacher": True}, "variant official decides detach_teacher itself"),
    (RocketQAv2Config, {"teacher_dropout": "off"}, "variant official decides teacher_dropout itself"),
    (RocketQAv2Config, {"static": True, "supervised": "pointwise"}, "leaves supervised without effect"),
]
CUSTOM = {"variant": "custom", "kl_direction": "ce_de", "kl_reduction": "query_mean"}


@pytest.mark.parametrize(("cls", "values", "message"), BAD, ids=lambda value: str(value)[:60])
def test_values_that_make_no_sense_are_refused(cls: type, values: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        cls(**values)
    assert message in str(caught.value)


@pytest.mark.parametrize("other", [{"static": True}, {"teacher_dropout": "off"}], ids=str)
def test_a_gradient_cannot_reach_a_mere_target(other: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="contradicts"):
        RocketQAv2Config(**CUSTOM, detach_teacher=False, **other)
    assert RocketQAv2Config(**CUSTOM, detach_teacher=False).second_forward is False


@pytest.mark.parametrize("dropout", ["on", "off"])
def test_a_ranker_at_rest_takes_no_settings_of_its_training(dropout: Literal["on", "off"]) -> None:
    with pytest.raises(InputError, match="leaves supervised and teacher_dropout without effect"):
        RocketQAv2Config(**CUSTOM, static=True, supervised="pointwise", teacher_dropout=dropout)
    assert RocketQAv2Config(**CUSTOM, static=True).static


def test_the_teachers_dropout_by_variant() -> None:
    """On where the released code has it, or where the target is no mere target; off otherwise."""
    assert RocketQAv2Config(variant="official").second_forward is False
    assert RocketQAv2Config(variant="paper").second_forward is False
    assert RocketQAv2Config(**CUSTOM).second_forward is True
    assert RocketQAv2Config(**CUSTOM, teacher_dropout="on").second_forward is False


@pytest.mark.parametrize("recipe", NAMES)
def test_measures_and_lists_survive_the_file(recipe: str, tmp_path: Path) -> None:
    objects = resolve_config(recipe, None, ['measures=["RR@10", "R@50"]'])
    file = tmp_path / "config.toml"
    file.write_text(to_toml(objects, {"recipe": recipe}), encoding="utf-8")
    assert resolve_config(recipe, file) == objects
