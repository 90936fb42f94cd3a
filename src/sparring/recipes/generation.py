"""What one state of the retriever found, and the passage embeddings it found it in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sparring.files import sha256
from sparring.phases.pools import Pools
from sparring.types import CannotGoOn

Lists = tuple[np.ndarray, np.ndarray]
"""Ranked lists of a split's queries: scores [Q, K] and passage rows [Q, K], best first; row -1 is no result."""


@dataclass(frozen=True, eq=False)
class Vectors:
    """Passage embeddings that are kept for the next refresh: a mix of generations after a focused one.

    Attributes:
        file: float32 [N, d] (``.npy``).
        digest: SHA-256 of the file.
        weights: fingerprint of the newest generation's retriever.
        made_by: names of generations, the newest last.
        of_row: which of them each passage was encoded by, int32 [N].
    """

    file: Path
    digest: str
    weights: str
    made_by: tuple[str, ...]
    of_row: np.ndarray

    @property
    def fresh(self) -> np.ndarray:
        """Passages that the newest generation encoded, bool [N]."""
        return self.of_row == len(self.made_by) - 1

    def counts(self) -> dict[str, int]:
        """Passages by the generation that encoded them, those of none left out."""
        found = np.bincount(self.of_row, minlength=len(self.made_by))
        return {name: int(count) for name, count in zip(self.made_by, found, strict=True) if count}

    def checked(self) -> Path:
        """The file.

        Raises: CannotGoOn when the file is not the one that was written.
        """
        if not self.file.is_file() or sha256(self.file) != self.digest:
            raise CannotGoOn("the embeddings of an earlier refresh are missing or damaged", where=str(self.file))
        return self.file


@dataclass(frozen=True)
class Generation:
    """What one state of the retriever found: pools for training, ranked lists of the dev and test queries.

    A mixed generation (some passages' embeddings are an earlier retriever's) has no lists of test.
    """

    name: str
    pools: Pools
    lists: Mapping[str, Lists]
    vectors: Vectors | None = None

    @property
    def mixed(self) -> bool:
        """Whether some passages were encoded by an earlier generation."""
        return self.vectors is not None and not bool(self.vectors.fresh.all())
