"""Find the files of a dataset: in a folder by their names, in a ``dataset.toml``, or as the caller names them."""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sparring.types import InputError

Files = str | Path | Sequence[str | Path] | Mapping[str, str | Path]
"""One file, several, or one per split."""

MANIFEST = "dataset.toml"
_KEYS = ("corpus", "queries", "qrels", "dpr", "titles")
_CORPUS = re.compile(r"(corpus\.jsonl|corpus\.tsv|collection\.tsv|psgs_[^.]*\.tsv)(\.gz)?")
_QUERIES = re.compile(r"(?:queries|topics)(?:\.(?P<split>.+?))?\.(?:jsonl|tsv|txt)(?:\.gz)?")
_QRELS = re.compile(r"qrels(?:\.(?P<split>.+?))?\.(?:tsv|txt)(?:\.gz)?")
_QRELS_IN_FOLDER = re.compile(r"(?P<split>.+?)\.(?:tsv|txt)(?:\.gz)?")
_QA = re.compile(r"(?:.+-)?(?P<split>train|dev|test)\.qa\.csv(?:\.gz)?")
_DPR = re.compile(r"(?:.+-)?(?P<split>train|dev|test)\.json(?:\.gz)?")
LOOKED_FOR = (
    f"{MANIFEST}; or a corpus (corpus.jsonl, corpus.tsv, collection.tsv or psgs_w100.tsv) with queries (queries.jsonl, "
    "queries.tsv, queries.SPLIT.tsv or topics.SPLIT.txt) and qrels (qrels/SPLIT.tsv or qrels.SPLIT.tsv); "
    "or DPR lists (biencoder-SPLIT.json, questions alone: nq-SPLIT.qa.csv); each also with .gz"
)


@dataclass(frozen=True)
class Layout:
    """The files of a dataset by role.

    Attributes:
        source: what the user named.
        corpus: passage files, read one after the other. Empty when the DPR lists are the corpus.
        queries: (split, file); the split is empty when a file serves all splits.
        qrels: split -> file.
        dpr: split -> DPR training list.
        titles: whether titles are read.
    """

    source: str
    corpus: tuple[Path, ...] = ()
    queries: tuple[tuple[str, Path], ...] = ()
    qrels: Mapping[str, Path] = field(default_factory=dict)
    dpr: Mapping[str, Path] = field(default_factory=dict)
    titles: bool = True

    @property
    def files(self) -> list[Path]:
        """Every file, in a fixed order."""
        return [*self.corpus, *(path for _, path in self.queries), *self.qrels.values(), *self.dpr.values()]


def find(
    source: str | Path | None, *, corpus: Files | None, queries: Files | None, qrels: Files | None, titles: bool
) -> Layout:
    """The layout of ``source``, with any role the caller names replaced. InputError when a role has no file."""
    base = Path(source) if source is not None else Path()
    if source is None:
        found = Layout(", ".join(map(str, _listed(corpus))) or "nothing")
    elif not _is(base.exists):
        raise InputError(
            "there is no such dataset",
            where=str(base),
            expected="a folder, a dataset.toml or a DPR list (.json)",
            got="nothing at this path",
            fix="check the path",
        )
    else:
        given = {
            name for name, files in (("corpus", corpus), ("queries", queries), ("qrels", qrels)) if files is not None
        }
        found = _in_folder(base, given) if base.is_dir() else _from_file(base)
    root = base if base.is_dir() else base.parent
    if qrels is not None and not isinstance(qrels, Mapping) and len(_listed(qrels)) != 1:
        raise InputError(
            "several qrels files need the names of their splits",
            where="qrels=",
            expected='{"train": path, "dev": path}',
            got=", ".join(map(str, _listed(qrels))),
            fix="give a mapping from split to file",
        )
    named = Layout(
        found.source,
        tuple(_existing(path, root, "corpus") for path in _listed(corpus)) if corpus is not None else found.corpus,
        tuple((s, _existing(p, root, "queries")) for s, p in _by_split(queries))
        if queries is not None
        else found.queries,
        {s: _existing(p, root, "qrels") for s, p in _by_split(qrels, "test")} if qrels is not None else found.qrels,
        found.dpr,
        titles and found.titles,
    )
    return _complete(named, None if source is None else base)


def _complete(layout: Layout, base: Path | None) -> Layout:
    missing = [] if layout.corpus or layout.dpr else ["a corpus"]
    missing += [] if layout.queries or layout.dpr else ["queries"]
    if missing:
        there = (
            sorted(p.name + ("/" if p.is_dir() else "") for p in base.glob("*")) if base else ["only the files named"]
        )
        raise InputError(
            f"this dataset has no file for {' and '.join(missing)}",
            where=str(base or "corpus=, queries="),
            expected=LOOKED_FOR,
            got=", ".join(there[:20]) + (f", ... ({len(there)} in all)" if len(there) > 20 else "")
            or "an empty folder",
            fix="rename the files, or name them with corpus=, queries= and qrels=, or in a dataset.toml",
        )
    return layout


def _in_folder(folder: Path, given: Set[str]) -> Layout:
    """What is in a folder; roles the caller has given files for are not looked for."""
    if (folder / MANIFEST).is_file():
        return _manifest(folder / MANIFEST)
    paths = sorted(path for path in folder.iterdir() if path.is_file())
    corpus = {"the corpus": [path for path in paths if _CORPUS.fullmatch(path.name)]}
    inner = sorted(path for path in folder.glob("qrels/*") if path.is_file())
    qrels = _matches(_QRELS, paths, "test")
    for split, files in _matches(_QRELS_IN_FOLDER, inner, "").items():
        qrels.setdefault(split, []).extend(files)
    lists = {} if qrels else _only(_matches(_DPR, paths, ""))
    queries = _matches(_QUERIES, paths, "")
    for split, files in _matches(_QA, paths, "").items():
        if split not in lists:  # a list has the answers too, and the labels
            queries.setdefault(split, []).extend(files)
    return Layout(
        str(folder),
        () if "corpus" in given else tuple(_only(corpus).values()),
        () if "queries" in given else tuple(_only(queries).items()),
        {} if "qrels" in given else _only(qrels),
        lists,
    )


def _matches(pattern: re.Pattern[str], paths: list[Path], split: str) -> dict[str, list[Path]]:
    out: dict[str, list[Path]] = {}
    for path in paths:
        if match := pattern.fullmatch(path.name):
            out.setdefault(match["split"] or split, []).append(path)
    return out


def _only(files: Mapping[str, list[Path]]) -> dict[str, Path]:
    """One file for each name; InputError when there are two: which one is meant cannot be guessed."""
    for name, paths in files.items():
        if len(paths) > 1:
            raise InputError(
                f"two files could be {name or 'the queries'}",
                where=str(paths[0].parent),
                expected="one file",
                got=", ".join(path.name for path in paths),
                fix="remove one, or name the files in a dataset.toml",
            )
    return {name: paths[0] for name, paths in files.items() if paths}


def _from_file(path: Path) -> Layout:
    if path.suffix == ".toml":
        return _manifest(path)
    if path.name.removesuffix(".gz").endswith(".json"):
        match = _DPR.fullmatch(path.name)
        return Layout(str(path), dpr={match["split"] if match else "train": path})
    raise InputError(
        "one file is not a dataset",
        where=str(path),
        expected="a folder, a dataset.toml or a DPR list (.json)",
        got=path.name,
        fix=f"name its folder, which should have: {LOOKED_FOR}",
    )


def _manifest(path: Path) -> Layout:
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError, OSError) as error:
        raise InputError("a manifest is not TOML", where=str(path), expected="TOML 1.0", got=str(error)) from error
    for key in values:
        if key not in _KEYS:
            near = difflib.get_close_matches(key, _KEYS, 1)
            raise InputError(
                f"a manifest has an unknown key {key!r}",
                where=str(path),
                expected=", ".join(_KEYS),
                got=repr(key),
                fix=f"did you mean {near[0]!r}?" if near else f"remove {key!r}",
            )
    titles = values.get("titles", True)
    if not isinstance(titles, bool):
        raise _wrong_value(path, "titles", "true or false", titles)
    root = path.parent
    return Layout(
        str(path),
        tuple(_existing(file, root, "corpus", path) for file in _strings(values, "corpus", path, False).values()),
        tuple((s, _existing(p, root, "queries", path)) for s, p in _strings(values, "queries", path, False).items()),
        {s: _existing(p, root, "qrels", path) for s, p in _strings(values, "qrels", path, True).items()},
        {s: _existing(p, root, "dpr", path) for s, p in _strings(values, "dpr", path, True).items()},
        titles,
    )


def _strings(values: dict[str, Any], key: str, path: Path, splits: bool) -> dict[str, str]:
    """The files under one key, by split; a list's files get numbered names that no split has."""
    value = values.get(key, {})
    if isinstance(value, str) and not splits:
        value = {"": value}
    if isinstance(value, list) and not splits:
        value = {f"#{number}": file for number, file in enumerate(value)}
    if not isinstance(value, dict) or not all(isinstance(file, str) for file in value.values()):
        shape = 'a table, split = "file"' if splits else 'a file, a list of files or a table, split = "file"'
        raise _wrong_value(path, key, shape, values[key])
    return value


def _wrong_value(path: Path, key: str, expected: str, got: object) -> InputError:
    return InputError(f"a manifest's {key!r} cannot be used", where=f"{path}: {key}", expected=expected, got=repr(got))


def _listed(files: Files | None) -> list[str | Path]:
    if files is None:
        return []
    if isinstance(files, str | Path):
        return [files]
    return list(files.values()) if isinstance(files, Mapping) else list(files)


def _by_split(files: Files | None, alone: str = "") -> list[tuple[str, str | Path]]:
    if isinstance(files, Mapping):
        return list(files.items())
    return [(alone, path) for path in _listed(files)]


def _is(question: Callable[[], bool]) -> bool:
    """The answer about a path; no for one that the system cannot even look up (too long, or with a NUL in it)."""
    try:
        return question()
    except (OSError, ValueError):
        return False


def _existing(path: str | Path, root: Path, role: str, manifest: Path | None = None) -> Path:
    """``path`` as it is or under ``root``; a manifest's paths are under its folder."""
    here, inside = Path(path), root / path
    for candidate in (inside,) if manifest else (here, inside):
        if _is(candidate.is_file):
            return candidate
    raise InputError(
        f"a file for {role} does not exist",
        where=f"{manifest or root}: {role}",
        expected="an existing file",
        got=str(path),
        fix="correct the path" + (" (relative to the manifest)" if manifest else ""),
    )
