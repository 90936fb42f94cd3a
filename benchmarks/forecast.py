"""What the full-scale recipes would take on 8 A100 or 8 H100: FLOPs and bytes counted, nothing measured.

``python benchmarks/forecast.py`` prints the tables of docs/full-scale.md; ``--utilisation 0.3`` changes an assumption.

Work is counted by the recipe's own code (`sparring.recipes.rehearsal`, as `sparring plan` does), so every setting of a
configuration is in it. Then:

- a token of a passage through an encoder costs 2 FLOP a weight of its layers, and 4 x length x width a layer for
  attention; training costs three forwards, with gradient caching four;
- every text is as long as its limit, which is more than the truth (queries 32, passages 128, pairs 160);
- a GPU does `utilisation` of its dense bf16 peak;
- exact search is 2 x width FLOP a query and passage, at `HOST` FLOP/s for the whole machine;
- training is shared by the processes; what a refresh and an evaluation do is done by every one of them, as it is today,
  so that search on the host's cores is done once for each GPU; "shared" is what it would be if they divided it.

Left out: BM25, tokenising, reading and writing, waiting for each other, metrics.
"""

from __future__ import annotations

import argparse
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparring.recipes.rehearsal import Sizes, UpdateKind, Work, rehearse
from sparring.recipes.train import resolve_config

ROOT = Path(__file__).parents[1]
GPUS = 8
HOST = 3e12
"""FLOP/s of exact fp32 search on the whole host (two sockets of 48 cores at half their peak)."""
UTILISATION = 0.35
GIB = 2**30


@dataclass(frozen=True)
class Encoder:
    """A transformer encoder with feed-forward layers four times as wide."""

    layers: int
    width: int
    heads: int
    vocabulary: int = 30522
    positions: int = 512

    @property
    def layer_weights(self) -> int:
        """Matrices of one layer: 4 of attention, 2 four times as wide."""
        return 12 * self.width**2

    @property
    def weights(self) -> int:
        """Matrices of all layers and of the embeddings."""
        return self.layers * self.layer_weights + (self.vocabulary + self.positions) * self.width

    def forward(self, length: int) -> float:
        """FLOP of one text of so many tokens."""
        token = 2 * self.layers * self.layer_weights + 4 * length * self.width * self.layers
        return float(length * token)

    def activations(self, tokens: int, length: int) -> float:
        """Bytes kept for a backward in bf16: 34 a value, 5 an attention weight (Korthikanti et al. 2022)."""
        return tokens * self.width * self.layers * (34 + 5 * self.heads * length / self.width)


BASE, LARGE = Encoder(12, 768, 12), Encoder(24, 1024, 16)


@dataclass(frozen=True)
class Device:
    """A GPU: dense bf16 FLOP/s by its data sheet, and memory in bytes."""

    name: str
    peak: float
    memory: float


A100, H100 = Device("A100 80 GB", 312e12, 80e9), Device("H100 SXM 80 GB", 989e12, 80e9)


@dataclass(frozen=True)
class Recipe:
    """A configuration with the data and models of its paper. ``data``: what `Sizes` counts of it."""

    config: str
    data: Mapping[str, int]
    ranker: Encoder
    retriever: Encoder = BASE
    query_length: int = 32
    passage_length: int = 128
    pair_length: int = 160


MARCO = {"passages": 8_841_823, "queries": 909_824, "train": 502_939, "dev": 6_980, "test": 6_980, "heads": 532_761}
NQ = {"passages": 21_015_324, "queries": 65_395, "train": 58_880, "dev": 3_258, "test": 3_257, "heads": 58_880}
TRIVIA = {"passages": 21_015_324, "queries": 67_173, "train": 60_413, "dev": 3_380, "test": 3_380, "heads": 60_413}
RECIPES = (
    Recipe("ar2_msmarco", MARCO, ranker=LARGE),
    Recipe("ar2_nq", NQ, ranker=LARGE),
    Recipe("ar2_trivia", TRIVIA, ranker=LARGE),
    Recipe("rocketqav2_msmarco", MARCO, ranker=BASE),
    Recipe("rocketqav2_nq", NQ, ranker=BASE),
)


def settings(config: str) -> tuple[str, dict[str, Any]]:
    """Recipe and resolved settings of a file in configs/."""
    tables = tomllib.loads((ROOT / "configs" / f"{config}.toml").read_text(encoding="utf-8"))
    return tables["recipe"], resolve_config(tables["recipe"], tables)


def work_of(recipe: Recipe) -> list[Work]:
    """What the recipe's own code would do."""
    name, resolved = settings(recipe.config)
    towers = 2 if resolved["run"].two_towers else 1
    weights = (4 * towers * recipe.retriever.weights, 4 * recipe.ranker.weights)
    sizes = Sizes(**recipe.data, dim=recipe.retriever.width, weights=weights, trained_head=False)
    return rehearse(name, resolved.get(name), resolved["warmup"], resolved["run"], sizes).work


def update(recipe: Recipe, kind: UpdateKind, cached: bool) -> float:
    """FLOP of one update, without what teachers score for it."""
    lists, trained = kind.batch, 4 if cached else 3
    passages = lists * (1 + kind.negatives)
    total = 0.0
    if "retriever" in kind.trains:
        one = lists * recipe.retriever.forward(recipe.query_length)
        one += passages * recipe.retriever.forward(recipe.passage_length)
        total += one * trained
    if "ranker" in kind.trains:
        total += passages * recipe.ranker.forward(recipe.pair_length) * trained
    return total


@dataclass(frozen=True)
class Forecast:
    """FLOP of one run: ``training`` is shared by the processes; the others are what one process does."""

    training: float
    encoding: float
    scoring: float
    search: float
    refreshes: int

    def hours(self, device: Device, utilisation: float, *, shared: bool) -> dict[str, float]:
        """By the clock on `GPUS` of a device."""
        gpu = device.peak * utilisation * 3600
        by = GPUS if shared else 1
        found = {
            "training": self.training / (gpu * GPUS),
            "encoding": self.encoding / (gpu * by),
            "search": self.search * (1 if shared else GPUS) / (HOST * 3600),
            "ranker at rest": self.scoring / (gpu * by),
        }
        return {**found, "total": sum(found.values())}


def forecast(recipe: Recipe) -> Forecast:
    """The FLOP of a run."""
    _, resolved = settings(recipe.config)
    cached, sums = resolved["run"].gradient_cache, {"training": 0.0, "encoding": 0.0, "scoring": 0.0, "search": 0.0}
    refreshes = 0
    for work in work_of(recipe):
        if isinstance(work.unit, UpdateKind):
            sums["training"] += work.amount * update(recipe, work.unit, cached)
        elif work.category == "training":  # what a teacher scores; shared by the processes as updates are
            assert work.unit == "pair"
            sums["training"] += work.amount * recipe.ranker.forward(recipe.pair_length)
        elif work.unit in ("passage", "query"):
            length = recipe.passage_length if work.unit == "passage" else recipe.query_length
            sums["encoding"] += work.amount * recipe.retriever.forward(length)
            refreshes += work.unit == "passage"
        elif work.unit == "pair":
            sums["scoring"] += work.amount * recipe.ranker.forward(recipe.pair_length)
        elif work.unit == "score":
            sums["search"] += work.amount * 2 * recipe.retriever.width
    return Forecast(**sums, refreshes=refreshes)


@dataclass(frozen=True)
class Memory:
    """Bytes: on each GPU with the ranker replicated and sharded, and of embeddings on the host."""

    replicated: float
    sharded: float
    host: float


def memory(recipe: Recipe) -> Memory:
    """16 bytes a trained weight (weight, gradient, two moments, fp32), 4 more where DDP keeps its buckets, and the
    activations of one chunk of the larger model; a file of embeddings for each process, from which it searches."""
    _, resolved = settings(recipe.config)
    run = resolved["run"]
    tokens, towers = run.train_tokens or 8192, 2 if run.two_towers else 1
    retriever = 20 * towers * recipe.retriever.weights
    kept = recipe.retriever.activations(tokens, recipe.passage_length)
    largest = max(kept, recipe.ranker.activations(tokens, recipe.pair_length))
    rest = recipe.ranker.weights - recipe.ranker.layers * recipe.ranker.layer_weights
    gathered = 8 * max(recipe.ranker.layer_weights, rest)  # the part at work and the next, or its gradient
    ranker = 20 * recipe.ranker.weights, 16 * recipe.ranker.weights / GPUS + gathered
    embeddings = 4 * recipe.data["passages"] * recipe.retriever.width * GPUS
    return Memory(retriever + ranker[0] + largest, retriever + ranker[1] + largest, float(embeddings))


def tables(utilisation: float) -> str:
    """Time and memory of every recipe, as Markdown."""
    lines = [
        f"| hours on {GPUS} GPUs, {utilisation:.0%} of peak | training | encoding | search | ranker at rest | total |"
        " total, refresh shared |",
        "|---|---|---|---|---|---|---|",
    ]
    for recipe in RECIPES:
        found = forecast(recipe)
        for device in (A100, H100):
            hours = found.hours(device, utilisation, shared=False)
            shared = found.hours(device, utilisation, shared=True)["total"]
            cells = [f"{value:.1f}" for value in (*hours.values(), shared)]
            lines.append(f"| {recipe.config}, {device.name} | {' | '.join(cells)} |")
    lines += [
        "", "| memory | each GPU, both replicated | each GPU, ranker sharded | embeddings on disk, all processes |",
        "|---|---|---|---|",
    ]  # fmt: skip
    for recipe in RECIPES:
        need = memory(recipe)
        cells = [f"{value / GIB:.0f} GiB" for value in (need.replicated, need.sharded, need.host)]
        lines.append(f"| {recipe.config} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--utilisation", type=float, default=UTILISATION)
    print(tables(parser.parse_args(arguments).utilisation))


if __name__ == "__main__":
    main()
