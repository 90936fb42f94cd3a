"""Limits of a process, read from made-up /proc and /sys trees."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from sparring.machine import Cpus, cpu_quota, cpus, give_back, memory_available, others, process_age


def write(root: Path, files: dict[str, str]) -> Path:
    """A tree of small files."""
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({}, None),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"}, None),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "150000 100000\n"}, 1.5),
        (
            {
                "proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/b/cpu.max": "max 100000\n",
                "sys/fs/cgroup/a/cpu.max": "50000 100000\n", "sys/fs/cgroup/cpu.max": "400000 100000\n",
            },
            0.5,
        ),
        (
            {
                "proc/self/cgroup": "3:cpu,cpuacct:/docker/x\n1:name=systemd:/\n",
                "sys/fs/cgroup/cpu,cpuacct/docker/x/cpu.cfs_quota_us": "200000\n",
                "sys/fs/cgroup/cpu,cpuacct/docker/x/cpu.cfs_period_us": "100000\n",
            },
            2.0,
        ),
        (
            {
                "proc/self/cgroup": "1:cpu:/\n", "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            None,
        ),
        (
            {
                "proc/self/cgroup": "0::/../../x\n", "sys/fs/cgroup/x/cpu.max": "100000 100000\n",
            },
            1.0,
        ),
    ],
)  # fmt: skip
def test_the_smallest_quota_of_all_groups_counts(
    files: dict[str, str], quota: float | None, tmp_path: Path
) -> None:
    assert cpu_quota(write(tmp_path, files)) == quota


def test_threads_are_what_can_run_at_once() -> None:
    assert Cpus(64, 8, None).usable == 8
    assert Cpus(64, 8, 2.5).usable == 2
    assert Cpus(64, 2, 16.0).usable == 2
    assert Cpus(64, 8, 0.5).usable == 1
    assert "8 of 64 cores are usable" in Cpus(64, 8, 2.5).reason
    assert "quota is 2.5 CPUs" in Cpus(64, 8, 2.5).reason
    assert "quota" not in Cpus(64, 8, None).reason
    found = cpus()
    assert 1 <= found.usable <= found.allowed <= (os.cpu_count() or 1)


def test_memory_is_the_smallest_room(tmp_path: Path) -> None:
    files = {"proc/meminfo": "MemTotal: 99 kB\nMemAvailable: 8000 kB\n", "proc/self/cgroup": "0::/job\n"}
    assert memory_available(write(tmp_path, files)) == 8000 * 1024
    files = {
        "sys/fs/cgroup/job/memory.max": "5000000\n", "sys/fs/cgroup/job/memory.current": "4000000\n",
        "sys/fs/cgroup/job/memory.stat": "anon 1\ninactive_file 300000\n", "sys/fs/cgroup/memory.max": "max\n",
        "sys/fs/cgroup/memory.current": "9000000\n",
    }  # fmt: skip
    assert memory_available(write(tmp_path, files)) == 1_300_000
    (tmp_path / "proc/self/cgroup").write_text("5:memory:/\n")
    unlimited = {
        "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{2**63 - 4096}\n",
        "sys/fs/cgroup/memory/memory.usage_in_bytes": "1\n",
    }
    assert memory_available(write(tmp_path, unlimited)) == 8000 * 1024
    assert memory_available(tmp_path / "nowhere") is None


def test_the_load_of_others(tmp_path: Path) -> None:
    assert others(0.01, tmp_path) is None
    write(tmp_path, {"proc/stat": "cpu  100 0 100 0 0 0 0 0 0 0\n"})
    assert others(0.01, tmp_path) == 0, "nothing was used in between"
    found = others(0.01)
    assert found is None or 0 <= found <= 2 * (os.cpu_count() or 1)


def test_the_age_of_this_process_grows() -> None:
    first, second = process_age(), process_age()
    assert first is None or 0 <= first <= (second or 0)


def test_pages_of_a_mapped_file_are_given_back(tmp_path: Path) -> None:
    if not Path("/proc/self/smaps_rollup").exists():
        pytest.skip("resident pages are read from /proc")
    values = np.arange(1 << 21, dtype=np.int64)  # 16 MiB
    np.save(tmp_path / "values.npy", values)
    mapped = np.load(tmp_path / "values.npy", mmap_mode="r")
    total = int(mapped.sum())
    before = resident_file_bytes()
    give_back(mapped[5:])  # a part of a map stands for the whole
    assert before - resident_file_bytes() > 15 << 20
    assert int(mapped.sum()) == total
    written = np.lib.format.open_memmap(tmp_path / "other.npy", "w+", "<i8", (4,))
    written[:] = 7
    give_back(written)
    give_back(values)
    assert written.tolist() == [7] * 4, "a map that may be written to keeps its pages"


def resident_file_bytes() -> int:
    """Resident bytes of mapped files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith("RssFile")))
