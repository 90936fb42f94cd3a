"""The ranker gives the logits of its CrossEncoder, from stored tokens."""

import logging

import numpy as np
import pytest
import torch
from sentence_transformers import CrossEncoder
from torch import nn

from sparring.models import load_ranker, load_retriever
from sparring.types import InputError

QUERIES = ["create a bucket", "비밀번호를 어떻게 바꾸나요", "what is the answer " * 12]
PASSAGES = ["how to reset a password " * 9, "서울", "", "a key policy", "대한민국의 수도는 서울이다"]
ROWS = np.divmod(np.arange(15), 5)


def logits(ranker, token_budget=10**6, rows=ROWS):
    queries, passages = ranker.tokenize(QUERIES, None, "query"), ranker.tokenize(PASSAGES, None)
    return ranker(ranker.batches(queries, rows[0], passages, rows[1], token_budget=token_budget))


def predicted(model, **options):
    pairs = [(QUERIES[q], PASSAGES[p]) for q, p in zip(*ROWS, strict=True)]
    return model.predict(pairs, convert_to_tensor=True, **options)


@pytest.mark.parametrize("folder", ["tiny_ce", "tiny_ce_unigram"])
@pytest.mark.parametrize("max_length", [0, 21])
def test_logits_of_the_plain_model(folder, max_length, request):
    ranker = load_ranker(request.getfixturevalue(folder), max_length=max_length).eval()
    assert isinstance(ranker.model.activation_fn, nn.Sigmoid)
    for budget in (10**6, 130):
        found = logits(ranker, budget)
        expected = predicted(ranker.model, activation_fn=nn.Identity())
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
        torch.testing.assert_close(found.sigmoid(), predicted(ranker.model), atol=1e-5, rtol=0)
    assert found.shape == (15,)


def test_a_prompt_goes_before_the_query_only(tiny_ce):
    model = CrossEncoder(str(tiny_ce), prompts={"ask": "질문: "}, default_prompt_name="ask", device="cpu")
    ranker = load_ranker(model).eval()
    expected = predicted(model, activation_fn=nn.Identity())
    torch.testing.assert_close(logits(ranker), expected, atol=1e-5, rtol=0)
    passages = ranker.tokenize(PASSAGES, None)
    with pytest.raises(InputError, match="another prompt"):
        ranker.batches(passages, [0], passages, [0], token_budget=100)


@pytest.mark.parametrize("folder", ["tiny_bert", "tiny_st", "tiny_unigram"])
def test_an_encoder_gets_a_new_head(folder, request, caplog):
    path = request.getfixturevalue(folder)
    with caplog.at_level(logging.WARNING, logger="sparring"):
        first, again, other = (load_ranker(path, seed=seed).eval() for seed in (0, 0, 1))
    assert "a new one is drawn with seed 0 (classifier" in caplog.text
    assert torch.equal(logits(first), logits(again))
    assert not torch.equal(logits(first), logits(other))
    assert isinstance(first.model.activation_fn, nn.Identity)
    torch.testing.assert_close(logits(first), predicted(first.model), atol=1e-5, rtol=0)


def test_an_existing_head_is_kept(tiny_ce, caplog):
    ranker = load_ranker(tiny_ce, seed=5)
    assert "new one" not in caplog.text
    plain = CrossEncoder(str(tiny_ce), device="cpu")
    assert torch.equal(ranker.model.model.classifier.weight, plain.model.classifier.weight)


def test_one_label_only(tiny_bert, tmp_path):
    model = CrossEncoder(str(tiny_bert), num_labels=3, device="cpu", local_files_only=True)
    with pytest.raises(InputError, match="3 labels"):
        load_ranker(model)
    model.save_pretrained(str(tmp_path), create_model_card=False)
    with pytest.raises(InputError, match="3 labels"):
        load_ranker(tmp_path)


def test_float32_under_autocast(tiny_ce):
    ranker = load_ranker(tiny_ce).eval()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = logits(ranker)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, logits(ranker), atol=0.05, rtol=0)


def test_every_parameter_gets_a_gradient(tiny_ce, tiny_unigram):
    for ranker in (load_ranker(tiny_ce), load_ranker(tiny_unigram)):
        logits(ranker, 130).sum().backward()
        assert [name for name, p in ranker.named_parameters() if p.requires_grad and p.grad is None] == []


def test_no_pairs(tiny_ce):
    assert logits(load_ranker(tiny_ce), rows=([], [])).shape == (0,)


def test_fingerprint(tiny_ce, tmp_path):
    ranker = load_ranker(tiny_ce)
    base = ranker.fingerprint()
    ranker.model.save_pretrained(str(tmp_path), create_model_card=False)
    assert load_ranker(tmp_path).fingerprint() == base
    with torch.no_grad():
        ranker.model.model.classifier.bias += 1e-3
    changed = {ranker.fingerprint(), load_ranker(tiny_ce, max_length=20).fingerprint()}
    assert len({base, *changed}) == 3


def test_retriever_and_ranker_share_a_store(tiny_st, tiny_ce, tmp_path):
    retriever, ranker = load_retriever(tiny_st, max_length=20), load_ranker(tiny_ce)
    stores = [retriever.tokenize(PASSAGES, kind, tmp_path) for kind in ("query", "passage")]
    stores += [ranker.tokenize(PASSAGES, tmp_path, kind) for kind in ("query", "passage")]
    assert len({store.fingerprint for store in stores}) == 1
    assert len(list(tmp_path.iterdir())) == 1
