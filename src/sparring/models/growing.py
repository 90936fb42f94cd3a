"""A folder of files that is written from its start to its end, over several processes' lives.

It grows in a part folder beside the final one, with a sealed note of how far every file is whole; the next process
checks that against the files and goes on there. One process at a time does; another that wants the same folder at the
same moment, or may not touch what another user left, makes it in a temporary one. Whichever is finished first is
renamed into place.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sparring.files import (
    CLOSED,
    FAILED,
    Busy,
    Damaged,
    DiskError,
    Lock,
    explained,
    onto_disk,
    read_sealed,
    reading,
    write_sealed,
)

logger = logging.getLogger("sparring")

MANIFEST, NOTE = "manifest.json", "done.json"
"""What a finished folder, and one that is being made, has beside its files."""
_READ = 1 << 20  # bytes at a time


class Growing:
    """Files that are being written.

    Attributes:
        folder: where they are.
        facts: what the note said that they hold; empty where they are new.
        temporary: nobody goes on here: nothing is noted.
    """

    def __init__(
        self, folder: Path, files: Mapping[str, _File], facts: Mapping[str, Any], *, of: str, temporary: bool = False
    ) -> None:
        self.folder, self.facts, self.temporary, self._files, self._of = folder, facts, temporary, files, of

    def write(self, name: str, data: bytes) -> None:
        """Behind what the file has."""
        with explained(self.folder):
            self._files[name].write(data)

    def note(self, **facts: Any) -> None:
        """Put all files onto the disk, then say that they are whole so far. Not in a temporary folder."""
        if self.temporary:
            return
        with explained(self.folder):
            for file in self._files.values():
                file.keep()
            whole = {name: [file.size, file.sha256] for name, file in self._files.items()}
            write_sealed(self.folder / NOTE, {"of": self._of, "facts": facts, "files": whole}, durable=True)

    def finish(self, final: Path, manifest: Mapping[str, Any]) -> None:
        """Put all files onto the disk, seal the manifest, with their SHA-256, and rename the folder to ``final``; where
        another process has finished the same by now, that one is kept."""
        with explained(self.folder):
            for file in self._files.values():
                file.keep()
                file.close()
            digests = {name: file.sha256 for name, file in self._files.items()}
            write_sealed(self.folder / MANIFEST, {**manifest, "files": digests}, durable=True)
            onto_disk(self.folder)
            for path in self.folder.iterdir():
                if path.name != MANIFEST and path.name not in self._files:
                    path.unlink()  # the note, or half of one
            try:
                os.replace(self.folder, final)
            except OSError:
                if not (final / MANIFEST).exists():
                    raise
            onto_disk(final.parent)


@contextlib.contextmanager
def growing(final: Path, fingerprint: str, heads: Mapping[str, bytes]) -> Iterator[Growing | None]:
    """Where to write these files, and how far they are whole; None where the folder was finished by now.

    A part folder of which nothing is noted goes away with an error; one that is whole up to a note stays. In a
    temporary folder is who finds the part folder held by another process, or cannot hold it (there are no locks, or the
    lock is another user's), or can neither use nor remove it.

    Args:
        final: the folder that is made; its parent exists.
        fingerprint: of everything that the contents depend on.
        heads: name of each file, and what it begins with.

    Raises: DiskError.
    """
    lock = _lock(final)
    if lock is None:
        with _alone(final, fingerprint, heads) as made:
            yield made
        return
    try:
        if (final / MANIFEST).exists():
            shutil.rmtree(_part_of(final), ignore_errors=True)
            yield None
        else:
            with _part(final, fingerprint, heads) as made:
                yield made
    finally:
        lock.remove()


def remove_part(final: Path) -> None:
    """Remove the part folder of what is finished, if there is one: nobody will go on with it. Where it cannot be
    removed, or a process has it, it stays."""
    if not os.path.lexists(_part_of(final)):
        return
    with contextlib.suppress(Busy, DiskError, OSError):
        lock = Lock(final.parent, final.name)
        if lock.held:
            shutil.rmtree(_part_of(final), ignore_errors=True)
        lock.remove()


def _lock(final: Path) -> Lock | None:
    """What keeps other processes out of the part folder, where they can be kept out."""
    try:
        lock = Lock(final.parent, final.name)
    except Busy:
        logger.info("%s: another process makes it, too; this one works beside it", final)
        return None
    except DiskError as error:
        if error.what != CLOSED:
            raise
        logger.info("%s: its lock is another user's; this process works beside it", final)
        return None
    return lock if lock.held else None


@contextlib.contextmanager
def _alone(final: Path, fingerprint: str, heads: Mapping[str, bytes]) -> Iterator[Growing]:
    """A folder in a temporary one: others may read it when it is finished, as they may any that is made here."""
    with explained(final.parent):
        aside = Path(tempfile.mkdtemp(prefix=f".{final.name}-", dir=final.parent))
    try:
        with contextlib.ExitStack() as stack:
            folder = aside / final.name
            with explained(folder):
                folder.mkdir()
                files = _new(folder, heads, stack)
            yield Growing(folder, files, {}, of=fingerprint, temporary=True)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


@contextlib.contextmanager
def _part(final: Path, fingerprint: str, heads: Mapping[str, bytes]) -> Iterator[Growing]:
    """The part folder, as its note says, or new; a temporary one where it can neither be used nor removed."""
    part = _part_of(final)
    with contextlib.ExitStack() as stack:
        stack.callback(_remove_unless_noted, part)  # when its files are closed
        made = _gone_on(part, fingerprint, heads, stack) or _begun(part, fingerprint, heads, stack)
        yield made or stack.enter_context(_alone(final, fingerprint, heads))


def _part_of(final: Path) -> Path:
    return final.with_name(f".{final.name}.part")


def _remove_unless_noted(part: Path) -> None:
    if not os.path.exists(part / NOTE):
        shutil.rmtree(part, ignore_errors=True)


def _begun(part: Path, fingerprint: str, heads: Mapping[str, bytes], stack: contextlib.ExitStack) -> Growing | None:
    """A new part folder; None where the old one cannot be removed."""
    shutil.rmtree(part, ignore_errors=True)
    with explained(part):
        try:
            part.mkdir()
        except FileExistsError:
            logger.warning("%s cannot be removed, either: this process works beside it", part)
            return None
        return Growing(part, _new(part, heads, stack), {}, of=fingerprint)


def _gone_on(part: Path, fingerprint: str, heads: Mapping[str, bytes], stack: contextlib.ExitStack) -> Growing | None:
    """The files as the note knows them, what is behind cut off; None where they cannot be used."""
    if not os.path.exists(part / NOTE):  # nor where it cannot be looked at
        return None
    try:
        note = read_sealed(part / NOTE, "the note of a folder that is being made", fix="")
        facts, known = note["facts"], note["files"]
        if note["of"] != fingerprint or set(known) != set(heads):
            raise ValueError("it is of other contents")
        with reading(part), contextlib.ExitStack() as opened:
            files = {name: opened.enter_context(_File(part / name, known=known[name])) for name in heads}
            stack.enter_context(opened.pop_all())
    except (Damaged, DiskError) as error:
        if error.what == FAILED:  # what it holds is not known; one that is closed is another user's
            raise
        reason = error.got
    except KeyError as error:
        reason = f"its note has no {error}"
    except (OSError, ValueError) as error:
        reason = str(error)
    else:
        return Growing(part, files, facts, of=fingerprint)
    logger.warning("%s cannot be used (%s): it is begun again", part, reason)
    return None


def _new(folder: Path, heads: Mapping[str, bytes], stack: contextlib.ExitStack) -> dict[str, _File]:
    files = {name: stack.enter_context(_File(folder / name)) for name in heads}
    for name, head in heads.items():
        files[name].write(head)
    return files


class _File:
    """A file that is written from its start, or from where it is known to be whole; hashed on the way.

    Raises: ValueError when it is shorter than, or not as, ``known`` says (bytes, SHA-256).
    """

    def __init__(self, path: Path, known: tuple[int, str] | None = None) -> None:
        self._digest, self._file, self.size = hashlib.sha256(), path.open("r+b" if known else "wb"), 0
        if known is not None:
            try:
                self._take(*known)
            except BaseException:
                self.close()
                raise

    def _take(self, size: int, digest: str) -> None:
        """Read what is known to be whole, cut off the rest."""
        while self.size < size and (data := self._file.read(min(_READ, size - self.size))):
            self._digest.update(data)
            self.size += len(data)
        if (self.size, self.sha256) != (size, digest):
            raise ValueError(f"{Path(self._file.name).name} is not as the note says")
        self._file.truncate(size)
        self._file.seek(size)

    @property
    def sha256(self) -> str:
        """Of what was written."""
        return self._digest.hexdigest()

    def write(self, data: bytes) -> None:
        """Behind what is there."""
        self._file.write(data)
        self._digest.update(data)
        self.size += len(data)

    def keep(self) -> None:
        """Onto the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """No more is written."""
        self._file.close()

    def __enter__(self) -> _File:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):  # of what was neither noted nor finished; a full disk was told before
            self.close()
