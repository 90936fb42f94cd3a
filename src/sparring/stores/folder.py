"""A publication as files: ``published.json`` names them with their SHA-256 and is renamed into place last.

The file of vectors has a name of its own for every publication, so that readers of the one before are not disturbed
until it is removed. Parquet has the columns ``id`` and ``vector`` (float32 lists of one length).
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sparring.files import Damaged, damaged, explained, read_sealed, sha256, whole, write_sealed
from sparring.log import progress as progress_bar
from sparring.stores.card import Card, nothing_there, read_card
from sparring.types import InputError

logger = logging.getLogger("sparring")

NOTE = "published.json"
_DATA = re.compile(r"passages-[0-9a-f]{8}-[0-9a-f]{8}\.")
GROUP = 65536
"""Passages of a row group."""

_FIX = "publish again with --replace, or remove the folder first"


@dataclass(frozen=True)
class Publication:
    """What lies in a folder: the card, and its files, whole."""

    card: Card
    files: dict[str, Path]


def read(folder: Path, store: str, *, replace: bool = False) -> Publication | None:
    """The publication in a folder, None where there is none.

    Args:
        replace: it is to be replaced: a damaged one counts as none.

    Raises: InputError for files of another kind of publication or of another program, and for damaged ones.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return None
    where = f"{store}:{folder}"
    if not (folder / NOTE).is_file():
        if _ours_alone(folder):
            return None  # of a publication that was stopped
        raise InputError(
            "the place is used already", where=where, expected="a new or empty folder, or a publication",
            got="a file" if folder.is_file() else "a folder with other files", fix="choose another folder",
        )  # fmt: skip
    replaceable = replace and _ours_alone(folder)
    try:
        note = read_sealed(folder / NOTE, "a publication's note", fix=_FIX)
    except Damaged:
        if not replaceable:
            raise
        logger.warning("%s: its note is damaged; the publication is going to be replaced", where)
        return None
    if note.get("store") != store:
        raise InputError("the folder holds another kind of publication", where=where, got=str(note.get("store")))
    if wrong := damaged(folder, {entry["name"]: entry["sha256"] for entry in note["files"].values()}):
        if not replaceable:
            raise Damaged(
                "a file of the publication is damaged", where=f"{where}, {wrong[0]}",
                expected="the file as it was written", fix=_FIX,
            )  # fmt: skip
        logger.warning("%s: %s is damaged; the publication is going to be replaced", where, wrong[0])
        return None
    return Publication(read_card(note["card"], where), {key: folder / e["name"] for key, e in note["files"].items()})


def _ours_alone(folder: Path) -> bool:
    """Whether a folder holds nothing but a publication's files, or half of them."""
    return folder.is_dir() and all(path.name.startswith(NOTE) or _DATA.match(path.name) for path in folder.iterdir())


def open_folder(folder: Path, store: str) -> Publication:
    """As `read`; InputError where there is nothing."""
    found = read(folder, store)
    if found is None:
        raise nothing_there(f"{store}:{folder}")
    return found


def commit(folder: Path, store: str, card: Card, files: dict[str, Path]) -> None:
    """Let the note name these files, which lie in the folder; others of earlier publications are removed."""
    entries = {key: {"name": path.name, "sha256": sha256(path)} for key, path in files.items()}
    write_sealed(folder / NOTE, {"store": store, "card": card.text(), "files": entries})
    for path in folder.iterdir():
        if _DATA.match(path.name) and path not in files.values():
            with suppress(OSError):
                path.unlink()


def data_file(folder: Path, card: Card, ending: str) -> Path:
    """Where the vectors of a publication lie."""
    return folder / f"passages-{card.fingerprint[:8]}-{card.passages[:8]}.{ending}"


def write_parquet(path: Path, vectors: np.ndarray, ids: Sequence[str], card: Card) -> None:
    """Ids and vectors, whole or not at all."""
    import pyarrow
    import pyarrow.parquet

    kind = pyarrow.list_(pyarrow.float32(), vectors.shape[1])
    fields = [pyarrow.field("id", pyarrow.string(), nullable=False), pyarrow.field("vector", kind, nullable=False)]
    schema = pyarrow.schema(fields, metadata={"sparring.card": card.text()})
    with (
        whole(path) as part,
        pyarrow.parquet.ParquetWriter(part, schema, compression="none") as writer,
        progress_bar("parquet: write", total=len(vectors), unit="passages") as bar,
    ):
        for start in range(0, len(vectors), GROUP):
            block = np.ascontiguousarray(vectors[start : start + GROUP], dtype=np.float32)
            flat = pyarrow.array(block.reshape(-1))
            columns = [pyarrow.array(ids[start : start + len(block)], pyarrow.string())]
            columns.append(pyarrow.FixedSizeListArray.from_arrays(flat, type=kind))
            writer.write_table(pyarrow.Table.from_arrays(columns, schema=schema))
            bar.update(len(block))


def read_parquet(path: Path) -> Iterator[tuple[list[str], np.ndarray]]:
    """Blocks of ids and float32 [rows, d]."""
    import pyarrow.parquet

    with explained(path), pyarrow.parquet.ParquetFile(path) as file:
        for batch in file.iter_batches(GROUP):
            vectors: Any = batch.column("vector")
            yield batch.column("id").to_pylist(), vectors.flatten().to_numpy().reshape(len(batch), -1)
