"""Workers for test_ray that load no model."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping
from typing import Any


class Sleeping:
    """Never ends, as far as a test is concerned."""

    def __call__(self, item: Mapping[str, Any]) -> dict[str, Any]:
        time.sleep(600)
        return dict(item)


class Mortal:
    """Dies at every attempt."""

    def __call__(self, item: Mapping[str, Any]) -> dict[str, Any]:
        os.kill(os.getpid(), signal.SIGKILL)
        return dict(item)


class Wrong:
    """Has a fault of its own."""

    def __call__(self, item: Mapping[str, Any]) -> dict[str, Any]:
        raise ZeroDivisionError(f"item {item['n']}")


class Counting:
    """Says how many threads faiss takes on this worker."""

    def __call__(self, item: Mapping[str, Any]) -> dict[str, Any]:
        import faiss

        time.sleep(0.5)  # so that every worker has its turn
        return {"n": item["n"], "threads": faiss.omp_get_max_threads()}
