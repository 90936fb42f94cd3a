"""Runs that are killed and go on, each in a forked child of this process, which has everything imported.

``python kill_worker.py JOB.json``. The job: what is done (`train`, `compare`, or `encode` in shards of 8) with which
arguments, the folder for runs, whether one run is left in peace (``whole``), and trials: points in the code at which a
child kills itself, and seeds. A seed draws when its child is killed, up to three times: an even one counts from the
moment at which it has left something new to go on from, an odd one from its beginning. A run that ended before it was
to be killed does not count: another one (``NAME-again``) is killed sooner. Every trial goes on until its run is
finished. A JSON line for each has the exit codes; a point's also where journals lay after the kill (``at``), a seed's
how many ``kills`` there were and how many found something to go on from (``left``).
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
from functools import partial
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
from sparring.rundir import FINISHED, JOURNAL
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


def progress(job: dict[str, Any], out: str) -> int:
    """How much a run has left to go on from: shards, or operations in journals, with finished arms and warm starts."""
    path = Path(out)
    try:
        if job.get("does") == "encode":
            return len(list(path.parent.glob(f".{path.name}.*.parts/*.npy")))
        whole = [file for name in ("arm.npz", "baselines.npz") for file in path.rglob(name)]
        lines = [file.read_bytes().count(b"\n") - 1 for file in path.rglob(JOURNAL)]  # the first one only begins it
        return sum(lines) + len(whole)
    except FileNotFoundError:  # gone in between
        return progress(job, out)


def advanced(job: dict[str, Any], out: str, before: int) -> bool:
    """Whether there is more to go on from than before."""
    return progress(job, out) > before


def ended(child: int, delay: float | None, begun: Callable[[], bool] = lambda: True) -> tuple[int, float]:
    """Wait for a child, or kill it ``delay`` seconds after it has begun.  -> exit code, -9 when it was killed; seconds
    from its beginning to its end"""
    start = None
    while True:
        pid, status = os.waitpid(child, os.WNOHANG)
        now = time.monotonic()
        if pid:
            return os.waitstatus_to_exitcode(status), now - (now if start is None else start)
        if start is None and begun():
            start = now
        if delay is not None and start is not None and now >= start + delay:
            os.kill(child, signal.SIGKILL)
            delay = None
        time.sleep(0.002)


def main(path: str) -> None:
    """All trials, one after the other."""
    job = json.loads(Path(path).read_text())
    spans = {True: 0.0, False: 0.0}  # seconds of a whole run: from its first leavings, from its beginning
    sparring.phases.index._faiss()  # imported, and its kernels tried, once for all children
    gc.freeze()  # else every collection in a child copies all of this process's pages
    if job["whole"]:
        start, out = time.monotonic(), f"{job['runs']}/whole"
        code, spans[True] = ended(fork(job, out, None), None, lambda: progress(job, out) > 0)
        spans[False] = time.monotonic() - start
        print(json.dumps({"name": "whole", "codes": [code]}), flush=True)
    for name in job["points"]:
        point, number = name.rsplit(" ", 1)
        out = f"{job['runs']}/{name.replace(' ', '-')}"
        codes = [ended(fork(job, out, [point, int(number)]), None)[0]]
        at = [str(file.parent.relative_to(out)) for file in Path(out).rglob(JOURNAL)]
        codes.append(ended(fork(job, out, None), None)[0])
        print(json.dumps({"name": name.replace(" ", "-"), "codes": codes, "at": at}), flush=True)
    for seed in job["seeds"]:
        rng, name, codes, latest, left = random.Random(seed), f"seed-{seed}", [], spans[seed % 2 == 0], 0
        while (not codes or codes[-1] == -9) and len(codes) < 3:
            out = f"{job['runs']}/{name}"
            begun = partial(advanced, job, out, progress(job, out)) if seed % 2 == 0 else lambda: True
            codes.append(ended(fork(job, out, None), rng.uniform(0, latest), begun)[0])
            left += codes[-1] == -9 and progress(job, out) > 0
            if codes == [0]:
                name, codes, latest = f"{name}-again", [], latest / 2
        if codes[-1] == -9:
            codes.append(ended(fork(job, f"{job['runs']}/{name}", None), None)[0])
        print(json.dumps({"name": name, "codes": codes, "kills": len(codes) - 1, "left": left}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
