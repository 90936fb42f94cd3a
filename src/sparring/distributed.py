"""Thin helpers over accelerate: which device, precision and threads and why; gather with gradient."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from sparring.machine import cpus
from sparring.types import InputError

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger("sparring")

Precision = Literal["auto", "fp32", "bf16"]


@dataclass(frozen=True)
class Choice:
    """A setting that was chosen, with the reason, so that both can be shown."""

    name: str
    value: str
    reason: str


def choose_device() -> Choice:
    """CUDA, then MPS, then the CPU."""
    if torch.cuda.is_available():
        return Choice("device", "cuda", f"{torch.cuda.get_device_name()} is visible")
    if torch.backends.mps.is_available():
        return Choice("device", "mps", "Apple GPU is visible")
    return Choice("device", "cpu", "no GPU is visible to torch")


def choose_precision(wanted: Precision, device: str) -> Choice:
    """bf16 where the hardware multiplies it faster (CUDA with bf16, CPUs with AMX or AVX512-BF16); fp32 elsewhere."""
    if wanted not in ("auto", "fp32", "bf16"):
        raise InputError("unknown precision", where="precision", expected="auto, fp32 or bf16", got=str(wanted))
    if wanted != "auto":
        return Choice("precision", wanted, "asked for")
    if device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return Choice("precision", "bf16", "the GPU multiplies bf16 natively")
    if device == "cpu" and (units := cpu_bf16_units()):
        return Choice("precision", "bf16", f"the CPU multiplies bf16 ({units})")
    return Choice("precision", "fp32", f"no fast bf16 on this {device}")


def cpu_bf16_units() -> str:
    """What this CPU multiplies bf16 with, faster than fp32: "AMX", "AVX512-BF16", or nothing ("")."""
    has = _capabilities()
    return "AMX" if has.get("amx_bf16") else "AVX512-BF16" if has.get("avx512_bf16") else ""


def cpu_is_amd_avx512() -> bool:
    """Whether this is an AMD processor with AVX-512."""
    has = _capabilities()
    return "AMD" in str(has.get("cpu_name", "")) and bool(has.get("avx512_f"))


def _capabilities() -> dict[str, Any]:
    found = getattr(torch.cpu, "get_capabilities", None)  # absent before torch 2.10
    return dict(found()) if found else {}


def choose_threads(wanted: int = 0) -> Choice:
    """Threads for CPU work: as asked, or as many as this process may run at once (affinity, container quota).

    Not fewer where other processes are busy at the moment: a run's numbers would depend on when it was started.
    """
    if wanted:
        return Choice("threads", str(wanted), "asked for")
    if "OMP_NUM_THREADS" in os.environ:
        return Choice("threads", str(torch.get_num_threads()), "OMP_NUM_THREADS is set")
    found = cpus()
    return Choice("threads", str(min(found.usable, torch.get_num_threads())), found.reason)


def choose_processes() -> Choice:
    """How many processes this run has; it never starts others."""
    if processes() > 1:
        return Choice("processes", str(processes()), "as they were launched")
    gpus = torch.cuda.device_count()
    if gpus > 1:
        return Choice("processes", "1", f"{gpus} GPUs are visible: `accelerate launch` starts a process for each")
    return Choice("processes", "1", "one device; its threads share the work")


def choose_tokens(wanted: int, device: str, elsewhere: int) -> int:
    """Padded tokens of one forward: as asked; else 2,048 on a CPU (tensors stay in its cache) or ``elsewhere``."""
    return wanted or (2048 if device == "cpu" else elsewhere)


def make_accelerator(device: str, trackers: Sequence[str] = (), folder: str | None = None) -> Accelerator:
    """The one Accelerator of a run.

    Its own mixed precision stays off: the training loop and the encoder open the same autocast themselves, so that a
    model keeps one forward for both. Gradient accumulation is counted by the training loop, not here.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedDataParallelKwargs

    _require_trackers(trackers)
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("1", "true"):
        raise InputError(
            "accelerate's FSDP would shard both models", where="ACCELERATE_USE_FSDP, fsdp_config of accelerate's file",
            expected="a launch without FSDP; the run's own setting says what is sharded",
            fix="launch without --use_fsdp and set run.shard_ranker=true",
        )  # fmt: skip
    if AcceleratorState._shared_state and AcceleratorState().mixed_precision != "no":  # of another trainer, earlier
        AcceleratorState._reset_state()
    return Accelerator(
        mixed_precision="no",
        cpu=device == "cpu",
        log_with=list(trackers) or None,
        project_dir=folder,
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
    )


def _require_trackers(trackers: Sequence[str]) -> None:
    """accelerate leaves out a tracker that is not installed without a word; here that is an error."""
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    known = sorted(str(name) for name in LOGGER_TYPE_TO_CLASS)
    installed = {str(getattr(name, "value", name)) for name in get_available_trackers()}
    for name in trackers:
        if name not in installed:
            raise InputError(
                f"the tracker {name!r} is not there",
                where="run.trackers",
                expected=f"installed ones: {', '.join(sorted(installed)) or 'none'}; known: {', '.join(known)}",
                got=name,
                fix=f"pip install {name}, or leave it out" if name in known else "use one of the known names",
            )


def processes() -> int:
    """Number of processes of this run."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's number, from 0."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def leave() -> None:
    """End this process when all of its run have come here; with one process, nothing.

    Without the interpreter's own end: it destroys what DDP, FSDP and gloo's threads share in an order that none of them
    controls. A thread that waits for the GIL meanwhile never ended (one run in three) or aborted a process whose work
    was done (seen once), for which torchrun lets the others wait five minutes and then fails them. A process that ends
    with an error or by Ctrl-C takes the usual end: its launcher stops the others in any case.
    """
    if processes() == 1:
        return
    dist.barrier()
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # a pipe that nobody reads any more
            stream.flush()
    os._exit(0)


def any_process(flag: bool, device: torch.device) -> bool:
    """Whether the flag is set in any process; every process gets the same answer."""
    return flag if processes() == 1 else sum_over_processes({"flag": float(flag)}, device)["flag"] > 0


def on_main(function: Callable[[], object], device: torch.device) -> None:
    """Call ``function`` in the main process and wait for it everywhere; if it fails, every process raises."""
    failure: BaseException | None = None
    if rank() == 0:
        try:
            function()
        except BaseException as error:
            failure = error
    if any_process(failure is not None, device):
        raise failure if failure is not None else InputError("the main process failed", fix="see its message")


def sum_over_processes(values: Mapping[str, float], device: torch.device) -> dict[str, float]:
    """Each value summed over the processes, which must bring the same names in the same order."""
    if processes() == 1:
        return dict(values)
    kind = torch.float32 if device.type == "mps" else torch.float64
    sums = sum_tensor(torch.tensor(list(values.values()), dtype=kind, device=device))
    return dict(zip(values, sums.tolist(), strict=True))


def sum_tensor(values: Tensor) -> Tensor:
    """The sum over the processes, which must bring the same shape; changed in place."""
    if processes() > 1:
        dist.all_reduce(values)
    return values


class _GatherRows(torch.autograd.Function):
    """All processes' rows, in process order; backward sums every process's gradient for the rows that are ours."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, rows: Tensor) -> Tensor:
        ctx.count = rows.shape[0]  # type: ignore[attr-defined]
        parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *grads: Tensor) -> Tensor:
        total = grads[0].contiguous().clone()
        dist.all_reduce(total)
        count: int = ctx.count  # type: ignore[attr-defined]
        return total[dist.get_rank() * count : (dist.get_rank() + 1) * count]


def gather_rows(rows: Tensor) -> Tensor:
    """Rows of all processes stacked in process order, with gradient to every owner.  (N, ...) -> (processes * N, ...)

    Every process must bring the same shape. One process: the tensor itself.
    """
    if processes() == 1:
        return rows
    gathered: Tensor = _GatherRows.apply(rows)  # type: ignore[no-untyped-call]
    return gathered
