"""What a model's folder may hold and ask for: checked before a library reads it, and before it is copied.

A folder comes from anywhere. None of its files is run, nothing pickled in it is read, no name in it leads outside it,
and one that was exported here is read only as it was exported.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from sparring import __version__
from sparring.files import damaged, digests, read_sealed, write_sealed
from sparring.types import InputError

J = TypeVar("J", dict[str, Any], list[Any])

NOTE = "sparring.json"
"""In an exported folder: the SHA-256 of every file but the model card."""

_OWN = "sentence_transformers."


def read_json(path: Path, kind: type[J]) -> J:
    """A JSON file of a model, as the given kind of value."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        value = error
    if isinstance(value, kind):
        return value
    raise InputError(
        "A file of the model is damaged.", where=str(path), expected=f"JSON, a {kind.__name__}",
        got=str(value)[:200], fix="save or download the model again",
    )  # fmt: skip


def require_harmless(folder: Path, *, trust_remote_code: bool) -> None:
    """Refuse a folder whose settings name code, or files outside it.

    Raises: InputError for a module that is no sentence-transformers one (unless code is trusted), for a module's path
        or a route's or a template's name that leads elsewhere, and for adapters.
    """
    for adapter in folder.rglob("adapter_config.json"):
        raise InputError(
            "Adapters are not loaded.", where=str(adapter), expected="a whole model", got="adapter_config.json",
            fix="merge the adapter into its base model and save that",
        )  # fmt: skip
    for where, types, paths, names in _named(folder):
        for kind in types:
            if not trust_remote_code and not kind.startswith(_OWN):
                raise InputError(
                    "The model asks for code that is not sentence-transformers' own.", where=str(where),
                    expected=f"modules of type {_OWN}...", got=kind,
                    fix="read that code; if you trust it, allow it: run.trust_remote_code, --trust-remote-code",
                )  # fmt: skip
        for path in paths:
            if not _inside(path):
                raise _outside(where, path)
        for name in names:
            if not _inside(name) or len(PurePosixPath(name).parts) != 1:
                raise _outside(where, name)


def _named(folder: Path) -> Iterable[tuple[Path, list[str], list[str], list[str]]]:
    """(file, types of modules, paths in the folder, names that become parts of file names) of each settings file."""
    if (folder / "modules.json").exists():
        entries = [entry for entry in read_json(folder / "modules.json", list) if isinstance(entry, dict)]
        kinds, paths = ([str(entry.get(key, "")) for entry in entries] for key in ("type", "path"))
        yield folder / "modules.json", kinds, paths, []
    for file in folder.rglob("router_config.json"):
        raw = read_json(file, dict)
        types, structure = raw.get("types") or {}, raw.get("structure") or {}
        if not isinstance(types, dict) or not isinstance(structure, dict):
            expected = "types and structure, both objects"
            raise InputError("A file of the model is damaged.", where=str(file), expected=expected)
        yield file, list(map(str, types.values())), list(types), list(structure)
    for file in folder.rglob("tokenizer_config.json"):
        templates = read_json(file, dict).get("chat_template")
        if isinstance(templates, list):
            yield file, [], [], [str(item.get("name", "")) for item in templates if isinstance(item, dict)]
        elif isinstance(templates, dict):
            yield file, [], [], list(templates)


def _inside(path: str) -> bool:
    """Whether a path from a settings file stays in the folder."""
    parts = PurePosixPath(path)
    return not (parts.is_absolute() or ".." in parts.parts or "\\" in path or "\0" in path or ":" in path)


def _outside(where: Path, got: str) -> InputError:
    return InputError(
        "The model names a place outside its own folder.", where=str(where), expected="a name inside the folder",
        got=repr(got), fix="correct the file, or take the model from elsewhere",
    )  # fmt: skip


def note_export(folder: Path) -> None:
    """Write down what an exported folder holds."""
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    kept = [name for name in names if not name.endswith(".md") and name != NOTE]
    write_sealed(folder / NOTE, {"version": __version__, "files": digests(folder, kept)})


def require_as_exported(folder: Path) -> None:
    """InputError when a folder that was exported here is not as it was then."""
    if not (folder / NOTE).is_file():
        return
    fix = f"export it again; if you changed the model yourself, remove {NOTE} from its folder"
    note = read_sealed(folder / NOTE, "the note about an exported model", fix=fix)
    if wrong := damaged(folder, note["files"]):
        raise InputError(
            "A file of an exported model is missing or damaged.", where=str(folder / wrong[0]),
            expected="the file as it was exported", fix=fix,
        )  # fmt: skip
