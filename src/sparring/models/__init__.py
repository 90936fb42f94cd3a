"""A retriever and a re-ranker: real sentence-transformers models that read tokens stored once."""

from sparring.models.batching import Batches, chunk_by_tokens
from sparring.models.ranker import Ranker, load_ranker
from sparring.models.retriever import Retriever, load_retriever
from sparring.models.template import Template
from sparring.models.tokens import TextSource, TokenStore, tokenize

__all__ = [
    "Batches", "Ranker", "Retriever", "Template", "TextSource", "TokenStore", "chunk_by_tokens", "load_ranker",
    "load_retriever", "tokenize",
]  # fmt: skip
