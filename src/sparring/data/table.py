"""A table of texts that stays on disk: memory-mapped Arrow columns, with id lookup through sorted hashes.

A table is a folder: ``text.arrow`` (columns id, title, text), ``hashes.npy`` (sorted 64-bit hashes of the ids),
``order.npy`` (the row of each hash), ``groups.npy`` (rows with equal text share a group) and ``table.json`` (format,
number of rows, fingerprint, and the SHA-256 of each file, which is checked when a table is opened).
Nothing of the corpus is held as Python strings: a row costs its bytes on disk and 24 bytes of mapped arrays.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import shutil
import unicodedata
from array import array
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from sparring.files import Damaged, DiskError, damaged, digests, read_sealed, reading, write_sealed
from sparring.machine import give_back
from sparring.types import InputError

SEPARATOR = " "
"""Stands between title and text in what the models read."""
FORMAT = 2
_FILES = ("text.arrow", "hashes.npy", "order.npy", "groups.npy")
_AGAIN = "delete this folder: it is rebuilt from the dataset on the next load"
_CHUNK = 4096  # rows per record batch: row r lies in batch r // _CHUNK
_ROW = 1 << 16  # bytes that the system maps around one that is read
_KEPT = 1 << 28  # bytes of the file that stay mapped, about
_SCHEMA = pa.schema([("id", pa.string()), ("title", pa.large_string()), ("text", pa.large_string())])

Rows = Sequence[int] | np.ndarray


def normalise(text: str) -> str:
    """The form under which two texts count as the same: NFKC, case folded, white space collapsed. Idempotent."""
    folded = text.casefold()
    if not text.isascii():
        folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", folded).casefold())
    return " ".join(folded.split())


def join(title: str, body: str) -> str:
    """What the models read: title, separator, text; either alone when the other is empty."""
    return f"{title}{SEPARATOR}{body}" if title and body else title or body


def _hash(id: str) -> int:
    return int.from_bytes(hashlib.blake2b(id.encode(), digest_size=8).digest(), "little")


class TextTable:
    """A memory-mapped table of (id, title, text), N rows. Open one with :meth:`open`, write one with :meth:`from_rows`.

    Ids are strings and may repeat (a broken corpus can be looked at); :meth:`row` finds the first row of an id.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        facts = _read_facts(self.path)
        if wrong := damaged(self.path, facts["files"]):
            raise _damaged(self.path, f"{', '.join(wrong)}: missing, cut or changed")
        self._length = int(facts["rows"])
        self.fingerprint: str = facts["fingerprint"]
        """Hash of all ids, titles and texts in order, and of the separator."""
        try:
            with reading(self.path):
                with (self.path / "text.arrow").open("rb") as file:
                    self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
                reader = pa.ipc.open_file(pa.py_buffer(self._map))
                self._read = 0
                self._batches = [reader.get_batch(number) for number in range(reader.num_record_batches)]
                self._hashes = _load(self.path / "hashes.npy", self._length)
                self._order = _load(self.path / "order.npy", self._length)
                self.groups: np.ndarray = _load(self.path / "groups.npy", self._length)
                """int64 [N]: the first row whose text is the same after :func:`normalise`: equal text, equal group."""
        except DiskError:
            raise
        except (OSError, pa.ArrowInvalid, ValueError) as error:
            raise _damaged(self.path, str(error)) from error
        if sum(batch.num_rows for batch in self._batches) != self._length:
            raise _damaged(self.path, "rows are missing")

    @classmethod
    def open(cls, path: str | Path) -> TextTable:
        """Map an existing table. `Damaged` when there is none, or it is cut, changed or of another version."""
        return cls(Path(path))

    @classmethod
    def from_rows(cls, rows: Iterable[tuple[str, str, str]], path: str | Path) -> TextTable:
        """Write (id, title, text) rows as a table at ``path`` (a folder, replaced whole) and open it.

        Rows are streamed: memory grows by 32 bytes a row. Nothing appears at ``path`` until all rows are written.
        """
        path = Path(path)
        aside = path.with_name(f".{path.name}.{os.getpid()}.part")
        shutil.rmtree(aside, ignore_errors=True)
        try:
            aside.mkdir(parents=True)
            _write(rows, aside)
            move_folder(aside, path)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
        return cls(path)

    def __len__(self) -> int:
        return self._length

    def _cell(self, row: int, column: int) -> str:
        if not 0 <= row < self._length:
            raise IndexError(f"row {row} of a table with {self._length} rows")
        self._seen(_ROW)
        chunk, inner = divmod(int(row), _CHUNK)
        return self._batches[chunk].column(column)[inner].as_py()

    def _cells(self, rows: Rows, column: int) -> list[str]:
        rows = np.asarray(rows, dtype=np.int64)
        if rows.size and not 0 <= rows.min() <= rows.max() < self._length:
            raise IndexError(f"rows {rows.min()}..{rows.max()} of a table with {self._length} rows")
        out: list[str] = [""] * len(rows)
        order = np.argsort(rows, kind="stable")
        chunks, starts = np.unique(rows[order] // _CHUNK, return_index=True)
        for chunk, places in zip(chunks, np.split(order, starts[1:]), strict=False):
            self._seen(len(self._map) // len(self._batches))
            taken = self._batches[chunk].column(column).take(pa.array(rows[places] - chunk * _CHUNK))
            for place, value in zip(places.tolist(), taken.to_pylist(), strict=True):
                out[place] = value
        return out

    def _seen(self, size: int) -> None:
        """Count bytes of the file that are about to be read; after many, the pages read so far are given back."""
        self._read += size
        if self._read > _KEPT:
            give_back(self._map)
            self._read = size

    def id(self, row: int) -> str:
        """The id of one row."""
        return self._cell(row, 0)

    def ids(self, rows: Rows) -> list[str]:
        """The ids of many rows, in the order asked for."""
        return self._cells(rows, 0)

    def title(self, row: int) -> str:
        """The title of one row, or an empty string."""
        return self._cell(row, 1)

    def body(self, row: int) -> str:
        """The text of one row without its title."""
        return self._cell(row, 2)

    def text(self, row: int) -> str:
        """What the models read of one row: title, separator, text."""
        return join(self._cell(row, 1), self._cell(row, 2))

    def texts(self, rows: Rows) -> list[str]:
        """What the models read of many rows, in the order asked for."""
        return [join(*pair) for pair in zip(self._cells(rows, 1), self._cells(rows, 2), strict=True)]

    def _find(self, id: str, hashed: int) -> int:
        place = int(np.searchsorted(self._hashes, np.uint64(hashed)))
        while place < self._length and int(self._hashes[place]) == hashed:
            row = int(self._order[place])
            if self._cell(row, 0) == id:
                return row
            place += 1
        return -1

    def row(self, id: str) -> int:
        """The (first) row of an id. InputError naming the id when the table does not have it."""
        row = self._find(id, _hash(id))
        if row < 0:
            raise InputError(
                "an id is not in the table",
                where=str(self.path),
                expected=f"one of its {self._length} ids",
                got=repr(id),
                fix="ids are exact strings: check spelling, leading zeros and Unicode form (NFC)",
            )
        return row

    def rows(self, ids: Iterable[str]) -> np.ndarray:
        """The rows of many ids, int64. InputError naming the first id the table does not have."""
        wanted = list(ids)
        if not wanted or not self._length:
            return np.array([self.row(id) for id in wanted], dtype=np.int64)
        hashed = np.fromiter(map(_hash, wanted), dtype=np.uint64, count=len(wanted))
        places = np.minimum(np.searchsorted(self._hashes, hashed), self._length - 1)
        rows = np.asarray(self._order[places])
        for number, (id, found) in enumerate(zip(wanted, self.ids(rows), strict=True)):
            if id != found:  # another id with this hash stands first, or there is no such id
                rows[number] = self.row(id)
        return rows

    def __contains__(self, id: object) -> bool:
        return isinstance(id, str) and self._find(id, _hash(id)) >= 0

    def duplicate_rows(self) -> np.ndarray:
        """Rows, int64 ascending, whose id an earlier row already has."""
        places = np.flatnonzero(self._hashes[1:] == self._hashes[:-1]) + 1
        rows = self._order[places]
        return np.array(sorted(r for r in rows.tolist() if self.row(self.id(r)) != r), dtype=np.int64)


def _write(rows: Iterable[tuple[str, str, str]], folder: Path) -> None:
    digest = hashlib.blake2b(f"{FORMAT}{SEPARATOR}".encode(), digest_size=16)
    hashes, texts = array("Q"), bytearray()
    waiting: list[tuple[str, str, str]] = []
    with pa.OSFile(str(folder / "text.arrow"), "wb") as sink, pa.ipc.new_file(sink, _SCHEMA) as writer:

        def flush() -> None:
            columns = zip(zip(*waiting, strict=True), _SCHEMA, strict=True)
            arrays = [pa.array(column, type=field.type) for column, field in columns]
            writer.write_batch(pa.record_batch(arrays, schema=_SCHEMA))
            waiting.clear()

        for id, title, body in rows:
            for part in (id.encode(), title.encode(), body.encode()):
                digest.update(len(part).to_bytes(8, "little") + part)
            hashes.append(_hash(id))
            texts += hashlib.blake2b(normalise(join(title, body)).encode(), digest_size=16).digest()
            waiting.append((id, title, body))
            if len(waiting) == _CHUNK:
                flush()
        if waiting:
            flush()
    keys = np.frombuffer(hashes, dtype=np.uint64) if len(hashes) else np.zeros(0, np.uint64)
    order = np.argsort(keys, kind="stable").astype(np.int64)
    np.save(folder / "hashes.npy", keys[order])
    np.save(folder / "order.npy", order)
    np.save(folder / "groups.npy", _groups(texts))
    facts = {"format": FORMAT, "rows": len(keys), "fingerprint": digest.hexdigest(), "files": digests(folder, _FILES)}
    write_sealed(folder / "table.json", facts)


def _groups(digests: bytes | bytearray) -> np.ndarray:
    """First row with the same 16-byte digest, for every row."""
    _, first, inverse = np.unique(np.frombuffer(digests, dtype="V16"), return_index=True, return_inverse=True)
    return first[inverse].astype(np.int64)


def _load(path: Path, length: int) -> np.ndarray:
    # an empty array cannot be mapped
    values: np.ndarray = np.load(path, mmap_mode="r" if length else None, allow_pickle=False)
    if values.shape != (length,):
        raise ValueError(f"{path.name} has shape {values.shape}, expected ({length},)")
    return values


def _read_facts(path: Path) -> dict:
    if not (path / "table.json").is_file():
        raise Damaged(
            "this is not a table of texts",
            where=str(path),
            expected="a folder written by TextTable.from_rows",
            got="no table.json",
            fix="load the dataset again with sparring.data.load",
        )
    facts = read_sealed(path / "table.json", "a table of texts", fix=_AGAIN)
    if facts.get("format") != FORMAT:
        raise _damaged(path, f"format {facts.get('format')}, this version reads {FORMAT}")
    return facts


def _damaged(path: Path, why: str) -> Damaged:
    return Damaged(
        "a table of texts is damaged or of another version",
        where=str(path),
        expected="all files of one table",
        got=why,
        fix=_AGAIN,
    )


def move_folder(aside: Path, path: Path, *, replace: bool = True) -> None:
    """Rename a finished folder into place; an older folder there is moved away first and then deleted.

    With ``replace`` off a folder that is there stays: another process made the same one in the meantime.
    """
    if not replace:
        try:
            os.replace(aside, path)
        except OSError:
            if not path.is_dir():
                raise
        return
    old = path.with_name(f".{path.name}.{os.getpid()}.old")
    if path.exists():
        os.replace(path, old)
    os.replace(aside, path)
    shutil.rmtree(old, ignore_errors=True)
