"""Milvus as a file and as a server, by the same tests: search against NumPy, aliases, limits, refusals, a crash."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from server_fixtures import MilvusProcess
from sparring.phases.index import build_index, build_remote
from sparring.stores import milvus as module
from sparring.stores.milvus import Milvus
from sparring.types import InputError
from store_fixtures import best, card, drawn

pymilvus = pytest.importorskip("pymilvus", reason="pymilvus is not installed: pip install 'sparring[milvus]'")
slow = pytest.mark.slow


@pytest.fixture
def server(milvus_uri: str) -> Iterator[Milvus]:
    with Milvus(milvus_uri) as connection:
        yield connection
        for name in connection.client.list_collections():
            for alias in connection.client.list_aliases(name)["aliases"]:
                connection.client.drop_alias(alias)
            connection.client.drop_collection(name)


@slow
def test_a_refresh_searches_as_numpy_does_and_the_next_one_takes_its_place(
    server: Milvus, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Inserts and searches go out in many calls; ids of the old collection are gone when the new one is there."""
    monkeypatch.setattr(module, "_MESSAGE", 100 * (4 * 16 + 256))
    first, second, queries = drawn(730), drawn(520, seed=1), drawn(300, seed=2)
    with_first = server.make("run", first, card(first), alone=True)
    index = build_remote(second, server.uri, "run", card(second)) if not server.lite else None
    if index is None:  # a file has one connection at a time
        again = server.make("run", second, card(second), alone=True)
        rows = again.search(queries, 25)[1]
    else:
        scores, rows = index.search(queries, 25)
        assert np.allclose(scores, np.take_along_axis(queries @ second.T, rows, 1), atol=1e-4)
        assert np.array_equal(index.vectors(np.array([5, 3])), second[[5, 3]])
        index.close()
    assert np.array_equal(rows, best(queries, second, 25))
    names = server.client.list_collections()
    assert len(names) == 1
    assert with_first.name not in names
    found = server.behind("run")
    assert found is not None
    assert found == (names[0], card(second))


@slow
def test_lists_equal_those_of_the_index_in_memory_ties_included(milvus_uri: str) -> None:
    rng = np.random.default_rng(3)
    passages = rng.integers(-2, 3, (400, 6)).astype(np.float32)  # products are exact and often equal
    queries = rng.integers(-2, 3, (40, 6)).astype(np.float32)
    remote = build_remote(passages, milvus_uri, "ties", card(passages))
    try:
        for ours, theirs in zip(build_index(passages).search(queries, 17), remote.search(queries, 17), strict=True):
            assert np.array_equal(ours, theirs)
        with pytest.raises(InputError, match="no file to write"):
            remote.save("x.index")
    finally:
        remote.close()


@slow
@pytest.mark.parametrize("kind", ["hnsw", "ivf"])
def test_approximate_kinds_find_most(server: Milvus, kind: str) -> None:
    passages, queries = drawn(3000), drawn(50, seed=1)
    rows = server.make("near", passages, card(passages, index=kind)).search(queries, 10)[1]
    truth = best(queries, passages, 10)
    assert np.mean([len(np.intersect1d(a, b)) / 10 for a, b in zip(rows, truth, strict=True)]) > 0.9


@slow
def test_published_ids_are_any_text_and_scores_are_products(server: Milvus) -> None:
    passages = drawn(40)
    ids = [f'p {i} "한국어" \'' for i in range(40)]
    server.make("help", passages, card(passages), ids=ids)
    ((scores, found),) = server.open("help").lists(passages[7:8], 3)
    assert found == [ids[row] for row in best(passages[7:8], passages, 3)[0]]
    assert scores[0] == pytest.approx(float(passages[7] @ passages[7]), rel=1e-5)


@slow
def test_another_models_vectors_and_others_collections_are_refused(server: Milvus) -> None:
    passages = drawn(30)
    server.make("pair", passages, card(passages, "a"))
    with pytest.raises(InputError, match="made by another model") as caught:
        server.open("pair").card.require("b" * 64, "milvus")
    assert "runs/a" in caught.value.expected
    with pytest.raises(InputError, match="nothing is published"):
        server.open("none")
    server.client.create_collection("foreign", dimension=4)
    with pytest.raises(InputError, match="has this name already"):
        server.make("foreign", passages, card(passages))
    server.client.create_alias("foreign", "theirs")
    with pytest.raises(InputError, match="nothing that `sparring publish` wrote"):
        server.make("theirs", passages, card(passages))
    assert server.client.describe_alias("theirs")["collection_name"] == "foreign"


@slow
def test_a_failure_leaves_what_was_there_and_nothing_else(server: Milvus, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server loses an insert without a word: the count finds it before the alias is moved."""
    first, second = drawn(30), drawn(50, seed=1)
    before = server.make("pair", first, card(first))
    monkeypatch.setattr(module, "_MESSAGE", 10 * (4 * 16 + 256))
    sent = server.client.insert

    def lossy(name: str, rows: list[dict[str, Any]], **options: Any) -> Any:
        return sent(name, rows[1:], **options)

    monkeypatch.setattr(server.client, "insert", lossy)
    with pytest.raises(InputError, match="does not hold what was sent") as caught:
        server.make("pair", second, card(second, "b"))
    assert (caught.value.expected, caught.value.got) == ("50 passages", "45")
    assert server.client.list_collections() == [before.name]
    assert server.open("pair").card == card(first)


@slow
def test_an_alias_that_cannot_be_moved_leaves_no_collection(server: Milvus, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = drawn(30), drawn(50, seed=1)

    def refused(*_: Any, **__: Any) -> None:
        raise pymilvus.MilvusException(message="not now")

    with monkeypatch.context() as patch:
        patch.setattr(server.client, "create_alias", refused)
        with pytest.raises(InputError, match="did not do what was asked"):
            server.make("pair", first, card(first))
    assert server.client.list_collections() == []
    before = server.make("pair", first, card(first))
    monkeypatch.setattr(server.client, "alter_alias", refused)
    with pytest.raises(InputError, match="did not do what was asked"):
        server.make("pair", second, card(second, "b"))
    assert server.client.list_collections() == [before.name]
    assert server.open("pair").card == card(first)


@slow
def test_leftovers_of_stopped_processes_are_dropped_after_a_day(server: Milvus) -> None:
    passages, now = drawn(20), int(time.time())
    old, young, other = f"pair__{now - 90000}_0123abcd", f"pair__{now - 60}_0123abcd", f"pair_x__{now - 90000}_0123abcd"
    for name in (old, young, other):
        server.client.create_collection(name, dimension=4)
    server.make("pair", passages, card(passages))
    assert set(server.client.list_collections()) & {old, young, other} == {young, other}
    server.make("pair", passages, card(passages), alone=True)
    assert set(server.client.list_collections()) & {old, young, other} == {other}


def test_a_list_that_comes_back_short_is_refused() -> None:
    """milvus-lite answers with empty lists where a collection is not loaded."""

    class Empty:
        uri, lite = "x.db", True

        def call(self, *_: Any, **__: Any) -> list[Any]:
            return [type("Hits", (), {"ids": [], "distances": []})()]

    passages = drawn(9)
    with pytest.raises(InputError, match="answered a search in part"):
        module.Collection(Empty(), "c", card(passages)).search(passages[:1], 3)  # type: ignore[arg-type]


def test_calls_stay_under_the_servers_limits_and_grow_while_they_are_fast() -> None:
    sizes: list[int] = []

    class Fast:
        uri, lite = "http://x:1", False

        def call(self, _: str, __: str, block: np.ndarray, *, limit: int, **___: Any) -> list[Any]:
            sizes.append(len(block))
            return [type("Hits", (), {"ids": list(range(limit)), "distances": [0.0] * limit})()] * len(block)

    passages = np.zeros((100, 2), dtype=np.float32)
    many = module.Collection(Fast(), "c", card(passages))  # type: ignore[arg-type]
    assert sum(1 for _ in many.lists(np.zeros((60_000, 2), dtype=np.float32), 1)) == 60_000
    assert sizes[:3] == [64, 128, 256]
    assert max(sizes) == module.LARGEST == 16384
    sizes.clear()
    assert sum(1 for _ in many.lists(np.zeros((20_000, 2), dtype=np.float32), 100)) == 20_000
    assert max(sizes) * 100 <= module._RESULTS


@pytest.mark.parametrize(
    "uri",
    [
        "ftp://host:1",
        "http://",
        "http://host:port",
        "http://host:0",
        "pairs.sqlite",
        "http://[::1",
        "http://host:99999",
    ],
)
def test_what_is_no_place_is_refused_before_anything_is_loaded(uri: str) -> None:
    with pytest.raises(InputError, match="not a place for Milvus"):
        Milvus(uri)


def test_a_password_in_the_uri_is_refused_and_not_repeated() -> None:
    with pytest.raises(InputError, match="password") as caught:
        Milvus("http://root:hunter2@host:19530")
    assert "hunter2" not in str(caught.value)
    assert module.TOKEN in caught.value.fix


@pytest.mark.parametrize("listening", [False, True], ids=["nobody there", "never answers"])
def test_a_server_that_does_not_answer(
    listening: bool, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "CONNECT", 1.0)
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        if listening:
            held.listen()
        began = time.monotonic()
        with pytest.raises(InputError, match="did not do what was asked") as caught:
            Milvus(f"http://127.0.0.1:{held.getsockname()[1]}")
    assert time.monotonic() - began < 15
    assert "connecting" in caught.value.where
    assert "Traceback" not in capfd.readouterr().err


@slow
def test_files_that_are_no_database_or_in_use(tmp_path: Path) -> None:
    text = tmp_path / "text.db"
    text.write_text("no database")
    with pytest.raises(InputError, match="no database of milvus-lite"):
        Milvus(str(text))
    assert text.read_text() == "no database"
    path = tmp_path / "sub" / "held.db"
    code = f"from sparring.stores.milvus import Milvus; Milvus({str(path)!r}); print('held', flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(InputError, match="did not do what was asked") as caught:
            Milvus(str(path))
        assert "no other process uses" in caught.value.expected
        other.communicate(b"\n", timeout=60)
    with Milvus(str(path)) as free:
        assert free.client.list_collections() == []


@pytest.mark.long
@slow
def test_a_server_that_dies_while_vectors_are_sent(
    milvus_server: MilvusProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One error within the time limit; after a restart the alias stands for what was published before."""
    first, second = drawn(300), drawn(2000, seed=1)
    with Milvus(milvus_server.uri) as server:
        server.make("pair", first, card(first))
        monkeypatch.setattr(module, "_MESSAGE", 100 * (4 * 16 + 256))
        monkeypatch.setattr(module, "CALL", 5.0)
        monkeypatch.setattr(module, "CONNECT", 2.0)
        sent, calls = server.client.insert, 0

        def dying(*arguments: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == 4:
                milvus_server.kill()
            return sent(*arguments, **options)

        monkeypatch.setattr(server.client, "insert", dying)
        with pytest.raises(InputError, match="did not do what was asked") as caught:
            server.make("pair", second, replace(card(second), fingerprint="b" * 64))
        assert "insert" in caught.value.where
        assert module.SAFE in caught.value.fix
    monkeypatch.undo()
    milvus_server.start()
    with Milvus(milvus_server.uri) as server:
        found = server.open("pair")
        assert found.card == card(first)
        assert np.array_equal(found.search(first[:5], 4)[1], best(first[:5], first, 4))
        server.make("pair", second, card(second), alone=True)  # and the half-filled collection goes
        assert len(server.client.list_collections()) == 1
