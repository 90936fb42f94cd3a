"""Weights on disk and in memory: what must be there, how many layers are kept, what identifies a model."""

from __future__ import annotations

import copy
import hashlib
import json
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import CrossEncoder, SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Module, Transformer
from torch import nn

from sparring.types import InputError

logger = logging.getLogger("sparring")

PRETRAINING_HEADS = (
    "cls.", "lm_head.", "vocab_projector.", "vocab_transform.", "vocab_layer_norm.", "generator_predictions.",
    "generator_lm_head.", "discriminator_predictions.", "lm_predictions.", "mask_predictions.", "predictions.",
    "head.", "decoder.",
)  # fmt: skip
"""Heads of masked language models and the like: left out of an encoder, and the log says so."""


def check_weights(module: Transformer, folder: Path, *, new_head: bool, trust_remote_code: bool) -> list[str]:
    """Compare the files of ``folder`` with the weights of ``module``, through transformers' own loading report.

    Args:
        module: as loaded from ``folder``.
        folder: holds config.json and the safetensors files.
        new_head: weights outside the encoder may be missing; they are then new.

    Returns:
        Names of the new weights, sorted.

    Raises:
        InputError: an encoder weight is missing, or the files hold weights that the model does not have.
    """
    _, report = type(module.model).from_pretrained(
        str(folder), config=copy.deepcopy(module.model.config), output_loading_info=True, device_map="meta",
        use_safetensors=True, local_files_only=True, trust_remote_code=trust_remote_code,
    )  # fmt: skip
    missing = {key for key in report["missing_keys"] if not key.endswith("position_ids")}
    if module.transformer_task == "feature-extraction":
        missing = {key for key in missing if "pooler." not in key}
    new = {key for key in missing if _outside_encoder(key, module.model.base_model_prefix)} if new_head else set()
    unexpected = {key for key in report["unexpected_keys"] if not key.endswith("position_ids")}
    dropped = {key for key in unexpected if key.startswith(PRETRAINING_HEADS) or (new_head and "pooler." in key)}
    if missing - new or unexpected - dropped:
        got = [f"missing {_few(missing - new)}"] * bool(missing - new)
        got += [f"unexpected {_few(unexpected - dropped)}"] * bool(unexpected - dropped)
        raise InputError(
            "The weights do not belong to this model.", where=str(folder), got="; ".join(got),
            expected=f"exactly the weights of {type(module.model).__name__} ({_layers(module)} layers)",
            fix="check config.json against the weights; to use fewer layers, load all and keep the first N",
        )  # fmt: skip
    if dropped:
        logger.info("%s: weights outside the encoder are left out (%s)", folder, _few(dropped))
    return sorted(new)


def require_finite(model: nn.Module, folder: Path) -> None:
    """InputError that names a weight of ``folder`` with NaN or infinity in it: every score would be none."""
    for name, weight in model.named_parameters():
        if not bool(torch.isfinite(weight).all()):
            raise InputError(
                "The model has weights that are no numbers.", where=str(folder), expected="finite weights",
                got=f"NaN or infinity in {name}", fix="its training diverged, or its file is damaged: take another one",
            )  # fmt: skip


def keep_layers(model: SentenceTransformer | CrossEncoder, layers: int) -> None:
    """Keep the first ``layers`` encoder layers of every Transformer in ``model``, in place; 0 keeps all.

    The configuration is changed with them, so that the saved model loads again.

    Raises:
        InputError: more layers than there are, or the layers cannot be found.
    """
    if layers == 0:
        return
    for module in [m for m in model.modules() if isinstance(m, Transformer)]:
        config, available = module.model.config, _layers(module)
        stacks = [
            (parent, name)
            for parent in module.model.modules()
            for name, child in parent.named_children()
            if isinstance(child, nn.ModuleList) and len(child) == available and name in {"layer", "layers", "h"}
        ]
        if not 0 < layers <= available or len(stacks) != 1:
            raise InputError(
                "The first layers cannot be kept.", where="layers", expected=f"1 .. {available} layers of one stack",
                got=f"{layers} layers, {len(stacks)} stacks in {type(module.model).__name__}",
            )  # fmt: skip
        parent, name = stacks[0]
        setattr(parent, name, getattr(parent, name)[:layers])
        for key, value in list(vars(config).items()):
            if key == "layer_types" and isinstance(value, list):
                setattr(config, key, value[:layers])
        config.num_hidden_layers = layers
        logger.info("kept the first %d of %d layers of %s", layers, available, type(module.model).__name__)


def initialise(module: Transformer, names: Iterable[str], seed: int) -> None:
    """Draw the named new weights of a head: matrices from N(0, initializer_range), biases zero.

    The generator is explicit, so that every process draws the same head.
    """
    generator = torch.Generator().manual_seed(seed)
    parameters = dict(module.model.named_parameters())
    scale = float(getattr(module.model.config, "initializer_range", 0.02))
    with torch.no_grad():
        for name in sorted(names):
            weight = parameters[name]
            if weight.ndim >= 2:
                weight.copy_(torch.randn(weight.shape, generator=generator) * scale)
            elif name.endswith("bias"):
                weight.zero_()
            else:
                weight.fill_(1.0)


def freeze_poolers(model: SentenceTransformer) -> None:
    """Take the poolers out of training: a retriever reads the last hidden states, so they would never get a gradient
    and distributed training would wait for them."""
    for module in model.modules():
        pooler = getattr(module.model, "pooler", None) if isinstance(module, Transformer) else None
        if isinstance(pooler, nn.Module) and module.modality_config["text"]["method_output_name"] != "pooler_output":
            pooler.requires_grad_(False)


def in_float32(model: nn.Module) -> None:
    """Turn half-precision weights into float32, which training updates; autocast chooses the compute precision."""
    if any(p.is_floating_point() and p.dtype != torch.float32 for p in model.parameters()):
        logger.info("the weights are turned into float32 for training")
        model.float()


def model_fingerprint(model: SentenceTransformer | CrossEncoder, settings: dict[str, Any]) -> str:
    """SHA-256 over every weight and buffer byte, the modules' configurations and ``settings``."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(data.data)
    description = {"modules": [*_configurations(model)], **settings}
    digest.update(json.dumps(description, sort_keys=True, default=str).encode())
    return digest.hexdigest()


def _configurations(model: nn.Module) -> Iterable[tuple[str, str, str]]:
    """Name, type and settings of each module; where it came from and who wrote it do not count."""
    ignored = {"_name_or_path", "transformers_version", "architectures", "dtype", "use_cache", "max_seq_length"}
    for name, module in model.named_modules():
        if isinstance(module, Transformer):
            config = {k: v for k, v in module.model.config.to_dict().items() if k not in ignored}
            yield name, type(module).__name__, json.dumps(config, sort_keys=True, default=str)
        elif isinstance(module, Module):
            config = {k: v for k, v in module.get_config_dict().items() if k not in ignored}
            yield name, type(module).__name__, json.dumps(config, sort_keys=True, default=str)


def _outside_encoder(key: str, prefix: str) -> bool:
    return not key.startswith(f"{prefix}.") or key.startswith(f"{prefix}.pooler.")


def _layers(module: Transformer) -> int:
    return int(getattr(module.model.config, "num_hidden_layers", 0))


def _few(keys: set[str]) -> str:
    names = sorted(keys)
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
