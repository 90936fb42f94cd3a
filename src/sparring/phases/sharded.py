"""Encoding and exact search by a cluster's workers: the shards, files and top-k code of one process, spread out.

Workers see the same files as this process (a shared file system): the model's folder, the store of tokens, the
embeddings. What they make are parts (`sparring.phases.parts`): a finished one is not made again, whoever dies.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sparring import files
from sparring.cluster import Answer, Cluster
from sparring.distributed import choose_device, choose_tokens
from sparring.log import progress as progress_bar
from sparring.models import Retriever, TokenStore, load_retriever
from sparring.models.loading import quiet_transformers
from sparring.models.memory import Budget
from sparring.models.modes import evaluating
from sparring.models.retriever import Kind
from sparring.phases.encode import CODE, Missing, embed_shard
from sparring.phases.index import SCANNED, Lists, build_index, merged, require_queries
from sparring.phases.parts import arrived, save_part, whole_part, whole_parts
from sparring.phases.vectors import Chosen, Embeddings, blocks, write_npy
from sparring.types import InputError

logger = logging.getLogger("sparring")

_SHARED = "give all nodes the same files under the same path (a shared file system)"
_SPANS = 64  # parts of a search, unless each were too much work: each leaves up to k results a query
_WORK = 5 * 10**12  # multiplications of a span, at most: minutes of one slow core, far from the time limit of a shard
_MORE = 10**7  # entries of lists that one job may keep beyond those asked for: 120 MB
WAITING = 1 << 24
"""Bytes of spans' files that may always wait in memory to be merged together; more where the lists are larger."""
CELLS = 1 << 18
"""Results of lists that are sorted at a time, with what fills them up; each takes up to 100 bytes meanwhile."""
RESULT, OFFSET = 12, 8
"""Bytes of a result (its score and its row) in a span's file, and of a query beside its results."""
_UNIT = 8192  # rows; from `SCANNED` on spans end where the blocks of one process end, so that scores are the same


@dataclass(frozen=True)
class ModelFiles:
    """Where every node finds the retriever.

    Attributes:
        model: folder or hub name.
        fingerprint: what it must be when it is loaded.
        options: of `load_retriever`.
    """

    model: str
    fingerprint: str
    options: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def named(cls, model: str, retriever: Retriever, **options: Any) -> ModelFiles:
        """The files that a retriever was loaded from, with the options that were given."""
        folder = Path(model).expanduser()
        return cls(str(folder.absolute()) if folder.is_dir() else model, retriever.fingerprint(), options)

    @classmethod
    def saved(cls, retriever: Retriever, folder: Path, *, trust_remote_code: bool) -> ModelFiles:
        """The retriever as it is now, written into a folder."""
        with quiet_transformers():
            retriever.model.save_pretrained(str(folder), create_model_card=False, safe_serialization=True)
        options = {"similarity": retriever.similarity, "scale": retriever.scale, "trust_remote_code": trust_remote_code}
        return cls(str(folder.absolute()), retriever.fingerprint(), options)

    def load(self) -> Retriever:
        """The model, or InputError where it is not there or another."""
        try:
            model = load_retriever(self.model, **self.options)
        except InputError as error:
            where = str(Path(error.where).expanduser()) if error.where.startswith("~") else error.where
            fix = error.fix or _SHARED
            raise InputError(error.what, where=where, expected=error.expected, got=error.got, fix=fix) from None
        if (found := model.fingerprint()) != self.fingerprint:
            raise InputError(
                "this node has another model", where=self.model, expected=f"fingerprint {self.fingerprint[:12]}",
                got=found[:12], fix=_SHARED,
            )  # fmt: skip
        return model.to(choose_device().value)


@dataclass(frozen=True)
class EncodeJob:
    """What a `ShardEncoder` needs to know: paths and numbers. ``tokens`` 0 is chosen for its device."""

    model: ModelFiles
    store: str
    tokens_of: str
    parts: str
    kind: Kind
    size: int
    tokens: int
    bf16: bool
    code: str = CODE


class ShardEncoder:
    """A worker: shards of one store, with one model."""

    def __init__(self, job: EncodeJob) -> None:
        if job.code != CODE:
            raise InputError(
                "this node runs other code", where="versions", expected=job.code, got=CODE,
                fix="install the same versions on every node",
            )  # fmt: skip
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
        self.job, self.parts = job, _shared(Path(job.parts))
        self.retriever = job.model.load()
        self.store = TokenStore.open(_shared(Path(job.store)), check=False)
        if self.store.fingerprint != job.tokens_of:
            raise InputError("this node has other tokens", where=job.store, fix=_SHARED)
        tokens = choose_tokens(job.tokens, self.retriever.device.type, 16384)
        self.budget = Budget(tokens, f"encoding {job.kind}s")

    def __call__(self, item: Mapping[str, Any]) -> Answer:
        """{"start"} -> that, and the name of the shard's file."""
        start, dtype = item["start"], torch.bfloat16 if self.job.bf16 else None
        path = whole_part(self.parts, start, ".npy")  # of an attempt whose answer was lost
        if path is None:
            with evaluating(self.retriever, dtype):
                vectors = embed_shard(self.retriever, self.store, self.job.kind, start, self.job.size, self.budget)
            path = save_part(self.parts, start, ".npy", lambda file: np.save(file, vectors))
        return {"start": start, "file": path.name}


def on_cluster(
    cluster: Cluster,
    model: ModelFiles,
    store: TokenStore,
    *,
    tokens: int = 0,
    worker: Callable[..., Any] = ShardEncoder,
) -> Callable[[Missing], Iterator[tuple[int, Path]]]:
    """What `encode` takes as ``elsewhere``. ``tokens``: padded tokens of a forward; 0: each worker's device decides."""
    if store.folder is None:
        raise InputError("tokens in memory cannot be sent to a cluster", fix="tokenise into a cache folder")
    folder = store.folder

    def made(missing: Missing) -> Iterator[tuple[int, Path]]:
        job = EncodeJob(
            model, str(folder.absolute()), store.fingerprint, str(missing.parts.absolute()), missing.kind,
            missing.size, tokens, missing.dtype is not None,
        )  # fmt: skip
        with closing(cluster.map(worker, (job,), [{"start": start} for start in missing.starts])) as answers:
            for answer in answers:
                yield answer["start"], arrived(missing.parts / answer["file"])

    return made


@dataclass(frozen=True)
class SearchJob:
    """What a `SpanSearcher` needs to know."""

    passages: str
    queries: str
    rows: int
    parts: str
    k: int


class SpanSearcher:
    """A worker: the best k of one span of passages after another, with a running top k over all spans it has done.

    A span's file leaves out what its running top k has beaten already: k passages with higher scores are known, so
    it cannot be among the best k of all, whatever becomes of this worker or of any file.
    """

    def __init__(self, job: SearchJob) -> None:
        self.job, self.parts = job, _shared(Path(job.parts))
        self.passages = np.load(_shared(Path(job.passages)), mmap_mode="r", allow_pickle=False)
        self.queries = np.load(_shared(Path(job.queries)), mmap_mode="r", allow_pickle=False)
        if len(self.passages) != job.rows:
            raise InputError("this node has other embeddings", where=job.passages, fix=_SHARED)
        self.best = np.full((len(self.queries), job.k), -np.inf, dtype=np.float32)

    def __call__(self, item: Mapping[str, Any]) -> Answer:
        """{"start", "stop"} -> that, the name of the span's file, and how many results it has."""
        start, stop = item["start"], item["stop"]
        path = whole_part(self.parts, start, ".npz")
        if path is not None:
            results = _results(path)
        else:
            index = build_index(self.passages[start:stop], first=start, of=len(self.passages))
            scores, rows = index.search(self.queries, self.job.k, progress="")
            self.best = -np.sort(-np.concatenate([self.best, scores], axis=1), axis=1)[:, : self.job.k]
            open_ = scores >= self.best[:, -1:]
            found = {
                "offsets": np.concatenate([[0], np.cumsum(open_.sum(axis=1))]).astype(np.int64),
                "scores": scores[open_], "rows": rows[open_] + start,
            }  # fmt: skip
            path = save_part(self.parts, start, ".npz", lambda file: np.savez(file, **found))  # type: ignore[arg-type]
            results = len(found["rows"])
        return {"start": start, "stop": stop, "file": path.name, "results": results}


class ShardedIndex:
    """Exact search of an embeddings file by a cluster's workers: what recipes use of an `Index`.

    Args:
        file: float32 [N, d] (``.npy``), which does not change.
        span: rows that a worker searches at a time; 0 is `span_of`.
        worker: for tests.
    """

    kind = "exact"

    def __init__(
        self, file: Path, cluster: Cluster, *, span: int = 0, worker: Callable[..., Any] = SpanSearcher
    ) -> None:
        self.file, self.cluster, self.worker = file, cluster, worker
        self._passages = np.load(file, mmap_mode="r", allow_pickle=False)
        if self._passages.ndim != 2 or not self._passages.size:
            got = str(list(self._passages.shape))
            raise InputError("no passages to search", where=str(file), expected="[N, d]", got=got)
        self.span = span
        self._held: dict[Path, files.Lock] | None = None

    def __len__(self) -> int:
        return len(self._passages)

    @property
    def dim(self) -> int:
        """Embedding dimension d."""
        return int(self._passages.shape[1])

    def close(self) -> None:
        """Nothing is held between searches."""

    def vectors(self, rows: np.ndarray) -> np.ndarray:
        """Embeddings of passage rows, float32."""
        return np.array(self._passages[rows], dtype=np.float32)

    def search(self, queries: Embeddings, k: int, *, progress: str = "search") -> Lists:
        """As `Index.search`: scores float32 [Q, k] and rows int64 [Q, k], best first, equal scores by row.

        Finished spans are kept beside the embeddings until all are: a search that is stopped goes on.

        Raises: files.Busy while another process makes the same search.
        """
        require_queries(queries, k, self.dim)
        span = self.span or span_of(len(self), self.cluster.shard, len(queries) * self.dim)
        k, spans = min(k, len(self)), range(0, len(self), span)
        if len(spans) == 1 or not len(queries):
            return build_index(self._passages).search(queries, k, progress=progress)
        with self.together():
            return self._merged(queries, k, spans, progress)

    @contextmanager
    def together(self) -> Iterator[None]:
        """Searches in it keep their finished spans until the last one has ended: where one is stopped, those before it
        are not made again, either."""
        if self._held is not None:
            yield
            return
        held = self._held = {}
        try:
            yield
            for parts in held:
                shutil.rmtree(parts, ignore_errors=True)
        finally:
            self._held = None
            for lock in held.values():
                lock.remove()

    def _merged(self, queries: Embeddings, k: int, spans: range, progress: str) -> Lists:
        """The best k of all spans' files, which are merged as they come."""
        parts = self._parts(queries, k, spans.step)
        best = (np.full((len(queries), k), -np.inf, np.float32), np.full((len(queries), k), -1, np.int64))
        with progress_bar(progress, total=len(self), unit="passages") as bar:
            waiting: list[Path] = []
            size, most = 0, max(WAITING, RESULT * len(queries) * k)
            for start, path, results in self._made(parts, k, spans):
                waiting.append(path)
                size += RESULT * results + OFFSET * len(queries)
                if size >= most:  # sorted again once for every such part, not for every file
                    best, waiting, size = joined(best, waiting, k), [], 0
                bar.update(min(spans.step, len(self) - start))
        return joined(best, waiting, k) if waiting else best

    def _parts(self, queries: Embeddings, k: int, span: int) -> Path:
        """The folder of this search's spans, held for this process; with the queries in it."""
        note = self.file.with_name(f"{self.file.name}.json")
        of = json.loads(note.read_text(encoding="utf-8"))["sha256"] if note.is_file() else files.sha256(self.file)
        digest = hashlib.sha256(f"{of} {k} {span} {queries.shape}".encode())
        for block in blocks(queries):
            digest.update(block.data)
        parts = self.file.with_name(f".{self.file.name}.{digest.hexdigest()[:16]}.search")
        assert self._held is not None, "within `together`"
        if parts not in self._held:
            self._held[parts] = files.Lock(parts.parent, parts.name)
        parts.mkdir(exist_ok=True)
        if not (parts / "queries.npy").exists():
            with files.whole(parts / "queries.npy") as partial:
                write_npy(partial, queries.shape, blocks(queries))
        return parts

    def _made(self, parts: Path, k: int, spans: range) -> Iterator[tuple[int, Path, int]]:
        """First row, file and number of results of every span: those that are there, then the workers'."""
        there = whole_parts(parts, spans, ".npz")
        for start, path in there.items():
            yield start, path, _results(path)
        todo = [{"start": start, "stop": min(start + spans.step, len(self))} for start in spans if start not in there]
        if todo:
            job = SearchJob(
                str(self.file.absolute()), str((parts / "queries.npy").absolute()), len(self), str(parts.absolute()), k
            )
            with closing(self.cluster.map(self.worker, (job,), todo, threads=True)) as answers:
                for answer in answers:
                    yield answer["start"], arrived(parts / answer["file"]), answer["results"]


def search_splits(
    index: ShardedIndex, queries: np.ndarray, asked: Mapping[str, tuple[np.ndarray, int]]
) -> dict[str, Lists]:
    """The lists of several splits: one job for each depth, or one for all where that keeps little more than is asked.

    A split that is searched deeper than it asks for costs memory and time that nobody uses; a job costs its start, and
    reads all embeddings once.

    Args:
        queries: embeddings of all queries.
        asked: for each split its rows of ``queries``, and passages a query.
    """
    found: dict[str, Lists] = {}
    with index.together():
        for depth, splits in jobs({split: (len(rows), depth) for split, (rows, depth) in asked.items()}):
            sizes = [len(asked[split][0]) for split in splits]
            scores, rows = index.search(
                Chosen(queries, np.concatenate([asked[split][0] for split in splits])), depth,
                progress=f"search {', '.join(splits)}",
            )  # fmt: skip
            for split, end, size in zip(splits, np.cumsum(sizes), sizes, strict=True):
                part = (slice(end - size, end), slice(asked[split][1]))
                found[split] = (scores[part], rows[part])
    return found


def jobs(asked: Mapping[str, tuple[int, int]]) -> list[tuple[int, list[str]]]:
    """Depth and splits of each search, by depth.  ``asked``: queries of each split, and passages a query."""
    deepest = max(depth for _, depth in asked.values())
    more = sum(queries * (deepest - depth) for queries, depth in asked.values())
    if more <= _MORE:
        return [(deepest, list(asked))]
    depths = sorted({depth for _, depth in asked.values()})
    return [(depth, [split for split, (_, own) in asked.items() if own == depth]) for depth in depths]


def span_of(rows: int, least: int, work: int = 0) -> int:
    """Rows of a span: as for 64 spans, less where that is too much work, not under ``least``, in whole blocks of the
    search in one process.

    Args:
        work: multiplications for one row: queries x dimensions.
    """
    wanted = max(least, min(-(-rows // _SPANS), _WORK // max(1, work)))
    unit = SCANNED if wanted >= SCANNED else _UNIT
    return wanted if wanted < unit else -(-wanted // unit) * unit


def _results(path: Path) -> int:
    """Results in a span's file."""
    with np.load(path, allow_pickle=False) as found:
        return int(found["offsets"][-1])


def joined(best: Lists, paths: Sequence[Path], k: int) -> Lists:
    """The best k with these spans' files; only lists that they add to are sorted again, some queries at a time.

    Takes the files' size, 8 bytes a query, and what `CELLS` says; one query's results are not divided.
    """
    spans = []
    added = np.zeros(len(best[0]), np.int64)  # to each list
    for path in paths:
        with np.load(path, allow_pickle=False) as found:
            spans.append((found["offsets"], found["scores"], found["rows"]))
        added += np.diff(spans[-1][0])
    for start, stop in _ranges(added, k):
        width = int(added[start:stop].max())
        if not width:
            continue
        padded = np.full((stop - start, width), -np.inf, np.float32), np.full((stop - start, width), -1, np.int64)
        filled = np.zeros(stop - start, np.int64)
        for offsets, scores, rows in spans:
            part, own = slice(offsets[start], offsets[stop]), np.diff(offsets[start : stop + 1])
            at = np.repeat(np.arange(stop - start), own)
            place = np.arange(len(at)) - np.repeat(np.cumsum(own) - own, own) + filled[at]
            padded[0][at, place], padded[1][at, place] = scores[part], rows[part]
            filled += own
        touched = start + np.flatnonzero(filled)
        some = padded[0][touched - start], padded[1][touched - start]
        best[0][touched], best[1][touched] = merged((best[0][touched], best[1][touched]), some, k)
    return best


def _ranges(added: np.ndarray, k: int) -> Iterator[tuple[int, int]]:
    """Ranges of lists, in order, that have at most `CELLS` results when each is filled up to the longest, or are one.

    Args:
        added: int64 [Q], results that join each list's k.
    """
    start, most = 0, max(1, CELLS // k)
    while start < len(added):
        widest = k + np.maximum.accumulate(added[start : start + most])
        fits = int(np.searchsorted(widest * np.arange(1, len(widest) + 1), CELLS, side="right"))
        yield start, (start := start + max(1, fits))


def _shared(path: Path) -> Path:
    """A path that must be there on this node, too."""
    if not path.exists():
        raise InputError("this node does not see a file of the job", where=str(path), fix=_SHARED)
    return path
