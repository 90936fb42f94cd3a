"""Interleaved timing: every repetition runs all arms, so that what else the machine does hits all of them alike."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import statistics
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from tabulate import tabulate
from torch.nn import functional

from sparring.distributed import cpu_bf16_units
from sparring.models.lean import has_fused_products


@dataclass(frozen=True)
class Ratio:
    """How many times longer one arm took than another: one ratio a repetition."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    def __str__(self) -> str:
        return f"{self.median:.2f} ({min(self.values):.2f} .. {max(self.values):.2f})"

    def percent(self) -> str:
        """The same of a share."""
        return f"{self.median:.0%} ({min(self.values):.0%} .. {max(self.values):.0%})"

    def to_dict(self) -> dict[str, float]:
        low, high = min(self.values), max(self.values)
        return {"median": self.median, "min": low, "max": high, "repetitions": len(self.values)}


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds that a call takes, a GPU's work included, and what it returns."""
    _settle()
    start = time.perf_counter()
    found = run()
    _settle()
    return time.perf_counter() - start, found


def _settle() -> None:
    """Wait until a GPU, where there is one, has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def interleave(arms: Mapping[str, Callable[[], Any]], repetitions: int) -> dict[str, list[float]]:
    """Seconds of each arm in each repetition; the order of the arms turns round every time. One untimed warm-up.

    An arm that returns a float has measured its own seconds.
    """
    for run in arms.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for number in range(repetitions):
        for name in list(arms) if number % 2 == 0 else list(arms)[::-1]:
            taken, own = timed(arms[name])
            seconds[name].append(own if isinstance(own, float) else taken)
    return seconds


class Roofline:
    """The matrix-product peak of this machine at this moment: the best rate of a few large products, by torch's linear
    or by oneDNN's with a weight that is laid out before, whichever is faster."""

    SHAPES = ((2048, 384, 1536), (2048, 1536, 384), (1024, 384, 8192), (1536, 1536, 1536))
    ON_GPU = ((16384, 384, 1536), (8192, 4096, 4096), (16384, 8192, 8192))

    def __init__(self, dtype: torch.dtype, device: str = "cpu") -> None:
        shapes = self.SHAPES if device == "cpu" else self.ON_GPU
        found = [one for shape in shapes for one in self._products(shape, dtype, device)]
        self.flops, self.product = max(found, key=self._rate)
        """Operations of the best product, and the product."""

    @staticmethod
    def _products(
        shape: tuple[int, int, int], dtype: torch.dtype, device: str
    ) -> list[tuple[int, Callable[[], Any]]]:
        m, k, n = shape
        left, right = torch.randn(m, k).to(device, dtype), torch.randn(n, k).to(device, dtype)
        found: list[Callable[[], Any]] = [lambda: functional.linear(left, right)]
        if device == "cpu" and has_fused_products(dtype):
            packed = torch.ops.mkldnn._reorder_linear_weight(right, None)
            found.append(lambda: torch.ops.mkldnn._linear_pointwise(left, packed, None, "none", [], ""))
        return [(2 * m * k * n, product) for product in found]

    def run(self, flops: float) -> float:
        """Seconds that so many operations take in products of the best shape; part of a product counts in part."""
        count = max(1, round(flops / self.flops))

        def products() -> None:
            for _ in range(count):
                self.product()

        return timed(products)[0] * flops / (count * self.flops)

    @staticmethod
    def _rate(one: tuple[int, Callable[[], Any]]) -> float:
        flops, product = one
        return flops / min(timed(product)[0] for _ in range(5))


class PeakMemory:
    """The largest sum of resident memory of this process and its children, in bytes, while the block runs."""

    def __enter__(self) -> PeakMemory:
        self.bytes, self._done = 0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        own = psutil.Process()
        while True:
            total = own.memory_info().rss
            for child in own.children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    total += child.memory_info().rss
            self.bytes = max(self.bytes, total)
            if self._done.wait(0.05):
                return


def ratio(seconds: Mapping[str, list[float]], slower: str, faster: str) -> Ratio:
    """Time of ``slower`` over time of ``faster``, repetition by repetition."""
    return Ratio(tuple(a / b for a, b in zip(seconds[slower], seconds[faster], strict=True)))


def hardware() -> str:
    """One line on the machine and the libraries."""
    model = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), model)
    units = f" with {cpu_bf16_units()}" if cpu_bf16_units() else ""
    if torch.cuda.is_available():
        units += f" and {torch.cuda.get_device_name()}"
    load = f", load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    return f"{model}{units}, {torch.get_num_threads()} threads{load}, torch {torch.__version__}, {platform.system()}"


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
