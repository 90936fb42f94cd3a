"""The rows every reader yields. ``line`` is the line in the file (for a JSON list: where the item starts), from 1."""

from __future__ import annotations

from typing import NamedTuple


class PassageRow(NamedTuple):
    """One passage as a file has it."""

    line: int
    id: str
    title: str
    text: str


class QueryRow(NamedTuple):
    """One query as a file has it; ``answers`` only where the format has them."""

    line: int
    id: str
    text: str
    answers: tuple[str, ...] = ()


class Label(NamedTuple):
    """One line of a qrels file. A grade above 0 is a positive."""

    line: int
    query: str
    passage: str
    grade: int
