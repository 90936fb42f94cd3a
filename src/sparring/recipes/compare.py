"""`sparring compare`: every arm from the same warm start at the same budget, over several seeds.

For each seed: one set-up, one warm start, then the arms one after the other, each in a run folder of its own that
branches from it. What is finished is never computed again: the same command goes on where it stopped, and more arms or
seeds can be added to a comparison later.
"""

from __future__ import annotations

import copy
import json
import logging
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import CrossEncoder, SentenceTransformer

from sparring.config import to_toml
from sparring.data import Dataset, default_cache, load
from sparring.data.corrections import read_corrections
from sparring.distributed import choose_device, choose_precision, processes
from sparring.files import (
    LOCK,
    Lock,
    damaged,
    digests,
    explained,
    read_sealed,
    remove,
    sha256,
    write_json,
    write_sealed,
    write_text,
)
from sparring.log import peak_memory_bytes, release_memory, reset_peak_memory
from sparring.models.memory import enough_memory
from sparring.phases.evaluate import Row, Table, check_measures
from sparring.phases.export import export
from sparring.phases.fit import NotFinite
from sparring.recipes.arms import FACTORS, Arm, at_budget, parse_arms, trained_forwards, with_rates
from sparring.recipes.audits import Audits
from sparring.recipes.comparison import Comparison, Evidence, conclude
from sparring.recipes.competition import Baselines, contend, prepare, read_test
from sparring.recipes.experiment import Experiment, put_kept, require_kept
from sparring.recipes.journal import GOING_ON, Journal, clear, differences
from sparring.recipes.settings import DEFAULT_ARMS, RunConfig
from sparring.recipes.store import load_generation, load_rows, save_generation, save_rows
from sparring.recipes.train import (
    card_of,
    choose_splits,
    code,
    load_pair,
    require_pools,
    resolve_config,
    set_up,
    write_results,
)
from sparring.recipes.warmup import WarmupConfig
from sparring.report import write_report
from sparring.rundir import JOURNAL, unfinished
from sparring.types import CannotGoOn, InputError

logger = logging.getLogger("sparring")


@dataclass(frozen=True)
class Plan:
    """What is compared. ``configs``: each arm's settings at the budget, by arm name, before tuning."""

    arms: tuple[Arm, ...]
    configs: Mapping[str, Any]
    run: RunConfig
    warmup: WarmupConfig
    seeds: tuple[int, ...]
    budget: int
    trials: int
    baseline: str


@dataclass(frozen=True)
class Materials:
    """What every seed starts from."""

    dataset: Dataset
    retriever: SentenceTransformer | str | Path
    ranker: CrossEncoder | str | Path
    corrections: Sequence[str | Path]
    cache: Path
    command: str


def compare(
    data: Dataset | str | Path,
    retriever: SentenceTransformer | str | Path,
    ranker: CrossEncoder | str | Path,
    *,
    out: str | Path,
    recipes: str = DEFAULT_ARMS,
    seeds: int = 5,
    budget: int = 0,
    trials: int = 3,
    baseline: str = "",
    config: str | Path | Mapping[str, Any] | None = None,
    assignments: Sequence[str] = (),
    corrections: Sequence[str | Path] = (),
    cache: str | Path | None = None,
    command: str = "",
) -> Comparison:
    """Train every arm on every seed, test the differences, export the pair to ship.

    Args:
        out: a new folder, or one of a comparison with the same data, models and shared settings: it is continued.
        recipes: arms as `parse_arms` reads them.
        seeds: number of seeds, counted up from ``run.seed``; each has its own warm start, shared by the arms.
        budget: query-passage forwards that train each model of each arm after the warm start; 0: as configured.
        trials: learning rates that every arm tries on dev, on the first seed (`arms.FACTORS`); 1 tunes nothing.
        corrections: audit tables with a person's verdicts, for all arms (docs/audit.md).
        baseline: the arm that the others are tested against; default ``separate`` where it is one, else the first.

    Raises: InputError for unknown arms, a budget that an arm cannot meet, a folder of another comparison.
    """
    plan = make_plan(recipes, seeds, budget, trials, baseline, config, assignments)
    require_one_process()
    place = Path(cache) if cache is not None else default_cache()
    dataset = data if isinstance(data, Dataset) else load(data, cache=place, titles=plan.run.titles)
    materials = Materials(dataset, retriever, ranker, corrections, place, command)
    folder = Path(out)
    held = claim(folder, plan, materials)
    try:
        with explained(folder), enough_memory():
            return _compare(folder, plan, materials)
    finally:
        held.close()


def require_one_process() -> None:
    """InputError under a launcher of several processes, whose group need not exist yet."""
    count = max(processes(), int(os.environ.get("WORLD_SIZE") or 1))
    if count > 1:
        raise InputError(
            "a comparison runs in one process", where="compare", expected="1 process", got=str(count),
            fix="start it without a launcher",
        )  # fmt: skip


def _compare(folder: Path, plan: Plan, materials: Materials) -> Comparison:
    command = materials.command
    factors = {arm.name: 1.0 for arm in plan.arms}
    for seed in plan.seeds:
        session = Seed(folder / f"seed-{seed}", replace(plan.run, seed=seed), plan, materials)
        if seed == plan.seeds[0] and plan.trials > 1:
            factors = {arm.name: tune(session, arm, folder / "tuning") for arm in plan.arms}
        for arm in plan.arms:
            train_arm(session, arm, with_rates(plan.configs[arm.name], factors[arm.name]), factors[arm.name])
    evidence = gather(folder, plan, command)
    result = conclude(evidence)
    ship(folder, result, plan, materials)
    write_text(folder / "comparison.md", result.text(markdown=True))
    write_json(folder / "comparison.json", result.to_dict())
    write_report(folder)
    return result


def make_plan(
    recipes: str,
    seeds: int,
    budget: int,
    trials: int,
    baseline: str,
    config: str | Path | Mapping[str, Any] | None,
    assignments: Sequence[str],
) -> Plan:
    """Everything that can be wrong in the arguments, found before anything is loaded."""
    arms = parse_arms(recipes)
    for name, value, most in (("--seeds", seeds, 1000), ("--trials", trials, len(FACTORS))):
        if not 1 <= value <= most:
            raise InputError(f"{name} is out of range", where=name, expected=f"1 to {most}", got=str(value))
    if budget < 0:
        raise InputError("the budget is negative", where="--budget", expected="0 or more", got=str(budget))
    names = [arm.name for arm in arms]
    if baseline and baseline not in names:
        raise InputError("the baseline is no arm", where="--baseline", expected=", ".join(names), got=baseline)
    resolved = {arm.name: resolve_config(arm.recipe, config, [*assignments, *arm.assignments()]) for arm in arms}
    shared = next(iter(resolved.values()))
    own = {arm.name: resolved[arm.name][arm.recipe] for arm in arms}
    start = shared["run"].seed
    return Plan(
        tuple(arms), at_budget(own, budget), shared["run"], shared["warmup"], tuple(range(start, start + seeds)),
        budget or trained_forwards(next(iter(own.values())))[0], trials,
        baseline or ("separate" if "separate" in names else names[0]),
    )  # fmt: skip


def claim(folder: Path, plan: Plan, materials: Materials) -> Lock:
    """Make the folder, or check that it is this comparison's: what all arms and seeds share must be the same.

    -> the folder's lock, held for this process
    """
    run = {**asdict(plan.run), "seed": plan.seeds[0]}
    named = {"retriever": _named(materials.retriever), "ranker": _named(materials.ranker)}
    verdicts = read_corrections(materials.corrections, materials.dataset).fingerprint()
    models = fingerprints(plan, materials)
    shared = {"data": materials.dataset.fingerprint, "corrections": verdicts, **named, "trials": plan.trials}
    device = choose_device().value
    precision = choose_precision(plan.run.precision, device).value
    shared |= {"models": models, "versions": code(), "device": device, "precision": precision}
    shared = json.loads(json.dumps({**shared, "run": run, "warmup": asdict(plan.warmup)}))
    file = folder / "shared.json"
    if file.is_file():
        found = read_sealed(file, "the settings of a comparison", fix="choose another --out")
        found = {**{key: shared[key] for key in ("device", "precision")}, **found}  # earlier ones do not say these
        found["versions"] = {**shared["versions"], **found["versions"]}  # nor all of these
        if found != shared:
            raise InputError(
                "this folder holds a comparison with other data, models or shared settings", where=str(file),
                expected="the same ones", got="; ".join(differences(found, shared)),
                fix="take them again, or choose another --out",
            )  # fmt: skip
        return Lock(folder)
    if folder.is_file() or (folder.is_dir() and any(path.name != LOCK for path in folder.iterdir())):
        raise InputError(
            "the output folder is already used", where=str(folder), expected="a new folder, or a comparison's",
            fix="choose another --out; nothing was overwritten",
        )  # fmt: skip
    try:
        folder.mkdir(parents=True, exist_ok=True)
        held = Lock(folder)
        write_sealed(file, shared)
    except OSError as error:
        raise InputError("the output folder cannot be written", where=str(folder), got=str(error)) from None
    return held


def fingerprints(plan: Plan, materials: Materials) -> dict[str, str]:
    """Of both models as configured, once everything has been tried that a first seed would stumble over."""
    check_measures(plan.run.measures, plan.run.search_depth)
    choose_splits(materials.dataset, plan.run)
    objects = {"run": plan.run, "warmup": plan.warmup}
    for arm in plan.arms:
        require_pools({**objects, arm.recipe: plan.configs[arm.name]}, len(materials.dataset.corpus))
    retriever, ranker = load_pair(_copy(materials.retriever), _copy(materials.ranker), plan.run)
    return {"retriever": retriever.fingerprint(), "ranker": ranker.fingerprint()}


def _named(model: object) -> str:
    return str(model) if isinstance(model, str | Path) else type(model).__name__


class Seed:
    """One seed's warm start, made or read only when an arm needs it."""

    def __init__(self, folder: Path, run: RunConfig, plan: Plan, materials: Materials) -> None:
        self.folder, self.run, self.plan, self.materials = folder, run, plan, materials
        self._open: tuple[Experiment, Baselines] | None = None

    def opened(self) -> tuple[Experiment, Baselines]:
        """The warm start, made or read at the first call."""
        if self._open is None:
            self._open = self._warm()
        return self._open

    def branch(self, folder: Path, recipe: str, config: Any) -> tuple[Experiment, Baselines]:
        """The warm start in a run folder of its own, to be trained with this configuration. A stopped branch goes on,
        when it was begun from this warm start with the same one; anything else that lies there is removed.

        Raises: CannotGoOn where a stopped branch is damaged.
        """
        x, baselines = self.opened()
        facts = {"settings": json.loads(json.dumps(asdict(config))), "warm": self.warm_digest()}
        if (journal := journal_of(folder, recipe, facts)) is not None:
            return x.branch(folder, journal), baselines
        discard(folder)
        journal = Journal(None if self.run.checkpoints == "none" else folder)
        branch = x.branch(folder, journal)
        if journal.folder is not None:
            facts["threads"] = torch.get_num_threads()
            journal.add("begin", recipe, metrics=branch.run.metrics.mark(), forwards={}, **facts)
        return branch, baselines

    def train(self, folder: Path, recipe: str, config: Any) -> tuple[Experiment, Baselines]:
        """A branch with all its rounds behind it, on dev alone. A stopped one that cannot go on begins again."""
        try:
            return self._trained(folder, recipe, config)
        except CannotGoOn as error:
            logger.warning("%s begins again: %s: %s", folder, error.where, error.what)
        discard(folder)
        return self._trained(folder, recipe, config)

    def _trained(self, folder: Path, recipe: str, config: Any) -> tuple[Experiment, Baselines]:
        x, baselines = self.branch(folder, recipe, config)
        contend(x, recipe, config, baselines)
        for kind, digest in x.kept["best"].items():
            require_kept(folder / "states" / "best" / f"{kind}.safetensors", digest)
        x.journal = Journal(None)  # test is read again by a process that goes on: what of it is read depends on others
        return x, baselines

    def _warm(self) -> tuple[Experiment, Baselines]:
        shared, m = self.folder / "shared", self.materials
        done = shared / "baselines.npz"
        if not done.exists():
            self._require_none_made()
        if shared.exists() and not done.exists() and not unfinished(shared):
            logger.warning("%s: the warm start was not finished: it is made again", shared)
            shutil.rmtree(shared)
        objects = {"run": self.run, "warmup": self.plan.warmup}
        again = done.exists()
        x = set_up(
            m.dataset, _copy(m.retriever), _copy(m.ranker), out=shared, recipe="warmup", objects=objects,
            corrections=m.corrections, cache=m.cache, command=m.command, again=again,
        )  # fmt: skip
        if again:
            clear(shared, _PASSING)  # of a process that was killed right after `baselines.npz`
            return x, read_warm(x, shared)
        try:
            baselines = prepare(x, self.plan.warmup)
            save_warm(x, shared, baselines)
            x.journal.end()
            clear(shared, _PASSING)
        finally:
            x.let_go()
        return x, baselines

    def warm_digest(self) -> str:
        """SHA-256 of the file that stands for the warm start, with the digests of all others; "" before it is made."""
        done = self.folder / "shared" / "baselines.npz"
        return sha256(done) if done.is_file() else ""

    def require_from_here(self, file: Path, warm: str) -> None:
        """InputError when what ``file`` says was not made from this folder's warm start."""
        if warm != self.warm_digest():
            raise InputError(
                "this was not made from the warm start in its folder", where=str(file),
                expected=str(self.folder / "shared" / "baselines.npz"), got="another one, a damaged one, or none",
                fix=f"put that file back, or remove {self.folder} (and tuning/, which the first seed made)",
            )  # fmt: skip

    def _require_none_made(self) -> None:
        """InputError when arms are there that were made from a warm start that is gone: others would start from
        another one."""
        made = sorted(self.folder.glob("*/arm.npz"))
        if self.run.seed == self.plan.seeds[0]:
            made += sorted((self.folder.parent / "tuning").glob("*.json"))
        if made:
            raise InputError(
                "the warm start that finished arms began with is gone", where=str(self.folder / "shared"),
                expected=f"baselines.npz, from which {made[0]} was made", got="no such file",
                fix=f"put it back, or remove {self.folder} (and tuning/, which the first seed made)",
            )  # fmt: skip


def _copy(model: Any) -> Any:
    """Training changes a model in place, and every seed starts from the one that was given."""
    return model if isinstance(model, str | Path) else copy.deepcopy(model)


def save_warm(x: Experiment, folder: Path, baselines: Baselines) -> None:
    """Everything that arms need of a warm start; ``baselines.npz`` last, as the sign that it is whole."""
    assert x.start is not None
    save_generation(folder / "zero-shot.npz", x.start)
    save_generation(folder / "warm.npz", baselines.warm)
    facts = {"dev_rows": len(baselines.dev_rows), "trained": baselines.ranker_came_trained, "kept": x.kept}
    facts["files"] = digests(folder, named_files(folder, (*GOING_ON, *_PASSING)))
    save_rows(folder / "baselines.npz", [*baselines.dev_rows, *x.tables[0][1].rows], facts)


def read_warm(x: Experiment, folder: Path) -> Baselines:
    """Put an earlier warm start back into the experiment."""
    rows, facts = load_rows(folder / "baselines.npz")
    if wrong := damaged(folder, facts["files"]):
        raise InputError(
            "a file of the warm start is missing or damaged", where=str(folder / wrong[0]),
            expected="the file as it was written",
            fix=f"put it back, or remove {folder.parent} (and tuning/, which the first seed made)",
        )  # fmt: skip
    x.kept = facts["kept"]
    kept = folder / "vectors"
    warm, x.start = load_generation(folder / "warm.npz", kept), load_generation(folder / "zero-shot.npz", kept)
    bm25 = {split.name: x.bm25_lists(split.rows, x.config.search_depth) for split in (x.dev, x.test)}
    x.fixed = bm25 if x.config.fixed_candidates == "bm25" else warm.lists
    x.tables = [("warm start", Table(tuple(rows[facts["dev_rows"] :]), tuple(x.config.measures)))]
    return Baselines(bm25, rows[: facts["dev_rows"]], warm, facts["trained"], Audits.read(x.run, x.dataset))


_PASSING = ("index",)
"""What else than `GOING_ON` a warm start's folder holds only until it is whole."""
_ARM_PASSING = ("index", "vectors")
"""The same of an arm's folder."""


def journal_of(folder: Path, recipe: str, facts: Mapping[str, Any]) -> Journal | None:
    """Of a stopped branch that has come somewhere and was begun with these facts, its first line passed; else None.

    Raises: CannotGoOn where it is damaged.
    """
    if not unfinished(folder):
        return None
    journal = Journal(folder)
    begun = journal.entries[0] if journal.entries else {}
    if len(journal.entries) < 2 or begun["name"] != recipe or any(begun.get(key) != facts[key] for key in facts):
        return None
    journal.passed("begin", recipe)
    logger.info("%s: goes on after %s %s", folder, journal.entries[-1]["kind"], journal.entries[-1]["name"])
    if (threads := torch.get_num_threads()) != begun["threads"]:
        logger.warning("%s: goes on with %d threads instead of %d: other rounding", folder, threads, begun["threads"])
    return journal


def discard(folder: Path) -> None:
    """Remove a branch's folder, its journal first: what a kill leaves of it is not taken for a stopped branch."""
    remove(folder / JOURNAL)
    if folder.exists():
        shutil.rmtree(folder)


def named_files(folder: Path, without: Sequence[str]) -> list[str]:
    """All files of a folder by their path in it; ``without``: what is left out, by the first part of that path."""
    names = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return [name.as_posix() for name in names if name.parts[0] not in without]


def tune(session: Seed, arm: Arm, folder: Path) -> float:
    """The factor on the learning rates whose best round has the best cascade on dev; test is not read."""
    file = folder / f"{arm.folder}.json"
    base = session.plan.configs[arm.name]
    settings = json.loads(json.dumps(asdict(base)))
    tried: list[dict[str, Any]] = []
    if file.is_file():
        found = tuned(file)
        _require_same(file, found["settings"], settings)
        session.require_from_here(file, found["warm"])
        tried = found["tried"]
    places = {factor: folder / f"{arm.folder}-{factor:g}" for factor in FACTORS}
    for trial in tried:
        discard(places[trial["factor"]])  # of a process that was killed right after it had noted the trial
    for factor in FACTORS[len(tried) : session.plan.trials]:
        logger.info("%s: learning rates x %g, on dev", arm.name, factor)
        try:
            x = session.train(places[factor], arm.recipe, with_rates(base, factor))[0]
            x.release()
            assert x.best is not None
            tried.append({"factor": factor, "dev": x.best[1]})
        except NotFinite as error:
            logger.warning("%s: learning rates x %g diverge: %s", arm.name, factor, error)
            tried.append({"factor": factor, "dev": None})
        write_sealed(file, {"settings": settings, "tried": tried, "warm": session.warm_digest()})
        discard(places[factor])
    whole = [trial for trial in tried if trial["dev"] is not None]
    if not whole:
        raise InputError(
            f"every learning rate of {arm.name} diverges", where=arm.recipe, got=f"{len(tried)} trials",
            expected="a finite loss", fix="lower retriever_lr and ranker_lr",
        )  # fmt: skip
    return float(max(whole, key=lambda trial: trial["dev"])["factor"])


def tuned(file: Path) -> dict[str, Any]:
    """The record of an arm's trials; InputError when it is not as it was written."""
    return read_sealed(file, "the record of an arm's tuning", fix="remove it: the trials are made again")


def _require_same(where: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    if found != wanted:
        raise InputError(
            "this arm was trained with other settings", where=str(where), expected="the same ones",
            got="; ".join(differences(found, wanted)), fix="take them again, or choose another --out",
        )  # fmt: skip


def train_arm(session: Seed, arm: Arm, config: Any, factor: float) -> None:
    """One arm on one seed, unless it is there already; its ``arm.npz`` is written last."""
    folder = session.folder / arm.folder
    done, settings = folder / "arm.npz", json.loads(json.dumps(asdict(config)))
    if done.is_file():
        facts = finished(folder)[1]
        _require_same(done, facts["settings"], settings)
        session.require_from_here(done, facts["warm"])
        clear(folder, _ARM_PASSING)  # of a process that was killed right after `arm.npz`
        return
    logger.info("seed %d: %s ...", session.run.seed, arm.name)
    session.opened()  # not this arm's memory
    own_peak = reset_peak_memory()
    x, baselines = session.train(folder, arm.recipe, config)
    seconds = time.monotonic() - x.run.metrics.start  # of all processes that had a part in it, as is the peak
    memory = max([peak_memory_bytes(), *(peak for _, _, peak in x.run.phases)])
    x.release()
    objects = {"run": session.run, "warmup": session.plan.warmup, arm.recipe: config}
    x.run.write_text("config.toml", to_toml(objects, {"recipe": arm.recipe}))
    shutil.copy(session.folder / "shared" / "environment.json", folder)
    outcome = read_test(x, baselines)
    write_results(x, outcome)
    assert x.best is not None
    rows = [*outcome.test_rows, *baselines.test["warm"], *outcome.best_test.rows]
    facts = {
        "arm": arm.name, "recipe": arm.recipe, "seed": session.run.seed, "settings": settings, "factor": factor,
        "dev": x.best[1], "kept": outcome.best, "seconds": seconds,
        "peak_memory_mb": memory // 2**20 if own_peak else 0,
        "forwards": x.forwards.to_dict(), "references": len(outcome.test_rows),
        "dev_queries": len(x.dev.rows), "test_queries": len(x.test.rows),
    }  # fmt: skip
    release_memory()
    write_report(folder)
    facts |= {"warm": session.warm_digest(), "states": x.kept["best"]}
    facts["files"] = digests(folder, named_files(folder, ("states", "audit", "report.html", *GOING_ON, *_ARM_PASSING)))
    save_rows(done, rows, facts)
    clear(folder, _ARM_PASSING)


def gather(folder: Path, plan: Plan, command: str) -> Evidence:
    """Everything that was measured, from the folder alone."""
    results = {arm.name: [finished(folder / f"seed-{seed}" / arm.folder) for seed in plan.seeds] for arm in plan.arms}
    tuning = {}
    for arm in plan.arms if plan.trials > 1 else ():
        file = folder / "tuning" / f"{arm.folder}.json"
        tuning[arm.name] = tuned(file)["tried"]
    file = folder / f"seed-{plan.seeds[0]}" / plan.arms[0].folder / "environment.json"  # checked with its arm
    environment = json.loads(file.read_text(encoding="utf-8"))
    return Evidence(
        arms=plan.arms, seeds=plan.seeds, baseline=plan.baseline, budget=plan.budget, measure=plan.run.select_by,
        measures=tuple(plan.run.measures), results=results, tuning=tuning,
        environment={**environment, "command": command},
    )  # fmt: skip


def finished(folder: Path) -> tuple[list[Row], dict[str, Any]]:
    """The rows and facts of a finished arm; InputError when a file of its folder is not as it was written."""
    rows, facts = load_rows(folder / "arm.npz")
    _require_whole(folder, facts["files"])
    return rows, facts


def _require_whole(arm: Path, wanted: Mapping[str, str]) -> None:
    """InputError when one of these files of a finished arm is not as it was written."""
    if wrong := damaged(arm, wanted):
        raise InputError(
            "a file of a finished arm is missing or damaged", where=str(arm / wrong[0]),
            expected="the file as it was written", fix=f"remove {arm}: this arm is trained again",
        )  # fmt: skip


def ship(folder: Path, result: Comparison, plan: Plan, materials: Materials) -> None:
    """Export the pair to ship into ``best``; an earlier export of another pair makes way once this one is whole."""
    shipped = result.shipped
    settings = replace(plan.run, seed=shipped.seed)
    retriever, ranker = load_pair(_copy(materials.retriever), _copy(materials.ranker), settings)
    arm = folder / f"seed-{shipped.seed}" / shipped.arm.folder
    facts = result.evidence.results[shipped.arm.name][list(plan.seeds).index(shipped.seed)][1]
    digest, fusion = facts["states"], facts["settings"]["fusion"] if facts["kept"] != "warm start" else 0
    _require_whole(arm, {f"states/best/{kind}.safetensors": sha256 for kind, sha256 in digest.items()})
    for kind, model in (("retriever", retriever), ("ranker", ranker)):
        put_kept(model, arm / "states" / "best" / f"{kind}.safetensors")
    m = materials
    card: dict[str, Any] = card_of(shipped.arm.name, m.dataset, m.retriever, m.ranker, m.command)
    metrics = {name: {m: str(e) for m, e in cells.items()} for name, cells in result.shipped_rows().items()}
    aside, target = folder / "best.part", folder / "best"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    card |= {"metrics": metrics, "fusion": fusion * retriever.scale}
    export(retriever, ranker, aside, card=card, trust_remote_code=settings.trust_remote_code)
    shutil.rmtree(target, ignore_errors=True)
    aside.rename(target)
