"""What a run would take on this machine: time, memory, disk, share of refresh; measured for seconds, nothing written.

A recipe is rehearsed (`rehearsal`: its own code says what it would do), units are measured (`calibration`), and this
multiplies. docs/plan.md says what is measured, what is assumed, and how far off it was.
"""

from __future__ import annotations

import copy
import logging
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from sparring.data import Dataset, default_cache, load
from sparring.data.corrections import read_corrections
from sparring.distributed import Choice, choose_processes, choose_tokens, make_accelerator
from sparring.log import reset_peak_memory, table
from sparring.machine import cpus, memory_available, others, resident_bytes
from sparring.models.tokens import stored
from sparring.phases.evaluate import check_measures
from sparring.phases.mine import positives_of
from sparring.recipes import scaling
from sparring.recipes.calibration import NOTHING, Bench, Cost, Watch, calibrate, new_process, tokenised
from sparring.recipes.experiment import QUERIES_IN_MEMORY, vector_bytes
from sparring.recipes.forecast import Forecast, forecast
from sparring.recipes.rehearsal import Rehearsal, Sizes, UpdateKind, Work, rehearse
from sparring.recipes.scaling import Rates, Scale
from sparring.recipes.settings import DEFAULT_RECIPE, RunConfig
from sparring.recipes.train import choose_hardware, choose_splits, load_pair, require_pools, resolve_config
from sparring.types import InputError

if TYPE_CHECKING:
    from sentence_transformers import CrossEncoder, SentenceTransformer

    from sparring.models import Ranker, Retriever

logger = logging.getLogger("sparring")

BUSY = 0.25
"""CPUs in use by other processes from which on it is worth a word."""
FULL = 0.9
"""Share of what is free from which on a run does not fit comfortably."""


@dataclass(frozen=True)
class Line:
    """One phase of the run, priced."""

    phase: str
    category: str
    cost: Cost
    alone: float
    """Seconds at best, with nothing else on the machine and every thread of the models' work of use."""


@dataclass(frozen=True)
class Room:
    """Bytes.

    Attributes:
        memory: largest resident memory of the process.
        out_peak, out_end: the run folder at its largest, and when the run has ended.
        cache: added to the cache (tokens); nothing where they are there.
        gpu: largest memory of the GPU while measuring; None without one.
    """

    memory: int
    out_peak: int
    out_end: int
    cache: int
    gpu: int | None


@dataclass(frozen=True)
class Plan:
    """A prediction. ``lines`` are in the order of the run."""

    recipe: str
    sizes: Sizes
    lines: tuple[Line, ...]
    room: Room
    hardware: tuple[Choice, ...]
    warnings: tuple[str, ...]
    notes: tuple[str, ...]
    calibration: Cost
    rates: Rates
    scales: tuple[Scale, ...] = ()

    @property
    def total(self) -> Cost:
        """All of it."""
        return sum((line.cost for line in self.lines), NOTHING)

    @property
    def alone(self) -> float:
        """Seconds at best: see `Line`."""
        return sum(line.alone for line in self.lines)

    def by_category(self) -> dict[str, Cost]:
        """Cost of each kind of work, the largest first."""
        found: dict[str, Cost] = {}
        for line in self.lines:
            found[line.category] = found.get(line.category, NOTHING) + line.cost
        return dict(sorted(found.items(), key=lambda item: -item[1].wall))

    def share(self, category: str) -> float:
        """Part of the whole time that a kind of work takes."""
        return self.by_category().get(category, NOTHING).wall / self.total.wall

    def to_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        return {
            "recipe": self.recipe, "seconds": self.total.wall, "cpu_seconds": self.total.cpu,
            "seconds_alone": self.alone,
            "share_of_refresh": self.share("refresh"), "memory_bytes": self.room.memory, "room": asdict(self.room),
            "categories": {name: asdict(cost) for name, cost in self.by_category().items()},
            "phases": [
                {"phase": x.phase, "category": x.category, **asdict(x.cost), "alone": x.alone} for x in self.lines
            ],
            "hardware": {choice.name: [choice.value, choice.reason] for choice in self.hardware},
            "sizes": asdict(self.sizes), "warnings": list(self.warnings), "notes": list(self.notes),
            "calibration": asdict(self.calibration), "rates": asdict(self.rates),
            "scales": [scale.to_dict() for scale in self.scales],
        }  # fmt: skip

    def text(self) -> str:
        """For people."""
        total = self.total
        hardware = table([[c.name, c.value, c.reason] for c in self.hardware], ["setting", "value", "why"])
        work = {**self.by_category(), "total": total}
        rows = [[name, _time(c.wall), _time(c.cpu), f"{c.wall / total.wall:.0%}"] for name, c in work.items()]
        longest = sorted(_merged(self.lines), key=lambda line: -line.cost.wall)[:8]
        phases = [[x.phase, _time(x.cost.wall), _time(x.cost.cpu)] for x in longest]
        room = self.room
        space = [["memory, at its peak", _bytes(room.memory)], ["run folder, at its peak", _bytes(room.out_peak)]]
        space += [["run folder, in the end", _bytes(room.out_end)], ["cache, added", _bytes(room.cache)]]
        space += [["GPU memory, measured", _bytes(room.gpu)]] if room.gpu is not None else []
        s = self.sizes
        head = (
            f"{self.recipe}: {s.passages:,} passages, {s.train:,} training queries ({s.heads:,} list heads), "
            f"{s.dev:,} dev, {s.test:,} test; calibrated for {self.calibration.wall:.0f} s\n"
            f"about {_time(total.wall)} under the present load; at best {_time(self.alone)} alone on the machine"
        )
        lines = [head, hardware, table(rows, ["work", "time", "CPU time", "share"])]
        lines += [table(phases, ["longest phases", "time", "CPU time"]), table(space, ["room", ""])]
        lines += ["\n".join(f"WARNING: {warning}" for warning in self.warnings)] if self.warnings else []
        lines += ["\n".join(f"Note: {note}" for note in self.notes)] if self.notes else []
        lines += [scaling.text(self.scales, self.rates)] if self.scales else []
        return "\n\n".join(lines)


def plan(
    data: Dataset | str | Path,
    retriever: SentenceTransformer | str | Path,
    ranker: CrossEncoder | str | Path,
    *,
    recipe: str = DEFAULT_RECIPE,
    config: str | Path | Mapping[str, Any] | None = None,
    assignments: Sequence[str] = (),
    corrections: Sequence[str | Path] = (),
    cache: str | Path | None = None,
    out: str | Path | None = None,
    seconds: float = 25.0,
    process: Cost | None = None,
    passages: Sequence[int] = (),
    workers: int = 1,
    network: float = 10.0,
) -> Plan:
    """Predict what `sparring.train` with the same arguments takes, on this machine and under its present load.

    Args:
        out: where the run folder would be, to see whether it fits; nothing is written there.
        seconds: how long to calibrate, about; loading data and models comes before.
        process: what starting a process that loads the libraries takes; None tries it.
        passages: sizes of larger corpora of such passages, whose corpus work is told from what is measured here.
        workers: machines like this one; several are priced as ``run.engine = "ray"``, one as ``"local"``.
        network: Gbit a second through the line of the file system that several share.

    Given model objects are copied. Raises: InputError as `sparring.train`, for fewer passages than workers, and for
    several workers with what ``run.engine = "ray"`` refuses.
    """
    _require_scale(passages, workers, network)
    objects = resolve_config(recipe, config, assignments)
    run: RunConfig = objects["run"]
    if passages and workers > 1:
        run.require_shared("workers", "one worker")
    check_measures(run.measures, run.search_depth)
    place = Path(cache) if cache is not None else default_cache()
    process, busy = process or new_process(), others()
    with Watch() as loading:
        dataset = data if isinstance(data, Dataset) else load(data, cache=place, titles=run.titles)
        dataset = read_corrections(corrections, dataset).apply(dataset)
        splits = choose_splits(dataset, run)
        require_pools(objects, len(dataset.corpus))
        hardware = (*choose_hardware(run), choose_processes())
        device, precision, threads = (choice.value for choice in hardware[:3])
        before = torch.get_num_threads()
        torch.set_num_threads(int(threads))
        pair = load_pair(_copy(retriever), _copy(ranker), run)
        accelerator = make_accelerator(device)
        for model in pair:
            model.to(accelerator.device)
    own_peak = reset_peak_memory()
    positives = positives_of(dataset.split("train"), dataset.queries, dataset.corpus)
    sizes = _sizes(dataset, positives, splits, pair)
    rehearsal = rehearse(recipe, objects.get(recipe), objects["warmup"], run, sizes)
    with Watch() as calibrating, torch.random.fork_rng():
        budget = choose_tokens(run.train_tokens, device, 8192)
        sample, texts = tokenised(dataset, *pair, positives, run.seed, budget)
        bench = Bench(
            dataset, *pair, accelerator, run, precision, torch.bfloat16 if precision == "bf16" else None,
            choose_tokens(run.encode_tokens, device, 16384), sample,
        )  # fmt: skip
        depth = max(work.amount for work in rehearsal.work if work.unit == "list entry") / sizes.train
        calibrate(bench, rehearsal.steps, (sizes.passages, sizes.dev, int(depth)), seconds)
    costs = bench.costs
    costs["start"] = loading.cost + process + costs["faiss"]
    costs["fresh process"] = costs["report"] = process
    made = {name: cost for name, cost in texts.items() if not _is_stored(name, dataset, pair, place / "tokens")}
    costs["tokenise"] = sum((cost * _rows(name, sizes) for name, cost in _distinct(made, pair).items()), NOTHING)
    rates = _rates(bench, rehearsal, _distinct(texts, pair), network * 1e9 / 8, out, int(threads))
    lines = tuple(_line(work, costs[work.unit], int(threads), device) for work in rehearsal.work)
    room = _room(bench, rehearsal, objects, forecast(dataset, pair, objects, recipe, splits, place))
    accelerator.free_memory()
    torch.set_num_threads(before)
    notes = [*bench.notes, *([] if own_peak else ["memory is counted from the start of this process"])]
    if run.reencode == "focused":
        notes.append("refreshes are priced as whole ones: what a focused one saves is known once the retriever moves")
    if run.index.startswith("milvus:"):
        notes.append("search is priced as exact search in this process: a server's speed is not measured")
    if run.compile:
        notes.append("what run.compile takes and saves is not measured")
    scales = tuple(scaling.scaled(rates, count, workers) for count in passages)
    if run.index == "faiss" and any(scale.kind != "exact" for scale in scales):
        notes.append("corpus work with another index than exact (run.index = faiss, by size) is priced as exact search")
    return Plan(
        recipe, sizes, lines, room, hardware, tuple(_warnings(room, busy, out, place, int(threads))), tuple(notes),
        calibrating.cost, rates, scales,
    )  # fmt: skip


def _require_scale(passages: Sequence[int], workers: int, network: float) -> None:
    if workers < 1 or any(count < workers for count in passages) or not 0 < network < math.inf:
        raise InputError(
            "there is nothing to plan for these workers", where="passages, workers, network",
            expected="at least one worker, a passage for each, and a network",
            got=f"{list(passages)}, {workers}, {network:g}",
        )  # fmt: skip


def _rates(
    b: Bench, x: Rehearsal, made: Mapping[str, Cost], network: float, out: str | Path | None, threads: int
) -> Rates:
    """What the work with a larger corpus is made of; seconds by the clock, all threads of this machine at work.

    Args:
        made: seconds of a text of each kind of token store, those that are there already included.
    """
    s, corpus, run = x.sizes, b.dataset.corpus, b.config
    stores = [name for name in made if name.endswith("passage")]
    rows = b.sample.passages[b.sample.uniform[:512]]
    texts = [part for row in rows.tolist() for part in (corpus.id(row), corpus.title(row), corpus.body(row))]
    lengths = {"retriever": b.sample.feed.retriever_passages.lengths, "ranker": b.sample.feed.ranker_passages.lengths}
    tokens = {name: 4 * float(np.mean(lengths[name.split()[0]])) + scaling.STORED for name in stores}
    units = ("passage", "list entry")
    amounts = {unit: sum(w.amount for w in x.work if w.unit == unit and w.category == "refresh") for unit in units}
    refreshes = amounts["passage"] / s.passages
    mined = max(run.mine_depth, round(amounts["list entry"] / s.train / refreshes))
    free = memory_available()
    on_cpu = b.accelerator.device.type == "cpu"
    return Rates(
        convert=b.costs["converted passage"].wall, tokenise=sum(made[name].wall for name in stores),
        encode=b.costs["passage"].wall, score=b.costs["score"].wall, index=b.costs["index row"].wall,
        join=b.costs["joined byte"].wall, digest=b.costs["checked byte"].wall, merge=b.costs["merged result"].wall,
        disk=b.costs["byte"].wall, network=network,
        text=sum(len(part.encode()) for part in texts) / len(rows) + scaling.ROW, tokens=sum(tokens.values()),
        read=tokens["retriever passage"], stores=len(stores), dim=s.dim,
        asked={"dev": (s.dev, run.search_depth), "test": (s.test, run.search_depth), "train": (s.train, mined)},
        refreshes=refreshes, wanted=run.index, threads=threads,
        gpus=0 if on_cpu else max(1, torch.cuda.device_count()), shard=run.ray_shard,
        memory=None if free is None else free + (resident_bytes() or 0),
        room=shutil.disk_usage(_there(Path(out or "."))).free,
    )  # fmt: skip


PARALLEL = ("passage", "query", "pair", "score")
"""Units beside updates whose work is divided among threads."""


def _line(work: Work, unit: Cost, threads: int, device: str) -> Line:
    """A phase, priced."""
    cost = unit * work.amount
    divided = threads if isinstance(work.unit, UpdateKind) or work.unit in PARALLEL else 1
    alone = cost.wall if device != "cpu" else min(cost.wall, cost.cpu / divided)
    return Line(work.phase, work.category, cost, alone)


def _copy(model: Any) -> Any:
    """Loading cuts layers off in place, and what is given must stay as it is."""
    return model if isinstance(model, str | Path) else copy.deepcopy(model)


def _sizes(dataset: Dataset, positives: Mapping[int, np.ndarray], splits: Any, pair: tuple[Retriever, Ranker]) -> Sizes:
    weights = [sum(p.numel() for p in model.parameters()) * 4 for model in pair]
    return Sizes(
        passages=len(dataset.corpus), queries=len(dataset.queries), train=len(positives), dev=len(splits[0].rows),
        test=len(splits[1].rows), heads=sum(len(np.unique(rows)) for rows in positives.values()), dim=pair[0].dim,
        weights=(weights[0], weights[1]), trained_head=not pair[1].new_head,
    )  # fmt: skip


# --- tokens -----------------------------------------------------------------------------------------------------------


def _read_by(name: str, pair: tuple[Retriever, Ranker]) -> dict[str, Any]:
    """What a kind of store depends on beside its texts."""
    model, kind = name.split()
    if model == "retriever":
        read = pair[0].inputs[kind]
        return {"prompt": read.prompt, "limit": read.stored_limit, "tokenizer_id": read.tokenizer_id}
    own = pair[1].input
    prompt = own.prompt if kind == "query" else ""
    return {"prompt": prompt, "limit": own.stored_limit, "tokenizer_id": own.tokenizer_id}


def _is_stored(name: str, dataset: Dataset, pair: tuple[Retriever, Ranker], cache: Path) -> bool:
    texts = dataset.queries if name.endswith("query") else dataset.corpus
    return stored(texts, **_read_by(name, pair), cache=cache)[1]


def _distinct(costs: Mapping[str, Cost], pair: tuple[Retriever, Ranker]) -> dict[str, Cost]:
    """Two models with one tokenizer and no prompt share their stores."""
    seen: dict[str, str] = {}
    for name in costs:
        seen.setdefault(f"{name.split()[1]} {sorted(_read_by(name, pair).items())}", name)
    return {name: costs[name] for name in seen.values()}


def _rows(name: str, sizes: Sizes) -> int:
    return sizes.queries if name.endswith("query") else sizes.passages


# --- room -------------------------------------------------------------------------------------------------------------


def _room(b: Bench, x: Rehearsal, objects: Mapping[str, Any], disk: Forecast) -> Room:
    """Memory measured while calibrating, and what grows with the data; the disk's forecast."""
    s = x.sizes
    vectors = 4 * s.passages * s.dim
    depth = int(max(work.amount for work in x.work if work.unit == "list entry") / s.train)
    mining = s.train * depth * 40 + 2 * s.heads * depth * 12  # lists, keys and masks while mining; two pools
    tokens = int(np.mean(b.sample.feed.retriever_passages.lengths)) if len(b.sample.feed.retriever_passages) else 0
    bm25 = s.passages * (100 + 20 * tokens) if objects["warmup"].retriever_steps else s.passages * 12 * tokens
    on_gpu = b.accelerator.device.type == "cuda"
    b.seen()
    queries = min(vector_bytes(s.queries, s.dim), QUERIES_IN_MEMORY)
    memory = max(b.peak, b.expected) + 2 * vectors + queries + max(mining, bm25)
    return Room(
        memory=memory, out_peak=disk.most, out_end=disk.stays, cache=disk.cache,
        gpu=torch.cuda.max_memory_allocated() if on_gpu else None,
    )  # fmt: skip


def _there(path: Path) -> Path:
    """The path, or the nearest folder above it that exists."""
    return next(p for p in (path.resolve(), *path.resolve().parents) if p.exists())


def _warnings(room: Room, busy: float | None, out: str | Path | None, cache: Path, threads: int) -> list[str]:
    """Where it will not fit, or not go as fast as it could."""
    lines = []
    free = memory_available()
    if free is not None:
        free += resident_bytes() or 0
        if room.memory > FULL * free:
            lines.append(
                f"memory: about {_bytes(room.memory)} are needed and {_bytes(free)} are there: "
                "make run.train_tokens or the batches smaller, or set run.gradient_cache=true"
            )
    for name, path, needed in (("run folder", Path(out or "."), room.out_peak), ("cache", cache, room.cache)):
        there = _there(path)
        space = shutil.disk_usage(there).free
        if needed > FULL * space:
            lines.append(f"{name}: {_bytes(needed)} are needed and {_bytes(space)} are free on the disk of {there}")
    found = cpus()
    if busy is not None and busy >= BUSY:
        lines.append(
            f"other processes keep {busy:.1f} of {found.installed} CPUs busy (load average {os.getloadavg()[0]:.1f}): "
            "times are those under this load; the CPU time is the work itself"
        )
    if threads > found.usable:
        lines.append(f"{threads} threads were asked for and {found.usable} can run at once: they wait for each other")
    return lines


# --- text -------------------------------------------------------------------------------------------------------------


def _merged(lines: Sequence[Line]) -> list[Line]:
    """Lines of one phase together."""
    found: dict[str, Line] = {}
    for line in lines:
        before = found.get(line.phase)
        cost, alone = (before.cost, before.alone) if before else (NOTHING, 0.0)
        found[line.phase] = Line(line.phase, line.category, cost + line.cost, alone + line.alone)
    return list(found.values())


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    if seconds < 2 * 3600:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def _bytes(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**29 else f"{count / 2**20:.0f} MiB"
