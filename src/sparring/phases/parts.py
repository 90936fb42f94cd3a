"""Parts of a result as files: each is named by its first row and its SHA-256, and is whole or not there.

What is finished is found again by any process that sees the folder, on this machine or another.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO, Any

from sparring import files
from sparring.types import InputError

logger = logging.getLogger("sparring")

_APPEARS = 60.0  # seconds that a network file system may take to show a file that another node has written


def save_part(folder: Path, start: int, ending: str, write: Callable[[IO[bytes]], Any]) -> Path:
    """Write a part aside and rename it to its first row and the start of its SHA-256.  -> the file"""
    with files.scratch(folder / f"{start:012d}.{socket.gethostname()}.{os.getpid()}.tmp") as partial:
        with partial.open("wb") as file:
            write(file)
        path = folder / f"{start:012d}-{files.sha256(partial)[:16]}{ending}"
        os.replace(partial, path)
    return path


def whole_part(folder: Path, start: int, ending: str) -> Path | None:
    """An earlier process's part, if its contents are those that were written; a damaged one is removed."""
    candidates = map(_if_whole, folder.glob(f"{start:012d}-*{ending}"))
    return next((path for path in candidates if path is not None), None)


def _if_whole(path: Path) -> Path | None:
    """The part; None where it was damaged, and is now removed."""
    if is_whole(path):
        return path
    logger.warning("%s is damaged: it is made again", path)
    path.unlink(missing_ok=True)
    return None


def whole_parts(folder: Path, starts: Iterable[int], ending: str) -> dict[int, Path]:
    """`whole_part` of each of these first rows that has one; the folder is read once, for it may have many files."""
    found: dict[int, Path] = {}
    wanted = set(starts)
    for path in sorted(folder.glob(f"{'[0-9]' * 12}-*{ending}")):
        start = int(path.name[:12])
        if start in wanted and start not in found and (kept := _if_whole(path)) is not None:
            found[start] = kept
    return found


def is_whole(path: Path) -> bool:
    """Whether a part holds what its name says."""
    return path.stem.rpartition("-")[2] == files.sha256(path)[:16]


def arrived(path: Path) -> Path:
    """A part that another node says it has written.

    Raises: InputError when it does not appear here, or is not whole.
    """
    until = time.monotonic() + _APPEARS
    while not path.is_file():
        if time.monotonic() > until:
            raise InputError(
                "a file that a worker wrote is not to be seen here", where=str(path),
                expected="a file system that all nodes share", fix="put --out and $SPARRING_CACHE on a shared disk",
            )  # fmt: skip
        time.sleep(0.2)
    if not is_whole(path):
        raise InputError(
            "a file that a worker wrote is damaged", where=str(path), expected="contents that agree with its checksum",
            fix="run the same command again: this shard alone is made again",
        )  # fmt: skip
    return path
