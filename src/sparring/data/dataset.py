"""What every phase is given: a corpus, queries, labels by split, and where they came from."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass

from sparring.data.table import TextTable
from sparring.types import InputError, Qrels


def split_name(split: str) -> str:
    """A split's name, which becomes part of file names; InputError when it cannot, or would lead to another folder."""
    plain = split.isprintable() and not any(character in split for character in '/\\:*?"<>|')
    if not split or split.startswith(".") or not plain or len(split.encode("utf-8", "replace")) > 100:
        raise InputError(
            "a split's name cannot be part of a file name",
            where=f"split {split[:100]!r}",
            expected="up to 100 letters, digits, '.', '-' and '_', the first no '.'",
            got=repr(split[:100]),
            fix="rename the split",
        )
    return split


@dataclass(frozen=True)
class Dataset:
    """Passages and queries (memory-mapped) with labels by split name.

    Attributes:
        corpus: the passages.
        queries: the queries of all splits; their title is empty.
        qrels: split name (see `split_name`) -> query id -> passage id -> grade. A grade above 0 is a positive.
        answers: query id -> answer strings, where the source has them (DPR).
        source: where it was loaded from, for people.
    """

    corpus: TextTable
    queries: TextTable
    qrels: Mapping[str, Qrels]
    answers: Mapping[str, tuple[str, ...]]
    source: str

    def __post_init__(self) -> None:
        for name in self.qrels:
            split_name(name)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hash of everything a run can depend on: passages, queries, labels, answers; not of the source's path."""
        digest = hashlib.blake2b(f"{self.corpus.fingerprint} {self.queries.fingerprint}".encode(), digest_size=16)
        for split in sorted(self.qrels):
            digest.update(json.dumps([split, self.qrels[split]], sort_keys=True).encode())
        digest.update(json.dumps({key: list(value) for key, value in self.answers.items()}, sort_keys=True).encode())
        return digest.hexdigest()

    def split(self, name: str) -> Qrels:
        """The labels of one split. InputError when there is no such split, or it labels no positive."""
        known = ", ".join(f"{key} ({len(value)} queries)" for key, value in self.qrels.items()) or "none"
        if name not in self.qrels:
            raise InputError(
                f"the dataset has no labels for a split named {name!r}",
                where=self.source,
                expected=f"one of: {known}",
                got=repr(name),
                fix=f"name one of these splits, or add a qrels file for {name!r}",
            )
        labels = self.qrels[name]
        if not any(grade > 0 for grades in labels.values() for grade in grades.values()):
            raise InputError(
                f"the split {name!r} has no positive label",
                where=self.source,
                expected="at least one query with a passage of grade 1 or more",
                got=f"splits: {known}",
                fix=f"put positives into the qrels of {name!r}, or name another split",
            )
        return labels
