"""Special tokens, truncation and padding, learnt from a tokenizer and applied to stored ids.

A tokenizer's layout (``[CLS] A [SEP] B [SEP]`` and the like) is probed once and then verified against the tokenizer
itself, so that joining cached ids gives what tokenising the text would have given.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from sparring.models.tokens import encode_plain
from sparring.types import InputError

Piece = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Texts of R rows as (flat ids, start of each row [R], tokens of each row [R])."""

SAMPLES = ("", "a", "Hello, World!", "한국어 문서를 검색하는 질문", "naïve café 12.5% [x]", "one two three four " * 6)


@dataclass(frozen=True)
class Layout:
    """Special tokens around one text or a pair: group ``i`` comes before text ``i``, the last group after all."""

    specials: tuple[tuple[int, ...], ...]
    special_types: tuple[tuple[int, ...], ...]
    text_types: tuple[int, ...]

    @property
    def overhead(self) -> int:
        """Special tokens in all."""
        return sum(map(len, self.specials))


@dataclass(frozen=True)
class Template:
    """How a tokenizer turns plain ids into model inputs.

    Attributes:
        single, pair: special tokens around one text, and around a (query, passage) pair.
        pad_id, pad_type: fill ``input_ids`` and ``token_type_ids``.
        left: padding goes to the left.
        names: the inputs that the model reads, of input_ids, token_type_ids and attention_mask.
    """

    single: Layout
    pair: Layout
    pad_id: int
    pad_type: int
    left: bool
    names: tuple[str, ...]

    @classmethod
    def probe(cls, tokenizer: PreTrainedTokenizerBase) -> Template:
        """Learn the layout from the tokenizer and check it on samples.

        Raises:
            InputError: the tokenizer does something that a fixed layout and right truncation cannot reproduce.
        """
        if tokenizer.truncation_side != "right":
            raise _unusable(tokenizer, "truncation_side='right'", f"truncation_side={tokenizer.truncation_side!r}")
        if tokenizer.pad_token_id is None:
            raise _unusable(tokenizer, "a padding token", "none")
        encode_plain(tokenizer, [])  # leaves the tokenizer without truncation and padding
        template = cls(
            single=_layout(tokenizer, "a"),
            pair=_layout(tokenizer, "a", "b"),
            pad_id=int(tokenizer.pad_token_id),
            pad_type=int(tokenizer.pad_token_type_id),
            left=tokenizer.padding_side == "left",
            names=tuple(tokenizer(["a"]).keys()),
        )
        _verify(template, tokenizer)
        return template

    def join(self, layout: Layout, pieces: Sequence[Piece]) -> dict[str, Tensor]:
        """Padded model inputs, int64 [R, L], of R rows whose texts are already truncated.

        Args:
            layout: ``single`` with one piece, ``pair`` with two.
            pieces: the texts of all rows.
        """
        totals = layout.overhead + np.sum([counts for _, _, counts in pieces], axis=0)
        rows, width = len(totals), int(totals.max())
        ids = np.full((rows, width), self.pad_id, np.int64)
        types = np.full((rows, width), self.pad_type, np.int64)
        cursor = width - totals if self.left else np.zeros(rows, np.int64)
        mask = (np.arange(width) >= cursor[:, None]) & (np.arange(width) < (cursor + totals)[:, None])
        every = np.arange(rows)
        for group, (tokens, token_types) in enumerate(zip(layout.specials, layout.special_types, strict=True)):
            for token, token_type in zip(tokens, token_types, strict=True):
                ids[every, cursor] = token
                types[every, cursor] = token_type
                cursor = cursor + 1
            if group < len(pieces):
                flat, starts, counts = pieces[group]
                row = np.repeat(every, counts)
                within = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)
                column = cursor[row] + within
                ids[row, column] = flat[starts[row] + within]
                types[row, column] = layout.text_types[group]
                cursor = cursor + counts
        arrays = {"input_ids": ids, "token_type_ids": types, "attention_mask": mask.astype(np.int64)}
        return {name: torch.from_numpy(arrays[name]) for name in self.names}


def longest_first(first: np.ndarray, second: np.ndarray, budget: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens kept of both texts of each pair, int64 [R], as the ``longest_first`` truncation of HF tokenizers.

    The shorter text stays whole while it fits in half of the budget; otherwise both are cut to halves, and an odd
    token goes to the longer one (to the second when both are equally long).

    Args:
        first, second: tokens of both texts before any cap, [R].
        budget: tokens for both together, special tokens taken off.

    Source: ``truncate_encodings`` in tokenizers/src/utils/truncation.rs.
    """
    first, second = np.asarray(first, np.int64), np.asarray(second, np.int64)
    short, swap = np.minimum(first, second), first > second
    long = np.where(short > budget, short, np.maximum(short, budget - short))
    halve = short + long > budget
    short = np.where(halve, budget // 2, short)
    long = np.where(halve, budget // 2 + budget % 2, long)
    fits = first + second <= budget
    kept_first = np.where(fits, first, np.where(swap, long, short))
    kept_second = np.where(fits, second, np.where(swap, short, long))
    return kept_first, kept_second


def _layout(tokenizer: PreTrainedTokenizerBase, *texts: str) -> Layout:
    """Read the special tokens off one encoded sample, by which sequence each token belongs to."""
    encoding = tokenizer.backend_tokenizer.encode(*texts)
    sequence: list[int | None] = encoding.sequence_ids
    specials: list[list[int]] = [[] for _ in range(len(texts) + 1)]
    special_types: list[list[int]] = [[] for _ in range(len(texts) + 1)]
    text_types = [0] * len(texts)
    group = 0
    for token, token_type, owner in zip(encoding.ids, encoding.type_ids, sequence, strict=True):
        if owner is None:
            specials[group].append(token)
            special_types[group].append(token_type)
        else:
            text_types[owner], group = token_type, owner + 1
    order = [owner for owner in sequence if owner is not None]
    if order != sorted(order) or set(order) != set(range(len(texts))):
        raise _unusable(tokenizer, "the texts of a pair in order", f"sequence ids {sequence}")
    return Layout(tuple(map(tuple, specials)), tuple(map(tuple, special_types)), tuple(text_types))


def _verify(template: Template, tokenizer: PreTrainedTokenizerBase) -> None:
    """Compare the template with the tokenizer on samples, single and paired, at several lengths."""
    known = {"input_ids", "token_type_ids", "attention_mask"}
    if not {"input_ids", "attention_mask"} <= set(template.names) <= known:
        raise _unusable(tokenizer, f"inputs among {sorted(known)}", str(template.names))
    plain = [np.asarray(ids, np.int64) for ids in encode_plain(tokenizer, SAMPLES)]
    last = len(SAMPLES) - 1
    left, right = [*range(len(SAMPLES)), last, last], [*range(1, len(SAMPLES)), 0, last, 2]
    for room in (7, 8, 200):
        budget = template.single.overhead + room
        kept = [np.minimum(len(ids), room) for ids in plain]
        joined = template.join(template.single, [_piece(plain, kept)])
        _compare(tokenizer, list(SAMPLES), budget, joined)
        budget = template.pair.overhead + room
        lengths = np.array([len(ids) for ids in plain])
        firsts, seconds = longest_first(lengths[left], lengths[right], room)
        pieces = [_piece([plain[i] for i in left], firsts), _piece([plain[i] for i in right], seconds)]
        pairs = [[SAMPLES[i], SAMPLES[j]] for i, j in zip(left, right, strict=True)]
        _compare(tokenizer, pairs, budget, template.join(template.pair, pieces))


def _piece(rows: Sequence[np.ndarray], kept: Any) -> Piece:
    lengths = np.array([len(row) for row in rows], np.int64)
    return np.concatenate(rows), np.cumsum(lengths) - lengths, np.asarray(kept, np.int64)


def _compare(tokenizer: PreTrainedTokenizerBase, texts: list[Any], limit: int, joined: dict[str, Tensor]) -> None:
    expected = tokenizer(texts, padding=True, truncation="longest_first", max_length=limit, return_tensors="pt")
    for name, values in joined.items():
        if not torch.equal(values, expected[name]):
            raise _unusable(tokenizer, f"{name} {expected[name].tolist()[:4]}", str(values.tolist()[:4]))


def _unusable(tokenizer: PreTrainedTokenizerBase, expected: str, got: str) -> InputError:
    where = f"{type(tokenizer).__name__} {tokenizer.name_or_path}".strip()
    return InputError("This tokenizer's special tokens cannot be reproduced.", where=where, expected=expected, got=got)
