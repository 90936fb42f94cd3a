"""Whole files or none: written aside and renamed into place; and what a file's contents are known by."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def sha256(path: Path) -> str:
    """Hex SHA-256 of a file's contents."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
