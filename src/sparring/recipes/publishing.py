"""A finished pair's passage vectors, published to where they are served; and a search there, by the same model."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np

from sparring import __version__
from sparring.data import Dataset, default_cache
from sparring.distributed import choose_device, choose_tokens
from sparring.files import explained, make_parents, whole
from sparring.models import Retriever, load_retriever
from sparring.phases.encode import encode
from sparring.phases.index import Index, Kind, build_index, choose_kind
from sparring.recipes.standalone import alone, autocast_type, ids_in
from sparring.stores import folder as folders
from sparring.stores.address import Address, absent, check_name, parse_address
from sparring.stores.card import Card, fingerprint_of, nothing_there, refuse_other
from sparring.stores.milvus import Milvus
from sparring.stores.pgvector import Postgres
from sparring.types import InputError

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

logger = logging.getLogger("sparring")

NAME = "sparring"
"""Alias or table of a publication unless told otherwise."""

Hits = list[tuple[str, float]]
"""Passage ids and scores, best first."""


@dataclass(frozen=True)
class Published:
    """What `publish` left. ``new``: whether anything had to be written."""

    where: str
    card: Card
    new: bool

    def __str__(self) -> str:
        did = "published" if self.new else "published before, nothing to do"
        shape = f"{self.card.rows} passages x {self.card.dim}"
        return f"{self.where}: {shape}, {self.card.index}, model {self.card.fingerprint[:16]}: {did}"


def publish(
    dataset: Dataset,
    retriever: str | Path | SentenceTransformer | Retriever,
    to: str,
    *,
    name: str = NAME,
    replace: bool = False,
    precision: str = "auto",
    trust_remote_code: bool = False,
) -> Published:
    """Encode all passages and publish them with their ids and the model's fingerprint, whole or not at all.

    Embeddings are kept in the cache until they are published: after a failure the same call goes on from there.

    Args:
        to: ``milvus:URI``, ``pgvector:DSN``, ``parquet:FOLDER`` or ``faiss:FOLDER``.
        name: alias in Milvus or table in PostgreSQL that searches ask; a folder needs none.
        replace: put this in the place of what another model or other passages published there.

    Raises:
        InputError: the place cannot be reached or refuses, or holds something else. It is as it was before.
    """
    address, name = parse_address(to), check_name(name)
    model, label = _loaded(retriever, trust_remote_code)
    store = model.tokenize(dataset.corpus, "passage", default_cache() / "tokens")
    ids = dataset.corpus.ids(range(len(dataset.corpus)))
    kind = choose_kind(len(ids), model.dim)
    card = Card(
        label, model.fingerprint(), fingerprint_of(store.fingerprint, ids), len(ids), model.dim, model.similarity, kind,
        __version__,
    )  # fmt: skip
    found = _card_at(address, name, replace=replace)
    where = _where(address, name)
    if found is not None:
        if found.same(card):
            return Published(where, found, new=False)
        refuse_other(found, card, where, replace=replace)
    folder = default_cache() / "publish" / f"{card.fingerprint[:16]}-{card.passages[:16]}-{precision}"
    with alone(folder / "passages.npy"):  # another publication of this pair may be under way
        vectors = encode(
            model, store, "passage", out=folder / "passages.npy", dtype=autocast_type(precision),
            token_budget=choose_tokens(0, choose_device().value, 16384), progress="encode passages",
        )  # fmt: skip
        _write(address, name, vectors, ids, card)
        shutil.rmtree(folder, ignore_errors=True)
    return Published(where, card, new=True)


def _loaded(retriever: str | Path | SentenceTransformer | Retriever, trust_remote_code: bool) -> tuple[Retriever, str]:
    """The model where it computes, and a name for people."""
    if isinstance(retriever, Retriever):
        return retriever, "a loaded model"
    model = load_retriever(retriever, trust_remote_code=trust_remote_code).to(choose_device().value)
    label = "/".join(Path(retriever).parts[-2:]) if isinstance(retriever, str | Path) else "a loaded model"
    return model, label


def _where(address: Address, name: str) -> str:
    return f"{address}, {name}" if address.store in ("milvus", "pgvector") else str(address)


def _card_at(address: Address, name: str, *, replace: bool) -> Card | None:
    """What is published there now; asked before anything is encoded. ``replace``: a damaged folder counts as empty."""
    if address.store == "milvus":
        if absent(address):
            return None
        with Milvus(address.place) as server:
            behind = server.behind(name)
        return behind[1] if behind else None
    if address.store == "pgvector":
        with Postgres(address.place) as database:
            return database.card(name)
    found = folders.read(Path(address.place), address.store, replace=replace)
    if found is None:
        _require_makeable(Path(address.place))
    return found.card if found else None


def _require_makeable(folder: Path) -> None:
    """InputError unless a folder can be made; it is not left."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    make_parents(folder, folder)
    for path in missing:
        path.rmdir()


def _write(address: Address, name: str, vectors: np.ndarray, ids: Sequence[str], card: Card) -> None:
    if address.store == "milvus":
        with Milvus(address.place) as server:
            server.make(name, vectors, card, ids=ids)
    elif address.store == "pgvector":
        with Postgres(address.place) as database:
            database.make(name, vectors, card, ids)
    else:
        _write_files(Path(address.place), address.store, vectors, ids, card)


def _write_files(folder: Path, store: str, vectors: np.ndarray, ids: Sequence[str], card: Card) -> None:
    make_parents(folder, folder)
    files = {"vectors": folders.data_file(folder, card, store)}
    if store == "parquet":
        folders.write_parquet(files["vectors"], vectors, ids, card)
    else:
        files["ids"] = folders.data_file(folder, card, "ids.txt")
        with whole(files["ids"]) as part:
            part.write_bytes("".join(f"{name}\n" for name in ids).encode())
        with explained(folder):
            build_index(vectors, kind=cast(Kind, card.index)).save(files["vectors"])
    folders.commit(folder, store, card, files)


# --- searching ------------------------------------------------------------------------------------------------


def ask(
    queries: Sequence[str],
    retriever: str | Path | SentenceTransformer | Retriever,
    source: str,
    *,
    name: str = NAME,
    k: int = 10,
    trust_remote_code: bool = False,
) -> list[Hits]:
    """The k best published passages of each query: [(id, score), ...], best first; scores are inner products.

    Args:
        queries: texts; the model's query prompt is added.
        retriever: the one whose vectors are published.
        source: as ``to`` of `publish`.

    Raises:
        InputError: nothing is published there, another model made it, or the place does not answer.
    """
    if k < 1:
        raise InputError("a search needs at least one result", where="k", expected="1 or more", got=str(k))
    address, name = parse_address(source), check_name(name)
    model, _ = _loaded(retriever, trust_remote_code)
    fingerprint = model.fingerprint()
    with _opened(address, name) as (card, search):
        card.require(fingerprint, _where(address, name))
        vectors = encode(model, model.tokenize(list(queries), "query", None), "query", dtype=autocast_type("auto"))
        found = search(vectors, min(k, card.rows))
    return [list(zip(ids, scores, strict=True)) for scores, ids in found]


Search = Callable[[np.ndarray, int], list[tuple[list[float], list[str]]]]


@contextmanager
def _opened(address: Address, name: str) -> Iterator[tuple[Card, Search]]:
    """The card of what is published, and a search in exactly that."""
    if address.store == "milvus":
        if absent(address):
            raise nothing_there(_where(address, name))
        with Milvus(address.place) as server:
            collection = server.open(name)
            yield collection.card, lambda vectors, k: [_best(*found) for found in collection.lists(vectors, k)]
    elif address.store == "pgvector":
        with Postgres(address.place) as database:
            card = database.open(name)
            yield card, lambda vectors, k: list(database.search(name, vectors, k, card))
    else:
        found = folders.open_folder(Path(address.place), address.store)
        searches = {"parquet": _search_parquet, "faiss": _search_faiss}
        yield found.card, lambda vectors, k: searches[address.store](found.files, vectors, k)


def _best(scores: list[float], ids: list[str]) -> tuple[list[float], list[str]]:
    """In order, equal scores by id."""
    order = sorted(range(len(ids)), key=lambda i: (-scores[i], ids[i]))
    return [scores[i] for i in order], [ids[i] for i in order]


def _search_faiss(files: dict[str, Path], vectors: np.ndarray, k: int) -> list[tuple[list[float], list[str]]]:
    ids = ids_in(files["ids"])
    scores, rows = Index.load(files["vectors"]).search(vectors, k)
    return [_best(s[at >= 0].tolist(), [ids[i] for i in at[at >= 0]]) for s, at in zip(scores, rows, strict=True)]


def _search_parquet(files: dict[str, Path], vectors: np.ndarray, k: int) -> list[tuple[list[float], list[str]]]:
    """One row group after another, and a running top k."""
    best: list[tuple[list[float], list[str]]] = [([], []) for _ in vectors]
    for ids, block in folders.read_parquet(files["vectors"]):
        scores, rows = build_index(block).search(vectors, k, progress="")
        for i, (s, at) in enumerate(zip(scores, rows, strict=True)):
            joined = _best(best[i][0] + s.tolist(), best[i][1] + [ids[row] for row in at])
            best[i] = joined[0][:k], joined[1][:k]
    return best
