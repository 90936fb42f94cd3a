"""What training must remember between two updates, in one file: weights, optimisers, schedules, and where it is.

Dropout's random state is not among it: every update is seeded by its own number (`sparring.phases.fit`).
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sparring import files
from sparring.phases.fit import Name, Trainee
from sparring.types import InputError

_BEGIN_AGAIN = "this run cannot go on: begin again with another --out"


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
        return files.read_sealed(self.note, "the checkpoint's note", fix=_BEGIN_AGAIN)

    def due(self) -> bool:
        """Whether it is time for another one."""
        return time.monotonic() - self._last >= self.seconds

    def save(self, team: Mapping[Name, Trainee], facts: Mapping[str, Any]) -> None:
        """Both models' weights, optimisers and schedules, with JSON facts."""
        self._last = time.monotonic()
        if not self.writes:
            return
        tensors: dict[str, Tensor] = {}
        states: dict[str, Any] = {}
        for name, trainee in team.items():
            tensors |= {f"{name}|weights|{key}": value for key, value in _weights(trainee).items()}
            state = trainee.optimizer.state_dict()
            for index, slots in state["state"].items():
                tensors |= {f"{name}|optimizer|{index}|{slot}": torch.as_tensor(v) for slot, v in slots.items()}
            scheduler = {k: v for k, v in trainee.scheduler.state_dict().items() if k != "lr_lambdas"}
            groups = [{"lr": float(group["lr"])} for group in state["param_groups"]]
            states[name] = {"scheduler": scheduler, "groups": groups, "updates": trainee.updates}
        path = self.folder / f"checkpoint-{time.time_ns()}.safetensors"
        with files.whole(path) as part:
            save_file({key: value.contiguous() for key, value in tensors.items()}, str(part))
            sha256 = files.sha256(part)
        files.write_sealed(self.note, {"file": path.name, "sha256": sha256, "states": states, "facts": dict(facts)})
        for leftover in self.folder.glob("checkpoint-*"):
            if leftover != path:
                leftover.unlink()

    def load(self, team: Mapping[Name, Trainee]) -> dict[str, Any]:
        """Put the newest checkpoint back into models, optimisers and schedules of the same shape; its facts.

        Raises: InputError when the file is missing or damaged, or is of other models.
        """
        content = self._content() if self.note.is_file() else None
        path = self.folder / content["file"] if content else self.note
        if content is None or not path.is_file() or files.sha256(path) != content["sha256"]:
            raise InputError(
                "the checkpoint is missing or damaged", where=str(path), expected="the file as it was written",
                fix=_BEGIN_AGAIN,
            )  # fmt: skip
        tensors = load_file(str(path))
        for name, trainee in team.items():
            _put_weights(trainee, _below(tensors, f"{name}|weights|"), name)
            slots: dict[int, dict[str, Tensor]] = {}
            for key, value in _below(tensors, f"{name}|optimizer|").items():
                index, slot = key.split("|")
                slots.setdefault(int(index), {})[slot] = value
            _put_state(trainee, slots, content["states"][name])
        return dict(content["facts"])


def _weights(trainee: Trainee) -> dict[str, Tensor]:
    """Parameters and buffers that a model saves, each once."""
    named = dict(trainee.model.named_parameters())
    seen = {value.data_ptr() for value in named.values()}
    saved = {key: value for key, value in trainee.model.state_dict().items() if value.data_ptr() not in seen}
    return {**{key: value.detach() for key, value in named.items()}, **saved}


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def _put_weights(trainee: Trainee, tensors: Mapping[str, Tensor], name: str) -> None:
    own = _weights(trainee)
    if {k: v.shape for k, v in own.items()} != {k: v.shape for k, v in tensors.items()}:
        raise InputError("the checkpoint is another model's", where=name, fix="begin again with another --out")
    with torch.no_grad():
        for key, value in tensors.items():
            own[key].copy_(value)


def _put_state(trainee: Trainee, slots: Mapping[int, Mapping[str, Tensor]], state: Mapping[str, Any]) -> None:
    own = trainee.optimizer.state_dict()
    groups = [{**group, **saved} for group, saved in zip(own["param_groups"], state["groups"], strict=True)]
    trainee.optimizer.load_state_dict({"state": slots, "param_groups": groups})
    trainee.scheduler.load_state_dict({**trainee.scheduler.state_dict(), **state["scheduler"]})
    trainee.updates = state["updates"]
