"""The audits of a run as files: audit.json for programs, audit/NAME.tsv for a person who judges (docs/audit.md)."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from sparring.data import Dataset
from sparring.data.corrections import ReviewRow, write_review
from sparring.distributed import rank
from sparring.files import DiskError, reading
from sparring.phases.audit import Audit, audit, choose, dropped
from sparring.phases.pools import Pools
from sparring.rundir import RunDir
from sparring.types import InputError

EXAMPLES = 50
CHARACTERS = 400

Score = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""Query rows [N], passage rows [N] -> ranker logits [N]."""


def audited(
    pools: Pools,
    score: Score,
    *,
    lists: int,
    depth: int,
    seed: int,
    groups: np.ndarray,
    settled: Mapping[int, np.ndarray],
) -> Audit:
    """Draw list heads, score them and their top candidates in one call, compare."""
    chosen = choose(pools, lists, depth, seed)
    queries = np.concatenate([chosen.pair_queries(), chosen.queries])
    scores = score(queries, np.concatenate([chosen.candidates, chosen.heads]))
    cut = len(chosen.candidates)
    return audit(chosen, scores[:cut], scores[cut:], groups=groups, settled=settled)


@dataclass
class Audits:
    """What was audited so far, by generation, and what denoising dropped from that generation's pools.

    Every change is written: a table when it is new, audit.json anew.
    """

    run: RunDir
    dataset: Dataset
    records: dict[str, dict[str, Any]] = field(default_factory=dict)
    denoised: dict[str, Mapping[str, int]] = field(default_factory=dict)

    def add(self, generation: str, found: Audit) -> dict[str, Any]:
        """Write one audit's table and its record in audit.json.  -> the record"""
        name = f"audit/{generation}.tsv"
        rows = list(self._rows(found))
        self.records[generation] = {
            "generation": generation, "counts": dict(found.dropped), "lists": found.lists,
            "candidates": found.candidates, "pairs_scored": found.pairs, "median_positive": found.median_positive,
            "histogram": {name: getattr(found, name).tolist() for name in ("edges", "positives", "negatives")},
            "likely": len(rows), "examples": [_example(row) for row in rows[:EXAMPLES]], "file": name,
        }  # fmt: skip
        if rank() == 0:
            write_review(rows, self.run.path / name)
        self._write()
        return self.records[generation]

    def take(self, record: dict[str, Any]) -> None:
        """An audit that was made before this process began; audit.json is written anew."""
        self.records[record["generation"]] = record
        self._write()

    def add_denoised(self, generation: str, counts: Mapping[str, int]) -> None:
        """Denoising's counts, which may come before or after the audit of the same pools."""
        self.denoised[generation] = dropped(counts)
        if generation in self.records:
            self._write()

    def copy(self, run: RunDir) -> Audits:
        """The same state in a run folder that has its tables, to go on from more than once."""
        return replace(self, run=run, records=dict(self.records), denoised=dict(self.denoised))

    def to_dict(self) -> dict[str, Any]:
        """The content of audit.json."""
        refreshes = [
            {**record, "counts": {**record["counts"], **self.denoised.get(name, {})}}
            for name, record in self.records.items()
        ]
        return {"refreshes": refreshes}

    @classmethod
    def read(cls, run: RunDir, dataset: Dataset) -> Audits:
        """What audit.json of a run folder holds; empty where there was no audit. Denoising's counts stay merged."""
        file = run.path / "audit.json"
        try:
            with reading(file):
                text = file.read_text(encoding="utf-8") if file.is_file() else '{"refreshes": []}'
            refreshes = json.loads(text)["refreshes"]
            return cls(run, dataset, {record["generation"]: record for record in refreshes})
        except DiskError:
            raise
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise InputError(
                "a file of the run is damaged", where=str(file), expected="audit.json as it was written",
                got=f"{type(error).__name__}: {error}", fix="begin again with another --out",
            ) from None  # fmt: skip

    def sentences(self) -> list[str]:
        """For the summary: how many of the last generation's negatives look like right answers, and where they are."""
        if not self.records:
            return []
        last = list(self.records.values())[-1]
        return [
            f"Negative audit ({last['generation']}): {last['likely']} of {last['candidates']} top negatives of "
            f"{last['lists']} lists score above the median positive: {last['file']}, to be judged and given back "
            "with --corrections."
        ]

    def _write(self) -> None:
        if rank() == 0:
            self.run.write_json("audit.json", self.to_dict())

    def _rows(self, found: Audit) -> Iterator[ReviewRow]:
        corpus, queries = self.dataset.corpus, self.dataset.queries
        for query, passage, score, place in zip(
            found.queries.tolist(), found.passages.tolist(), found.scores.tolist(), found.ranks.tolist(), strict=True
        ):
            text = queries.text(query), corpus.title(passage), corpus.body(passage)
            yield ReviewRow(queries.id(query), corpus.id(passage), score, place, *text)


def _example(row: ReviewRow) -> dict[str, Any]:
    text = row.text if len(row.text) <= CHARACTERS else row.text[: CHARACTERS - 1] + "…"
    return {
        "query_id": row.query_id, "passage_id": row.passage_id, "query": row.query, "title": row.title, "text": text,
        "score": row.score, "rank": row.rank,
    }  # fmt: skip
