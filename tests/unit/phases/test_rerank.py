"""Pair scores of a real, tiny cross-encoder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from sentence_transformers import CrossEncoder
from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

from sparring.models import Ranker, load_ranker
from sparring.models.tokens import TokenStore, tokenize
from sparring.phases.rerank import rerank, score_pairs
from sparring.types import InputError

QUERIES = ["copy a file", "list", "the bucket of a user"]
PASSAGES = ["a bucket", "copy the file to a bucket", "list users", "file", "user user user the file list copy"]


@pytest.fixture(scope="module")
def ranker(tmp_path_factory: pytest.TempPathFactory) -> Ranker:
    folder: Path = tmp_path_factory.mktemp("ranker")
    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        "copy",
        "a",
        "the",
        "file",
        "list",
        "bucket",
        "of",
        "user",
        "to",
    ]
    (folder / "vocab.txt").write_text("\n".join(words), encoding="utf-8")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(words), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
        max_position_embeddings=64, num_labels=1, initializer_range=0.5,
    )  # fmt: skip
    BertForSequenceClassification(config).save_pretrained(folder)
    BertTokenizerFast(vocab=str(folder / "vocab.txt"), model_max_length=64).save_pretrained(folder)
    return load_ranker(str(folder))


@pytest.fixture(scope="module")
def stores(ranker: Ranker) -> tuple[TokenStore, TokenStore]:
    tokenizer = ranker.model.tokenizer
    made = [tokenize(t, tokenizer, limit=64, cache=None, name="texts") for t in (QUERIES, PASSAGES)]
    return made[0], made[1]


def test_scores_are_the_cross_encoders_in_the_given_order(ranker: Ranker, stores: tuple) -> None:
    query_rows, passage_rows = np.array([2, 0, 1, 0, 2, 0]), np.array([4, 1, 2, 1, 0, 3])  # one pair twice
    found = score_pairs(ranker, *stores, query_rows, passage_rows, token_budget=40)
    model: CrossEncoder = ranker.model
    pairs = [(QUERIES[q], PASSAGES[p]) for q, p in zip(query_rows, passage_rows, strict=True)]
    expected = model.predict(pairs, activation_fn=torch.nn.Identity(), show_progress_bar=False)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert np.ptp(found) > 1e-3


def test_an_equal_pair_is_scored_once(ranker: Ranker, stores: tuple) -> None:
    seen = []
    handle = ranker.register_forward_hook(lambda *args: seen.append(len(args[2])))
    try:
        score_pairs(ranker, *stores, np.zeros(500, dtype=int), np.arange(500) % 2)
    finally:
        handle.remove()
    assert seen == [2]


def test_modes_and_gradients_are_left_alone(ranker: Ranker, stores: tuple) -> None:
    """Dropout is off while scoring; a module that rested keeps resting afterwards."""
    ranker.train()
    resting = next(m for m in ranker.modules() if isinstance(m, torch.nn.Dropout))
    resting.eval()
    try:
        one, two = (score_pairs(ranker, *stores, np.array([0]), np.array([1])) for _ in range(2))
        assert one == two
        assert ranker.training
        assert not resting.training
        assert all(p.grad is None for p in ranker.parameters())
    finally:
        ranker.eval()


def test_bf16_is_close(ranker: Ranker, stores: tuple) -> None:
    rows = np.array([0, 1, 2]), np.array([1, 2, 3])
    half = score_pairs(ranker, *stores, *rows, dtype=torch.bfloat16)
    np.testing.assert_allclose(half, score_pairs(ranker, *stores, *rows), atol=0.2, rtol=0.05)


def test_no_pairs_and_bad_pairs(ranker: Ranker, stores: tuple) -> None:
    assert score_pairs(ranker, *stores, np.array([]), np.array([])).shape == (0,)
    with pytest.raises(InputError, match="as many queries"):
        score_pairs(ranker, *stores, np.array([0, 1]), np.array([0]))


def test_a_score_that_is_not_finite_names_its_pair(ranker: Ranker, stores: tuple) -> None:
    bias = dict(ranker.named_parameters())[next(n for n, _ in ranker.named_parameters() if n.endswith("r.bias"))]
    kept = bias.detach().clone()
    with torch.no_grad():
        bias.fill_(float("nan"))
    try:
        with pytest.raises(InputError, match=r"(?s)not finite.*query row 1, passage row 2"):
            score_pairs(ranker, *stores, np.array([1]), np.array([2]))
    finally:
        with torch.no_grad():
            bias.copy_(kept)


def test_lists_in_the_order_of_new_scores() -> None:
    rows = np.array([[5, 3, 9, -1], [1, 2, 3, 4]])
    scores, found = rerank(rows, np.array([[0.1, 2.0, 0.1, 99.0], [1, 1, 1, 1]]))
    assert found.tolist() == [[3, 5, 9, -1], [1, 2, 3, 4]]  # equal scores: the first stage's order
    assert scores[0, 3] == -np.inf
    assert scores.dtype == np.float32
