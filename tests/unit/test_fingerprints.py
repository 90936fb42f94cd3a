"""What made an artifact is part of its name or note: change one thing alone, and the old artifact is not used."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sparring import data
from sparring.data import beir, loading
from sparring.models import Retriever, load_ranker, load_retriever, tokens
from sparring.phases import encode as encode_module
from sparring.phases.encode import encode
from sparring.types import InputError

TEXTS = ["how to create a bucket", "비밀번호 reset", "key policy"]
Made = tuple[Retriever, list[str], dict[str, Any]]


def weights(made: Made, _: pytest.MonkeyPatch) -> Made:
    with torch.no_grad():
        next(iter(made[0].parameters())).view(-1)[0] += 1e-3
    return made


def text(made: Made, _: pytest.MonkeyPatch) -> Made:
    return made[0], [*made[1][:2], made[1][2] + "."], made[2]


def order(made: Made, _: pytest.MonkeyPatch) -> Made:
    return made[0], made[1][::-1], made[2]


def dtype(made: Made, _: pytest.MonkeyPatch) -> Made:
    return made[0], made[1], {"dtype": torch.bfloat16}


def kind(made: Made, _: pytest.MonkeyPatch) -> Made:
    return made[0], made[1], {"kind": "query"}


def code(made: Made, patch: pytest.MonkeyPatch) -> Made:
    patch.setattr(encode_module, "CODE", "sparring 0.0.1")
    return made


def similarity(made: Made, _: pytest.MonkeyPatch) -> Made:
    return Retriever(made[0].model, similarity="dot", scale=1.0), made[1], made[2]


def reloaded(**options: Any) -> Callable[[Made, pytest.MonkeyPatch], Made]:
    def change(made: Made, _: pytest.MonkeyPatch) -> Made:
        return load_retriever(made[2]["folder"], **options), made[1], made[2]

    return change


def pooling(made: Made, _: pytest.MonkeyPatch) -> Made:
    made[0].model[1].pooling_mode = "cls"
    config = made[0].model[1].get_config_dict()
    assert "cls" in json.dumps(config), config
    return made


def special_tokens(made: Made, _: pytest.MonkeyPatch) -> Made:
    from dataclasses import replace

    read = made[0].inputs["passage"]
    made[0].inputs["passage"] = replace(read, template=replace(read.template, pad_id=1))
    return made


CHANGES: dict[str, Callable[[Made, pytest.MonkeyPatch], Made]] = {
    "weights": weights, "texts": text, "order of texts": order, "dtype": dtype, "kind": kind, "code version": code,
    "similarity": similarity, "prompt": reloaded(passage_prompt="passage: "), "max length": reloaded(max_length=20),
    "layers": reloaded(layers=1), "pooling": pooling, "special tokens": special_tokens,
}  # fmt: skip


def embeddings(made: Made, out: Path) -> Any:
    retriever, texts, options = made
    options = {key: value for key, value in options.items() if key != "folder"}
    of_kind = options.pop("kind", "passage")
    return encode(retriever, retriever.tokenize(texts, of_kind, None), of_kind, out=out, **options)


@pytest.fixture
def made(tiny_st: Path, tmp_path: Path) -> Made:
    folder = shutil.copytree(tiny_st, tmp_path / "model")
    return load_retriever(folder), list(TEXTS), {"folder": folder}


@pytest.mark.parametrize("name", CHANGES)
def test_embeddings(name: str, made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "e.npy"
    embeddings(made, out)
    embeddings(made, out)  # the same again is taken up
    before = out.read_bytes()
    with pytest.raises(InputError, match="already exists"):
        embeddings(CHANGES[name](made, monkeypatch), out)
    assert out.read_bytes() == before


TOKENS: dict[str, dict[str, Any]] = {
    "prompt": {"prompt": "query: "}, "limit": {"limit": 9}, "texts": {"texts": [*TEXTS, "one more"]},
    "code version": {"code": "sparring 0.0.1"}, "tokenizer": {"tokenizer_id": "another"},
}  # fmt: skip


@pytest.mark.parametrize("name", TOKENS)
def test_token_stores(name: str, tiny_st: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = load_retriever(tiny_st).inputs["passage"].tokenizer

    def store(texts: list[str] = TEXTS, code: str = "", **options: Any) -> str:
        if code:
            monkeypatch.setattr(tokens, "CODE", code)
        settings = {"prompt": "", "limit": 10, **options}
        return tokens.tokenize(texts, tokenizer, cache=tmp_path, name="texts", **settings).fingerprint

    first = store()
    assert store() == first
    assert len(list(tmp_path.iterdir())) == 1
    assert store(**TOKENS[name]) != first
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("damage", ["cut", "flip"])
@pytest.mark.parametrize("name", ["ids.int32", "offsets.npy", "true_lengths.npy", "manifest.json"])
def test_a_damaged_token_store_is_made_again(
    name: str, damage: str, tiny_st: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    retriever = load_retriever(tiny_st)
    whole = [list(ids) for ids in retriever.tokenize(TEXTS, "passage", tmp_path)]
    (folder,) = tmp_path.iterdir()
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / name).write_bytes(content if damage == "flip" else content[: len(content) // 2])
    assert [list(ids) for ids in retriever.tokenize(TEXTS, "passage", tmp_path)] == whole
    assert "made again" in caplog.text
    assert [p.name for p in tmp_path.iterdir()] == [folder.name]


def test_converted_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    beir.write_passages([("1", "t", "x")], tmp_path / "d" / "corpus.jsonl")
    beir.write_queries([("q", "w", ())], tmp_path / "d" / "queries.jsonl")
    beir.write_qrels({"q": {"1": 1}}, tmp_path / "d" / "qrels" / "train.tsv")
    cache = tmp_path / "cache"
    for number, change in enumerate((lambda: None, lambda: monkeypatch.setattr(loading, "CONVERSION", 99),
                                     lambda: monkeypatch.setattr(loading, "__version__", "0.0.1")), 1):  # fmt: skip
        change()
        data.load(tmp_path / "d", cache=cache)
        assert len(list((cache / "data").iterdir())) == number
    data.load(tmp_path / "d", cache=cache, titles=False)
    assert len(list((cache / "data").iterdir())) == 4


def test_rankers(tiny_ce: Path) -> None:
    first = load_ranker(tiny_ce).fingerprint()
    assert load_ranker(tiny_ce).fingerprint() == first
    assert load_ranker(tiny_ce, max_length=20).fingerprint() != first
    assert load_ranker(tiny_ce, layers=1).fingerprint() != first
    changed = load_ranker(tiny_ce)
    weights((changed, [], {}), pytest.MonkeyPatch())  # type: ignore[arg-type]
    assert changed.fingerprint() != first
