"""Tiny real models, built once per session: two layers of 32 dimensions, Latin and Hangul in their vocabularies."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OMP_NUM_THREADS", "1" if "PYTEST_XDIST_WORKER" in os.environ else "2")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import unicodedata
from pathlib import Path

import pytest

from server_fixtures import milvus_server, milvus_uri, postgres  # noqa: F401

TEXT = (
    "the a of is in to how what where who why when create delete list bucket instance user key policy password reset "
    "commit undo change file folder copy move search query passage answer question model train rank retrieve index "
    "서울 한국 대한민국 수도 문서 검색 질문 답변 사용자 비밀번호 파일 폴더 삭제 생성 어떻게 무엇 언제 모델 학습"
)
LENGTH = 64


def _pieces(normalise: str) -> tuple[list[str], list[str]]:
    """Words and single characters of the vocabulary, in one normal form, without duplicates."""
    words = [unicodedata.normalize(normalise, word) for word in TEXT.split()]
    letters = [chr(c) for c in range(33, 127) if not chr(c).isupper()] + list("éñüßはい東京中")
    characters = sorted({c for word in words for c in word} | set(letters))
    return [word for word in dict.fromkeys(words) if len(word) > 1], characters


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain BERT encoder with a WordPiece tokenizer: 2 layers, 32 dimensions, inputs of 64 tokens."""
    import torch
    from transformers import BertConfig, BertModel, BertTokenizerFast

    words, characters = _pieces("NFD")  # the BERT normaliser decomposes Hangul
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *characters, *(f"##{c}" for c in characters), *words]
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = BertTokenizerFast(vocab=vocabulary, do_lower_case=True, model_max_length=LENGTH)
    config = BertConfig(
        vocab_size=len(vocabulary), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=LENGTH, initializer_range=0.1,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("tiny_bert")
    with torch.random.fork_rng():
        torch.manual_seed(1)
        BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_unigram(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain XLM-RoBERTa encoder with a Unigram tokenizer (``<s> A </s></s> B </s>``): 2 layers, 32 dimensions."""
    import torch
    from transformers import XLMRobertaConfig, XLMRobertaModel, XLMRobertaTokenizer

    words, characters = _pieces("NFC")
    characters += sorted({c for word in words for c in unicodedata.normalize("NFD", word)} - set(characters))
    pieces = [(piece, 0.0) for piece in ("<s>", "<pad>", "</s>", "<unk>")]
    pieces += [("▁", -4.0), *((f"▁{word}", -6.0) for word in words), *((word, -8.0) for word in words)]
    pieces += [(c, -9.0) for c in characters] + [("<mask>", 0.0)]
    tokenizer = XLMRobertaTokenizer(vocab=pieces, model_max_length=LENGTH)
    config = XLMRobertaConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=LENGTH + 2, type_vocab_size=1, initializer_range=0.1, pad_token_id=1, bos_token_id=0,
        eos_token_id=2,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("tiny_unigram")
    with torch.random.fork_rng():
        torch.manual_seed(2)
        XLMRobertaModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def sentence_transformer(encoder: Path, folder: Path) -> Path:
    """Save a SentenceTransformer of an encoder: mean pooling, then normalisation."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer

    transformer = Transformer(str(encoder))
    modules = [transformer, Pooling(transformer.get_embedding_dimension(), "mean"), Normalize()]
    SentenceTransformer(modules=modules, device="cpu").save_pretrained(str(folder), create_model_card=False)
    return folder


def cross_encoder(encoder: Path, folder: Path) -> Path:
    """Save a CrossEncoder of an encoder: one logit, whose ``predict`` is a sigmoid."""
    import torch
    from sentence_transformers import CrossEncoder

    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = CrossEncoder(str(encoder), num_labels=1, device="cpu", local_files_only=True)
    model.save_pretrained(str(folder), create_model_card=False)
    return folder


@pytest.fixture(scope="session")
def tiny_st(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved SentenceTransformer of ``tiny_bert``: mean pooling and normalisation."""
    return sentence_transformer(tiny_bert, tmp_path_factory.mktemp("tiny_st"))


@pytest.fixture(scope="session")
def tiny_ce(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved CrossEncoder of ``tiny_bert`` with one logit."""
    return cross_encoder(tiny_bert, tmp_path_factory.mktemp("tiny_ce"))


@pytest.fixture(scope="session")
def tiny_st_unigram(tiny_unigram: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved SentenceTransformer of ``tiny_unigram``."""
    return sentence_transformer(tiny_unigram, tmp_path_factory.mktemp("tiny_st_unigram"))


@pytest.fixture(scope="session")
def tiny_ce_unigram(tiny_unigram: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved CrossEncoder of ``tiny_unigram`` with one logit."""
    return cross_encoder(tiny_unigram, tmp_path_factory.mktemp("tiny_ce_unigram"))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--kills", type=int, help="runs that are killed at random moments: 8, and 20 in the long form")
    parser.addoption("--long", action="store_true", help="also what takes minutes: kills, servers, benchmarks")


def pytest_configure(config: pytest.Config) -> None:
    if config.option.kills is None:
        config.option.kills = 20 if config.option.long else 8


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what `make test-long` runs."""
    if config.getoption("--long"):
        return
    left_out = [item for item in items if item.get_closest_marker("long")]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not item.get_closest_marker("long")]
