"""What every recipe works with: two models on one data set, and the phases, already wired to each other.

A recipe calls `team`, `fit`, `refresh`, `denoise`, `evaluate`; nothing here knows which method is being run.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
import zlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from safetensors.torch import load_file, load_model, save_file, save_model

from sparring import __version__
from sparring.cluster import Cluster
from sparring.data import Dataset
from sparring.data.corrections import Corrections
from sparring.distributed import any_process, choose_tokens, processes, rank, sum_over_processes
from sparring.files import Lock, damaged, digests, sha256, whole
from sparring.log import Metrics
from sparring.machine import memory_available
from sparring.models import Ranker, Retriever
from sparring.models.memory import Pieces
from sparring.models.sharding import filled, is_sharded, put_state, whole_state
from sparring.phases.bm25 import Bm25
from sparring.phases.checkpoint import Checkpoint
from sparring.phases.encode import SHARD, Elsewhere, encode
from sparring.phases.evaluate import CASCADE, Table, ThreeRows, three_rows
from sparring.phases.fit import (
    Feed,
    Forwards,
    Name,
    NotFinite,
    Reached,
    Scorer,
    Step,
    Trainee,
    fit,
    make_trainee,
)
from sparring.phases.focus import union
from sparring.phases.index import Index, Kind, build_index, build_remote, choose_kind
from sparring.phases.mine import denoise, mine, pool_overlap, pools_from_lists, positives_of, report
from sparring.phases.pools import Method, Pools, hybrid, trainable
from sparring.phases.rerank import score_pairs
from sparring.phases.sample import ListSampler
from sparring.phases.sharded import ModelFiles, ShardedIndex, on_cluster, search_splits
from sparring.phases.teacher import TeacherScores
from sparring.phases.vectors import Chosen
from sparring.recipes.audits import Audits, audited
from sparring.recipes.focused import Refocused, Searched, Wanted, last_lists, refocus, search
from sparring.recipes.generation import Generation, Lists, Vectors
from sparring.recipes.journal import Entry, Journal
from sparring.recipes.settings import Rates, RunConfig
from sparring.recipes.store import load_generation, load_lists, load_rows, save_generation, save_lists, save_rows
from sparring.recipes.tables import result_table
from sparring.recipes.watch import Watch
from sparring.rundir import RunDir, Stop
from sparring.stores.card import Card
from sparring.types import CannotGoOn, InputError, Qrels, Run

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger("sparring")

QUERIES_IN_MEMORY = 256 << 20
"""Bytes of query embeddings that a refresh holds in memory, at most; what is more lies in a file, which is written,
hashed and read several times. So much is little beside two models in training, and is 87,000 queries of 768 dimensions.
"""


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
    fusion: float = 0.0
    tables: list[tuple[str, Table]] = field(default_factory=list)
    best: tuple[str, float, Generation] | None = None
    start: Generation | None = None
    origin: Path | None = None
    journal: Journal = field(default_factory=lambda: Journal(None))
    kept: dict[str, dict[str, str]] = field(default_factory=dict)
    held: Lock | None = None
    outline: Ranker | None = None
    written: list[Path] = field(default_factory=list)
    _team: dict[Name, Trainee] = field(default_factory=dict)
    _bm25: Bm25 | None = None
    _bm25_recorded: bool = False

    def __post_init__(self) -> None:
        labels = self.dataset.split("train")
        self.positives = positives_of(labels, self.dataset.queries, self.dataset.corpus)
        self.train_rows = np.array(sorted(self.positives), dtype=np.int64)
        self.excluded = self.corrections.rows("drop", self.dataset)
        self.sure_negatives = self.corrections.rows("keep", self.dataset)
        self.audits = Audits(self.run, self.dataset)
        self.watch = Watch(self.run.metrics)

    def branch(self, folder: Path, journal: Journal | None = None) -> Experiment:
        """The same models and data in a run folder of its own, to train from the weights kept here.

        Results so far (the warm start's) are taken over; forwards are counted from zero. ``journal``: the folder's; one
        with operations is a stopped branch's, which goes on; None: this branch cannot be gone on with.
        """
        self.release()
        journal, before = journal or Journal(None), self.run.metrics.records
        if journal.replaying:
            run = RunDir(folder, Metrics(folder / "metrics.jsonl"))
            journal.resume(run, taken=len(before))
        else:
            run = RunDir.create(folder)
            for record in before:
                run.metrics.take(record)
            if (self.run.path / "audit").is_dir():
                shutil.copytree(self.run.path / "audit", folder / "audit")
        return replace(
            self, run=run, origin=self.origin or self.run.path, forwards=Forwards(), tables=list(self.tables),
            best=None, journal=journal, kept=dict(self.kept), held=None, written=[], _team={},
        )  # fmt: skip

    # --- going on where a stopped run ended -----------------------------------------------------------------------

    def passed(self, kind: str, name: str) -> Entry | None:
        """The next operation's line in the journal, its forwards taken over; None where it must be done.

        Raises: CannotGoOn where a file that it left in the run folder is not as it was written.
        """
        entry = self.journal.passed(kind, name)
        if entry is not None:
            if wrong := damaged(self.run.path, entry.get("left", {})):
                raise CannotGoOn(
                    "a file of the stopped run is missing or damaged", where=str(self.run.path / wrong[0]),
                    fix="put it back as it was, or begin again with another --out",
                )  # fmt: skip
            self.forwards.counts.clear()
            self.forwards.counts.update(entry["forwards"])
        return entry

    def done(
        self, kind: str, name: str, file: Path | None = None, *, left: Sequence[Path] = (), **facts: Any
    ) -> None:  # fmt: skip
        """Note a finished operation with everything that was recorded and counted by now.

        ``file``: its stored result; ``left``: what it wrote into the run folder to stay.
        """
        if self.journal.folder is not None:
            facts |= {"forwards": self.forwards.to_dict(), "metrics": self.run.metrics.mark()}
            if rank() == 0:
                facts["left"] = digests(self.run.path, [str(path.relative_to(self.run.path)) for path in left])
            self.journal.add(kind, name, file=file, **facts)

    def let_go(self) -> None:
        """Give the run folder free for another process."""
        if self.held is not None:
            self.held.close()

    def checkpoint(self) -> Checkpoint:
        """Where training phases keep what they need to go on."""
        return Checkpoint(self.run.path / "checkpoint", self.config.checkpoint_seconds, writes=rank() == 0)

    # --- training ---------------------------------------------------------------------------------------------

    def team(self, **rates: Rates) -> None:
        """New optimisers and schedules for both models, to last for all the recipe's rounds."""
        self.release()
        self._team = {
            name: make_trainee(
                model, self.accelerator,
                lr=rates[name].lr, updates=rates[name].updates, schedule=rates[name].schedule,
                warmup=rates[name].warmup, weight_decay=rates[name].weight_decay, clip=rates[name].clip,
            )
            for name, model in self._models().items()
        }  # fmt: skip

    @property
    def trainees(self) -> Mapping[Name, Trainee]:
        """Both models with their optimisers."""
        return self._team

    def release(self) -> None:
        """Let go of optimisers and wrapped models; the accelerator holds on to what it prepared before."""
        self._team = {}
        self.accelerator.free_memory()

    def fit(
        self,
        name: str,
        step: Step,
        pools: Pools,
        *,
        generation: str,
        steps: int,
        batch: int,
        negatives: int,
        accumulate: int = 1,
        sampling: Method = "uniform",
        simans: tuple[float, float] = (0.5, 0.0),
    ) -> None:
        """Train on lists drawn from ``pools``; lists whose pool is too short are left out, counted and logged.

        ``generation``: which state of the retriever the recipe says mined these pools.

        Raises: InputError when another one did, or no pool is long enough; NotFinite, its batch saved.
        """
        require_generation(name, pools, generation)
        if steps == 0:
            return
        entry = self.passed("fit", name)
        if entry is not None:
            if self.journal.changes_weights(entry):
                self.checkpoint().load(self._team)
            return
        usable = pools.select(trainable(pools, negatives))
        seed = self.seed_of(name)
        a, b = simans
        sampler = ListSampler(usable, negatives, seed=seed, method=sampling, a=a, b=b, visit=self.config.visit)
        scorer = Scorer(
            self._team, self.feed, step.trains,
            precision=self.precision, gradient_cache=self.config.gradient_cache,
            groups=self.dataset.corpus.groups, known=self.known_groups, forwards=self.forwards,
        )  # fmt: skip
        found = report(pools, negatives)
        if found.short:
            logger.warning("%s: %s", name, found)
        with Stop() if self.journal.folder is not None else nullcontext() as stop:
            progressed = Progressed(self, steps, stop) if stop is not None else None
            try:
                means = self.run.phase(
                    name, fit, self._team, scorer, step, sampler.batch,
                    steps=steps, batch=batch, accumulate=accumulate, label=name, metrics=self.run.metrics,
                    names=self.query_ids, seed=seed, progressed=progressed,
                )  # fmt: skip
            except NotFinite as error:
                raise self._saved(name, error) from None
        self.run.metrics.write(
            "fit", phase=name, steps=steps, queries_per_step=batch, passages_per_list=1 + negatives,
            lists=len(usable), lists_too_short=found.short, forwards=self.forwards.to_dict(), **means,
        )  # fmt: skip
        self.watch.losses(name)
        pieces = progressed.pieces if progressed is not None else None
        self.done("fit", name, pieces=pieces)

    def _saved(self, phase: str, error: NotFinite) -> NotFinite:
        """The error again, naming the file with the batch that gave it."""
        batch = dict(error.batch)
        lists = [self.dataset.corpus.ids(rows) for rows in batch.pop("passages")]
        queries = self.query_ids(batch.pop("queries"))
        number = f"-{rank()}" if processes() > 1 else ""
        plain = json.loads(json.dumps({"phase": phase, **batch}), parse_constant=str)  # "NaN" is no JSON
        lists_of = [{"query": q, "passages": p} for q, p in zip(queries, lists, strict=True)]
        file = self.run.write_json(f"not-finite{number}.json", {**plain, "lists": lists_of})
        told = NotFinite(
            error.what, where=f"{error.where}, update {batch['update']} of {phase}", expected=error.expected,
            got=error.got, fix=f"read {file}: the lists of this batch; {error.fix}",
        )  # fmt: skip
        told.batch = error.batch
        return told

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
        name = f"bm25-{len(query_rows)}-{depth}"
        if (entry := self.passed("bm25", name)) is not None:
            self._bm25_recorded = True
            return load_lists(self.journal.checked(entry))
        corpus, queries = self.dataset.corpus, self.dataset.queries
        if self._bm25 is None:
            texts = (corpus.text(row) for row in range(len(corpus)))
            built = partial(Bm25, texts, len(corpus))
            self._bm25 = built() if self._bm25_recorded else self.run.phase("bm25-index", built)
        found = self._bm25.search((queries.text(int(row)) for row in query_rows), len(query_rows), depth)
        self.done("bm25", name, self._store(name, save_lists, found))
        return found

    def _store(self, name: str, save: Callable[[Path, Any], None], value: Any) -> Path | None:
        """Keep an operation's result for a run that goes on."""
        if self.journal.folder is None:
            return None
        path = self.journal.file(name)
        if rank() == 0:
            save(path, value)
        self.accelerator.wait_for_everyone()
        return path

    def bm25_pools(self, depth: int) -> Pools:
        """BM25's hard negatives of the training queries."""
        scores, rows = self.run.phase("bm25-search", self.bm25_lists, self.train_rows, depth)
        return pools_from_lists(
            rows, scores, self.train_rows, self.positives, self.dataset.corpus.groups,
            known=self.excluded, generation="bm25",
        )  # fmt: skip

    def refresh(
        self, name: str, previous: Generation | None = None, depth: int = 0, *, complete: bool = False
    ) -> Generation:
        """Encode everything with the current retriever, index, search dev and test, mine the training queries.

        With ``run.reencode`` "focused" and a previous generation only what can matter is encoded (`recipes.focused`);
        the generation is then a mix, and has no lists of test.

        Args:
            depth: passages per training query, when more than ``mine_depth`` are wanted.
            complete: encode everything all the same; what the previous generation encoded with these very weights
                is taken over.
        """
        if (entry := self.passed("refresh", name)) is not None:
            return load_generation(self.journal.checked(entry), self._kept_vectors)
        folder = self.run.path / "index" / f"{name}-{rank()}"
        folder.mkdir(parents=True, exist_ok=True)
        older = previous if self.config.reencode == "focused" and previous and previous.vectors else None
        if older is None:
            queries, found = self._whole(name, folder, max(depth, self.config.mine_depth))
        else:
            queries = self._encode_queries(name, folder)
            found = self.run.phase(
                f"{name}-encode", self._focus, name, queries, older, folder, depth=depth, complete=complete
            )
        lists = {self.dev.name: self._scaled(found.lists["dev"])}
        if found.fresh.all():
            of_test = found.lists.get("test") or found.index.search(queries[self.test.rows], self.config.search_depth)
            lists[self.test.name] = self._scaled(of_test)
        index = Searched(found.index, found.lists["train"]) if "train" in found.lists else found.index
        pools = self.run.phase(
            f"{name}-mine", mine, Chosen(queries, self.train_rows), self.train_rows, self.positives, index,
            self.dataset.corpus.groups, depth=max(depth, self.config.mine_depth), scale=self.retriever.scale,
            known=self.excluded, answers=self._answers(), passage_text=self.dataset.corpus.text, generation=name,
        )  # fmt: skip
        overlap = pool_overlap(previous.pools, pools) if previous else None
        self.watch.retriever(name, found.vectors, pools, self.query_ids(pools.queries))
        vectors = self._keep_vectors(name, older, folder / "passages.npy", found.fresh)
        facts = found.facts
        if older is not None and vectors is not None:
            facts = {**facts, "encoded_by": vectors.counts()}
            logger.info("%s: passages by the generation that encoded them: %s", name, facts["encoded_by"])
        self.run.metrics.write("refresh", generation=name, pool_overlap=overlap, **pools.counts, **facts)
        generation = Generation(name, pools, lists, vectors)
        self.done("refresh", name, self._store(name, save_generation, generation))
        shutil.rmtree(folder)
        self._forget_vectors(name)
        found.index.close()
        return generation

    def complete(self, generation: Generation) -> Generation:
        """A generation whose passages are all encoded by the current weights, which must be those that made it.

        Itself, unless it is a mix: then the rest is encoded and everything searched again, test too.
        """
        return self.refresh(f"{generation.name}-full", generation, complete=True) if generation.mixed else generation

    def _whole(self, name: str, folder: Path, mined: int) -> tuple[np.ndarray, Refocused]:
        """Every passage encoded and indexed.  -> the queries' embeddings, and what dev found; on a cluster, what all
        queries found, training's at depth ``mined``"""
        cluster = self.config.cluster()
        corpus = self.run.phase(
            f"{name}-encode", encode, self.retriever, self.feed.retriever_passages, "passage",
            out=folder / "passages.npy", token_budget=self.encode_tokens, dtype=self.dtype,
            progress=f"{name}: encode passages", shard=cluster.shard if cluster else SHARD,
            elsewhere=self._workers(cluster, folder / "model") if cluster else None,
        )  # fmt: skip
        queries = self._encode_queries(name, folder)
        if cluster:
            spread = ShardedIndex(folder / "passages.npy", cluster)
            deep = self.config.search_depth
            asked = {"dev": (self.dev.rows, deep), "test": (self.test.rows, deep), "train": (self.train_rows, mined)}
            lists = self.run.phase(f"{name}-search", search_splits, spread, queries, asked)
            return queries, Refocused(corpus, np.ones(len(corpus), dtype=bool), spread, lists, {})
        index = self.run.phase(f"{name}-index", self._index, name, corpus)
        dev = index.search(queries[self.dev.rows], self.config.search_depth)
        return queries, Refocused(corpus, np.ones(len(corpus), dtype=bool), index, {"dev": dev}, {})

    def _index(self, name: str, corpus: np.ndarray) -> Index:
        """An index of the whole corpus, where ``run.index`` says."""
        config, model = self.config, self.retriever
        if config.index in ("exact", "hnsw", "ivf"):
            return build_index(corpus, kind=cast(Kind, config.index))
        asked, (count, dim) = len(self.train_rows) + len(self.dev.rows) + len(self.test.rows), corpus.shape
        if config.index == "faiss":
            free = memory_available()
            memory = free // 2 if free is not None else None
            return build_index(corpus, kind=choose_kind(count, dim, asked, memory=memory))
        kind = choose_kind(count, dim, asked)
        texts = self.feed.retriever_passages.fingerprint
        card = Card(name, model.fingerprint(), texts, count, dim, model.similarity, kind, __version__)
        return build_remote(corpus, config.index.partition(":")[2], self.alias, card)

    @property
    def alias(self) -> str:
        """What the newest refresh's collection is called in Milvus: its own for each run and process."""
        folder = (self.origin or self.run.path).resolve()
        name = re.sub("[^a-z0-9]+", "_", folder.name.lower()).strip("_")[:20]
        number = f"_p{rank()}" if processes() > 1 else ""
        return f"sparring_{name}_{hashlib.sha256(str(folder).encode()).hexdigest()[:8]}{number}"

    def _workers(self, cluster: Cluster, folder: Path) -> Elsewhere:
        """Workers that encode passages with the retriever as it is now, whose files are put into the folder."""
        model = ModelFiles.saved(self.retriever, folder, trust_remote_code=self.config.trust_remote_code)
        return on_cluster(cluster, model, self.feed.retriever_passages, tokens=self.config.encode_tokens)

    def _encode_queries(self, name: str, folder: Path) -> np.ndarray:
        """All queries' embeddings; those that are large, in a file of the refresh's folder, which goes when it ends."""
        store = self.feed.retriever_queries
        out = folder / "queries.npy" if vector_bytes(len(store), self.retriever.dim) > QUERIES_IN_MEMORY else None
        return encode(
            self.retriever, store, "query", out=out,
            token_budget=self.encode_tokens, dtype=self.dtype, progress=f"{name}: encode queries",
        )  # fmt: skip

    def _scaled(self, lists: Lists) -> Lists:
        return lists[0] * np.float32(self.retriever.scale), lists[1]

    def _focus(
        self, name: str, queries: np.ndarray, previous: Generation, folder: Path, *, depth: int, complete: bool
    ) -> Refocused:
        """The passages that can matter, encoded into a copy of the previous generation's embeddings."""
        kept, config = previous.vectors, self.config
        assert kept is not None
        shutil.copyfile(kept.checked(), folder / "passages.npy")
        vectors = np.load(folder / "passages.npy", mmap_mode="r+", allow_pickle=False)
        encoded = 0

        def encode_rows(rows: np.ndarray, what: str) -> np.ndarray:
            nonlocal encoded
            encoded += len(rows)
            return encode(
                self.retriever, self.feed.retriever_passages.select(rows), "passage",
                out=folder / f"{what.replace(' ', '-')}.npy" if len(rows) else None,
                token_budget=self.encode_tokens, dtype=self.dtype, progress=f"{name}: encode {what}",
            )  # fmt: skip

        mined, searched = max(depth, config.mine_depth), config.search_depth
        closed = config.focus_depth
        wanted = {
            "train": Wanted(Chosen(queries, self.train_rows), mined, min(closed, mined) or mined),
            "dev": Wanted(queries[self.dev.rows], searched, max(closed, config.rerank_depth) if closed else searched),
        }
        if complete:
            same = kept.weights == self.retriever.fingerprint()
            rest = np.flatnonzero(~kept.fresh) if same else np.arange(len(vectors))
            vectors[rest] = encode_rows(rest, "rest")
            found = Refocused(vectors, np.ones(len(vectors), dtype=bool), *search(vectors, wanted), {"whole": True})
        else:
            rows = union(last_lists(previous, self.dev.name, wanted), len(vectors))
            found = refocus(
                rows, encode_rows, vectors, wanted,
                sample=config.focus_sample, threshold=config.focus_missed, seed=self.seed_of(f"{name}-sample"),
            )  # fmt: skip
        vectors.flush()
        return replace(found, facts={"encoded": encoded, "encoded_share": encoded / len(vectors), **found.facts})

    # --- embeddings that a focused refresh goes on from ---------------------------------------------------------

    @property
    def _kept_vectors(self) -> Path:
        return self.run.path / "vectors"

    def _keep_vectors(self, name: str, before: Generation | None, made: Path, fresh: np.ndarray) -> Vectors | None:
        """Move a refresh's embeddings to where the next one finds them; None where no refresh will look."""
        if self.config.reencode != "focused":
            return None
        older = before.vectors if before is not None else None
        of_row = np.zeros(len(fresh), dtype=np.int32)
        made_by: tuple[str, ...] = (name,)
        if older is not None:
            made_by = (*older.made_by, name)
            of_row = np.where(fresh, np.int32(len(older.made_by)), older.of_row).astype(np.int32)
        file = self._kept_vectors / f"{name}.npy"
        if rank() == 0:
            file.parent.mkdir(parents=True, exist_ok=True)
            made.replace(file)
        self.accelerator.wait_for_everyone()
        return Vectors(file, sha256(file), self.retriever.fingerprint(), made_by, of_row)

    def _forget_vectors(self, name: str) -> None:
        """Remove embeddings that no refresh goes on from: all but the newest, the best pair's, and those that a
        recipe begins from."""
        if self.config.reencode != "focused":
            return
        wanted = {name, "zero-shot", "warm", *([self.best[2].name] if self.best else [])}
        for file in self._kept_vectors.glob("*.npy") if rank() == 0 else ():
            if file.stem not in wanted:
                file.unlink()

    def denoise(
        self, pools: Pools, *, rule: str, negative: float, positive: float, depth: int, heads: int, label: str
    ) -> Pools:
        """Lists whose negatives the ranker scores low, and new lists headed by passages that it scores high."""
        if (entry := self.passed("denoise", label)) is not None:
            self.audits.add_denoised(pools.generation, entry["counts"])
            return load_generation(self.journal.checked(entry), self._kept_vectors).pools
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
        self.watch.empty(label, result.pools, self.query_ids(result.pools.queries))
        file = self._store(label, save_generation, Generation(label, result.pools, {}))
        self.done("denoise", label, file, counts={name: int(count) for name, count in result.counts.items()})
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
        if (entry := self.passed("audit", name)) is not None:
            self.audits.take(entry["record"])
            return
        found = self.run.phase(
            name, audited, generation.pools, self._rank_quietly,
            lists=self.config.audit_lists, depth=self.config.audit_depth, seed=self.seed_of(name),
            groups=self.dataset.corpus.groups, settled=self.sure_negatives,
        )  # fmt: skip
        record = self.audits.add(generation.name, found)
        self.done("audit", name, left=[self.run.path / record["file"]], record=record)

    # --- evaluation -------------------------------------------------------------------------------------------

    def evaluate(self, name: str, generation: Generation, *, audit: bool = True) -> None:
        """The audit of the mined negatives, and dev's three rows; the pair is kept when its cascade is the best yet."""
        if audit:
            self.audit(generation)
        result = self.run.phase(
            f"{name}-evaluate", self.three_rows, name, self.dev, generation, fusion=self.fusion
        )  # fmt: skip
        self.tables.append((name, result.table))
        cascade = self.selected(result.table)
        rows = [row.as_dict() for row in result.table.rows]
        self.run.metrics.write("evaluate", name=name, split=self.dev.name, rows=rows)
        if rank() == 0:
            text = result_table([], [(name, result.table)], self.config.measures, markdown=True)
            self.run.write_text(f"rounds/{name.replace(' ', '-')}.md", text + "\n")
        if self.config.checkpoints == "rounds" and name.startswith("round "):  # the warm start is kept already
            self.keep(name)
        better = self.best is None or cascade > self.best[1]
        if any_process(better and rank() == 0, self.accelerator.device):  # the others' rounding may differ
            self.best = (name, cascade, generation)
            self.keep("best")

    def selected(self, table: Table) -> float:
        """The cascade's mean of the measure that picks the best pair."""
        return table.row(CASCADE).mean(self.config.select_by)

    def three_rows(self, name: str, split: Split, generation: Generation, *, fusion: float = 0.0) -> ThreeRows:
        """Retriever, ranker on fixed candidates and cascade on one split; runs are written as TREC files."""
        label = f"{split.name}-{name}"
        if (entry := self.passed("rows", label)) is not None:
            return ThreeRows(Table(tuple(load_rows(self.journal.checked(entry))[0]), self.config.measures), {})
        looked_at: list[tuple[np.ndarray, np.ndarray]] = []

        def score(query_rows: np.ndarray, passage_rows: np.ndarray) -> np.ndarray:
            looked_at.append((query_rows, self._rank_quietly(query_rows, passage_rows)))
            return looked_at[-1][1]

        result = three_rows(
            split.qrels, self.query_ids(split.rows), split.rows, self.dataset.corpus.ids,
            generation.lists[split.name], self.fixed[split.name], score,
            depth=self.config.rerank_depth, measures=self.config.measures, seed=self.config.seed, fusion=fusion,
        )  # fmt: skip
        if split is self.dev:
            self.watch.ranker(name, *looked_at[0])
        written = self.write_runs(label, result.runs)
        self.done("rows", label, self._store(label, save_rows, result.table.rows), left=written)
        return result

    def write_runs(self, name: str, runs: Mapping[str, Run]) -> list[Path]:
        """TREC run files under RUN/runs.  -> the files, one for each row"""
        from sparring.data import write_run

        if rank() == 0:
            folder = self.run.path / "runs"
            folder.mkdir(exist_ok=True)
            for kind, run in runs.items():
                write_run(run, self.run_file(name, kind), tag=f"sparring-{kind}".replace(" ", "-"))
        files = [self.run_file(name, kind) for kind in runs]
        self.written += files
        return files

    def run_file(self, name: str, kind: str) -> Path:
        """Where :meth:`write_runs` puts the ranked lists of one row."""
        return self.run.path / "runs" / f"{name}-{kind}.trec".replace(" ", "-")

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
        if (entry := self.passed("keep", name)) is not None:
            self.kept[name] = entry["sha256"]
            return
        folder = self.run.path / "states" / name
        for kind, model in self._models().items():
            state = whole_state(model) if is_sharded(model) else None  # all processes together
            if rank() == 0:
                with whole(folder / f"{kind}.safetensors") as part:
                    save_model(model, str(part)) if state is None else save_file(state, str(part))
        self.accelerator.wait_for_everyone()
        self.kept[name] = {kind: sha256(folder / f"{kind}.safetensors") for kind in self._models()}
        self.done("keep", name, sha256=self.kept[name])

    def restore(self, name: str) -> None:
        """Put weights back that were kept under a name, here or in the run that this one branched from."""
        entry = self.passed("restore", name)
        if entry is None or self.journal.changes_weights(entry):
            folder = self.run.path / "states" / name
            if self.origin is not None and not folder.is_dir():
                folder = self.origin / "states" / name
            for kind, model in self._models().items():
                load_kept(model, folder / f"{kind}.safetensors", self.kept[name][kind])
            self.accelerator.wait_for_everyone()
        if entry is None:
            self.done("restore", name)

    def gather(self) -> None:
        """The end of training: where the ranker is sharded, a plain one of the same weights takes its place in the main
        process, ready to be exported. Every process must call it."""
        if not is_sharded(self.ranker):
            return
        assert self.outline is not None
        self.release()
        state = whole_state(self.ranker)
        if rank() == 0:
            self.ranker = filled(self.outline, state, self.accelerator.device)

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


def load_kept(model: Retriever | Ranker, path: Path, digest: str) -> None:
    """Put kept weights into a model; raises as `require_kept`."""
    require_kept(path, digest)
    put_kept(model, path)


def put_kept(model: Retriever | Ranker, path: Path) -> None:
    """Put the weights of a file into a model; the caller has checked the file's checksum."""
    if is_sharded(model):
        put_state(model, load_file(str(path)))
    else:
        load_model(model, str(path))


def require_kept(path: Path, digest: str) -> None:
    """CannotGoOn when a file of weights is not the one that was written."""
    if damaged(path.parent, {path.name: digest}):
        raise CannotGoOn("kept weights are missing or damaged", where=str(path))


class Progressed:
    """A training phase's checkpoints: see `sparring.phases.fit.Progress`."""

    def __init__(self, x: Experiment, steps: int, stop: Stop) -> None:
        self.x, self.steps, self.stop, self.store = x, steps, stop, x.checkpoint()
        self.pieces: dict[str, Any] | None = None

    def begun(self) -> Reached:
        """Where the newest checkpoint is of this phase: its weights, how far it had come, and in which pieces."""
        facts = self.store.facts()
        if facts.get("operation") != self.x.journal.position:
            return Reached()
        arrays, rows = self.store.load(self.x.trainees), len(self.x.feed.ranker_passages)
        self.x.journal.inside = False
        self.x.forwards.counts.clear()
        self.x.forwards.counts.update(facts["forwards"])
        self.pieces = facts["pieces"]
        pieces = Pieces(**facts["pieces"]) if facts["pieces"] else None
        known: dict[Name, TeacherScores] = {
            name: TeacherScores(rows, arrays[f"{name}|keys"], arrays[f"{name}|scores"])
            for name in facts.get("teachers", [])
        }
        return Reached(facts["done"], facts["sums"], pieces, known)

    def ended(self, reached: Reached, *, keep: bool = False) -> None:
        """A checkpoint at the phase's end, when it is time for one or one is needed, and before a stop that was asked
        for. Pieces are in it from the moment on at which memory made them smaller; teachers' scores, until the end."""
        votes = {"stop": float(self.stop.asked), "due": float(self.store.due())}
        agreed = sum_over_processes(votes, self.x.accelerator.device)  # a sharded model is saved by all or none
        asked, due = agreed["stop"] > 0, agreed["due"] > 0
        if keep or self.pieces:
            assert reached.pieces is not None
            self.pieces = asdict(reached.pieces)
        if reached.done < self.steps and not due and not asked and not keep:
            return
        facts = {"operation": self.x.journal.position, "done": reached.done, "sums": reached.sums}
        facts |= {"pieces": self.pieces, "forwards": self.x.forwards.to_dict(), "metrics": self.x.run.metrics.mark()}
        teachers = reached.teachers if reached.done < self.steps else {}
        arrays = {f"{name}|keys": known.keys for name, known in teachers.items()}
        arrays |= {f"{name}|scores": known.scores for name, known in teachers.items()}
        self.store.save(self.x.trainees, {**facts, "teachers": list(teachers)}, arrays)
        if asked:
            raise KeyboardInterrupt


def vector_bytes(count: int, dim: int) -> int:
    """Bytes of so many embeddings."""
    return 4 * count * dim


def require_generation(name: str, pools: Pools, expected: str) -> None:
    """Training on the negatives of another state of the retriever than the method says would be another method."""
    mined_by = " and ".join(sorted({part.removesuffix(" denoised") for part in pools.generation.split("+")}))
    if mined_by != expected:
        raise InputError(
            "these lists were mined by another generation of the retriever than the recipe says", where=f"phase {name}",
            expected=f"lists of {expected!r}", got=f"lists of {mined_by!r}",
            fix="give the phase the pools of the refresh that it names",
        )  # fmt: skip


def choose_split(dataset: Dataset, name: str, limit: int) -> Split:
    """The queries of a split with a positive, all of them or ``limit`` drawn with seed 0: the same for every run."""
    qrels = {q: judged for q, judged in dataset.split(name).items() if any(grade > 0 for grade in judged.values())}
    ids = sorted(qrels)
    if limit and limit < len(ids):
        ids = sorted(np.random.default_rng(0).choice(ids, limit, replace=False).tolist())
    return Split(name, {q: qrels[q] for q in ids}, dataset.queries.rows(ids))
