"""Vectors to publish, with a card, and an oracle for what a search of them finds."""

from __future__ import annotations

import numpy as np

from sparring.stores.card import Card


def card(vectors: np.ndarray, model: str = "a", index: str = "exact") -> Card:
    return Card(f"runs/{model}", model * 64, "p" * 64, *vectors.shape, "dot", index, "0")


def drawn(count: int, dim: int = 16, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, dim), dtype=np.float32)


def best(queries: np.ndarray, passages: np.ndarray, k: int) -> np.ndarray:
    return np.argsort(-(queries.astype(np.float64) @ passages.T.astype(np.float64)), axis=1)[:, :k]
