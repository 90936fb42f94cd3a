"""A run without its work: the recipe's own code is called with a stand-in that notes what would have to be done.

Every note is an amount of a unit (passages encoded, updates of one kind, bytes written ...); `calibration` finds out
what a unit costs on this machine, and `plan` multiplies.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, cast

from sparring.phases.fit import AHEAD, Step
from sparring.phases.pools import Pools
from sparring.recipes.competition import FUSED_START, RECIPES
from sparring.recipes.experiment import Experiment
from sparring.recipes.generation import Generation
from sparring.recipes.settings import Rates, RunConfig
from sparring.recipes.warmup import WarmupConfig, warmup

Category = Literal["refresh", "training", "denoising", "evaluation", "BM25", "saving", "start and export"]

NEW_CANDIDATES = 0.25
"""Share of a later round's cascade candidates that are not among the fixed ones, which are scored with them."""
SLICES = 8
"""Groups of test queries in a run's evidence, about."""


@dataclass(frozen=True)
class UpdateKind:
    """One kind of training update; two of the same kind cost the same."""

    step: str
    trains: tuple[str, ...]
    batch: int
    negatives: int
    accumulate: int


Unit = str | UpdateKind


@dataclass(frozen=True)
class Work:
    """So much of a unit, in a phase of the run."""

    phase: str
    category: Category
    unit: Unit
    amount: float


@dataclass(frozen=True)
class Sizes:
    """What decides how much there is to do.

    Attributes:
        passages, queries: rows of the tables, all splits.
        train, dev, test: queries of the splits that are used.
        heads: (query, positive) pairs of training.
        dim: of an embedding.
        weights: bytes of the retriever's and the ranker's weights in float32.
        trained_head: whether the ranker came with a head, so that the zero-shot pair is evaluated.
    """

    passages: int
    queries: int
    train: int
    dev: int
    test: int
    heads: int
    dim: int
    weights: tuple[int, int]
    trained_head: bool

    @property
    def state(self) -> int:
        """Bytes of a checkpoint: weights and two moments of each, float32."""
        return 3 * sum(self.weights)


@dataclass(frozen=True)
class Sketch:
    """Pools without their content: so many lists, so deep."""

    lists: int
    depth: int
    generation: str = ""

    def top(self, depth: int) -> Sketch:
        """As `Pools.top`."""
        return Sketch(self.lists, min(self.depth, depth), self.generation)

    def drawn(self, draws: int, n: int) -> float:
        """Distinct pairs to expect in so many uniform draws of n negatives and the positive."""
        visits, depth = draws / self.lists, max(self.depth, n)
        if visits <= 1:
            return draws * (1 + n)
        return self.lists * (1 + depth * (1 - (1 - n / depth) ** visits))


@dataclass
class Rehearsal:
    """What recipes call of an `Experiment`; notes work instead of doing it.

    Attributes:
        work: what a run would do, in its order.
        steps: one step function of each kind of update.
    """

    config: RunConfig
    sizes: Sizes
    work: list[Work] = field(default_factory=list)
    steps: dict[UpdateKind, Step] = field(default_factory=dict)
    start: Generation | None = None

    def note(self, phase: str, category: Category, unit: Unit, amount: float) -> None:
        """One line of the work."""
        if amount > 0:
            self.work.append(Work(phase, category, unit, amount))

    def team(self, **_: Rates) -> None:
        """As `Experiment.team`: costs nothing worth noting."""

    def fit(self, name: str, step: Step, pools: Pools, **options: Any) -> None:
        """Updates, what teachers score for them, and the checkpoint at their end."""
        if not options["steps"]:
            return
        kind = UpdateKind(
            step.name, step.trains, options["batch"], options["negatives"], options.get("accumulate", 1)
        )
        self.steps.setdefault(kind, step)
        self.note(name, "training", kind, options["steps"])
        pairs = cast(Sketch, pools).drawn(kind.batch * options["steps"], kind.negatives)
        if "ranker" in step.teachers:
            self.note(name, "training", "pair", pairs)
        if "retriever" in step.teachers:  # each text once in so many pairs
            together = min(pairs, max(AHEAD, kind.batch * (1 + kind.negatives)))
            passages = self.sizes.passages * (1 - (1 - 1 / self.sizes.passages) ** together)
            self.note(name, "training", "passage", pairs / together * passages)
            queries = min(self.sizes.train, together / (1 + kind.negatives))
            self.note(name, "training", "query", pairs / together * queries)
        self.note(f"{name}: checkpoint", "saving", "byte", self.sizes.state)

    def bm25_pools(self, depth: int) -> Pools:
        """BM25's lists of the training queries; its index where this is the first use."""
        self.bm25_lists("bm25-search", self.sizes.train)
        return cast(Pools, Sketch(self.sizes.heads, depth, "bm25"))

    def bm25_lists(self, phase: str, queries: int) -> None:
        """A search, with the index before the first."""
        if not any(work.unit == "BM25 passage" for work in self.work):
            self.note("bm25-index", "BM25", "BM25 passage", self.sizes.passages)
        self.note(phase, "BM25", "BM25 query", queries)

    def refresh(self, name: str, previous: Generation | None = None, depth: int = 0) -> Generation:  # noqa: ARG002
        """A whole refresh: how much a focused one saves is known only once the retriever has moved."""
        s, depth = self.sizes, max(depth, self.config.mine_depth)
        self.note(f"{name}-encode", "refresh", "passage", s.passages)
        self.note(f"{name}: encode queries", "refresh", "query", s.queries)
        self.note(f"{name}-index", "refresh", "index row", s.passages)
        self.note(f"{name}: search dev and test", "refresh", "score", (s.dev + s.test) * s.passages)
        self.note(f"{name}-mine", "refresh", "score", s.train * s.passages)
        self.note(f"{name}-mine", "refresh", "list entry", s.train * min(depth, s.passages))
        stored = 12 * s.heads * min(depth, s.passages) + 12 * (s.dev + s.test) * self.config.search_depth
        self.note(f"{name}: store", "saving", "byte", stored)
        return Generation(name, cast(Pools, Sketch(s.heads, min(depth, s.passages), name)), {})

    def denoise(self, pools: Pools, *, depth: int, heads: int, label: str, **_: Any) -> Pools:
        """The ranker's scores of the lists' heads and candidates."""
        sketch = cast(Sketch, pools)
        lists = min(heads or sketch.lists, sketch.lists)
        self.note(label, "denoising", "pair", lists * (1 + min(depth, sketch.depth)))
        return cast(Pools, Sketch(lists, min(depth, sketch.depth), f"{sketch.generation} denoised"))

    def hybrid(self, undenoised: Pools, denoised: Pools) -> Pools:
        """Both kinds of lists."""
        first, second = cast(Sketch, undenoised), cast(Sketch, denoised)
        return cast(Pools, Sketch(first.lists + second.lists, max(first.depth, second.depth)))

    def audit(self, name: str) -> None:
        """The ranker's scores of a sample of the mined negatives."""
        lists = min(self.config.audit_lists, self.sizes.heads)
        self.note(f"{name}-audit", "evaluation", "pair", lists * (1 + self.config.audit_depth))

    def evaluate(self, name: str, generation: Generation) -> None:
        """The audit and dev's three rows; as if every state were the best yet, and kept."""
        self.audit(generation.name)
        self.three_rows(f"{name}-evaluate", self.sizes.dev, same=name == "warm start" and self._fixed_are_warm)
        self.note(f"{name}: keep", "saving", "byte", sum(self.sizes.weights))

    @property
    def _fixed_are_warm(self) -> bool:
        return self.config.fixed_candidates == "warm"

    def three_rows(self, phase: str, queries: int, *, same: bool) -> None:
        """Pairs of the cascade and of the fixed candidates (``same``: they are the same), and three rows of results."""
        pairs = queries * self.config.rerank_depth * (1.0 if same else 1 + NEW_CANDIDATES)
        self.note(phase, "evaluation", "pair", pairs)
        self.note(phase, "evaluation", "row of results", 3 * queries / self.sizes.dev)


def rehearse(recipe: str, config: Any, warm: WarmupConfig, run: RunConfig, sizes: Sizes) -> Rehearsal:
    """A whole run (`train`): what `prepare`, `compete` and `finish` do, in their order."""
    x = Rehearsal(run, sizes)
    x.note("start", "start and export", "start", 1)
    x.note("tokenise", "start and export", "tokenise", 1)
    _prepare(x, warm)
    _compete(x, recipe, config)
    x.note("export", "saving", "byte", 2 * sum(sizes.weights))
    x.note("export", "start and export", "fresh process", 1)
    x.note("report", "start and export", "report", 1)
    return x


def _prepare(x: Rehearsal, warm: WarmupConfig) -> None:
    s, weights = x.sizes, sum(x.sizes.weights)
    x.start = x.refresh("zero-shot", depth=warm.ranker_depth if not warm.retriever_steps else 0)
    if s.trained_head:
        x.note("zero-shot: keep", "saving", "byte", weights)
        if warm.retriever_steps:
            x.audit("zero-shot")
    x.bm25_lists("BM25 lists", s.dev + s.test)
    x.note("BM25 and zero-shot", "evaluation", "row of results", 2)
    if s.trained_head:
        x.three_rows("zero-shot-evaluate", s.dev, same=True)
    generation = warmup(cast(Experiment, x), warm)
    x.note("warm start: keep", "saving", "byte", weights)
    x.evaluate("warm start", generation)


def _compete(x: Rehearsal, recipe: str, config: Any) -> None:
    s, weights = x.sizes, sum(x.sizes.weights)
    x.note("restore and keep", "saving", "byte", 2 * weights)
    if recipe != "warmup":
        body: Callable[[Experiment, Any, Generation], None] = RECIPES[recipe][1]
        warm = Generation("warm", cast(Pools, Sketch(s.heads, x.config.mine_depth)), {})
        if config.fusion:
            x.three_rows(f"{FUSED_START}-evaluate", s.dev, same=x._fixed_are_warm)
            x.note(f"{FUSED_START}: keep", "saving", "byte", weights)
        body(cast(Experiment, x), config, warm)
    states = ["zero-shot"] * s.trained_head + ["warm start"] + ["best"] * (recipe != "warmup")
    for state in states:
        x.note(f"test: {state}", "saving", "byte", weights)
        x.three_rows(f"test: {state}", s.test, same=state != "best" and x._fixed_are_warm)
    x.note("evidence", "evaluation", "row of results", 3 * (1 + SLICES) * s.test / s.dev)
    tested = 3 * len(x.config.measures) if recipe != "warmup" else 0
    x.note("evidence", "evaluation", "paired test", tested + 3)
