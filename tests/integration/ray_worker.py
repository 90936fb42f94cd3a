"""Workers for test_ray: they write down what they begin, and die on the way."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sparring.phases.sharded import ShardEncoder, SpanSearcher


def begin(parts: str, start: int) -> None:
    """One line for each item that is begun."""
    with Path(parts).parent.joinpath("begun.txt").open("a") as file:
        file.write(f"{start}\n")


def die_once(parts: str) -> None:
    """SIGKILL, the first time."""
    mark = Path(parts).parent / "died"
    if not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)


class Dying(ShardEncoder):
    """Dies at the shard at row 96, the first time that anyone comes there."""

    def __call__(self, item: Mapping[str, Any]) -> dict[str, Any]:
        begin(self.job.parts, item["start"])
        if item["start"] == 96:
            die_once(self.job.parts)
        return super().__call__(item)


class DyingSearcher(SpanSearcher):
    """Dies at the span from row 96, the first time that anyone comes there: the running top k of its process, in which
    spans are left out that others have beaten, dies with it."""

    def __call__(self, item: Mapping[str, Any]) -> dict[str, Any]:
        begin(self.job.parts, item["start"])
        if item["start"] == 96:
            die_once(self.job.parts)
        return super().__call__(item)
