"""Run a recipe from two models and a data set to two exported models and the evidence of what training did."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import CrossEncoder, SentenceTransformer

from sparring.config import build, parse_assignments, read_toml, to_toml
from sparring.data import Dataset, default_cache, load
from sparring.distributed import Choice, choose_device, choose_precision, choose_threads, make_accelerator, rank
from sparring.log import Metrics
from sparring.models import Ranker, Retriever, load_ranker, load_retriever
from sparring.phases.evaluate import Row, evaluate, run_of
from sparring.phases.export import export
from sparring.phases.fit import Feed
from sparring.recipes.ar2 import AR2Config, ar2
from sparring.recipes.controls import FrozenTeacherConfig, SeparateConfig, frozen_teacher, separate
from sparring.recipes.experiment import Experiment, Generation, Split, choose_split
from sparring.recipes.rocketqav2 import RocketQAv2Config, rocketqav2
from sparring.recipes.settings import RunConfig
from sparring.recipes.summary import Outcome, summarise
from sparring.recipes.warmup import WarmupConfig, warmup
from sparring.rundir import RunDir, require_unused, versions
from sparring.types import InputError

logger = logging.getLogger("sparring")

Body = Callable[[Experiment, Any, Generation], None]

RECIPES: Mapping[str, tuple[type, Body]] = {
    "ar2": (AR2Config, ar2),
    "rocketqav2": (RocketQAv2Config, rocketqav2),
    "separate": (SeparateConfig, separate),
    "frozen-teacher": (FrozenTeacherConfig, frozen_teacher),
}
"""Recipes after the warm start. ``warmup`` alone is a recipe too, with no rounds."""

NAMES = ("warmup", *RECIPES)


@dataclass(frozen=True)
class Trained:
    """What a run hands back. ``retriever`` and ``ranker`` are the exported objects, ready to use."""

    retriever: SentenceTransformer
    ranker: CrossEncoder
    path: Path
    outcome: Outcome


def sections(recipe: str) -> dict[str, type]:
    """The configuration sections of a recipe."""
    if recipe not in NAMES:
        raise InputError("unknown recipe", where="--recipe", expected=", ".join(NAMES), got=recipe)
    found: dict[str, type] = {"run": RunConfig, "warmup": WarmupConfig}
    return found if recipe == "warmup" else {**found, recipe: RECIPES[recipe][0]}


def resolve_config(
    recipe: str, file: str | Path | Mapping[str, Any] | None = None, assignments: Sequence[str] = ()
) -> dict[str, Any]:
    """Configuration objects by section: defaults, then the file, then ``key=value``; all problems at once.

    A file may hold sections of other recipes, so that one file serves a comparison; they are checked and left aside.
    """
    own = sections(recipe)
    every = {**own, **{name: cls for name, (cls, _) in RECIPES.items()}}
    tables = dict(read_toml(Path(file)) if isinstance(file, str | Path) else file or {})
    where = str(file) if isinstance(file, str | Path) else "config"
    tables.pop("recipe", None)
    preferred = [recipe, "run", "warmup"] if recipe in own else ["warmup", "run"]
    objects = build(every, (where, tables), ("--set", parse_assignments(assignments, every, preferred)))
    return {name: objects[name] for name in own}


def train(
    data: Dataset | str | Path,
    retriever: SentenceTransformer | str | Path,
    ranker: CrossEncoder | str | Path,
    *,
    out: str | Path,
    recipe: str = "ar2",
    config: str | Path | Mapping[str, Any] | None = None,
    assignments: Sequence[str] = (),
    cache: str | Path | None = None,
    command: str = "",
) -> Trained:
    """Warm both models up, run the recipe's rounds, keep the best pair by dev's cascade, read test once, export.

    Args:
        data: a `Dataset`, or what `sparring.load` reads.
        retriever: a SentenceTransformer or plain encoder: object, folder or hub name.
        ranker: a CrossEncoder with one logit, or an encoder that gets a new head.
        out: a folder that does not exist or is empty.
        config: a TOML file or nested tables; ``assignments`` (``key=value``) come after it.
        cache: where converted data and tokens are kept; default as `sparring.data.default_cache`.

    Raises: InputError before anything is written where possible.
    """
    objects = resolve_config(recipe, config, assignments)
    settings: RunConfig = objects["run"]
    require_unused(Path(out))
    place = Path(cache) if cache is not None else default_cache()
    dataset = data if isinstance(data, Dataset) else load(data, cache=place, titles=settings.titles)
    splits = choose_splits(dataset, settings)
    device, precision, threads = choose_hardware(settings)
    torch.set_num_threads(int(threads.value))
    torch.manual_seed(settings.seed)
    pair = load_pair(retriever, ranker, settings)
    accelerator = make_accelerator(device.value, settings.trackers, str(out))
    run = RunDir.create(out) if rank() == 0 else RunDir(Path(out), Metrics(None))
    accelerator.wait_for_everyone()
    if settings.trackers:
        accelerator.init_trackers("sparring", config={"recipe": recipe, "seed": settings.seed})
        run.metrics.tracker = accelerator.log
    if rank() == 0:
        record_start(run, recipe, objects, dataset, pair, (device, precision, threads), command)
    for model in pair:
        model.to(accelerator.device)
    feed = run.phase("tokenise", tokenise, dataset, *pair, place / "tokens", settings.train_tokens)
    x = Experiment(dataset, *pair, feed, settings, run, accelerator, precision.value, *splits)
    outcome = compete(x, recipe, objects)
    if rank() == 0:
        finish(x, outcome, card_of(recipe, dataset, retriever, ranker, command))
    accelerator.wait_for_everyone()
    if settings.trackers:
        accelerator.end_training()
    return Trained(x.retriever.model, x.ranker.model, run.path, outcome)


def choose_splits(dataset: Dataset, settings: RunConfig) -> tuple[Split, Split]:
    """Train must exist; dev selects; test is read once."""
    dataset.split("train")
    dev = choose_split(dataset, settings.dev_split, settings.dev_queries)
    return dev, choose_split(dataset, settings.test_split, settings.test_queries)


def choose_hardware(settings: RunConfig) -> tuple[Choice, Choice, Choice]:
    """Device, precision and threads, each with its reason in the log."""
    device = choose_device()
    choices = device, choose_precision(settings.precision, device.value), choose_threads(settings.threads)
    for choice in choices:
        logger.info("%s: %s (%s)", choice.name, choice.value, choice.reason)
    return choices


def load_pair(
    retriever: SentenceTransformer | str | Path, ranker: CrossEncoder | str | Path, settings: RunConfig
) -> tuple[Retriever, Ranker]:
    """Both models as configured."""
    first = load_retriever(
        retriever,
        layers=settings.retriever_layers or settings.layers, similarity=settings.similarity,
        scale=settings.scale or "auto", two_towers=settings.two_towers, max_length=settings.retriever_max_length,
        pooling=settings.pooling, trust_remote_code=settings.trust_remote_code,
    )  # fmt: skip
    second = load_ranker(
        ranker,
        layers=settings.ranker_layers or settings.layers, max_length=settings.ranker_max_length,
        trust_remote_code=settings.trust_remote_code, seed=settings.seed,
    )  # fmt: skip
    return first, second


def tokenise(dataset: Dataset, retriever: Retriever, ranker: Ranker, cache: Path, token_budget: int) -> Feed:
    """Tokens of all queries and passages for both models, from the cache where they are there."""
    return Feed(
        retriever_queries=retriever.tokenize(dataset.queries, "query", cache),
        retriever_passages=retriever.tokenize(dataset.corpus, "passage", cache),
        ranker_queries=ranker.tokenize(dataset.queries, cache, "query"),
        ranker_passages=ranker.tokenize(dataset.corpus, cache, "passage"),
        token_budget=token_budget,
    )


def record_start(
    run: RunDir,
    recipe: str,
    objects: Mapping[str, Any],
    dataset: Dataset,
    pair: tuple[Retriever, Ranker],
    hardware: Sequence[Choice],
    command: str,
) -> None:
    """What a run depends on: resolved configuration, versions, data and model fingerprints."""
    run.write_text("config.toml", to_toml(objects, {"recipe": recipe}))
    run.write_json(
        "environment.json",
        {
            "command": command,
            "versions": versions(),
            "hardware": {choice.name: [choice.value, choice.reason] for choice in hardware},
            "data": {
                "source": dataset.source, "fingerprint": dataset.fingerprint,
                "passages": len(dataset.corpus), "queries": len(dataset.queries),
                "labelled_queries": {name: len(qrels) for name, qrels in dataset.qrels.items()},
            },
            "models": {"retriever": pair[0].fingerprint(), "ranker": pair[1].fingerprint()},
            "scoring": {"similarity": pair[0].similarity, "scale": pair[0].scale},
        },
    )  # fmt: skip


def compete(x: Experiment, recipe: str, objects: Mapping[str, Any]) -> Outcome:
    """Baselines, warm start, rounds; then the one reading of test."""
    x.start = x.refresh("zero-shot")
    trained_head = not x.ranker.new_head
    if trained_head:
        x.keep("zero-shot")
    bm25 = {split.name: x.bm25_lists(split.rows, x.config.search_depth) for split in (x.dev, x.test)}
    dev_rows = [*lists_row(x, x.dev, "BM25", bm25), *zero_shot_rows(x, x.dev, trained_head)]
    warm = warmup(x, objects["warmup"])
    x.fixed = bm25 if x.config.fixed_candidates == "bm25" else warm.lists
    x.keep("warm start")
    x.evaluate("warm start", warm)
    if recipe != "warmup":
        config_class, body = RECIPES[recipe]
        config = objects[recipe]
        assert isinstance(config, config_class)
        body(x, config, warm)
    return read_test(x, dev_rows, bm25, warm, trained_head)


def read_test(x: Experiment, dev_rows: list[Row], bm25: Mapping[str, Any], warm: Generation, head: bool) -> Outcome:
    """The only place where test labels are read, with nothing left to choose."""
    assert x.best is not None
    test_rows = lists_row(x, x.test, "BM25", bm25)
    if head:
        x.restore("zero-shot")
    test_rows += zero_shot_rows(x, x.test, head)
    x.restore("warm start")
    tables = [("warm start", x.three_rows("warm start", x.test, warm).table)]
    name, _, generation = x.best
    if name != "warm start":
        x.restore("best")
        tables.append((name, x.three_rows(name, x.test, generation).table))
    x.run.metrics.write("test", best=name, rows=[[n, row.as_dict()] for n, table in tables for row in table.rows])
    return Outcome(name, dev_rows, x.tables, test_rows, tables, x.config.select_by, x.config.measures)


def lists_row(x: Experiment, split: Split, name: str, lists: Mapping[str, Any]) -> list[Row]:
    """One row for ranked lists that need no ranker."""
    run = run_of(x.query_ids(split.rows), x.dataset.corpus.ids, *lists[split.name])
    x.write_runs(split.name, {name: run})
    return [evaluate(name, split.qrels, run, x.config.measures, 0)]


def zero_shot_rows(x: Experiment, split: Split, trained_head: bool) -> list[Row]:
    """The models as they came: the retriever, and the cascade where the ranker came with a trained head."""
    assert x.start is not None
    rows = lists_row(x, split, "zero-shot retriever", x.start.lists)
    if trained_head:
        x.fixed = x.fixed or x.start.lists
        cascade = x.three_rows("zero-shot", split, x.start).table.rows[-1]
        rows.append(Row("zero-shot cascade", cascade.estimates, cascade.values))
    return rows


def finish(x: Experiment, outcome: Outcome, card: Mapping[str, Any]) -> None:
    """Export, summary, and away with what only the run needed."""
    shutil.rmtree(x.run.path / "states")
    shutil.rmtree(x.run.path / "index", ignore_errors=True)
    metrics = {row.name: {m: str(row.estimates[m]) for m in outcome.measures} for row in outcome.best_test.rows}
    x.run.phase("export", export, x.retriever, x.ranker, x.run.path, card={**card, "metrics": metrics})
    x.run.write_text("summary.md", summarise(x, outcome, markdown=True))
    x.run.write_json("results.json", outcome.to_dict(x.forwards.to_dict()))


def card_of(
    recipe: str, dataset: Dataset, retriever: SentenceTransformer | str | Path, ranker: CrossEncoder | str | Path,
    command: str,
) -> dict[str, str]:  # fmt: skip
    """What the model cards say beside the metrics."""

    def named(model: object) -> str:
        return Path(model).name if isinstance(model, str | Path) else type(model).__name__ + " object"

    return {
        "recipe": recipe, "data": Path(dataset.source).name, "command": command or "sparring.train(...)",
        "retriever": named(retriever), "ranker": named(ranker),
    }  # fmt: skip

