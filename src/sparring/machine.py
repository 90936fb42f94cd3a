"""What this process may use of the machine: CPUs, quotas of the container, other processes' load, memory.

Linux is read through /proc and /sys/fs/cgroup (both versions of cgroups). Elsewhere, and where a file is not there, a
limit is unknown, which is None, never a guess.
"""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_UNLIMITED = 2**60  # cgroup v1 writes a number near 2^63 for "no limit"


@dataclass(frozen=True)
class Cpus:
    """CPUs that this process may use.

    Attributes:
        installed: logical CPUs of the machine.
        allowed: those that the process may run on (affinity).
        quota: CPU seconds a second that its container may use; None is no limit or not known.
    """

    installed: int
    allowed: int
    quota: float | None

    @property
    def usable(self) -> int:
        """Threads that can run at once without being throttled, at least 1."""
        return self.allowed if self.quota is None else max(1, min(self.allowed, int(self.quota + 0.01)))

    @property
    def reason(self) -> str:
        """Why it is so many."""
        text = f"{self.allowed} of {self.installed} cores are usable by this process"
        return text if self.quota is None else f"{text}; its container's quota is {self.quota:g} CPUs"


def cpus(root: Path = Path("/")) -> Cpus:
    """The CPUs that this process may use. ``root``: where /proc and /sys are looked for."""
    installed = os.cpu_count() or 1
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else installed
    return Cpus(installed, allowed, cpu_quota(root))


def cpu_quota(root: Path = Path("/")) -> float | None:
    """The smallest CPU quota of this process's control groups, in CPUs."""
    found = []
    for folder in _groups(root, "cpu"):
        words = _words(folder / "cpu.max")  # version 2: "150000 100000" or "max 100000"
        if len(words) == 2 and words[0].isdigit():
            found.append(int(words[0]) / int(words[1]))
        quota, period = _number(folder / "cpu.cfs_quota_us"), _number(folder / "cpu.cfs_period_us")
        if quota and period and quota > 0:
            found.append(quota / period)
    return min(found, default=None)


def memory_available(root: Path = Path("/")) -> int | None:
    """Bytes that this process can still take: what the system has available, within its control groups' limits."""
    found = []
    for line in _lines(root / "proc" / "meminfo"):
        if line.startswith("MemAvailable:"):
            found.append(int(line.split()[1]) * 1024)
    for folder in _groups(root, "memory"):
        for limit, usage in (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")):
            most, now = _number(folder / limit), _number(folder / usage)
            if most is not None and now is not None and most < _UNLIMITED:
                found.append(max(0, most - now + _file_cache(folder)))
    return min(found, default=None)


def others(seconds: float = 0.3, root: Path = Path("/")) -> float | None:
    """CPUs that other processes kept busy, on average, during the next ``seconds``."""
    before, own = _busy_seconds(root), time.process_time()
    if before is None:
        return None
    start = time.monotonic()
    time.sleep(seconds)
    after = _busy_seconds(root)
    assert after is not None
    passed = time.monotonic() - start
    return max(0.0, (after - before - (time.process_time() - own)) / passed)


def process_age() -> float | None:
    """Seconds since this process started (Linux)."""
    words = _words(Path("/proc/self/stat"))
    uptime = _words(Path("/proc/uptime"))
    if not words or not uptime:
        return None
    after_name = " ".join(words).rpartition(")")[2].split()
    return float(uptime[0]) - int(after_name[19]) / os.sysconf("SC_CLK_TCK")


def resident_bytes() -> int | None:
    """Resident memory of this process now (Linux)."""
    words = _words(Path("/proc/self/statm"))
    return int(words[1]) * os.sysconf("SC_PAGE_SIZE") if len(words) > 1 else None


def _busy_seconds(root: Path) -> float | None:
    """CPU seconds that all processes together have used since the start of the system."""
    for line in _lines(root / "proc" / "stat"):
        words = line.split()
        if words and words[0] == "cpu":
            user, nice, system, _, _, irq, softirq = (int(word) for word in words[1:8])
            return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")
    return None


def _groups(root: Path, controller: str) -> Iterator[Path]:
    """Folders of this process's control group for a controller, and of the groups above it."""
    for line in _lines(root / "proc" / "self" / "cgroup"):
        _, controllers, name = line.split(":", 2)
        if not controllers:
            mounts = [root / "sys/fs/cgroup", root / "sys/fs/cgroup/unified"]
        elif controller in controllers.split(","):
            mounts = [root / "sys/fs/cgroup" / controllers, root / "sys/fs/cgroup" / controller]
        else:
            continue
        parts = [part for part in name.split("/") if part not in ("", "..")]
        for mount in mounts:
            for length in range(len(parts), -1, -1):
                yield mount.joinpath(*parts[:length])


def _file_cache(folder: Path) -> int:
    """Bytes of a group's usage that are cached files it can give back."""
    for line in _lines(folder / "memory.stat"):
        words = line.split()
        if words[0] in ("inactive_file", "total_inactive_file"):
            return int(words[1])
    return 0


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []


def _words(path: Path) -> list[str]:
    return " ".join(_lines(path)).split()


def _number(path: Path) -> int | None:
    words = _words(path)
    return int(words[0]) if words and words[0].lstrip("-").isdigit() else None


def give_back(mapped: object) -> None:
    """Let go of the pages that were read of a file mapped for reading: they count as this process's memory until then.

    Nothing else changes; what is read again is mapped again. Takes a NumPy memory map opened with mode "r" or an
    ``mmap`` made with ``ACCESS_READ``; other objects, and systems without ``madvise``, are left alone.
    """
    if not hasattr(mmap, "MADV_DONTNEED"):
        return
    if getattr(mapped, "mode", "") == "r":  # of a map that may be written to, changes would be lost
        mapped = getattr(mapped, "_mmap", None)
    if isinstance(mapped, mmap.mmap):
        mapped.madvise(mmap.MADV_DONTNEED)
