"""The vocabulary of the whole package: standard library only, frozen, imported by everyone and importing no one.

Axis names used in every docstring: B queries in a batch, n passages in a candidate list (column 0 is the labelled
positive unless said otherwise), d embedding dimension, L tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

Qrels = Mapping[str, Mapping[str, int]]
"""Relevance labels: query id -> passage id -> grade. A grade above 0 is a positive."""

Run = dict[str, dict[str, float]]
"""A ranking: query id -> passage id -> score, higher is better."""

RETRIEVER, FIXED, CASCADE = "retriever", "ranker on fixed candidates", "cascade"
"""The three rows of results that every state of the pair has."""


@dataclass(frozen=True, slots=True)
class Query:
    """A query as a user wrote it."""

    id: str
    text: str


@dataclass(frozen=True, slots=True)
class Passage:
    """A passage of the corpus. ``title`` is explicit and may be empty."""

    id: str
    text: str
    title: str = ""


@dataclass(frozen=True, slots=True)
class CandidateList:
    """A query's passages in ranked order, with the scores that ranked them."""

    query_id: str
    passage_ids: tuple[str, ...]
    scores: tuple[float, ...]


class InputError(ValueError):
    """Something the user gave cannot be used.

    Args:
        what: one sentence that names the problem.
        where: file and line, configuration field, query id: whatever finds it.
        expected: what would have been right.
        got: what was there.
        fix: what to do or run next.
    """

    def __init__(self, what: str, *, where: str = "", expected: str = "", got: str = "", fix: str = "") -> None:
        self.what, self.where, self.expected, self.got, self.fix = what, where, expected, got, fix
        labelled = (("where", where), ("expected", expected), ("got", got), ("do", fix))
        super().__init__("\n".join([what, *(f"  {label}: {value}" for label, value in labelled if value)]))


BEGIN_AGAIN = "this run cannot go on: begin again with another --out"


class CannotGoOn(InputError):
    """A stopped run cannot be continued: what it left is missing, damaged, or not what this command would leave."""

    def __init__(
        self, what: str, *, where: str = "", expected: str = "the file as it was written", got: str = "",
        fix: str = BEGIN_AGAIN,
    ) -> None:  # fmt: skip
        super().__init__(what, where=where, expected=expected, got=got, fix=fix)
