"""What published vectors are known by: the model that made them, and of which texts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from sparring.files import sealed, unsealed
from sparring.types import InputError


@dataclass(frozen=True)
class Card:
    """Stands beside the vectors, in the same transaction or file.

    Attributes:
        model: the retriever's name, for people.
        fingerprint: of everything its embeddings depend on (`Retriever.fingerprint`).
        passages: fingerprint of the texts and their ids, in order.
        rows, dim: shape of the vectors.
        similarity: "dot" or "cosine"; search is by inner product either way.
        index: kind of index that the size rule chose.
        version: of this package.
    """

    model: str
    fingerprint: str
    passages: str
    rows: int
    dim: int
    similarity: str
    index: str
    version: str

    def text(self) -> str:
        """JSON with a checksum; `read_card` reads it."""
        return json.dumps(sealed(asdict(self)), ensure_ascii=False)

    def same(self, other: Card) -> bool:
        """Whether both stand for the same vectors of the same passages."""
        return (self.fingerprint, self.passages, self.rows) == (other.fingerprint, other.passages, other.rows)

    def require(self, fingerprint: str, where: str) -> None:
        """Refuse to search with vectors of another model.

        Raises: InputError when ``fingerprint`` is not the model's that made these vectors.
        """
        if fingerprint != self.fingerprint:
            raise InputError(
                "these vectors were made by another model", where=where,
                expected=f"the model with fingerprint {self.fingerprint[:16]} ({self.model})",
                got=f"a model with fingerprint {fingerprint[:16]}",
                fix="search with the pair that was published, or publish this one (--replace)",
            )  # fmt: skip


def read_card(text: str | None, where: str) -> Card:
    """What `Card.text` wrote.

    Raises: InputError when there is none, or it is not as it was written.
    """
    try:
        if not text:
            raise ValueError("no card of `sparring publish`")
        return Card(**unsealed(text))
    except (ValueError, TypeError) as error:
        raise InputError(
            "nothing that `sparring publish` wrote lies there", where=where, got=str(error),
            fix="choose another --name, or remove it yourself; nothing was overwritten",
        ) from None  # fmt: skip


def refuse_other(found: Card, card: Card, where: str, *, replace: bool) -> None:
    """Refuse to take the place of another publication unless that was asked for."""
    if not replace:
        what = "another model" if found.fingerprint != card.fingerprint else "the same model, other passages"
        raise InputError(
            "something else is published there", where=where, expected="nothing, or this pair with these passages",
            got=f"{found.rows} passages of {what} ({found.model})",
            fix="give --replace to put this one in its place, or choose another --name or place",
        )  # fmt: skip


def fingerprint_of(texts: str, ids: Sequence[str]) -> str:
    """SHA-256 of the passages: the fingerprint of their tokens, and their ids in order."""
    digest = hashlib.sha256(texts.encode())
    for name in ids:
        digest.update(b"\0" + name.encode())
    return digest.hexdigest()


def nothing_there(where: str) -> InputError:
    """Nothing is published under that name."""
    return InputError("nothing is published there", where=where, fix="publish it first: sparring publish")


def missing(package: str, extra: str) -> InputError:
    """An optional dependency that is not installed."""
    return InputError(f"{package} is not installed", fix=f"pip install 'sparring[{extra}]'")
