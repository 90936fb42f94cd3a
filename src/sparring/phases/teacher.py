"""A resting model's scores, made ahead of the updates that ask for them: many pairs at once, each pair once a phase."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

Draw = Callable[[int], tuple[np.ndarray, np.ndarray]]
"""Step number -> query rows (B,), passage rows (B, 1 + n)."""


class TeacherScores:
    """Scores of query-passage pairs, each pair once.

    Args:
        passages: rows of the passage store; a pair's key is ``query row * passages + passage row``.
        keys, scores: pairs that are known already, int64 and float32 (N,).
    """

    def __init__(self, passages: int, keys: np.ndarray | None = None, scores: np.ndarray | None = None) -> None:
        self.passages = passages
        self.keys = np.empty(0, np.int64) if keys is None else keys
        self.scores = np.empty(0, np.float32) if scores is None else scores

    def __len__(self) -> int:
        return len(self.keys)

    def missing(self, draw: Draw, number: int, steps: int, least: int) -> np.ndarray:
        """Keys of the pairs of step ``number`` that are not known, and, where there are any, those of the steps after
        it until there are ``least``; sorted, each once."""
        wanted = self._unknown(*draw(number))
        while len(wanted) and len(wanted) < least and (number := number + 1) < steps:
            wanted = np.union1d(wanted, self._unknown(*draw(number)))
        return wanted

    def pairs(self, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Query rows and passage rows of keys."""
        return keys // self.passages, keys % self.passages

    def add(self, keys: np.ndarray, scores: np.ndarray) -> None:
        """Scores of pairs that were `missing`."""
        places = np.searchsorted(self.keys, keys)
        self.keys = np.insert(self.keys, places, keys)
        self.scores = np.insert(self.scores, places, scores.astype(np.float32))

    def of(self, queries: np.ndarray, passages: np.ndarray) -> np.ndarray:
        """Scores of lists: query rows (b,), passage rows (b, m) -> float32 (b, m). KeyError for an unknown pair."""
        keys = self._keys(queries, passages)
        places = np.searchsorted(self.keys, keys)
        if not self._is_known(keys, places).all():
            raise KeyError("pairs that the teacher was not asked for before")
        found: np.ndarray = self.scores[places]
        return found

    def _keys(self, queries: np.ndarray, passages: np.ndarray) -> np.ndarray:
        return np.asarray(queries, np.int64)[:, None] * self.passages + np.asarray(passages, np.int64)

    def _unknown(self, queries: np.ndarray, passages: np.ndarray) -> np.ndarray:
        """Sorted, each once; the cost is that of the lists, whatever is known."""
        keys = np.unique(self._keys(queries, passages))
        return keys[~self._is_known(keys, np.searchsorted(self.keys, keys))]

    def _is_known(self, keys: np.ndarray, places: np.ndarray) -> np.ndarray:
        """Whether the known key at each place is the one looked for."""
        if not len(self.keys):
            return np.zeros(keys.shape, bool)
        found: np.ndarray = self.keys[np.minimum(places, len(self.keys) - 1)] == keys
        return found
