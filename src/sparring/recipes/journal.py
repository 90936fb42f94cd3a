"""What a run has done, in order, so that the same command goes on where a stopped one ended.

A recipe is a fixed sequence of operations (fit, refresh, evaluate, keep, restore, ...). Each one that ends is a line of
``journal.jsonl`` with what it left in files. A run that goes on passes through the same sequence: an operation that is
in the journal is not done again but read, and the first that is not is done. Weights are loaded once, by the last
operation in the journal that changed them. Metrics are cut back to what the last line knew of, so that nothing is
recorded twice.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sparring.files import LOCK, SEAL, explained, remove, seal, sealed, sha256, unsealed
from sparring.phases.checkpoint import Checkpoint
from sparring.rundir import JOURNAL, RunDir
from sparring.types import CannotGoOn

Entry = Mapping[str, Any]


class Journal:
    """The operations of one run folder.

    Args:
        folder: the run's; None is a run that cannot go on.
        writes: whether this process writes lines (one of several does).

    Attributes:
        entries: the finished operations.
        position: how many of them this process has passed.
        inside: whether the run stopped inside a training phase that has a checkpoint, and has not come there again.
    """

    def __init__(self, folder: Path | None, *, writes: bool = True) -> None:
        self.folder, self.writes, self.position, self.inside = folder, writes, 0, False
        self.entries: list[Entry] = _read(folder / JOURNAL, repair=writes) if folder is not None else []

    @property
    def replaying(self) -> bool:
        """Whether the next operation is in the journal."""
        return self.position < len(self.entries)

    def resume(self, run: RunDir, *, taken: int = 0) -> None:
        """Take up the run folder as the last operation or a later checkpoint left it.

        ``taken``: how many of its first records were another run's.

        Raises: CannotGoOn where the metrics, the checkpoint or the journal's end are missing or damaged.
        """
        newest = self.newest()
        self.inside = newest.get("operation") == len(self.entries)
        if self.writes:
            run.go_on(newest["metrics"] if self.inside else self.entries[-1]["metrics"], taken=taken)
        run.metrics.muted = self.recorded
        for half_written in run.path.rglob("*.part") if self.writes else ():
            half_written.unlink()

    def newest(self) -> dict[str, Any]:
        """What the newest checkpoint was saved with; empty where there is none.

        Raises: CannotGoOn when it was saved after operations that the journal does not have.
        """
        assert self.folder is not None
        newest = Checkpoint(self.folder / "checkpoint", 0).facts()
        if newest.get("operation", 0) > len(self.entries):
            raise CannotGoOn(
                "the journal of the stopped run is cut", where=str(self.folder / JOURNAL),
                got=f"{len(self.entries)} lines",
                expected=f"{newest['operation']} lines, after which the checkpoint was written",
            )  # fmt: skip
        return newest

    def recorded(self) -> bool:
        """Whether what happens now is in the metrics already."""
        return self.replaying or self.inside

    def passed(self, kind: str, name: str) -> Entry | None:
        """The next operation as the journal has it, or None where it must be done.

        Raises: CannotGoOn when another operation is there: the folder is another recipe's or version's.
        """
        if not self.replaying:
            return None
        entry = self.entries[self.position]
        if (entry["kind"], entry["name"]) != (kind, name):
            raise CannotGoOn(
                "this run folder has gone another way than this command does", where=str(self.folder),
                expected=f"{entry['kind']} {entry['name']!r}", got=f"{kind} {name!r}",
                fix="take the version and the settings that began it, or choose another --out",
            )  # fmt: skip
        self.position += 1
        return entry

    def changes_weights(self, entry: Entry) -> bool:
        """Whether this is the last finished operation that changed weights: the one that loads them."""
        last = max((i for i, e in enumerate(self.entries) if e["kind"] in WEIGHTS), default=-1)
        return entry is self.entries[last]

    def file(self, name: str) -> Path:
        """Where the operation that is under way keeps its result."""
        assert self.folder is not None
        return self.folder / "journal" / f"{self.position:04d}-{name.replace(' ', '-')}.npz"

    def add(self, kind: str, name: str, *, file: Path | None = None, **facts: Any) -> None:
        """Note a finished operation; its file is complete by now."""
        entry: dict[str, Any] = {"kind": kind, "name": name, **facts}
        if file is not None:
            entry |= {"file": file.name, "sha256": sha256(file)}
        before = self.entries[-1][SEAL] if self.entries else ""
        entry = sealed({**entry, "before": before})
        self.entries.append(entry)
        self.position = len(self.entries)
        if self.folder is not None and self.writes:
            path = self.folder / JOURNAL
            with explained(path), path.open("a", encoding="utf-8") as lines:
                lines.write(json.dumps(entry, ensure_ascii=False) + "\n")
                lines.flush()
                os.fsync(lines.fileno())

    def checked(self, entry: Entry) -> Path:
        """The file of a finished operation; CannotGoOn when its contents are not those that were written."""
        assert self.folder is not None
        path = self.folder / "journal" / str(entry["file"])
        if not path.is_file() or sha256(path) != entry["sha256"]:
            raise CannotGoOn("a file of the stopped run is missing or damaged", where=str(path))
        return path

    @property
    def ended(self) -> tuple[str, ...] | None:
        """What a finished run still has to `clear` away; None where the run is not finished."""
        last = self.entries[-1] if self.entries else {"kind": ""}
        return tuple(last["passing"]) if last["kind"] == END else None

    def end(self, *passing: str) -> None:
        """The run is finished, from the moment at which a last line says so. What is left for `clear` is what served to
        go on, and these files and folders: a process that is killed before it has done so leaves that to the next."""
        if self.folder is None:
            return
        self.add(END, self.entries[0]["name"], passing=passing)
        self.folder, self.entries, self.position = None, [], 0


WEIGHTS = ("fit", "restore")
END = "end"
GOING_ON = ("checkpoint", "journal", LOCK, JOURNAL)
"""What lies in a run folder only to go on. Nobody else clears while the lock is there; the journal knows the rest."""


def clear(folder: Path, passing: Sequence[str]) -> None:
    """Remove from a finished run's folder what is no result; the journal last."""
    for name in (*passing, *GOING_ON):
        remove(folder / name)


def _read(path: Path, *, repair: bool) -> list[Entry]:
    """Whole lines only: a last one that was cut off is an operation that did not end, and is removed.

    Every line has a checksum, and that of the line before it: one that changed or is missing is found.
    """
    if not path.is_file():
        return []
    text = path.read_bytes()
    whole = text[: text.rfind(b"\n") + 1]
    if len(whole) < len(text) and repair:
        with path.open("r+b") as file:
            file.truncate(len(whole))
    entries: list[Entry] = []
    for number, line in enumerate(whole.split(b"\n")[:-1], 1):
        try:
            entry = unsealed(line.decode("utf-8"))
            if entry["before"] != (entries[-1][SEAL] if entries else ""):
                raise ValueError("the line before it is missing")
        except (ValueError, KeyError) as error:
            raise CannotGoOn(
                "the journal of the stopped run is damaged", where=f"{path}:{number}", got=str(error),
                expected="the line as it was written",
            ) from None  # fmt: skip
        entries.append({**entry, SEAL: seal(entry)})
    return entries


def differences(found: Mapping[str, Any], wanted: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Lines that name every value in which two nested tables differ."""
    lines = []
    for key in sorted({*found, *wanted}):
        a, b = found.get(key), wanted.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            lines += differences(a, b, f"{prefix}{key}.")
        elif a != b:
            lines.append(f"{prefix}{key}: there {a!r}, here {b!r}")
    return lines
