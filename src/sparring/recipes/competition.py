"""What every run measures, whatever its recipe: baselines, warm start, rounds, and the one reading of test."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sparring.phases.evaluate import Row, Table, evaluate, run_of
from sparring.phases.fit import Forwards
from sparring.recipes.ar2 import AR2Config, ar2
from sparring.recipes.audits import Audits
from sparring.recipes.controls import FrozenTeacherConfig, SeparateConfig, frozen_teacher, separate
from sparring.recipes.duet import DuetConfig, duet
from sparring.recipes.experiment import Experiment, Generation, Lists, Split
from sparring.recipes.rocketqav2 import RocketQAv2Config, rocketqav2
from sparring.recipes.settings import RoundsConfig
from sparring.recipes.summary import Outcome
from sparring.recipes.warmup import WarmupConfig, warmup

FUSED_START = "warm start, fused"
"""The warm start's models, their cascade ordered by both scores: a recipe with fusion is measured against it too."""

Body = Callable[[Experiment, Any, Generation], None]

RECIPES: Mapping[str, tuple[type, Body]] = {
    "ar2": (AR2Config, ar2),
    "rocketqav2": (RocketQAv2Config, rocketqav2),
    "duet": (DuetConfig, duet),
    "separate": (SeparateConfig, separate),
    "frozen-teacher": (FrozenTeacherConfig, frozen_teacher),
}
"""Recipes after the warm start. ``warmup`` alone is a recipe too, with no rounds."""


@dataclass(frozen=True)
class Baselines:
    """What a recipe is measured against, and where it starts from.

    ``ranker_came_trained``: the ranker came with a trained head, so the zero-shot pair can be ranked with.
    ``test``: the baselines' and the warm start's rows on test, once the first recipe has read them; ``files``: the
    ranked lists behind them, in that recipe's run folder.
    """

    bm25: Mapping[str, Lists]
    dev_rows: list[Row]
    warm: Generation
    ranker_came_trained: bool
    audits: Audits
    test: dict[str, list[Row]] = field(default_factory=dict)
    files: list[Path] = field(default_factory=list)


def prepare(x: Experiment, config: WarmupConfig) -> Baselines:
    """BM25, the models as they came, and the warm start with its first row of results."""
    x.start = x.refresh("zero-shot", depth=config.ranker_depth if not config.retriever_steps else 0)
    trained = not x.ranker.new_head
    if trained:
        x.keep("zero-shot")
        if config.retriever_steps:  # else these are the warm start's negatives, audited with it
            x.audit(x.start)
    bm25 = {split.name: x.bm25_lists(split.rows, x.config.search_depth) for split in (x.dev, x.test)}
    dev_rows = [*lists_row(x, x.dev, "BM25", bm25), *zero_shot_rows(x, x.dev, trained)]
    warm = warmup(x, config)
    x.fixed = bm25 if x.config.fixed_candidates == "bm25" else warm.lists
    x.keep("warm start")
    x.evaluate("warm start", warm)
    return Baselines(bm25, dev_rows, warm, trained, x.audits.copy(x.run))


def compete(x: Experiment, recipe: str, config: Any, baselines: Baselines) -> Outcome:
    """The recipe's rounds from the warm start, then the one reading of test."""
    contend(x, recipe, config, baselines)
    return read_test(x, baselines)


def contend(x: Experiment, recipe: str, config: Any, baselines: Baselines) -> None:
    """The recipe's rounds; dev alone is read. ``x.best`` and the weights kept as "best" are the best pair.

    Can be called on several branches of one experiment, each with its own recipe: every call starts from the same
    weights, lists and warm results.
    """
    x.restore("warm start")
    x.keep("best")
    x.forwards, x.audits, x.fusion = Forwards(), baselines.audits.copy(x.run), 0.0
    x.tables, x.best = x.tables[:1], ("warm start", x.selected(x.tables[0][1]), baselines.warm)
    if recipe != "warmup":
        config_class, body = RECIPES[recipe]
        assert isinstance(config, config_class)
        assert isinstance(config, RoundsConfig)
        x.fusion = config.fusion
        if x.fusion:
            x.evaluate(FUSED_START, baselines.warm, audit=False)
        body(x, config, baselines.warm)


def read_test(x: Experiment, baselines: Baselines) -> Outcome:
    """The only place where test labels are read, with nothing left to choose. Leaves the best pair's weights."""
    assert x.best is not None
    folder = x.run.path / "runs"
    if not baselines.test:
        x.written.clear()
        if baselines.ranker_came_trained:
            x.restore("zero-shot")
        references = lists_row(x, x.test, "BM25", baselines.bm25)
        references += zero_shot_rows(x, x.test, baselines.ranker_came_trained)
        x.restore("warm start")
        warm = x.three_rows("warm start", x.test, baselines.warm)  # in the ranker's order, for all recipes alike
        baselines.test.update(references=references, warm=list(warm.table.rows))
        baselines.files.extend(x.written)
    else:
        folder.mkdir(exist_ok=True)
        for file in baselines.files:
            if file.parent != folder:  # recipes may share a folder
                shutil.copy(file, folder)
    tables = [("warm start", Table(tuple(baselines.test["warm"]), tuple(x.config.measures)))]
    name, _, generation = x.best
    x.restore("best")
    generation = x.complete(generation)  # test is read from embeddings of one retriever
    if name != "warm start":
        tables.append((name, x.three_rows(name, x.test, generation, fusion=x.fusion).table))
    x.run.metrics.write("test", best=name, rows=[[n, row.as_dict()] for n, table in tables for row in table.rows])
    references = baselines.test["references"]
    return Outcome(
        name, baselines.dev_rows, x.tables, references, tables, x.config.select_by, x.config.measures,
        fusion=0.0 if name == "warm start" else x.fusion, scale=x.retriever.scale,
    )  # fmt: skip


def lists_row(x: Experiment, split: Split, name: str, lists: Mapping[str, Lists], *, write: bool = True) -> list[Row]:
    """One row for ranked lists that need no ranker."""
    run = run_of(x.query_ids(split.rows), x.dataset.corpus.ids, *lists[split.name])
    if write:
        x.write_runs(split.name, {name: run})
    return [evaluate(name, split.qrels, run, x.config.measures, x.config.seed)]


def zero_shot_rows(x: Experiment, split: Split, trained_head: bool) -> list[Row]:
    """The models as they came: the retriever, and the cascade where the ranker came with a trained head."""
    assert x.start is not None
    rows = lists_row(x, split, "zero-shot retriever", x.start.lists, write=not trained_head)  # else the three rows do
    if trained_head:
        x.fixed = x.fixed or x.start.lists
        cascade = x.three_rows("zero-shot", split, x.start).table.rows[-1]
        rows.append(Row("zero-shot cascade", cascade.estimates, cascade.values))
    return rows
