"""One process of a run: ``python curve_worker.py JOB.json``, with RANK and WORLD_SIZE where there are several.

Weights are written as they are in place of the export; the page is left out.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from kill_worker import save_weights

import sparring.recipes.train
from sparring.distributed import leave
from sparring.recipes.train import train


def main(job_file: str) -> None:
    """All of the job's runs, one after the other."""
    torch.set_num_threads(1)
    at: Any = sparring.recipes.train
    at.export, at.write_report = save_weights, lambda _: None
    for job in json.loads(Path(job_file).read_text()):
        train(**job)
    leave()


if __name__ == "__main__":
    main(sys.argv[1])
