"""`publish` and `ask` with every store by one test; training that searches in Milvus equals training in memory."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli_fixtures import call, settings, write_toy
from safetensors.torch import load_file, save_file

from sparring.data import load
from sparring.data.trec import read_run
from sparring.models import load_retriever
from sparring.phases.encode import encode
from sparring.recipes import publishing
from sparring.recipes.publishing import ask, publish
from sparring.recipes.standalone import autocast_type
from sparring.stores.card import Card, read_card
from sparring.stores.milvus import Milvus
from sparring.types import InputError

pytestmark = pytest.mark.slow

QUERIES = ["reset the password 어떻게", "삭제 the bucket", "list users"]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SPARRING_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def pair(tiny_st: Path, tmp_path: Path) -> Path:
    shutil.copytree(tiny_st, tmp_path / "pair" / "retriever")
    return tmp_path / "pair"


@pytest.fixture
def other(pair: Path, tmp_path: Path) -> Path:
    """The same pair with one weight moved."""
    shutil.copytree(pair, tmp_path / "other")
    (file,) = (tmp_path / "other").rglob("*.safetensors")
    weights = load_file(file)
    weights["embeddings.word_embeddings.weight"] = weights["embeddings.word_embeddings.weight"] + torch.tensor(1e-3)
    save_file(weights, file, metadata={"format": "pt"})
    return tmp_path / "other"


@pytest.fixture(params=["parquet", "faiss", "milvus-lite", pytest.param("milvus", marks=pytest.mark.long), "pgvector"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "milvus":
        return f"milvus:{request.getfixturevalue('milvus_server').uri}"
    if request.param == "pgvector":
        return f"pgvector:{request.getfixturevalue('postgres')}"
    if request.param == "milvus-lite":
        return f"milvus:{tmp_path / 'pair.db'}"
    return f"{request.param}:{tmp_path / 'published'}"


def expected(pair: Path, data: Path, k: int) -> list[list[str]]:
    """Ids by float64 products of the library's own embeddings."""
    model, dtype = load_retriever(pair / "retriever"), autocast_type("auto")
    dataset = load(data)
    passages = encode(model, model.tokenize(dataset.corpus, "passage", None), "passage", dtype=dtype).astype(np.float64)
    queries = encode(model, model.tokenize(QUERIES, "query", None), "query", dtype=dtype).astype(np.float64)
    return [dataset.corpus.ids(np.argsort(-(passages @ q))[:k]) for q in queries]


def test_what_is_published_is_found_by_its_own_model_alone(
    place: str, pair: Path, other: Path, cache: Path, tmp_path: Path
) -> None:
    data = write_toy(tmp_path / "toy")
    refused = call("ask", pair, "anything", "--from", place)
    assert refused.exit_code == 2
    assert "nothing is published there" in refused.stderr
    assert not (tmp_path / "pair.db").exists(), "a question makes no database"
    done = call("publish", pair, data, "--to", place)
    assert done.exit_code == 0, done.stderr
    assert "64 passages x 32, exact" in done.stdout
    assert not list((cache / "publish").iterdir())
    found = json.loads(call("ask", pair, *QUERIES, "--from", place, "-k", 7, "--json").stdout)
    assert [[key for key, _ in hits] for hits in found] == expected(pair, data, 7)
    assert all(score == pytest.approx(1, abs=1) for hits in found for _, score in hits)
    shown = call("ask", pair, QUERIES[0], "--from", place, "-k", 2).stdout
    assert shown.startswith(QUERIES[0])
    assert found[0][0][0] in shown

    assert "nothing to do" in call("publish", pair, data, "--to", place).stdout
    for refused in (call("ask", other, "x", "--from", place), call("publish", other, data, "--to", place)):
        assert refused.exit_code == 2
        assert "another model" in refused.stderr
    assert [key for key, _ in ask(QUERIES[:1], pair / "retriever", place, k=3)[0]] == [k for k, _ in found[0][:3]]
    assert call("publish", other, data, "--to", place, "--replace").exit_code == 0
    answer = json.loads(call("ask", other, *QUERIES, "--from", place, "--json").stdout)
    assert [[key for key, _ in hits] for hits in answer] == expected(other, data, 10)
    assert call("ask", pair, "x", "--from", place).exit_code == 2


def test_a_failure_keeps_the_embeddings_for_the_next_attempt_and_the_old_publication(
    pair: Path, other: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, folder = load(write_toy(tmp_path / "toy")), tmp_path / "published"
    publish(data, pair / "retriever", f"parquet:{folder}")
    before = ask(QUERIES, pair / "retriever", f"parquet:{folder}")

    def broken(path: Path, *_: object) -> None:
        path.with_name(f"{path.name}.part").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("sparring.stores.folder.write_parquet", broken)
        with pytest.raises(OSError, match="No space"):
            publish(data, other / "retriever", f"parquet:{folder}", replace=True)
    assert ask(QUERIES, pair / "retriever", f"parquet:{folder}") == before
    (kept,) = (cache / "publish").iterdir()
    assert (kept / "passages.npy").is_file()
    publish(data, other / "retriever", f"parquet:{folder}", replace=True)
    assert sorted(path.suffix for path in folder.iterdir()) == [".json", ".parquet"]
    assert not kept.exists()


def test_a_second_publication_of_a_pair_does_not_touch_the_first_ones_embeddings(
    pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, model = load(write_toy(tmp_path / "toy")), pair / "retriever"

    def meanwhile(*arguments: Any, **named: Any) -> Any:
        monkeypatch.setattr(publishing, "encode", encode)
        with pytest.raises(InputError, match="another process is writing this file"):
            publish(data, model, f"faiss:{tmp_path / 'second'}")
        return encode(*arguments, **named)

    monkeypatch.setattr(publishing, "encode", meanwhile)
    assert publish(data, model, f"parquet:{tmp_path / 'first'}").new
    assert not (tmp_path / "second").exists()
    assert publish(data, model, f"faiss:{tmp_path / 'second'}").new


def test_other_files_are_not_overwritten_and_damage_is_found(pair: Path, tmp_path: Path) -> None:
    data, folder = load(write_toy(tmp_path / "toy")), tmp_path / "published"
    folder.mkdir()
    (folder / "mine.txt").write_text("mine")
    for store in ("parquet", "faiss"):
        with pytest.raises(InputError, match="used already"):
            publish(data, pair / "retriever", f"{store}:{folder}")
    (folder / "mine.txt").unlink()
    publish(data, pair / "retriever", f"faiss:{folder}")
    with pytest.raises(InputError, match="another kind of publication"):
        publish(data, pair / "retriever", f"parquet:{folder}")
    (ids,) = folder.glob("*.ids.txt")
    ids.write_text(ids.read_text().replace("p1\n", "p0\n", 1))
    with pytest.raises(InputError, match="damaged"):
        ask(QUERIES, pair / "retriever", f"faiss:{folder}")


@pytest.mark.parametrize("what", ["*.parquet", "published.json"])
def test_a_damaged_folder_is_replaced_where_that_is_asked_for(pair: Path, tmp_path: Path, what: str) -> None:
    data, folder = load(write_toy(tmp_path / "toy")), tmp_path / "published"
    place = (data, pair / "retriever", f"parquet:{folder}")
    publish(*place)
    (file,) = folder.glob(what)
    whole = {path.name: path.read_bytes() for path in folder.iterdir()}
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(InputError, match="damaged") as error:
        publish(*place)
    assert "--replace" in error.value.fix
    for mine in ("mine.txt", "passages-of-mine.txt"):
        (folder / mine).write_text("mine")
        with pytest.raises(InputError, match="damaged"):
            publish(*place, replace=True)
        (folder / mine).unlink()
    if what != "published.json":
        with pytest.raises(InputError, match="another kind of publication"):
            publish(*place[:2], f"faiss:{folder}", replace=True)
    assert publish(*place, replace=True).new
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == whole
    assert not publish(*place).new


@pytest.mark.parametrize(
    ("to", "said"),
    [
        ("elastic:x", "a store is a kind and a place"),
        ("parquet:", "a store is a kind and a place"),
        ("milvus:ftp://x", "not a place for Milvus"),
        ("milvus:http://127.0.0.1:1", "did not do what was asked"),
        ("pgvector:host=127.0.0.1 port=1", "did not do what was asked"),
        ("parquet:/proc/nothing/here", "the output cannot be written"),
        ("faiss:/dev/null/here", "the output cannot be written"),
    ],
)
def test_wrong_places_are_found_before_anything_is_encoded(
    to: str, said: str, pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publishing, "encode", lambda *_, **__: pytest.fail("encoded"))
    result = call("publish", pair, write_toy(tmp_path / "toy"), "--to", to)
    assert result.exit_code == 2
    assert said in result.stderr
    assert call("publish", tmp_path, tmp_path / "toy", "--to", "parquet:x").exit_code == 2  # no pair lies there
    name = call("publish", pair, tmp_path / "toy", "--to", "parquet:x", "--name", "a; DROP TABLE")
    assert "not a name for a publication" in name.stderr


@pytest.mark.long
def test_training_that_searches_in_milvus_equals_training_in_memory(
    milvus_uri: str, tiny_st: Path, tiny_ce: Path, tmp_path: Path
) -> None:
    """Every ranked list of every refresh; one collection is left, the last refresh's, behind the run's alias."""
    data = write_toy(tmp_path / "toy")
    models = ("--retriever", tiny_st, "--ranker", tiny_ce)
    short = ("duet.rounds=2", "duet.retriever_steps=2", "duet.ranker_steps=2")
    with Milvus(milvus_uri) as server:
        before = set(server.client.list_collections())  # what other tests have published there
    for name, index in (("memory", "faiss"), ("milvus", f"milvus:{milvus_uri}")):
        done = call("train", data, *models, "--out", tmp_path / name, "--index", index, *settings(*short))
        assert done.exit_code == 0, done.stderr
    ours, theirs = sorted((tmp_path / "milvus" / "runs").iterdir()), sorted((tmp_path / "memory" / "runs").iterdir())
    assert [path.name for path in ours] == [path.name for path in theirs]
    for one, two in zip(ours, theirs, strict=True):
        found, known = read_run(one), read_run(two)
        assert {q: sorted(docs) for q, docs in found.items()} == {q: sorted(docs) for q, docs in known.items()}
        for query, docs in found.items():
            assert docs == pytest.approx(known[query], abs=1e-4)
    with Milvus(milvus_uri) as server:
        (collection,) = set(server.client.list_collections()) - before
        (alias,) = server.client.list_aliases(collection)["aliases"]
        assert alias.startswith("sparring_milvus_")
        found = server.behind(alias)
        assert found is not None
        assert found[1].rows == 64
        assert found[1].model == "2"
        for name in (alias, collection):
            (server.client.drop_alias if name == alias else server.client.drop_collection)(name)


def test_an_unreachable_server_is_found_before_a_run_folder_is_made(
    tiny_st: Path, tiny_ce: Path, tmp_path: Path
) -> None:
    data, models = write_toy(tmp_path / "toy"), ("--retriever", tiny_st, "--ranker", tiny_ce)
    result = call(
        "train", data, *models, "--out", tmp_path / "run", "--index", "milvus:http://127.0.0.1:1", *settings()
    )
    assert result.exit_code == 2
    assert "Milvus did not do what was asked" in result.stderr
    assert not (tmp_path / "run").exists()
    wrong = call("train", data, *models, "--out", tmp_path / "run", "--index", "annoy", *settings())
    assert "unknown index" in wrong.stderr


def test_a_card_that_was_changed_is_no_card() -> None:
    card = Card("m", "f" * 64, "p" * 64, 3, 2, "dot", "exact", "0")
    assert read_card(card.text(), "x") == card
    for text in (card.text().replace('"rows": 3', '"rows": 4'), "{}", "no json", None, card.text()[:-2]):
        with pytest.raises(InputError, match="nothing that `sparring publish` wrote"):
            read_card(text, "x")
