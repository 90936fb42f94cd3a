"""Encoding gives the plain model's embeddings, and goes on where it was interrupted."""

import json

import numpy as np
import pytest
import torch

from sparring.models import Retriever, load_retriever
from sparring.phases.encode import encode
from sparring.types import InputError

TEXTS = [f"how to {verb} a {noun} 비밀번호 {i}" + " key policy" * (i % 5) for i, (verb, noun) in enumerate(
    (v, n) for v in ("create", "delete", "reset") for n in ("bucket", "user", "파일", "문서", "")
)]  # fmt: skip


class Counting(Retriever):
    """Counts embedded rows, and stops after a given number."""

    rows, stop_after = 0, 10**9

    def embed(self, inputs, kind):
        vectors = super().embed(inputs, kind)
        self.rows += len(vectors)
        if self.rows > self.stop_after:
            raise KeyboardInterrupt
        return vectors


@pytest.fixture
def retriever(tiny_st):
    loaded = load_retriever(tiny_st)
    return Counting(loaded.model, similarity=loaded.similarity, scale=loaded.scale)


@pytest.fixture
def store(retriever):
    return retriever.tokenize(TEXTS, "passage", None)


@pytest.mark.parametrize("on_disk", [False, True])
@pytest.mark.parametrize(("shard", "token_budget"), [(8192, 16384), (4, 60), (1, 1)])
def test_embeddings_of_the_plain_model(retriever, store, tmp_path, on_disk, shard, token_budget):
    out = tmp_path / "passages.npy" if on_disk else None
    found = encode(retriever, store, "passage", out=out, shard=shard, token_budget=token_budget)
    np.testing.assert_allclose(found, retriever.model.encode_document(TEXTS), atol=1e-5, rtol=0)
    assert found.dtype == np.float32
    assert isinstance(found, np.memmap) == on_disk
    if out:
        assert sorted(path.name for path in tmp_path.iterdir()) == ["passages.npy", "passages.npy.json"]


def test_an_interrupted_run_goes_on(retriever, store, tmp_path):
    out = tmp_path / "passages.npy"
    expected = encode(retriever, store, "passage", shard=4)
    retriever.rows, retriever.stop_after = 0, 6
    with pytest.raises(KeyboardInterrupt):
        encode(retriever, store, "passage", out=out, shard=4)
    assert not out.exists()
    retriever.rows, retriever.stop_after = 0, 10**9
    found = encode(retriever, store, "passage", out=out, shard=4)
    assert retriever.rows == len(TEXTS) - 4, "the first shard was there"
    np.testing.assert_array_equal(found, expected)
    retriever.rows = 0
    np.testing.assert_array_equal(encode(retriever, store, "passage", out=out, shard=4), expected)
    assert retriever.rows == 0, "a complete file is read"


def test_the_folder_of_shards_is_read_once(retriever, store, tmp_path, monkeypatch):
    listed, glob = [], type(tmp_path).glob
    monkeypatch.setattr(type(tmp_path), "glob", lambda path, *a, **k: listed.append(path) or glob(path, *a, **k))
    encode(retriever, store, "passage", out=tmp_path / "passages.npy", shard=2)
    assert sum(path.name.endswith(".parts") for path in listed) == 1, "each look at it costs as much as it has shards"


def test_shards_of_other_weights_are_not_used(retriever, store, tmp_path):
    out = tmp_path / "passages.npy"
    retriever.stop_after = 6
    with pytest.raises(KeyboardInterrupt):
        encode(retriever, store, "passage", out=out, shard=4)
    with torch.no_grad():
        for parameter in retriever.parameters():
            parameter.mul_(1.2)
    retriever.rows, retriever.stop_after = 0, 10**9
    found = encode(retriever, store, "passage", out=out, shard=4)
    assert retriever.rows == len(TEXTS)
    np.testing.assert_allclose(found, retriever.model.encode_document(TEXTS), atol=1e-5, rtol=0)


def test_other_embeddings_are_never_overwritten(retriever, store, tmp_path):
    out = tmp_path / "passages.npy"
    before = np.array(encode(retriever, store, "passage", out=out))
    for change in ({"kind": "query"}, {"dtype": torch.bfloat16}, {"store": retriever.tokenize(["a"], "passage", None)}):
        options = {"store": store, "kind": "passage", "out": out, **change}
        with pytest.raises(InputError, match="already exists"):
            encode(retriever, **options)
    (tmp_path / "passages.npy.json").unlink()
    with pytest.raises(InputError, match="unknown origin"):
        encode(retriever, store, "passage", out=out)
    np.testing.assert_array_equal(np.load(out), before)


def test_modes_come_back_also_after_an_error(retriever, store):
    retriever.train()
    retriever.model[1].eval()
    modes = [module.training for module in retriever.modules()]
    first, second = encode(retriever, store, "passage"), encode(retriever, store, "passage")
    np.testing.assert_array_equal(first, second, "dropout is off")
    assert [module.training for module in retriever.modules()] == modes
    retriever.stop_after = 0
    with pytest.raises(KeyboardInterrupt):
        encode(retriever, store, "passage")
    assert [module.training for module in retriever.modules()] == modes
    assert torch.is_grad_enabled()


def test_an_embedding_that_is_no_number_is_named_and_not_written(retriever, store, tmp_path, monkeypatch):
    real, calls = type(retriever).embed, iter(range(99))

    def spoilt(self, *args):
        found = real(self, *args)
        if next(calls) == 1:
            found[0, 0] = float("nan")
        return found

    monkeypatch.setattr(type(retriever), "embed", spoilt)
    with pytest.raises(InputError, match="NaN or infinity") as caught:
        encode(retriever, store, "passage", out=tmp_path / "p.npy", shard=2)
    assert caught.value.where in ("passage row 2", "passage row 3")
    assert not (tmp_path / "p.npy").exists()


def test_lower_precision_gives_float32(retriever, store, tmp_path):
    exact = encode(retriever, store, "passage")
    rough = encode(retriever, store, "passage", dtype=torch.bfloat16, out=tmp_path / "x.npy")
    assert rough.dtype == np.float32
    assert 0 < np.abs(exact - rough).max() < 0.05
    assert json.loads((tmp_path / "x.npy.json").read_text())["dtype"] == "torch.bfloat16"


def test_no_texts(retriever, tmp_path):
    store = retriever.tokenize([], "passage", None)
    for out in (None, tmp_path / "none.npy"):
        assert encode(retriever, store, "passage", out=out).shape == (0, 32)
