"""Frozen encoders in int8 and under torch.compile, against fp32 and bf16 as they are: CPU seconds, and lists kept.

    python benchmarks/alternatives.py --passages 600 --threads 1

Every arm embeds the same passages and queries. R@k is the share of the fp32 lists' top k that the arm's lists keep.
int8 is dynamic: weights are rounded once a channel, the input of every product when it is multiplied. It is tried in
our own forward (no padding) and as torch's `quantize_dynamic` makes it. What an arm needs once (rounding, compiling) is
measured apart. CPU seconds are those of the whole process, children of the compiler included.
"""

from __future__ import annotations

import argparse
import copy
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from tabulate import tabulate
from torch import Tensor, nn
from torch.nn import functional
from transformers.activations import GELUActivation

import speed
from harness import hardware
from material import Material
from rows import overlap
from sparring.models import Retriever, lean
from sparring.phases.encode import encode
from sparring.phases.index import build_index


class Int8:
    """A product in int8 in the place of `lean.Product`."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        self.weight = torch.empty(0)  # float32, as the hidden states
        scales = weight.abs().amax(1).clamp_min(1e-12).double() / 127
        rounded = torch.quantize_per_channel(
            weight, scales, torch.zeros(len(weight), dtype=torch.int64), 0, torch.qint8
        )
        self.packed = torch.ops.quantized.linear_prepack(rounded, bias)

    @classmethod
    def of(cls, linears: Sequence[nn.Linear], dtype: torch.dtype, fused: bool) -> Int8:  # noqa: ARG003
        """As `lean.Product.of`."""
        return cls(torch.cat([one.weight for one in linears]), torch.cat([one.bias for one in linears]))

    def __call__(self, x: Tensor) -> Tensor:
        """(T, in) -> (T, out)"""
        found: Tensor = torch.ops.quantized.linear_dynamic(x, self.packed)
        return found

    def activated(self, x: Tensor, activation: nn.Module) -> Tensor:
        """As `lean.Product.activated`."""
        return functional.gelu(self(x)) if type(activation) is GELUActivation else activation(self(x))

    def added(self, x: Tensor, residual: Tensor, p: float) -> Tensor:
        """As `lean.Product.added`, at rest."""
        assert not p
        return self(x).add_(residual)


def int8(run: Callable[[], Any], engine: str) -> Callable[[], Any]:
    """``run`` with our forward's products in int8, packed at the first call."""
    made, packed = lean._layers, {}

    def layers(encoder: Any) -> Any:
        if id(encoder) not in packed:
            with mock.patch.object(lean, "Product", Int8):
                packed[id(encoder)] = made(encoder)
        return packed[id(encoder)]

    def changed() -> Any:
        before, torch.backends.quantized.engine = torch.backends.quantized.engine, engine
        try:
            with mock.patch.object(lean, "_layers", layers):
                return run()
        finally:
            torch.backends.quantized.engine = before

    return changed


def cpu() -> float:
    """CPU seconds of this process and of those it has started and waited for."""
    return sum(os.times()[:4])


def main() -> None:
    """Arms in turn; the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--passages", type=int, default=600)
    parser.add_argument("--queries", type=int, default=200)
    parser.add_argument("--layers", type=int, default=2, help="encoder layers; 0 keeps all")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--skip", nargs="*", default=[], help="arms whose name has one of these words")
    parser.add_argument("--quick", action="store_true", help="a toy, without a network")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    sizes = ["--passages", str(given.passages), "--queries", str(given.queries), "--layers", str(given.layers)]
    known = speed.parser()
    known.set_defaults(**(speed.QUICK if given.quick else {}))
    options = known.parse_args([*sizes, *(["--quick"] if given.quick else [])])
    with tempfile.TemporaryDirectory() as place:
        m = Material.of(options, Path(place))
        base = m.retriever().eval()
    stores = [base.tokenize(m.passages, "passage", None), base.tokenize(m.queries, "query", None)]

    def embed(model: Retriever, dtype: torch.dtype | None = None) -> list[np.ndarray]:
        kinds: list[Any] = ["passage", "query"]
        pairs = zip(stores, kinds, strict=True)
        return [encode(model, store, kind, token_budget=2048, dtype=dtype) for store, kind in pairs]

    def compiled(dtype: torch.dtype | None) -> Callable[[], list[np.ndarray]]:
        model = copy.deepcopy(base)
        encoder = next(x for x in model.modules() if type(x) in lean.ENCODERS)
        encoder.forward = torch.compile(encoder.forward, dynamic=True)  # ours is not put over it
        return lambda: embed(model, dtype)

    def quantised() -> Callable[[], list[np.ndarray]]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = torch.ao.quantization.quantize_dynamic(copy.deepcopy(base), {nn.Linear}, torch.qint8)
        return lambda: embed(model)

    bf16 = torch.bfloat16
    makers: dict[str, Callable[[], Callable[[], list[np.ndarray]]]] = {
        "fp32": lambda: lambda: embed(base), "bf16": lambda: lambda: embed(base, bf16),
        **{f"int8, our forward, {engine}": (lambda e=engine: int8(lambda: embed(base), e))
           for engine in torch.backends.quantized.supported_engines if engine in ("onednn", "fbgemm", "x86")},
        "int8, quantize_dynamic": quantised,
        "torch.compile, fp32": lambda: compiled(None), "torch.compile, bf16": lambda: compiled(bf16),
    }  # fmt: skip
    k, once, arms, found = min(100, given.passages // 2), {}, {}, {}
    for name, make in makers.items():
        if any(word in name for word in given.skip):
            continue
        start = cpu()
        try:
            arms[name] = make()
            passages, queries = arms[name]()
        except Exception as error:  # an arm that this torch does not have is a result, too
            print(f"{name}: {type(error).__name__}: {str(error).splitlines()[0]}")
            arms.pop(name, None)
            continue
        once[name] = cpu() - start
        found[name] = build_index(passages).search(queries, k)[1]
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for number in range(given.repetitions):
        for name in list(arms)[:: 1 if number % 2 == 0 else -1]:
            start = time.process_time()
            arms[name]()
            seconds[name].append(time.process_time() - start)
    rows = []
    for name, values in seconds.items():
        ratios = [a / b for a, b in zip(seconds["fp32"], values, strict=True)]
        rows.append([
            name, f"{1e3 * median(values) / given.passages:.2f}",
            f"{median(ratios):.2f} ({min(ratios):.2f} .. {max(ratios):.2f})", f"{once[name] - median(values):.1f}",
            f"{overlap(found['fp32'], found[name]):.4f}",
        ])  # fmt: skip
    head = ["arm", "CPU ms a passage", "times as fast as fp32", "once, CPU s", f"R@{k} against fp32's lists"]
    print(tabulate(rows, head, tablefmt="github", disable_numparse=True))
    print(f"\n{given.passages} passages, {given.queries} queries, {given.layers or 'all'} layers; {hardware()}")


if __name__ == "__main__":
    main()
