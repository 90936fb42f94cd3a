"""Run a recipe from two models and a data set to two exported models and the evidence of what training did."""

from __future__ import annotations

import itertools
import json
import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from sentence_transformers import CrossEncoder, SentenceTransformer

from sparring.config import build, parse_assignments, read_toml, to_toml
from sparring.data import Dataset, default_cache, load
from sparring.data.corrections import Corrections, read_corrections
from sparring.distributed import (
    Choice,
    choose_device,
    choose_precision,
    choose_threads,
    choose_tokens,
    make_accelerator,
    on_main,
    processes,
    rank,
)
from sparring.files import Lock, explained
from sparring.log import Metrics, read_metrics
from sparring.models import Ranker, Retriever, load_ranker, load_retriever
from sparring.models.compiling import compile_layers
from sparring.models.lean import forward_of
from sparring.models.memory import enough_memory
from sparring.models.sharding import outline, shard
from sparring.phases.evaluate import check_measures
from sparring.phases.export import export
from sparring.phases.fit import Feed
from sparring.recipes.competition import RECIPES, compete, prepare
from sparring.recipes.evidence import write_evidence
from sparring.recipes.experiment import Experiment, Split, choose_split
from sparring.recipes.forecast import forecast, tell
from sparring.recipes.journal import Journal, clear, differences
from sparring.recipes.settings import DEFAULT_RECIPE, RunConfig
from sparring.recipes.summary import Outcome, summarise
from sparring.recipes.warmup import WarmupConfig
from sparring.report import write_report
from sparring.rundir import PACKAGES, RunDir, make_folder, require_unused, unfinished, versions
from sparring.stores.milvus import Milvus
from sparring.types import InputError

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger("sparring")

NAMES = ("warmup", *RECIPES)

PIECES = (
    "train_tokens", "encode_tokens", "gradient_cache", "accumulate", "threads", "shard_ranker", "processes",
    "ray_address", "ray_workers", "ray_timeout",
)  # fmt: skip
"""What only says in which pieces a batch is worked through, and how sums are split: a stopped run may go on with
others, and says so."""


@dataclass(frozen=True)
class Trained:
    """What a run hands back. ``retriever`` and ``ranker`` are the exported objects, ready to use; ``experiment`` holds
    the same pair with its token stores."""

    retriever: SentenceTransformer
    ranker: CrossEncoder
    path: Path
    outcome: Outcome
    experiment: Experiment


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
    meant = tables.pop("recipe", recipe)
    if meant != recipe:
        raise InputError(
            "the configuration is for another recipe", where=where, expected=f'recipe = "{recipe}", or no such line',
            got=f"recipe = {meant!r}", fix=f"take --recipe {meant}, or another file",
        )  # fmt: skip
    preferred = [recipe, "run", "warmup"] if recipe in own else ["warmup", "run"]
    objects = build(every, (where, tables), ("--set", parse_assignments(assignments, every, preferred)))
    return {name: objects[name] for name in own}


def train(
    data: Dataset | str | Path,
    retriever: SentenceTransformer | str | Path,
    ranker: CrossEncoder | str | Path,
    *,
    out: str | Path,
    recipe: str = DEFAULT_RECIPE,
    config: str | Path | Mapping[str, Any] | None = None,
    assignments: Sequence[str] = (),
    corrections: Sequence[str | Path] = (),
    cache: str | Path | None = None,
    command: str = "",
) -> Trained:
    """Warm both models up, run the recipe's rounds, keep the best pair by dev's cascade, read test once, export.

    Args:
        data: a `Dataset`, or what `sparring.load` reads.
        retriever: a SentenceTransformer or plain encoder: object, folder or hub name.
        ranker: a CrossEncoder with one logit, or an encoder that gets a new head.
        out: a folder that does not exist or is empty; or a stopped run's with the same data, models and settings,
            which goes on where it stopped and ends as if it had not.
        config: a TOML file or nested tables; ``assignments`` (``key=value``) come after it.
        corrections: audit tables with a person's verdicts on mined negatives (docs/audit.md).
        cache: where converted data and tokens are kept; default as `sparring.data.default_cache`.

    Raises: InputError before anything is written where possible; DiskError or TooLittleMemory from the middle of a
        run, which then goes on with the same call.
    """
    objects = resolve_config(recipe, config, assignments)
    with explained(out), enough_memory():
        return _train(
            data, retriever, ranker,
            out=out, recipe=recipe, objects=objects, corrections=corrections, cache=cache, command=command,
        )  # fmt: skip


def _train(
    data: Dataset | str | Path,
    retriever: SentenceTransformer | str | Path,
    ranker: CrossEncoder | str | Path,
    *,
    out: str | Path,
    recipe: str,
    objects: Mapping[str, Any],
    corrections: Sequence[str | Path],
    cache: str | Path | None,
    command: str,
) -> Trained:
    x = set_up(
        data, retriever, ranker,
        out=out, recipe=recipe, objects=objects, corrections=corrections, cache=cache, command=command,
    )  # fmt: skip
    try:
        outcome = compete(x, recipe, objects.get(recipe), prepare(x, objects["warmup"]))
        x.gather()
        card = card_of(recipe, x.dataset, retriever, ranker, command)
        on_main(lambda: finish(x, outcome, card), x.accelerator.device)
    finally:
        x.let_go()
    for tracker in x.accelerator.trackers if x.config.trackers else ():
        tracker.finish()
    return Trained(x.retriever.model, x.ranker.model, x.run.path, outcome, x)


def set_up(
    data: Dataset | str | Path,
    retriever: SentenceTransformer | str | Path,
    ranker: CrossEncoder | str | Path,
    *,
    out: str | Path,
    recipe: str,
    objects: Mapping[str, Any],
    corrections: Sequence[str | Path] = (),
    cache: str | Path | None = None,
    command: str = "",
    again: bool = False,
) -> Experiment:
    """Data, models, tokens, hardware and the run folder, in the order in which mistakes are cheapest to find.

    ``again``: the folder is an earlier run's with the same settings; it is read, nothing is written into it.
    """
    settings: RunConfig = objects["run"]
    goes_on = not again and unfinished(out)
    if not again and not goes_on:
        require_unused(Path(out))
    check_measures(settings.measures, settings.search_depth)
    require_cluster(settings)
    place = Path(cache) if cache is not None else default_cache()
    dataset = data if isinstance(data, Dataset) else load(data, cache=place, titles=settings.titles)
    corrected = read_corrections(corrections, dataset)
    dataset = corrected.apply(dataset)
    if settings.index.startswith("milvus:"):
        with Milvus(settings.index.partition(":")[2]):
            logger.info("%s answers", settings.index)
    splits = choose_splits(dataset, settings)
    require_pools(objects, len(dataset.corpus))
    device, precision, threads = choose_hardware(settings)
    torch.set_num_threads(int(threads.value))
    torch.manual_seed(settings.seed)
    pair = load_pair(retriever, ranker, settings)
    accelerator = make_accelerator(device.value, settings.trackers, str(out))
    run = RunDir(Path(out), Metrics(Path(out) / "metrics.jsonl" if rank() == 0 and not again else None))
    if again:
        run.metrics.records.extend(read_metrics(run.path / "metrics.jsonl"))
        run.metrics.muted = lambda: True
    elif not goes_on:
        on_main(lambda: make_folder(out), accelerator.device)
    held = None if again else hold(run.path, accelerator)
    try:
        resumable = not again and (goes_on or settings.checkpoints != "none")
        journal = Journal(run.path if resumable else None, writes=rank() == 0)
        if (passing := journal.ended) is not None:  # killed after its end, before all was cleared away
            on_main(lambda: clear(run.path, passing), accelerator.device)
        if goes_on and not unfinished(out):  # or another process ended it while this one was loading
            require_unused(Path(out))
        accelerator.wait_for_everyone()
        place_of_work = {"device": device.value, "precision": precision.value, "processes": processes()}
        place_of_work |= {"threads": int(threads.value)}
        begin(journal, run, recipe, objects, dataset, corrected, pair, place_of_work)
        if settings.trackers:
            accelerator.init_trackers("sparring", config={"recipe": recipe, "seed": settings.seed})
            run.metrics.tracker = accelerator.log
        if rank() == 0 and not again:
            record_start(run, recipe, objects, dataset, pair, (device, precision, threads), command)
        if rank() == 0 and not again:
            record_corrections(run, corrected)
        if rank() == 0 and not again:
            tell(forecast(dataset, pair, objects, recipe, splits, place), run.path, place)
        outlined = place_models(pair, accelerator, settings)
        for name, model in zip(("retriever", "ranker"), pair, strict=True):
            logger.info("%s: %s", name, forward_of(model))
        tokens = choose_tokens(settings.train_tokens, accelerator.device.type, 8192)
        feed = run.phase("tokenise", tokenise, dataset, *pair, place / "tokens", tokens)
        return Experiment(
            dataset, *pair, feed, settings, run, accelerator, precision.value, *splits, corrected,
            journal=journal, held=held, outline=outlined,
        )  # fmt: skip
    except BaseException:
        if held is not None:
            held.close()
        raise


def require_cluster(settings: RunConfig) -> None:
    """InputError unless the cluster that refreshes will use is there now; nothing without one."""
    cluster = settings.cluster()
    if cluster is None:
        return
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError(
            "a run of several processes refreshes in its own processes", where="run.engine", expected="local",
            got=settings.engine, fix="train in one process, or leave run.engine out",
        )  # fmt: skip
    cluster.check()


def place_models(
    pair: tuple[Retriever, Ranker], accelerator: Accelerator, settings: RunConfig
) -> Ranker | None:  # fmt: skip
    """Both models to this process's device; the ranker in parts where that is asked for, then also its outline."""
    retriever, ranker = pair
    retriever.to(accelerator.device)
    if settings.compile:
        compile_layers(retriever)
    if not settings.shard_ranker or processes() == 1:
        if settings.shard_ranker:
            logger.info("shard_ranker: there is one process, which holds the whole ranker")
        ranker.to(accelerator.device)
        if settings.compile:
            compile_layers(ranker)
        return None
    outlined = outline(ranker)
    shard(ranker, accelerator.device)
    logger.info("the ranker is spread over %d processes (FSDP2)", processes())
    return outlined


def hold(folder: Path, accelerator: Accelerator) -> Lock | None:
    """The run folder's lock, taken by the main process; every process raises where another run has it."""
    taken: list[Lock] = []
    on_main(lambda: taken.append(Lock(folder)), accelerator.device)
    return taken[0] if taken else None


def begin(
    journal: Journal,
    run: RunDir,
    recipe: str,
    objects: Mapping[str, Any],
    dataset: Dataset,
    corrections: Corrections,
    pair: tuple[Retriever, Ranker],
    hardware: Mapping[str, Any],
) -> None:
    """The journal's first line, which says what the run is; a run that goes on must be the same."""
    if journal.folder is None:
        return
    facts: dict[str, Any] = {
        "config": {name: asdict(config) for name, config in objects.items()}, "data": dataset.fingerprint,
        "corrections": corrections.fingerprint(), "retriever": pair[0].fingerprint(),
        "ranker": pair[1].fingerprint(), "versions": code(), **hardware,
    }  # fmt: skip
    facts = json.loads(json.dumps(facts))
    first = journal.entries[0] if journal.entries else None
    journal.newest()  # refuses a journal that lacks lines which the checkpoint knows
    if first is None:
        if rank() == 0 and (run.path / "metrics.jsonl").is_file():  # stopped before the first line was whole
            run.go_on(run.metrics.mark())
        journal.add("begin", recipe, metrics=run.metrics.mark(), forwards={}, **facts)
        return
    found = differences({key: first.get(key) for key in facts} | {"recipe": first["name"]}, {**facts, "recipe": recipe})
    other = [line for line in found if line.partition(":")[0].rpartition(".")[2] in PIECES]
    if wrong := [line for line in found if line not in other]:
        raise InputError(
            "this folder holds an unfinished run of another kind", where=str(run.path),
            expected="the same data, models and settings", got="; ".join(wrong),
            fix="take them again to go on with it, or choose another --out",
        )  # fmt: skip
    if other:
        logger.warning("%s: goes on in other pieces (same gradient, other rounding): %s", run.path, "; ".join(other))
    journal.resume(run)
    journal.passed("begin", recipe)
    logger.info("%s: goes on after %s %s", run.path, journal.entries[-1]["kind"], journal.entries[-1]["name"])


def code() -> dict[str, str]:
    """Versions of the code that weights, lists and results depend on."""
    known = versions()
    return {name: known[name] for name in PACKAGES}


def choose_splits(dataset: Dataset, settings: RunConfig) -> tuple[Split, Split]:
    """Train must exist; dev selects; test is read once."""
    labelled = {name: set(dataset.split(name)) for name in ("train", settings.dev_split, settings.test_split)}
    if len(labelled) < 3:
        raise InputError(
            "a split is used twice", where="run.dev_split, run.test_split", expected="three different splits",
            got=f"train, {settings.dev_split}, {settings.test_split}", fix="dev selects, test only reports",
        )  # fmt: skip
    for one, two in itertools.combinations(labelled, 2):
        shared = sorted(labelled[one] & labelled[two])
        if shared:
            raise InputError(
                f"{len(shared)} queries are in {one} and in {two}: the results would be too good",
                where=dataset.source, expected="splits without a common query", got=", ".join(shared[:5]),
                fix="take these queries out of one split; `sparring check` lists such leaks",
            )  # fmt: skip
    dev = choose_split(dataset, settings.dev_split, settings.dev_queries)
    return dev, choose_split(dataset, settings.test_split, settings.test_queries)


def require_pools(objects: Mapping[str, Any], passages: int) -> None:
    """Refuse lists longer than any pool can be, before anything is computed or written."""
    depth = {"run": objects["run"].mine_depth, "warmup": objects["warmup"].ranker_depth}
    wanted = [("warmup.ranker_negatives", objects["warmup"].ranker_negatives, depth["warmup"])]
    wanted += [("warmup.retriever_negatives", objects["warmup"].retriever_negatives, objects["warmup"].bm25_depth)]
    wanted += [
        (f"{name}.negatives", config.negatives, depth["run"]) for name, config in objects.items() if name in RECIPES
    ]
    for field, negatives, largest in wanted:
        if negatives > min(largest, passages - 1):
            raise InputError(
                "a list asks for more negatives than any pool can have",
                where=field, expected=f"at most {min(largest, passages - 1)} (depth {largest}, {passages} passages)",
                got=str(negatives), fix=f"make {field} smaller, or mine deeper (run.mine_depth)",
            )  # fmt: skip


def choose_hardware(settings: RunConfig) -> tuple[Choice, Choice, Choice]:
    """Device, precision and threads, each with its reason in the log."""
    device = choose_device()
    if settings.compile and device.value != "cuda":
        raise InputError(
            "compiling is for GPUs", where="run.compile", expected="false", got=f"true on {device.value}",
            fix="leave it out: on a CPU it gains nothing over the forward that encoders have there",
        )  # fmt: skip
    choices = device, choose_precision(settings.precision, device.value), choose_threads(settings.threads)
    for choice in choices:
        logger.info("%s: %s (%s)", choice.name, choice.value, choice.reason)
    return choices


def configured_retriever(retriever: SentenceTransformer | str | Path, settings: RunConfig) -> Retriever:
    """The retriever as the settings make it, before any training."""
    return load_retriever(
        retriever,
        layers=settings.retriever_layers or settings.layers, similarity=settings.similarity,
        scale=settings.scale or "auto", two_towers=settings.two_towers, max_length=settings.retriever_max_length,
        pooling=settings.pooling, trust_remote_code=settings.trust_remote_code,
    )  # fmt: skip


def load_pair(
    retriever: SentenceTransformer | str | Path, ranker: CrossEncoder | str | Path, settings: RunConfig
) -> tuple[Retriever, Ranker]:
    """Both models as configured."""
    first = configured_retriever(retriever, settings)
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


def record_corrections(run: RunDir, corrections: Corrections) -> None:
    """The verdicts that a run was given, as one table that can be given again; nothing where there are none."""
    if corrections.verdicts:
        logger.info("%s", corrections)
        run.metrics.write("corrections", **corrections.counts())
        corrections.write(run.path / "corrections.tsv")


def write_results(x: Experiment, outcome: Outcome) -> None:
    """The evidence of a run, once test has been read."""
    x.run.write_text("summary.md", summarise(x, outcome, markdown=True))
    x.run.write_json("results.json", outcome.to_dict(x.forwards.to_dict()))
    write_evidence(x, outcome)


def finish(x: Experiment, outcome: Outcome, card: Mapping[str, Any]) -> None:
    """Results first, so that a failed export loses nothing; then export, the page about all of it, and away with the
    kept weights."""
    write_results(x, outcome)
    metrics = {row.name: {m: str(row.estimates[m]) for m in outcome.measures} for row in outcome.best_test.rows}
    for name in ("retriever", "ranker"):  # a half export of a run that was stopped here
        shutil.rmtree(x.run.path / name, ignore_errors=True)
    x.run.phase(
        "export", export, x.retriever, x.ranker, x.run.path,
        card={**card, "metrics": metrics, "fusion": outcome.fusion * outcome.scale},
        trust_remote_code=x.config.trust_remote_code,
    )  # fmt: skip
    write_report(x.run.path)
    passing = ("index", "vectors", *(() if x.config.checkpoints == "rounds" else ("states",)))
    x.journal.end(*passing)  # from here on the run is finished
    clear(x.run.path, passing)


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
