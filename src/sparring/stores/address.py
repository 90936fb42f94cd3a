"""Where vectors go or come from, as users write it: ``milvus:URI``, ``pgvector:DSN``, ``parquet:FOLDER`` ..."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from sparring.types import InputError

Store = Literal["milvus", "pgvector", "parquet", "faiss"]
STORES: tuple[Store, ...] = ("milvus", "pgvector", "parquet", "faiss")
KINDS = ("exact", "hnsw", "ivf")
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,39}")


@dataclass(frozen=True)
class Address:
    """A store and a place in its own words: a URI, connection settings, a folder."""

    store: Store
    place: str

    def __str__(self) -> str:
        """For messages: connection settings may hold a password and are left out."""
        return "pgvector:..." if self.store == "pgvector" else f"{self.store}:{self.place}"


def parse_address(text: str) -> Address:
    """``STORE:PLACE``.

    Raises: InputError for an unknown store, an empty place, or a Milvus URI that cannot be one.
    """
    store, colon, place = text.partition(":")
    if not colon or store not in STORES or not place:
        raise InputError(
            "a store is a kind and a place", expected="milvus:URI, pgvector:DSN, parquet:FOLDER or faiss:FOLDER",
            got=text if store not in STORES else f"{store}: without a place",
        )  # fmt: skip
    if store == "milvus":
        check_milvus(place)
    return Address(store, place)


def absent(address: Address) -> bool:
    """Whether this is a file of milvus-lite that nobody has made yet: asking would make it."""
    return address.store == "milvus" and "://" not in address.place and not Path(address.place).exists()


def check_milvus(uri: str) -> None:
    """Refuse what is neither a server's address nor a file of milvus-lite, and a password in it."""
    expected = "http://HOST:PORT, https://HOST:PORT, or a file whose name ends in .db"
    if "://" not in uri:
        if not uri.endswith(".db"):
            raise InputError("not a place for Milvus", where=f"milvus:{uri}", expected=expected)
        return
    try:
        parts = urlsplit(uri)
        wrong = parts.scheme not in ("http", "https") or not parts.hostname or parts.port == 0
    except ValueError:  # a port that is no number, a broken IPv6 address
        wrong, parts = True, None
    if parts is not None and "@" in parts.netloc:
        raise InputError(
            "a password in a URI ends up in run folders and logs", where=f"milvus:{parts.scheme}://...@{parts.hostname}",
            expected="a URI without it", fix="set SPARRING_MILVUS_TOKEN to USER:PASSWORD or an API key",
        )  # fmt: skip
    if wrong:
        raise InputError("not a place for Milvus", where=f"milvus:{uri}", expected=expected)


def check_index(text: str) -> None:
    """Refuse what is no value of ``run.index``."""
    if text in ("faiss", *KINDS):
        return
    if text.startswith("milvus:") and text != "milvus:":
        check_milvus(text.partition(":")[2])
        return
    raise InputError("unknown index", where="index", expected=f"faiss, {', '.join(KINDS)} or milvus:URI", got=text)


def check_name(name: str) -> str:
    """The name of a publication: a Milvus alias and an SQL table as well.  -> the name"""
    if not _NAME.fullmatch(name) or "__" in name:
        expected = "a letter, then up to 39 letters, digits and single underscores"
        raise InputError("not a name for a publication", where="--name", expected=expected, got=name)
    return name
