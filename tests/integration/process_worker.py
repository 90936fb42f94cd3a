"""One of several processes: computes every case's gradient of its share of the batch and saves what it ends with.

Run as ``RANK=0 WORLD_SIZE=2 MASTER_ADDR=... MASTER_PORT=... python process_worker.py RETRIEVER RANKER OUT``.
"""

from __future__ import annotations

import atexit
import json
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from fit_fixtures import STEPS, Pair, draw, gradient_of, load_pair
from sparring.distributed import leave, make_accelerator, processes, rank
from sparring.losses import Terms, list_softmax
from sparring.models.sharding import is_sharded, shard
from sparring.phases.fit import ListBatch, Reached, Scorer, Step, Trainee, fit
from sparring.types import InputError

CASES: dict[str, dict[str, Any]] = {
    **{name: {"step": name} for name in STEPS},
    **{f"{name} cached": {"step": name, "gradient_cache": True} for name in STEPS},
    "ar2 mean accumulated": {"step": "ar2 mean", "accumulate": 2},
    "rocketqav2 paper accumulated": {"step": "rocketqav2 paper", "accumulate": 2},
    "in-batch two towers": {"step": "in-batch", "two_towers": True},
    "in-batch two towers cached": {"step": "in-batch", "two_towers": True, "gradient_cache": True},
    **{f"{name} sharded": {"step": name, "sharded": True} for name in STEPS if name != "in-batch"},
    "rocketqav2 paper sharded cached": {"step": "rocketqav2 paper", "sharded": True, "gradient_cache": True},
    "rocketqav2 paper sharded accumulated": {"step": "rocketqav2 paper", "sharded": True, "accumulate": 2},
}
"""Name -> the step of `fit_fixtures.STEPS` and how it is run. Small token budgets give several chunks."""


WAYS = ("replicated", "sharded")
"""How the ranker that teaches is spread."""


def pair_of(retriever: str, ranker: str, case: dict[str, Any]) -> tuple[Pair, Step, dict[str, Any]]:
    """The pair, the step and the options of a case."""
    options = dict(case)
    step, towers = STEPS[options.pop("step")](), options.pop("two_towers", False)
    pair = load_pair(Path(retriever), Path(ranker), dropout=False, token_budget=64, two_towers=towers)
    if options.pop("sharded", False):
        shard(pair.ranker, torch.device("cpu"))
    return pair, step, options


def wrapping(trainee: Trainee) -> str:
    """How a model is spread over the processes."""
    replicated = isinstance(trainee.wrapped, nn.parallel.DistributedDataParallel)
    return "replicated" if replicated else "sharded" if is_sharded(trainee.wrapped) else "alone"


def broken_on_the_last(batch: ListBatch, score: Scorer) -> tuple[Terms, dict[str, Tensor]]:
    """A loss that is not a number in one process only."""
    loss = list_softmax(score.ranker(batch), queries=batch.total)
    return Terms(loss * (float("nan") if rank() == processes() - 1 else 1.0), {}), {}


class Last:
    """A `Progress` that knows what it was told last."""

    reached = Reached()

    def begun(self) -> Reached:
        return Reached()

    def ended(self, reached: Reached, *, keep: bool = False) -> None:  # noqa: ARG002
        self.reached = reached


def taught(pair: Pair, step: Step, _: dict[str, Any]) -> dict[str, Any]:
    """Three updates with a teacher: the means, and what it said; before them one pair alone, fewer than processes."""
    team = pair.team(make_accelerator("cpu"), lr=1e-4)
    scorer = pair.scorer(team, step)
    scorer.rest(step.teachers, {})
    scorer.look_ahead(lambda _: (np.array([1]), np.array([[4]])), 0, 1)
    alone = scorer.teachers["ranker"].scores.tolist()
    progress = Last()
    means = fit(team, scorer, step, draw, steps=3, batch=8, progressed=progress)
    known = progress.reached.teachers["ranker"]
    return {"alone": alone, "means": means, "keys": known.keys.tolist(), "scores": known.scores.tolist()}


def main(retriever: str, ranker: str, out: Path) -> None:
    """All cases, three real updates with the second team of a run, some with a teacher, an error in one process."""
    torch.set_num_threads(2)  # chunks side by side in each process
    accelerator = make_accelerator("cpu")
    logs: dict[str, Any] = {"processes": processes()}
    for name, case in CASES.items():
        pair, step, options = pair_of(retriever, ranker, case)
        team = pair.team(accelerator)
        logs[f"{name} wrapped"] = [wrapping(trainee) for trainee in team.values()]
        grads, logs[name] = gradient_of(pair, team, step, **options)
        save_file(grads, out / f"{name} {rank()}.safetensors")
    pair, step, _ = pair_of(retriever, ranker, {"step": "rocketqav2 paper"})
    pair.team(accelerator)
    accelerator.free_memory()
    team = pair.team(accelerator, lr=1e-4)
    scorer = pair.scorer(team, step)
    logs["fit"] = fit(team, scorer, step, draw, steps=3, batch=8)
    logs["forwards"] = scorer.forwards.to_dict()
    weights = {f"{name} {k}": v for name, t in team.items() for k, v in t.model.state_dict().items()}
    save_file({k: v.clone() for k, v in weights.items()}, out / f"weights {rank()}.safetensors")
    for way in WAYS:
        logs[f"taught, {way}"] = taught(*pair_of(retriever, ranker, {"step": "ar2 mean", "sharded": way == "sharded"}))
    broken = Step("broken", ("ranker",), broken_on_the_last)
    try:
        fit(team, pair.scorer(team, broken), broken, draw, steps=1, batch=4)
    except InputError as error:
        logs["error"] = str(error)
    (out / f"logs {rank()}.json").write_text(json.dumps(logs), encoding="utf-8")
    atexit.register(os.abort)  # what the interpreter's end may come to
    print("done")  # not flushed
    leave()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
