"""The negative audit from end to end: it changes nothing, its verdicts are obeyed, and it finds what is there."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli_fixtures import call, settings, write_toy

from sparring.data import load
from sparring.data.corrections import read_corrections
from sparring.recipes.experiment import Experiment
from sparring.recipes.train import resolve_config, set_up, train

pytestmark = pytest.mark.slow

CONFIG: dict[str, dict[str, Any]] = {
    "run": {"mine_depth": 20, "rerank_depth": 8, "precision": "fp32", "threads": 1, "audit_lists": 10},
    "warmup": {
        "retriever_steps": 2, "retriever_batch": 8, "bm25_depth": 20, "ranker_steps": 2, "ranker_batch": 4,
        "ranker_negatives": 3,
    },
    "rocketqav2": {
        "rounds": 2, "batch": 4, "negatives": 3, "steps": 2, "refresh": True, "denoise_negative": 0.5,
        "denoise_positive": 0.8, "denoise_depth": 20,
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def _surroundings(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("SPARRING_CACHE", str(cache))
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_training_is_the_same_to_the_bit_without_the_audit(
    toy: Path, cache: Path, tiny_st: Path, tiny_ce: Path, tmp_path: Path
) -> None:
    """RocketQAv2, which denoises before and after audits: every loss and every exported weight."""
    found = []
    for lists in (10, 0):
        config = {**CONFIG, "run": {**CONFIG["run"], "audit_lists": lists}}
        done = train(
            toy, tiny_st, tiny_ce, out=tmp_path / str(lists), recipe="rocketqav2", config=config, cache=cache
        )  # fmt: skip
        steps = [
            {key: value for key, value in record.items() if key != "seconds"}
            for record in done.experiment.run.metrics.records
            if record["kind"] in ("step", "fit", "denoise", "evaluate", "test")
        ]
        weights = [model.state_dict() for model in done.experiment._models().values()]
        found.append((steps, weights))
    assert found[0][0] == found[1][0]
    assert len([record for record in found[0][0] if record["kind"] == "step"]) == 8
    for one, other in zip(*(weights for _, weights in found), strict=True):
        assert all(torch.equal(one[key], other[key]) for key in one)
    assert not list((tmp_path / "0").glob("audit*"))
    check_contract(json.loads((tmp_path / "10/audit.json").read_text()), tmp_path / "10", toy, cache)


def check_contract(found: dict[str, Any], run: Path, toy: Path, cache: Path) -> None:
    """audit.json as the report reads it: 4 generations, counts of mining and of denoising where it was done."""
    assert [entry["generation"] for entry in found["refreshes"]] == ["zero-shot", "warm", "1", "2"]
    data = load(toy, cache=cache)
    for entry in found["refreshes"]:
        assert set(entry) == {
            "generation", "counts", "lists", "candidates", "pairs_scored", "median_positive", "histogram", "likely",
            "examples", "file",
        }  # fmt: skip
        mining, denoising = {"known positive"}, {"denoising: uncertain", "denoising: promoted to positive"}
        assert set(entry["counts"]) == mining | (denoising if entry["generation"] in ("warm", "1") else set())
        assert (entry["lists"], entry["candidates"], entry["pairs_scored"]) == (10, 100, 110)
        bins = entry["histogram"]
        assert len(bins["edges"]) == len(bins["positives"]) + 1 == len(bins["negatives"]) + 1
        assert (sum(bins["positives"]), sum(bins["negatives"])) == (10, 100)
        lines = (run / entry["file"]).read_text("utf-8").splitlines()
        assert len(lines) == 1 + entry["likely"]
        assert [e["passage_id"] for e in entry["examples"]] == [line.split("\t")[2] for line in lines[1:51]]
        scores = [example["score"] for example in entry["examples"]]
        assert scores == sorted(scores, reverse=True)
        assert all(score > entry["median_positive"] for score in scores)
        for example in entry["examples"]:
            assert example["query_id"] in data.split("train")
            assert example["passage_id"] not in data.split("train")[example["query_id"]]
            assert example["text"] == data.corpus.body(data.corpus.row(example["passage_id"]))
    assert any(entry["likely"] for entry in found["refreshes"])


def judged(toy: Path, cache: Path, file: Path) -> Path:
    """Verdicts of all kinds on passages that share a word with the training query q0 ("create the bucket")."""
    assert load(toy, cache=cache).split("train")["q0"] == {"p0": 1}
    file.write_text("verdict\tquery_id\tpassage_id\npositive\tq0\tp1\ndrop\tq0\tp2\nkeep\tq0\tp3\n")
    return file


@pytest.fixture
def corrected(toy: Path, cache: Path, tiny_st: Path, tiny_ce: Path, tmp_path: Path) -> Experiment:
    return set_up(
        toy, tiny_st, tiny_ce, out=tmp_path / "run", recipe="ar2", objects=resolve_config("ar2", CONFIG), cache=cache,
        corrections=[judged(toy, cache, tmp_path / "verdicts.tsv")],
    )  # fmt: skip


def test_every_source_of_negatives_obeys_the_verdicts(corrected: Experiment) -> None:
    x = corrected
    query, positives, dropped, kept = (
        x.dataset.queries.row("q0"), x.dataset.corpus.rows(["p0", "p1"]), x.dataset.corpus.row("p2"),
        x.dataset.corpus.row("p3"),
    )  # fmt: skip
    mined = x.refresh("all", depth=64).pools
    for pools in (x.bm25_pools(50), mined):
        lists = np.flatnonzero(pools.queries == query)
        assert sorted(pools.heads[lists]) == sorted(positives)
        for row in lists:
            assert not set(pools.pool(row)) & {*positives, dropped}
            assert kept in pools.pool(row)
        others = np.flatnonzero(pools.queries != query)
        assert any(dropped in pools.pool(row) for row in others), "the verdict is about one query"
    masked = x.known_groups(np.array([query]))[0]
    assert set(masked[masked >= 0]) == set(x.dataset.corpus.groups[[*positives, dropped]])
    x.ranker.eval()
    label = {"rule": "calibrated", "negative": 0.01, "positive": 0.02, "depth": 64, "heads": 0, "label": "strict"}
    strict = x.denoise(mined, **label)
    promoted = strict.heads[strict.queries == query]
    assert dropped not in promoted
    assert kept not in promoted
    assert all(kept in strict.pool(row) for row in np.flatnonzero(strict.queries == query))
    assert x.dataset.qrels["dev"] == load(x.dataset.source).qrels["dev"]
    x.audit(x.refresh("again", depth=64))
    assert ("q0", "p3") not in {(e["query_id"], e["passage_id"]) for e in x.audits.records["again"]["examples"]}


def test_verdicts_from_the_command_line(toy: Path, cache: Path, tiny_st: Path, tiny_ce: Path, tmp_path: Path) -> None:
    """audit -> a person's verdicts -> mine and train; bad ones stop both before anything is written."""
    pair = ("--retriever", tiny_st, "--ranker", tiny_ce)
    found = call("-q", "audit", "--data", toy, *pair, "--lists", 40, "--depth", 5, "--out", tmp_path / "a")
    assert found.exit_code == 0, found.output
    assert "median positive" in found.stdout
    (entry,) = json.loads((tmp_path / "a/audit.json").read_text())["refreshes"]
    assert (entry["lists"], entry["candidates"], entry["file"]) == (40, 200, "audit/pair.tsv")
    table = tmp_path / "a/audit/pair.tsv"
    head, *rows = table.read_text("utf-8").splitlines()
    assert len(rows) == entry["likely"] > 3
    verdicts = ["positive", "drop", "keep"] + [""] * (len(rows) - 3)
    table.write_text("\n".join([head, *(v + row for v, row in zip(verdicts, rows, strict=True))]) + "\n", "utf-8")
    (positive, drop, keep) = (tuple(row.split("\t")[1:3]) for row in rows[:3])
    assert read_corrections([table], load(toy)).verdicts == {positive: "positive", drop: "drop", keep: "keep"}

    run = tmp_path / "run.trec"
    run.write_text("".join(f"q{q} Q0 p{p} 1 {64 - p} x\n" for q in range(64) for p in range(64)))
    mine = ("-q", "mine", toy, "--run", run, "--negatives", 62, "--corrections", table)
    mined = call(*mine, "--out", tmp_path / "few.jsonl")
    assert mined.exit_code == 0, mined.output
    assert "corrections: 1 positive, 1 drop, 1 keep" in mined.stdout
    whole = call(*mine[:-4], "--negatives", 61, "--corrections", table, "--out", tmp_path / "m.jsonl")
    assert whole.exit_code == 0, whole.output
    lists = [json.loads(line) for line in (tmp_path / "m.jsonl").read_text().splitlines()]
    assert positive in {(line["query"], line["positive"]) for line in lists}
    negatives = {(line["query"], passage) for line in lists for passage in line["negatives"]}
    assert not {positive, drop} & negatives
    assert keep in negatives
    refused = call(*mine, "--split", "dev", "--out", tmp_path / "dev.jsonl")
    assert refused.exit_code == 2
    assert "never changed" in refused.output

    arguments = ("-q", "train", toy, "--recipe", "separate", *pair, *settings("retriever_steps=1", "ranker_steps=1"))
    trained = call(*arguments, "--corrections", table, "--out", tmp_path / "r")
    assert trained.exit_code == 0, trained.output
    assert "corrections: 1 positive, 1 drop, 1 keep" in (tmp_path / "r/summary.md").read_text()
    assert read_corrections([tmp_path / "r/corrections.tsv"], load(toy)).verdicts == {
        positive: "positive", drop: "drop", keep: "keep",
    }  # fmt: skip
    table.write_text(table.read_text("utf-8") + "keep\tq0\tnowhere\n")
    refused = call(*arguments, "--corrections", table, "--out", tmp_path / "bad")
    assert refused.exit_code == 2
    assert f"{table}:{len(rows) + 2}" in refused.output
    assert not (tmp_path / "bad").exists()

    again = call("-q", "audit", tmp_path / "r", "--data", toy, "--lists", 3, "--out", tmp_path / "b")
    assert again.exit_code == 0, again.output
    used = call("-q", "audit", tmp_path / "r", "--data", toy, "--lists", 3, "--out", tmp_path / "b")
    assert used.exit_code == 2


@pytest.mark.long
def test_planted_positives_are_found_and_their_corrections_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One seed of benchmarks/audit.py on a smaller world. Pairs flagged at random would be right once in ten times, and
    find as small a share of the planted ones as they are of all candidates."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    benchmark = importlib.import_module("audit")
    world = benchmark.World(subjects=20, aspects=6)
    rounds = {**benchmark.CONFIG["separate"], "rounds": 1, "retriever_steps": 20, "ranker_steps": 40}
    config = {
        "run": benchmark.CONFIG["run"],
        "warmup": {**benchmark.CONFIG["warmup"], "retriever_steps": 40, "ranker_steps": 200},
        "separate": rounds,
    }
    facts = benchmark.run(0, tmp_path, "separate", config, world, arms=["positive"])
    chance = facts["planted_there"] / facts["candidates"]
    found = benchmark.Found(**facts["found"]["audit: likely"])
    assert chance < 0.15
    assert found.planted > 50
    assert found.precision > 0.4
    assert found.recall > max(0.15, 3 * found.flagged / facts["candidates"])
    arm = facts["arms"]["positive"]
    assert arm["verdicts"] == {"positive": found.right, "drop": 0, "keep": found.flagged - found.right}
    assert found.right > 20
    assert arm["in_pools"][0] == found.right, "what was judged was in the pools"
    assert arm["in_pools"][1] == 0, "corrected pairs are still mined as negatives"
