"""Generations and result rows as plain ``.npz`` files: what a comparison needs to go on where it stopped.

Every file is written aside and renamed into place; none holds a pickle.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from sparring.files import DiskError, reading, whole
from sparring.phases.evaluate import Row
from sparring.phases.pools import Pools
from sparring.phases.stats import Estimate
from sparring.recipes.generation import Generation, Lists, Vectors
from sparring.types import InputError

_POOLS = tuple(field.name for field in fields(Pools) if field.name not in ("generation", "depth", "counts"))


def save_generation(path: Path, generation: Generation) -> None:
    """Pools and ranked lists of one state of the retriever."""
    pools = generation.pools
    arrays = {f"pools|{name}": getattr(pools, name) for name in _POOLS}
    for split, (scores, rows) in generation.lists.items():
        arrays |= {f"scores|{split}": scores, f"rows|{split}": rows}
    counts = {name: int(count) for name, count in pools.counts.items()}
    facts: dict[str, Any] = {
        "name": generation.name, "generation": pools.generation, "depth": pools.depth, "counts": counts,
    }  # fmt: skip
    kept = generation.vectors
    if kept is not None:
        arrays["vectors|of_row"] = kept.of_row
        own = {"file": kept.file.name, "digest": kept.digest, "weights": kept.weights, "made_by": list(kept.made_by)}
        facts["vectors"] = own
    _save(path, arrays, {**facts, "splits": list(generation.lists)})


def load_generation(path: Path, vectors: Path) -> Generation:
    """What `save_generation` wrote; InputError when it cannot be read.

    ``vectors``: the folder of kept embeddings, which are checked only when they are read.
    """
    arrays, facts = _load(path)
    with _as_written(path):
        pools = Pools(
            **{name: arrays[f"pools|{name}"] for name in _POOLS},
            generation=facts["generation"], depth=facts["depth"], counts=facts["counts"],
        )  # fmt: skip
        lists = {split: (arrays[f"scores|{split}"], arrays[f"rows|{split}"]) for split in facts["splits"]}
        own, kept = facts.get("vectors"), None
        if own is not None:
            of_row, made_by = arrays["vectors|of_row"], tuple(own["made_by"])
            kept = Vectors(vectors / own["file"], own["digest"], own["weights"], made_by, of_row)
        return Generation(facts["name"], pools, lists, kept)


def save_lists(path: Path, lists: Lists) -> None:
    """Ranked lists."""
    _save(path, {"scores": lists[0], "rows": lists[1]}, {})


def load_lists(path: Path) -> Lists:
    """What `save_lists` wrote; InputError when it cannot be read."""
    arrays, _ = _load(path)
    with _as_written(path):
        return arrays["scores"], arrays["rows"]


def save_rows(path: Path, rows: Sequence[Row], facts: Mapping[str, Any] | None = None) -> None:
    """Result rows with the values of every query, in their order, and JSON facts beside them."""
    arrays = {f"{i}|{m}": values for i, row in enumerate(rows) for m, values in row.values.items()}
    described = [[row.name, {m: list(e) for m, e in row.estimates.items()}] for row in rows]
    _save(path, arrays, {"rows": described, "facts": dict(facts or {})})


def load_rows(path: Path) -> tuple[list[Row], dict[str, Any]]:
    """What `save_rows` wrote: rows and facts; InputError when it cannot be read."""
    arrays, saved = _load(path)
    with _as_written(path):
        rows = [
            Row(name, {m: Estimate(*e) for m, e in estimates.items()}, {m: arrays[f"{i}|{m}"] for m in estimates})
            for i, (name, estimates) in enumerate(saved["rows"])
        ]
        return rows, saved["facts"]


def _save(path: Path, arrays: Mapping[str, np.ndarray], facts: Mapping[str, Any]) -> None:
    told = json.dumps(facts, ensure_ascii=False)
    with whole(path) as part, part.open("wb") as file:
        np.savez(file, facts=np.array(told), seal=np.array(_seal(arrays, told)), **arrays)  # type: ignore[arg-type]
        file.flush()
        os.fsync(file.fileno())


def _seal(arrays: Mapping[str, np.ndarray], facts: str) -> str:
    """SHA-256 of all arrays with their names, types and shapes, and of the facts."""
    digest = hashlib.sha256(facts.encode("utf-8"))
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        digest.update(f"{name} {array.dtype.str} {arrays[name].shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def _load(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    with _as_written(path):
        with path.open("rb") as file, np.load(file, allow_pickle=False) as found:
            arrays = {name: found[name] for name in found.files}
        facts, seal = str(arrays.pop("facts")), str(arrays.pop("seal"))
        if seal != _seal(arrays, facts):
            raise ValueError("the contents do not agree with their checksum")
        return arrays, json.loads(facts)


@contextmanager
def _as_written(path: Path) -> Iterator[None]:
    """Whatever a damaged or a foreign file makes the readers raise, as one InputError that names it; DiskError where
    the disk refuses to read it."""
    try:
        with reading(path):
            yield
    except DiskError:
        raise
    except Exception as error:
        raise InputError(
            "a file of this folder cannot be read", where=str(path), expected="a file as it was written",
            got=f"{type(error).__name__}: {error}", fix="remove it: it is made again",
        ) from None  # fmt: skip
