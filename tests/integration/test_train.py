"""Whole runs of every recipe on a toy help desk with a tiny real pair."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli_fixtures import write_toy
from safetensors.torch import load_file
from sentence_transformers import CrossEncoder, SentenceTransformer
from torch import Tensor

from sparring.config import build
from sparring.data import Dataset, load
from sparring.data.trec import read_run
from sparring.phases.evaluate import CASCADE, FIXED, RETRIEVER, evaluate
from sparring.recipes.competition import RECIPES, Baselines, compete, prepare
from sparring.recipes.experiment import Experiment
from sparring.recipes.settings import RunConfig
from sparring.recipes.train import Trained, resolve_config, set_up, train
from sparring.recipes.warmup import WarmupConfig
from sparring.types import InputError

pytestmark = pytest.mark.slow

MEASURES = ("RR@10", "nDCG@10", "R@20")
TURNS = {"rounds": 2, "batch": 4, "negatives": 3, "retriever_steps": 2, "ranker_steps": 2}
TURNS |= {"retriever_lr": 1e-3, "ranker_lr": 1e-3}
JOINT = {"rounds": 2, "batch": 4, "negatives": 3, "steps": 2, "retriever_lr": 1e-3, "ranker_lr": 1e-3}
JOINT |= {"denoise_negative": 0.5, "denoise_positive": 0.8, "denoise_depth": 20}
CONFIG: dict[str, dict[str, Any]] = {
    "run": {
        "mine_depth": 20, "rerank_depth": 8, "search_depth": 100, "precision": "fp32", "threads": 1,
        "measures": list(MEASURES),
    },
    "warmup": {
        "retriever_steps": 2, "retriever_batch": 8, "bm25_depth": 20, "ranker_steps": 2, "ranker_batch": 4,
        "ranker_negatives": 3, "retriever_lr": 1e-3, "ranker_lr": 1e-3,
    },
    "ar2": TURNS, "duet": TURNS, "separate": TURNS, "frozen-teacher": TURNS, "rocketqav2": JOINT,
}  # fmt: skip
"""Settings under which a run takes seconds."""

DIAGNOSTICS = {"retriever_entropy", "reward", "ranker_prefers_negative", "retriever_prefers_negative"}


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module", autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


class Watched(dict[str, int]):
    """A query's test labels. Each reading notes how many rounds the run had evaluated, or -1 before it began."""

    run = Path()
    readings: tuple[list[int], ...] = ([],)

    def _note(self) -> None:
        file = self.run / "metrics.jsonl"
        self.readings[0].append(len(records(self.run, "evaluate")) if file.exists() else -1)

    def items(self) -> Any:
        self._note()
        return super().items()

    def values(self) -> Any:
        self._note()
        return super().values()

    def __getitem__(self, key: str) -> int:
        self._note()
        return super().__getitem__(key)


@pytest.fixture(scope="module")
def trained(toy: Path, cache: Path, tiny_st: Path, tiny_ce: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """AR2 from end to end, with every reading of a test label noted."""
    out = tmp_path_factory.mktemp("runs") / "ar2"
    data = load(toy, cache=cache)
    Watched.run, Watched.readings = out, ([],)
    watched = {query: Watched(labels) for query, labels in data.split("test").items()}
    data = dataclasses.replace(data, qrels={**data.qrels, "test": watched})
    return train(data, tiny_st, tiny_ce, out=out, recipe="ar2", config=CONFIG, cache=cache, command="a command")


def records(run: Path, kind: str) -> list[dict[str, Any]]:
    """Records of one kind in metrics.jsonl."""
    return [r for r in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if r["kind"] == kind]


# --- one run from end to end --------------------------------------------------------------------------------------


def test_a_run_leaves_exactly_these_files(trained: Trained) -> None:
    found = {str(p.relative_to(trained.path)) for p in trained.path.rglob("*") if p.is_file()}
    plain = {name for name in found if not name.startswith(("runs/", "rounds/", "audit/", "retriever/", "ranker/"))}
    assert {name for name in found if name.startswith("audit/")} == {
        f"audit/{generation}.tsv" for generation in ("zero-shot", "warm", "1", "2")
    }
    assert plain == {
        "audit.json", "config.toml", "environment.json", "evidence.json", "metrics.jsonl", "report.html",
        "results.json", "summary.md",
    }  # fmt: skip
    rows = [row.replace(" ", "-") for row in (RETRIEVER, FIXED, CASCADE)]
    states = ["zero-shot", "warm-start", "round-1", "round-2"]
    runs = {f"runs/dev-{state}-{row}.trec" for state in states for row in rows}
    tested = {"zero-shot", "warm-start", trained.outcome.best.replace(" ", "-")}
    runs |= {f"runs/test-{state}-{row}.trec" for state in tested for row in rows}
    runs |= {f"runs/{split}-{row}.trec" for split in ("dev", "test") for row in ("BM25", "zero-shot-retriever")}
    assert {name for name in found if name.startswith("runs/")} == runs
    assert {name for name in found if name.startswith("rounds/")} == {f"rounds/{state}.md" for state in states[1:]}
    for model in ("retriever", "ranker"):
        assert {f"{model}/model.safetensors", f"{model}/README.md", f"{model}/tokenizer.json"} <= found
    assert not [name for name in found if name.endswith((".bin", ".pt", ".pkl", ".part"))]


def test_the_config_reads_back_and_the_environment_says_what_was_used(trained: Trained) -> None:
    written = tomllib.loads((trained.path / "config.toml").read_text())
    assert written.pop("recipe") == "ar2"
    assert build({"run": RunConfig, "warmup": WarmupConfig, "ar2": RECIPES["ar2"][0]}, ("file", written)) == (
        resolve_config("ar2", CONFIG)
    )
    assert resolve_config("ar2", trained.path / "config.toml") == resolve_config("ar2", CONFIG)
    environment = json.loads((trained.path / "environment.json").read_text())
    assert environment["command"] == "a command"
    assert environment["data"]["labelled_queries"] == {"train": 40, "dev": 12, "test": 12}
    assert (environment["data"]["passages"], environment["data"]["queries"]) == (64, 64)
    assert environment["data"]["fingerprint"]
    assert set(environment["models"]) == {"retriever", "ranker"}
    assert environment["versions"]["torch"] == torch.__version__
    assert environment["hardware"]["precision"] == ["fp32", "asked for"]
    assert environment["scoring"] == {"similarity": "cosine", "scale": 20.0}


def test_metrics_hold_terms_diagnostics_and_overlap_of_each_round(trained: Trained) -> None:
    fits = {r["phase"]: r for r in records(trained.path, "fit")}
    assert list(fits) == ["warm-retriever", "warm-ranker", "1-ranker", "1-retriever", "2-ranker", "2-retriever"]
    for k in (1, 2):
        assert {"ranker_supervised", "reward", "ranker_prefers_negative"} <= fits[f"{k}-ranker"].keys()
        assert {"adversarial", "distillation", *DIAGNOSTICS} <= fits[f"{k}-retriever"].keys()
        assert fits[f"{k}-retriever"]["reward"] < 0
        assert 0 < fits[f"{k}-retriever"]["retriever_entropy"] <= np.log(4) + 1e-6
        assert 0 <= fits[f"{k}-retriever"]["ranker_prefers_negative"] <= 1
    steps = records(trained.path, "step")
    for phase, fit in fits.items():
        own = [step for step in steps if step["phase"] == phase]
        assert len(own) == fit["steps"] == 2
        for name in set(fit) & {"adversarial", "ranker_supervised", "retriever_in_batch", "reward"}:
            assert fit[name] == pytest.approx(np.mean([step[name] for step in own]))
    overlaps = {r["generation"]: r["pool_overlap"] for r in records(trained.path, "refresh")}
    assert list(overlaps) == ["zero-shot", "warm", "1", "2"]
    assert overlaps["zero-shot"] is None
    assert all(0 <= overlaps[k] <= 1 for k in ("1", "2"))
    assert all(record["took"] >= 0 and record["peak_memory_mb"] > 0 for record in records(trained.path, "phase"))


def test_forwards_are_the_ones_of_the_budget(trained: Trained) -> None:
    """After the warm start, which all recipes share: two rounds of 2 updates on 4 lists of 4 for each model."""
    results = json.loads((trained.path / "results.json").read_text())
    expected = {"retriever_trained": 64, "ranker_trained": 64, "retriever_teacher": 0, "ranker_teacher": 64}
    assert results["forwards"] == expected
    assert "forwards after the warm start: retriever 64 trained" in (trained.path / "summary.md").read_text()


def test_results_have_the_three_rows_of_every_state_with_intervals(trained: Trained) -> None:
    results = json.loads((trained.path / "results.json").read_text())
    baselines = ["BM25", "zero-shot retriever", "zero-shot cascade"]
    states = ["warm start", "round 1", "round 2"]
    rows = [f"{state}: {row}" for state in states for row in (RETRIEVER, FIXED, CASCADE)]
    assert [row["name"] for row in results["dev"]] == baselines + rows
    tested = list(dict.fromkeys(["warm start", trained.outcome.best]))
    assert [row["name"] for row in results["test"]] == baselines + [
        f"{state}: {row}" for state in tested for row in (RETRIEVER, FIXED, CASCADE)
    ]
    for row in results["dev"] + results["test"]:
        assert row["queries"] == 12
        for measure in MEASURES:
            mean, low, high = row[measure]
            assert 0 <= low <= mean <= high <= 1
    assert results["best"] == trained.outcome.best
    assert results["sentences"] == trained.outcome.sentences()


def test_the_summary_shows_all_of_it(trained: Trained) -> None:
    text = (trained.path / "summary.md").read_text()
    for row in ("BM25", "zero-shot retriever", "zero-shot cascade", "warm start: ", "round 1: ", "round 2: "):
        assert f"| {row}" in text
    for name in ("adversarial", "distillation", "ranker_supervised", *DIAGNOSTICS):
        assert name in text
    assert re.search(r"| 2-retriever +\| +2 \|", text)
    assert re.search(r"pool before: .*1 [01]\.\d\d; 2 [01]\.\d\d", text)
    assert "read once" in text
    assert all(sentence in text for sentence in trained.outcome.sentences())
    assert any("its own retriever" in sentence for sentence in trained.outcome.sentences())


def test_runs_are_readable_and_give_the_reported_numbers(trained: Trained, toy: Path, cache: Path) -> None:
    results = {row["name"]: row for row in json.loads((trained.path / "results.json").read_text())["test"]}
    qrels = load(toy, cache=cache).split("test")
    best = trained.outcome.best
    for name, kind in [("BM25", "BM25"), *((f"{best}: {row}", f"{best}-{row}") for row in (RETRIEVER, FIXED, CASCADE))]:
        run = read_run(trained.path / "runs" / f"test-{kind}.trec".replace(" ", "-"))
        row = evaluate(name, qrels, run, MEASURES, 0)
        assert [row.mean(m) for m in MEASURES] == pytest.approx([results[name][m][0] for m in MEASURES])


def test_the_evidence_is_what_the_runs_and_labels_say(trained: Trained, toy: Path, cache: Path, tiny_st: Path) -> None:
    """Values, ranks, top passages and lengths of each test query, found again from the TREC files and the data."""
    found = json.loads((trained.path / "evidence.json").read_text())
    data = load(toy, cache=cache)
    qrels = data.split("test")
    tokenizer = SentenceTransformer(str(tiny_st), device="cpu", local_files_only=True).tokenizer
    ids = [query["id"] for query in found["queries"]]
    assert ids == sorted(qrels)
    assert found["states"] == list(dict.fromkeys(["warm start", trained.outcome.best]))
    for query in found["queries"]:
        assert query["text"] == data.queries.text(data.queries.row(query["id"]))
        assert query["length"] == len(tokenizer(query["text"], add_special_tokens=False)["input_ids"])
        assert query["labelled"] == list(qrels[query["id"]])
        assert query["script"] in ("Latin", "Hangul", "mixed (Hangul, Latin)")
    for state in found["states"]:
        for row in (RETRIEVER, FIXED, CASCADE):
            run = read_run(trained.path / "runs" / f"test-{state}-{row}.trec".replace(" ", "-"))
            expected = evaluate(row, qrels, run, MEASURES, 0).values
            for measure in MEASURES:
                assert found["values"][state][row][measure] == pytest.approx(expected[measure], abs=1e-6)
        for query, top, rank in zip(ids, found["top"][state], found["rank"][state], strict=True):
            ranking = sorted(run[query], key=lambda passage: -run[query][passage])
            assert top == ranking[:3]
            assert rank == next(n for n, passage in enumerate(ranking, 1) if passage in qrels[query])
    for passage, entry in found["passages"].items():
        assert entry["title"] == data.corpus.title(data.corpus.row(passage))
        assert entry.get("text", "how to").startswith("how to")
    first, last = (np.array(found["values"][found["states"][n]][CASCADE]["RR@10"]) for n in (0, -1))
    moved = dict(zip(ids, last - first, strict=True))
    assert set(found["improved"]) == {query for query in sorted(ids, key=lambda q: -moved[q])[:10] if moved[query] > 0}
    assert all(moved[query] < 0 for query in found["worsened"])
    for groups in found["slices"].values():
        assert sum(group["queries"] for group in groups) == len(ids)
    assert len(found["tests"]) == (9 if len(found["states"]) > 1 else 0)


def test_the_report_is_written_and_can_be_written_again(trained: Trained) -> None:
    from sparring.report import write_report

    page = (trained.path / "report.html").read_text("utf-8")
    assert "ar2 on" in page
    assert write_report(trained.path).read_text("utf-8") == page


def test_evidence_of_two_different_pairs(start: Start) -> None:
    """What is tested, chosen and named where another pair than the warm start is exported."""
    from sparring.phases.stats import paired_test
    from sparring.recipes.evidence import choose_queries, evidence

    x = start.experiment
    outcome = compete(x, "warmup", None, start.baselines)
    assert x.start is not None
    (_, table), zero = outcome.test_tables[0], x.three_rows("zero-shot", x.test, x.start).table
    outcome = dataclasses.replace(outcome, test_tables=[("warm start", table), ("zero-shot", zero)])
    found = evidence(x, outcome)
    assert found["states"] == ["warm start", "zero-shot"]
    test = next(t for t in found["tests"] if (t["row"], t["measure"]) == (RETRIEVER, "RR@10"))
    expected = paired_test(zero.row(RETRIEVER).values["RR@10"], table.row(RETRIEVER).values["RR@10"])
    assert (test["difference"], test["p_randomisation"]) == (expected.difference, expected.p_randomisation)
    moved = zero.row(CASCADE).values["RR@10"] - table.row(CASCADE).values["RR@10"]
    chosen = choose_queries(outcome.test_tables, "RR@10", 3)
    assert [moved[row] for row in chosen["improved"]] == [v for v in sorted(moved, reverse=True)[:3] if v > 0]
    assert [moved[row] for row in chosen["worsened"]] == [v for v in sorted(moved)[:3] if v < 0]
    shown = {row for rows in choose_queries(outcome.test_tables, "RR@10").values() for row in rows}
    for row, query in enumerate(found["queries"]):
        named = [*query["labelled"], *(p for state in found["states"] for p in found["top"][state][row])]
        assert all(("text" in found["passages"][passage]) for passage in named if row in shown)


def test_test_labels_are_read_once_after_the_last_round(trained: Trained) -> None:
    """Before the run they only say which queries have a positive."""
    (readings,) = Watched.readings
    assert set(readings) == {-1, 3}
    kinds = [r["kind"] for r in map(json.loads, (trained.path / "metrics.jsonl").read_text().splitlines())]
    assert kinds.count("test") == 1
    assert set(kinds[kinds.index("test") + 1 :]) <= {"phase"}


def test_the_exported_folders_load_plainly(trained: Trained) -> None:
    retriever = SentenceTransformer(str(trained.path / "retriever"), device="cpu", local_files_only=True)
    ranker = CrossEncoder(str(trained.path / "ranker"), device="cpu", local_files_only=True)
    texts = ["delete the bucket", "비밀번호 어떻게"]
    np.testing.assert_allclose(retriever.encode_query(texts), trained.retriever.encode_query(texts), atol=1e-5)
    pairs = [(texts[0], texts[1]), (texts[1], texts[0])]
    np.testing.assert_allclose(ranker.predict(pairs), trained.ranker.predict(pairs), atol=1e-5)
    card = (trained.path / "retriever" / "README.md").read_text()
    assert all(word in card for word in ("ar2", "a command", "RR@10"))


def test_a_used_folder_is_refused_before_anything_is_written(
    trained: Trained, toy: Path, cache: Path, tiny_st: Path, tiny_ce: Path
) -> None:
    before = {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in trained.path.rglob("*")}
    with pytest.raises(InputError, match="already used"):
        train(toy, tiny_st, tiny_ce, out=trained.path, recipe="separate", config=CONFIG, cache=cache)
    assert before == {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in trained.path.rglob("*")}


def test_objects_go_in_and_come_out(toy: Path, cache: Path, tiny_st: Path, tiny_ce: Path, tmp_path: Path) -> None:
    """Real objects, two towers, gradient caching; the objects handed in are the ones trained where they can be."""
    retriever = SentenceTransformer(str(tiny_st), device="cpu", local_files_only=True)
    ranker = CrossEncoder(str(tiny_ce), device="cpu", local_files_only=True)
    config = {**CONFIG, "run": {**CONFIG["run"], "two_towers": True, "gradient_cache": True}}
    done = train(
        toy, retriever, ranker, out=tmp_path / "run", recipe="rocketqav2", config=config, cache=cache,
        assignments=["rounds=1", "select_by=nDCG@10"],
    )  # fmt: skip
    assert isinstance(done.retriever, SentenceTransformer)
    assert done.ranker is ranker
    weights = load_file(tmp_path / "run" / "ranker" / "model.safetensors")
    assert all(value.dtype == torch.float32 for value in weights.values())
    towers = sorted((tmp_path / "run" / "retriever").rglob("model.safetensors"))
    assert len(towers) == 2
    first, second = map(load_file, towers)
    assert done.outcome.best == "warm start" or any(not torch.equal(first[k], second[k]) for k in first)
    assert json.loads((tmp_path / "run" / "results.json").read_text())["select_by"] == "nDCG@10"


# --- every recipe from one warm start -----------------------------------------------------------------------------


@dataclasses.dataclass
class Start:
    """An experiment after its warm start."""

    experiment: Experiment
    baselines: Baselines


@pytest.fixture(scope="module")
def start(toy: Path, cache: Path, tiny_st: Path, tiny_ce: Path, tmp_path_factory: pytest.TempPathFactory) -> Start:
    return begin(toy, cache, tiny_st, tiny_ce, tmp_path_factory.mktemp("start") / "run")


def begin(data: Path | Dataset, cache: Path, retriever: Path, ranker: Path, out: Path, seed: int = 0) -> Start:
    config = {**CONFIG, "run": {**CONFIG["run"], "seed": seed}}
    objects = resolve_config("ar2", config)
    x = set_up(data, retriever, ranker, out=out, recipe="ar2", objects=objects, cache=cache)
    return Start(x, prepare(x, objects["warmup"]))


VARIANTS: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "warmup": ("warmup", {}, []),
    "ar2 official": ("ar2", {}, ["1-ranker", "1-retriever", "2-ranker", "2-retriever"]),
    "ar2 paper": (
        "ar2", {"order": "paper", "variant": "paper"}, ["1-retriever", "1-ranker", "2-retriever", "2-ranker"],
    ),
    "ar2 to the letter": (
        "ar2", {"variant": "official", "sampling": "simans", "accumulate": 2},
        ["1-ranker", "1-retriever", "2-ranker", "2-retriever"],
    ),
    "rocketqav2 official": ("rocketqav2", {"variant": "official"}, ["1-joint", "2-joint"]),
    "rocketqav2 paper": ("rocketqav2", {"variant": "paper", "lists": "denoised"}, ["1-joint", "2-joint"]),
    "rocketqav2 custom": (
        "rocketqav2", {"variant": "custom", "kl_direction": "ce_de", "kl_reduction": "query_mean", "refresh": True},
        ["1-joint", "2-joint"],
    ),
    "rocketqav2 static": ("rocketqav2", {"static": True}, ["1-joint", "2-joint"]),
    "rocketqav2 pointwise": ("rocketqav2", {"supervised": "pointwise"}, ["1-joint", "2-joint"]),
    "rocketqav2 undenoised": ("rocketqav2", {"lists": "undenoised"}, ["1-joint", "2-joint"]),
    "duet": ("duet", {}, ["1-ranker", "1-retriever", "2-ranker", "2-retriever"]),
    "separate": ("separate", {}, ["1-ranker", "1-retriever", "2-ranker", "2-retriever"]),
    "frozen-teacher": ("frozen-teacher", {}, ["teacher", "1-retriever", "2-retriever"]),
}  # fmt: skip
"""Name -> recipe, settings, training phases in order."""


def weights_of(x: Experiment) -> dict[str, Tensor]:
    return {f"{n} {k}": v.clone() for n, m in x._models().items() for k, v in m.state_dict().items()}


def run_variant(start: Start, recipe: str, options: dict[str, Any]) -> list[dict[str, Any]]:
    """Run a recipe from the warm start; its new records in the metrics."""
    x = start.experiment
    seen = len(x.run.metrics.records)
    config = None if recipe == "warmup" else RECIPES[recipe][0](**{**CONFIG[recipe], **options})
    outcome = compete(x, recipe, config, start.baselines)
    states = ["warm start, fused"] if recipe == "duet" else []
    assert [name for name, _ in outcome.dev_tables] == [
        "warm start", *states, *(["round 1", "round 2"] if config else [])
    ]  # fmt: skip
    return x.run.metrics.records[seen:]


@pytest.mark.parametrize("name", VARIANTS)
def test_every_recipe_runs_its_phases_and_logs_its_diagnostics(name: str, start: Start) -> None:
    recipe, options, phases = VARIANTS[name]
    found = run_variant(start, recipe, options)
    fits = [r for r in found if r["kind"] == "fit"]
    assert [r["phase"] for r in fits] == phases
    for k in {phase.split("-")[0] for phase in phases} - {"teacher"}:
        logged = {key for r in fits if r["phase"].startswith(f"{k}-") for key in r}
        expected = DIAGNOSTICS if recipe != "frozen-teacher" else DIAGNOSTICS | {"kl"}
        assert expected <= logged, f"round {k}"
    refreshes = [r for r in found if r["kind"] == "refresh"]
    assert [r["generation"] for r in refreshes] == (["1", "2"] if phases else [])
    assert all(0 <= r["pool_overlap"] <= 1 for r in refreshes)
    denoised = [r for r in found if r["kind"] == "denoise"]
    wanted = 0 if recipe != "rocketqav2" or options.get("lists") == "undenoised" else 2 if options.get("refresh") else 1
    assert len(denoised) == wanted


def test_duet_exports_a_pair_whose_cascade_orders_by_both_scores(
    toy: Path, cache: Path, tiny_st: Path, tiny_ce: Path, tmp_path: Path
) -> None:
    """The test run's order, made again with plain sentence-transformers objects from the exported folders."""
    found = train(toy, tiny_st, tiny_ce, out=tmp_path / "run", recipe="duet", config=CONFIG, cache=cache)
    results = json.loads((found.path / "results.json").read_text())
    assert results["fusion"] == 1.0
    assert found.outcome.best != "warm start", "else there is nothing to see here: take another seed"
    assert "The cascade orders by ranker logit + 20 x similarity" in results["sentences"][-1]
    assert "logits + 20 * similarity" in (found.path / "ranker" / "README.md").read_text()
    data = load(toy, cache=cache)
    retriever = SentenceTransformer(str(found.path / "retriever"), device="cpu")
    ranker = CrossEncoder(str(found.path / "ranker"), device="cpu")
    state = found.outcome.best.replace(" ", "-")
    runs = {k: read_run(found.path / "runs" / f"test-{state}-{k}.trec") for k in ("retriever", "cascade")}
    moved = 0
    for query, ranking in runs["retriever"].items():
        top = list(ranking)[:8]
        texts = [data.corpus.text(data.corpus.row(p)) for p in top]
        text = data.queries.text(data.queries.row(query))
        similar = retriever.similarity(retriever.encode_query([text]), retriever.encode_document(texts))[0].numpy()
        logits = ranker.predict([(text, p) for p in texts], activation_fn=torch.nn.Identity())
        both = dict(zip(top, logits + 20 * similar, strict=True))
        ordered = list(runs["cascade"][query])[:8]
        assert set(ordered) == set(top)
        assert all(both[a] >= both[b] - 1e-3 for a, b in itertools.pairwise(ordered))
        moved += ordered != [p for _, p in sorted(zip(-logits, top, strict=True))]
    assert moved, "the ranker alone orders otherwise somewhere"


def test_the_static_ablation_leaves_the_ranker_as_it_is(start: Start) -> None:
    x = start.experiment
    x.restore("warm start")
    before = weights_of(x)
    config = RECIPES["rocketqav2"][0](**{**JOINT, "static": True, "lists": "undenoised"})
    RECIPES["rocketqav2"][1](x, config, start.baselines.warm)
    after = weights_of(x)
    moved = {key.split()[0] for key in before if not torch.equal(before[key], after[key])}
    assert moved == {"retriever"}


@pytest.mark.parametrize("rate", [1e-3, 0.3], ids=["learns", "wrecked"])
def test_the_best_pair_by_the_cascade_on_dev_is_kept(rate: float, start: Start) -> None:
    x = start.experiment
    run_variant(start, "separate", {"retriever_lr": rate, "ranker_lr": rate, "warmup": 0.0})
    cascades = [table.row(CASCADE).mean("RR@10") for _, table in x.tables]
    best = int(np.argmax(cascades))
    assert x.best is not None
    assert (x.best[0], x.best[1]) == (x.tables[best][0], cascades[best])
    again = x.three_rows("again", x.dev, x.best[2]).table
    assert again.cells() == x.tables[best][1].cells(), "the weights are not those that were evaluated"


def test_lists_longer_than_every_pool_are_refused(start: Start) -> None:
    with pytest.raises(InputError, match="no candidate list can be drawn"):
        run_variant(start, "ar2", {"negatives": 63})


def test_a_seed_decides_every_bit(toy: Path, cache: Path, tiny_st: Path, tiny_ce: Path, tmp_path: Path) -> None:
    found = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        begun = begin(toy, cache, tiny_st, tiny_ce, tmp_path / name, seed)
        x = begun.experiment
        x.team(retriever=(cfg := RECIPES["rocketqav2"][0](**JOINT)).rates(1e-3, 2), ranker=cfg.rates(1e-3, 2))
        RECIPES["rocketqav2"][1](x, cfg, begun.baselines.warm)
        found.append(weights_of(x))
    assert all(torch.equal(found[0][key], found[1][key]) for key in found[0])
    assert any(not torch.equal(found[0][key], found[2][key]) for key in found[0])


def test_no_train_labels(toy: Path, cache: Path, tiny_st: Path, tiny_ce: Path, tmp_path: Path) -> None:
    data = load(toy, cache=cache)
    data = dataclasses.replace(data, qrels={name: q for name, q in data.qrels.items() if name != "train"})
    with pytest.raises(InputError, match="train") as caught:
        train(data, tiny_st, tiny_ce, out=tmp_path / "run", config=CONFIG, cache=cache)
    assert "dev" in str(caught.value)
    assert not (tmp_path / "run").exists()
