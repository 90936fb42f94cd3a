"""What the first module of a SentenceTransformer or CrossEncoder reads: tokenizer, length limit, special tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sentence_transformers import CrossEncoder, SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Router, Transformer
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from sparring.models.template import Template
from sparring.models.tokens import tokenizer_fingerprint
from sparring.types import InputError

STORED = 512
"""Least cap of a token store, so that models with different limits and the same tokenizer share one store."""

UNLIMITED = 2**31 - 1


@dataclass(frozen=True)
class TextInput:
    """How one kind of text is read by one model.

    Attributes:
        tokenizer: the model's own.
        tokenizer_id: its fingerprint.
        template: its special tokens.
        max_length: tokens of a model input, special tokens included.
        prompt: put before each text.
        extras: what the model's ``preprocess`` adds besides the tensors (modality, task, prompt length).
    """

    tokenizer: PreTrainedTokenizerBase
    tokenizer_id: str
    template: Template
    max_length: int
    prompt: str
    extras: dict[str, Any]

    def described(self) -> list[str]:
        """Everything that decides which ids a text becomes."""
        return [self.tokenizer_id, repr(self.template), str(self.max_length), self.prompt]

    @property
    def stored_limit(self) -> int:
        """Tokens per text worth keeping in a store."""
        return max(STORED, self.max_length)


def text_input(model: SentenceTransformer | CrossEncoder, task: str | None, prompt: str) -> TextInput:
    """Read the settings that ``model.preprocess(texts, prompt=prompt, task=task)`` uses.

    Args:
        model: its first module is a Transformer, or a Router that has one for this task.
        task: "query", "document", or None for pairs.
        prompt: "" for none.

    Raises:
        InputError: the model does not read plain text through a fast tokenizer.
    """
    module = input_module(model, task)
    tokenizer, max_length = module.processor, _max_length(module, task)
    template = Template.probe(tokenizer)
    needed = max(template.single.overhead, template.pair.overhead if task is None else 0) + 1
    if max_length < needed:
        raise InputError(
            "The maximum length leaves no room for text.", where="max_length", expected=f"at least {needed} tokens",
            got=str(max_length),
        )  # fmt: skip
    sample: Any = ["a"] if task else [["a", "b"]]
    features = model.preprocess(sample, prompt=prompt or None, **({"task": task} if task else {}))
    extras = {key: value for key, value in features.items() if not isinstance(value, Tensor)}
    return TextInput(tokenizer, tokenizer_fingerprint(tokenizer), template, max_length, prompt, extras)


def input_module(model: SentenceTransformer | CrossEncoder, task: str | None) -> Transformer:
    """The Transformer that reads the texts of this task.

    Raises:
        InputError: another kind of module, a multimodal or chat model, or settings that change token ids per call.
    """
    module = model[0]
    if isinstance(module, Router):
        module = module.sub_modules[module._resolve_route(task=task, modality="text")][0]
    problem = ""
    if not isinstance(module, Transformer):
        problem = f"a first module of type {type(module).__name__}"
    elif not isinstance(module.processor, PreTrainedTokenizerBase):
        problem = f"a processor of type {type(module.processor).__name__}"
    elif "message" in module.modality_config or "text" not in module.modality_config:
        problem = f"inputs of type {', '.join(map(str, module.modality_config))}"
    elif module.query_expansion is not None:
        problem = "query expansion"
    elif _unsupported_processing(module):
        problem = f"processing_kwargs {module.processing_kwargs}"
    if problem:
        expected = "a text encoder: a Transformer module with a tokenizer, no chat template and no query expansion"
        raise InputError("This model cannot be used.", expected=expected, got=problem)
    return module


def set_max_length(model: SentenceTransformer | CrossEncoder, max_length: int) -> None:
    """Cap the model's inputs at ``max_length`` tokens; 0 leaves the model's own cap.

    Raises:
        InputError: longer than the model's position table.
    """
    if max_length == 0:
        return
    positions = min(_positions(module) for module in model.modules() if isinstance(module, Transformer))
    if not 0 < max_length <= positions:
        raise InputError(
            "The maximum length does not fit the model.", where="max_length", expected=f"1 .. {positions} tokens",
            got=str(max_length),
        )  # fmt: skip
    model.max_seq_length = max_length


def _positions(module: Transformer) -> int:
    """Longest input of the position table: RoBERTa-type tables lose the rows up to their padding index."""
    positions = getattr(module.config, "max_position_embeddings", -1)
    if positions is None or positions < 0:
        return UNLIMITED
    for child in module.model.modules():
        padding = getattr(getattr(child, "position_embeddings", None), "padding_idx", None)
        if isinstance(padding, int):
            return int(positions) - padding - 1
    return int(positions)


def _unsupported_processing(module: Transformer) -> bool:
    settings = {key: dict(value) for key, value in module.processing_kwargs.items() if value}
    settings.get("text", {}).pop("max_length", None)
    return any(settings.get(key) for key in ("text", "common", "chat_template"))


def _max_length(module: Transformer, task: str | None) -> int:
    """The cap that ``Transformer.preprocess`` applies for this task, in its order of precedence."""
    by_task = {"query": module.query_length, "document": module.document_length}
    override = module.processing_kwargs.get("text", {}).get("max_length") or (by_task.get(task) if task else None)
    length = override or module.tokenizer.model_max_length
    return UNLIMITED if length is None or length > UNLIMITED else int(length)
