"""The corpus work of a run with more passages and more workers than there are here: plain arithmetic on measured units.

A worker is a machine like this one, with an equal part of the passages. It tokenises, encodes to a file and searches
that file exactly; the lists of all workers are merged on one of them. Compute, disk and network are taken to overlap,
so that the slowest of them is the time of a refresh.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from sparring.log import table

FLOAT, PAIR = 4, 12
"""Bytes of a component of an embedding, and of a row with its score in a list."""
OFFSETS = 12
"""Bytes of a text in a token store beside its tokens."""
LINKS, ENTRY = 272, 16
"""Bytes of a passage in a graph (2 x 32 links and its level) and in clusters (its row, twice), beside its vector."""
TABLE = 110
"""Bytes of a row in memory while the texts are converted, on one machine: hashes, digests, and sorting them."""
QUERIES_AT_ONCE, BLOCK = 16384, 1 << 17
"""Queries searched in one pass over the file, passages read at a time (`phases/index.py`)."""
FULL = 0.9
"""Share of a machine's memory or disk that can be used."""

Resource = Literal["compute", "disk", "network", "memory"]


@dataclass(frozen=True)
class Rates:
    """What was measured here, and what is assumed.

    Attributes:
        tokenise, encode: seconds of a passage.
        score: seconds of a query with a passage, in exact search.
        disk: seconds of a byte written or read.
        network: bytes a second between two workers; an assumption.
        text, tokens: bytes of a passage's text, and of its tokens in all stores.
        dim: of an embedding.
        queries, depth: searched at a refresh, and passages kept of each.
        refreshes: how often the whole corpus is encoded and searched.
        memory, room: bytes of memory (None: not known) and of disk that a worker has free.
    """

    tokenise: float
    encode: float
    score: float
    disk: float
    network: float
    text: float
    tokens: float
    dim: int
    queries: int
    depth: int
    refreshes: float
    memory: int | None
    room: int


@dataclass(frozen=True)
class Scale:
    """Seconds and bytes of one size. All but ``network`` and ``converted`` are of one worker.

    Attributes:
        once: seconds of tokenising, which happens once.
        compute: seconds of encoding and searching, a refresh.
        disk: seconds of writing and reading embeddings, a refresh.
        network: seconds in which the lists of all workers reach the one that merges them, and queries reach all.
        stored: bytes on disk: texts, tokens, and embeddings twice (shards, then the file).
        exact, hnsw, ivf: bytes of memory that an index needs; exact search reads the file block by block.
        whole: bytes of the embeddings; where they fit into memory, a file is read from the disk once.
        converted: bytes of memory in which one machine converts the texts of all workers.
        memory, room: bytes that a worker has free, as in `Rates`.
    """

    passages: int
    workers: int
    once: float
    compute: float
    disk: float
    network: float
    stored: float
    exact: float
    hnsw: float
    ivf: float
    whole: float
    converted: float
    refreshes: float
    memory: int | None
    room: int

    @property
    def refresh(self) -> float:
        """Seconds of one refresh."""
        return max(self.compute, self.disk, self.network)

    @property
    def total(self) -> float:
        """Seconds of all corpus work of the run; training is not in it."""
        return self.once + self.refreshes * self.refresh

    @property
    def missing(self) -> tuple[Resource, str] | None:
        """Room that is not there, and for what; None when all fits."""
        if self.stored > FULL * self.room:
            return "disk", f"{size(self.stored)} a worker, {size(self.room)} are free"
        for what, needed in (
            ("exact search, with the lists of all queries,", self.exact),
            ("converting the texts, on one machine,", self.converted),
        ):
            if self.memory is not None and needed > FULL * self.memory:
                return "memory", f"{what} needs {size(needed)}, {size(self.memory)} are free"
        return None

    @property
    def binds(self) -> Resource:
        """Room that is not there, else what takes longest."""
        times: dict[Resource, float] = {"compute": self.compute, "disk": self.disk, "network": self.network}
        return self.missing[0] if self.missing else max(times, key=lambda name: times[name])

    @property
    def reason(self) -> str:
        """Why it binds, in words."""
        if self.missing:
            return f"does not fit: {self.missing[1]}"
        parts = (("compute", self.compute), ("disk", self.disk), ("network", self.network))
        return ", ".join(f"{name} {span(value)}" for name, value in parts) + " a refresh"

    def to_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        return {**asdict(self), "refresh": self.refresh, "total": self.total, "binds": self.binds}


def scaled(rates: Rates, passages: int, workers: int) -> Scale:
    """Corpus work for so many passages on so many workers."""
    r, own = rates, math.ceil(passages / workers)
    vectors, asked = own * r.dim * FLOAT, r.queries * r.dim * FLOAT
    whole = r.memory is not None and vectors <= FULL * r.memory
    passes = 1 if whole else math.ceil(r.queries / QUERIES_AT_ONCE)
    reads = 1 if whole else 3 + passes  # joining the shards, the checksum, the check for NaN, then every pass
    lists = r.queries * min(r.depth, own) * PAIR
    merging = (workers - 1) * (lists + asked)  # all of it passes through one worker
    block = 2 * BLOCK * r.dim * FLOAT + asked + 2 * lists
    return Scale(
        passages, workers, own * r.tokenise, own * (r.encode + r.queries * r.score), (2 + reads) * vectors * r.disk,
        merging / r.network, own * (r.text + r.tokens) + 2 * vectors,
        min(block, 2 * vectors + asked + 2 * lists), vectors + own * LINKS, vectors + own * ENTRY, vectors,
        passages * TABLE, r.refreshes, r.memory, r.room,
    )  # fmt: skip


def text(scales: Sequence[Scale], rates: Rates) -> str:
    """The table, and what it assumes."""
    rows = [
        [
            f"{s.passages:,}", str(s.workers), span(s.once), span(s.refresh), span(s.total), size(s.stored),
            size(s.exact), size(s.hnsw), size(s.converted), f"{s.binds}: {s.reason}",
        ]
        for s in scales
    ]  # fmt: skip
    head = ["passages", "workers", "tokenise", "a refresh", "corpus work", "disk", "exact, memory", "HNSW, memory",
            "convert, memory", "what binds"]  # fmt: skip
    return (
        f"{table(rows, head)}\n\nEach worker is a machine like this one; {rates.queries:,} queries, "
        f"{rates.refreshes:g} refreshes; {8 * rates.network / 1e9:g} Gbit/s between workers is assumed. Training is "
        "not divided here and takes what is said above. Disk and memory are a worker's, converting is one machine's."
    )


def span(seconds: float) -> str:
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
