"""Search by inner product over passage embeddings. The only home of faiss.

Exact by default: nothing is lost, and an approximate index would have to be built again after every refresh. By size
where that is asked for (`choose_kind`). Rows are passage rows of the corpus; equal scores are ordered by row number, so
that a list never depends on threads or block sizes. The passages may also lie in Milvus.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, Literal, Protocol, cast

import numpy as np

from sparring.log import progress as progress_bar
from sparring.machine import give_back
from sparring.phases import sieve
from sparring.phases.vectors import BLOCK, Embeddings, blocks, finite
from sparring.stores.card import Card
from sparring.stores.milvus import Collection, Milvus
from sparring.types import InputError

logger = logging.getLogger("sparring")

Kind = Literal["exact", "hnsw", "ivf"]
Lists = tuple[np.ndarray, np.ndarray]
"""Scores [Q, K] and rows [Q, K], best first."""

EXACT_PASSAGES, EXACT_QUERIES, HNSW_PASSAGES = 100_000, 20_000, 2_000_000
"""The size rule: see `choose_kind`."""
HNSW_LINKS = 2 * 32 * 4 + 32
"""Bytes that the graph takes for a passage, beside its vector."""
SCANNED = 1 << 17
"""Passages read from a file at a time: 200 MB at 384 dimensions."""

_TIE_SLACK, _TIE_LIMIT = 16, 4096  # rows fetched beyond k to order equal scores by row; doubled up to the limit
_ADD_BLOCK = 65536
_PRODUCT = 2048  # queries x dimension from which on exact search multiplies matrices
_CORE = "OPENBLAS_CORETYPE"
_PROBE = """
import json, faiss, numpy, threadpoolctl
x = numpy.random.default_rng(0).standard_normal((64, 64), dtype="float32")
index = faiss.IndexFlatIP(64); index.add(x); found = index.search(x, 4)[0]
assert numpy.allclose(found, -numpy.sort(-(x @ x.T), axis=1)[:, :4], rtol=1e-4, atol=1e-4)
print(json.dumps([i.get("architecture", "") for i in threadpoolctl.threadpool_info()
                  if i["internal_api"] == "openblas" and "faiss" in i["filepath"]]))
"""


class _Handle(Protocol):
    """What searches: an array, an index of faiss, a collection of Milvus.

    Attributes:
        ntotal, d: passages and dimension.
        most: results that can be had for one query.
        at_once: queries of one call; the progress bar moves with it.
    """

    ntotal: int
    d: int
    most: int
    at_once: int

    def search(self, queries: np.ndarray, k: int) -> Lists:
        """Scores and rows [Q, k], best first; which of the rows with the last score are there is open."""
        ...

    def reconstruct_batch(self, rows: np.ndarray) -> np.ndarray:
        """Rows as they were given, float32."""
        ...

    def write(self, path: Path) -> None:
        """To one file, which `Index.load` reads."""
        ...

    def close(self) -> None:
        """End the connection, where there is one."""
        ...


class _Flat:
    """Brute force over an array that is not copied: one block of passages after another, a running top k.

    Of a file that is memory-mapped for reading, the pages of a block are given back after use, so that a corpus may be
    larger than memory.
    """

    def __init__(self, vectors: np.ndarray, owner: Any = None, of: int = 0) -> None:
        self.vectors, self.owner = vectors, owner  # owner: keeps the memory alive where the array does not
        self.ntotal, self.d = vectors.shape
        self.most, self.at_once, self.of = self.ntotal, BLOCK, max(of, self.ntotal)

    def search(self, queries: np.ndarray, k: int) -> Lists:
        """As `_Handle.search`."""
        scores, rows = None, None
        alone, sift = sieve.suits(self.of, self.d), sieve.pays(len(queries), min(self.of, SCANNED), self.d, k)
        for start in range(0, self.ntotal, SCANNED):
            block = self.block(start, SCANNED)
            best = min(k, len(block))
            if sift:
                floor = np.full(len(queries), -np.inf, np.float32) if scores is None else scores.min(axis=1)
                found, at = _sifted(queries, block, best, floor)
            else:
                found, at = _multiplied(queries, block, best, alone)
            at[at >= 0] += start
            if scores is None or rows is None:
                scores, rows = found, at
                continue
            scores, rows = np.concatenate([scores, found], axis=1), np.concatenate([rows, at], axis=1)
            if scores.shape[1] > k:
                kept = np.argpartition(-scores, k - 1, axis=1)[:, :k]
                scores, rows = np.take_along_axis(scores, kept, 1), np.take_along_axis(rows, kept, 1)
        assert scores is not None, "an index has at least one passage"
        assert rows is not None
        return scores, rows

    def block(self, start: int, size: int) -> np.ndarray:
        """Rows from ``start`` on as contiguous float32; pages of earlier blocks are given back."""
        give_back(self.vectors)
        return np.ascontiguousarray(self.vectors[start : start + size], dtype=np.float32)

    def reconstruct_batch(self, rows: np.ndarray) -> np.ndarray:
        """Rows as they were given, float32."""
        return np.array(self.vectors[rows], dtype=np.float32)

    def write(self, path: Path) -> None:
        """The same passages as an index of faiss."""
        handle = _faiss().IndexFlatIP(self.d)
        for start in range(0, self.ntotal, _ADD_BLOCK):
            handle.add(self.block(start, _ADD_BLOCK))
        _faiss().write_index(handle, str(path))

    def close(self) -> None:
        """Nothing to do."""


def _multiplied(queries: np.ndarray, passages: np.ndarray, k: int, alone: bool) -> Lists:
    """The best k of faiss's matrix products; ``alone``: with scores as `_sifted` has them."""
    faiss = _faiss()
    scores, rows = faiss.knn(queries, passages, k, metric=faiss.METRIC_INNER_PRODUCT)
    return _scored(queries, passages, rows, k) if alone else (scores, rows)


def _sifted(queries: np.ndarray, passages: np.ndarray, k: int, floor: np.ndarray) -> Lists:
    """The best k of what the sieve lets pass, or of all where that is too much. Each score is that of its pair alone,
    whichever way the pair was found. Lists may be without what is below ``floor`` [Q]: they end with row -1."""
    scores, rows = np.empty((len(queries), k), dtype=np.float32), np.empty((len(queries), k), dtype=np.int64)
    left = []
    with closing(sieve.candidates(queries, passages, k, floor)) as parts:
        for part, among, open_ in parts:
            scores[part], rows[part] = _scored(queries[part], passages, among, k)
            left.append(part.start + open_)
    open_ = np.concatenate(left)
    if len(open_):
        scores[open_], rows[open_] = _multiplied(queries[open_], passages, k, alone=True)
    return scores, rows


def _scored(queries: np.ndarray, passages: np.ndarray, among: np.ndarray, k: int) -> Lists:
    """The best k of each query's passages [Q, M], which end with row -1; so do the lists [Q, k], with score -inf."""
    faiss, (count, width) = _faiss(), among.shape
    scores, rows = np.empty((count, k), dtype=np.float32), np.empty((count, k), dtype=np.int64)
    given = [np.ascontiguousarray(part) for part in (queries, passages, among)]  # what follows takes addresses
    x, y, subset, vals, ids = (faiss.swig_ptr(part) for part in (*given, scores, rows))
    faiss.knn_inner_products_by_idx(x, y, subset, passages.shape[1], count, len(passages), width, k, vals, ids, width)
    scores[rows < 0] = -np.inf
    return scores, rows


class _Approximate:
    """A graph or clusters of faiss."""

    def __init__(self, handle: Any, kind: Kind) -> None:
        self.handle, self.kind = handle, kind
        self.ntotal, self.d = int(handle.ntotal), int(handle.d)
        self.most, self.at_once = self.ntotal, BLOCK

    def search(self, queries: np.ndarray, k: int) -> Lists:
        """As `_Handle.search`; ends with row -1 where fewer are found."""
        if self.kind == "hnsw":
            self.handle.hnsw.efSearch = max(128, 2 * k)
        return cast(Lists, self.handle.search(queries, k))

    def reconstruct_batch(self, rows: np.ndarray) -> np.ndarray:
        """Rows as they were given, float32."""
        return cast(np.ndarray, self.handle.reconstruct_batch(rows))

    def write(self, path: Path) -> None:
        """Faiss's own file."""
        _faiss().write_index(self.handle, str(path))

    def close(self) -> None:
        """Nothing to do."""


class _Remote:
    """A collection of Milvus. Rows come back from the embeddings it was made of: not every index there keeps them."""

    def __init__(self, collection: Collection, vectors: np.ndarray) -> None:
        self.collection, self.vectors = collection, vectors
        self.ntotal, self.d = collection.ntotal, collection.d
        self.most, self.at_once = min(collection.ntotal, collection.limit), 1024

    def search(self, queries: np.ndarray, k: int) -> Lists:
        """As `_Handle.search`."""
        return self.collection.search(queries, k)

    def reconstruct_batch(self, rows: np.ndarray) -> np.ndarray:
        """Rows as they were given, float32."""
        return np.array(self.vectors[rows], dtype=np.float32)

    def write(self, path: Path) -> None:
        """Refused."""
        raise InputError("these passages lie on a server: there is no file to write", where=str(path))

    def close(self) -> None:
        """The connection ends."""
        self.collection.server.close()


def require_queries(queries: Embeddings, k: int, dim: int) -> None:
    """InputError unless these can be searched for in embeddings of ``dim`` dimensions."""
    if k < 1:
        raise InputError("a search needs at least one result", where="k", expected="1 or more", got=str(k))
    if len(queries.shape) != 2 or queries.shape[1] != dim:
        raise InputError(
            "queries and index have different dimensions",
            where="query embeddings",
            expected=f"[Q, {dim}]",
            got=str(list(queries.shape)),
            fix="encode the queries with the model that encoded the passages",
        )
    if not finite(queries):
        raise InputError("query embeddings contain NaN or infinity", where="query embeddings")


class Index:
    """Passages searchable by inner product; made by :func:`build_index` or :meth:`load`."""

    def __init__(self, handle: _Handle, kind: Kind) -> None:
        self._handle, self.kind = handle, kind

    def __len__(self) -> int:
        return self._handle.ntotal

    @property
    def dim(self) -> int:
        """Embedding dimension d."""
        return self._handle.d

    def search(self, queries: Embeddings, k: int, *, progress: str = "search") -> tuple[np.ndarray, np.ndarray]:
        """The k passages of highest inner product for every query, best first.

        Args:
            queries: [Q, d], any float type; of a file, a block is in memory at a time.
            k: list length; clipped to the number of passages.
            progress: label of the progress bar.

        Returns:
            (scores float32 [Q, k], rows int64 [Q, k]). Equal scores are ordered by row. An approximate index that
            finds fewer than k fills the end with row -1 and score -inf.

        Raises:
            InputError: k < 1, another dimension than the index, or scores that are not numbers.
        """
        require_queries(queries, k, self.dim)
        k = min(k, len(self))
        if k > self._handle.most:
            limit = f"up to {self._handle.most}"
            raise InputError("more results than a call can ask for", where="k", expected=limit, got=str(k))
        scores = np.empty((len(queries), k), dtype=np.float32)
        rows = np.empty((len(queries), k), dtype=np.int64)
        size = self._handle.at_once
        with progress_bar(progress, total=len(queries), unit="queries") as bar:
            for number, block in enumerate(blocks(queries, size)):
                part = slice(number * size, number * size + len(block))
                scores[part], rows[part] = self._search_block(block, k)
                bar.update(len(block))
        return scores, rows

    def _search_block(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        fetch = min(self._handle.most, k + _TIE_SLACK)
        scores, rows = self._fetch(queries, fetch)
        result = scores[:, :k].copy(), rows[:, :k].copy()
        open_ = np.flatnonzero((scores[:, k - 1] == scores[:, -1]) & (rows[:, -1] >= 0))
        most = min(self._handle.most, k + _TIE_LIMIT)
        while len(open_) and fetch < most:  # more equal scores at rank k than were fetched
            fetch = min(most, 4 * fetch)
            scores, rows = self._fetch(queries[open_], fetch)
            result[0][open_], result[1][open_] = scores[:, :k], rows[:, :k]
            open_ = open_[(scores[:, k - 1] == scores[:, -1]) & (rows[:, -1] >= 0)]
        return result

    def _fetch(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        scores, rows = self._handle.search(queries, k)
        scores[rows < 0] = -np.inf
        open_ = np.flatnonzero((scores[:, :-1] <= scores[:, 1:]).any(axis=1))  # lists with equal scores, or unordered
        some, of_row = scores[open_], rows[open_]
        order = _best_first(some, of_row)
        scores[open_], rows[open_] = np.take_along_axis(some, order, 1), np.take_along_axis(of_row, order, 1)
        return scores, rows

    def vectors(self, rows: np.ndarray) -> np.ndarray:
        """Embeddings of the given passage rows, float32 [len(rows), d], as they were added."""
        rows = np.ascontiguousarray(rows, dtype=np.int64)
        if len(rows) and (rows.min() < 0 or rows.max() >= len(self)):
            raise InputError("a passage row is not in the index", expected=f"0 to {len(self) - 1}", got=str(rows.max()))
        if not len(rows):
            return np.empty((0, self.dim), dtype=np.float32)
        return self._handle.reconstruct_batch(rows)

    def close(self) -> None:
        """End the connection to a server; nothing to do for passages in memory."""
        self._handle.close()

    def save(self, path: str | Path) -> None:
        """Write the index to one file, renamed into place when complete."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
        try:
            self._handle.write(partial)
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | Path) -> Index:
        """Read a file written by :meth:`save`; InputError when it is missing or is no index."""
        fix = "build it with `sparring index`"
        if not Path(path).is_file():
            raise InputError("index file not found", where=str(path), fix=fix)
        faiss = _faiss()
        try:
            handle = faiss.read_index(str(path))
        except RuntimeError as error:
            got = str(error).splitlines()[0]
            raise InputError("not a readable index", where=str(path), got=got, fix=fix) from None
        if isinstance(handle, faiss.IndexHNSW):
            return cls(_Approximate(handle, "hnsw"), "hnsw")
        if isinstance(handle, faiss.IndexIVF):
            return cls(_Approximate(handle, "ivf"), "ivf")
        vectors = faiss.rev_swig_ptr(handle.get_xb(), handle.ntotal * handle.d).reshape(handle.ntotal, handle.d)
        return cls(_Flat(vectors, handle), "exact")


def merged(one: Lists, other: Lists, k: int) -> Lists:
    """The best k of two sets of ranked lists of the same queries, equal scores ordered by row.

    Both are scores [Q, any] and rows [Q, any], filled up with score -inf and row -1; so is what comes back.
    """
    scores, rows = np.concatenate([one[0], other[0]], axis=1), np.concatenate([one[1], other[1]], axis=1)
    order = _best_first(scores, rows)[:, :k]
    return np.take_along_axis(scores, order, 1), np.take_along_axis(rows, order, 1)


def _best_first(scores: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """The order of each list: by falling score, then by row, what is no result last."""
    return np.lexsort((np.where(rows < 0, np.iinfo(np.int64).max, rows), -scores), axis=1)


def build_index(
    embeddings: np.ndarray, *, kind: Kind = "exact", nprobe: int = 64, seed: int = 0, first: int = 0, of: int = 0
) -> Index:
    """Index passage embeddings [N, d] (an array or a memory map; row i is passage row i) for inner product.

    An exact index keeps the array itself, which must not change while it is in use; the others copy it.

    Args:
        kind: "exact" (brute force; the embeddings may be larger than memory when they are memory-mapped), "hnsw"
            (graph with 32 links) or "ivf" (clusters, 4 sqrt(N) of them, of which ``nprobe`` are searched). The
            approximate kinds keep full float32 vectors.
        seed: draws the passages on which the "ivf" clusters are trained.
        first: row of the first embedding in a larger array, for messages.
        of: rows of that array, where they are more: how to search goes by them, so that a pair's score is the same in
            every part.

    Raises:
        InputError: no passages, an unknown kind, or embeddings with NaN or infinity.
    """
    _require_passages(embeddings)
    if kind not in ("exact", "hnsw", "ivf"):
        raise InputError("unknown index kind", where="index kind", expected="exact, hnsw or ivf", got=str(kind))
    flat = _Flat(embeddings, of=of)
    if kind == "exact":
        _require_finite(flat, first)
        return Index(flat, kind)
    handle = _empty(embeddings, kind, nprobe, seed)
    for block in _finite(flat, first):
        handle.add(block)
    if kind == "ivf":
        handle.make_direct_map()
    return Index(_Approximate(handle, kind), kind)


def choose_kind(passages: int, dim: int, queries: int = 0, *, memory: int | None = None) -> Kind:
    """The size rule of ``--index faiss``; the choice and its reason are logged.

    Building an approximate index takes as long as searching exactly with so many queries, whatever the corpus (both
    grow with it): a refresh with fewer queries is faster exact, and loses nothing. docs/scale.md has the measurements.

    Args:
        queries: that will be searched before the passages are encoded again; 0 is unknown, for an index that serves.
        memory: bytes that an approximate index may take; None does not limit it.
    """
    bytes_needed = passages * (4 * dim + HNSW_LINKS)
    asked = f"{queries:,} queries" if queries else "any number of queries"
    kind: Kind = "exact"
    if passages <= EXACT_PASSAGES:
        reason = f"up to {EXACT_PASSAGES:,} passages"
    elif 0 < queries <= EXACT_QUERIES:
        reason = f"up to {EXACT_QUERIES:,} queries building another index takes longer than it saves"
    elif memory is not None and bytes_needed > memory:
        needed, there = f"{bytes_needed / 2**30:.1f}", f"{memory / 2**30:.1f}"
        reason = f"others would take {needed} GiB of the {there} to be had; exact search streams from files"
    elif passages <= HNSW_PASSAGES:
        kind, reason = "hnsw", f"above {EXACT_PASSAGES:,} and up to {HNSW_PASSAGES:,} passages, for many queries"
    else:
        kind, reason = "ivf", f"above {HNSW_PASSAGES:,} passages"
    logger.info("index: %s for %s passages and %s (%s)", kind, f"{passages:,}", asked, reason)
    return kind


def build_remote(embeddings: np.ndarray, uri: str, alias: str, card: Card) -> Index:
    """Passage embeddings [N, d] as a new collection of Milvus, which the alias then stands for (`Milvus.make`).

    The embeddings must not change while the index is in use; `Index.close` ends the connection.

    Args:
        uri: of a server, or a file of milvus-lite.
        card: says the kind of index; ``rows`` and ``dim`` are those of the embeddings.

    Raises:
        InputError: as `build_index`, and whatever the server refuses; the alias is then as it was.
    """
    _require_passages(embeddings)
    _require_finite(_Flat(embeddings))
    server = Milvus(uri)
    try:
        found = server.make(alias, embeddings, card, alone=True)
    except BaseException:
        server.close()
        raise
    return Index(_Remote(found, embeddings), cast(Kind, card.index))


def _require_passages(embeddings: np.ndarray) -> None:
    if embeddings.ndim != 2 or not embeddings.size:
        raise InputError("no passages to index", where="embeddings", expected="[N, d]", got=str(list(embeddings.shape)))


def _require_finite(flat: _Flat, first: int = 0) -> None:
    for _ in _finite(flat, first):
        pass


def _finite(flat: _Flat, first: int = 0) -> Iterator[np.ndarray]:
    """Blocks of the passages; InputError names the first row that is not finite, counted from ``first``."""
    for start in range(0, flat.ntotal, _ADD_BLOCK):
        block = flat.block(start, _ADD_BLOCK)
        bad = np.flatnonzero(~np.isfinite(block).all(axis=1))
        if len(bad):
            where = f"passage row {first + start + bad[0]}"
            raise InputError("an embedding contains NaN or infinity", where=where, fix="encode it again in fp32")
        yield block


def _empty(embeddings: np.ndarray, kind: Kind, nprobe: int, seed: int) -> Any:
    """An approximate index of the right kind without passages; "ivf" is trained."""
    faiss, (count, dim) = _faiss(), embeddings.shape
    if kind == "hnsw":
        handle = faiss.IndexHNSWFlat(dim, 32, faiss.METRIC_INNER_PRODUCT)
        handle.hnsw.efConstruction = 80
        return handle
    clusters = max(1, min(int(4 * np.sqrt(count)), count // 39))
    handle = faiss.IndexIVFFlat(faiss.IndexFlatIP(dim), dim, clusters, faiss.METRIC_INNER_PRODUCT)
    handle.nprobe = min(nprobe, clusters)
    sample = np.sort(np.random.default_rng(seed).choice(count, min(count, 256 * clusters), replace=False))
    handle.train(np.ascontiguousarray(embeddings[sample], dtype=np.float32))
    return handle


@functools.cache
def _faiss() -> Any:
    """faiss, imported late and with the right matrix kernels.

    The OpenBLAS inside some faiss-cpu wheels does not know recent CPUs and falls back to SSE3 kernels ("Prescott"),
    although they could use AVX2 or AVX-512. The kernels can be chosen only before the first import and a wrong choice
    crashes, so a child process tries first. A faiss that someone else imported is left as it is.
    """
    if "faiss" in sys.modules:
        return sys.modules["faiss"]
    core, reason = _choose_core()
    logger.info("faiss matrix kernels: %s (%s)", core or "its own choice", reason)
    if core is None:
        import faiss

        _multiply_early(faiss)
        return faiss
    os.environ[_CORE] = core  # not set before: see _choose_core. numpy's own OpenBLAS is loaded already
    try:
        import faiss
    finally:
        del os.environ[_CORE]
    faiss.cvar.distance_compute_blas_database_bs = 8192
    faiss.cvar.distance_compute_blas_query_bs = 1024
    _multiply_early(faiss)
    return faiss


def _multiply_early(faiss: Any) -> None:
    """Matrix products also for a few hundred queries or a small dimension.

    From faiss 1.15 on, they begin at queries x dimension = 128,000 (before: at 20 queries). Below it every pair is
    computed alone, 5 to 11 times slower with 500 queries of 64 or 128 dimensions.
    """
    faiss.cvar.distance_compute_blas_threshold = min(faiss.cvar.distance_compute_blas_threshold, _PRODUCT)


def _choose_core() -> tuple[str | None, str]:
    """OpenBLAS kernels to ask for (None: leave them) and the reason. Two child processes, side by side."""
    if _CORE in os.environ:
        return None, f"{_CORE} is set by the user"
    wanted = _best_core(_cpu_flags())
    if wanted is None or not sys.executable:
        return None, "no better kernels are known for this CPU"
    environments = ({**os.environ}, {**os.environ, _CORE: wanted})
    plain, changed = [
        subprocess.Popen([sys.executable, "-c", _PROBE], env=e, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        for e in environments
    ]
    before, after = _answer(plain), _answer(changed)
    if "prescott" not in before:
        return None, f"it picks {', '.join(before) or 'no OpenBLAS'} here"
    if after != [wanted.lower()]:
        return None, f"it picks Prescott, and a trial of {wanted} failed: exact search keeps SSE3 kernels"
    return wanted, "it would pick Prescott (SSE3) on this CPU; a trial gave equal results"


def _answer(process: subprocess.Popen[bytes]) -> list[str]:
    try:
        output, _ = process.communicate(timeout=60)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return []
    return [str(a).lower() for a in json.loads(output)] if process.returncode == 0 else []


def _cpu_flags() -> frozenset[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line.split(":", 1)[1] for line in lines if line.startswith("flags")), "").split())


def _best_core(flags: frozenset[str]) -> str | None:
    """OpenBLAS's name of the best kernels that a CPU with these flags can certainly run."""
    if {"avx512f", "avx512bw", "avx512dq", "avx512vl"} <= flags:
        return "SkylakeX"
    return "Haswell" if {"avx2", "fma"} <= flags else None
