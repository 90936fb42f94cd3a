"""Exported models load plainly in a fresh process with equal scores, or nothing is exported."""

import json

import pytest
import torch
from sentence_transformers import CrossEncoder, SentenceTransformer

from sparring.models import load_ranker, load_retriever
from sparring.phases.export import export, verify_export
from sparring.types import InputError

CARD = {
    "retriever": "tiny-bert", "ranker": "tiny-cross-encoder", "data": "AWS CLI help, 1234abcd", "recipe": "ar2",
    "command": "sparring train data --recipe ar2", "seed": 7,
    "metrics": {"before": {"nDCG@10": 0.123456, "RR@10": 0.5}, "after": {"nDCG@10": 0.75}},
}  # fmt: skip


@pytest.fixture(scope="module")
def pair(tiny_st, tiny_bert):
    """A pair with everything that could get lost: prompts, lengths, two towers, changed weights, layers, a new head."""
    retriever = load_retriever(tiny_st, two_towers=True, query_prompt="질문: ", max_length=20)
    ranker = load_ranker(tiny_bert, layers=1, max_length=30)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in [*retriever.parameters(), *ranker.parameters()]:
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return retriever, ranker


@pytest.fixture(scope="module")
def exported(pair, tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    export(*pair, out, card=CARD)
    return out


@pytest.mark.slow
def test_files_and_plain_loading(pair, exported):
    assert sorted(path.name for path in exported.iterdir()) == ["ranker", "retriever"]
    files = {path.name for path in exported.rglob("*") if path.is_file()}
    assert "model.safetensors" in files
    assert not any(name.endswith((".bin", ".pt", ".pkl")) for name in files)
    retriever = SentenceTransformer(str(exported / "retriever"), device="cpu")
    assert retriever.prompts["query"] == "질문: "
    assert retriever.max_seq_length == 20
    ranker = CrossEncoder(str(exported / "ranker"), device="cpu")
    assert ranker.max_seq_length == 30
    assert isinstance(ranker.activation_fn, torch.nn.Identity)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["retriever", "ranker"])
def test_model_cards(exported, name):
    card = (exported / name / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\nlibrary_name: sentence-transformers\n")
    for text in (CARD[name], CARD["data"], CARD["command"], "- recipe: ar2", "- seed: 7", "sentence_transformers"):
        assert text in card
    assert "|  | nDCG@10 | RR@10 |\n| --- | --- | --- |\n| before | 0.1235 | 0.5000 |\n| after | 0.7500 |  |" in card
    assert (json.dumps({"query": "질문: "}, ensure_ascii=False) in card) == (name == "retriever")


@pytest.mark.slow
def test_the_ranker_card_of_a_cascade_by_both_scores_shows_how_to_order(pair, exported, tmp_path):
    export(*pair, tmp_path / "fused", card={**CARD, "fusion": 7.5})
    assert "similarity" not in (exported / "ranker" / "README.md").read_text(encoding="utf-8")
    card = (tmp_path / "fused" / "ranker" / "README.md").read_text(encoding="utf-8")
    code = card.split("```")[1].removeprefix("python")
    for name in ("retriever", "ranker"):
        code = code.replace(f"path/to/{name}", str(exported / name))
    found = {}
    exec(compile(code, "card", "exec"), found)  # what a reader of the card would paste
    retriever = SentenceTransformer(str(exported / "retriever"), device="cpu")
    ranker = CrossEncoder(str(exported / "ranker"), device="cpu")
    passages = ["a passage", "another passage"]
    vectors = retriever.encode_query("a question"), retriever.encode_document(passages)
    both = ranker.predict([("a question", p) for p in passages]) + 7.5 * vectors[1] @ vectors[0]
    assert found["best_first"].tolist() == sorted(range(2), key=lambda place: -both[place])
    assert len(set(both.tolist())) == 2


@pytest.mark.slow
def test_training_modes_are_kept(pair, exported):
    assert all(module.training for model in pair for module in model.modules() if not list(model.children()))


def test_an_existing_folder_is_never_overwritten(pair, tmp_path):
    (tmp_path / "ranker").mkdir()
    (tmp_path / "ranker" / "mine.txt").write_text("keep")
    with pytest.raises(InputError, match="already exists"):
        export(*pair, tmp_path, card={})
    assert [path.name for path in tmp_path.iterdir()] == ["ranker"]
    assert (tmp_path / "ranker" / "mine.txt").read_text() == "keep"


@pytest.mark.slow
def test_a_difference_fails_loudly(pair, exported):
    retriever, ranker = pair
    places = exported / "retriever", exported / "ranker"
    bias = ranker.model.model.classifier.bias
    with torch.no_grad():
        bias += 1e-3
    with pytest.raises(InputError, match=r"other scores[\s\S]*0\.001\d* in the (logits|predictions)"):
        verify_export(*places, retriever, ranker, ["how to create a bucket"], ["서울", "a key policy"])
    with torch.no_grad():
        bias -= 1e-3


@pytest.mark.slow
def test_a_model_that_does_not_load_fails_loudly(pair, exported, tmp_path):
    with pytest.raises(InputError, match="do not load in a fresh process"):
        verify_export(exported / "retriever", tmp_path / "nothing", *pair, ["a"], ["b"])
