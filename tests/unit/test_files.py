"""Whole files or the old ones; and what a disk refuses, in words."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import SafetensorError

from sparring.files import (
    CLOSED,
    FAILED,
    FULL,
    DiskError,
    damaged,
    explained,
    read_sealed,
    scratch,
    whole,
    write_json,
    write_sealed,
)
from sparring.log import Metrics
from sparring.recipes.audits import Audits
from sparring.recipes.store import load_rows
from sparring.rundir import RunDir
from sparring.types import InputError


@pytest.mark.parametrize(
    ("error", "what"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), FULL),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), FULL),
        (PermissionError(errno.EACCES, "Permission denied", "a/b"), CLOSED),
        (OSError(errno.EROFS, "Read-only file system", "a/b"), CLOSED),
        (OSError(errno.EIO, "Input/output error"), FAILED),
        (OSError("4096 requested and 17 written"), FULL),
        (SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"), FULL),
        (Exception("Read-only file system (os error 30)"), CLOSED),
        (RuntimeError("Error in write_index: write error in x: 1 != 9 (No space left on device)"), FULL),
    ],
)
def test_what_a_disk_refuses_is_named(error: Exception, what: str) -> None:
    with pytest.raises(DiskError) as found, explained("somewhere"):
        raise error
    assert found.value.what == what
    assert found.value.where == (getattr(error, "filename", None) or "somewhere")
    assert found.value.__cause__ is error


@pytest.mark.parametrize(
    "error",
    [FileNotFoundError(2, "No such file", "x"), BrokenPipeError(32, "Broken pipe"), ValueError("x"), InputError("y")],
)
def test_other_errors_stay_what_they_are(error: Exception) -> None:
    with pytest.raises(type(error)) as found, explained("somewhere"):
        raise error
    assert found.value is error


def test_a_write_that_fails_leaves_the_old_file_and_nothing_beside_it(tmp_path: Path) -> None:
    file = write_json(tmp_path / "deep" / "a.json", {"a": 1})
    old = file.read_bytes()
    with pytest.raises(DiskError, match=r"a\.json"), whole(file) as part:  # noqa: PT012
        part.write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.raises(KeyboardInterrupt), whole(file) as part:  # noqa: PT012
        part.write_bytes(b"half")
        raise KeyboardInterrupt
    assert (file.read_bytes(), os.listdir(file.parent)) == (old, ["a.json"])
    with pytest.raises(ZeroDivisionError), scratch(tmp_path / "shard.tmp") as part:  # noqa: PT012
        part.touch()
        raise ZeroDivisionError
    assert not (tmp_path / "shard.tmp").exists()


def test_a_real_limit_of_the_kernel_is_told(tmp_path: Path) -> None:
    """Through numpy, whose error has no number: a file may not grow beyond 1,000 bytes."""
    import signal

    resource = pytest.importorskip("resource")
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(DiskError) as found, whole(tmp_path / "x.npy") as part, part.open("wb") as file:
            np.save(file, np.zeros(10_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert found.value.what == FULL
    assert found.value.where == str(tmp_path / "x.npy")
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write into any folder")
def test_a_folder_without_the_right_to_write(tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    try:
        with pytest.raises(DiskError, match=CLOSED):
            write_json(tmp_path / "a.json", {})
    finally:
        tmp_path.chmod(0o755)


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EUCLEAN, errno.ETIMEDOUT])
@pytest.mark.parametrize("kind", ["sealed", "damaged", "rows", "audits"])
def test_a_read_that_the_disk_refuses_is_no_damage(
    kind: str, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else what it holds would be made again, or thrown away."""
    file = tmp_path / "audit.json"
    reads: dict[str, Callable[[], Any]] = {
        "sealed": lambda: read_sealed(file, "a note", fix="remove it"),
        "damaged": lambda: damaged(tmp_path, {file.name: "0"}),
        "rows": lambda: load_rows(file),
        "audits": lambda: Audits.read(RunDir(tmp_path, Metrics(None)), None),  # type: ignore[arg-type]
    }
    assert_damaged(kind, reads[kind])  # where there is no such file
    write_sealed(file, {"refreshes": []})
    refused = OSError(number, os.strerror(number), str(file))
    monkeypatch.setattr(Path, "open", lambda *_, **__: (_ for _ in ()).throw(refused))
    for name in ("read_bytes", "read_text"):
        monkeypatch.setattr(Path, name, lambda *_, **__: (_ for _ in ()).throw(refused))
    with pytest.raises(DiskError) as found:
        reads[kind]()
    assert found.value.what == FAILED
    assert found.value.where == str(file)
    assert found.value.got == os.strerror(number)


def assert_damaged(kind: str, read: Callable[[], Any]) -> None:
    """A file that is not there is damage, and no audit is none."""
    if kind == "damaged":
        assert read() == ["audit.json"]
    elif kind == "audits":
        assert read().records == {}
    else:
        with pytest.raises(InputError) as found:
            read()
        assert not isinstance(found.value, DiskError)
