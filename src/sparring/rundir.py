"""The run folder: one new folder a run, never over an earlier one; every phase is timed and recorded."""

from __future__ import annotations

import importlib.metadata
import logging
import platform
import signal
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from sparring import files
from sparring.files import LOCK
from sparring.log import Metrics, peak_memory_bytes, release_memory
from sparring.types import InputError

logger = logging.getLogger("sparring")

P = ParamSpec("P")
R = TypeVar("R")

JOURNAL = "journal.jsonl"
FINISHED = "a finished run"
_EMPTY = (LOCK, ".writable")  # what a run that was stopped at its very first moment leaves

PACKAGES = (
    "sparring", "torch", "transformers", "sentence-transformers", "accelerate", "faiss-cpu", "tokenizers", "numpy",
    "scipy", "pyarrow", "ir-measures", "bm25s",
)  # fmt: skip


class RunDir:
    """A run's folder and what is written into it.

    Attributes:
        path: the folder.
        metrics: its ``metrics.jsonl``.
        phases: (name, seconds, peak memory in bytes) of each phase that ended.
    """

    def __init__(self, path: Path, metrics: Metrics) -> None:
        self.path, self.metrics = path, metrics
        self.phases: list[tuple[str, float, int]] = []

    @classmethod
    def create(cls, path: str | Path) -> RunDir:
        """A run in a new folder; raises as `make_folder`."""
        folder = make_folder(path)
        return cls(folder, Metrics(folder / "metrics.jsonl"))

    def phase(self, name: str, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Call ``function`` and record how long it took, by the clock and in CPU seconds of this process, and the
        process's peak memory."""
        start, used = time.monotonic(), time.process_time()
        logger.info("%s ...", name)
        result = function(*args, **kwargs)
        release_memory()
        seconds, memory = time.monotonic() - start, peak_memory_bytes()
        if self.metrics.muted():
            return result
        self.phases.append((name, seconds, memory))
        cpu = round(time.process_time() - used, 3)
        self.metrics.write("phase", name=name, took=round(seconds, 3), cpu=cpu, peak_memory_mb=memory // 2**20)
        logger.info("%s: %.1f s", name, seconds)
        return result

    def go_on(self, mark: Mapping[str, Any], *, taken: int = 0) -> None:
        """Take over what an earlier process recorded in the metrics, up to a mark; ``taken`` as in `Metrics.go_on`."""
        self.metrics.go_on(mark, taken=taken)
        own = [r for r in self.metrics.records[taken:] if r["kind"] == "phase"]
        self.phases = [(r["name"], r["took"], r["peak_memory_mb"] * 2**20) for r in own]

    def write_text(self, name: str, text: str) -> Path:
        """Write a text file aside and rename it into place."""
        return files.write_text(self.path / name, text)

    def write_json(self, name: str, value: Mapping[str, Any]) -> Path:
        """Write a JSON file aside and rename it into place."""
        return files.write_json(self.path / name, value)


class Stop:
    """While inside, the first Ctrl-C only sets ``asked``, so that an update can end; the second one interrupts."""

    def __init__(self) -> None:
        self.asked = False
        self._before: Any = None

    def __enter__(self) -> Stop:
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, self._ask)
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)
        if self.asked and kind is None:  # asked after the last update
            raise KeyboardInterrupt

    def _ask(self, *_: object) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        logger.warning("stopping after this update; Ctrl-C once more stops at once")


def unfinished(folder: str | Path) -> bool:
    """Whether a stopped run lies there that the same command continues."""
    return (Path(folder) / JOURNAL).is_file()


def make_folder(path: str | Path) -> Path:
    """Make a run's folder.

    Raises: InputError when it is used already, or cannot be written.
    """
    folder = Path(path)
    require_unused(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InputError(
            "the output folder cannot be written", where=str(folder), got=str(error), fix="choose another --out"
        ) from None
    return folder


def is_unused(folder: Path) -> bool:
    """Whether nothing lies at a path yet but what a run leaves that was stopped at its very first moment."""
    if folder.is_dir():
        return all(path.name in _EMPTY for path in folder.iterdir())
    return not folder.is_file()


def require_unused(folder: Path) -> None:
    """Refuse a path where something lies already."""
    if not is_unused(folder):
        finished = (folder / "results.json").is_file() and not unfinished(folder)
        raise InputError(
            "the output folder is already used",
            where=str(folder),
            expected="a folder that does not exist, or an empty one",
            got="a file" if folder.is_file() else FINISHED if finished else "a folder with files in it",
            fix="choose another --out, or remove this one yourself; nothing was overwritten",
        )


def versions() -> dict[str, str]:
    """Versions of Python, the platform and the packages that decide results."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found
