"""The store on disk: contents, caching, sharing; and what a tokenizer must offer."""

import numpy as np
import pytest
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from sparring.models import tokens
from sparring.models.template import Template, longest_first
from sparring.models.tokens import TokenStore, tokenize
from sparring.types import InputError

TEXTS = ["create a bucket", "", "비밀번호를 어떻게 바꾸나요", "how to reset a password " * 9]


@pytest.fixture
def tokenizer(tiny_bert):
    return AutoTokenizer.from_pretrained(tiny_bert)


def test_rows_lengths_and_cap(tokenizer, tmp_path):
    store = tokenize(TEXTS, tokenizer, limit=10, cache=tmp_path, name="texts")
    expected = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in TEXTS]
    assert [store[row].tolist() for row in range(len(store))] == [ids[:10] for ids in expected]
    assert store.true_lengths.tolist() == [len(ids) for ids in expected]
    assert store.lengths.tolist() == [min(10, len(ids)) for ids in expected]
    assert store.ids.dtype == np.int32
    assert isinstance(store.ids, np.memmap)
    with pytest.raises(IndexError):
        store[len(TEXTS)]


def test_memory_and_disk_agree_over_many_chunks(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(tokens, "CHUNK", 3)
    texts = [f"{text} {i}" for i in range(5) for text in TEXTS]
    on_disk = tokenize(texts, tokenizer, limit=10, cache=tmp_path, name="texts")
    in_memory = tokenize(texts, tokenizer, limit=10, cache=None, name="texts")
    for name in ("ids", "offsets", "true_lengths"):
        assert np.array_equal(getattr(on_disk, name), getattr(in_memory, name)), name
    assert on_disk.fingerprint == in_memory.fingerprint


def test_a_second_call_reads_the_same_files(tokenizer, tmp_path):
    first = tokenize(TEXTS, tokenizer, limit=10, cache=tmp_path, name="texts")
    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    tokenizer(["state of truncation and padding"], truncation=True, max_length=4, padding="max_length")
    second = tokenize(TEXTS, tokenizer, limit=10, cache=tmp_path, name="other name")
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == files
    assert first.fingerprint == second.fingerprint


def test_a_known_fingerprint_is_not_computed_again(tokenizer, monkeypatch):
    settings = {"limit": 10, "cache": None, "name": "texts"}
    known = tokens.tokenizer_fingerprint(tokenizer)
    plain = tokenize(TEXTS, tokenizer, **settings)
    monkeypatch.delattr(tokens, "tokenizer_fingerprint")
    assert tokenize(TEXTS, tokenizer, **settings, tokenizer_id=known).fingerprint == plain.fingerprint


@pytest.mark.parametrize("change", ["texts", "prompt", "limit", "tokenizer"])
def test_fingerprint_covers(change, tokenizer, tiny_unigram, tmp_path):
    settings = {"prompt": "", "limit": 10}
    texts = TEXTS
    base = tokenize(texts, tokenizer, **settings, cache=tmp_path, name="texts")
    if change == "texts":
        texts = [*TEXTS[:-1], TEXTS[-1] + "!"]
    elif change == "tokenizer":
        tokenizer = AutoTokenizer.from_pretrained(tiny_unigram)
    else:
        settings[change] = {"prompt": "query: ", "limit": 11}[change]
    assert tokenize(texts, tokenizer, **settings, cache=tmp_path, name="texts").fingerprint != base.fingerprint
    assert len(list(tmp_path.iterdir())) == 2


def test_no_texts(tokenizer, tmp_path):
    for cache in (None, tmp_path):
        store = tokenize([], tokenizer, limit=10, cache=cache, name="texts")
        assert len(store) == 0
        assert store.lengths.tolist() == []


def test_an_interrupted_store_is_not_used(tokenizer, tmp_path):
    class Interrupted:
        fingerprint = "x"

        def __len__(self):
            return 2 * tokens.CHUNK

        def texts(self, rows):
            if rows[0]:
                raise KeyboardInterrupt
            return ["a"] * len(rows)

    with pytest.raises(KeyboardInterrupt):
        tokenize(Interrupted(), tokenizer, limit=10, cache=tmp_path, name="texts")
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_store_is_an_error(tokenizer, tmp_path):
    tokenize(TEXTS, tokenizer, limit=10, cache=tmp_path, name="texts")
    (folder,) = tmp_path.iterdir()
    (folder / "ids.int32").write_bytes(b"\0" * 8)
    with pytest.raises(InputError, match="damaged"):
        TokenStore.open(folder)


def test_longest_first_equals_the_tokenizers_library(tokenizer):
    backend = tokenizer.backend_tokenizer
    backend.no_padding()
    words = {1: "a", 2: "of"}
    first_id, second_id = (tokenizer.convert_tokens_to_ids(word) for word in words.values())
    lengths = np.arange(9)
    first, second = (grid.ravel() for grid in np.meshgrid(lengths, lengths))
    pairs = [("a " * a, "of " * b) for a, b in zip(first, second, strict=True)]
    for room in range(8):
        backend.enable_truncation(max_length=room + 3, strategy="longest_first")
        found = [encoding.ids for encoding in backend.encode_batch(pairs)]
        kept = longest_first(first, second, room)
        assert kept[0].tolist() == [ids.count(first_id) for ids in found], room
        assert kept[1].tolist() == [ids.count(second_id) for ids in found], room


def test_layouts_that_cannot_be_reproduced(tokenizer):
    tokenizer.truncation_side = "left"
    with pytest.raises(InputError, match="truncation_side"):
        Template.probe(tokenizer)
    tokenizer.truncation_side = "right"
    special = [("[CLS]", tokenizer.cls_token_id), ("[SEP]", tokenizer.sep_token_id)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $B [SEP] $A [SEP]", special_tokens=special
    )
    with pytest.raises(InputError, match="pair in order"):
        Template.probe(tokenizer)
    tokenizer.pad_token = None
    with pytest.raises(InputError, match="padding token"):
        Template.probe(tokenizer)
