"""A CrossEncoder that is trained and scored on pairs of stored tokens."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from sentence_transformers import CrossEncoder
from torch import Tensor, nn

from sparring.models.batching import Batches, Rows, pair_batches
from sparring.models.cpu import training_on_cpu
from sparring.models.inputs import TextInput, set_max_length, text_input
from sparring.models.lean import lean_encoders
from sparring.models.loading import load_cross_encoder, resolve
from sparring.models.packed import rows_of
from sparring.models.parallel import joined
from sparring.models.retriever import require_store
from sparring.models.tokens import TextSource, TokenStore, tokenize
from sparring.models.weights import in_float32, keep_layers, model_fingerprint
from sparring.types import InputError

logger = logging.getLogger("sparring")


class Ranker(nn.Module):
    """Scores stored (query, passage) pairs with a real CrossEncoder, gradients included.

    The scores are raw logits: those of ``predict(pairs, activation_fn=torch.nn.Identity())``.

    Args:
        model: a CrossEncoder with one logit; kept as ``self.model`` and trained in place.
        new_head: the head was just drawn, so the scores mean nothing before training.
    """

    def __init__(self, model: CrossEncoder, *, new_head: bool = False) -> None:
        super().__init__()
        self.new_head = new_head
        if model.num_labels != 1:
            raise InputError(
                "The re-ranker must give one score.", expected="one label", got=f"{model.num_labels} labels",
                fix="choose a cross-encoder for ranking, or an encoder without a head",
            )  # fmt: skip
        self.model = model
        prompt = model.prompts.get(model.default_prompt_name, "") if model.default_prompt_name else ""
        self.input: TextInput = text_input(model, None, prompt or "")

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.parameters()).device

    def tokenize(
        self, table: TextSource | Sequence[str], cache: Path | None, kind: Literal["query", "passage"] = "passage"
    ) -> TokenStore:
        """Tokens of all texts. A cross-encoder's prompt goes before the query only, so ``kind`` matters where one is
        set; without a prompt the store is shared with a retriever of the same tokenizer."""
        prompt = self.input.prompt if kind == "query" else ""
        name = {"query": "queries", "passage": "passages"}[kind]
        read = self.input
        return tokenize(
            table, read.tokenizer, prompt=prompt, limit=read.stored_limit, cache=cache, name=name,
            tokenizer_id=read.tokenizer_id,
        )  # fmt: skip

    def batches(
        self,
        queries: TokenStore,
        query_rows: Rows,
        passages: TokenStore,
        passage_rows: Rows,
        *,
        token_budget: int,
    ) -> Batches:
        """Inputs of N pairs, in chunks of at most ``token_budget`` tokens, padding included."""
        read = self.input
        require_store(queries, read, "query")
        require_store(passages, _without_prompt(read), "passage")
        limits = {"max_length": read.max_length, "token_budget": token_budget}
        return pair_batches(read.template, queries, query_rows, passages, passage_rows, **limits)

    def forward(self, batches: Batches) -> Tensor:
        """Raw logits in the order of the pairs, float32 [N], also under autocast."""
        if not batches.inputs:
            return torch.zeros(0, device=self.device)
        with lean_encoders(self), training_on_cpu(self, batches.inputs) as training:
            logits = joined(self, self.logits, batches.inputs, training)
        return logits[batches.restore.to(logits.device)]

    def logits(self, inputs: dict[str, Tensor]) -> Tensor:
        """Raw logits of one chunk, float32 [rows], in the order of the chunk."""
        device = self.device
        features: dict[str, Any] = {name: values.to(device, non_blocking=True) for name, values in inputs.items()}
        features.update(self.input.extras)
        with rows_of(inputs["attention_mask"], device):
            scores: Tensor = self.model(features)["scores"]
        return scores.float().reshape(len(inputs["input_ids"]))

    def fingerprint(self) -> str:
        """Identifies the scores: weights, modules, prompt, length limit and special tokens."""
        return model_fingerprint(self.model, {"reads": self.input.described()})


def load_ranker(
    model: str | Path | CrossEncoder,
    *,
    layers: int = 0,
    max_length: int = 0,
    trust_remote_code: bool = False,
    seed: int = 0,
) -> Ranker:
    """Load a re-ranker from a folder, a hub name, or an object (which is then changed in place).

    Args:
        model: a CrossEncoder with one logit, or an encoder (also a SentenceTransformer's), which gets a new head.
        layers: keep the first so many encoder layers; 0 keeps all.
        max_length: tokens of a pair with special tokens; 0 keeps the model's own limit.
        trust_remote_code: run code that comes with the model.
        seed: draws a new head.

    Raises:
        InputError: the model cannot be loaded or used, or gives more than one score.
    """
    new_head = False
    if not isinstance(model, CrossEncoder):
        folder = resolve(model, trust_remote_code=trust_remote_code)
        model, new_head = load_cross_encoder(folder, trust_remote_code=trust_remote_code, seed=seed)
    in_float32(model)
    keep_layers(model, layers)
    set_max_length(model, max_length)
    return Ranker(model, new_head=new_head)


def _without_prompt(read: TextInput) -> TextInput:
    return TextInput(read.tokenizer, read.tokenizer_id, read.template, read.max_length, "", read.extras)
