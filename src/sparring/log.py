"""What a run says while it works: JSONL metrics, one progress bar, tables, experiment trackers.

Nothing here prints: bars go to standard error through tqdm, and only when it is a terminal.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import logging
import math
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tabulate import tabulate
from tqdm import tqdm

from sparring.types import CannotGoOn, InputError

logger = logging.getLogger("sparring")


@contextmanager
def progress(label: str, total: int, unit: str = "", *, done: int = 0) -> Iterator[tqdm]:
    """One bar with rate and ETA for a long phase; silent when standard error is not a terminal.

    ``done``: as much of the total was done before, and is not in the rate.
    """
    named = f" {unit}" if unit else "it"
    bar = tqdm(total=total, initial=done, desc=label, unit=named, disable=None, leave=False, dynamic_ncols=True)
    try:
        yield bar
    finally:
        bar.close()


def table(rows: Sequence[Sequence[object]], headers: Sequence[str], *, markdown: bool = False) -> str:
    """Rows as an aligned text table, or as a Markdown one."""
    style = "github" if markdown else "simple"
    return str(tabulate(rows, headers=headers, tablefmt=style, disable_numparse=True))


def release_memory() -> None:
    """Give freed heap memory back to the system, where the C library can (glibc).

    Training frees many tensors of ever different sizes; glibc keeps them, and a long run's memory would only grow.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def peak_memory_bytes() -> int:
    """The largest resident memory of this process so far, in bytes.

    On Linux from /proc: getrusage's number is at least what the process had that started this one.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        lines = status.read_text(encoding="ascii", errors="replace").splitlines()
        if peaks := [line.split()[1] for line in lines if line.startswith("VmHWM:")]:
            return int(peaks[0]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def reset_peak_memory() -> bool:
    """Let `peak_memory_bytes` start again from the present (Linux); whether that was possible."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


class Metrics:
    """``metrics.jsonl``: one JSON object a line, each with the seconds since the start.

    Args:
        path: the file; records are appended.
        tracker: also given every record's numbers (accelerate's ``log``), or None.
    """

    def __init__(self, path: Path | None, tracker: Callable[[Mapping[str, float]], None] | None = None) -> None:
        self.path, self.tracker, self.start = path, tracker, time.monotonic()
        self.records: list[dict[str, Any]] = []
        self.muted: Callable[[], bool] = lambda: False
        self._size, self._digest = 0, hashlib.sha256()

    def write(self, kind: str, **values: Any) -> None:
        """Append one record. Numbers that are not finite are written as null, never as bare NaN. Nothing while
        ``muted``: a run that goes on has recorded this before it stopped."""
        if self.muted():
            return
        self.take({"kind": kind, "seconds": round(time.monotonic() - self.start, 3), **values})
        if self.tracker is not None:
            numbers = {f"{kind}/{k}": float(v) for k, v in values.items() if isinstance(v, int | float)}
            if numbers:
                self.tracker(numbers)

    def mark(self) -> dict[str, Any]:
        """Bytes of the file so far, and their SHA-256."""
        return {"size": self._size, "sha256": self._digest.hexdigest()}

    def go_on(self, mark: Mapping[str, Any], *, taken: int = 0) -> None:
        """Take an earlier part of the run over: the first bytes of the file, up to a `mark`; the rest is cut off.

        ``taken``: how many of its first records were another run's, which had a clock of its own.
        """
        assert self.path is not None
        size = int(mark["size"])
        found = self.path.read_bytes() if self.path.is_file() else b""
        self._size, self._digest = size, hashlib.sha256(found[:size])
        if len(found) < size or self.mark() != mark:
            raise CannotGoOn(
                "the metrics of the stopped run are missing or damaged", where=str(self.path),
                expected=f"{size} bytes as they were written", got=f"{len(found)} bytes",
            )  # fmt: skip
        self.path.touch()
        with self.path.open("r+b") as file:
            file.truncate(size)
        self.records = read_metrics(self.path)
        self.start -= self.records[-1]["seconds"] if len(self.records) > taken else 0.0

    def take(self, record: Mapping[str, Any]) -> None:
        """Append a finished record, another run's for example."""
        self.records.append(dict(record))
        if self.path is not None:
            line = (json.dumps(_finite(record), ensure_ascii=False, allow_nan=False) + "\n").encode("utf-8")
            try:
                with self.path.open("ab") as file:
                    file.write(line)
            except OSError as error:
                error.filename = str(self.path)  # a write that fails names no file
                raise
            self._size += len(line)
            self._digest.update(line)


def read_metrics(path: Path, *, fix: str = "begin again with another --out") -> list[dict[str, Any]]:
    """The records of a ``metrics.jsonl``; a last line that a crash cut short is left out.

    ``fix``: what to do where it is missing or damaged.

    Raises: InputError, at the line that is no record; OSError where the disk refuses to read it.
    """
    try:
        lines = path.read_bytes().split(b"\n")[:-1]
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        got = error.strerror or str(error)
        raise InputError("the metrics cannot be read", where=str(path), got=got, fix=fix) from None
    found = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line.decode("utf-8"))
            if not isinstance(record, dict) or "kind" not in record or "seconds" not in record:
                raise ValueError("no object with a kind and seconds")
        except (ValueError, RecursionError) as error:
            raise InputError(
                "a line is not a record", where=f"{path}:{number}", expected='{"kind": ..., "seconds": ...}',
                got=str(error), fix=fix,
            ) from None  # fmt: skip
        found.append(record)
    return found


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return value
