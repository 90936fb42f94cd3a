"""The command line: parses, calls, prints. Results go to standard output, narration to standard error.

Exit codes: 0 done; 1 `check` found errors in the data; 2 something given cannot be used (one message, no traceback);
130 stopped by Ctrl-C.
torch is imported by the commands that need it, so that `sparring --help` answers at once.
"""

from __future__ import annotations

import json
import logging
import os
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from sparring.files import explained, glob_escape
from sparring.phases.denoise import DEFAULTS
from sparring.recipes.settings import DEFAULT_ARMS, DEFAULT_RECIPE
from sparring.types import InputError

if TYPE_CHECKING:
    from sparring.cluster import Cluster
    from sparring.data import Dataset

PATH = click.Path(path_type=Path)
COUNT, NUMBER, WEIGHT = click.IntRange(min=1), click.IntRange(min=0), click.FloatRange(min=0)
RECIPE_NAMES = ("warmup", "ar2", "rocketqav2", "duet", "separate", "frozen-teacher")
STORES = "milvus:URI, pgvector:DSN, parquet:FOLDER or faiss:FOLDER"


class Size(click.ParamType):
    """A whole number that may be written with an exponent: 100e6."""

    name = "integer"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """-> the number"""
        try:
            number = float(value)
            if number < 1 or number != int(number):
                raise ValueError
        except (ValueError, OverflowError):
            self.fail(f"{value!r} is not a whole number of at least 1, 100e6 for example", param, ctx)
        return int(number)


SIZE = Size()


class Commands(click.Group):
    """Turns our own errors, and what a disk refuses, into one message and exit code 2; Ctrl-C into exit code 130."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command; an `InputError` becomes its text on standard error."""
        try:
            with explained("the output"):
                return super().invoke(ctx)
        except InputError as error:
            click.echo(f"sparring: {error}", err=True)
            ctx.exit(2)
        except KeyboardInterrupt:
            click.echo("\nStopped.", err=True)
            ctx.exit(130)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="sparring")
@click.option("-q", "--quiet", is_flag=True, help="Only warnings and errors on standard error.")
def main(quiet: bool) -> None:
    """Train a dense retriever and its re-ranker against each other."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads starve a busy machine; before torch loads
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
    ours = logging.getLogger("sparring")
    ours.handlers[:] = [handler]
    ours.setLevel(logging.WARNING if quiet else logging.INFO)
    ours.propagate = False


def data_options(name: str = "data") -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """DATA (an argument, or an option of that name), or the files that make it up."""
    folder = (
        click.option(name, type=PATH, help="Folder or file of the data set.")
        if name.startswith("-")
        else click.argument(name, required=False, type=PATH)
    )
    options = (
        folder,
        click.option("--corpus", multiple=True, type=PATH, help="Corpus file(s), if not in DATA."),
        click.option("--queries", multiple=True, type=PATH, help="Query or topic file(s)."),
        click.option("--qrels", multiple=True, metavar="SPLIT=FILE", help="Labels of a split; repeatable."),
        click.option("--no-titles", is_flag=True, help="Ignore titles."),
    )

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


def _trust(function: Callable[..., Any]) -> Callable[..., Any]:
    option = click.option("--trust-remote-code", is_flag=True, help="Run code that a model brings along.")
    return option(function)


def _recipe(names: tuple[str, ...], text: str) -> Callable[..., Any]:
    """The option that chooses a recipe."""
    return click.option("--recipe", type=click.Choice(names), default=DEFAULT_RECIPE, show_default=True, help=text)


def _index(function: Callable[..., Any]) -> Callable[..., Any]:
    text = "Where mining and evaluation search: in memory (faiss; exact up to a size), or milvus:URI. Sets run.index."
    return click.option("--index", metavar="faiss|milvus:URI", help=text)(function)


def _precision(function: Callable[..., Any]) -> Callable[..., Any]:
    text = "Number format of the models' forwards; auto: bf16 where the device has fast bf16, else fp32."
    choice = click.Choice(["auto", "fp32", "bf16"])
    return click.option("--precision", type=choice, default="auto", show_default=True, help=text)(function)


def _pooling(function: Callable[..., Any]) -> Callable[..., Any]:
    text = "Pooling of a plain encoder; a SentenceTransformer keeps its own."
    choice = click.Choice(["mean", "cls"])
    return click.option("--pooling", type=choice, default="mean", show_default=True, help=text)(function)


def _corrections(function: Callable[..., Any]) -> Callable[..., Any]:
    text = "Audit table with your verdicts on mined negatives; repeatable."
    return click.option("--corrections", multiple=True, type=PATH, help=text)(function)


def _engine(function: Callable[..., Any]) -> Callable[..., Any]:
    options = (
        click.option(
            "--engine", type=click.Choice(["local", "ray"]), default="local", show_default=True,
            help="In this process, or as Ray Data jobs on a cluster (docs/scale.md).",
        ),
        click.option("--ray-address", default="", metavar="HOST:PORT", help="Default: $RAY_ADDRESS, or this machine."),
        click.option("--ray-workers", type=NUMBER, default=0, help="Default: one a GPU, or one for each CPU but one."),
        click.option("--ray-shard", type=COUNT, default=8192, show_default=True, help="Rows a worker does at a time."),
        click.option("--ray-timeout", type=COUNT, default=1800, show_default=True, help="Seconds a shard may take."),
    )  # fmt: skip
    for option in reversed(options):
        function = option(function)
    return function


def _cluster(engine: str, address: str, workers: int, shard: int, timeout: int) -> Cluster | None:
    from sparring.cluster import Cluster

    return Cluster(address, workers, shard, timeout) if engine == "ray" else None


def _max_length(function: Callable[..., Any]) -> Callable[..., Any]:
    text = "Tokens of an input, special tokens included; 0 is the model's own limit."
    return click.option("--max-length", type=NUMBER, default=0, show_default=True, help=text)(function)


def _files(
    data: Path | None, corpus: tuple[Path, ...], queries: tuple[Path, ...], qrels: tuple[str, ...], what: str = "DATA"
) -> dict[str, Any]:
    if data is None and not corpus and not queries:
        raise InputError(f"{what} is missing", expected="a folder or file, or --corpus, --queries and --qrels")
    labels: dict[str, Path] = {}
    for text in qrels:
        split, _, file = text.partition("=")
        if not split or not file:
            raise InputError("--qrels needs a split and a file", expected="--qrels train=FILE", got=text)
        if split in labels:
            raise InputError(f"--qrels names the split {split} twice", expected="one file a split", got=" ".join(qrels))
        labels[split] = Path(file)
    return {"corpus": list(corpus) or None, "queries": list(queries) or None, "qrels": labels or None}


def _rules(place: int) -> str:
    return ", ".join(f"{thresholds[place]:g} ({rule})" for rule, thresholds in DEFAULTS.items())


def _load(
    data: Path | None, corpus: tuple[Path, ...], queries: tuple[Path, ...], qrels: tuple[str, ...], no_titles: bool
) -> Dataset:
    from sparring.data import load

    return load(data, titles=not no_titles, **_files(data, corpus, queries, qrels))


@main.command()
@data_options()
@click.option("--retriever", help="Measure token lengths against this model's maximum.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_context
def check(
    ctx: click.Context, data: Path | None, corpus: tuple[Path, ...], queries: tuple[Path, ...], qrels: tuple[str, ...],
    no_titles: bool, retriever: str | None, as_json: bool,
) -> None:  # fmt: skip
    """Say what is in a data set and what is wrong with it; exit code 1 when there are errors."""
    from sparring.data import check as check_data
    from sparring.log import table

    files = _files(data, corpus, queries, qrels)
    lengths: dict[str, Any] = {}
    if retriever:
        from sparring.recipes.standalone import token_lengths

        lengths = token_lengths(retriever)
    report = check_data(data, titles=not no_titles, **lengths, **files)
    if as_json:
        click.echo(json.dumps(report.to_dict(), indent=2, ensure_ascii=False))
    else:
        click.echo("\n".join(f"{count:>9,}  {name}" for name, count in report.counts.items()) + "\n")
        for level, code, count, message, examples, fix in report.rows():
            click.echo(f"{level.upper():8}{code}: {message} ({count})")
            for line in (*_as_lines(examples, "e.g. "), *_as_lines(fix, "do: ")):
                click.echo(f"        {line}")
        errors, warnings = len(report.errors), len(report.warnings)
        click.echo("\n" + table([[errors, warnings]], ["errors", "warnings"]))
    ctx.exit(1 if report.errors else 0)


def _as_lines(value: Any, label: str) -> list[str]:
    values = [value] if isinstance(value, str) else list(value)
    return [f"{label}{text}" for text in values if text]


@main.command()
@data_options()
@_recipe(RECIPE_NAMES, "How to train.")
@click.option("--retriever", required=True, metavar="PATH_OR_HUB_NAME", help="SentenceTransformer or plain encoder.")
@click.option("--ranker", required=True, metavar="PATH_OR_HUB_NAME", help="One-logit CrossEncoder, or an encoder.")
@click.option("--out", required=True, type=PATH, help="New or empty folder, or a stopped run's that is to go on.")
@click.option("--config", type=PATH, help="TOML file.")
@click.option("--set", "assignments", multiple=True, metavar="KEY=VALUE", help="One setting; repeatable.")
@click.option("--layers", type=NUMBER, help="Keep the first N layers of both encoders.")
@click.option("--seed", type=NUMBER, help="Seed of every random choice.")
@_index
@_corrections
@_trust
def train(
    data: Path | None, corpus: tuple[Path, ...], queries: tuple[Path, ...], qrels: tuple[str, ...], no_titles: bool,
    recipe: str, retriever: str, ranker: str, out: Path, config: Path | None, assignments: tuple[str, ...],
    layers: int | None, seed: int | None, index: str | None, corrections: tuple[Path, ...], trust_remote_code: bool,
) -> None:  # fmt: skip
    """Train a pair with a recipe; leaves OUT/retriever, OUT/ranker and the evidence."""
    from sparring.distributed import leave
    from sparring.recipes.train import resolve_config
    from sparring.recipes.train import train as run
    from sparring.rundir import require_unused, unfinished

    settings = _settings(assignments, layers, seed, index, trust_remote_code, no_titles)
    resolved = resolve_config(recipe, config, settings)
    if not unfinished(out):
        require_unused(out)
    with _stoppable(_command(), out):
        dataset = _load(data, corpus, queries, qrels, not resolved["run"].titles)
        result = run(
            dataset, retriever, ranker,
            out=out, recipe=recipe, config=config, assignments=settings, corrections=corrections, command=_command(),
        )  # fmt: skip
    _show_run(result.path)
    leave()


@main.command()
@data_options()
@_recipe(RECIPE_NAMES, "How to train.")
@click.option("--retriever", required=True, metavar="PATH_OR_HUB_NAME", help="SentenceTransformer or plain encoder.")
@click.option("--ranker", required=True, metavar="PATH_OR_HUB_NAME", help="One-logit CrossEncoder, or an encoder.")
@click.option("--out", type=PATH, help="Where the run folder would be: does it fit there? Nothing is written.")
@click.option("--config", type=PATH, help="TOML file.")
@click.option("--set", "assignments", multiple=True, metavar="KEY=VALUE", help="One setting; repeatable.")
@click.option("--layers", type=NUMBER, help="Keep the first N layers of both encoders.")
@click.option("--seed", type=NUMBER, help="Seed of every random choice.")
@_index
@_corrections
@_trust
@click.option(
    "--passages", type=SIZE, multiple=True,
    help="Corpus work of so many such passages, 100e6 for example, on --workers; what would bind. Repeatable.",
)  # fmt: skip
@click.option(
    "--workers", type=SIZE, default=1, show_default=True,
    help="Machines like this one, 1e3 for example; several: with run.engine = ray, on a file system that all share.",
)  # fmt: skip
@click.option(
    "--network", type=float, default=10, show_default=True, help="Gbit a second through that file system's line."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON, every phase in it.")
def plan(
    data: Path | None, corpus: tuple[Path, ...], queries: tuple[Path, ...], qrels: tuple[str, ...], no_titles: bool,
    recipe: str, retriever: str, ranker: str, out: Path | None, config: Path | None, assignments: tuple[str, ...],
    layers: int | None, seed: int | None, index: str | None, corrections: tuple[Path, ...], trust_remote_code: bool,
    passages: tuple[int, ...], workers: int, network: float, as_json: bool,
) -> None:  # fmt: skip
    """What `train` with the same options would take: time by phase, memory, disk; calibrates for under 30 seconds.

    It uses the very models and data, under the load that the machine has now. No run folder is written.
    """
    if workers != 1 and not passages:
        raise click.UsageError("--workers says what the corpus work of --passages N takes: give that, too")
    from sparring.recipes.calibration import this_process
    from sparring.recipes.plan import plan as predict
    from sparring.recipes.train import resolve_config

    process = this_process()
    settings = _settings(assignments, layers, seed, index, trust_remote_code, no_titles)
    resolved = resolve_config(recipe, config, settings)
    dataset = _load(data, corpus, queries, qrels, not resolved["run"].titles)
    found = predict(
        dataset, retriever, ranker,
        recipe=recipe, config=config, assignments=settings, corrections=corrections, out=out, process=process,
        passages=passages, workers=workers, network=network,
    )  # fmt: skip
    click.echo(json.dumps(found.to_dict(), indent=2, ensure_ascii=False) if as_json else found.text())


def _settings(
    assignments: tuple[str, ...], layers: int | None, seed: int | None, index: str | None, trust_remote_code: bool,
    no_titles: bool,
) -> list[str]:  # fmt: skip
    """Options that stand for a setting, after those that were set."""
    extra = [("layers", layers), ("seed", seed), ("index", index)]
    settings = [*assignments, *(f"run.{key}={value}" for key, value in extra if value is not None)]
    settings += ["run.trust_remote_code=true"] if trust_remote_code else []
    return settings + (["run.titles=false"] if no_titles else [])


@contextmanager
def _stoppable(command: str, out: Path) -> Iterator[None]:
    """Say how a run or a comparison that was interrupted goes on, or why it cannot."""
    try:
        yield
    except KeyboardInterrupt:
        click.echo(f"\n{_after_stop(out)}\n  {command}", err=True)
        sys.exit(130)


def _after_stop(out: Path) -> str:
    """What became of the work in a folder; the command follows."""
    from sparring.rundir import is_unused, unfinished

    shards = any(out.parent.glob(f".{glob_escape(out.name)}.*.parts"))  # of `encode`
    if unfinished(out) or (out / "shared.json").is_file() or shards:
        return "Stopped; all that is finished is kept. This goes on from there:"
    if is_unused(out):
        return "Stopped before anything was kept. This begins again:"
    if (out / "report.html").is_file():
        return f"Stopped after its end: {out} is complete. This made it:"
    return f"Stopped, and nothing was kept to go on from (run.checkpoints). Remove {out}, then this begins again:"


def _show_run(path: Path) -> None:
    from sparring.distributed import rank

    if rank() == 0:
        click.echo((path / "summary.md").read_text(encoding="utf-8"))
        click.echo(f"Models: {path / 'retriever'} and {path / 'ranker'}")
        click.echo(f"Report: {path / 'report.html'}")


def _command() -> str:
    return shlex.join(["sparring", *sys.argv[1:]])


@main.command()
@data_options()
@click.option("--retriever", required=True, metavar="PATH_OR_HUB_NAME", help="SentenceTransformer or plain encoder.")
@click.option("--ranker", required=True, metavar="PATH_OR_HUB_NAME", help="One-logit CrossEncoder, or an encoder.")
@click.option("--out", required=True, type=PATH, help="New folder, or a comparison's that is to go on.")
@click.option(
    "--recipes",
    default=DEFAULT_ARMS,
    show_default=True,
    help="Arms, separated by commas; RECIPE:KEY=VALUE sets something for one arm alone.",
)
@click.option("--seeds", type=COUNT, default=5, show_default=True, help="Seeds, each with a warm start of its own.")
@click.option(
    "--budget", type=NUMBER, default=0,
    help="Query-passage forwards that train each model of each arm after the warm start; default: as configured.",
)  # fmt: skip
@click.option("--trials", type=COUNT, default=3, show_default=True, help="Learning rates every arm tries on dev.")
@click.option("--baseline", default="", help="Arm the others are tested against; default: separate, or the first.")
@click.option("--config", type=PATH, help="TOML file; may hold a section for every recipe.")
@click.option("--set", "assignments", multiple=True, metavar="KEY=VALUE", help="One setting; repeatable.")
@click.option("--layers", type=NUMBER, help="Keep the first N layers of both encoders.")
@_index
@_corrections
@_trust
def compare(
    data: Path | None, corpus: tuple[Path, ...], queries: tuple[Path, ...], qrels: tuple[str, ...], no_titles: bool,
    retriever: str, ranker: str, out: Path, recipes: str, seeds: int, budget: int, trials: int, baseline: str,
    config: Path | None, assignments: tuple[str, ...], layers: int | None, index: str | None,
    corrections: tuple[Path, ...], trust_remote_code: bool,
) -> None:  # fmt: skip
    """Does joint training help you? Every recipe from the same warm start at one budget, tested over seeds.

    The same command goes on where it stopped. Leaves OUT/comparison.md and .json, and the pair to ship in OUT/best.
    """
    from sparring.recipes.arms import parse_arms
    from sparring.recipes.compare import compare as run
    from sparring.recipes.train import resolve_config

    settings = _settings(assignments, layers, None, index, trust_remote_code, no_titles)
    resolved = resolve_config(parse_arms(recipes)[0].recipe, config, settings)
    with _stoppable(_command(), out):
        dataset = _load(data, corpus, queries, qrels, not resolved["run"].titles)
        result = run(
            dataset, retriever, ranker, out=out, recipes=recipes, seeds=seeds, budget=budget, trials=trials,
            baseline=baseline, config=config, assignments=settings, corrections=corrections, command=_command(),
        )  # fmt: skip
    click.echo(result.text())
    click.echo(f"Models: {out / 'best' / 'retriever'} and {out / 'best' / 'ranker'}")
    click.echo(f"Report: {out / 'report.html'}")


@main.command()
@click.argument("run", required=False, type=PATH)
@data_options("--data")
@click.option("--retriever", metavar="PATH_OR_HUB_NAME", help="SentenceTransformer or plain encoder; default: RUN's.")
@click.option("--ranker", metavar="PATH_OR_HUB_NAME", help="CrossEncoder with one logit; default: RUN's.")
@click.option("--split", default="test", show_default=True, help="Split whose queries are evaluated.")
@click.option("--depth", type=COUNT, default=50, show_default=True, help="Passages per query that the ranker re-ranks.")
@click.option("--fusion", type=WEIGHT, help="Cascade: ranker + FUSION x retriever score; default: RUN's, or 0.")
@click.option("--candidates", type=PATH, help="TREC run of fixed candidates; default: BM25's.")
@click.option(
    "--measures",
    default="RR@10,nDCG@10,R@10,R@100,Success@5",
    show_default=True,
    help="RR, nDCG, R or Success at any cutoff, separated by commas; the first one is tested.",
)
@_precision
@_pooling
@_trust
@click.option("--runs", type=PATH, help="Folder for the TREC runs; must be new or empty.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def evaluate(
    run: Path | None, data: Path | None, corpus: tuple[Path, ...], queries: tuple[Path, ...], qrels: tuple[str, ...],
    no_titles: bool, retriever: str | None, ranker: str | None, split: str, depth: int, fusion: float | None,
    candidates: Path | None,
    measures: str, precision: str, pooling: str, trust_remote_code: bool, runs: Path | None, as_json: bool,
) -> None:  # fmt: skip
    """Evaluate a pair: BM25, retriever, ranker on fixed candidates, cascade, with 95 % intervals.

    A run folder brings its models, and whether passages are read with their titles.
    """
    from sparring.recipes.standalone import evaluate_pair

    models = _pair_of(run, retriever, ranker)
    _files(data, corpus, queries, qrels, "--data")
    dataset = _load(data, corpus, queries, qrels, no_titles or _without_titles(run))
    result = evaluate_pair(
        dataset, *models,
        split=split, depth=depth, candidates=candidates, measures=tuple(measures.split(",")), precision=precision,
        runs=runs, pooling=pooling, trust_remote_code=trust_remote_code,
        fusion=_fusion_of(run) if fusion is None else fusion,
    )  # fmt: skip
    click.echo(json.dumps(result.to_dict(), indent=2, ensure_ascii=False) if as_json else result.text())


def _without_titles(run: Path | None) -> bool:
    """Whether a run was trained without titles; what its configuration says is logged."""
    from sparring.config import read_toml

    if run is None or not (run / "config.toml").is_file():
        return False
    section = read_toml(run / "config.toml").get("run")
    without = isinstance(section, dict) and section.get("titles") is False
    logging.getLogger("sparring").info("titles are %s, as in %s", "ignored" if without else "read", run / "config.toml")
    return without


def _fusion_of(run: Path | None) -> float:
    """The retriever's weight in a run's cascade, as its results say; logged where it is not 0."""
    if run is None or not (run / "results.json").is_file():
        return 0.0
    found = json.loads((run / "results.json").read_text(encoding="utf-8"))
    weight = found.get("fusion", 0.0) if isinstance(found, dict) else 0.0
    if not isinstance(weight, float | int) or weight < 0:
        where = str(run / "results.json")
        raise InputError("fusion is no weight", where=where, expected="a number of 0 or more", got=str(weight))
    if weight:
        logging.getLogger("sparring").info("the cascade orders by ranker + %g x retriever score, as in %s", weight, run)
    return float(weight)


def _pair_of(run: Path | None, retriever: str | None, ranker: str | None) -> tuple[str, str]:
    first, second = retriever, ranker
    if run is not None:
        first, second = first or str(run / "retriever"), second or str(run / "ranker")
    if not first or not second:
        raise InputError(
            "which pair?", expected="a run folder, or --retriever and --ranker", fix="name RUN, or both models"
        )
    return first, second


@main.command()
@click.argument("run", required=False, type=PATH)
@data_options("--data")
@click.option("--retriever", metavar="PATH_OR_HUB_NAME", help="SentenceTransformer or plain encoder; default: RUN's.")
@click.option("--ranker", metavar="PATH_OR_HUB_NAME", help="CrossEncoder with one logit; default: RUN's.")
@click.option("--lists", type=COUNT, default=100, show_default=True, help="List heads that are drawn and scored.")
@click.option("--depth", type=COUNT, default=10, show_default=True, help="Top negatives of each that are scored.")
@click.option("--mine-depth", type=COUNT, default=100, show_default=True, help="Passages mined per training query.")
@click.option("--seed", type=NUMBER, default=0, show_default=True, help="Seed of the draw.")
@_corrections
@_precision
@_pooling
@_trust
@click.option("--out", required=True, type=PATH, help="Folder; must be new or empty.")
def audit(
    run: Path | None, data: Path | None, corpus: tuple[Path, ...], queries: tuple[Path, ...], qrels: tuple[str, ...],
    no_titles: bool, retriever: str | None, ranker: str | None, lists: int, depth: int, mine_depth: int, seed: int,
    corrections: tuple[Path, ...], precision: str, pooling: str, trust_remote_code: bool, out: Path,
) -> None:  # fmt: skip
    """Find right answers among a pair's mined negatives; OUT gets a table for a person to judge.

    A run folder brings its models, and whether passages are read with their titles.
    """
    from sparring.recipes.standalone import audit_to

    models = _pair_of(run, retriever, ranker)
    _files(data, corpus, queries, qrels, "--data")
    dataset = _load(data, corpus, queries, qrels, no_titles or _without_titles(run))
    text = audit_to(
        dataset, *models, out,
        lists=lists, depth=depth, mine_depth=mine_depth, seed=seed, corrections=corrections, precision=precision,
        pooling=pooling, trust_remote_code=trust_remote_code,
    )  # fmt: skip
    click.echo(text)


@main.command()
@data_options()
@click.option("--retriever", required=True, metavar="PATH_OR_HUB_NAME", help="SentenceTransformer or plain encoder.")
@click.option(
    "--kind",
    type=click.Choice(["passage", "query"]),
    default="passage",
    show_default=True,
    help="Which texts, with the model's prompt for them.",
)
@click.option("--out", required=True, type=PATH, help="A .npy file, float32 [N, d].")
@click.option(
    "--batch-tokens", type=NUMBER, default=0, help="Padded tokens of one forward; default: 2048 on a CPU, else 16384."
)
@_precision
@_pooling
@_max_length
@_engine
@_trust
def encode(
    data: Path | None, corpus: tuple[Path, ...], queries: tuple[Path, ...], qrels: tuple[str, ...], no_titles: bool,
    retriever: str, kind: Literal["passage", "query"], out: Path, batch_tokens: int, precision: str, pooling: str,
    max_length: int, engine: str, ray_address: str, ray_workers: int, ray_shard: int, ray_timeout: int,
    trust_remote_code: bool,
) -> None:  # fmt: skip
    """Embed all passages (or queries); continues where an interrupted call stopped. Ids go to OUT.ids.txt."""
    from sparring.recipes.standalone import encode_to

    with _stoppable(_command(), out):
        cluster = _cluster(engine, ray_address, ray_workers, ray_shard, ray_timeout)
        dataset = _load(data, corpus, queries, qrels, no_titles)
        count, dim = encode_to(
            dataset, retriever, kind, out,
            batch_tokens=batch_tokens, precision=precision, pooling=pooling, max_length=max_length,
            trust_remote_code=trust_remote_code, cluster=cluster,
        )  # fmt: skip
    click.echo(f"{out}: {count} {'passages' if kind == 'passage' else 'queries'} x {dim}")


@main.command()
@click.argument("embeddings", type=PATH)
@click.option(
    "--kind",
    type=click.Choice(["exact", "hnsw", "ivf", "faiss"]),
    default="exact",
    show_default=True,
    help="Exact search, a graph (hnsw), inverted lists (ivf), or one of these by size (faiss).",
)
@click.option("--out", required=True, type=PATH, help="A faiss index file.")
def index(embeddings: Path, kind: Literal["exact", "hnsw", "ivf", "faiss"], out: Path) -> None:
    """Build a search index from passage embeddings; OUT.json says from which, with checksums."""
    from sparring.recipes.standalone import index_to

    count, made = index_to(embeddings, kind, out)
    click.echo(f"{out}: {count} passages ({made})")


@main.command()
@click.option("--index", "index_file", type=PATH, help="From `sparring index`; not needed with --engine ray.")
@click.option("--passages", required=True, type=PATH, help="Embeddings that were indexed (with .ids.txt).")
@click.option("--query-embeddings", "queries", required=True, type=PATH, help="From `encode --kind query`.")
@click.option("-k", type=COUNT, default=100, show_default=True, help="Passages per query.")
@click.option("--out", required=True, type=PATH, help="A TREC run file.")
@_engine
def search(
    index_file: Path | None, passages: Path, queries: Path, k: int, out: Path, engine: str, ray_address: str,
    ray_workers: int, ray_shard: int, ray_timeout: int,
) -> None:  # fmt: skip
    """Search an index with query embeddings; writes a TREC run. A cluster searches the embeddings, exactly."""
    from sparring.recipes.standalone import search_to

    cluster = _cluster(engine, ray_address, ray_workers, ray_shard, ray_timeout)
    click.echo(f"{out}: {search_to(index_file, passages, queries, k, out, cluster=cluster)} queries")


@main.command()
@data_options()
@click.option("--run", "run_file", required=True, type=PATH, help="TREC run of the training queries.")
@click.option("--split", default="train", show_default=True, help="Split whose labels are the positives.")
@click.option("--negatives", type=COUNT, default=15, show_default=True, help="Negatives per list.")
@click.option(
    "--sampling",
    type=click.Choice(["uniform", "simans", "top"]),
    default="uniform",
    show_default=True,
    help="How negatives are drawn: equal chances, near the positive's score, or the best.",
)
@click.option(
    "--simans-a",
    type=click.FloatRange(min=0),
    default=0.5,
    show_default=True,
    help="SimANS: sharpness around the positive's score.",
)
@click.option("--simans-b", type=float, default=0.0, show_default=True, help="SimANS: offset from that score.")
@click.option("--denoise", metavar="RANKER", help="Keep only negatives that this ranker scores low; promote high ones.")
@click.option(
    "--rule",
    type=click.Choice(list(DEFAULTS)),
    default="calibrated",
    show_default=True,
    help="Denoising thresholds: quantiles of the known positives' scores, or probabilities.",
)
@click.option("--negative-below", type=float, help=f"Denoising: a negative lies below this; default: {_rules(0)}.")
@click.option("--positive-above", type=float, help=f"Denoising: promoted above this; default: {_rules(1)}.")
@click.option("--answer-filter", is_flag=True, help="Drop passages that contain an answer string.")
@click.option("--seed", type=NUMBER, default=0, show_default=True, help="Seed of the draws.")
@_corrections
@_trust
@click.option("--out", required=True, type=PATH, help="JSONL: query, positive, negatives; promoted where it is.")
def mine(
    data: Path | None, corpus: tuple[Path, ...], queries: tuple[Path, ...], qrels: tuple[str, ...], no_titles: bool,
    run_file: Path, split: str, negatives: int, sampling: Literal["uniform", "simans", "top"], simans_a: float,
    simans_b: float, denoise: str | None, rule: str, negative_below: float | None, positive_above: float | None,
    answer_filter: bool, seed: int, corrections: tuple[Path, ...], trust_remote_code: bool, out: Path,
) -> None:  # fmt: skip
    """Hard negatives from a run: no known positive, by id or by normalised text; short lists are reported."""
    from sparring.recipes.standalone import Denoising, mine_to

    thresholds = negative_below, positive_above
    if not denoise and thresholds != (None, None):
        raise InputError("denoising thresholds without a ranker", expected="--denoise RANKER with them")
    dataset = _load(data, corpus, queries, qrels, no_titles)
    click.echo(
        mine_to(
            dataset, run_file, split, out,
            negatives=negatives, sampling=sampling, answer_filter=answer_filter, seed=seed, simans=(simans_a, simans_b),
            denoising=Denoising(denoise, rule, *thresholds, trust_remote_code) if denoise else None,
            corrections=corrections,
        )
    )  # fmt: skip


@main.command()
@data_options()
@click.option("--ranker", required=True, metavar="PATH_OR_HUB_NAME", help="CrossEncoder with one logit.")
@click.option("--run", "run_file", required=True, type=PATH, help="TREC run to re-rank.")
@click.option("--depth", type=COUNT, default=50, show_default=True, help="Passages per query that are re-ranked.")
@click.option("--fusion", type=WEIGHT, default=0.0, show_default=True, help="Order by ranker + FUSION x RUN's score.")
@_precision
@_max_length
@_trust
@click.option("--out", required=True, type=PATH, help="A TREC run file.")
def rerank(
    data: Path | None, corpus: tuple[Path, ...], queries: tuple[Path, ...], qrels: tuple[str, ...], no_titles: bool,
    ranker: str, run_file: Path, depth: int, fusion: float, precision: str, max_length: int, trust_remote_code: bool,
    out: Path,
) -> None:  # fmt: skip
    """Re-rank the top of a run with a cross-encoder; writes a TREC run."""
    from sparring.recipes.standalone import rerank_to

    dataset = _load(data, corpus, queries, qrels, no_titles)
    count = rerank_to(
        dataset, ranker, run_file, depth, out,
        precision=precision, max_length=max_length, trust_remote_code=trust_remote_code, fusion=fusion,
    )  # fmt: skip
    click.echo(f"{out}: {count} pairs scored")


@main.command()
@click.option("--retriever", required=True, metavar="PATH_OR_HUB_NAME", help="SentenceTransformer or plain encoder.")
@click.option("--ranker", required=True, metavar="PATH_OR_HUB_NAME", help="One-logit CrossEncoder, or an encoder.")
@click.option("--layers", type=NUMBER, default=0, help="Keep the first N layers of both encoders.")
@click.option("--out", required=True, type=PATH, help="Folder; gets retriever/ and ranker/.")
@_trust
def export(retriever: str, ranker: str, layers: int, out: Path, trust_remote_code: bool) -> None:
    """Save a pair as plain sentence-transformers folders and verify both in a fresh process."""
    from sparring.recipes.standalone import export_to

    export_to(retriever, ranker, out, layers=layers, trust_remote_code=trust_remote_code, command=_command())
    click.echo(f"{out / 'retriever'} and {out / 'ranker'}: verified")


def _name(function: Callable[..., Any]) -> Callable[..., Any]:
    text = "Alias in Milvus or table in PostgreSQL; a folder needs none."
    return click.option("--name", default="sparring", show_default=True, help=text)(function)


@main.command()
@click.argument("pair", type=PATH)
@data_options()
@click.option("--to", required=True, metavar="STORE:PLACE", help=f"{STORES}.")
@_name
@click.option("--replace", is_flag=True, help="Put this in the place of what another model or data published there.")
@_precision
@_trust
def publish(
    pair: Path, data: Path | None, corpus: tuple[Path, ...], queries: tuple[Path, ...], qrels: tuple[str, ...],
    no_titles: bool, to: str, name: str, replace: bool, precision: str, trust_remote_code: bool,
) -> None:  # fmt: skip
    """Publish a finished pair's passage vectors with ids and the model's fingerprint, whole or not at all.

    PAIR is a run folder, or a folder with retriever/ in it. A failure leaves what was published before.
    """
    from sparring.recipes.publishing import publish as run

    retriever = _retriever_of(pair)
    dataset = _load(data, corpus, queries, qrels, no_titles or _without_titles(pair))
    done = run(
        dataset, retriever, to, name=name, replace=replace, precision=precision, trust_remote_code=trust_remote_code
    )
    click.echo(str(done))


@main.command()
@click.argument("pair", type=PATH)
@click.argument("queries", nargs=-1, required=True)
@click.option("--from", "source", required=True, metavar="STORE:PLACE", help=f"Where it is published: {STORES}.")
@_name
@click.option("-k", type=COUNT, default=10, show_default=True, help="Passages per query.")
@_trust
@click.option("--json", "as_json", is_flag=True, help="Print JSON: a list of [id, score] for every query.")
def ask(
    pair: Path, queries: tuple[str, ...], source: str, name: str, k: int, trust_remote_code: bool, as_json: bool
) -> None:
    """Search published vectors with queries; refused where another model made the vectors."""
    from sparring.log import table
    from sparring.recipes.publishing import ask as run

    found = run(queries, _retriever_of(pair), source, name=name, k=k, trust_remote_code=trust_remote_code)
    if as_json:
        click.echo(json.dumps(found, indent=2, ensure_ascii=False))
        return
    for query, hits in zip(queries, found, strict=True):
        rows = [[place, f"{score:.4f}", key] for place, (key, score) in enumerate(hits, start=1)]
        click.echo(f"{query}\n\n{table(rows, ['rank', 'score', 'passage'])}\n")


def _retriever_of(pair: Path) -> Path:
    if not (pair / "retriever").is_dir():
        expected = "a run folder, or one that `sparring export` made"
        raise InputError("no finished pair lies there", where=str(pair), expected=expected, got="no folder retriever/")
    return pair / "retriever"


@main.command()
@_recipe(RECIPE_NAMES[1:], "How to train.")
@click.option("--out", type=PATH, help="Run folder; default: runs/demo-N, the first N that is free.")
@click.option("--set", "assignments", multiple=True, metavar="KEY=VALUE", help="One setting; repeatable.")
@click.option(
    "--cache", type=PATH, help="Folder for converted data and tokens; default: $SPARRING_CACHE or ~/.cache/sparring."
)
def demo(recipe: str, out: Path | None, assignments: tuple[str, ...], cache: Path | None) -> None:
    """Train a pair on the AWS CLI help-desk set and ask it three questions."""
    from sparring.recipes.demo import ask, run_demo

    folder = out or next(p for p in (Path("runs") / f"demo-{n}" for n in range(1, 10_000)) if not p.exists())
    settings = [word for pair in assignments for word in ("--set", pair)]
    place = ["--cache", str(cache)] if cache is not None else []
    again = shlex.join(["sparring", "demo", "--recipe", recipe, *settings, *place, "--out", str(folder)])
    with _stoppable(again, folder):
        result = run_demo(recipe, folder, assignments, cache=cache, command=_command())
    click.echo((result.path / "summary.md").read_text(encoding="utf-8"))
    click.echo(ask(result, cache=cache))
    click.echo(f"\nRun folder: {result.path}  (retriever/, ranker/, summary.md, metrics.jsonl, runs/)")
    click.echo(f"Report, for a browser: {result.path / 'report.html'}")


@main.command()
@click.argument("folder", type=PATH)
@click.option("--out", type=PATH, help="The HTML file; default: FOLDER/report.html.")
def report(folder: Path, out: Path | None) -> None:
    """Write the page about a run folder or a comparison folder again: one HTML file that needs no network."""
    from sparring.report import write_report

    click.echo(str(write_report(folder, out)))


@main.command()
@_recipe(RECIPE_NAMES, "Whose settings.")
def config(recipe: str) -> None:
    """Print a recipe's settings with their defaults, as a TOML file to start from."""
    from sparring.config import to_toml
    from sparring.recipes.train import resolve_config

    click.echo(to_toml(resolve_config(recipe), {"recipe": recipe}))


@main.command()
def doctor() -> None:
    """Versions, device, precision, threads and processes, and why each was chosen."""
    from sparring.distributed import choose_device, choose_precision, choose_processes, choose_threads
    from sparring.log import table
    from sparring.rundir import versions

    device = choose_device()
    choices = (device, choose_precision("auto", device.value), choose_threads(), choose_processes())
    wait = os.environ.get("OMP_WAIT_POLICY", "")
    rows = [[choice.name, choice.value, choice.reason] for choice in choices]
    rows.append(["OMP_WAIT_POLICY", wait, "idle threads sleep" if wait == "PASSIVE" else "set by you"])
    click.echo(table(rows, ["setting", "value", "why"]))
    click.echo("\n" + table(list(versions().items()), ["package", "version"]))
