"""Runs that are killed and go on, each in a forked child of this process, which has everything imported.

``python kill_worker.py JOB.json``. The job: what is done (`train`, `compare`, or `encode` in shards of 8) with which
arguments, the folder for runs, and trials: a name, delays in seconds after which a child is killed, or points in the
code at which it kills itself. Every trial goes on until its run is finished; a JSON line for each says how often it was
killed.
"""

from __future__ import annotations

import gc
import json
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import sparring.log
import sparring.phases.checkpoint
import sparring.phases.encode
import sparring.phases.index
import sparring.recipes.compare
import sparring.recipes.experiment
import sparring.recipes.journal
import sparring.recipes.standalone
import sparring.recipes.store
import sparring.recipes.train
from sparring.data import load
from sparring.phases.export import export as real_export
from sparring.recipes.compare import compare
from sparring.recipes.standalone import encode_to
from sparring.recipes.train import train
from sparring.rundir import FINISHED
from sparring.types import InputError


def die() -> None:
    """As if the power went."""
    os.kill(os.getpid(), signal.SIGKILL)


def half_written(write: Callable[..., Any], path_of: Callable[..., Any]) -> Callable[..., Any]:
    """``write``, after which half of the file is gone and so is the process."""

    def broken(*args: Any, **kwargs: Any) -> None:
        write(*args, **kwargs)
        path = Path(str(path_of(*args)))
        with path.open("r+b") as file:
            file.truncate(path.stat().st_size // 2)
        die()

    return broken


def half_shard(write: Callable[..., Path]) -> Callable[..., Any]:
    """As `half_written`, for a writer that returns where."""
    written: list[Path] = []
    return half_written(lambda *args: written.append(write(*args)), lambda *_: written[0])


def on_call(number: int, replaced: Callable[..., Any], original: Callable[..., Any]) -> Callable[..., Any]:
    """The original, but its ``number``-th call is the replaced one."""
    calls = iter(range(10**9))
    return lambda *a, **k: (replaced if next(calls) == number else original)(*a, **k)


def plant(point: str, number: int) -> None:
    """Make the ``number``-th passing of a point in the code the last thing that this process does."""
    at = sparring.recipes
    if point == "checkpoint":
        module: Any = sparring.phases.checkpoint
        module.save_file = on_call(number, half_written(module.save_file, lambda _, path: path), module.save_file)
    elif point == "kept weights":
        module = at.experiment
        module.save_model = on_call(number, half_written(module.save_model, lambda _, path: path), module.save_model)
    elif point == "stored result":
        real = np.savez
        np.savez = on_call(number, half_written(real, lambda file, **_: file.name), real)  # type: ignore[assignment]
    elif point == "encode shard":
        module = sparring.phases.encode
        real_save = module._save
        module._save = on_call(number, half_shard(real_save), real_save)
    elif point == "assembled":
        module = sparring.phases.encode
        real_note = module.write_sealed
        module.write_sealed = on_call(number, lambda *a, **k: (real_note(*a, **k), die()), real_note)
    elif point == "journal line":
        real_fsync = os.fsync
        calls = iter(range(10**9))

        def cut(descriptor: int) -> None:
            if next(calls) == number:
                name = os.readlink(f"/proc/self/fd/{descriptor}")
                os.truncate(name, os.path.getsize(name) - 7)
                die()
            real_fsync(descriptor)

        os.fsync = cut
    elif point == "index":
        module = at.experiment
        module.build_index = on_call(number, lambda *_, **__: die(), module.build_index)
    elif point == "end":
        journal: Any = at.journal
        real_remove = journal.remove
        journal.remove = on_call(number, lambda path: (real_remove(path), die()), real_remove)
    elif point == "export":
        at.train.export = lambda *a, **k: (real_export(*a, **k), die())  # type: ignore[assignment,attr-defined]
    else:
        raise ValueError(point)


def save_weights(retriever: Any, ranker: Any, folder: Path, **_: Any) -> None:
    """In place of the export, which takes longer than these runs."""
    for name, model in (("retriever", retriever), ("ranker", ranker)):
        (folder / name).mkdir()
        torch.save(model.state_dict(), folder / name / "weights.pt")


def encode_shards(data: str, cache: str, retriever: str, out: str) -> None:
    """`sparring encode`, eight passages a shard."""
    os.environ["SPARRING_CACHE"] = cache
    at: Any = sparring.recipes.standalone
    at.SHARD = 8
    encode_to(load(data, cache=cache), retriever, "passage", Path(out))


DOES: dict[str, Callable[..., Any]] = {"train": train, "compare": compare, "encode": encode_shards}


def fork(job: dict[str, Any], out: str, point: list[Any] | None) -> int:
    """A child that does what the job says; its process id."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        torch.set_num_threads(1)
        if not job.get("exports"):  # the page is made of the folder alone, in seconds
            for module in (sparring.recipes.train, sparring.recipes.compare):
                at: Any = module
                at.write_report = lambda _: None
                at.export = save_weights
        if point:
            plant(*point)
        DOES[job.get("does", "train")](**job["arguments"], out=out)
        code = 0
    except BaseException as error:
        if isinstance(error, InputError) and FINISHED in str(error):  # it was killed after its end
            code = 0
        print(f"{out}:", traceback.format_exc(), file=sys.stderr, flush=True)
    finally:
        os._exit(code)


def ended(child: int, delay: float | None) -> int:
    """Wait for a child, or kill it after ``delay`` seconds; its exit code, -9 when it was killed."""
    until = time.monotonic() + delay if delay is not None else float("inf")
    while True:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() >= until:
            os.kill(child, signal.SIGKILL)
            until = float("inf")
        time.sleep(0.002)


def main(path: str) -> None:
    """All trials, one after the other."""
    job = json.loads(Path(path).read_text())
    whole = 0.0
    sparring.phases.index._faiss()  # imported, and its kernels tried, once for all children
    gc.freeze()  # else every collection in a child copies all of this process's pages
    if job["whole"]:
        start = time.monotonic()
        code = ended(fork(job, f"{job['runs']}/whole", None), None)
        whole = time.monotonic() - start
        print(json.dumps({"name": "whole", "codes": [code]}), flush=True)
    for name in job["points"]:
        point, number = name.rsplit(" ", 1)
        out = f"{job['runs']}/{name.replace(' ', '-')}"
        codes = [ended(fork(job, out, [point, int(number)]), None)]
        codes.append(ended(fork(job, out, None), None))
        print(json.dumps({"name": name.replace(" ", "-"), "codes": codes}), flush=True)
    for seed in job["seeds"]:
        rng, name, codes, latest = random.Random(seed), f"seed-{seed}", [], whole
        while (not codes or codes[-1] == -9) and len(codes) < 3:
            codes.append(ended(fork(job, f"{job['runs']}/{name}", None), rng.uniform(0.05, latest)))
            if codes == [0]:  # it ended before it was to be killed: a new one, killed sooner
                name, codes, latest = f"{name}-again", [], latest / 2
        if codes[-1] == -9:
            codes.append(ended(fork(job, f"{job['runs']}/{name}", None), None))
        print(json.dumps({"name": name, "codes": codes}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
