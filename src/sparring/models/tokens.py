"""Texts tokenised once: flat token ids without special tokens, kept on disk and memory-mapped.

Every encode, mine and training phase reads the same store; special tokens, truncation and padding are added when a
batch is built (see ``template.py``). A store is found again by its fingerprint, which covers the tokenizer, the texts,
the prompt, the cap, the file format and the code's version. Every file of it has a SHA-256, checked when it is opened.
Tokenising that was stopped goes on after the last text that was noted (see ``growing.py``).
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from time import monotonic
from typing import Any, Protocol

import numpy as np
import tokenizers
from transformers import PreTrainedTokenizerBase

from sparring import __version__
from sparring.files import Damaged, damaged, read_sealed
from sparring.log import progress
from sparring.models.growing import MANIFEST, growing, remove_part
from sparring.types import InputError

logger = logging.getLogger("sparring")

FORMAT = 2
CODE = f"sparring {__version__}, tokenizers {tokenizers.__version__}"
"""The code that makes ids of texts: stores of another version are not used."""
CHUNK = 4096  # texts handed to the tokenizer at a time
NOTED = 30.0
"""Seconds after which what is done of a store is noted, when a chunk ends: as much, and a chunk, is lost at most."""
SAMPLE = 512  # texts from which the size of a store is told beforehand

_IDS, _OFFSETS, _TRUE = "ids.int32", "offsets.npy", "true_lengths.npy"


class TextSource(Protocol):
    """What ``tokenize`` reads: a ``TextTable``, or anything with as much."""

    @property
    def fingerprint(self) -> str: ...

    def __len__(self) -> int: ...

    def texts(self, rows: np.ndarray, /) -> list[str]: ...


class _ListedTexts:
    """A plain sequence of texts as a ``TextSource``."""

    def __init__(self, texts: Sequence[str]) -> None:
        self._texts = texts
        digest = hashlib.sha256()
        for text in texts:
            data = text.encode()
            digest.update(len(data).to_bytes(8, "little") + data)
        self.fingerprint = digest.hexdigest()

    def __len__(self) -> int:
        return len(self._texts)

    def texts(self, rows: np.ndarray) -> list[str]:
        return [self._texts[row] for row in rows]


@dataclass(frozen=True, eq=False)
class TokenStore:
    """Token ids of N texts, without special tokens.

    Attributes:
        ids: int32, all texts after one another (memory-mapped when the store is on disk).
        offsets: int64 [N + 1]; text ``i`` is ``ids[offsets[i]:offsets[i + 1]]``.
        true_lengths: int32 [N], tokens before the cap. Pair truncation needs them.
        limit: the cap, in tokens per text.
        prompt: text that was put before each text.
        tokenizer: fingerprint of the tokenizer.
        fingerprint: identifies tokenizer, texts, prompt, cap and file format.
        folder: where the store is on disk; ``None`` for one in memory.
    """

    ids: np.ndarray
    offsets: np.ndarray
    true_lengths: np.ndarray
    limit: int
    prompt: str
    tokenizer: str
    fingerprint: str
    folder: Path | None = None

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, row: int) -> np.ndarray:
        row = range(len(self))[row]
        return self.ids[self.offsets[row] : self.offsets[row + 1]]

    @property
    def lengths(self) -> np.ndarray:
        """Stored tokens of each text, int64 [N]: at most ``limit``."""
        return np.diff(self.offsets)

    def select(self, rows: np.ndarray) -> TokenStore:
        """A store in memory of the given texts, in the given order."""
        rows = np.asarray(rows, dtype=np.int64)
        sizes = self.lengths[rows]
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes)])
        flat = np.repeat(self.offsets[:-1][rows] - offsets[:-1], sizes) + np.arange(offsets[-1])
        digest = hashlib.sha256(self.fingerprint.encode() + rows.tobytes()).hexdigest()
        return replace(
            self, ids=self.ids[flat], offsets=offsets, true_lengths=self.true_lengths[rows], fingerprint=digest,
            folder=None,
        )  # fmt: skip

    @classmethod
    def open(cls, folder: Path, *, check: bool = True) -> TokenStore:
        """Memory-map a store that ``tokenize`` wrote. `Damaged` when a file of it is missing, cut or changed.

        ``check``: read all of it for its checksums; without, only the manifest's is looked at.
        """
        again = f"delete {folder}; it is made again"
        manifest = read_sealed(folder / MANIFEST, "a store of tokens", fix=again)
        if check and (wrong := damaged(folder, manifest["files"])):
            where = str(folder / wrong[0])
            raise Damaged("A token file is damaged.", where=where, expected="the file as it was written", fix=again)
        settings = {key: manifest[key] for key in ("limit", "prompt", "tokenizer", "fingerprint")}
        ids = folder / _IDS
        flat = np.memmap(ids, dtype="<i4", mode="r") if ids.stat().st_size else np.empty(0, np.int32)
        offsets = np.load(folder / _OFFSETS, mmap_mode="r", allow_pickle=False)
        true_lengths = np.load(folder / _TRUE, mmap_mode="r", allow_pickle=False)
        return cls(ids=flat, offsets=offsets, true_lengths=true_lengths, folder=folder, **settings)


def tokenize(
    table_or_texts: TextSource | Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    prompt: str = "",
    limit: int,
    cache: Path | None,
    name: str,
    tokenizer_id: str = "",
) -> TokenStore:
    """Tokenise every text once, or open the store made earlier from the same texts, tokenizer, prompt and cap.

    Args:
        table_or_texts: N texts.
        tokenizer: a fast tokenizer. Its truncation and padding state is set to none.
        prompt: put before each text, as one string, before tokenising.
        limit: tokens kept of each text (special tokens not counted).
        cache: folder of the stores; ``None`` keeps the store in memory.
        name: what the texts are ("queries", "passages"), for the progress bar and the log.
        tokenizer_id: the tokenizer's fingerprint where it is known already; "" computes it.

    Raises:
        InputError: the tokenizer is not a fast one.
    """
    source = _ListedTexts(table_or_texts) if isinstance(table_or_texts, Sequence) else table_or_texts
    tokenizer_id = tokenizer_id or tokenizer_fingerprint(tokenizer)
    settings = _settings(source, prompt=prompt, limit=limit, tokenizer_id=tokenizer_id)
    encode_plain(tokenizer, [])  # its state must not depend on what is in the cache: it is exported
    if cache is None:
        return _in_memory(source, tokenizer, settings, name)
    folder = _folder(cache, settings)
    if folder.exists():
        try:
            found = TokenStore.open(folder)
        except Damaged as error:
            logger.warning("%s is damaged and made again: %s", folder, error.where)
            spoilt = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=cache))
            with contextlib.suppress(FileNotFoundError):  # another process makes it again, too
                os.replace(folder, spoilt)
            shutil.rmtree(spoilt, ignore_errors=True)
        else:
            remove_part(folder)
            logger.info("%s: tokens of an earlier run are reused (%s)", name, folder)
            return found
    cache.mkdir(parents=True, exist_ok=True)
    _write(folder, source, tokenizer, settings, name)
    return TokenStore.open(folder)


def stored(source: TextSource, *, prompt: str, limit: int, tokenizer_id: str, cache: Path) -> tuple[Path, bool]:
    """Where `tokenize` keeps these texts' tokens, and whether they are there."""
    folder = _folder(cache, _settings(source, prompt=prompt, limit=limit, tokenizer_id=tokenizer_id))
    return folder, (folder / MANIFEST).exists()


def expected_size(
    source: TextSource, tokenizer: PreTrainedTokenizerBase, *, prompt: str, limit: int, cache: Path, tokenizer_id: str
) -> tuple[Path, int]:
    """Where `tokenize` would keep these tokens, and about how many bytes it would add: 0 where they are there already,
    else counted from up to `SAMPLE` texts."""
    folder, there = stored(source, prompt=prompt, limit=limit, tokenizer_id=tokenizer_id, cache=cache)
    if there or not len(source):
        return folder, 0
    rows = np.linspace(0, len(source) - 1, min(SAMPLE, len(source))).astype(np.int64)
    lengths = [min(limit, len(ids)) for ids in encode_plain(tokenizer, [prompt + text for text in source.texts(rows)])]
    return folder, int(len(source) * (4 * float(np.mean(lengths)) + 8 + 4))


def _settings(source: TextSource, *, prompt: str, limit: int, tokenizer_id: str) -> dict[str, Any]:
    """What a store depends on, and its fingerprint."""
    settings: dict[str, Any] = {"limit": int(limit), "prompt": prompt, "tokenizer": tokenizer_id}
    made_of = {"format": FORMAT, "version": CODE, "texts": source.fingerprint, "rows": len(source), **settings}
    key = json.dumps(made_of, sort_keys=True)
    return {**settings, "fingerprint": hashlib.sha256(key.encode()).hexdigest()}


def _folder(cache: Path, settings: dict[str, Any]) -> Path:
    return cache / f"tokens-{settings['fingerprint'][:24]}"


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Identifies how texts become ids: everything the tokenizer does, but special tokens, truncation and padding."""
    state = json.loads(_backend(tokenizer).to_str())
    for unrelated in ("truncation", "padding", "post_processor", "decoder"):
        state.pop(unrelated, None)
    state["split_special_tokens"] = bool(tokenizer.split_special_tokens)
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def encode_plain(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text without special tokens, truncation or padding."""
    backend = _backend(tokenizer)
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = bool(tokenizer.split_special_tokens)
    return [encoding.ids for encoding in backend.encode_batch_fast(list(texts), add_special_tokens=False)]


def _backend(tokenizer: PreTrainedTokenizerBase) -> Any:
    if not getattr(tokenizer, "is_fast", False):
        raise InputError(
            "This tokenizer cannot be used.", got=type(tokenizer).__name__,
            expected="a fast tokenizer (one with a tokenizer.json)", fix="save the model again with a fast tokenizer",
        )  # fmt: skip
    return tokenizer.backend_tokenizer


def _chunks(
    source: TextSource, tokenizer: PreTrainedTokenizerBase, settings: dict[str, Any], name: str, first: int = 0
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """For each chunk of texts from ``first`` on: ids int32 (flat), stored lengths int64, true lengths int64."""
    prompt, limit = settings["prompt"], settings["limit"]
    with progress(f"tokenising {name}", total=len(source), done=first) as bar:
        for start in range(first, len(source), CHUNK):
            texts = source.texts(np.arange(start, min(start + CHUNK, len(source))))
            rows = encode_plain(tokenizer, [prompt + text for text in texts] if prompt else texts)
            true = np.fromiter((len(row) for row in rows), np.int64, len(rows))
            stored = np.minimum(true, limit)
            flat = np.empty(int(stored.sum()), np.int32)
            ends = np.cumsum(stored)
            for row, end, length in zip(rows, ends, stored, strict=True):
                flat[end - length : end] = row[:length]
            yield flat, stored, true
            bar.update(len(rows))


def _in_memory(
    source: TextSource, tokenizer: PreTrainedTokenizerBase, settings: dict[str, Any], name: str
) -> TokenStore:
    parts = list(_chunks(source, tokenizer, settings, name))
    flats, stored, true = zip(*parts, strict=True) if parts else ((), (), ())
    return TokenStore(
        ids=np.concatenate([np.empty(0, np.int32), *flats]),
        offsets=np.concatenate([np.zeros(1, np.int64), np.cumsum(np.concatenate([np.empty(0, np.int64), *stored]))]),
        true_lengths=np.concatenate([np.empty(0, np.int64), *true]).astype(np.int32),
        **settings,
    )


def _write(
    folder: Path, source: TextSource, tokenizer: PreTrainedTokenizerBase, settings: dict[str, Any], name: str
) -> None:
    """Stream what is missing of the store into a folder beside the final one, then rename it into place."""
    heads = {_IDS: b"", _OFFSETS: _header("<i8", len(source) + 1) + bytes(8), _TRUE: _header("<i4", len(source))}
    with growing(folder, settings["fingerprint"], heads) as store:
        if store is None:  # another process was faster
            return
        rows, end = store.facts.get("rows", 0), store.facts.get("tokens", 0)
        if rows:
            logger.info("tokenising %s goes on after %s of %s (%s)", name, f"{rows:,}", f"{len(source):,}", folder)
        noted = monotonic()
        for flat, stored_lengths, true_lengths in _chunks(source, tokenizer, settings, name, rows):
            store.write(_IDS, flat.astype("<i4", copy=False).tobytes())
            store.write(_OFFSETS, (end + np.cumsum(stored_lengths)).astype("<i8").tobytes())
            store.write(_TRUE, true_lengths.astype("<i4").tobytes())
            rows, end = rows + len(true_lengths), end + len(flat)
            if rows < len(source) and monotonic() - noted >= NOTED:
                store.note(rows=rows, tokens=end)
                noted = monotonic()  # a slow disk must not note all the time
        store.finish(folder, {"format": FORMAT, "rows": len(source), "tokens": end, **settings})


def _header(kind: str, length: int) -> bytes:
    """What a ``.npy`` file of one dimension begins with."""
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": kind, "fortran_order": False, "shape": (length,)})
    return buffer.getvalue()
