"""From a folder or hub name to a real SentenceTransformer or CrossEncoder, strictly: safetensors, every weight."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from sentence_transformers import CrossEncoder, SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Router, Transformer
from torch import nn
from transformers.utils import logging as transformers_logging

from sparring.models.folder import read_json, require_as_exported, require_harmless
from sparring.models.weights import check_weights, initialise, require_finite
from sparring.types import InputError

logger = logging.getLogger("sparring")

FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.md"]
IGNORED = ["onnx/*", "openvino/*", "coreml/*"]


def resolve(model: str | Path, *, trust_remote_code: bool = False) -> Path:
    """The local folder of a model; a hub name is fetched (or found in the hub's cache).

    Raises:
        InputError: no such folder or name, or a folder without safetensors weights.
    """
    folder, text = Path(model).expanduser(), str(model)
    try:
        there = folder.is_dir()
    except OSError as error:  # a name that is too long
        got = error.strerror or str(error)
        raise InputError("There is no model.", where=text[:200], expected=_EXPECTED, got=got) from None
    if not there:
        if folder.exists() or text.startswith(("/", ".", "~")) or text.count("/") > 1:
            got = "a file" if folder.exists() else "nothing there"
            raise InputError("There is no model.", where=text, expected=_EXPECTED, got=got)
        try:
            patterns = FILES + (["*.py"] if trust_remote_code else [])
            folder = Path(snapshot_download(text, allow_patterns=patterns, ignore_patterns=IGNORED))
        except (OSError, ValueError) as error:
            got = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            fix = "check the name and the connection, or give a local folder"
            raise InputError("The model cannot be found.", where=text, expected=_EXPECTED, got=got, fix=fix) from error
    require_as_exported(folder)
    _require_files(folder)
    require_harmless(folder, trust_remote_code=trust_remote_code)
    return folder


def load_sentence_transformer(folder: Path, *, pooling: str, trust_remote_code: bool) -> SentenceTransformer:
    """A SentenceTransformer as saved, or a plain encoder followed by pooling ("mean" or "cls")."""
    settings = _settings(trust_remote_code)
    if (folder / "modules.json").exists():
        if _saved_as(folder) == "CrossEncoder":
            raise InputError(
                "A cross-encoder cannot be a retriever.", where=str(folder), got="a CrossEncoder",
                expected="a SentenceTransformer or a plain encoder",
            )  # fmt: skip
        with _loading(folder):
            model = SentenceTransformer(str(folder), device="cpu", local_files_only=True, **settings)
        saved = next((m.pooling_mode for m in model.modules() if isinstance(m, Pooling)), None)
        if pooling not in {"mean", saved}:
            raise InputError("The model brings its own pooling.", where="pooling", expected=str(saved), got=pooling)
    else:
        if pooling not in {"mean", "cls"}:
            raise InputError("Unknown pooling.", where="pooling", expected="mean or cls", got=pooling)
        with _loading(folder):
            encoder = Transformer(str(folder), **_module_settings(trust_remote_code))
        logger.info("%s: a plain encoder, read with %s pooling", folder, pooling)
        modules = [encoder, Pooling(encoder.get_embedding_dimension(), pooling)]
        model = SentenceTransformer(modules=modules, device="cpu", trust_remote_code=trust_remote_code)
    for module, place in transformer_folders(model, folder):
        with _loading(place):
            check_weights(module, place, new_head=False, trust_remote_code=trust_remote_code)
    require_finite(model, folder)
    return model


def load_cross_encoder(folder: Path, *, trust_remote_code: bool, seed: int) -> tuple[CrossEncoder, bool]:
    """A CrossEncoder as saved, or an encoder (also a SentenceTransformer's) with a new head of one logit.

    A new head is drawn from ``seed`` and announced in the log; its scores are logits (activation Identity).

    Returns: the model, and whether its head is new.
    """
    is_module_folder = (folder / "modules.json").exists() and _saved_as(folder) != "CrossEncoder"
    place = folder / _only_transformer(folder) if is_module_folder else folder
    has_head = any(name.endswith("ForSequenceClassification") for name in _config(place).get("architectures") or [])
    with _loading(folder):
        if is_module_folder:
            lower = Transformer.load_config(str(place)).get("do_lower_case", False)
            task = {"transformer_task": "sequence-classification", "do_lower_case": lower}
            encoder = Transformer(str(place), **task, **_module_settings(trust_remote_code))
            model = CrossEncoder(modules=[encoder], device="cpu", trust_remote_code=trust_remote_code)
        else:
            model = CrossEncoder(str(folder), device="cpu", local_files_only=True, **_settings(trust_remote_code))
    new: list[str] = []
    for module, module_folder in transformer_folders(model, folder if not is_module_folder else place):
        with _loading(module_folder):
            new = check_weights(module, module_folder, new_head=not has_head, trust_remote_code=trust_remote_code)
        initialise(module, new, seed)
    require_finite(model, folder)
    if new:
        logger.warning("%s has no head for scores: a new one is drawn with seed %d (%s)", folder, seed, ", ".join(new))
        model.activation_fn = nn.Identity()
    return model, bool(new)


def transformer_folders(model: SentenceTransformer | CrossEncoder, folder: Path) -> Iterator[tuple[Transformer, Path]]:
    """Each Transformer module of a model with the folder it was loaded from."""
    modules = folder / "modules.json"
    entries = read_json(modules, list) if modules.exists() else [{"path": ""}]
    for module, entry in zip(model, entries, strict=False):
        place = folder / entry["path"]
        if isinstance(module, Transformer):
            yield module, place
        elif isinstance(module, Router):
            structure = read_json(place / "router_config.json", dict)["structure"]
            for route, names in structure.items():
                for part, name in zip(module.sub_modules[route], names, strict=True):
                    if isinstance(part, Transformer):
                        yield part, place / name


_EXPECTED = "a hub name, or a folder with config.json (or modules.json), a tokenizer and *.safetensors weights"


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Without transformers' own bars and loading reports (the weights are checked here)."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


@contextmanager
def _loading(folder: Path) -> Iterator[None]:
    """Quietly, and with the libraries' errors as one InputError that names the folder."""
    try:
        with quiet_transformers():
            yield
    except InputError:
        raise
    except (OSError, RuntimeError, ValueError, LookupError, TypeError, AttributeError, ImportError) as error:
        got = f"{type(error).__name__}: {error}"
        raise InputError("The model cannot be loaded.", where=str(folder), expected=_EXPECTED, got=got) from error


def _settings(trust_remote_code: bool) -> dict[str, Any]:
    weights = {"use_safetensors": True, "dtype": torch.float32}
    return {"trust_remote_code": trust_remote_code, "model_kwargs": weights}


def _module_settings(trust_remote_code: bool) -> dict[str, Any]:
    shared = {"local_files_only": True, "trust_remote_code": trust_remote_code}
    weights = {"use_safetensors": True, "dtype": torch.float32, **shared}
    return {"model_kwargs": weights, "processor_kwargs": dict(shared), "config_kwargs": dict(shared)}


def _require_files(folder: Path) -> None:
    if not any((folder / name).exists() for name in ("config.json", "modules.json")):
        raise InputError(
            "The folder is not a model.", where=str(folder), expected=_EXPECTED, got="no config.json, no modules.json"
        )
    weights = sorted(path.name for path in folder.rglob("*.safetensors"))
    pickled = [path for path in folder.rglob("pytorch_model*.bin") if not any(path.parent.glob("*.safetensors"))]
    if not weights or pickled:
        got = f"only pickled weights: {pickled[0].name}" if pickled else "no weights"
        fix = "save the model again with save_pretrained(..., safe_serialization=True)"
        raise InputError(
            "The model has no safetensors weights.", where=str(folder), expected=_EXPECTED, got=got, fix=fix
        )


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.exists():
        raise InputError("The folder is not a model.", where=str(folder), expected=_EXPECTED, got="no config.json")
    return read_json(path, dict)


def _saved_as(folder: Path) -> str:
    path = folder / "config_sentence_transformers.json"
    saved = read_json(path, dict) if path.exists() else {}
    return str(saved.get("model_type", "SentenceTransformer"))


def _only_transformer(folder: Path) -> str:
    entries = read_json(folder / "modules.json", list)
    first = entries[0] if entries and isinstance(entries[0], dict) else {}
    if not str(first.get("type")).endswith(".Transformer"):
        raise InputError(
            "This model cannot become a re-ranker.", where=str(folder), expected="one Transformer as its first module",
            got=str(first.get("type")), fix="give the folder of one tower's encoder",
        )  # fmt: skip
    return str(first.get("path", ""))
