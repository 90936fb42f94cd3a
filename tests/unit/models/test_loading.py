"""Layers, weights that must be there, and what is said about folders that are no models."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import CrossEncoder, SentenceTransformer
from transformers import AutoModel, BertConfig, BertForMaskedLM

from sparring.models import load_ranker, load_retriever
from sparring.types import InputError


@pytest.fixture
def copied(tiny_st, tmp_path):
    return shutil.copytree(tiny_st, tmp_path / "model")


def edit(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(("load", "plain"), [(load_retriever, SentenceTransformer), (load_ranker, CrossEncoder)])
def test_the_first_layers_are_kept_and_load_again(load, plain, tiny_st, tiny_ce, tmp_path):
    path = tiny_st if load is load_retriever else tiny_ce
    whole, cut = load(path), load(path, layers=1)
    kept = dict(cut.model.transformers_model.named_parameters())
    original = dict(whole.model.transformers_model.named_parameters())
    assert not any("layer.1." in name for name in kept)
    assert all(torch.equal(value, original[name]) for name, value in kept.items())
    cut.model.save_pretrained(str(tmp_path), create_model_card=False)
    assert plain(str(tmp_path), device="cpu").transformers_model.config.num_hidden_layers == 1
    assert load(tmp_path).fingerprint() == cut.fingerprint()
    for wrong in (3, -1):
        with pytest.raises(InputError, match=r"1 \.\. 2 layers"):
            load(path, layers=wrong)


@pytest.mark.parametrize("load", [load_retriever, load_ranker])
def test_missing_and_unexpected_weights(load, copied):
    edit(copied, lambda w: w.pop("encoder.layer.1.output.dense.weight"))
    with pytest.raises(InputError, match=r"missing .*encoder\.layer\.1\.output\.dense\.weight"):
        load(copied)
    edit(copied, lambda w: w.update({"encoder.layer.1.output.dense.weight": torch.zeros(32, 64)}))
    load(copied)
    edit(copied, lambda w: w.update({"encoder.layer.2.output.dense.weight": torch.zeros(32, 64)}))
    with pytest.raises(InputError, match=r"unexpected .*encoder\.layer\.2"):
        load(copied)


def test_wrong_shapes(copied):
    edit(copied, lambda w: w.update({"encoder.layer.1.output.dense.weight": torch.zeros(32, 63)}))
    with pytest.raises(InputError, match="cannot be loaded"):
        load_retriever(copied)


def test_a_retriever_does_not_need_its_pooler(copied):
    edit(copied, lambda w: [w.pop(name) for name in list(w) if name.startswith("pooler.")])
    load_retriever(copied)


def test_a_cross_encoder_without_its_head(tiny_ce, tmp_path):
    folder = edit(shutil.copytree(tiny_ce, tmp_path / "model"), lambda w: w.pop("classifier.weight"))
    with pytest.raises(InputError, match=r"missing classifier\.weight"):
        load_ranker(folder)
    with pytest.raises(InputError, match="cannot be a retriever"):
        load_retriever(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_named(value, copied, tiny_ce, tmp_path):
    ranker = shutil.copytree(tiny_ce, tmp_path / "ranker")
    norm = "embeddings.LayerNorm.bias"
    for folder, load, name in ((copied, load_retriever, norm), (ranker, load_ranker, "classifier.bias")):
        edit(folder, lambda w, name=name: w[next(key for key in w if key.endswith(name))].view(-1)[0].fill_(value))
        with pytest.raises(InputError, match="weights that are no numbers") as caught:
            load(folder)
        assert name in caught.value.got
        assert caught.value.where == str(folder)


def test_masked_language_models_lose_their_head(tiny_bert, tmp_path, caplog):
    folder = shutil.copytree(tiny_bert, tmp_path / "model")
    BertForMaskedLM(BertConfig.from_pretrained(tiny_bert)).save_pretrained(folder)
    with caplog.at_level("INFO", logger="sparring"):
        load_retriever(folder)
        ranker = load_ranker(folder, seed=4)
    assert "left out (cls.predictions" in caplog.text
    assert "bert.pooler.dense.weight" in caplog.text, "the pooler of the new ranker is new, too"
    assert torch.equal(ranker.model.model.bert.pooler.dense.bias, torch.zeros(32))


@pytest.mark.parametrize("load", [load_retriever, load_ranker])
def test_paths_that_are_no_models(load, copied, tmp_path):
    with pytest.raises(InputError, match=r"no model[\s\S]*/nowhere[\s\S]*hub name, or a folder"):
        load(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"cannot be found[\s\S]*someone/not-in-the-cache"):
        load("someone/not-in-the-cache")
    with pytest.raises(InputError, match="a file"):
        load(copied / "modules.json")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"not a model[\s\S]*no config\.json"):
        load(tmp_path / "empty")
    (copied / "model.safetensors").unlink()
    with pytest.raises(InputError, match="no weights"):
        load(copied)


def test_pickled_weights_are_refused(copied, tiny_bert):
    (copied / "model.safetensors").unlink()
    torch.save(AutoModel.from_pretrained(tiny_bert).state_dict(), copied / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"only pickled weights[\s\S]*save_pretrained"):
        load_retriever(copied)


@pytest.mark.parametrize(("folder", "longest"), [("tiny_bert", 64), ("tiny_unigram", 64)])
def test_lengths(folder, longest, request):
    path = request.getfixturevalue(folder)
    assert load_retriever(path, max_length=longest).model.max_seq_length == longest
    for wrong in (longest + 1, -1):
        with pytest.raises(InputError, match=rf"1 \.\. {longest} tokens"):
            load_retriever(path, max_length=wrong)
    with pytest.raises(InputError, match="no room"):
        load_retriever(path, max_length=2)


def test_objects_come_in_and_stay(tiny_st, tiny_ce):
    model, other = SentenceTransformer(str(tiny_st), device="cpu"), CrossEncoder(str(tiny_ce), device="cpu")
    assert load_retriever(model).model is model
    assert load_ranker(other).model is other


def test_half_precision_becomes_float32(tiny_st):
    model = SentenceTransformer(str(tiny_st), device="cpu").half()
    assert {p.dtype for p in load_retriever(model).parameters()} == {torch.float32}
