"""A SentenceTransformer that is trained and scored on lists of stored tokens."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Router
from torch import Tensor, nn
from torch.nn import functional

from sparring.models.batching import Batches, Rows, single_batches
from sparring.models.cpu import training_on_cpu
from sparring.models.inputs import TextInput, set_max_length, text_input
from sparring.models.lean import lean_encoders
from sparring.models.loading import load_sentence_transformer, resolve
from sparring.models.packed import rows_of
from sparring.models.parallel import joined, over_chunks
from sparring.models.tokens import TextSource, TokenStore, tokenize
from sparring.models.weights import freeze_poolers, in_float32, keep_layers, model_fingerprint
from sparring.types import InputError

logger = logging.getLogger("sparring")

Kind = Literal["query", "passage"]
Similarity = Literal["dot", "cosine"]
TASKS: dict[str, str] = {"query": "query", "passage": "document"}
"""Our kind of text -> sentence-transformers' task."""


class Retriever(nn.Module):
    """Embeds stored queries and passages with a real SentenceTransformer, gradients included.

    The embeddings are those of ``encode_query`` and ``encode_document`` (L2-normalised when ``similarity`` is
    cosine): the model's modules, pooling, prompts, length limit and towers are all respected.

    Args:
        model: the SentenceTransformer; kept as ``self.model`` and trained in place.
        similarity: "dot" or "cosine".
        scale: factor of the similarity in ``score``.
    """

    def __init__(self, model: SentenceTransformer, *, similarity: Similarity, scale: float) -> None:
        super().__init__()
        self.model = model
        self.similarity = similarity
        self.scale = scale
        self.dim = int(model.get_embedding_dimension())
        prompts = {"query": model.prompts.get("query", ""), "passage": model.prompts.get("document", "")}
        self.inputs: dict[str, TextInput] = {k: text_input(model, TASKS[k], prompts[k] or "") for k in TASKS}

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.parameters()).device

    def tokenize(self, table: TextSource | Sequence[str], kind: Kind, cache: Path | None) -> TokenStore:
        """Tokens of all texts of one kind, with this model's prompt for that kind."""
        read = self.inputs[kind]
        name = {"query": "queries", "passage": "passages"}[kind]
        return tokenize(
            table, read.tokenizer, prompt=read.prompt, limit=read.stored_limit, cache=cache, name=name,
            tokenizer_id=read.tokenizer_id,
        )  # fmt: skip

    def batches(self, store: TokenStore, rows: Rows, kind: Kind, *, token_budget: int) -> Batches:
        """Inputs of N texts of one kind, in chunks of at most ``token_budget`` tokens, padding included."""
        read = self.inputs[kind]
        require_store(store, read, kind)
        return single_batches(read.template, store, rows, max_length=read.max_length, token_budget=token_budget)

    def forward(self, batches: Batches, kind: Kind) -> Tensor:
        """Embeddings in the order of the rows, float32 [N, d], also under autocast."""
        if not batches.inputs:
            return torch.zeros(0, self.dim, device=self.device)
        with lean_encoders(self), training_on_cpu(self, batches.inputs) as training:
            vectors = joined(self, lambda inputs: self.embed(inputs, kind), batches.inputs, training)
        return vectors[batches.restore.to(vectors.device)]

    def embeddings(self, batches: Batches, kind: Kind) -> Iterator[Tensor]:
        """Embeddings of each chunk, in the chunks' order."""
        return over_chunks(self, lambda inputs: self.embed(inputs, kind), batches.inputs)

    def embed(self, inputs: dict[str, Tensor], kind: Kind) -> Tensor:
        """Embeddings of one chunk, float32 [rows, d], in the order of the chunk."""
        device = self.device
        features: dict[str, Any] = {name: values.to(device, non_blocking=True) for name, values in inputs.items()}
        features.update(self.inputs[kind].extras)
        with rows_of(inputs["attention_mask"], device):
            vectors = self.model(features, task=TASKS[kind])["sentence_embedding"][:, : self.dim]
        with torch.autocast(device_type=device.type, enabled=False):
            vectors = vectors.float()
            return functional.normalize(vectors, dim=-1) if self.similarity == "cosine" else vectors

    def score(self, queries: Tensor, passages: Tensor) -> Tensor:
        """Scores of each query's own list: ``scale * <q, p>``, float32 [B, n].

        Args:
            queries: [B, d].
            passages: [B, n, d].
        """
        with torch.autocast(device_type=queries.device.type, enabled=False):
            return self.scale * torch.einsum("bd,bnd->bn", queries.float(), passages.float())

    def fingerprint(self) -> str:
        """Identifies the embeddings: weights, modules, prompts, length limits, special tokens and similarity. The scale
        is no part."""
        reads = {kind: read.described() for kind, read in self.inputs.items()}
        return model_fingerprint(self.model, {"reads": reads, "similarity": self.similarity, "dim": self.dim})


def load_retriever(
    model: str | Path | SentenceTransformer,
    *,
    layers: int = 0,
    similarity: Literal["auto", "dot", "cosine"] = "auto",
    scale: float | Literal["auto"] = "auto",
    two_towers: bool = False,
    max_length: int = 0,
    pooling: str = "mean",
    query_prompt: str | None = None,
    passage_prompt: str | None = None,
    trust_remote_code: bool = False,
) -> Retriever:
    """Load a retriever from a folder, a hub name, or an object (which is then changed in place).

    Args:
        model: a SentenceTransformer, or a plain encoder.
        layers: keep the first so many encoder layers; 0 keeps all.
        similarity: "auto" takes the model's own: its ``similarity_fn_name``, cosine for models that say nothing, dot
            for plain encoders (DPR, AR2 and RocketQAv2 use dot).
        scale: "auto" is 20 for cosine and for normalised embeddings, else 1.
        two_towers: give queries and passages weights of their own, both starting from ``model``.
        max_length: tokens of an input with special tokens; 0 keeps the model's own limit.
        pooling: "mean" or "cls", for a plain encoder.
        query_prompt, passage_prompt: replace the model's own; "" for none.
        trust_remote_code: run code that comes with the model.

    Raises:
        InputError: the model cannot be loaded or used.
    """
    plain = False
    if not isinstance(model, SentenceTransformer):
        folder = resolve(model, trust_remote_code=trust_remote_code)
        plain = not (folder / "modules.json").exists()
        model = load_sentence_transformer(folder, pooling=pooling, trust_remote_code=trust_remote_code)
    in_float32(model)
    keep_layers(model, layers)
    set_max_length(model, max_length)
    chosen = _similarity(model, similarity, plain=plain)
    factor = _scale(model, chosen, scale)
    _set_prompts(model, query_prompt, passage_prompt)
    if two_towers and not isinstance(model[0], Router):
        model = _split(model)
    model.similarity_fn_name = chosen
    freeze_poolers(model)
    return Retriever(model, similarity=chosen, scale=factor)


def require_store(store: TokenStore, read: TextInput, kind: str) -> None:
    """A store must come from this model's tokenizer and carry the prompt of its kind of text."""
    if store.tokenizer != read.tokenizer_id:
        raise InputError(
            "The tokens are those of another tokenizer.", where=kind, expected=read.tokenizer_id[:12],
            got=store.tokenizer[:12], fix="tokenise the texts with this model",
        )  # fmt: skip
    if store.prompt != read.prompt:
        raise InputError(
            "The tokens carry another prompt.", where=kind, expected=repr(read.prompt), got=repr(store.prompt),
            fix=f"tokenise the texts as {kind}",
        )  # fmt: skip


def _similarity(model: SentenceTransformer, wanted: str, *, plain: bool) -> Similarity:
    own = "dot" if plain else model.similarity_fn_name
    if wanted not in {"auto", "dot", "cosine"} or (wanted == "auto" and own not in {"dot", "cosine"}):
        got = wanted if wanted != "auto" else f"a model with similarity {own}"
        raise InputError("Unknown similarity.", where="similarity", expected="dot or cosine", got=got)
    chosen: Similarity = "cosine" if (own if wanted == "auto" else wanted) == "cosine" else "dot"
    reason = "asked for" if wanted != "auto" else "a plain encoder" if plain else "the model's own"
    logger.info("similarity: %s (%s)", chosen, reason)
    return chosen


def _scale(model: SentenceTransformer, similarity: str, wanted: float | str) -> float:
    if wanted != "auto":
        if not 0 < float(wanted) < float("inf"):
            raise InputError("The scale must be positive.", where="scale", expected="a number above 0", got=str(wanted))
        return float(wanted)
    normalised = any(isinstance(module, Normalize) for module in model.modules())
    scale = 20.0 if similarity == "cosine" or normalised else 1.0
    logger.info("scale: %g (%s)", scale, "normalised embeddings" if scale > 1 else "dot product of free embeddings")
    return scale


def _set_prompts(model: SentenceTransformer, query: str | None, passage: str | None) -> None:
    """Store the prompts where ``encode_query`` and ``encode_document`` look for them.

    A model saved with a "passage" (or "corpus") prompt and no "document" prompt gets an empty "document" prompt from
    sentence-transformers, which would hide the prompt it was trained with: the named one is used instead.
    """
    if passage is None and not model.prompts.get("document"):
        named = next((name for name in ("passage", "corpus") if model.prompts.get(name)), None)
        if named:
            passage = model.prompts[named]
            logger.info("passages get the model's %r prompt %r", named, passage)
    model.prompts["query"] = (model.prompts.get("query") or "") if query is None else query
    model.prompts["document"] = (model.prompts.get("document") or "") if passage is None else passage


def _split(model: SentenceTransformer) -> SentenceTransformer:
    """One tower as two that start equal, routed by ``encode_query`` and ``encode_document``."""
    queries, passages = [copy.deepcopy(module) for module in model], list(model)
    router = Router.for_query_document(query_modules=queries, document_modules=passages)
    logger.info("two towers, both starting from the same weights")
    return SentenceTransformer(
        modules=[router], device=str(model.device), prompts=dict(model.prompts), truncate_dim=model.truncate_dim,
        default_prompt_name=model.default_prompt_name, trust_remote_code=model.trust_remote_code,
    )  # fmt: skip
