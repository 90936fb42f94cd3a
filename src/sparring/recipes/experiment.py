"""What every recipe works with: two models on one data set, and the phases, already wired to each other.

A recipe calls `team`, `fit`, `refresh`, `denoise`, `evaluate`; nothing here knows which method is being run.
"""

from __future__ import annotations

import logging
import shutil
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors.torch import load_model, save_model

from sparring.data import Dataset
from sparring.data.corrections import Corrections
from sparring.distributed import choose_tokens, rank
from sparring.models import Ranker, Retriever
from sparring.phases.bm25 import Bm25
from sparring.phases.encode import encode
from sparring.phases.evaluate import CASCADE, Table, ThreeRows, three_rows
from sparring.phases.fit import Feed, Forwards, Name, Scorer, Step, Trainee, fit, make_trainee
from sparring.phases.index import build_index
from sparring.phases.mine import denoise, mine, pool_overlap, pools_from_lists, positives_of, report
from sparring.phases.pools import Method, Pools, hybrid, trainable
from sparring.phases.rerank import score_pairs
from sparring.phases.sample import ListSampler
from sparring.recipes.audits import Audits, audited
from sparring.recipes.settings import Rates, RunConfig
from sparring.recipes.tables import result_table
from sparring.rundir import RunDir
from sparring.types import InputError, Qrels, Run

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger("sparring")

Lists = tuple[np.ndarray, np.ndarray]
"""Ranked lists of a split's queries: scores [Q, K] and passage rows [Q, K], best first; row -1 is no result."""


@dataclass(frozen=True)
class Generation:
    """What one state of the retriever found: pools for training, ranked lists of the dev and test queries."""

    name: str
    pools: Pools
    lists: Mapping[str, Lists]


@dataclass
class Split:
    """The queries of one split that are evaluated, and their labels."""

    name: str
    qrels: Qrels
    rows: np.ndarray


@dataclass
class Experiment:
    """Two models, a data set and a run folder, with the phases that recipes call."""

    dataset: Dataset
    retriever: Retriever
    ranker: Ranker
    feed: Feed
    config: RunConfig
    run: RunDir
    accelerator: Accelerator
    precision: str
    dev: Split
    test: Split
    corrections: Corrections = field(default_factory=Corrections)
    forwards: Forwards = field(default_factory=Forwards)
    fixed: Mapping[str, Lists] = field(default_factory=dict)
    tables: list[tuple[str, Table]] = field(default_factory=list)
    best: tuple[str, float, Generation] | None = None
    start: Generation | None = None
    _team: dict[Name, Trainee] = field(default_factory=dict)
    _bm25: Bm25 | None = None

    def __post_init__(self) -> None:
        labels = self.dataset.split("train")
        self.positives = positives_of(labels, self.dataset.queries, self.dataset.corpus)
        self.train_rows = np.array(sorted(self.positives), dtype=np.int64)
        self.excluded = self.corrections.rows("drop", self.dataset)
        self.sure_negatives = self.corrections.rows("keep", self.dataset)
        self.audits = Audits(self.run, self.dataset)

    # --- training ---------------------------------------------------------------------------------------------

    def team(self, **rates: Rates) -> None:
        """New optimisers and schedules for both models, to last for all the recipe's rounds."""
        self._team = {}
        self.accelerator.free_memory()  # it holds on to what it prepared before
        self._team = {
            name: make_trainee(
                model, self.accelerator,
                lr=rates[name].lr, updates=rates[name].updates, schedule=rates[name].schedule,
                warmup=rates[name].warmup, weight_decay=rates[name].weight_decay, clip=rates[name].clip,
            )
            for name, model in self._models().items()
        }  # fmt: skip

    def fit(
        self,
        name: str,
        step: Step,
        pools: Pools,
        *,
        steps: int,
        batch: int,
        negatives: int,
        accumulate: int = 1,
        sampling: Method = "uniform",
        simans: tuple[float, float] = (0.5, 0.0),
    ) -> None:
        """Train on lists drawn from ``pools``; lists whose pool is too short are left out, counted and logged."""
        if steps == 0:
            return
        usable = pools.select(trainable(pools, negatives))
        seed = self.seed_of(name)
        a, b = simans
        sampler = ListSampler(usable, negatives, seed=seed, method=sampling, a=a, b=b)
        torch.manual_seed(seed + rank())  # dropout: no process repeats another's masks
        scorer = Scorer(
            self._team, self.feed, step.trains,
            precision=self.precision, gradient_cache=self.config.gradient_cache,
            groups=self.dataset.corpus.groups, known=self.known_groups, forwards=self.forwards,
        )  # fmt: skip
        found = report(pools, negatives)
        if found.short:
            logger.warning("%s: %s", name, found)
        means = self.run.phase(
            name, fit, self._team, scorer, step, sampler.batch,
            steps=steps, batch=batch, accumulate=accumulate, label=name, metrics=self.run.metrics, names=self.query_ids,
        )  # fmt: skip
        self.run.metrics.write(
            "fit", phase=name, steps=steps, queries_per_step=batch, passages_per_list=1 + negatives,
            lists=len(usable), lists_too_short=found.short, forwards=self.forwards.to_dict(), **means,
        )  # fmt: skip

    def known_groups(self, query_rows: np.ndarray) -> np.ndarray:
        """Text groups of what is no negative of each query, padded with -1: its known positives, and the passages that
        corrections drop.  -> int64 [B, K]"""
        none = np.empty(0, dtype=np.int64)
        rows = [np.concatenate([self.positives[q], self.excluded.get(q, none)]) for q in query_rows.tolist()]
        groups = [self.dataset.corpus.groups[passages] for passages in rows]
        known = np.full((len(groups), max(len(g) for g in groups)), -1, dtype=np.int64)
        for row, values in enumerate(groups):
            known[row, : len(values)] = values
        return known

    # --- mining -----------------------------------------------------------------------------------------------

    def bm25_lists(self, query_rows: np.ndarray, depth: int) -> Lists:
        """BM25's top passages of these queries; the BM25 index is built once a run."""
        corpus, queries = self.dataset.corpus, self.dataset.queries
        if self._bm25 is None:
            texts = (corpus.text(row) for row in range(len(corpus)))
            self._bm25 = self.run.phase("bm25-index", Bm25, texts, len(corpus))
        return self._bm25.search((queries.text(int(row)) for row in query_rows), len(query_rows), depth)

    def bm25_pools(self, depth: int) -> Pools:
        """BM25's hard negatives of the training queries."""
        scores, rows = self.run.phase("bm25-search", self.bm25_lists, self.train_rows, depth)
        return pools_from_lists(
            rows, scores, self.train_rows, self.positives, self.dataset.corpus.groups,
            known=self.excluded, generation="bm25",
        )  # fmt: skip

    def refresh(self, name: str, previous: Generation | None = None, depth: int = 0) -> Generation:
        """Encode everything with the current retriever, index, search dev and test, mine the training queries.

        ``depth``: passages per training query, when more than ``mine_depth`` are wanted.
        """
        folder = self.run.path / "index" / f"{name}-{rank()}"
        folder.mkdir(parents=True)
        corpus = self.run.phase(
            f"{name}-encode", encode, self.retriever, self.feed.retriever_passages, "passage",
            out=folder / "passages.npy", token_budget=self.encode_tokens, dtype=self.dtype,
            progress=f"{name}: encode passages",
        )  # fmt: skip
        queries = encode(
            self.retriever, self.feed.retriever_queries, "query",
            token_budget=self.encode_tokens, dtype=self.dtype, progress=f"{name}: encode queries",
        )  # fmt: skip
        index = self.run.phase(f"{name}-index", build_index, corpus, kind=self.config.index)
        lists = {}
        for split in (self.dev, self.test):
            scores, rows = index.search(queries[split.rows], self.config.search_depth)
            lists[split.name] = (scores * np.float32(self.retriever.scale), rows)
        pools = self.run.phase(
            f"{name}-mine", mine, queries[self.train_rows], self.train_rows, self.positives, index,
            self.dataset.corpus.groups, depth=max(depth, self.config.mine_depth), scale=self.retriever.scale,
            known=self.excluded, answers=self._answers(), passage_text=self.dataset.corpus.text, generation=name,
        )  # fmt: skip
        overlap = pool_overlap(previous.pools, pools) if previous else None
        self.run.metrics.write("refresh", generation=name, pool_overlap=overlap, **pools.counts)
        shutil.rmtree(folder)
        return Generation(name, pools, lists)

    def denoise(
        self, pools: Pools, *, rule: str, negative: float, positive: float, depth: int, heads: int, label: str
    ) -> Pools:
        """Lists whose negatives the ranker scores low, and new lists headed by passages that it scores high."""
        rng = np.random.default_rng(self.seed_of(label))
        rows = np.arange(len(pools))
        if heads and heads < len(rows):
            rows = np.sort(rng.choice(rows, heads, replace=False))
        chosen = pools.select(rows).top(depth)
        pair_queries = np.concatenate([chosen.pair_queries(), chosen.queries])
        pair_passages = np.concatenate([chosen.candidates, chosen.heads])
        scores = self.run.phase(label, self.rank_pairs, pair_queries, pair_passages, label)
        cut = len(chosen.candidates)
        result = denoise(
            chosen, scores[:cut], scores[cut:],
            rule=rule, negative=negative, positive=positive, groups=self.dataset.corpus.groups,
            sure_negatives=self.sure_negatives,
        )  # type: ignore[arg-type]  # fmt: skip
        self.audits.add_denoised(pools.generation, result.counts)
        logger.info("%s: %s", label, dict(result.counts))
        self.run.metrics.write(
            "denoise", phase=label, lists=len(chosen), negative_threshold=result.negative_threshold,
            positive_threshold=result.positive_threshold, **result.counts,
        )  # fmt: skip
        return result.pools

    def hybrid(self, undenoised: Pools, denoised: Pools) -> Pools:
        """Both kinds of list heads; the sampler shuffles them together."""
        return hybrid(undenoised, denoised)

    def audit(self, generation: Generation) -> None:
        """Score a sample of the mined negatives with the current ranker and write the likely unlabelled positives.

        For people: it is not part of the training budget, and training does not read it.
        """
        if not self.config.audit_lists:
            return
        name = f"{generation.name}-audit"
        found = self.run.phase(
            name, audited, generation.pools, self._rank_quietly,
            lists=self.config.audit_lists, depth=self.config.audit_depth, seed=self.seed_of(name),
            groups=self.dataset.corpus.groups, settled=self.sure_negatives,
        )  # fmt: skip
        self.audits.add(generation.name, found)

    # --- evaluation -------------------------------------------------------------------------------------------

    def evaluate(self, name: str, generation: Generation) -> None:
        """The audit of the mined negatives, and dev's three rows; the pair is kept when its cascade is the best yet."""
        self.audit(generation)
        result = self.run.phase(f"{name}-evaluate", self.three_rows, name, self.dev, generation)
        self.tables.append((name, result.table))
        cascade = self.selected(result.table)
        rows = [row.as_dict() for row in result.table.rows]
        self.run.metrics.write("evaluate", name=name, split=self.dev.name, rows=rows)
        if rank() == 0:
            text = result_table([], [(name, result.table)], self.config.measures, markdown=True)
            self.run.write_text(f"rounds/{name.replace(' ', '-')}.md", text + "\n")
        if self.best is None or cascade > self.best[1]:
            self.best = (name, cascade, generation)
            self.keep("best")

    def selected(self, table: Table) -> float:
        """The cascade's mean of the measure that picks the best pair."""
        return table.row(CASCADE).mean(self.config.select_by)

    def three_rows(self, name: str, split: Split, generation: Generation) -> ThreeRows:
        """Retriever, ranker on fixed candidates and cascade on one split; runs are written as TREC files."""
        result = three_rows(
            split.qrels, self.query_ids(split.rows), split.rows, self.dataset.corpus.ids,
            generation.lists[split.name], self.fixed[split.name], self._rank_quietly,
            depth=self.config.rerank_depth, measures=self.config.measures, seed=self.config.seed,
        )  # fmt: skip
        self.write_runs(f"{split.name}-{name}", result.runs)
        return result

    def write_runs(self, name: str, runs: Mapping[str, Run]) -> None:
        """TREC run files under RUN/runs."""
        from sparring.data import write_run

        if rank() == 0:
            folder = self.run.path / "runs"
            folder.mkdir(exist_ok=True)
            for kind, run in runs.items():
                file = f"{name}-{kind}.trec".replace(" ", "-")
                write_run(run, folder / file, tag=f"sparring-{kind}".replace(" ", "-"))

    def rank_pairs(self, query_rows: np.ndarray, passage_rows: np.ndarray, label: str = "rank") -> np.ndarray:
        """Ranker logits of (query, passage) rows, counted as teacher forwards."""
        self.forwards.add("ranker", "teacher", len(query_rows))
        return self._score(query_rows, passage_rows, label)

    def _rank_quietly(self, query_rows: np.ndarray, passage_rows: np.ndarray) -> np.ndarray:
        """Ranker logits for evaluation: not part of the training budget."""
        return self._score(query_rows, passage_rows, "evaluate: rank")

    def _score(self, query_rows: np.ndarray, passage_rows: np.ndarray, label: str) -> np.ndarray:
        return score_pairs(
            self.ranker, self.feed.ranker_queries, self.feed.ranker_passages, query_rows, passage_rows,
            token_budget=self.encode_tokens, dtype=self.dtype, progress=label,
        )  # fmt: skip

    def keep(self, name: str) -> None:
        """Put both models' weights aside in the run folder under a name."""
        if rank() == 0:
            folder = self.run.path / "states" / name
            folder.mkdir(parents=True, exist_ok=True)
            for kind, model in self._models().items():
                aside = folder / f"{kind}.safetensors.part"
                save_model(model, str(aside))
                aside.replace(folder / f"{kind}.safetensors")
        self.accelerator.wait_for_everyone()

    def restore(self, name: str) -> None:
        """Put weights back that were kept under a name."""
        for kind, model in self._models().items():
            load_model(model, str(self.run.path / "states" / name / f"{kind}.safetensors"))
        self.accelerator.wait_for_everyone()

    def _models(self) -> dict[Name, Retriever | Ranker]:
        return {"retriever": self.retriever, "ranker": self.ranker}

    # --- small things -----------------------------------------------------------------------------------------

    @property
    def dtype(self) -> torch.dtype | None:
        """Autocast type of encoding and scoring, or None for float32."""
        return torch.bfloat16 if self.precision == "bf16" else None

    @property
    def encode_tokens(self) -> int:
        """Padded tokens of one forward in encoding and scoring."""
        return choose_tokens(self.config.encode_tokens, self.accelerator.device.type, 16384)

    def seed_of(self, name: str) -> int:
        """A seed for one phase: the same in every recipe that has a phase of this name."""
        return zlib.crc32(f"{self.config.seed} {name}".encode())

    def query_ids(self, rows: np.ndarray) -> list[str]:
        """Ids of query rows."""
        return self.dataset.queries.ids(rows)

    def _answers(self) -> dict[int, tuple[str, ...]] | None:
        if not self.config.answer_filter:
            return None
        answers = {int(row): self.dataset.answers.get(self.dataset.queries.id(int(row)), ()) for row in self.train_rows}
        if not any(answers.values()):
            raise InputError(
                "answer_filter is on but no training query has answer strings",
                where=self.dataset.source, expected="a data set with answers (DPR)", fix="set answer_filter=false",
            )  # fmt: skip
        return answers


def choose_split(dataset: Dataset, name: str, limit: int) -> Split:
    """The queries of a split with a positive, all of them or ``limit`` drawn with seed 0: the same for every run."""
    qrels = {q: judged for q, judged in dataset.split(name).items() if any(grade > 0 for grade in judged.values())}
    ids = sorted(qrels)
    if limit and limit < len(ids):
        ids = sorted(np.random.default_rng(0).choice(ids, limit, replace=False).tolist())
    return Split(name, {q: qrels[q] for q in ids}, dataset.queries.rows(ids))

