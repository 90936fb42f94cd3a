"""What training must remember between two updates, in one file: weights, optimisers, schedules, where it is, and what
the phase keeps beside them.

Dropout's random state is not among it: every update is seeded by its own number (`sparring.phases.fit`).
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sparring import files
from sparring.models.sharding import distinct, is_sharded, like, put, whole
from sparring.phases.fit import Name, Trainee
from sparring.types import BEGIN_AGAIN, CannotGoOn, InputError

_ARRAYS = "arrays"
"""Where the other tensors have a model's name."""


class Checkpoint:
    """The newest checkpoint of a run: a file of tensors, and a note that names it with its SHA-256.

    The note is replaced only once the new file is whole, and the old file goes only after that.

    Args:
        folder: where both lie.
        seconds: the least time between two checkpoints inside a training phase; 0 is after every update.
        writes: whether this process writes (one of several does).
    """

    def __init__(self, folder: Path, seconds: float, *, writes: bool = True) -> None:
        self.folder, self.seconds, self.writes = folder, seconds, writes
        self.note = folder / "checkpoint.json"
        self._last = time.monotonic()

    def facts(self) -> dict[str, Any]:
        """What the newest checkpoint was saved with; empty where there is none."""
        return dict(self._content()["facts"]) if self.note.is_file() else {}

    def _content(self) -> dict[str, Any]:
        return files.read_sealed(self.note, "the checkpoint's note", fix=BEGIN_AGAIN, error=CannotGoOn)

    def due(self) -> bool:
        """Whether it is time for another one."""
        return time.monotonic() - self._last >= self.seconds

    def save(
        self, team: Mapping[Name, Trainee], facts: Mapping[str, Any], arrays: Mapping[str, np.ndarray] | None = None
    ) -> None:
        """Both models' weights, optimisers and schedules, with JSON facts and arrays. Every process must call it where
        a model is sharded; the file is that of a run that shards nothing."""
        self._last = time.monotonic()
        tensors = {f"{_ARRAYS}|{key}": torch.from_numpy(value) for key, value in (arrays or {}).items()}
        states: dict[str, Any] = {}
        for name, trainee in team.items():
            if not self.writes and not is_sharded(trainee.model):
                continue
            spread = {f"{name}|weights|{key}": value for key, value in distinct(trainee.model).items()}
            state = trainee.optimizer.state_dict()
            for index, slots in state["state"].items():
                spread |= {f"{name}|optimizer|{index}|{slot}": torch.as_tensor(v) for slot, v in slots.items()}
            for key, value in spread.items():
                gathered = whole(value)  # all processes together
                if self.writes:
                    tensors[key] = gathered.cpu() if gathered is not value else value
            scheduler = {k: v for k, v in trainee.scheduler.state_dict().items() if k != "lr_lambdas"}
            groups = [{"lr": float(group["lr"])} for group in state["param_groups"]]
            states[name] = {"scheduler": scheduler, "groups": groups, "updates": trainee.updates}
        if not self.writes:
            return
        path = self.folder / f"checkpoint-{time.time_ns()}.safetensors"
        with files.whole(path) as part:
            save_file({key: value.contiguous() for key, value in tensors.items()}, str(part))
            sha256 = files.sha256(part)
        files.write_sealed(self.note, {"file": path.name, "sha256": sha256, "states": states, "facts": dict(facts)})
        for leftover in self.folder.glob("checkpoint-*"):
            if leftover != path:
                leftover.unlink()

    def load(self, team: Mapping[Name, Trainee]) -> dict[str, np.ndarray]:
        """Put the newest checkpoint back into models, optimisers and schedules of the same shape; its arrays.

        Raises: CannotGoOn when the file is missing or damaged; InputError when it is of other models.
        """
        content = self._content() if self.note.is_file() else None
        path = self.folder / content["file"] if content else self.note
        if content is None or not path.is_file() or files.sha256(path) != content["sha256"]:
            raise CannotGoOn("the checkpoint is missing or damaged", where=str(path))
        tensors = load_file(str(path))
        for name, trainee in team.items():
            _put_weights(trainee, _below(tensors, f"{name}|weights|"), name)
            slots: dict[int, dict[str, Tensor]] = {}
            for key, value in _below(tensors, f"{name}|optimizer|").items():
                index, slot = key.split("|")
                slots.setdefault(int(index), {})[slot] = value
            _put_state(trainee, slots, content["states"][name])
        return {key: value.numpy() for key, value in _below(tensors, f"{_ARRAYS}|").items()}


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def _put_weights(trainee: Trainee, tensors: Mapping[str, Tensor], name: str) -> None:
    own = distinct(trainee.model)
    if {k: v.shape for k, v in own.items()} != {k: v.shape for k, v in tensors.items()}:
        raise InputError("the checkpoint is another model's", where=name, fix="begin again with another --out")
    for key, value in tensors.items():
        put(own[key], value)


def _put_state(trainee: Trainee, slots: Mapping[int, Mapping[str, Tensor]], state: Mapping[str, Any]) -> None:
    own = trainee.optimizer.state_dict()
    parameters = [p for group in trainee.optimizer.param_groups for p in group["params"]]
    slots = {
        index: {slot: like(value, parameters[index]) if value.ndim else value for slot, value in of_one.items()}
        for index, of_one in slots.items()
    }
    groups = [{**group, **saved} for group, saved in zip(own["param_groups"], state["groups"], strict=True)]
    trainee.optimizer.load_state_dict({"state": slots, "param_groups": groups})
    trainee.scheduler.load_state_dict({**trainee.scheduler.state_dict(), **state["scheduler"]})
    trainee.updates = state["updates"]
