"""One process of a run: ``python curve_worker.py JOB.json``, with RANK and WORLD_SIZE where there are several.

Weights are written as they are in place of the export; the page is left out.
"""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from kill_worker import save_weights

import sparring.phases.fit
import sparring.recipes.train
from sparring.distributed import leave
from sparring.recipes.train import train

UPDATE = sparring.phases.fit._update


def stop_after(updates: int) -> None:
    """Ask this process to stop, as Ctrl-C does, when it has done so many updates; 0 never does."""
    done = 0

    def counted(*arguments: Any) -> dict[str, float]:
        nonlocal done
        logged = UPDATE(*arguments)
        done += 1
        if done == updates:
            signal.raise_signal(signal.SIGINT)
        return logged

    loop: Any = sparring.phases.fit
    loop._update = counted


def main(job_file: str) -> None:
    """All of the job's runs, one after the other; one that is to stop after some updates does."""
    torch.set_num_threads(1)
    at: Any = sparring.recipes.train
    at.export, at.write_report = save_weights, lambda _: None
    for job in json.loads(Path(job_file).read_text()):
        stop = job.pop("stop", 0)
        stop_after(stop)
        try:
            train(**job)
        except KeyboardInterrupt:
            assert stop
        else:
            assert not stop
    leave()


if __name__ == "__main__":
    main(sys.argv[1])
