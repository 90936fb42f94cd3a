"""Embeddings that are read block by block, so that they may lie in a file: a million queries are gigabytes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from sparring.machine import give_back

BLOCK = 16384
"""Rows in memory at a time: 50 MB of 768 dimensions."""


class Embeddings(Protocol):
    """An array or a memory map [N, d], or rows of one: what takes a slice or row numbers."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, rows: Any, /) -> np.ndarray: ...


class Chosen:
    """Rows of embeddings, copied only as they are asked for; pages of a file are given back at once.

    Args:
        vectors: [N, d].
        rows: int64 [Q].
    """

    def __init__(self, vectors: np.ndarray, rows: np.ndarray) -> None:
        self.vectors, self.rows = vectors, rows

    @property
    def shape(self) -> tuple[int, ...]:
        """(Q, d)."""
        return (len(self.rows), *self.vectors.shape[1:])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, rows: slice | np.ndarray) -> np.ndarray:
        taken = np.array(self.vectors[self.rows[rows]])
        give_back(self.vectors)
        return taken


def blocks(vectors: Embeddings, size: int = BLOCK) -> Iterator[np.ndarray]:
    """All rows in order, float32 and contiguous; pages of a file are given back after each block."""
    for start in range(0, len(vectors), size):
        yield np.ascontiguousarray(vectors[start : start + size], dtype=np.float32)
        give_back(vectors)


def write_npy(path: Path, shape: tuple[int, ...], parts: Iterable[np.ndarray]) -> None:
    """Parts of embeddings, one after another, as one ``.npy`` file of little-endian float32 [N, d].

    It is written, not mapped: a map of a file that the full disk has no room for ends the process with a bus error.
    """
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})
        for part in parts:
            file.write(part.astype("<f4", copy=False).tobytes())


def finite(vectors: Embeddings) -> bool:
    """Whether all numbers are."""
    return all(bool(np.isfinite(block).all()) for block in blocks(vectors))
