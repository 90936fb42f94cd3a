"""Joined cached ids equal what the model's own preprocessing gives, on random Unicode, Korean in NFC and NFD."""

import unicodedata

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sentence_transformers import CrossEncoder, SentenceTransformer

from sparring.models.batching import Batches, pair_batches, single_batches
from sparring.models.template import Template
from sparring.models.tokens import tokenize

KOREAN = "대한민국의 수도는 서울이다. 비밀번호를 어떻게 바꾸나요? 훓 뷁 ㅋㅋㅋ"
FRAGMENTS = [
    *KOREAN.split(), *unicodedata.normalize("NFD", KOREAN).split(),
    "create", "BUCKET", "naïve", "déjà-vu", "東京タワー", "[SEP]", "[MASK]", "</s>", "<s>", "<mask>", " ", "\t\n",
    "\u00a0", "\u200b", "\x00", "👩\u200d👧", "ﬁ", "12.5%", "a" * 120, "!!",
]  # fmt: skip
TEXTS = st.one_of(st.text(max_size=40), st.lists(st.sampled_from(FRAGMENTS), max_size=30).map(" ".join))
QUICK = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(params=["wordpiece", "unigram"])
def retriever(request, tiny_st, tiny_st_unigram) -> SentenceTransformer:
    path = tiny_st if request.param == "wordpiece" else tiny_st_unigram
    return SentenceTransformer(str(path), device="cpu")


@pytest.fixture(params=["wordpiece", "unigram"])
def ranker(request, tiny_ce, tiny_ce_unigram) -> CrossEncoder:
    path = tiny_ce if request.param == "wordpiece" else tiny_ce_unigram
    return CrossEncoder(str(path), device="cpu")


def in_order(batches: Batches) -> dict[str, torch.Tensor]:
    (inputs,) = batches.inputs
    return {name: values[batches.restore] for name, values in inputs.items()}


def require_equal(joined: dict[str, torch.Tensor], expected: dict) -> None:
    tensors = {name: value for name, value in expected.items() if isinstance(value, torch.Tensor)}
    assert joined.keys() == tensors.keys()
    for name, values in tensors.items():
        assert torch.equal(joined[name], values), name


@pytest.mark.parametrize("prompt", ["", "query: ", "질문:"])
def test_single_texts(retriever, prompt):
    model = retriever
    template = Template.probe(model.tokenizer)

    @QUICK
    @given(texts=st.lists(TEXTS, min_size=1, max_size=6), max_length=st.integers(3, 64))
    def check(texts, max_length):
        store = tokenize(texts, model.tokenizer, prompt=prompt, limit=64, cache=None, name="texts")
        model.max_seq_length = max_length
        expected = model.preprocess(texts, prompt=prompt or None, task="query")
        rows = range(len(texts))
        require_equal(
            in_order(single_batches(template, store, rows, max_length=max_length, token_budget=10**6)), expected
        )

    check()


@pytest.mark.parametrize("limit", [64, 512])
def test_pairs(ranker, limit):
    model = ranker
    template = Template.probe(model.tokenizer)

    @QUICK
    @given(pairs=st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=6), max_length=st.integers(5, 64))
    def check(pairs, max_length):
        queries, passages = map(list, zip(*pairs, strict=True))
        stores = [tokenize(t, model.tokenizer, limit=limit, cache=None, name="texts") for t in (queries, passages)]
        model.max_seq_length = max_length
        expected = model.preprocess([[q, p] for q, p in pairs])
        rows = range(len(pairs))
        batches = pair_batches(template, stores[0], rows, stores[1], rows, max_length=max_length, token_budget=10**6)
        require_equal(in_order(batches), expected)

    check()


def test_left_padding_and_other_pad_ids(ranker):
    tokenizer = ranker.tokenizer
    tokenizer.padding_side = "left"
    tokenizer.pad_token = tokenizer.mask_token
    template = Template.probe(tokenizer)
    assert template.left
    assert template.pad_id == tokenizer.mask_token_id
    texts = ["create a bucket", "서울", "how to reset a password in 대한민국"]
    store = tokenize(texts, tokenizer, limit=64, cache=None, name="texts")
    batches = pair_batches(template, store, [0, 1, 2], store, [2, 1, 0], max_length=11, token_budget=10**6)
    ranker.max_seq_length = 11
    expected = ranker.preprocess([[texts[0], texts[2]], [texts[1], texts[1]], [texts[2], texts[0]]])
    require_equal(in_order(batches), expected)
