"""The synthetic help desk of the audit's benchmarks: what is true there, and what its labels say."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from audit import Found, totals
from planted import Labels, World, write_planted

SMALL: dict[str, Any] = {"subjects": 12, "aspects": 4}


def read(folder: Path) -> tuple[dict[str, str], dict[str, dict[str, set[str]]]]:
    """Texts of the passages, and passages that a label names by split and query."""
    corpus = {row["_id"]: row["text"] for row in map(json.loads, (folder / "corpus.jsonl").read_text().splitlines())}
    labels: dict[str, dict[str, set[str]]] = {}
    for split in ("train", "dev", "test"):
        for line in (folder / "qrels" / f"{split}.tsv").read_text().splitlines()[1:]:
            query, passage, _ = line.split("\t")
            labels.setdefault(split, {}).setdefault(query, set()).add(passage)
    return corpus, labels


@pytest.mark.parametrize(("labels", "sources"), [("random", False), ("wording", False), ("source", True)])
def test_test_labels_are_complete_the_others_name_one_passage(labels: Labels, sources: bool, tmp_path: Path) -> None:
    data = write_planted(tmp_path, 5, World(**SMALL, labels=labels, sources=sources))
    _, found = read(tmp_path)
    assert all(data.truth[query] == passages for query, passages in found["test"].items())
    for split in ("train", "dev"):
        assert all(len(passages) == 1 and passages <= data.truth[query] for query, passages in found[split].items())
    assert data.planted == {(q, p) for q, passages in found["train"].items() for p in data.truth[q] - passages}
    assert len(data.planted) > 30


def test_labels_by_source_miss_the_newer_one(tmp_path: Path) -> None:
    """Every planted passage is of the newer source; where there is one passage only, either source may be labelled."""
    data = write_planted(tmp_path, 5, World(**SMALL, labels="source", sources=True))
    corpus, found = read(tmp_path)

    def newer(passage: str) -> bool:
        kinds = {word[0] for word in corpus[passage].split()} - {"s", "a"}
        assert kinds in ({"o"}, {"n"}), "a passage's fillers are of one source"
        return kinds == {"n"}

    assert all(newer(passage) for _, passage in data.planted)
    several = {query for query, _ in data.planted}
    assert not any(newer(p) for query in several for p in found["train"][query])
    alone = [newer(p) for query, passages in found["train"].items() if query not in several for p in passages]
    assert 0 < sum(alone) < len(alone)


def test_labels_by_source_need_sources() -> None:
    with pytest.raises(ValueError, match="sources"):
        World(labels="source")


def test_sources_mean_nothing_where_labels_are_at_random(tmp_path: Path) -> None:
    data = write_planted(tmp_path, 5, World(**SMALL, sources=True))
    corpus, _ = read(tmp_path)
    newer = [any(word[0] == "n" for word in corpus[passage].split()) for _, passage in data.planted]
    assert 0.3 < sum(newer) / len(newer) < 0.7


def test_totals_are_of_all_seeds_and_ranges_of_each() -> None:
    """3 of 10 flagged are right, 3 of 12 planted are found; by seed 2 of 4 and 1 of 6, 2 of 4 and 1 of 8."""
    found = totals([Found(flagged=4, right=2, planted=4), Found(flagged=6, right=1, planted=8)])
    assert found == [10, 3, "0.300 (0.167..0.500)", "0.250 (0.125..0.500)"]
