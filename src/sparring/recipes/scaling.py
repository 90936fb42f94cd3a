"""The corpus work of a run with more passages, or on more workers, than there are here: arithmetic on measured units.

One worker is this machine with ``run.engine = "local"``. Several are machines like this one with ``run.engine =
"ray"``: one process converts and tokenises; at each refresh the workers encode, it joins their shards, they search
their spans exactly, it merges their lists. All files lie on one file system that all of them see through one line.
Nothing is taken to overlap.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from sparring.log import table
from sparring.phases.index import HNSW_LINKS, SCANNED, choose_kind
from sparring.phases.sharded import CELLS, OFFSET, RESULT, WAITING, jobs, span_of
from sparring.phases.vectors import BLOCK

FLOAT, HALF = 4, 2
"""Bytes of a component of an embedding, and of one in bf16."""
ROW, STORED = 24, 12
"""Bytes of a text in a table beside its id, title and text, and in a token store beside its tokens."""
ENTRY = 16
"""Bytes of a passage in clusters (its row, twice), beside its vector."""
TABLE = 110
"""Bytes of a row in memory while the texts are converted, on one machine: hashes, digests, and sorting them."""
SEARCHED, SPANNED = 2, 4
"""Lists of all queries that are in memory at once, counted as `RESULT` bytes a result: while one process searches, and
while a worker on a cluster merges a span into its running top k (49 bytes a result)."""
CELL = 100
"""Bytes of a result while lists are sorted together (`phases/sharded.py`)."""
FULL = 0.9
"""Share of a machine's memory or disk that can be used."""

Resource = Literal["compute", "one process", "disk", "network", "memory"]


@dataclass(frozen=True)
class Rates:
    """What was measured here, and what is assumed.

    Attributes:
        convert, tokenise: seconds of a passage: to a row of the table, and to tokens in all stores. One process's.
        encode: seconds of a passage.
        score: seconds of a query with a passage, in exact search.
        index: seconds of a passage before search: a look for NaN, and for hnsw and ivf building the index.
        join: seconds of a byte of embeddings from the shards to one file with its checksum, in memory's reach.
        digest: seconds of a byte whose checksum is compared.
        merge: seconds of a result in lists that are sorted together.
        disk: seconds of a byte written to or read from this machine's disk.
        network: bytes a second through the line of the file system that several workers share; an assumption.
        text: bytes of a passage in the table.
        tokens, read: bytes of its tokens in all stores, and in the retriever's, which workers read.
        stores: token stores of passages; 1 where both models have the same tokens.
        dim: of an embedding.
        asked: for each split in the order in which they are searched: queries at a refresh, and passages kept of each.
        refreshes: how often the whole corpus is encoded and searched.
        wanted: ``run.index``.
        threads, gpus: threads and GPUs of a worker; ``encode`` is one GPU's or all threads', ``score`` all threads'.
        shard: ``run.ray_shard``, passages.
        memory, room: bytes of memory of a worker (None: not known), and bytes free where the files would lie.
    """

    convert: float
    tokenise: float
    encode: float
    score: float
    index: float
    join: float
    digest: float
    merge: float
    disk: float
    network: float
    text: float
    tokens: float
    read: float
    stores: int
    dim: int
    asked: Mapping[str, tuple[int, int]]
    refreshes: float
    wanted: str
    threads: int
    gpus: int
    shard: int
    memory: int | None
    room: int

    @property
    def queries(self) -> int:
        """Searched at a refresh, all splits'."""
        return sum(queries for queries, _ in self.asked.values())

    @property
    def hands(self) -> int:
        """Ray workers of a machine (``run.ray_workers`` = 0): one for each GPU, or one with one thread for each CPU."""
        return self.gpus or self.threads

    def fits(self, count: float) -> bool:
        """Whether what a machine has just written or read is still in its memory when it reads it again."""
        return self.memory is not None and count <= FULL * self.memory


@dataclass(frozen=True)
class Refresh:
    """Seconds and bytes of one refresh; `Scale` says what each is."""

    compute: float
    alone: float
    disk: float
    network: float
    found: float
    exact: float


@dataclass(frozen=True)
class Scale:
    """Seconds and bytes of one size.

    Attributes:
        once, once_files: seconds before the first refresh, all in the starting process: converting and tokenising; and
            writing and reading the files of it, on the disk (one worker) or through the network.
        compute: seconds of encoding and searching, a refresh; of the worker that has most to do.
        alone: seconds in which the starting process works alone, a refresh: joining the shards, checksums, and where
            it searches itself, the look for NaN or building the index; else merging the lists.
        disk: seconds of writing and reading embeddings, a refresh; one worker's.
        network: seconds in which all that is written and read passes the shared file system's line, a refresh.
        stored: bytes of all files at their most: texts, tokens, embeddings, and shards or lists beside them.
        kind: what ``run.index`` comes to at this size: exact, hnsw, ivf or milvus.
        exact: bytes of memory for exact search, of the starting machine, which merges the lists beside its workers;
            files are read block by block.
        hnsw, ivf: bytes of memory in which one process would hold such an index of the whole corpus.
        converted: bytes of memory in which it converts the texts.
        memory, room: bytes that are free, as in `Rates`.
    """

    passages: int
    workers: int
    once: float
    once_files: float
    compute: float
    alone: float
    disk: float
    network: float
    stored: float
    kind: str
    exact: float
    hnsw: float
    ivf: float
    converted: float
    refreshes: float
    memory: int | None
    room: int

    @property
    def refresh(self) -> float:
        """Seconds of one refresh: one part after another."""
        return self.compute + self.alone + self.disk + self.network

    @property
    def total(self) -> float:
        """Seconds of all corpus work of the run; training is not in it."""
        return self.once + self.once_files + self.refreshes * self.refresh

    @property
    def parts(self) -> dict[Resource, float]:
        """Seconds of all corpus work by what they are spent on; they add up to ``total``."""
        files = {"disk" if self.workers == 1 else "network": self.once_files}
        return {
            "compute": self.refreshes * self.compute, "one process": self.once + self.refreshes * self.alone,
            "disk": self.refreshes * self.disk + files.get("disk", 0.0),
            "network": self.refreshes * self.network + files.get("network", 0.0),
        }  # fmt: skip

    @property
    def missing(self) -> tuple[Resource, str] | None:
        """Room that is not there, and for what; None when all fits. What a server of Milvus holds is not looked at."""
        if self.stored > FULL * self.room:
            place = "on the disk" if self.workers == 1 else "on the file system that all share"
            return "disk", f"{size(self.stored)} are needed {place}, {size(self.room)} are free"
        index = {
            "exact": ("exact search, with the lists of all queries,", self.exact),
            "hnsw": ("HNSW, the whole corpus in one process,", self.hnsw),
            "ivf": ("IVF, the whole corpus in one process,", self.ivf),
        }
        for what, needed in (
            index.get(self.kind, ("", 0.0)),
            ("converting the texts, in one process,", self.converted),
        ):
            if self.memory is not None and needed > FULL * self.memory:
                return "memory", f"{what} needs {size(needed)}, {size(self.memory)} are free"
        return None

    @property
    def binds(self) -> Resource:
        """Room that is not there, else what takes longest."""
        return self.missing[0] if self.missing else max(self.parts, key=lambda name: self.parts[name])

    @property
    def reason(self) -> str:
        """Why it binds, in words."""
        if self.missing:
            return f"does not fit: {self.missing[1]}"
        return ", ".join(f"{name} {spoken(value)}" for name, value in self.parts.items() if value) + " in all"

    def to_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        return {
            **asdict(self), "refresh": self.refresh, "total": self.total, "parts": self.parts, "binds": self.binds
        }  # fmt: skip


def scaled(rates: Rates, passages: int, workers: int) -> Scale:
    """Corpus work for so many passages on so many workers."""
    r, vectors = rates, passages * rates.dim * FLOAT
    texts, tokens = passages * r.text, passages * r.tokens
    # for their checksums when they are written and when they are opened; texts once for each store, too
    again = (0 if r.fits(texts) else (2 + r.stores) * texts) + (0 if r.fits(tokens) else 2 * tokens)
    files = (tokens + again) * r.disk if workers == 1 else (texts + tokens + again) / r.network
    found = _here(r, passages) if workers == 1 else _on_ray(r, passages, workers)
    return Scale(
        passages, workers, passages * (r.convert + r.tokenise), files,
        found.compute, found.alone, found.disk, found.network, texts + tokens + vectors + max(vectors, found.found),
        _kind(r, passages), found.exact, vectors + passages * HNSW_LINKS, vectors + passages * ENTRY,
        passages * TABLE, r.refreshes, r.memory, r.room,
    )  # fmt: skip


def _kind(r: Rates, passages: int) -> str:
    """The kind of index that a refresh makes."""
    if r.wanted == "faiss":
        return choose_kind(passages, r.dim, r.queries, memory=None if r.memory is None else r.memory // 2)
    return r.wanted.partition(":")[0]


def _here(r: Rates, passages: int) -> Refresh:
    """A refresh in one process: one search for each split."""
    vectors = passages * r.dim * FLOAT
    passes = sum(_passes(queries) for queries, _ in r.asked.values())
    reads = 0 if r.fits(vectors) else 3 + passes  # joining the shards, the checksum, the look for NaN, every pass
    exact = kept = 0.0
    for queries, depth in r.asked.values():
        k = min(depth, passages)
        exact = max(exact, kept + _searching(r, passages, queries, k, SEARCHED))
        kept += queries * k * RESULT
    return Refresh(
        compute=passages * (r.encode + r.queries * r.score), alone=vectors * r.join + passages * r.index,
        disk=(1 + reads) * vectors * r.disk, network=0.0, found=0.0, exact=exact,
    )  # fmt: skip


def _on_ray(r: Rates, passages: int, workers: int) -> Refresh:
    """A refresh on a cluster (`sparring.phases.sharded`)."""
    vectors = passages * r.dim * FLOAT
    slower = 1 if r.gpus or passages <= r.shard else r.threads  # than all threads; one shard alone is not handed out
    encoding = _most(passages, r.shard, workers * r.hands) * r.encode * slower
    # shards written, their checksums, the file; where they are not in memory, the shards again and the file's checksum
    passed = passages * r.read + vectors * (3 if r.fits(vectors) else 5)
    compute, alone, found, exact, kept = encoding, vectors * (r.digest + r.join), 0.0, 0.0, 0.0
    for depth, splits in jobs(r.asked):
        queries, k = sum(r.asked[split][0] for split in splits), min(depth, passages)
        job = _job(r, passages, workers, queries, k)
        compute, alone, passed = compute + job.compute, alone + job.alone, passed + job.network * r.network
        found, exact = found + job.found, max(exact, kept + job.exact)
        kept += queries * k * RESULT
    return Refresh(compute, alone, 0.0, passed / r.network, found, exact)


def _job(r: Rates, passages: int, workers: int, queries: int, k: int) -> Refresh:
    """One search on a cluster."""
    vectors, asked, hands = passages * r.dim * FLOAT, queries * r.dim * FLOAT, workers * r.hands
    rows = span_of(passages, r.shard, queries * r.dim)
    spans = math.ceil(passages / rows)
    if spans == 1:  # by the starting process, as without a cluster
        read = 0 if r.fits(vectors) else vectors * (1 + _passes(queries))
        alone, exact = passages * (r.index + queries * r.score), _searching(r, passages, queries, k, SEARCHED)
        return Refresh(0.0, alone, 0.0, read / r.network, 0.0, exact)
    busy = min(hands, spans)
    results = queries * busy * min(k, rows) * _left(math.ceil(spans / busy))
    lists, waiting = results * RESULT + queries * spans * OFFSET, max(WAITING, queries * k * RESULT)
    passes = 0 if r.fits(r.hands * rows * r.dim * FLOAT) else _passes(queries)
    passed = vectors * (1 + passes) + asked * (1 + min(workers, spans)) + lists * (2 if r.fits(waiting) else 3)
    # of the lists: written, read for their checksums, read to be merged
    own = max(1, (r.threads - 1) // r.gpus) if r.gpus else 1  # threads of one that searches
    searching = _most(passages, rows, hands) * (r.index + queries * r.score * r.threads / own)
    again = math.ceil(lists / waiting) * queries * k  # the best so far, with every such part of the lists
    # the best, what waits, one file that came beyond it, sums of offsets, what is sorted
    merging = queries * k * RESULT + waiting + queries * (k * RESULT + 2 * OFFSET) + CELLS * CELL
    spanned = _searching(r, rows, queries, k, SPANNED) + 2 * queries * OFFSET
    return Refresh(
        compute=searching, alone=lists * r.digest + (again + results) * r.merge, disk=0.0, network=passed / r.network,
        found=lists + asked, exact=min(r.hands, spans) * spanned + merging,
    )  # fmt: skip


def _passes(queries: int) -> int:
    """How often the file is read for so many queries."""
    return math.ceil(queries / BLOCK)


def _most(passages: int, unit: int, hands: int) -> int:
    """Passages of the worker that has most to do, where so many are handed out at a time."""
    return min(passages, math.ceil(math.ceil(passages / unit) / hands) * unit)


def _left(spans: int) -> float:
    """1 + 1/2 + ... + 1/S: lists that a worker with S spans leaves of each query, about.

    Where it has done i spans, the last among them, k of their passages are its running top k: k/i of the last one's.
    """
    return sum(1 / i for i in range(1, spans + 1))


def _searching(r: Rates, passages: int, queries: int, k: int, lists: int) -> float:
    """Bytes of memory for exact search: two blocks of passages and one in bf16, the queries, and so many lists of all
    of them."""
    return min(SCANNED, passages) * r.dim * (2 * FLOAT + HALF) + queries * (r.dim * FLOAT + lists * k * RESULT)


def text(scales: Sequence[Scale], rates: Rates) -> str:
    """The table, and what it assumes."""
    rows = [
        [
            f"{s.passages:,}", str(s.workers), spoken(s.once + s.once_files), spoken(s.refresh), spoken(s.total),
            size(s.stored), size(s.exact), size(s.hnsw), size(s.ivf), size(s.converted), f"{s.binds}: {s.reason}",
        ]
        for s in scales
    ]  # fmt: skip
    head = ["passages", "workers", "once", "a refresh", "corpus work", "disk", "exact, memory", "HNSW, memory",
            "IVF, memory", "convert, memory", "what binds"]  # fmt: skip
    shared = (
        " Several workers are machines like this one with run.engine = ray and share a file system, through whose line "
        f"{8 * rates.network / 1e9:g} Gbit/s are assumed to pass."
    )
    several = any(s.workers > 1 for s in scales)
    return (
        f"{table(rows, head)}\n\n{rates.queries:,} queries, {rates.refreshes:g} refreshes; nothing is taken to overlap."
        f"{shared if several else ''} Once: converting and tokenising, in one process. Training is not divided here "
        "and takes what is said above. Disk is of all files together, exact search's memory the starting machine's, "
        "HNSW's and IVF's that of one process with the whole corpus."
    )


def spoken(seconds: float) -> str:
    """Seconds in the unit that people would use."""
    for unit, length in (("years", 365 * 86400), ("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"


def size(count: float) -> str:
    """Bytes in the unit that people would use."""
    for unit, length in (("TiB", 2**40), ("GiB", 2**30)):
        if count >= length / 2:
            return f"{count / length:.1f} {unit}"
    return f"{count / 2**20:.0f} MiB"
