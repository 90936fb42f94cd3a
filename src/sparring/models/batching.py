"""Rows of token stores as padded model inputs, sorted by length and cut by a token budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sparring.models.template import Template, longest_first
from sparring.models.tokens import TokenStore
from sparring.types import InputError

Rows = Sequence[int] | np.ndarray


@dataclass(frozen=True)
class Batches:
    """Model inputs of N rows in chunks, longest rows first.

    Attributes:
        inputs: per chunk the padded int64 tensors [rows, L] that the model reads, on the CPU.
        restore: int64 [N]; row ``i`` is at position ``restore[i]`` of the concatenated outputs.
        tokens: real tokens, special tokens included.
        padded: tokens with padding.
    """

    inputs: list[dict[str, Tensor]]
    restore: Tensor
    tokens: int
    padded: int

    def __len__(self) -> int:
        return len(self.restore)


def chunk_by_tokens(lengths: np.ndarray, token_budget: int) -> list[np.ndarray]:
    """Positions of the rows, longest first, in chunks whose padded size stays within the budget.

    Args:
        lengths: tokens of each row, [N].
        token_budget: most tokens of a chunk, padding included. A single longer row gets a chunk of its own.

    Returns:
        Disjoint int64 arrays that cover ``range(N)``. Equal lengths keep their order.
    """
    if token_budget < 1:
        raise InputError(
            "A batch needs room.", where="token_budget", expected="at least 1 token", got=f"{token_budget}"
        )
    lengths = np.asarray(lengths, np.int64)
    order = np.argsort(-lengths, kind="stable")
    chunks, start = [], 0
    while start < len(order):
        rows = max(1, token_budget // max(1, int(lengths[order[start]])))
        chunks.append(order[start : start + rows])
        start += rows
    return chunks


def single_batches(template: Template, store: TokenStore, rows: Rows, *, max_length: int, token_budget: int) -> Batches:
    """Inputs of N single texts, cut on the right to ``max_length`` tokens with special tokens."""
    rows = _rows(store, rows)
    room = max_length - template.single.overhead
    _require_capacity(store, rows, room)
    starts, kept = store.offsets[rows], np.minimum(store.offsets[rows + 1] - store.offsets[rows], room)
    lengths = kept + template.single.overhead
    chunks = chunk_by_tokens(lengths, token_budget)
    inputs = [template.join(template.single, [(store.ids, starts[chunk], kept[chunk])]) for chunk in chunks]
    return _batches(inputs, chunks, lengths)


def pair_batches(
    template: Template,
    queries: TokenStore,
    query_rows: Rows,
    passages: TokenStore,
    passage_rows: Rows,
    *,
    max_length: int,
    token_budget: int,
) -> Batches:
    """Inputs of N (query, passage) pairs, truncated ``longest_first`` to ``max_length`` tokens with special tokens."""
    firsts, seconds = _rows(queries, query_rows), _rows(passages, passage_rows)
    if len(firsts) != len(seconds):
        raise InputError(
            "Pairs need as many queries as passages.", expected=f"{len(firsts)} passages", got=f"{len(seconds)}"
        )
    room = max_length - template.pair.overhead
    _require_capacity(queries, firsts, room)
    _require_capacity(passages, seconds, room)
    kept_first, kept_second = longest_first(queries.true_lengths[firsts], passages.true_lengths[seconds], room)
    starts_first, starts_second = queries.offsets[firsts], passages.offsets[seconds]
    lengths = kept_first + kept_second + template.pair.overhead
    chunks = chunk_by_tokens(lengths, token_budget)
    inputs = [
        template.join(
            template.pair,
            [(queries.ids, starts_first[c], kept_first[c]), (passages.ids, starts_second[c], kept_second[c])],
        )
        for c in chunks
    ]
    return _batches(inputs, chunks, lengths)


def _rows(store: TokenStore, rows: Rows) -> np.ndarray:
    rows = np.asarray(rows, np.int64)
    if rows.size and (rows.min() < 0 or rows.max() >= len(store)):
        got = f"{rows.min()} .. {rows.max()}"
        raise InputError("A row does not exist.", expected=f"rows 0 .. {len(store) - 1}", got=got)
    return rows


def _require_capacity(store: TokenStore, rows: np.ndarray, room: int) -> None:
    """A text that was capped in the store must have been capped where the model cuts anyway, or later."""
    if store.limit < room and (store.true_lengths[rows] > store.limit).any():
        raise InputError(
            "Texts were stored too short for this model.", expected=f"at least {room} tokens a text",
            got=f"a cap of {store.limit}", fix="tokenise with a larger limit",
        )  # fmt: skip


def _batches(inputs: list[dict[str, Tensor]], chunks: list[np.ndarray], lengths: np.ndarray) -> Batches:
    order = np.concatenate([np.empty(0, np.int64), *chunks])
    restore = np.empty_like(order)
    restore[order] = np.arange(len(order))
    padded = sum(chunk["input_ids"].numel() for chunk in inputs)
    return Batches(inputs=inputs, restore=torch.from_numpy(restore), tokens=int(lengths.sum()), padded=padded)
