"""A toy help desk in English and Korean, big enough to mine from, and a way to call the command line."""

from __future__ import annotations

import json
from pathlib import Path

from click.testing import CliRunner, Result

from sparring.cli import main

VERBS = ("create", "delete", "list", "reset", "copy", "move", "삭제", "생성")
NOUNS = ("bucket", "instance", "user", "key", "policy", "password", "file", "folder")


def write_toy(folder: Path) -> Path:
    """64 passages (one for each verb and noun), 64 queries: 40 train, 12 dev, 12 test."""
    pairs = [(verb, noun) for verb in VERBS for noun in NOUNS]
    folder.mkdir(parents=True, exist_ok=True)
    passages = [{"_id": f"p{i}", "title": f"{v} {n}", "text": f"how to {v} a {n}"} for i, (v, n) in enumerate(pairs)]
    queries = [{"_id": f"q{i}", "text": f"{v} the {n} 어떻게"} for i, (v, n) in enumerate(pairs)]
    for name, rows in (("corpus", passages), ("queries", queries)):
        write_jsonl(folder / f"{name}.jsonl", rows)
    (folder / "qrels").mkdir(exist_ok=True)
    order = sorted(range(64), key=lambda i: (i * 37) % 64)
    for split, part in (("train", order[:40]), ("dev", order[40:52]), ("test", order[52:])):
        lines = "".join(f"q{i}\tp{i}\t1\n" for i in part)
        (folder / "qrels" / f"{split}.tsv").write_text("query-id\tcorpus-id\tscore\n" + lines)
    return folder


def write_jsonl(path: Path, rows: list[dict]) -> None:
    """One JSON object a line."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def call(*arguments: object) -> Result:
    """Run the command line in this process; unexpected exceptions are raised."""
    return CliRunner().invoke(main, [str(a) for a in arguments], catch_exceptions=False)


SMALL = (
    "run.mine_depth=20", "run.rerank_depth=8", "run.search_depth=100", "run.precision=fp32", "run.threads=1",
    "warmup.retriever_steps=2", "warmup.retriever_batch=8", "warmup.bm25_depth=20",
    "warmup.ranker_steps=2", "warmup.ranker_batch=4", "warmup.ranker_negatives=3",
    "rounds=1", "batch=4", "negatives=3",
)  # fmt: skip
"""Settings under which a recipe takes seconds."""


def settings(*more: str) -> list[str]:
    """SMALL and more, as --set options."""
    return [word for pair in (*SMALL, *more) for word in ("--set", pair)]
