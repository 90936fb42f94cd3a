"""Choices of hardware with their reasons, and helpers that do nothing in a single process.

What two processes do is tested in ``tests/integration/test_processes.py``.
"""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from sparring.distributed import (
    any_process,
    choose_device,
    choose_precision,
    choose_threads,
    gather_rows,
    make_accelerator,
    processes,
    rank,
    sum_over_processes,
)
from sparring.types import InputError

CPU = torch.device("cpu")


def test_one_process() -> None:
    assert (processes(), rank()) == (1, 0)
    rows = torch.randn(3, 2, requires_grad=True)
    assert gather_rows(rows) is rows
    assert any_process(True, CPU) is True
    assert any_process(False, CPU) is False
    assert sum_over_processes({"b": 1.5, "a": 2.0}, CPU) == {"b": 1.5, "a": 2.0}


def test_the_device_is_one_that_is_there() -> None:
    choice = choose_device()
    expected = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    assert (choice.name, choice.value) == ("device", expected)
    assert choice.reason


def test_precision_as_asked_or_where_it_is_fast() -> None:
    assert choose_precision("bf16", "cpu").value == "bf16"
    assert choose_precision("fp32", "cuda").reason == "asked for"
    assert choose_precision("auto", "mps").value == "fp32"
    with pytest.raises(InputError, match="unknown precision") as caught:
        choose_precision("fp16", "cpu")  # type: ignore[arg-type]
    assert caught.value.expected == "auto, fp32 or bf16"


@pytest.mark.parametrize(
    ("has", "value", "named"),
    [({"amx_bf16": True, "avx512_bf16": True}, "bf16", "AMX"),
     ({"amx_bf16": False, "avx512_bf16": True}, "bf16", "AVX512-BF16"),
     ({"amx_bf16": False, "avx512_bf16": False, "avx512_f": True}, "fp32", "no fast bf16"), ({}, "fp32", "no fast")],
)  # fmt: skip
def test_precision_on_a_cpu_is_what_it_multiplies_fast(
    has: dict[str, bool], value: str, named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has, raising=False)
    found = choose_precision("auto", "cpu")
    assert found.value == value
    assert named in found.reason
    monkeypatch.delattr(torch.cpu, "get_capabilities")  # before torch 2.10
    assert choose_precision("auto", "cpu").value == "fp32"


def test_threads_as_asked_or_as_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_threads(3).value == "3"
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert choose_threads().reason == "OMP_NUM_THREADS is set"
    monkeypatch.delenv("OMP_NUM_THREADS")
    choice = choose_threads()
    assert 1 <= int(choice.value) <= torch.get_num_threads()
    assert "usable" in choice.reason


def test_the_accelerator_changes_no_precision_and_counts_no_accumulation() -> None:
    accelerator = make_accelerator("cpu")
    assert accelerator.device == CPU
    assert accelerator.mixed_precision == "no"
    assert accelerator.gradient_accumulation_steps == 1
    model = torch.nn.Linear(2, 2)
    assert accelerator.prepare_model(model) is model
    accelerator.free_memory()


def test_an_earlier_trainer_of_this_process_leaves_no_precision_behind() -> None:
    """In a process of its own, for the precision is the whole process's."""
    code = (
        "from accelerate import Accelerator; from sparring.distributed import make_accelerator;"
        "print(Accelerator(cpu=True, mixed_precision='bf16').mixed_precision, make_accelerator('cpu').mixed_precision)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["bf16", "no"]
