"""Settings that belong to no method: the run's, and what all recipes with rounds share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from sparring.cluster import Cluster
from sparring.config import at_least, one_of, within
from sparring.stores.address import check_index
from sparring.types import InputError

DEFAULT_RECIPE = "duet"
"""Why this one: docs/results.md."""
DEFAULT_ARMS = "separate,frozen-teacher,rocketqav2,ar2,ar2:adv_lambda=0,separate:fusion=1,retriever_lr=4e-5,duet"
"""What `sparring compare` compares unless told otherwise (`sparring.recipes.arms.parse_arms`)."""


@dataclass(frozen=True)
class RunConfig:
    """Settings of a run, whatever its recipe."""

    seed: int = 0
    """Seed of every random choice: heads, draws, dropout, bootstrap."""
    layers: int = 0
    """Keep the first N layers of both encoders; 0 keeps all."""
    retriever_layers: int = 0
    """Keep the first N layers of the retriever; 0 means `layers`."""
    ranker_layers: int = 0
    """Keep the first N layers of the ranker; 0 means `layers`."""
    retriever_max_length: int = 0
    """Tokens of a query or passage, special tokens included; 0 is the model's own."""
    ranker_max_length: int = 0
    """Tokens of a query-passage pair, special tokens included; 0 is the model's own."""
    two_towers: bool = False
    """Train separate encoders for queries and passages, both starting from the given one."""
    similarity: Literal["auto", "dot", "cosine"] = "auto"
    """auto reads the model: cosine when its vectors are normalised."""
    scale: float = 0.0
    """Factor on the similarity inside the softmax; 0 is automatic: 1 for dot, 20 for normalised vectors."""
    pooling: Literal["mean", "cls"] = "mean"
    """Pooling of a plain encoder; a SentenceTransformer keeps its own."""
    trust_remote_code: bool = False
    """Run code that a model folder brings along."""
    titles: bool = True
    """Read a passage as title + text; false ignores titles."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: bf16 where the device has fast bf16, else fp32."""
    threads: int = 0
    """CPU threads; 0 is automatic."""
    train_tokens: int = 0
    """Padded tokens in one chunk of a training forward; 0 is automatic: 2,048 on a CPU, 8,192 elsewhere."""
    encode_tokens: int = 0
    """Padded tokens in one forward of encoding and scoring; 0 is automatic: 2,048 on a CPU, 16,384 elsewhere."""
    gradient_cache: bool = False
    """Recompute activations chunk by chunk, so that lists of any length fit; costs one more forward."""
    shard_ranker: bool = False
    """Spread the ranker's weights, gradients and optimiser over the processes (FSDP2); the retriever stays one replica
    a process. For rankers whose training does not fit one device (docs/scale.md)."""
    compile: bool = False
    """GPUs only: compile the layers of encoders of BERT's kind (torch.compile, which needs Triton). Not measured yet;
    the first updates wait for it. A ranker that is spread (`shard_ranker`) is not compiled."""
    index: str = "exact"
    """Where mining and evaluation search. exact, hnsw, ivf: this kind of faiss index, in memory; faiss: exact up to a
    size and approximate above it, by a rule that the log prints (docs/scale.md); milvus:URI: a Milvus server
    (http://host:port) or a file of milvus-lite, a new collection for each refresh."""
    engine: Literal["local", "ray"] = "local"
    """Where a refresh encodes passages and mines: in this process, or as Ray Data jobs (docs/scale.md)."""
    ray_address: str = ""
    """ray: host:port of the cluster; empty is $RAY_ADDRESS, or else a Ray of this machine's own."""
    ray_workers: int = 0
    """ray: worker processes; 0 is one for each GPU, or one for each CPU but one."""
    ray_shard: int = 8192
    """ray: passages that a worker encodes or searches at a time, at least; what its death costs."""
    ray_timeout: int = 1800
    """ray: seconds in which at least one shard must be finished, start of the workers included."""
    mine_depth: int = 100
    """Passages per training query from which negatives are drawn."""
    reencode: Literal["all", "focused"] = "all"
    """Passages that a refresh between rounds encodes again: all, or those that can be in a list (docs/focused.md). Test
    is always read from embeddings of one retriever."""
    focus_depth: int = 0
    """focused: how deep a training query's list has to be freshly encoded; 0 is all of `mine_depth`. Dev's lists:
    at least `rerank_depth`, 0 is all of `search_depth`."""
    focus_sample: int = 500
    """focused: other passages, drawn at random, that are encoded too and tell what is missed."""
    focus_missed: float = 0.02
    """focused: largest share of list entries that stale embeddings may hide; a refresh whose estimate may lie above it
    (upper end of the 95 % interval) encodes all. 1 sets no bound."""
    visit: Literal["list", "query"] = "list"
    """What an epoch of training visits once. list: every list head (a query with three positives three times); query:
    every query, its heads taking turns, so that more labels or corrections of a query take no updates from others."""
    answer_filter: bool = False
    """Drop candidates that contain an answer string of the query (data sets with answers)."""
    search_depth: int = 100
    """Passages per evaluated query in a retriever's run."""
    rerank_depth: int = 50
    """Passages per query that the ranker re-ranks, in the cascade and on the fixed candidates."""
    fixed_candidates: Literal["warm", "bm25"] = "warm"
    """Where the fixed candidates of the ranker's row come from; the same for all rounds."""
    select_by: str = "RR@10"
    """Measure of the cascade on dev that picks the best pair."""
    measures: tuple[str, ...] = ("RR@10", "nDCG@10", "R@10", "R@100", "Success@5")
    """Measures in ir-measures' names."""
    dev_split: str = "dev"
    """Split that selects. The three splits must not share a query."""
    test_split: str = "test"
    """Split that is read once, at the end."""
    dev_queries: int = 0
    """Dev queries to evaluate, drawn by the seed 0 for every run; 0 is all."""
    test_queries: int = 0
    """Test queries to evaluate, drawn likewise; 0 is all."""
    checkpoints: Literal["none", "run", "rounds"] = "run"
    """What is kept to go on from. none: nothing, a stopped run is lost; run: all that is needed, until the run ends;
    rounds: as run, and every round's weights stay in RUN/states (docs/reliability.md: what each costs)."""
    checkpoint_seconds: int = 300
    """Seconds between two checkpoints inside a training phase, from which a stopped run goes on; 0: every update."""
    audit_lists: int = 100
    """Negative audit after each refresh: list heads that are drawn and scored by the ranker; 0 is no audit."""
    audit_depth: int = 10
    """Top negatives of each of these lists that are scored."""
    trackers: tuple[str, ...] = ()
    """Experiment trackers through accelerate, e.g. ["tensorboard"]."""

    def __post_init__(self) -> None:
        at_least(0, seed=self.seed, threads=self.threads, scale=self.scale, checkpoint_seconds=self.checkpoint_seconds)
        at_least(0, dev_queries=self.dev_queries, test_queries=self.test_queries)
        at_least(0, layers=self.layers, retriever_layers=self.retriever_layers, ranker_layers=self.ranker_layers)
        at_least(0, retriever_max_length=self.retriever_max_length, ranker_max_length=self.ranker_max_length)
        at_least(1, mine_depth=self.mine_depth, search_depth=self.search_depth, rerank_depth=self.rerank_depth)
        at_least(0, audit_lists=self.audit_lists)
        at_least(1, audit_depth=self.audit_depth, focus_sample=self.focus_sample)
        at_least(0, focus_depth=self.focus_depth)
        within(0, 1, focus_missed=self.focus_missed)
        at_least(64, train_tokens=self.train_tokens or 64, encode_tokens=self.encode_tokens or 64)
        one_of("precision", self.precision, ("auto", "fp32", "bf16"))
        one_of("similarity", self.similarity, ("auto", "dot", "cosine"))
        one_of("pooling", self.pooling, ("mean", "cls"))
        one_of("visit", self.visit, ("list", "query"))
        check_index(self.index)
        one_of("reencode", self.reencode, ("all", "focused"))
        one_of("engine", self.engine, ("local", "ray"))
        at_least(0, ray_workers=self.ray_workers)
        at_least(1, ray_shard=self.ray_shard, ray_timeout=self.ray_timeout)
        if self.engine == "ray":
            self.require_shared("run.engine", 'engine = "local"')
        if self.reencode == "focused" and self.index not in ("faiss", "exact"):
            raise InputError(
                "a focused refresh searches exactly: else what it misses cannot be told from what the index misses",
                where="run.reencode, run.index", expected='index = "exact", or "faiss", which is exact then',
                got=self.index,
            )  # fmt: skip
        one_of("fixed_candidates", self.fixed_candidates, ("warm", "bm25"))
        one_of("checkpoints", self.checkpoints, ("none", "run", "rounds"))
        one_of("select_by", self.select_by, self.measures)

    def require_shared(self, where: str, instead: str) -> None:
        """InputError unless the workers of a cluster can do what a refresh has to."""
        if self.index != "exact" or self.reencode != "all":
            raise InputError(
                "the workers of a cluster encode all passages and search exactly", where=where,
                expected='index = "exact", reencode = "all"', got=f"index = {self.index}, reencode = {self.reencode}",
                fix=f"take these, or {instead}",
            )  # fmt: skip

    def cluster(self) -> Cluster | None:
        """The cluster that a refresh uses; None for this process."""
        if self.engine == "local":
            return None
        return Cluster(self.ray_address, self.ray_workers, self.ray_shard, self.ray_timeout)


@dataclass(frozen=True)
class Rates:
    """How one model is optimised. ``updates`` counts its own optimiser steps over all rounds."""

    lr: float
    updates: int
    schedule: Literal["linear", "constant"] = "linear"
    warmup: float = 0.1
    weight_decay: float = 0.01
    clip: float = 2.0


@dataclass(frozen=True)
class RoundsConfig:
    """What every recipe with rounds has."""

    rounds: int = 4
    """Rounds; after each the index is refreshed and dev is evaluated."""
    batch: int = 16
    """Queries (candidate lists) per update."""
    negatives: int = 15
    """Negatives per list (n); a list has 1 + n passages."""
    accumulate: int = 1
    """Micro-batches that a batch is split into; the gradient stays that of the whole batch."""
    sampling: Literal["uniform", "simans", "top"] = "uniform"
    """How negatives are drawn from the pool."""
    simans_a: float = 0.5
    """SimANS: sharpness around the positive's score."""
    simans_b: float = 0.0
    """SimANS: offset from the positive's score."""
    retriever_lr: float = 1e-5
    """Peak learning rate of the retriever."""
    ranker_lr: float = 1e-5
    """Peak learning rate of the ranker."""
    schedule: Literal["linear", "constant"] = "linear"
    """Learning rate after the warm-up share: falling to 0 over all rounds, or constant."""
    warmup: float = 0.1
    """Share of a model's own updates in which its rate rises from 0."""
    weight_decay: float = 0.01
    """AdamW's decay, on matrices only."""
    clip: float = 2.0
    """Largest gradient norm; 0 does not clip."""
    fusion: float = 0.0
    """The cascade orders by ranker score + fusion x retriever score (similarity x scale); 0 is the ranker alone."""

    def __post_init__(self) -> None:
        at_least(0, fusion=self.fusion)
        at_least(1, rounds=self.rounds, batch=self.batch, negatives=self.negatives, accumulate=self.accumulate)
        at_least(0, retriever_lr=self.retriever_lr, ranker_lr=self.ranker_lr)
        at_least(0, weight_decay=self.weight_decay, clip=self.clip, simans_a=self.simans_a)
        within(0, 1, warmup=self.warmup)
        one_of("sampling", self.sampling, ("uniform", "simans", "top"))
        one_of("schedule", self.schedule, ("linear", "constant"))

    def rates(self, lr: float, updates: int) -> Rates:
        """Optimisation of one model at this rate, over ``updates`` steps of its own."""
        return Rates(lr, updates, self.schedule, self.warmup, self.weight_decay, self.clip)

    def drawing(self) -> dict[str, Any]:
        """How lists are drawn and batched."""
        return {
            "batch": self.batch,
            "negatives": self.negatives,
            "accumulate": self.accumulate,
            "sampling": self.sampling,
            "simans": (self.simans_a, self.simans_b),
        }


@dataclass(frozen=True)
class TurnsConfig(RoundsConfig):
    """A recipe in which the models take turns."""

    retriever_steps: int = 500
    """Updates of the retriever per round."""
    ranker_steps: int = 500
    """Updates of the ranker per round."""
    refresh: bool = True
    """Train each round on the pools of the round before; false trains all rounds on the warm start's (an ablation)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(0, retriever_steps=self.retriever_steps, ranker_steps=self.ranker_steps)

    def retriever_rates(self) -> Rates:
        """The retriever's optimisation over all rounds."""
        return self.rates(self.retriever_lr, self.rounds * self.retriever_steps)

    def ranker_rates(self) -> Rates:
        """The ranker's optimisation over all rounds."""
        return self.rates(self.ranker_lr, self.rounds * self.ranker_steps)

    def mined_by(self, k: int, warm: str) -> str:
        """Name of the generation whose pools round k trains on: the round's before, or the warm start's."""
        return f"{k - 1}" if self.refresh and k > 1 else warm
