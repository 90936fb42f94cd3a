"""A run folder and a comparison folder as frozen objects."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from report_fixtures import MEASURES, ROWS, write_comparison, write_run
from sparring.report.compared import read_comparison_folder
from sparring.report.page import write_report
from sparring.report.read import read_run_folder
from sparring.types import CASCADE, FIXED, RETRIEVER, InputError


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    return write_run(tmp_path_factory.mktemp("run"))


def test_the_rows_are_those_that_a_recipe_writes() -> None:
    from sparring.phases import evaluate
    from sparring.report.read import ROWS as read_rows

    assert read_rows == (evaluate.RETRIEVER, evaluate.FIXED, evaluate.CASCADE) == (RETRIEVER, FIXED, CASCADE)


def test_results_by_state_and_row(written: SimpleNamespace) -> None:
    run = read_run_folder(written.folder)
    assert [state.name for state in run.dev.states] == ["warm start", "round 1", "round 2", "round 3"]
    assert [state.name for state in run.test.states] == ["warm start", "round 3"]
    assert [baseline.name for baseline in run.test.baselines] == ["BM25", "zero-shot retriever"]
    assert (run.dev.queries, run.test.queries, run.recipe, run.best) == (40, 60, "ar2", "round 3")
    assert tuple(run.measures) == MEASURES
    for state, values in zip(run.test.states, (written.before, written.after), strict=True):
        for row in ROWS:
            for measure in MEASURES:
                assert state.rows[row][measure].mean == pytest.approx(values[row][measure].mean())


def test_training_phases_times_and_overlaps(written: SimpleNamespace) -> None:
    run = read_run_folder(written.folder)
    records = [json.loads(line) for line in (written.folder / "metrics.jsonl").read_text().splitlines()]
    first = [r["retriever_in_batch"] for r in records if r["kind"] == "step" and r["phase"] == "warm-retriever"]
    assert list(run.training[0].values["retriever_in_batch"]) == first
    assert [phase.phase for phase in run.training][2:4] == ["1-ranker", "1-retriever"]
    assert all(phase.passages == 8 for phase in run.training)
    kinds = {name: run.kinds[name] for name, _, _ in run.phases}
    assert kinds["warm-retriever"] == "train the retriever"
    assert kinds["2-ranker"] == "train the ranker"
    assert kinds["bm25-index"] == "BM25"
    assert (kinds["1-encode"], kinds["1-index"], kinds["1-mine"]) == ("encode", "index", "mine")
    assert kinds["round 1-evaluate"] == "evaluate on dev"
    assert run.seconds == records[-1]["seconds"]
    assert [(name, round(share, 2)) for name, share in run.overlaps] == [("1", 0.85), ("2", 0.8), ("3", 0.75)]


def test_phase_names_of_every_recipe_have_a_kind() -> None:
    from sparring.report.read import _kind

    fits, denoised = {"teacher", "1-joint", "1-retriever"}, {"warm-denoise"}
    found = {name: _kind(name, fits, denoised) for name in (*fits, *denoised, "tokenise", "export", "bm25-search")}
    assert found == {
        "teacher": "train the ranker", "1-joint": "train both models", "1-retriever": "train the retriever",
        "warm-denoise": "denoise", "tokenise": "tokenise", "export": "export", "bm25-search": "BM25",
    }  # fmt: skip


def test_shown_queries_have_their_passages_and_ranks(written: SimpleNamespace) -> None:
    evidence = read_run_folder(written.folder).evidence
    assert evidence is not None
    raw = json.loads((written.folder / "evidence.json").read_text())
    moved = written.after[CASCADE]["RR@10"] - written.before[CASCADE]["RR@10"]
    best = evidence.shown["improved"][0]
    row = int(np.argmax(moved))
    assert (best.id, best.text) == (raw["queries"][row]["id"], raw["queries"][row]["text"])
    assert best.after - best.before == pytest.approx(moved.max())
    assert best.rank_before == raw["rank"]["warm start"][row]
    assert best.rank_after == raw["rank"]["round 3"][row]
    assert [p.id for p in best.top_after] == raw["top"]["round 3"][row]
    assert best.top_after[0].title == raw["passages"][raw["top"]["round 3"][row][0]]["title"]
    assert [p.id for p in best.top_before if p.labelled] == [p for p in raw["top"]["warm start"][row]
                                                            if p in raw["queries"][row]["labelled"]]  # fmt: skip


def test_a_folder_without_evidence_and_audit(tmp_path: Path) -> None:
    write_run(tmp_path, evidence=False, audit=False)
    run = read_run_folder(tmp_path)
    assert (run.evidence, run.audit) == (None, None)


def damage(folder: Path, name: str, change: Any) -> None:
    value = json.loads((folder / name).read_text())
    change(value)
    (folder / name).write_text(json.dumps(value))


DAMAGES: dict[str, tuple[str, Any, str]] = {
    "no results": ("results.json", None, "nothing to report"),
    "no metrics": ("metrics.jsonl", None, "metrics.jsonl"),
    "no environment": ("environment.json", None, "environment.json"),
    "results without dev": ("results.json", lambda v: v.pop("dev"), "results.json"),
    "a row without a name": ("results.json", lambda v: v["test"][3].pop("name"), "results.json"),
    "evidence without ranks": ("evidence.json", lambda v: v.pop("rank"), "evidence.json"),
    "audit without a histogram": ("audit.json", lambda v: v["refreshes"][0].pop("histogram"), "audit.json"),
    "no object": ("evidence.json", "[1, 2]", "evidence.json"),
    "no JSON": ("results.json", "{", "results.json"),
    "a broken record": ("metrics.jsonl", '{"kind": "step", "seconds": 0}\n{oops\n', "metrics.jsonl:2"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_what_is_missing_or_damaged_is_named(name: str, written: SimpleNamespace, tmp_path: Path) -> None:
    file, change, expected = DAMAGES[name]
    folder = shutil.copytree(written.folder, tmp_path / "run")
    if change is None:
        (folder / file).unlink()
    elif isinstance(change, str):
        (folder / file).write_text(change)
    else:
        damage(folder, file, change)
    with pytest.raises(InputError) as caught:
        write_report(folder)
    assert expected in str(caught.value)
    assert not (folder / "report.html").exists()


def test_an_arbitrary_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="neither of them"):
        write_report(tmp_path)
    with pytest.raises(InputError, match="no such folder"):
        write_report(tmp_path / "nowhere")


def test_a_comparison_and_its_arms(tmp_path: Path) -> None:
    written = write_comparison(tmp_path)
    found = read_comparison_folder(tmp_path)
    assert [arm.name for arm in found.arms] == [arm["name"] for arm in written["arms"]]
    cell = found.arms[2].rows[CASCADE]["RR@10"]
    raw = written["arms"][2]["rows"][CASCADE]["RR@10"]
    assert (*cell.over_queries, cell.seed_sd) == (raw["mean"], raw["low"], raw["high"], raw["seed_sd"])
    name, rows = found.arms[0].curves[0]
    means = [read_run_folder(tmp_path / f"seed-{s}/separate").dev.states[0].rows[FIXED]["RR@10"].mean for s in range(3)]
    assert (name, list(rows[FIXED])) == ("warm start", means)
    assert found.shown is not None
    shipped, other = (json.loads((tmp_path / f"seed-1/{arm}/evidence.json").read_text()) for arm in ("ar2", "separate"))
    query = found.shown["improved"][0]
    place = [q["id"] for q in shipped["queries"]].index(query.id)
    values = [e["values"]["round 3"][CASCADE]["RR@10"] for e in (other, shipped)]
    assert (query.before, query.after) == (values[0][place], values[1][place])
    assert query.after - query.before == max(b - a for a, b in zip(*values, strict=True))


@pytest.mark.parametrize("ship", [None, {"arm": "separate", "seed": 0, "folder": "seed-0/separate"}])
def test_nothing_to_set_against_the_baseline(ship: Any, tmp_path: Path) -> None:
    write_comparison(tmp_path, seeds=1)
    damage(tmp_path, "comparison.json", lambda v: v["verdict"].update(ship=ship))
    assert read_comparison_folder(tmp_path).shown is None
    assert "None to show" in write_report(tmp_path).read_text()
