"""Whole files or none: written aside and renamed into place; and what a file's contents are known by."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from sparring.types import InputError

SEAL = "seal"
"""Key of a sealed JSON file under which the SHA-256 of everything else in it stands."""

DAY = 86400.0


def sha256(path: Path) -> str:
    """Hex SHA-256 of a file's contents."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digests(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """SHA-256 of files in a folder, by name."""
    return {name: sha256(folder / name) for name in names}


def damaged(folder: Path, wanted: Mapping[str, str]) -> list[str]:
    """The names of those files that are missing, unreadable or not as they were when ``wanted`` was made."""
    found = []
    for name, digest in wanted.items():
        try:
            whole = sha256(folder / name) == digest
        except OSError:
            whole = False
        if not whole:
            found.append(name)
    return found


def write_text(path: Path, text: str) -> Path:
    """Write a text file aside and rename it into place; folders are made. -> the path"""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".part")
    aside.write_text(text, encoding="utf-8")
    os.replace(aside, path)
    return path


def write_json(path: Path, value: Mapping[str, Any]) -> Path:
    """Write a JSON file aside and rename it into place. -> the path"""
    return write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def seal(value: Mapping[str, Any]) -> str:
    """SHA-256 of a JSON object, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def sealed(value: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON object with its seal beside its own keys."""
    plain = json.loads(json.dumps(value))
    return {**plain, SEAL: seal(plain)}


def unsealed(text: str) -> dict[str, Any]:
    """The object in a text that `sealed` made; ValueError when it is not as it was written."""
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError("JSON that is nested too deeply") from None
    if not isinstance(value, dict) or value.pop(SEAL, None) != seal(value):
        raise ValueError("the contents do not agree with their checksum")
    return value


def write_sealed(path: Path, value: Mapping[str, Any], *, indent: int | None = 2) -> Path:
    """Write a JSON object with its checksum, aside and renamed into place. -> the path"""
    return write_text(path, json.dumps(sealed(value), indent=indent, ensure_ascii=False) + "\n")


def read_sealed(path: Path, what: str, *, fix: str) -> dict[str, Any]:
    """What `write_sealed` wrote; InputError when it is missing, cut, changed or no such file."""
    try:
        return unsealed(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        got = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise InputError(
            f"{what} is damaged", where=str(path), expected="the file as it was written", got=got, fix=fix
        ) from None


def beside(path: Path, ending: str = "part") -> Path:
    """Where this process writes ``path`` before it is renamed.

    Files that killed processes of this machine left there are removed, and anything that is older than a day: a folder
    may be another machine's, which is at work on it.
    """
    for leftover in path.parent.glob(f".{glob_escape(path.name)}.*.{ending}"):
        owner = leftover.name.removesuffix(f".{ending}").rpartition(".")[2]
        try:
            old = time.time() - leftover.stat().st_mtime > DAY
            if not owner.isdecimal() or not (old or (leftover.is_file() and not _alive(int(owner)))):
                continue
            if leftover.is_dir():
                shutil.rmtree(leftover, ignore_errors=True)
            else:
                leftover.unlink()
        except OSError:
            continue  # another process was faster
    return path.with_name(f".{path.name}.{os.getpid()}.{ending}")


def glob_escape(name: str) -> str:
    """A file name as a pattern that only it matches."""
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


def _alive(process: int) -> bool:
    """Whether there is such a process; where that cannot be asked (Windows), there is."""
    if os.name == "nt" or process == os.getpid():
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True
