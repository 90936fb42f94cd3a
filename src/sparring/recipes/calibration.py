"""What a unit of work costs on this machine, now: measured with the very models, lengths and data, for seconds.

Training updates are those of the recipe, on lists of sampled queries and passages; the models' weights are changed by
them, so the models must be the planner's own. Times are taken by the clock and in CPU seconds: on a shared machine the
first says how long it would take now, the second how much work it is.
"""

from __future__ import annotations

import itertools
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np

from sparring.data import Dataset, TextTable
from sparring.log import peak_memory_bytes, reset_peak_memory
from sparring.machine import process_age
from sparring.models import Ranker, Retriever, TokenStore
from sparring.phases.bm25 import Bm25
from sparring.phases.checkpoint import Checkpoint
from sparring.phases.encode import SHARD, assemble, encode
from sparring.phases.evaluate import evaluate, run_of
from sparring.phases.fit import Feed, Name, Reached, Scorer, Step, Trainee, fit, make_trainee
from sparring.phases.index import Kind, Lists, build_index
from sparring.phases.mine import mine
from sparring.phases.parts import arrived, save_part
from sparring.phases.rerank import score_pairs
from sparring.phases.sharded import joined
from sparring.phases.stats import paired_test
from sparring.phases.teacher import Draw, TeacherScores
from sparring.recipes.rehearsal import Unit, UpdateKind
from sparring.recipes.settings import RunConfig

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator

logger = logging.getLogger("sparring")

QUERIES, PASSAGES = 512, 2048
"""Largest sample."""
FRACTION = {"updates": 0.5, "encode": 0.2, "pairs": 0.1}
"""Shares of the time that the three kinds of forward get; the rest is what everything else takes."""


@dataclass(frozen=True)
class Cost:
    """Seconds of a unit: by the clock, and of all the process's threads together."""

    wall: float
    cpu: float

    def __mul__(self, amount: float) -> Cost:
        return Cost(self.wall * amount, self.cpu * amount)

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.wall + other.wall, self.cpu + other.cpu)


NOTHING = Cost(0.0, 0.0)


class Watch:
    """Measures what is done inside ``with``."""

    def __enter__(self) -> Watch:
        self._wall, self._cpu = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        self.cost = self.so_far()

    def so_far(self) -> Cost:
        """Since ``with``."""
        return Cost(time.perf_counter() - self._wall, time.process_time() - self._cpu)


@dataclass(frozen=True)
class Sample:
    """Some training queries, their positives and other passages: rows of the data set, and tokens of these texts alone.

    ``positives[i]``: places among ``passages`` of the positives of ``queries[i]``. ``uniform``: places of the passages
    that were drawn from all, each as likely: what an average passage costs is measured with them.
    """

    queries: np.ndarray
    passages: np.ndarray
    positives: list[np.ndarray]
    uniform: np.ndarray
    feed: Feed


@dataclass
class Bench:
    """Models on their device, a sample, and how forwards are made; `Experiment` has the same fields for a whole run."""

    dataset: Dataset
    retriever: Retriever
    ranker: Ranker
    accelerator: Accelerator
    config: RunConfig
    precision: str
    dtype: torch.dtype | None
    encode_tokens: int
    sample: Sample
    ranked: np.ndarray = field(default_factory=lambda: np.empty((0, 0), np.int64))
    costs: dict[Unit, Cost] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    expected: int = 0
    """Resident memory with a whole batch where only a part of one was measured, bytes."""
    peak: int = 0
    """Largest resident memory so far; `peak_memory_bytes` is begun anew now and then."""

    def seen(self) -> int:
        """The peak since it was begun anew, which it is."""
        now = peak_memory_bytes()
        self.peak = max(self.peak, now)
        reset_peak_memory()
        return now

    @contextmanager
    def measured(self, unit: Unit, amount: float) -> Iterator[None]:
        """The cost of one ``unit``, ``amount`` of which are done inside."""
        with Watch() as watch:
            yield
        self.costs[unit] = watch.cost * (1 / amount)


def draw_sample(
    dataset: Dataset, positives: Mapping[int, np.ndarray], seed: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Training queries; passages, all positives of the queries among them; and those of these that were drawn from all.
    -> rows, rows, rows"""
    rng = np.random.default_rng(seed)
    rows = np.array(sorted(positives), dtype=np.int64)
    queries = np.sort(rng.choice(rows, min(QUERIES, len(rows)), replace=False))
    others = rng.choice(len(dataset.corpus), min(PASSAGES, len(dataset.corpus)), replace=False)
    return queries, np.unique(np.concatenate([others, *(positives[int(q)] for q in queries)])), others


def tokenised(
    dataset: Dataset, retriever: Retriever, ranker: Ranker, positives: Mapping[int, np.ndarray], seed: int, budget: int
) -> tuple[Sample, dict[str, Cost]]:
    """The sample with its tokens, and what a text of each kind cost."""
    queries, passages, drawn = draw_sample(dataset, positives, seed)
    costs = {}
    stores: list[TokenStore] = []
    for name, table, rows, model in (
        ("retriever query", dataset.queries, queries, retriever),
        ("retriever passage", dataset.corpus, passages, retriever),
        ("ranker query", dataset.queries, queries, ranker),
        ("ranker passage", dataset.corpus, passages, ranker),
    ):
        kind = name.split()[1]
        with Watch() as watch:
            texts = table.texts(rows)
            made = (
                model.tokenize(texts, kind, None)  # type: ignore[arg-type]
                if isinstance(model, Retriever)
                else model.tokenize(texts, None, kind)  # type: ignore[arg-type]
            )
        stores.append(made)
        costs[name] = watch.cost * (1 / len(rows))
    places = [np.searchsorted(passages, positives[int(q)]) for q in queries]
    uniform = np.searchsorted(passages, drawn)
    return Sample(queries, passages, places, uniform, Feed(stores[0], stores[1], stores[2], stores[3], budget)), costs


# --- units ------------------------------------------------------------------------------------------------------------


def calibrate(b: Bench, steps: Mapping[UpdateKind, Step], sizes: tuple[int, int, int], seconds: float) -> None:
    """Measure every unit; ``sizes``: passages of the corpus, queries of dev, depth of mining. Fills ``b.costs``."""
    with Watch() as watch:
        small(b, *sizes)
        forwards(b, FRACTION["encode"] * seconds, FRACTION["pairs"] * seconds)
        team = teams(b)
        left = max(0.3 * seconds, min(FRACTION["updates"] * seconds, seconds - watch.so_far().wall - 5))
        for number, (kind, step) in enumerate(steps.items()):
            with Watch() as own:
                b.costs[kind] = updates(b, team, kind, step, left / (len(steps) - number))
            left -= own.cost.wall
        save(b, team)
        time_files(b)


def small(b: Bench, passages: int, dev: int, depth: int) -> None:
    """What no model does: BM25, the index, the search, mining, rows of results, tests."""
    bm25(b, passages)
    rng = np.random.default_rng(0)
    count, dim = min(passages, 20_000), b.retriever.dim
    vectors = rng.standard_normal((count, dim), dtype=np.float32)
    asked = vectors[: min(count, 512)]
    with b.measured("faiss", 1):  # loaded at its first use
        build_index(vectors[:100]).search(asked[:10], 1)
    kind = cast(Kind, b.config.index if b.config.index in ("hnsw", "ivf") else "exact")
    with b.measured("index row", count):
        index = build_index(vectors, kind=kind, of=passages)
    k = min(depth, count)
    index.search(asked, k)
    with b.measured("score", len(asked) * count):
        found = index.search(asked, k)
    merging(b, found)
    heads = {i: np.array([i]) for i in range(len(asked))}
    with Watch() as watch:
        mine(asked, np.arange(len(asked)), heads, index, np.arange(count), depth=k)
    both = b.costs["score"] * (len(asked) * count)
    b.costs["list entry"] = _less(watch.cost, both) * (1 / (len(asked) * k))
    results(b, dev, min(b.config.search_depth, passages))


def merging(b: Bench, found: Lists) -> None:
    """What merging as many results as there are costs: lists, and two files with half of other passages' each."""
    scores, rows = found
    queries, k = scores.shape
    with tempfile.TemporaryDirectory(prefix="sparring-plan-") as place:
        paths = []
        for part in range(2):
            own = slice(part, None, 2)
            paths.append(Path(place) / f"{part}.npz")
            offsets = np.arange(queries + 1) * scores[:, own].shape[1]
            others = rows[:, own].ravel() + len(b.dataset.corpus)
            np.savez(paths[-1], offsets=offsets, scores=scores[:, own].ravel(), rows=others)
        with b.measured("merged result", 2 * scores.size):
            joined((scores.copy(), rows.copy()), paths, k)


def this_process() -> Cost | None:
    """What it took to start this process so far; asked right after the libraries are loaded, it stands for others."""
    age = process_age()
    return Cost(age, time.process_time()) if age is not None else None


def new_process() -> Cost:
    """A Python process that loads sentence-transformers."""
    before = os.times()
    with Watch() as watch:
        subprocess.run([sys.executable, "-c", "import sentence_transformers"], check=True, capture_output=True)
    after = os.times()
    used = after.children_user + after.children_system - before.children_user - before.children_system
    return Cost(watch.cost.wall, used)


def bm25(b: Bench, passages: int) -> None:
    """Index and search of the sample. A search looks at every passage, so it is scaled by their number."""
    corpus, queries = b.dataset.corpus, b.dataset.queries
    rows, asked = b.sample.passages, b.sample.queries
    with b.measured("BM25 passage", len(rows)):
        index = Bm25((corpus.text(int(row)) for row in rows), len(rows))
    with Watch() as watch:
        b.ranked = index.search((queries.text(int(row)) for row in asked), len(asked), 50)[1]
    with Watch() as tokens:
        Bm25((queries.text(int(row)) for row in asked), len(asked))
    fixed = tokens.cost * (1 / len(asked))
    scaled = _less(watch.cost * (1 / len(asked)), fixed) * (passages / len(rows))
    b.costs["BM25 query"] = fixed + scaled


def results(b: Bench, queries: int, depth: int) -> None:
    """A row of results of dev's queries, and a paired test."""
    rng = np.random.default_rng(0)
    ids = [str(i) for i in range(queries)]
    rows = np.argsort(rng.random((queries, depth)), axis=1)
    run = run_of(ids, lambda part: [str(p) for p in part], -np.sort(rng.random(rows.shape), axis=1), rows)
    qrels = {query: {str(int(rng.integers(0, depth))): 1} for query in ids}
    with b.measured("row of results", 1):
        evaluate("row", qrels, run, b.config.measures, 0)
    values = rng.random((2, queries))
    with b.measured("paired test", 1):
        paired_test(*values)


def forwards(b: Bench, encoding: float, scoring: float) -> None:
    """Passages and queries encoded, pairs scored; more and more of them until the time is spent."""
    rng, s = np.random.default_rng(1), b.sample
    shared = {"token_budget": b.encode_tokens, "dtype": b.dtype}
    for unit, store, kind, order, time_ in (
        ("passage", s.feed.retriever_passages, "passage", s.uniform, 0.8 * encoding),
        ("query", s.feed.retriever_queries, "query", rng.permutation(len(s.queries)), 0.2 * encoding),
    ):

        def run(rows: np.ndarray, store: TokenStore = store, kind: str = kind) -> None:
            encode(b.retriever, store.select(rows), kind, **shared)  # type: ignore[arg-type]

        b.costs[unit] = grown(run, order, time_)
    pairs = rng.integers(0, (len(s.queries), len(s.passages)), (8192, 2))

    def score(rows: np.ndarray) -> None:
        score_pairs(
            b.ranker, s.feed.ranker_queries, s.feed.ranker_passages, pairs[rows, 0], pairs[rows, 1],
            token_budget=b.encode_tokens, dtype=b.dtype,
        )  # fmt: skip

    b.costs["pair"] = grown(score, np.arange(len(pairs)), scoring)


def grown(run: Callable[[np.ndarray], None], rows: np.ndarray, seconds: float) -> Cost:
    """Cost of a row: of the largest part of ``rows`` (64, and then twice as many) that fits in the time."""
    size, spent = min(64, len(rows)), 0.0
    run(rows[:size])
    while True:
        with Watch() as watch:
            run(rows[:size])
        spent += watch.cost.wall
        if size == len(rows) or spent + 2 * watch.cost.wall > seconds:
            return watch.cost * (1 / size)
        size = min(2 * size, len(rows))


def teams(b: Bench) -> dict[Name, Trainee]:
    """Both models with optimisers whose rate is 0: updates cost what they cost, and change nothing but decay's part."""
    models: dict[Name, Retriever | Ranker] = {"retriever": b.retriever, "ranker": b.ranker}
    return {name: make_trainee(m, b.accelerator, lr=0.0, updates=100, weight_decay=0.0) for name, m in models.items()}


class _Free(TeacherScores):
    """Knows the score of every pair: it is 0."""

    def missing(self, draw: Draw, number: int, steps: int, least: int) -> np.ndarray:  # noqa: ARG002
        """Nothing."""
        return self.keys

    def of(self, queries: np.ndarray, passages: np.ndarray) -> np.ndarray:  # noqa: ARG002
        """Zeros (b, m)."""
        return np.zeros(passages.shape, np.float32)


class Enough(Exception):
    """The time for a kind of update is spent."""


@dataclass
class Ticks:
    """Ends of updates (`sparring.phases.fit.Progress`); raises `Enough` at the first end after ``seconds``."""

    seconds: float
    teachers: tuple[Name, ...] = ()
    ends: list[Cost] = field(default_factory=list)

    def begun(self) -> Reached:
        """Nothing is done yet, but the teachers' scores, whose pairs have a price of their own."""
        self.ends.append(Cost(time.perf_counter(), time.process_time()))
        return Reached(teachers={name: _Free(0) for name in self.teachers})

    def ended(self, reached: Reached, *, keep: bool = False) -> None:  # noqa: ARG002
        """An update more."""
        done = reached.done
        self.ends.append(Cost(time.perf_counter(), time.process_time()))
        spent = self.ends[-1].wall - self.ends[0].wall
        if done > 1 and spent + spent / done > self.seconds:
            raise Enough

    def update(self) -> Cost:
        """Mean of the updates after the first, which warms caches up."""
        return _less(self.ends[-1], self.ends[1]) * (1 / (len(self.ends) - 2))


def updates(b: Bench, team: Mapping[Name, Trainee], kind: UpdateKind, step: Step, seconds: float) -> Cost:
    """Cost of one update. Where a whole batch would take too long: of a list, of four, and the line through both, for
    an optimiser's step costs the same whatever the batch."""
    one, few = kind.accumulate, 4 * kind.accumulate
    if kind.batch <= few:
        return timed(b, team, kind, step, kind.batch, seconds)
    b.seen()
    first, memory_first = timed(b, team, kind, step, one, seconds / 6), b.seen()
    second, memory_second = timed(b, team, kind, step, few, seconds / 6), b.seen()
    slope = _less(second, first) * (1 / (few - one))
    if (second + slope * (kind.batch - few)).wall * 2 < seconds / 2:
        return timed(b, team, kind, step, kind.batch, seconds / 2)
    b.notes.append(f"an update of {kind.step!r} with {kind.batch} lists was estimated from {one} and {few} lists")
    more = max(0, memory_second - memory_first) // (few - one) * (kind.batch - few)
    b.expected = max(b.expected, memory_second + more)
    least = second * (0.5 / few)  # of a list, should noise have hidden the slope
    slope = Cost(max(slope.wall, least.wall), max(slope.cpu, least.cpu))
    return second + slope * (kind.batch - few)


def timed(
    b: Bench, team: Mapping[Name, Trainee], kind: UpdateKind, step: Step, batch: int, seconds: float
) -> Cost:
    """Cost of one update of so many lists; two are made at least, and the first is not counted."""
    positives = b.sample.positives
    scorer = Scorer(
        team, b.sample.feed, step.trains, precision=b.precision, gradient_cache=b.config.gradient_cache,
        groups=np.arange(len(b.sample.passages)), known=lambda rows: _padded([positives[int(row)] for row in rows]),
    )  # fmt: skip
    ticks = Ticks(seconds, step.teachers)
    draw = lists(b.sample, b.ranked, kind.negatives)
    try:
        fit(
            team, scorer, step, draw, steps=20, batch=batch, accumulate=kind.accumulate, label=f"try {kind.step}",
            seed=0, progressed=ticks,
        )  # fmt: skip
    except Enough:
        pass
    finally:
        for trainee in team.values():
            trainee.model.eval()
            trainee.optimizer.zero_grad(set_to_none=True)
    return ticks.update()


def lists(sample: Sample, ranked: np.ndarray, negatives: int) -> Callable[[int, int], tuple[np.ndarray, np.ndarray]]:
    """Candidate lists of sampled queries: a positive, and negatives from BM25's top of the sampled passages.

    Args:
        ranked: places of BM25's passages for each query of the sample, best first; -1 is no result. Where there are
            fewer than ``negatives``, other passages of the sample stand in.
    """

    def negatives_of(query: int, rng: np.random.Generator) -> np.ndarray:
        pool = np.setdiff1d(ranked[query], [-1, *sample.positives[query]])
        short = max(0, negatives - len(pool))
        return np.concatenate([rng.permutation(pool)[:negatives], rng.integers(0, len(sample.passages), short)])

    def draw(number: int, batch: int) -> tuple[np.ndarray, np.ndarray]:
        rng = np.random.default_rng(number)
        queries = rng.choice(len(sample.queries), batch, replace=batch > len(sample.queries))
        rows = [[rng.choice(sample.positives[q]), *negatives_of(q, rng)] for q in queries.tolist()]
        return queries, np.array(rows, dtype=np.int64)

    return draw


def save(b: Bench, team: Mapping[Name, Trainee]) -> None:
    """A checkpoint, in a folder that goes away."""
    with tempfile.TemporaryDirectory(prefix="sparring-plan-") as folder:
        store = Checkpoint(Path(folder), 0)
        with Watch() as watch:
            store.save(team, {})
        written = sum(file.stat().st_size for file in Path(folder).iterdir())
    b.costs["byte"] = watch.cost * (1 / max(1, written))


def time_files(b: Bench) -> None:
    """What one process does for larger corpora: a table of the sample, shards of embeddings joined into one file. In a
    folder that goes away."""
    corpus, rows = b.dataset.corpus, b.sample.passages.tolist()
    texts = [(corpus.id(row), corpus.title(row), corpus.body(row)) for row in rows]
    count, dim = min(2 * SHARD, 2**23 // b.retriever.dim), b.retriever.dim
    shards = np.array_split(np.random.default_rng(0).standard_normal((count, dim), dtype=np.float32), 4)
    starts = [0, *itertools.accumulate(len(shard) for shard in shards[:-1])]
    with tempfile.TemporaryDirectory(prefix="sparring-plan-") as place:
        folder = Path(place)
        with b.measured("converted passage", len(rows)):
            TextTable.from_rows(texts, folder / "table")
        parts = [
            save_part(folder, start, ".npy", lambda file, shard=shard: np.save(file, shard))  # type: ignore[misc]
            for start, shard in zip(starts, shards, strict=True)
        ]
        with b.measured("checked byte", 4 * count * dim):
            for part in parts:
                arrived(part)
        with b.measured("joined byte", 4 * count * dim):
            assemble(folder / "passages.npy", {"rows": count, "dim": dim}, parts)


def _less(one: Cost, other: Cost) -> Cost:
    return Cost(max(0.0, one.wall - other.wall), max(0.0, one.cpu - other.cpu))


def _padded(rows: Sequence[np.ndarray]) -> np.ndarray:
    """Rows of different lengths as one array, padded with -1."""
    result = np.full((len(rows), max(len(row) for row in rows)), -1, dtype=np.int64)
    for place, row in zip(result, rows, strict=True):
        place[: len(row)] = row
    return result
