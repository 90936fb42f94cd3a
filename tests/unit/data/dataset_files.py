"""A small dataset in plain values, and functions that write files as they might arrive."""

from __future__ import annotations

import gzip
import json
import unicodedata
from pathlib import Path

KOREAN = unicodedata.normalize("NFD", "한국어 문서")  # as macOS writes it
PASSAGES = [
    ("007", "Bond", "shaken, not stirred"),
    ("7", "", "a seven"),
    ("k1", "제목", "한국어 문장입니다."),
    ("k2", "", KOREAN),
    ("odd id", "", "line\u2028separator and \x85 stay text"),
]
QUERIES = [("q1", "who drinks martini"), ("0002", "한국어?"), ("q 3", "spaces in an id")]
QRELS = {"train": {"q1": {"007": 2, "7": 0}, "0002": {"k1": 1, "k2": 1}}, "test": {"q 3": {"odd id": 1}}}


def write(path: Path, text: str, *, crlf: bool = False, bom: bool = False) -> Path:
    """Write ``text`` as it might arrive: gzipped by the path's ending, with CRLF or a BOM when asked."""
    data = (b"\xef\xbb\xbf" if bom else b"") + (text.replace("\n", "\r\n") if crlf else text).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def beir_files(folder: Path, *, end: str = "", crlf: bool = False, bom: bool = False) -> Path:
    """The dataset above, written by hand in BEIR's layout."""
    corpus = "".join(json.dumps({"_id": i, "title": t, "text": x}, ensure_ascii=False) + "\n" for i, t, x in PASSAGES)
    queries = "".join(json.dumps({"_id": i, "text": x}, ensure_ascii=False) + "\n" for i, x in QUERIES)
    write(folder / f"corpus.jsonl{end}", corpus, crlf=crlf, bom=bom)
    write(folder / f"queries.jsonl{end}", queries, crlf=crlf, bom=bom)
    for split, qrels in QRELS.items():
        rows = "".join(f"{q}\t{p}\t{g}\n" for q, grades in qrels.items() for p, g in grades.items())
        write(folder / "qrels" / f"{split}.tsv{end}", "query-id\tcorpus-id\tscore\n" + rows, crlf=crlf, bom=bom)
    return folder
