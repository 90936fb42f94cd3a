"""Interleaved timing: every repetition runs all arms, so that what else the machine does hits all of them alike."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate


@dataclass(frozen=True)
class Ratio:
    """How many times longer one arm took than another: one ratio a repetition."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    def __str__(self) -> str:
        return f"{self.median:.2f} ({min(self.values):.2f} .. {max(self.values):.2f})"

    def to_dict(self) -> dict[str, float]:
        low, high = min(self.values), max(self.values)
        return {"median": self.median, "min": low, "max": high, "repetitions": len(self.values)}


def interleave(arms: Mapping[str, Callable[[], Any]], repetitions: int) -> dict[str, list[float]]:
    """Seconds of each arm in each repetition; the order of the arms turns round every time. One untimed warm-up."""
    for run in arms.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for number in range(repetitions):
        for name in list(arms) if number % 2 == 0 else list(arms)[::-1]:
            start = time.perf_counter()
            arms[name]()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def ratio(seconds: Mapping[str, list[float]], slower: str, faster: str) -> Ratio:
    """Time of ``slower`` over time of ``faster``, repetition by repetition."""
    return Ratio(tuple(a / b for a, b in zip(seconds[slower], seconds[faster], strict=True)))


def hardware() -> str:
    """One line on the machine and the libraries."""
    model = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), model)
    amx = " with AMX bf16" if torch.cpu.get_capabilities().get("amx_bf16") else ""
    load = f", load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    return f"{model}{amx}, {torch.get_num_threads()} threads{load}, torch {torch.__version__}, {platform.system()}"


def arguments(description: str, repetitions: int = 7) -> argparse.ArgumentParser:
    """The options that all benchmarks have."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=repetitions, help="timed repetitions of every arm")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="CPU threads of torch")
    parser.add_argument("--layers", type=int, default=2, help="encoder layers kept; 0 keeps all")
    parser.add_argument("--seed", type=int, default=0, help="which queries and passages are drawn")
    parser.add_argument("--out", type=Path, help="write the result as JSON here")
    return parser


def report(
    title: str, rows: list[list[object]], head: list[str], notes: list[str], result: Any, out: Path | None
) -> None:
    """Print a table with its notes and the hardware; write the JSON where asked."""
    line = hardware()
    print(f"\n{title}\n\n{tabulate(rows, head, tablefmt='github', disable_numparse=True)}\n")
    print("\n".join([*notes, line]))
    if out is not None:
        out.write_text(json.dumps({"hardware": line, **result}, indent=1) + "\n", encoding="utf-8")
