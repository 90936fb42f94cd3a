"""Runs on a disk that is full, each in a forked child of this process, which has everything imported.

``python disk_worker.py JOB.json``. The job: arguments of `train`, a folder, and what to try: ``kinds`` of files whose
first write in a run fails, with an error number each; ``sizes`` of a small tmpfs in shares of what a run needs.
Every trial is one run that must stop, and the same command again with room. A JSON line for each says how both ended.
"""

from __future__ import annotations

import builtins
import fnmatch
import gc
import io
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

import sparring.phases.checkpoint
import sparring.phases.export
import sparring.recipes.experiment
import sparring.recipes.train
from sparring.files import DiskError
from sparring.recipes.train import train

STOPPED, BROKEN = 2, 1


class Short:
    """An open file on a disk that gets full: half of the first write arrives."""

    def __init__(self, file: Any, number: int) -> None:
        self._file, self._number = file, number

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> Short:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, data: Any) -> int:
        self._file.write(data[: len(data) // 2])
        self._file.flush()
        raise OSError(self._number, os.strerror(self._number))


def plant(out: Path, pattern: str, number: int, put: Callable[..., None] = setattr) -> None:
    """The first file below ``out`` whose name fits the pattern cannot be written. ``put`` replaces an attribute."""
    done: list[str] = []

    def hit(path: object) -> bool:
        if done or not isinstance(path, str | Path) or not Path(path).is_relative_to(out):
            return False
        if fnmatch.fnmatch(str(Path(path).relative_to(out)), pattern):
            done.append(str(path))
        return bool(done)

    def opened(real: Callable[..., Any]) -> Callable[..., Any]:
        def open_(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            found = real(file, mode, *args, **kwargs)
            return Short(found, number) if set(mode) & set("wax+") and hit(file) else found

        return open_

    def saved(real: Callable[..., Any]) -> Callable[..., Any]:
        def save(value: Any, path: str) -> None:
            real(value, path)
            if hit(path):
                os.truncate(path, os.path.getsize(path) // 2)
                raise SafetensorError(f"Error while serializing: I/O error: {os.strerror(number)} (os error {number})")

        return save

    for module in (builtins, io):
        put(module, "open", opened(module.open))
    for module, name in ((sparring.phases.checkpoint, "save_file"), (sparring.recipes.experiment, "save_model")):
        put(module, name, saved(getattr(module, name)))


def run(arguments: dict[str, Any], out: Path, told: Path, point: tuple[str, int] | None = None) -> int:
    """One run in a child; its exit code. ``told`` gets the message of an error."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code = BROKEN
    try:
        torch.set_num_threads(1)
        at: Any = sparring.recipes.train
        at.write_report = lambda _: None  # seconds of drawing, written by the same writer as the rest
        export: Any = sparring.phases.export
        export.verify_export = lambda *_, **__: 0.0  # a fresh process each
        if point:
            plant(out, *point)
        train(**arguments, out=out)
        code = 0
    except DiskError as error:
        told.write_text(str(error))
        code = STOPPED
    except BaseException:
        told.write_text(traceback.format_exc())
    finally:
        os._exit(code)


def leftovers(out: Path) -> list[str]:
    """Files that are no results: half-written ones."""
    found = [p for p in out.rglob("*") if p.name.endswith((".part", ".tmp")) or p.name.startswith(".export-")]
    return [str(p.relative_to(out)) for p in found]


def mount(folder: Path, *options: str) -> None:
    """(Re)mount a tmpfs."""
    command = ["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", str(folder)]
    subprocess.run(command, check=True)


def trial(arguments: dict[str, Any], name: str, out: Path, told: Path, point: Any, again: Callable[[], None]) -> None:
    """A run that must stop, then the same command once ``again`` made room."""
    codes = [run(arguments, out, told, point)]
    messages, left = [told.read_text() if codes[0] else ""], leftovers(out)
    again()
    codes.append(run(arguments, out, told))
    messages += [told.read_text()] if codes[-1] else []
    line = {"name": name, "codes": codes, "messages": messages, "left": left}
    print(json.dumps(line), flush=True)


def closed(arguments: dict[str, Any], disk: Path, out: Path, told: Path) -> None:
    """The stopped run's folder has become read-only: the same command says so and changes nothing."""
    mount(disk, "remount", "ro")
    code = run(arguments, out, told)
    print(json.dumps({"name": "read-only", "codes": [code], "messages": [told.read_text()], "left": []}), flush=True)


def main(job_file: str) -> None:
    """The run that never stops, then all trials."""
    job = json.loads(Path(job_file).read_text())
    folder, arguments = Path(job["folder"]), job["arguments"]
    told = folder / "told.txt"
    gc.freeze()  # else every collection in a child copies all of this process's pages
    print(json.dumps({"name": "whole", "codes": [run(arguments, folder / "whole", told)]}), flush=True)
    for name, (pattern, number) in job["kinds"].items():
        trial(arguments, name, folder / name, told, (pattern, number), lambda: None)
    for share in job["sizes"]:
        disk = folder / f"disk-{share}"
        disk.mkdir()
        mount(disk, f"size={int(share * job['needs'])}")
        try:
            out = disk / "run"

            def room(disk: Path = disk, out: Path = out) -> None:
                if job["sizes"].index(share) == 0:  # noqa: B023
                    closed(arguments, disk, out, told)
                mount(disk, "remount", "rw", f"size={4 * job['needs']}")

            trial(arguments, f"disk-{share}", out, told, None, room)
            subprocess.run(["cp", "-r", str(out), str(folder / f"kept-{share}")], check=True)
        finally:
            subprocess.run(["umount", str(disk)], check=True)


if __name__ == "__main__":
    main(sys.argv[1])
