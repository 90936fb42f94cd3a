"""Encode: stored tokens to embeddings, shard by shard, so that an interrupted run goes on where it stopped."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sparring import __version__, files
from sparring.files import beside, glob_escape, read_sealed, sha256, write_sealed
from sparring.log import progress as progress_bar
from sparring.machine import give_back
from sparring.models import Retriever, TokenStore
from sparring.models.batching import Batches
from sparring.models.memory import Budget
from sparring.models.modes import evaluating
from sparring.models.retriever import Kind
from sparring.phases.overlap import ahead, behind
from sparring.phases.parts import save_part, whole_parts
from sparring.phases.vectors import write_npy
from sparring.types import InputError

logger = logging.getLogger("sparring")

CODE = f"sparring {__version__}, torch {torch.__version__}, transformers {version('transformers')}"
"""The code that makes embeddings of tokens: shards of another version are not used."""
SHARD = 8192
"""Rows of a shard."""


@dataclass(frozen=True)
class Missing:
    """Shards that have to be made.

    Attributes:
        parts: the folder that they go into.
        starts: their first rows, of a store of ``rows``.
        size: rows of a shard.
        tokens: padded tokens of one forward.
        dtype: autocast precision of the forward.
    """

    parts: Path
    starts: Sequence[int]
    rows: int
    size: int
    kind: Kind
    tokens: int
    dtype: torch.dtype | None


Elsewhere = Callable[[Missing], Iterable[tuple[int, Path]]]
"""Makes shards in other processes; gives each one's first row and file as it is finished."""


def encode(
    retriever: Retriever,
    store: TokenStore,
    kind: Kind,
    *,
    out: Path | None = None,
    token_budget: int = 16384,
    shard: int = SHARD,
    dtype: torch.dtype | None = None,
    progress: str = "",
    elsewhere: Elsewhere | None = None,
) -> np.ndarray:
    """Embeddings of all texts of a store, in evaluation mode and without gradients.

    With ``out``, each finished shard is renamed into a folder beside it whose name is a fingerprint of everything the
    embeddings depend on; a later call takes up those shards, and shards of other weights or texts are never used. The
    folder goes away when ``out`` is complete; ``out`` with ``.json`` added says what the file holds.

    Args:
        retriever: its training mode is as before afterwards, also after an error.
        store: N texts of this kind, tokenised by this retriever.
        kind: "query" or "passage".
        out: a ``.npy`` file, float32 [N, d]; ``None`` keeps the embeddings in memory.
        token_budget: tokens of one forward, padding included; halved where memory does not suffice.
        shard: rows of one shard; rows are sorted by length within a shard.
        dtype: autocast precision of the forward; ``None`` is none. Embeddings are float32 either way.
        progress: label of the progress bar.
        elsewhere: makes the shards, where there is more than one to make and ``out`` is given; ``None``: this process.

    Returns:
        float32 [N, d]; memory-mapped when ``out`` is given.

    Raises:
        InputError: ``out`` already holds other embeddings, or an embedding is not finite.
    """
    starts = range(0, len(store), shard)
    budget = Budget(token_budget, f"encoding {kind}s")
    with progress_bar(progress or f"encoding {kind}s", total=len(store)) as bar, evaluating(retriever, dtype):
        if out is None:
            vectors = np.empty((len(store), retriever.dim), np.float32)
            for start, found in _shards(retriever, store, kind, starts, shard, budget, bar):
                vectors[start : start + shard] = found
            return vectors
        manifest = _manifest(retriever, store, kind, dtype, shard)
        _read_note(_note(out))  # another program's file of this name is not overwritten
        if _is_complete(out, manifest):
            logger.info("%s: embeddings of an earlier run are reused", out)
        else:
            parts = out.with_name(f".{out.name}.{manifest['fingerprint'][:16]}.parts")
            parts.mkdir(parents=True, exist_ok=True)
            paths = whole_parts(parts, starts, ".npy")
            bar.update(sum(min(shard, len(store) - start) for start in paths))
            todo = [start for start in starts if start not in paths]
            if elsewhere is not None and len(todo) > 1:
                missing = Missing(parts, todo, len(store), shard, kind, token_budget, dtype)
                for start, path in elsewhere(missing):
                    paths[start] = path
                    bar.update(min(shard, len(store) - start))
            else:

                def save(start: int, found: np.ndarray) -> None:
                    paths[start] = _save(parts, start, found)

                with behind() as later:
                    for start, found in _shards(retriever, store, kind, todo, shard, budget, bar):
                        later(partial(save, start, found))
            assemble(out, manifest, [paths[start] for start in starts])
        fingerprint = "[0-9a-f]" * 16  # of other weights or texts, or a process was killed when all was joined
        for stale in out.parent.glob(f".{glob_escape(out.name)}.{fingerprint}.parts"):
            shutil.rmtree(stale, ignore_errors=True)
    return np.load(out, mmap_mode="r" if len(store) else None, allow_pickle=False)  # type: ignore[no-any-return]


def _shards(
    retriever: Retriever,
    store: TokenStore,
    kind: Kind,
    starts: Sequence[int],
    size: int,
    budget: Budget,
    bar: Any,
) -> Iterator[tuple[int, np.ndarray]]:
    """First row and embeddings of each shard, float32 [rows, d]; the next one's inputs are made meanwhile."""
    with ahead(partial(_inputs, retriever, store, kind, size), starts, budget) as ready:
        for start, inputs in zip(starts, ready, strict=True):
            yield start, _embedded(retriever, kind, start, budget, inputs, bar)
            give_back(store.ids)


def _inputs(retriever: Retriever, store: TokenStore, kind: Kind, size: int, start: int, tokens: int) -> Batches:
    rows = np.arange(start, min(start + size, len(store)))
    return retriever.batches(store, rows, kind, token_budget=tokens)


def embed_shard(
    retriever: Retriever, store: TokenStore, kind: Kind, start: int, size: int, budget: Budget
) -> np.ndarray:
    """Embeddings of the rows ``start .. start + size``, float32 [rows, d], in row order."""
    inputs = partial(_inputs, retriever, store, kind, size, start)
    found = _embedded(retriever, kind, start, budget, inputs)
    give_back(store.ids)
    return found


def _embedded(
    retriever: Retriever, kind: Kind, start: int, budget: Budget, inputs: Callable[[int], Batches], bar: Any = None
) -> np.ndarray:
    """Embeddings of a shard whose first row is ``start``, by inputs for a budget of tokens."""
    before = bar.n if bar is not None else 0

    def embedded(tokens: int) -> np.ndarray:
        if bar is not None:
            bar.update(before - bar.n)  # back, where an attempt failed
        batches = inputs(tokens)
        vectors = []
        for found in retriever.embeddings(batches, kind):
            vectors.append(found)
            if bar is not None:
                bar.update(len(found))
        joined: np.ndarray = torch.cat(vectors).cpu().numpy()
        return joined[batches.restore.numpy()]

    found = budget.run(embedded)
    bad = np.flatnonzero(~np.isfinite(found).all(axis=1))
    if len(bad):
        raise InputError(
            "an embedding contains NaN or infinity", where=f"{kind} row {start + int(bad[0])}",
            got=f"{len(bad)} of {len(found)} rows", fix="try fp32; if all rows are so, the model's weights are broken",
        )  # fmt: skip
    return found


def _manifest(
    retriever: Retriever, store: TokenStore, kind: Kind, dtype: torch.dtype | None, shard: int
) -> dict[str, Any]:
    manifest = {
        "weights": retriever.fingerprint(), "tokens": store.fingerprint, "kind": kind, "dtype": str(dtype or "float32"),
        "rows": len(store), "dim": retriever.dim, "shard": shard, "version": CODE,
    }  # fmt: skip
    digest = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    return {**manifest, "fingerprint": digest}


def _is_complete(out: Path, manifest: dict[str, Any]) -> bool:
    """Whether ``out`` holds exactly these embeddings; other contents are never overwritten."""
    if not out.exists():
        return False
    found = _read_note(_note(out))
    ignored = {"fingerprint", "shard", "sha256"}
    if {k: v for k, v in found.items() if k not in ignored} != {k: v for k, v in manifest.items() if k not in ignored}:
        differs = ", ".join(k for k in manifest if k not in ignored and found.get(k) != manifest[k])
        raise InputError(
            "The output already exists.", where=str(out), expected="no file, or embeddings of the same model and texts",
            got=f"another {differs}" if found else "a file of unknown origin", fix="choose another output",
        )  # fmt: skip
    if found["sha256"] != sha256(out):
        raise InputError(
            "The embeddings are damaged.", where=str(out), expected="the file as it was written",
            got="contents that do not agree with the checksum in its note", fix="remove it: it is encoded again",
        )  # fmt: skip
    return True


def _note(out: Path) -> Path:
    return out.with_name(f"{out.name}.json")


def _read_note(note: Path) -> dict[str, Any]:
    """What the file beside the note holds; empty where there is no note."""
    fix = "choose another output, or remove this one yourself"
    return read_sealed(note, "The note about embeddings", fix=fix) if note.exists() else {}


def _save(parts: Path, start: int, vectors: np.ndarray) -> Path:
    return save_part(parts, start, ".npy", lambda file: np.save(file, vectors))


def assemble(out: Path, manifest: dict[str, Any], shards: list[Path]) -> None:
    """Join the shards into one file, which appears complete or not at all (its note goes first)."""
    with files.scratch(beside(out, "tmp"), out) as partial:
        write_npy(partial, (manifest["rows"], manifest["dim"]), (np.load(path, allow_pickle=False) for path in shards))
        write_sealed(_note(out), {**manifest, "sha256": sha256(partial)})
        os.replace(partial, out)
