"""Milvus, a server or a file of milvus-lite, through pymilvus. The only home of pymilvus.

A collection is made under a name of its own, filled, indexed and counted; then an alias is moved to it in one call and
the collection before is dropped. Whoever asks the alias sees the old vectors or all of the new ones. Every call has a
time limit and stays under the server's limits.
"""

from __future__ import annotations

import logging
import os
import re
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from sparring.files import DAY, make_parents
from sparring.log import progress as progress_bar
from sparring.stores.address import check_milvus
from sparring.stores.card import Card, missing, nothing_there, read_card
from sparring.types import InputError

logger = logging.getLogger("sparring")

CONNECT, CALL = 10.0, 60.0
"""Seconds for a connection, and for any call that moves at most `_MESSAGE` bytes."""
BUILD, BUILD_ROW = 300.0, 0.005
"""Seconds for an index to be built or loaded: so many, and so many for each passage."""
SEARCH = 300.0
"""Seconds for one call of a search; calls are made smaller long before (`_SLOW`)."""
LARGEST = 16384
"""The server's limit for the queries of one call, and for the results of one query."""
SAFE = "nothing is half-published"
TOKEN = "SPARRING_MILVUS_TOKEN"

_MESSAGE, _RESULTS = 1 << 24, 1 << 19  # bytes of an insert (limit: 64 MB), results of a call
_FIRST, _FAST, _SLOW = 64, 5.0, 20.0  # queries of the first call; a call's seconds from which on calls grow or shrink
_CARD = "sparring.card"
_ALIAS = "an alias that sparring made"
_QUIET = ("pymilvus", "milvus_lite")  # they print tracebacks of errors that are told here


class Milvus:
    """A connection. Close it, or use it as a context manager.

    Raises: InputError when pymilvus is missing, the URI is none, or nothing answers there in time.
    """

    def __init__(self, uri: str) -> None:
        check_milvus(uri)
        self.uri, self.lite = uri, "://" not in uri
        try:
            import pymilvus
        except ImportError:
            raise missing("pymilvus", "milvus") from None
        self._library = pymilvus
        if self.lite:
            _prepare(Path(uri))
        with self._told("connecting", (ValueError, OSError)):
            token = os.environ.get(TOKEN, "")
            self.client = pymilvus.MilvusClient(uri, token=token, timeout=CONNECT, dedicated=True)

    def __enter__(self) -> Milvus:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the connection; a file of milvus-lite is free for another process then."""
        with _quiet(), suppress(Exception):
            self.client.close()
        if self.lite:
            from milvus_lite.server_manager import server_manager_instance

            with _quiet():
                server_manager_instance.release_server(self.uri)

    def call(self, name: str, *arguments: Any, seconds: float = 0, **options: Any) -> Any:
        """A method of the client with a time limit, `CALL` unless another is given.

        Raises: InputError with what the server said.
        """
        with self._told(name.replace("_", " ")):
            return getattr(self.client, name)(*arguments, timeout=seconds or CALL, **options)

    @contextmanager
    def _told(self, doing: str, more: tuple[type[Exception], ...] = ()) -> Iterator[None]:
        import grpc

        with _quiet() as said:
            try:
                yield
            except (self._library.exceptions.MilvusException, grpc.RpcError, *more) as error:
                expected = "a file of milvus-lite that no other process uses" if self.lite else "a server that answers"
                raise InputError(
                    "Milvus did not do what was asked", where=f"milvus:{self.uri}, {doing}", expected=expected,
                    got="; ".join([_words(error), *said]), fix=_fix(self.lite),
                ) from None  # fmt: skip

    # --- what is there ----------------------------------------------------------------------------------------

    def behind(self, alias: str) -> tuple[str, Card] | None:
        """The collection that an alias stands for, and its card; None where there is no alias.

        Raises: InputError when the name is a collection's, or the collection is not one that was made here.
        """
        if not self.call("has_collection", alias):
            return None
        found = self.call("describe_collection", alias)
        where = f"milvus:{self.uri}, {alias}"
        if found["collection_name"] == alias:
            fix = "choose another --name"
            raise InputError("a collection has this name already", where=where, expected=_ALIAS, fix=fix)
        text = found.get("description") or (found.get("properties") or {}).get(_CARD)
        return found["collection_name"], read_card(text, where)

    def open(self, alias: str) -> Collection:
        """The collection behind an alias, ready to be searched; InputError when there is none."""
        found = self.behind(alias)
        if found is None:
            raise nothing_there(f"milvus:{self.uri}, {alias}")
        name, card = found
        self.call("load_collection", name, seconds=_patience(card.rows))
        return Collection(self, name, card)

    # --- making one -------------------------------------------------------------------------------------------

    def make(
        self, alias: str, vectors: np.ndarray, card: Card, *, ids: Sequence[str] | None = None, alone: bool = False
    ) -> Collection:
        """A new collection of these vectors behind an alias; the one before is dropped.

        Args:
            vectors: [N, d]; may be memory-mapped.
            card: says the kind of index ("exact", "hnsw", "ivf") too; kept with the collection.
            ids: primary keys; None takes the rows' numbers.
            alone: no other process works on this alias: leftovers are dropped at once, else after a day.

        Raises: InputError; the alias is then as it was, and the new collection dropped if the server still answers.
        """
        before = self.behind(alias)
        self._sweep(alias, alone, keep=before[0] if before else "")
        name = f"{alias}__{int(time.time()):010d}_{secrets.token_hex(4)}"
        try:
            self._fill(name, vectors, card, ids)
            self.call("alter_alias" if before else "create_alias", name, alias)
        except BaseException:
            if not self._is_behind(alias, name):  # the server may have done what it could not say any more
                self._forget(name)
            raise
        if before is not None:
            self._forget(before[0])
        return Collection(self, name, card)

    def _fill(self, name: str, vectors: np.ndarray, card: Card, ids: Sequence[str] | None) -> None:
        kind, options = ("FLAT", {}) if self.lite else _index(card.index, len(vectors))
        self.call(
            "create_collection", name, schema=self._schema(card, ids), consistency_level="Strong",
            properties={_CARD: card.text()},
        )  # fmt: skip
        rows = max(1, _MESSAGE // (4 * vectors.shape[1] + 256))
        with progress_bar("milvus: insert", total=len(vectors), unit="passages") as bar:
            for start in range(0, len(vectors), rows):
                block = np.asarray(vectors[start : start + rows], dtype=np.float32)
                keys = range(start, start + len(block)) if ids is None else ids[start : start + len(block)]
                self.call("insert", name, [{"id": key, "vector": v} for key, v in zip(keys, block, strict=True)])
                bar.update(len(block))
        patience = _patience(len(vectors))
        self.call("flush", name, seconds=patience)
        with self._told("describe an index"):
            wanted = self.client.prepare_index_params()
            wanted.add_index("vector", index_type=kind, metric_type="IP", params=options)
        self.call("create_index", name, wanted, seconds=patience)
        self.call("load_collection", name, seconds=patience)
        count = self.call("query", name, output_fields=["count(*)"], consistency_level="Strong")[0]["count(*)"]
        if count != len(vectors):
            where = f"milvus:{self.uri}, {name}"
            expected, fix = f"{len(vectors)} passages", "run the same command again"
            raise InputError(
                "the server does not hold what was sent", where=where, expected=expected, got=str(count), fix=fix
            )

    def _schema(self, card: Card, ids: Sequence[str] | None) -> Any:
        """The card is the description: servers of 2.3 lose properties when they start again; milvus-lite knows no
        descriptions and keeps properties."""
        kinds = self._library.DataType
        schema = self.client.create_schema(auto_id=False, enable_dynamic_field=False, description=card.text())
        if ids is None:
            schema.add_field("id", kinds.INT64, is_primary=True)
        else:
            longest = max((len(name.encode()) for name in ids), default=1)
            schema.add_field("id", kinds.VARCHAR, is_primary=True, max_length=max(64, longest))
        schema.add_field("vector", kinds.FLOAT_VECTOR, dim=card.dim)
        return schema

    def _is_behind(self, alias: str, name: str) -> bool:
        try:
            found = self.behind(alias)
        except InputError:
            return False
        return found is not None and found[0] == name

    def _forget(self, name: str) -> None:
        """Drop a collection; where the server does not answer any more it is dropped by a later call of `make`."""
        try:
            self.call("drop_collection", name, seconds=CONNECT)
        except InputError as error:
            logger.warning("%s could not be dropped (%s): a later refresh or publication drops it", name, error.got)

    def _sweep(self, alias: str, alone: bool, keep: str) -> None:
        """Drop collections of this alias that stopped processes left."""
        ours = re.compile(re.escape(alias) + r"__(\d{10})_[0-9a-f]{8}")
        for name in self.call("list_collections"):
            made = ours.fullmatch(name)
            if made and name != keep and (alone or time.time() - int(made[1]) > DAY):
                self._forget(name)


class Collection:
    """A collection that is filled and loaded. Offers what :class:`sparring.phases.index.Index` asks of an index."""

    limit = LARGEST

    def __init__(self, server: Milvus, name: str, card: Card) -> None:
        self.server, self.name, self.card = server, name, card
        self.ntotal, self.d, self._queries = card.rows, card.dim, _FIRST

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Scores and rows [Q, k], best first; row -1 where an approximate index found fewer."""
        scores = np.full((len(queries), k), -np.inf, dtype=np.float32)
        rows = np.full((len(queries), k), -1, dtype=np.int64)
        for i, (found, at) in enumerate(self.lists(queries, k)):
            scores[i, : len(at)], rows[i, : len(at)] = found, at
        return scores, rows

    def lists(self, queries: np.ndarray, k: int) -> Iterator[tuple[list[float], list[Any]]]:
        """(scores, primary keys) of each query, best first, at most k.

        Calls start small; while they are answered fast they grow, up to the server's limits.
        """
        width = max(128, 2 * k)
        kind = "exact" if self.server.lite else self.card.index
        probes = min(64, _index("ivf", self.ntotal)[1]["nlist"])
        options = {"hnsw": {"ef": min(width, 32768)}, "ivf": {"nprobe": probes}}.get(kind, {})
        start = 0
        while start < len(queries):
            size = max(1, min(self._queries, LARGEST, _RESULTS // k))
            block, began = queries[start : start + size], time.monotonic()
            answer = self.server.call(
                "search", self.name, np.ascontiguousarray(block, dtype=np.float32),
                limit=k, output_fields=["id"], search_params={"metric_type": "IP", "params": options}, seconds=SEARCH,
            )  # fmt: skip
            took = time.monotonic() - began
            self._check(answer, len(block), k)
            if took < _FAST:
                self._queries = min(2 * size, LARGEST)
            elif took > _SLOW:
                self._queries = max(1, size // 2)
            for hits in answer:
                yield list(hits.distances), list(hits.ids)
            start += len(block)

    def _check(self, answer: Sequence[Any], queries: int, k: int) -> None:
        """An exact search finds k passages for every query; a collection that is not loaded finds none."""
        found = min((len(hits.ids) for hits in answer), default=0)
        if len(answer) != queries or (self.card.index == "exact" and found < min(k, self.ntotal)):
            got = f"lists of {len(answer)} queries, the shortest with {found} passages"
            expected = f"{min(k, self.ntotal)} passages for each of {queries} queries"
            where = f"milvus:{self.server.uri}, {self.name}"
            raise InputError("the server answered a search in part", where=where, expected=expected, got=got)


def _index(kind: str, count: int) -> tuple[str, dict[str, int]]:
    """The server's name of a kind of index, and its settings: those of the same kind in memory."""
    if kind == "hnsw":
        return "HNSW", {"M": 32, "efConstruction": 80}
    if kind == "ivf":
        return "IVF_FLAT", {"nlist": max(1, min(int(4 * np.sqrt(count)), count // 39, 65536))}
    return "FLAT", {}


def _patience(count: int) -> float:
    return BUILD + BUILD_ROW * count


def _prepare(path: Path) -> None:
    """milvus-lite is installed, and a folder of its own is there or can be made."""
    try:
        import milvus_lite  # noqa: F401
    except ImportError:
        raise missing("milvus-lite", "milvus") from None
    if path.exists() and not (path.is_dir() and ((path / "collections").is_dir() or not any(path.iterdir()))):
        expected = "a new name ending in .db, or what milvus-lite made"
        raise InputError("this is no database of milvus-lite", where=f"milvus:{path}", expected=expected)
    make_parents(path.parent, f"milvus:{path}")


def _words(error: Exception) -> str:
    """One line of what was said."""
    code: Callable[[], Any] | Any = getattr(error, "code", None)
    details = getattr(error, "details", None)
    if callable(details) and callable(code):  # of gRPC
        return f"{code().name}: {details()}"
    return " ".join(str(getattr(error, "message", "") or error).split())[:300]


def _fix(lite: bool) -> str:
    if lite:
        return "end the process that uses the file, or choose another one; then run the same command again"
    return f"check the address, {TOKEN} and the server's log, then run the same command again; {SAFE}"


@contextmanager
def _quiet() -> Iterator[list[str]]:
    """Keep the libraries' own logs of errors back.  -> what milvus-lite said of them"""
    said: list[str] = []

    class Kept(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.exc_info and record.exc_info[1] is not None:
                said.append(str(record.exc_info[1])[:200])

    kept, loggers = Kept(), [logging.getLogger(name) for name in _QUIET]
    before = [(one, one.level, one.propagate, one.handlers[:]) for one in loggers]
    loggers[0].setLevel(logging.CRITICAL + 1)
    loggers[1].propagate, loggers[1].handlers[:] = False, [kept]
    try:
        yield said
    finally:
        for one, level, propagate, handlers in before:
            one.setLevel(level)
            one.propagate, one.handlers[:] = propagate, handlers
