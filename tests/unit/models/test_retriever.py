"""The retriever gives what its SentenceTransformer gives, from stored tokens."""

import logging

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling, Router, Transformer
from torch.nn.functional import cosine_similarity

from sparring.models import load_retriever
from sparring.types import InputError

TEXTS = [
    "create a bucket", "비밀번호를 어떻게 바꾸나요", "how to reset a password " * 9, "서울", "", "what is a policy?",
]  # fmt: skip


def embed(retriever, texts, kind, token_budget=10**6):
    store = retriever.tokenize(texts, kind, None)
    return retriever(retriever.batches(store, range(len(texts)), kind, token_budget=token_budget), kind)


def plain(model, texts, kind):
    encode = model.encode_query if kind == "query" else model.encode_document
    return encode(texts, convert_to_tensor=True)


@pytest.fixture
def retriever(tiny_st):
    return load_retriever(tiny_st).eval()


@pytest.mark.parametrize("kind", ["query", "passage"])
@pytest.mark.parametrize("folder", ["tiny_st", "tiny_st_unigram", "tiny_bert", "tiny_unigram"])
def test_embeddings_of_the_plain_model(folder, kind, request):
    retriever = load_retriever(request.getfixturevalue(folder)).eval()
    for budget in (10**6, 70):
        found = embed(retriever, TEXTS, kind, budget)
        torch.testing.assert_close(found, plain(retriever.model, TEXTS, kind), atol=1e-5, rtol=0)
    assert found.shape == (len(TEXTS), retriever.dim)


def test_prompts_pooling_without_prompt_dense_and_truncation(tiny_bert):
    modules = [Transformer(str(tiny_bert)), Pooling(32, "mean", include_prompt=False), Dense(32, 16), Normalize()]
    prompts = {"query": "query: ", "document": "passage: "}
    model = SentenceTransformer(modules=modules, prompts=prompts, truncate_dim=12, device="cpu")
    retriever = load_retriever(model).eval()
    assert retriever.dim == 12
    for kind in ("query", "passage"):
        expected = torch.nn.functional.normalize(plain(model, TEXTS, kind), dim=-1)
        torch.testing.assert_close(embed(retriever, TEXTS, kind), expected, atol=1e-5, rtol=0)
    assert not torch.allclose(embed(retriever, TEXTS, "query"), embed(retriever, TEXTS, "passage"))


def test_prompt_names_and_replacements(tiny_bert, tiny_st):
    modules = [Transformer(str(tiny_bert)), Pooling(32)]
    named = SentenceTransformer(modules=modules, prompts={"query": "Q: ", "passage": "P: "}, device="cpu")
    retriever = load_retriever(named)
    assert [retriever.inputs[kind].prompt for kind in ("query", "passage")] == ["Q: ", "P: "]
    replaced = load_retriever(tiny_st, query_prompt="질문: ", passage_prompt="")
    assert replaced.model.prompts == {"query": "질문: ", "document": ""}
    expected = replaced.model.encode_query(TEXTS, convert_to_tensor=True)
    torch.testing.assert_close(embed(replaced.eval(), TEXTS, "query"), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("own", "normalised", "options", "similarity", "scale"),
    [
        (None, True, {}, "cosine", 20.0),
        ("cosine", False, {}, "cosine", 20.0),
        ("dot", False, {}, "dot", 1.0),
        ("dot", True, {}, "dot", 20.0),
        ("dot", False, {"similarity": "cosine"}, "cosine", 20.0),
        ("cosine", False, {"similarity": "dot"}, "dot", 1.0),
        ("cosine", True, {"scale": 5.0}, "cosine", 5.0),
    ],
)
def test_similarity_and_scale(own, normalised, options, similarity, scale, tiny_bert, caplog):
    modules = [Transformer(str(tiny_bert)), Pooling(32)] + [Normalize()] * normalised
    model = SentenceTransformer(modules=modules, similarity_fn_name=own, device="cpu")
    with caplog.at_level(logging.INFO, logger="sparring"):
        retriever = load_retriever(model, **options).eval()
    assert (retriever.similarity, retriever.scale) == (similarity, scale)
    assert model.similarity_fn_name == similarity
    assert f"similarity: {similarity}" in caplog.text
    vectors = embed(retriever, TEXTS, "query")
    if similarity == "cosine":
        torch.testing.assert_close(vectors.norm(dim=-1), torch.ones(len(TEXTS)), atol=1e-6, rtol=0)
    scores = retriever.score(vectors[:2], vectors[None].expand(2, -1, -1))
    reference = model.similarity(vectors[:2], vectors) * scale
    torch.testing.assert_close(scores, reference, atol=1e-4, rtol=1e-5)


def test_plain_encoders_use_dot_and_the_chosen_pooling(tiny_bert):
    first = load_retriever(tiny_bert, pooling="cls").eval()
    assert (first.similarity, first.scale) == ("dot", 1.0)
    tokens = first.model.encode(TEXTS[:1], output_value="token_embeddings")[0]
    torch.testing.assert_close(embed(first, TEXTS[:1], "query")[0], tokens[0], atol=1e-5, rtol=0)


def test_wrong_options(tiny_st, tiny_bert):
    model = SentenceTransformer(modules=[Transformer(str(tiny_bert)), Pooling(32)], device="cpu")
    model.similarity_fn_name = "euclidean"
    with pytest.raises(InputError, match="euclidean"):
        load_retriever(model)
    with pytest.raises(InputError, match="dot or cosine"):
        load_retriever(tiny_st, similarity="manhattan")
    with pytest.raises(InputError, match="above 0"):
        load_retriever(tiny_st, scale=0.0)
    with pytest.raises(InputError, match="its own pooling"):
        load_retriever(tiny_st, pooling="cls")
    with pytest.raises(InputError, match="mean or cls"):
        load_retriever(tiny_bert, pooling="max")


def test_float32_and_exact_scores_under_autocast(retriever):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        vectors = embed(retriever, TEXTS, "query")
        scores = retriever.score(vectors[:1], vectors[None])
    assert vectors.dtype == scores.dtype == torch.float32
    reference = cosine_similarity(vectors[:1].double(), vectors.double()) * 20
    torch.testing.assert_close(scores[0].double(), reference, atol=1e-4, rtol=0)
    torch.testing.assert_close(vectors, embed(retriever, TEXTS, "query"), atol=0.05, rtol=0)


@pytest.mark.parametrize("two_towers", [False, True])
def test_every_trainable_parameter_gets_a_gradient(tiny_st, two_towers):
    retriever = load_retriever(tiny_st, two_towers=two_towers)
    queries, passages = embed(retriever, TEXTS, "query", 70), embed(retriever, TEXTS, "passage")
    retriever.score(queries, passages[None].expand(len(TEXTS), -1, -1))[:, 0].sum().backward()
    missing = [name for name, p in retriever.named_parameters() if p.requires_grad and p.grad is None]
    assert missing == []
    frozen = {name for name, p in retriever.named_parameters() if not p.requires_grad}
    assert frozen
    assert all(".pooler." in name for name in frozen)


def test_gradients_do_not_depend_on_the_chunks(retriever):
    gradients = []
    for budget in (10**6, 70):
        retriever.zero_grad()
        weights = torch.linspace(-1, 1, len(TEXTS))[:, None]
        (embed(retriever, TEXTS, "query", budget) * weights).sum().backward()
        gradients.append(torch.cat([p.grad.ravel() for p in retriever.parameters() if p.requires_grad]))
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-5, rtol=1e-4)


def test_two_towers_start_equal_and_are_routed(tiny_st, tmp_path):
    retriever = load_retriever(tiny_st, two_towers=True, max_length=20).eval()
    assert isinstance(retriever.model[0], Router)
    assert [read.max_length for read in retriever.inputs.values()] == [20, 20]
    torch.testing.assert_close(embed(retriever, TEXTS, "query"), embed(retriever, TEXTS, "passage"))
    passages = embed(retriever, TEXTS, "passage")
    with torch.no_grad():
        for parameter in retriever.model[0].sub_modules["query"].parameters():
            parameter.mul_(1.5)
    assert torch.equal(embed(retriever, TEXTS, "passage"), passages)
    retriever.model.save_pretrained(str(tmp_path), create_model_card=False)
    again = load_retriever(tmp_path)
    assert again.fingerprint() == retriever.fingerprint()
    for kind in ("query", "passage"):
        expected = plain(again.model, TEXTS, kind)
        torch.testing.assert_close(embed(retriever, TEXTS, kind), expected, atol=1e-5, rtol=0)


def test_no_rows(retriever):
    store = retriever.tokenize(TEXTS, "query", None)
    assert retriever(retriever.batches(store, np.empty(0, np.int64), "query", token_budget=10), "query").shape == (
        0,
        32,
    )


def test_fingerprint(tiny_st, retriever, tmp_path):
    base = retriever.fingerprint()
    retriever.model.save_pretrained(str(tmp_path), create_model_card=False)
    assert load_retriever(tmp_path).fingerprint() == base
    others = [
        load_retriever(tiny_st, query_prompt="q: "), load_retriever(tiny_st, max_length=20),
        load_retriever(tiny_st, similarity="dot"), load_retriever(tiny_st, layers=1),
    ]  # fmt: skip
    with torch.no_grad():
        next(retriever.parameters())[0, 0] += 1e-3
    assert len({base, retriever.fingerprint(), *(other.fingerprint() for other in others)}) == 6


def test_stores_of_another_tokenizer_or_prompt_are_refused(retriever, tiny_st, tiny_unigram):
    other = load_retriever(tiny_unigram).tokenize(TEXTS, "query", None)
    with pytest.raises(InputError, match="another tokenizer"):
        retriever.batches(other, [0], "query", token_budget=100)
    prompted = load_retriever(tiny_st, query_prompt="q: ").tokenize(TEXTS, "query", None)
    with pytest.raises(InputError, match="another prompt"):
        retriever.batches(prompted, [0], "query", token_budget=100)
