"""Text files as every reader and writer here sees them: UTF-8 lines with numbers, plain or gzipped, written atomically.

Lines end at ``\\n`` or ``\\r\\n`` and nowhere else: U+2028, U+0085 or a lone carriage return inside a text stay text.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import os
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, TextIO, cast

from sparring import files
from sparring.types import InputError

Problem = Callable[[InputError], None]
"""What to do with a row that cannot be used: raise it (loading), or note it and go on (checking)."""


def raise_problem(error: InputError) -> None:
    """The strict :data:`Problem`: stop at the first row that cannot be used."""
    raise error


def ignore_problem(_: InputError) -> None:
    """The :data:`Problem` for a second reading, when what is wrong has been said already."""


def at(path: Path, line: int) -> str:
    """``file:line``, the place every message here names."""
    return f"{path}:{line}"


@contextlib.contextmanager
def open_binary(path: Path) -> Iterator[BinaryIO]:
    """Open a plain or (by its ``.gz`` ending) gzipped file; what goes wrong while reading is an InputError."""
    try:
        if path.suffix == ".gz" and path.is_file() and not path.stat().st_size:
            raise EOFError("the file is empty: not even a gzip header")
        with gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb") as file:
            yield cast(BinaryIO, file)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise InputError(
            "a gzip file is damaged or cut off",
            where=str(path),
            expected="a complete .gz file",
            got=str(error),
            fix="download or compress the file again",
        ) from error
    except OSError as error:
        raise InputError(
            "a file cannot be read",
            where=str(path),
            expected="a readable file",
            got=error.strerror or str(error),
            fix="check the path and its permissions",
        ) from error


def lines(path: Path, problem: Problem = raise_problem, *, blank: bool = False) -> Iterator[tuple[int, str]]:
    """Yield (line number from 1, text without its line end); blank lines only when asked for; a BOM is dropped."""
    with open_binary(path) as file:
        for number, raw in enumerate(file, 1):
            if number == 1 and raw.startswith(b"\xef\xbb\xbf"):
                raw = raw[3:]
            try:
                line = raw.decode("utf-8")
            except UnicodeDecodeError as error:
                problem(not_utf8(at(path, number), error))
                continue
            line = line[:-2] if line.endswith("\r\n") else line.removesuffix("\n")
            if blank or line.strip(" "):
                yield number, line


def not_utf8(where: str, error: UnicodeDecodeError) -> InputError:
    """The error for bytes that are no UTF-8."""
    return InputError(
        "a line is not UTF-8",
        where=where,
        expected="UTF-8 text",
        got=f"byte 0x{error.object[error.start]:02x} at byte {error.start + 1}",
        fix="convert the file: iconv -t UTF-8",
    )


def bad_row(what: str, path: Path, line: int, *, expected: str, got: str, fix: str = "") -> InputError:
    """The error for one row: at file:line, with what was expected and what was there (shortened)."""
    shown = got if len(got) <= 160 else got[:157] + "..."
    return InputError(
        what, where=at(path, line), expected=expected, got=shown, fix=fix or f"correct or remove line {line}"
    )


def bad_id(id: str) -> str:
    """Why ``id`` cannot be an id in any of the formats, or an empty string when it can."""
    if not id:
        return "an empty id"
    if any(character in id for character in "\t\n\r"):
        return f"the id {id!r}, which has a tab or a line break in it"
    return "" if encodable(id) else f"the id {id!r}, which is not valid Unicode"


_GRADE = re.compile(r"\s*[+-]?[0-9]{1,9}\s*", re.ASCII)


def grade(text: str) -> int:
    """A relevance grade: a whole number of up to nine digits. ValueError for anything else."""
    if not _GRADE.fullmatch(text):
        raise ValueError(f"no whole number: {text[:40]!r}")
    return int(text)


def decode_json(text: str) -> Any:
    """The JSON value of a line. ValueError also for what Python cannot hold: deep nesting, numbers without end."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def encodable(text: str) -> bool:
    """False for text with a lone surrogate (``"\\ud800"`` in JSON), which no UTF-8 file can hold."""
    if text.isascii():
        return True
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


class _Text(io.TextIOWrapper):
    """UTF-8 text whose first character may be U+FEFF: readers drop one there, so it is written twice."""

    begun = False

    def write(self, text: str) -> int:
        if text and not self.begun:
            self.begun = True
            text = "\ufeff" + text if text.startswith("\ufeff") else text
        return super().write(text)


@contextlib.contextmanager
def write_text(path: Path) -> Iterator[TextIO]:
    """Open a text file for writing beside its final place; it is renamed into place only when all went well.

    ``.gz`` paths are compressed, without a time stamp, so equal content gives equal bytes.
    """
    path = Path(path)
    aside = path
    try:
        with files.explained(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            aside = files.beside(path)
            with open(aside, "wb") as raw:
                binary = gzip.GzipFile(filename="", mode="wb", fileobj=raw, mtime=0) if path.suffix == ".gz" else raw
                with _Text(cast(BinaryIO, binary), encoding="utf-8", newline="") as text:
                    yield text
            os.replace(aside, path)
    except OSError as error:
        raise InputError(
            "a file cannot be written",
            where=str(path),
            expected="a folder this user can write to",
            got=error.strerror or str(error),
            fix="choose another place",
        ) from error
    except UnicodeEncodeError as error:
        raise InputError(
            "a text is not valid Unicode",
            where=str(path),
            expected="text without half of a surrogate pair",
            got=repr(error.object[max(0, error.start - 20) : error.end + 20]),
            fix="correct the text: UTF-8 cannot hold it",
        ) from None
    finally:
        if aside != path:
            with contextlib.suppress(OSError):
                aside.unlink(missing_ok=True)


def tsv_field(value: str, what: str) -> str:
    """``value`` as one field of a tab-separated file, or an InputError: such a file has no way to quote."""
    if any(character in value for character in "\t\n\r"):
        raise InputError(
            "a tab-separated file cannot hold this text",
            where=what,
            expected="text without tabs and line breaks",
            got=repr(value[:80]),
            fix="write the BEIR layout (JSON lines) instead, or replace the tabs and line breaks",
        )
    return value
