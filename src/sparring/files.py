"""Whole files or none: written aside and renamed into place; what a file's contents are known by; who may write; and in
plain words what a disk that is full or closed to writing answered."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from sparring.types import InputError

logger = logging.getLogger("sparring")

SEAL = "seal"
"""Key of a sealed JSON file under which the SHA-256 of everything else in it stands."""

LOCK = ".lock"
"""What holds a whole folder, in it."""
_TRIES = 10

DAY = 86400.0
FULL, CLOSED, FAILED = "the disk is full", "a file or folder is closed to this user", "the disk failed"
_AGAIN = "then run the same command again"
_KINDS = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), (FULL, f"make room there, {_AGAIN}")),
    **dict.fromkeys((errno.EROFS, errno.EACCES, errno.EPERM), (CLOSED, f"make it writable and readable, {_AGAIN}")),
    **dict.fromkeys((errno.EIO, errno.ESTALE), (FAILED, f"look after the disk, {_AGAIN}")),
}
_IN_TEXT = {os.strerror(number): number for number in _KINDS}
_ABSENT = (FileNotFoundError, NotADirectoryError, IsADirectoryError)
_CUT = re.compile(r"^\d+ requested and \d+ written$")  # numpy's, for any write that fell short


class DiskError(InputError):
    """A disk that is full, closed to writing, or broken. A run that meets it goes on with the same command."""


class Damaged(InputError):
    """A sealed file, a table of texts or a store of tokens is missing, cut, changed or of another version. Who can make
    it again catches this."""


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


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn whatever the disk refuses to read into a `DiskError`: what the file holds is not known. One that is not
    there, or is no file, raises as ever."""
    try:
        with explained(path):
            yield
    except _ABSENT:
        raise
    except OSError as error:
        what, fix = _KINDS[errno.EIO]
        raise DiskError(what, where=str(path), got=error.strerror or str(error), fix=fix) from error


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


class Busy(InputError):
    """What another process holds."""


class Lock:
    """A run folder, or one file in a folder, held for this process, until `close` or the end of the object.

    Args:
        folder: what is held.
        file: name of a file in it that alone is held; "" is the whole folder.

    Raises:
        Busy: another process (or another `Lock` of this one) holds it.
        DiskError: the file by which it is held cannot be opened; ``what`` is `CLOSED` where it is another user's.

    Nothing is held where the system (Windows) or the file system has no such locks: `held` says so, and no file stays.
    """

    def __init__(self, folder: Path, file: str = "") -> None:
        self._descriptor, made = -1, False
        self._path = folder / (f".{file}.lock" if file else LOCK)
        try:
            import fcntl
        except ImportError:
            return
        for _ in range(_TRIES):
            with explained(self._path):
                made |= self._open()
            try:
                fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self.close()
                raise Busy(
                    f"another process is {'writing this file' if file else 'working on this run folder'}",
                    where=str(folder / file), expected="one process at a time",
                    fix="wait for it, or choose another --out",
                ) from None  # fmt: skip
            except OSError as error:
                self._not_held(made)
                logger.warning("%s: this file system has no locks (%s): nothing is held", folder, error)
                return
            if self._is_there():
                return
            self.close()  # its holder removed it after it was opened here: others will open another one
        self._not_held(made)
        logger.warning("%s: this file system does not tell files apart: nothing is held", folder)

    def _open(self) -> bool:
        """-> whether the file is new"""
        try:
            self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
            return True
        except FileExistsError:
            self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
            return False

    def _not_held(self, made: bool) -> None:
        """Leave no file that was made here; another one's may be a lock to it."""
        self.close()
        if made:
            with suppress(OSError):
                self._path.unlink()

    @property
    def held(self) -> bool:
        """Whether other processes are kept out."""
        return self._descriptor >= 0

    def _is_there(self) -> bool:
        """Whether what is held is the file that others will open."""
        try:
            return self.held and os.path.samestat(os.fstat(self._descriptor), os.stat(self._path))
        except FileNotFoundError:
            return False

    def remove(self) -> None:
        """Give it free and remove the file by which it was held."""
        if self.held:
            self._path.unlink(missing_ok=True)
        self.close()

    def close(self) -> None:
        """Give it free."""
        if self.held:
            os.close(self._descriptor)
            self._descriptor = -1

    def __del__(self) -> None:
        self.close()


@contextmanager
def scratch(path: Path, target: Path | None = None) -> Iterator[Path]:
    """A file to write to that is no result yet: it goes away when writing fails; ``target`` is named then."""
    try:
        with explained(target or path):
            yield path
    except BaseException:
        with suppress(OSError):
            path.unlink()
        raise


@contextmanager
def whole(path: Path, *, durable: bool = False) -> Iterator[Path]:
    """Where to write so that ``path`` appears complete or stays as it was; its folders are made.

    ``durable``: the contents are on the disk before they appear, should the power fail.
    """
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with scratch(path.with_name(path.name + ".part"), path) as part:
            yield part
            if durable:
                onto_disk(part)
            os.replace(part, path)


def onto_disk(path: Path) -> None:
    """Wait until a file's contents, or the names in a folder, are on the disk."""
    if os.name == "nt":  # neither a folder nor a file that is open to read only can be waited for
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """Hex SHA-256 of a file's contents."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digests(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """SHA-256 of files in a folder, by name."""
    return {name: sha256(folder / name) for name in names}


def damaged(folder: Path, wanted: Mapping[str, str]) -> list[str]:
    """The names of those files that are missing or not as they were when ``wanted`` was made.

    Raises: DiskError where the disk refuses to read one: what it holds is not known.
    """

    def same(path: Path, digest: str) -> bool:
        try:
            with reading(path):
                return sha256(path) == digest
        except _ABSENT:
            return False

    return [name for name, digest in wanted.items() if not same(folder / name, digest)]


def write_text(path: Path, text: str, *, durable: bool = False) -> Path:
    """Write a text file aside and rename it into place; folders are made. -> the path"""
    with whole(path, durable=durable) as part:
        part.write_text(text, encoding="utf-8")
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


def write_sealed(path: Path, value: Mapping[str, Any], *, indent: int | None = 2, durable: bool = False) -> Path:
    """Write a JSON object with its checksum, aside and renamed into place (see `whole`). -> the path"""
    return write_text(path, json.dumps(sealed(value), indent=indent, ensure_ascii=False) + "\n", durable=durable)


def read_sealed(path: Path, what: str, *, fix: str, error: type[InputError] = Damaged) -> dict[str, Any]:
    """What `write_sealed` wrote; ``error`` when it is missing, cut, changed or no such file.

    Raises: DiskError where the disk refuses to read it.
    """
    try:
        with reading(path):
            text = path.read_bytes()
        return unsealed(text.decode("utf-8"))
    except DiskError:
        raise
    except (*_ABSENT, ValueError) as cause:
        got = (cause.strerror if isinstance(cause, OSError) else None) or str(cause)
        raise error(
            f"{what} is damaged", where=str(path), expected="the file as it was written", got=got, fix=fix
        ) from None


def make_parents(folder: Path, where: object) -> None:
    """Make a folder and those above it; InputError that names ``where`` when it cannot be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError("the output cannot be written", where=str(where), got=str(error)) from None


def remove(path: Path) -> None:
    """Remove a file or a folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


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
