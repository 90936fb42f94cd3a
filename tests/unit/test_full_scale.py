"""The full-scale recipes: every published number of their configurations, their forecast by hand, their commands."""

from __future__ import annotations

import re
import shlex
import sys
import tomllib
from pathlib import Path

import click
import pytest

from sparring.cli import main as command_line
from sparring.recipes.rehearsal import UpdateKind, Work
from sparring.recipes.train import require_pools, resolve_config

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import forecast
import full_scale

ROOT = Path(__file__).parents[2]

AR2 = {
    "run.two_towers": True, "run.similarity": "dot", "run.scale": 1.0, "run.pooling": "cls", "run.mine_depth": 100,
    "run.retriever_max_length": 128, "run.ranker_max_length": 160,
    "warmup.ranker_negatives": 15, "warmup.ranker_lr": 1e-5, "warmup.ranker_depth": 100, "warmup.warmup": 0.1,
    "ar2.rounds": 10, "ar2.retriever_steps": 1500, "ar2.ranker_steps": 500, "ar2.batch": 64, "ar2.negatives": 15,
    "ar2.clip": 2.0, "ar2.warmup": 0.1, "ar2.schedule": "linear", "ar2.variant": "paper", "ar2.order": "paper",
    "ar2.sampling": "uniform", "ar2.temperature": 1.0, "ar2.adv_lambda": 0.5, "ar2.refresh": True,
}  # fmt: skip
QA = {
    "warmup.retriever_batch": 128, "warmup.retriever_lr": 1e-5, "warmup.ranker_batch": 64, "warmup.ranker_steps": 2000,
    "ar2.retriever_lr": 1e-5, "ar2.ranker_lr": 1e-6, "run.answer_filter": True,
}  # fmt: skip
ROCKET = {
    "run.two_towers": True, "run.similarity": "dot", "run.scale": 1.0, "run.pooling": "cls",
    "run.retriever_max_length": 128, "run.ranker_max_length": 160, "warmup.retriever_lr": 3e-5,
    "warmup.weight_decay": 0.0, "warmup.warmup": 0.1, "warmup.schedule": "linear", "warmup.ranker_lr": 1e-5,
    "rocketqav2.batch": 96, "rocketqav2.retriever_lr": 1e-5, "rocketqav2.ranker_lr": 1e-5, "rocketqav2.warmup": 0.0,
    "rocketqav2.schedule": "constant", "rocketqav2.weight_decay": 0.01, "rocketqav2.clip": 1.0, "rocketqav2.rounds": 3,
    "rocketqav2.denoise_rule": "absolute", "rocketqav2.denoise_negative": 0.1, "rocketqav2.denoise_positive": 0.9,
    "rocketqav2.refresh": False, "rocketqav2.lists": "hybrid", "rocketqav2.variant": "official",
}  # fmt: skip
PUBLISHED = {
    "ar2_msmarco": AR2 | {
        "warmup.retriever_batch": 64, "warmup.retriever_lr": 1e-4, "warmup.ranker_batch": 256,
        "warmup.ranker_steps": 4000, "ar2.retriever_lr": 5e-6, "ar2.ranker_lr": 5e-7,
    },
    "ar2_nq": AR2 | QA,
    "ar2_trivia": AR2 | QA,
    "rocketqav2_msmarco": ROCKET | {"rocketqav2.negatives": 127, "warmup.retriever_batch": 4096},
    "rocketqav2_nq": ROCKET | {"rocketqav2.negatives": 31, "warmup.retriever_batch": 1024},
}  # fmt: skip
EPOCHS = {
    "ar2_msmarco": (3, 502_939), "ar2_nq": (40, 58_880), "ar2_trivia": (40, 60_413),
    "rocketqav2_msmarco": (40, 502_939), "rocketqav2_nq": (30, 58_880),
}  # fmt: skip
IN_BATCH = {"ar2_msmarco": 127, "ar2_nq": 255, "ar2_trivia": 255}


def resolved(name: str) -> tuple[str, dict]:
    tables = tomllib.loads((ROOT / "configs" / f"{name}.toml").read_text())
    return tables["recipe"], resolve_config(tables["recipe"], ROOT / "configs" / f"{name}.toml")


def test_every_configuration_is_checked_here() -> None:
    assert {path.stem for path in (ROOT / "configs").glob("*.toml")} == PUBLISHED.keys() == EPOCHS.keys()
    assert {recipe.config for recipe in forecast.RECIPES} == PUBLISHED.keys()


@pytest.mark.parametrize("name", PUBLISHED)
def test_settings_are_the_published_ones(name: str) -> None:
    recipe, objects = resolved(name)
    found = {key: getattr(objects[key.split(".")[0]], key.split(".")[1]) for key in PUBLISHED[name]}
    assert found == PUBLISHED[name]
    epochs, queries = EPOCHS[name]
    warm = objects["warmup"]
    assert warm.retriever_steps == pytest.approx(epochs * queries / warm.retriever_batch, rel=0.02)
    if name in IN_BATCH:
        assert warm.retriever_batch * (1 + warm.retriever_negatives) - 1 == IN_BATCH[name]
    if recipe == "rocketqav2":
        joint = objects[recipe]
        assert joint.steps == pytest.approx(queries / joint.batch, rel=0.01), "a round is an epoch"
        assert joint.denoise_depth > joint.negatives, "else no denoised list could be long enough"


@pytest.mark.parametrize("name", PUBLISHED)
def test_what_train_refuses_before_anything_is_computed_is_not_there(name: str) -> None:
    _, objects = resolved(name)
    require_pools(objects, 8_841_823)
    for section in ("warmup", name.split("_")[0]):
        batches = [getattr(objects[section], key) for key in ("batch", "retriever_batch", "ranker_batch")
                   if hasattr(objects[section], key)]  # fmt: skip
        assert all(batch % forecast.GPUS == 0 for batch in batches), "8 processes share a batch"


# --- the forecast, by hand ----------------------------------------------------------------------------------------

TOY = forecast.Encoder(layers=1, width=2, heads=1, vocabulary=10, positions=5)
BIG = forecast.Encoder(layers=2, width=4, heads=2, vocabulary=10, positions=5)


SMALL = {"passages": 100, "queries": 10, "train": 6, "dev": 2, "test": 2, "heads": 6}


def toy(config: str = "ar2_nq") -> forecast.Recipe:
    return forecast.Recipe(config, SMALL, ranker=BIG, retriever=TOY, query_length=1, passage_length=3,
                           pair_length=4)  # fmt: skip


def test_flop_of_a_text() -> None:
    """One layer of width 2 has 48 weights: 3 tokens x (2 x 48 + 4 x 3 x 2) = 360. Two layers of 4: 384 weights."""
    assert TOY.layer_weights == 48
    assert TOY.forward(3) == 360
    assert BIG.forward(4) == 4 * (2 * 384 + 4 * 4 * 4 * 2) == 3584
    assert TOY.weights == 48 + 15 * 2
    assert forecast.BASE.weights == 12 * 12 * 768**2 + 31034 * 768 == 108_768_768


def test_flop_of_an_update() -> None:
    """2 lists of 1 + 1: 2 queries x 104 and 4 passages x 360, four forwards each."""
    one_query = 1 * (2 * 48 + 4 * 1 * 2)
    lists = 2 * one_query + 4 * 360
    assert forecast.update(toy(), UpdateKind("retriever", ("retriever",), 2, 1, 1), True) == 4 * lists
    assert forecast.update(toy(), UpdateKind("retriever in-batch", ("retriever",), 2, 1, 1), False) == 3 * lists
    assert forecast.update(toy(), UpdateKind("ranker listwise", ("ranker",), 2, 1, 1), False) == 3 * 4 * 3584
    joint = forecast.update(toy(), UpdateKind("joint", ("retriever", "ranker"), 2, 1, 1), True)
    assert joint == 4 * (lists + 4 * 3584)


def test_flop_of_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    kind = UpdateKind("ranker listwise", ("ranker",), 2, 1, 1)
    work = [
        Work("fit", "training", kind, 5), Work("fit", "training", "pair", 3), Work("encode", "refresh", "passage", 100),
        Work("encode", "refresh", "query", 10), Work("mine", "refresh", "score", 600),
        Work("evaluate", "evaluation", "pair", 7), Work("x", "saving", "byte", 9),
    ]  # fmt: skip
    monkeypatch.setattr(forecast, "work_of", lambda _: work)
    found = forecast.forecast(toy())
    expected = forecast.Forecast(5 * 4 * 4 * 3584 + 3 * 3584, 100 * 360 + 10 * 104, 7 * 3584, 600 * 4, refreshes=1)
    assert found == expected


def test_hours_by_hand() -> None:
    """A device of 1e12 at half: 1.8e15 FLOP an hour. Training is shared by 8; search is repeated."""
    device = forecast.Device("toy", 1e12, 1)
    one = forecast.Forecast(training=14.4e15, encoding=1.8e15, scoring=3.6e15, search=forecast.HOST * 3600, refreshes=1)
    assert one.hours(device, 0.5, shared=False) == pytest.approx(
        {"training": 1.0, "encoding": 1.0, "search": 8.0, "ranker at rest": 2.0, "total": 12.0}
    )
    assert one.hours(device, 0.5, shared=True) == pytest.approx(
        {"training": 1.0, "encoding": 1 / 8, "search": 1.0, "ranker at rest": 1 / 4, "total": 2.375}
    )


def test_bytes_by_hand() -> None:
    """8,192 tokens. Kept: 8192 x 4 x 2 x (34 + 5 x 2 x 4 / 4) for the ranker. Weights: 2 towers x 78; 444."""
    kept = 8192 * 4 * 2 * (34 + 10)
    assert BIG.activations(8192, 4) == kept
    assert BIG.weights == 444
    found = forecast.memory(toy())
    assert found.replicated == 20 * 2 * 78 + 20 * 444 + kept
    assert found.sharded == 20 * 2 * 78 + 16 * 444 / 8 + 8 * 192 + kept
    assert found.host == 4 * 100 * 2 * 8


def test_the_work_is_that_of_the_recipe() -> None:
    """AR2's 10 rounds, the warm start and the zero-shot state are encoded; 15,000 and 5,000 updates of 64 lists."""
    recipe = next(one for one in forecast.RECIPES if one.config == "ar2_msmarco")
    base, large = forecast.BASE, forecast.LARGE
    found = forecast.forecast(recipe)
    assert found.refreshes == 12
    assert found.encoding == 12 * (8_841_823 * base.forward(128) + 909_824 * base.forward(32))
    lists = base.forward(32) + 16 * base.forward(128)
    rounds = 64 * (15_000 * (4 * lists + 16 * large.forward(160)) + 5_000 * 4 * 16 * large.forward(160))
    warm = 23_600 * 64 * 4 * (base.forward(32) + 2 * base.forward(128)) + 4_000 * 256 * 16 * 4 * large.forward(160)
    assert found.training == pytest.approx(rounds + warm)


# --- the page -----------------------------------------------------------------------------------------------------

PAGE = ROOT / "docs" / "full-scale.md"


def test_the_tables_of_the_page_are_the_scripts() -> None:
    assert forecast.tables(forecast.UTILISATION) in PAGE.read_text()


def shell_lines() -> list[list[str]]:
    """Every command of the shell blocks on the pages about scale."""
    found = []
    for page in (PAGE, ROOT / "docs" / "scale.md"):
        for body in re.findall(r"^```bash\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL):
            lines = body.replace("\\\n", " ").splitlines()
            found += [words for words in (shlex.split(line, comments=True) for line in lines) if words]
    return found


def test_every_command_parses(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Launchers are looked through; our commands get as far as they can without files."""
    parsed = []
    for words in shell_lines():
        if "full_scale.py" in " ".join(words[:2]):
            names = ("marco", "dpr", "answered", "top1000")
            with monkeypatch.context() as patch:
                for name in names:
                    patch.setattr(full_scale, name, lambda *_: {})
                patch.setattr(full_scale, "read_run", lambda _: {})
                full_scale.main(words[2:])
            parsed.append(f"full_scale {words[2]}")
        elif words[0] == "sparring" or "-m" in words:
            start = words.index("-m") + 1 if "-m" in words else 0
            assert words[start] == "sparring"
            name, *rest = words[start + 1 :]
            command = command_line.commands[name]
            assert isinstance(command, click.Command)
            command.make_context(name, rest).close()
            parsed.append(name)
            given = [Path(word) for word in rest if word.endswith(".toml") and word.startswith("configs/")]
            assert all((ROOT / path).is_file() for path in given)
    assert {"train", "plan", "full_scale marco", "full_scale dpr", "full_scale answers"} <= set(parsed)
    used = {Path(word).stem for words in shell_lines() for word in words if word.startswith("configs/")}
    assert used == PUBLISHED.keys()
