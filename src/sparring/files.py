"""Whole files or none: written aside and renamed into place; what a file's contents are known by; and in plain words
what a disk that is full or closed to writing answered."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from sparring.types import InputError

FULL, CLOSED, FAILED = "the disk is full", "a file or folder is closed to this user", "the disk failed"
_AGAIN = "then run the same command again"
_KINDS = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), (FULL, f"make room there, {_AGAIN}")),
    **dict.fromkeys((errno.EROFS, errno.EACCES, errno.EPERM), (CLOSED, f"make it writable and readable, {_AGAIN}")),
    **dict.fromkeys((errno.EIO, errno.ESTALE), (FAILED, f"look after the disk, {_AGAIN}")),
}
_IN_TEXT = {os.strerror(number): number for number in _KINDS}
_CUT = re.compile(r"^\d+ requested and \d+ written$")  # numpy's, for any write that fell short


class DiskError(InputError):
    """A disk that is full, closed to writing, or broken. A run that meets it goes on with the same command."""


@contextmanager
def explained(where: str | Path) -> Iterator[None]:
    """Turn what a disk refuses into a `DiskError` that names the file (``where``, if the error names none)."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        number = _refused(error)
        if number is None:
            raise
        what, fix = _KINDS[number]
        name = error.filename if isinstance(error, OSError) and error.filename else where
        raise DiskError(what, where=str(name), got=os.strerror(number), fix=fix) from error


def _refused(error: Exception) -> int | None:
    """The error number, also of libraries that keep it in their text only (safetensors, tokenizers, faiss, numpy)."""
    if isinstance(error, OSError) and error.errno in _KINDS:
        return error.errno
    text = str(error)
    if isinstance(error, OSError) and _CUT.match(text):
        return errno.ENOSPC
    found = re.search(r"\(os error (\d+)\)", text)
    if found and int(found[1]) in _KINDS:
        return int(found[1])
    return next((number for words, number in _IN_TEXT.items() if words in text), None)


@contextmanager
def aside(path: Path, target: Path | None = None) -> Iterator[Path]:
    """A file to write to that is no result yet: it goes away when writing fails; ``target`` is named then."""
    try:
        with explained(target or path):
            yield path
    except BaseException:
        with suppress(OSError):
            path.unlink()
        raise


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Where to write so that ``path`` appears complete or stays as it was; its folders are made."""
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with aside(path.with_name(path.name + ".part"), path) as part:
            yield part
            os.replace(part, path)


def sha256(path: Path) -> str:
    """Hex SHA-256 of a file's contents."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_text(path: Path, text: str) -> Path:
    """Write a text file aside and rename it into place; folders are made. -> the path"""
    with whole(path) as part:
        part.write_text(text, encoding="utf-8")
    return path


def write_json(path: Path, value: Mapping[str, Any]) -> Path:
    """Write a JSON file aside and rename it into place. -> the path"""
    return write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")
