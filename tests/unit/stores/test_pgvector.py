"""pgvector in a real PostgreSQL: the same bits back, search against NumPy, one transaction, refusals."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest

from sparring.stores import pgvector as module
from sparring.stores.pgvector import Postgres
from sparring.types import InputError
from store_fixtures import best, card, drawn

psycopg = pytest.importorskip("psycopg", reason="psycopg is not installed: pip install 'sparring[pgvector]'")
slow = pytest.mark.slow


def tables(dsn: str) -> list[str]:
    with psycopg.connect(dsn) as other:
        found = other.execute("SELECT tablename FROM pg_tables WHERE schemaname = 'public' ORDER BY 1")
        return [name for (name,) in found]


@pytest.fixture
def dsn(postgres: str) -> Iterator[str]:
    yield postgres
    with psycopg.connect(postgres) as other:
        other.execute("DROP SCHEMA public CASCADE; CREATE SCHEMA public")


@slow
def test_what_is_published_comes_back_to_the_bit_and_is_found(dsn: str) -> None:
    passages = drawn(1500)
    passages[3] = [1e-38, -1e38, np.float32(1) / 3, 0, -0.0, *([2.5] * 11)]
    ids = [f'p {i} "한국어" \'\\' for i in range(1500)]
    with Postgres(dsn) as database:
        database.make("help", passages, card(passages), ids)
    with psycopg.connect(dsn) as other:
        stored = dict(other.execute("SELECT id, vector::real[] FROM help").fetchall())
    assert list(stored) == ids
    assert np.array_equal(
        np.array(list(stored.values()), dtype=np.float32).view(np.int32)[3], passages.view(np.int32)[3]
    )
    assert np.array_equal(np.array(list(stored.values()), dtype=np.float32), passages)
    usual = np.delete(passages, 3, axis=0)
    with Postgres(dsn) as database:
        assert database.open("help") == card(passages)
        found = list(database.search("help", passages[7:9], 1500, card(passages)))
    for (scores, keys), query in zip(found, passages[7:9], strict=True):
        expected = np.argsort(-(usual.astype(np.float64) @ query)).tolist()
        order = [ids.index(key) for key in keys if key != ids[3]]
        assert [row - (row > 3) for row in order] == expected
        assert scores == sorted(scores, reverse=True)


@slow
@pytest.mark.parametrize(("kind", "access"), [("hnsw", "hnsw"), ("ivf", "ivfflat"), ("exact", "")])
def test_the_kind_of_index_is_the_cards(dsn: str, kind: str, access: str) -> None:
    passages, queries = drawn(1200), drawn(20, seed=1)
    made, ids = card(passages, index=kind), [str(i) for i in range(1200)]
    with Postgres(dsn) as database:
        database.make("near", passages, made, ids)
    with psycopg.connect(dsn) as other:
        definitions = [text for (text,) in other.execute("SELECT indexdef FROM pg_indexes WHERE tablename = 'near'")]
    assert sum(f"USING {access or 'hnsw'}" in text for text in definitions) == bool(access)
    with Postgres(dsn) as database:
        found = [[int(key) for key in keys] for _, keys in database.search("near", queries, 10, made)]
    truth = best(queries, passages, 10)
    recall = np.mean([len(np.intersect1d(a, b)) / 10 for a, b in zip(found, truth, strict=True)])
    assert recall == 1 if kind == "exact" else recall > 0.9


@slow
def test_another_publication_and_what_is_not_ours(dsn: str) -> None:
    first, second = drawn(30), drawn(20, seed=1)
    with Postgres(dsn) as database:
        assert database.card("pair") is None
        with pytest.raises(InputError, match="nothing is published"):
            database.open("pair")
    for vectors, model in ((first, "a"), (second, "b")):
        with Postgres(dsn) as database:
            database.make("pair", vectors, card(vectors, model), [str(i) for i in range(len(vectors))])
    with Postgres(dsn) as database:
        found = database.card("pair")
        assert found is not None
        assert found == card(second, "b")
        with pytest.raises(InputError, match="made by another model"):
            found.require("a" * 64, "pgvector")
    with psycopg.connect(dsn) as other:
        other.execute("CREATE TABLE theirs (id text)")
    with Postgres(dsn) as database, pytest.raises(InputError, match="nothing that `sparring publish` wrote"):
        database.card("theirs")
    assert tables(dsn) == ["pair", "theirs"]


@slow
def test_a_connection_that_breaks_while_vectors_are_sent(dsn: str) -> None:
    """The server's process for this connection is ended after the first block: nothing of the new table stays."""
    first, second = drawn(30), drawn(5000, seed=1)
    with Postgres(dsn) as database:
        database.make("pair", first, card(first), [str(i) for i in range(30)])

    class Ids(list):
        def __getitem__(self, part):  # type: ignore[no-untyped-def]
            if part.start == 3 * module._BLOCK:
                with psycopg.connect(dsn, autocommit=True) as other:
                    other.execute("SELECT pg_terminate_backend(%s)", (pid,))
                time.sleep(0.5)
            return list.__getitem__(self, part)

    with Postgres(dsn) as database:
        pid = database.connection.info.backend_pid
        with pytest.raises(InputError, match="did not do what was asked") as caught:
            database.make("pair", second, card(second, "b"), Ids(map(str, range(5000))))
    assert "publishing" in caught.value.where
    assert tables(dsn) == ["pair"]
    with Postgres(dsn) as database:
        assert database.card("pair") == card(first)


@slow
def test_a_server_that_hangs_ends_in_an_error(dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another session holds the table; the time limit ends this one."""
    first = drawn(30)
    with Postgres(dsn) as database:
        database.make("pair", first, card(first), [str(i) for i in range(30)])
    monkeypatch.setattr(module, "BUILD", 1.0)
    monkeypatch.setattr(module, "CALL", 1.0)
    with psycopg.connect(dsn) as other:
        other.execute("LOCK TABLE pair IN ACCESS EXCLUSIVE MODE")
        for use in (
            lambda d: d.make("pair", first, card(first, "b"), [str(i) for i in range(30)]),
            lambda d: d.open("pair"),
        ):
            began = time.monotonic()
            with Postgres(dsn) as database, pytest.raises(InputError, match="did not do what was asked"):
                use(database)
            assert time.monotonic() - began < 30
        other.rollback()
    monkeypatch.undo()
    assert tables(dsn) == ["pair"]
    assert threading.active_count() < 20


@pytest.mark.parametrize("listening", [False, True], ids=["nobody there", "never answers"])
def test_a_server_that_does_not_answer(listening: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CONNECT", 2)
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        if listening:
            held.listen()
        dsn = f"postgresql://me:hunter2@127.0.0.1:{held.getsockname()[1]}/help"
        with pytest.raises(InputError, match="did not do what was asked") as caught:
            Postgres(dsn)
    assert caught.value.where == "pgvector:127.0.0.1/help, connecting"
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("dsn", ["postgresql://[", "host=a b=c", "dbname='x"])
def test_settings_that_cannot_be_read(dsn: str) -> None:
    with pytest.raises(InputError, match="did not do what was asked"):
        Postgres(dsn)
