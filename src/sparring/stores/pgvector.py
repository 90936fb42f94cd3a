"""PostgreSQL with the pgvector extension, through psycopg. The only home of psycopg.

A publication is one table, made, filled, indexed and renamed into place in one transaction; its card is the table's
comment. Readers see the table before, or all of the new one. What is sent is sent in binary: the same float32 bits.
"""

from __future__ import annotations

import os
import socket
import struct
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np

from sparring.log import progress as progress_bar
from sparring.stores.card import Card, missing, nothing_there, read_card
from sparring.types import InputError

CONNECT, CALL = 10, 60.0
"""Seconds for a connection, and for anything that does not grow with the passages."""
BUILD, BUILD_ROW = 300.0, 0.02
"""Seconds for the whole of a publication: so many, and so many for each passage (building HNSW is slow)."""
LARGEST_INDEXED = 2000
"""Dimensions that pgvector can index; wider vectors are searched exactly."""

_BLOCK = 1024
_ALIVE = {"keepalives": 1, "keepalives_idle": 10, "keepalives_interval": 5, "keepalives_count": 3}
_HEAD, _END = b"PGCOPY\n\xff\r\n\0" + struct.pack("!ii", 0, 0), struct.pack("!h", -1)


class Postgres:
    """A connection. Use it as a context manager: what was not committed is rolled back.

    Args:
        dsn: as libpq reads it, ``postgresql://...`` or ``host=... dbname=...``; it is in no message. A password is
            better left to ``~/.pgpass`` or PGPASSWORD.

    Raises: InputError when psycopg is missing, the settings cannot be read, or nothing answers there in time.
    """

    def __init__(self, dsn: str) -> None:
        try:
            import psycopg
            import psycopg.sql
        except ImportError:
            raise missing("psycopg", "pgvector") from None
        self._library, self.where = psycopg, "pgvector"
        with self._told("connecting"):
            parts = psycopg.conninfo.conninfo_to_dict(dsn)
            self.where = f"pgvector:{parts.get('host') or 'local'}/{parts.get('dbname') or parts.get('user') or ''}"
            self.connection = psycopg.connect(
                dsn, connect_timeout=CONNECT, tcp_user_timeout=int(1000 * CALL), application_name="sparring", **_ALIVE
            )

    def __enter__(self) -> Postgres:
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(self._library.Error):
            self.connection.close()

    # --- what is there ----------------------------------------------------------------------------------------

    def card(self, name: str) -> Card | None:
        """The card of a table, None where there is no such table; InputError for a table that was not published."""
        with self._told("reading the card"), self._limit(CALL):
            row = self.connection.execute(
                "SELECT oid IS NOT NULL, obj_description(oid, 'pg_class') FROM to_regclass(quote_ident(%s)) AS oid",
                (name,),
            ).fetchone()
        assert row is not None
        return read_card(row[1], f"{self.where}, table {name}") if row[0] else None

    def open(self, name: str) -> Card:
        """The card of a table that is held for reading until the connection ends; InputError where there is none."""
        found = self.card(name)
        if found is None:
            raise nothing_there(f"{self.where}, table {name}")
        with self._told("opening the table"), self._limit(CALL):
            self._run("LOCK TABLE {} IN ACCESS SHARE MODE", name)
        again = self.card(name)
        assert again is not None
        return again

    def search(self, name: str, queries: np.ndarray, k: int, card: Card) -> Iterator[tuple[list[float], list[str]]]:
        """(scores, ids) of each query [Q, d], best first, at most k."""
        text = "SELECT id, -(vector <#> %s::vector) AS score FROM {} ORDER BY vector <#> %s::vector LIMIT %s"
        with self._told("searching"):
            with self._limit(CALL):
                for setting, value in _settings(card, k).items():
                    self.connection.execute("SELECT set_config(%s, %s, false)", (setting, value))
            for query in np.asarray(queries, dtype=np.float32):
                vector = "[" + ",".join(map(repr, query.tolist())) + "]"
                with self._limit(CALL):
                    found = self._run(text, name, (vector, vector, k)).fetchall()
                found.sort(key=lambda pair: (-pair[1], pair[0]))
                yield [float(score) for _, score in found], [str(key) for key, _ in found]

    # --- making one -------------------------------------------------------------------------------------------

    def make(self, name: str, vectors: np.ndarray, card: Card, ids: Sequence[str]) -> None:
        """A table of these vectors under a name, in one transaction; a table published there before is dropped.

        Raises: InputError; nothing has changed then.
        """
        new, patience = f"{name}__{os.getpid()}", BUILD + BUILD_ROW * len(vectors)
        with self._told("publishing"), self._limit(patience):
            self._extension()
            self._run(f"CREATE TABLE {{}} (id text PRIMARY KEY, vector vector({vectors.shape[1]:d}) NOT NULL)", new)
            with self.connection.cursor() as cursor:
                copying = self._library.sql.SQL("COPY {} (id, vector) FROM STDIN (FORMAT BINARY)")
                with cursor.copy(copying.format(self._library.sql.Identifier(new))) as copy:
                    for part in _binary(vectors, ids):
                        copy.write(part)
            if (method := _method(card)) is not None:
                self._run(f"CREATE INDEX ON {{}} USING {method}", new)
            count = self._run("SELECT count(*) FROM {}", new).fetchone()[0]
            if count != len(vectors):
                raise InputError("the server does not hold what was sent", where=self.where, got=str(count))
            self._run("DROP TABLE IF EXISTS {}", name)
            sql = self._library.sql
            self.connection.execute(
                sql.SQL("ALTER TABLE {} RENAME TO {}").format(sql.Identifier(new), sql.Identifier(name))
            )
            self.connection.execute(
                sql.SQL("COMMENT ON TABLE {} IS {}").format(sql.Identifier(name), sql.Literal(card.text()))
            )
            self.connection.commit()

    def _extension(self) -> None:
        try:
            self.connection.execute("CREATE EXTENSION IF NOT EXISTS vector")
        except self._library.Error as error:
            raise InputError(
                "the database has no pgvector extension", where=self.where, got=_words(error),
                fix="install pgvector on the server and run CREATE EXTENSION vector there",
            ) from None  # fmt: skip

    def _run(self, text: str, name: str, values: Sequence[Any] | None = None) -> Any:
        sql = self._library.sql
        return self.connection.execute(sql.SQL(text).format(sql.Identifier(name)), values)

    @contextmanager
    def _told(self, doing: str) -> Iterator[None]:
        try:
            yield
        except self._library.Error as error:
            raise InputError(
                "PostgreSQL did not do what was asked", where=f"{self.where}, {doing}",
                expected="a server that answers", got=_words(error),
                fix="check the address and the server's log, then run it again; nothing is half-published",
            ) from None  # fmt: skip

    @contextmanager
    def _limit(self, seconds: float) -> Iterator[None]:
        """End the connection when this takes longer, also where the server hangs; psycopg then raises."""

        def cut() -> None:
            with suppress(OSError), socket.socket(fileno=os.dup(self.connection.fileno())) as held:
                held.shutdown(socket.SHUT_RDWR)

        timer = threading.Timer(seconds, cut)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()


def _method(card: Card) -> str | None:
    """How the vectors are indexed; None is not at all."""
    if card.dim > LARGEST_INDEXED or card.index == "exact":
        return None
    if card.index == "hnsw":
        return "hnsw (vector vector_ip_ops) WITH (m = 32, ef_construction = 80)"
    return f"ivfflat (vector vector_ip_ops) WITH (lists = {min(32768, int(4 * card.rows**0.5)):d})"


def _settings(card: Card, k: int) -> dict[str, str]:
    if _method(card) is None:
        return {}
    if card.index == "hnsw":
        return {"hnsw.ef_search": str(min(1000, max(128, 2 * k))), "hnsw.iterative_scan": "relaxed_order"}
    return {"ivfflat.probes": "64"}


def _binary(vectors: np.ndarray, ids: Sequence[str]) -> Iterator[bytes]:
    """PostgreSQL's binary copy format: fields (text, vector), each with its length; big-endian."""
    dim = vectors.shape[1]
    yield _HEAD
    with progress_bar("pgvector: copy", total=len(vectors), unit="passages") as bar:
        for start in range(0, len(vectors), _BLOCK):
            block = np.asarray(vectors[start : start + _BLOCK], dtype=np.float32).astype(">f4")
            parts = []
            for name, vector in zip(ids[start : start + len(block)], block, strict=True):
                key = name.encode()
                parts.append(struct.pack("!hi", 2, len(key)) + key + struct.pack("!ihh", 4 + 4 * dim, dim, 0))
                parts.append(vector.tobytes())
            yield b"".join(parts)
            bar.update(len(block))
    yield _END


def _words(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
