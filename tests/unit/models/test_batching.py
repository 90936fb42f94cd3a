"""Chunks within the token budget, and rows back in order."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from sparring.models.batching import chunk_by_tokens, pair_batches, single_batches
from sparring.models.template import Template
from sparring.models.tokens import tokenize
from sparring.types import InputError

TEXTS = ["create a bucket", "", "비밀번호를 어떻게 바꾸나요", "how to reset a password " * 9, "서울"]


@given(st.lists(st.integers(1, 50), max_size=60), st.integers(1, 200))
def test_chunks_partition_the_rows_within_the_budget(lengths, budget):
    chunks = chunk_by_tokens(np.array(lengths, dtype=np.int64), budget)
    order = np.concatenate([np.empty(0, np.int64), *chunks])
    assert sorted(order.tolist()) == list(range(len(lengths)))
    assert [lengths[i] for i in order] == sorted(lengths, reverse=True)
    for chunk in chunks:
        assert len(chunk) == 1 or len(chunk) * max(lengths[i] for i in chunk) <= budget
    for first, second in pairwise(chunks):
        assert (len(first) + 1) * lengths[first[0]] > budget, f"{second[0]} would have fit"


def test_an_impossible_budget():
    with pytest.raises(InputError, match="token_budget"):
        chunk_by_tokens(np.array([3]), 0)


@pytest.fixture
def read(tiny_bert):
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    return Template.probe(tokenizer), tokenize(TEXTS, tokenizer, limit=20, cache=None, name="texts"), tokenizer


def test_restore_counts_and_repeated_rows(read):
    template, store, tokenizer = read
    rows = [3, 0, 0, 4, 2, 1]
    batches = single_batches(template, store, rows, max_length=12, token_budget=24)
    assert len(batches.inputs) > 1
    assert len(batches) == len(rows)
    assert batches.padded == sum(inputs["input_ids"].numel() for inputs in batches.inputs)
    assert batches.tokens == sum(int(inputs["attention_mask"].sum()) for inputs in batches.inputs)
    found = [ids[mask.bool()] for i in batches.inputs for ids, mask in zip(i["input_ids"], i["attention_mask"])]  # noqa: B905
    for i, row in enumerate(rows):
        expected = tokenizer(TEXTS[row], truncation=True, max_length=12, return_tensors="pt")["input_ids"][0]
        assert torch.equal(found[batches.restore[i]], expected)


def test_no_rows(read):
    template, store, _ = read
    batches = pair_batches(template, store, [], store, [], max_length=12, token_budget=24)
    assert (len(batches), batches.inputs, batches.tokens, batches.padded) == (0, [], 0, 0)


def test_errors(read):
    template, store, tokenizer = read
    with pytest.raises(InputError, match="does not exist"):
        single_batches(template, store, [0, 5], max_length=12, token_budget=24)
    with pytest.raises(InputError, match="does not exist"):
        single_batches(template, store, [-1], max_length=12, token_budget=24)
    with pytest.raises(InputError, match="as many"):
        pair_batches(template, store, [0, 1], store, [0], max_length=12, token_budget=24)
    short = tokenize(TEXTS, tokenizer, limit=4, cache=None, name="texts")
    with pytest.raises(InputError, match="too short"):
        single_batches(template, short, [3], max_length=12, token_budget=24)
    single_batches(template, short, [3], max_length=6, token_budget=24)
