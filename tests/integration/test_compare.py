"""Whole comparisons on a toy help desk with a tiny pair: shared warm start, resume, equal budgets, the shipped pair."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_fixtures import write_toy
from safetensors.torch import load_file
from sentence_transformers import CrossEncoder, SentenceTransformer
from test_train import CONFIG

from forms import marked
from sparring.distributed import Choice
from sparring.files import DiskError, Lock
from sparring.phases.fit import NotFinite
from sparring.recipes import compare as module
from sparring.recipes import competition, experiment, train
from sparring.recipes.compare import compare
from sparring.recipes.comparison import Comparison
from sparring.recipes.store import load_rows
from sparring.types import InputError

pytestmark = pytest.mark.slow
ARMS = "separate,ar2,rocketqav2:lists=undenoised"


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory, tiny_st: Path, tiny_ce: Path) -> dict[str, Any]:
    """Arguments of every comparison here."""
    return {
        "data": write_toy(tmp_path_factory.mktemp("toy")), "retriever": tiny_st, "ranker": tiny_ce,
        "cache": tmp_path_factory.mktemp("cache"), "config": CONFIG, "recipes": ARMS, "seeds": 2, "budget": 64,
        "trials": 2,
    }  # fmt: skip


@pytest.fixture(scope="module")
def whole(start: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Comparison]:
    out = tmp_path_factory.mktemp("whole") / "compared"
    return out, compare(**start, out=out, command="a command")


def arms(out: Path) -> dict[str, tuple[list[Any], dict[str, Any]]]:
    """What every arm of every seed left, by its folder."""
    return {f"{p.parent.parent.name}/{p.parent.name}": load_rows(p) for p in sorted(out.glob("seed-*/*/arm.npz"))}


def evidence(arm: Path) -> tuple[list[str], list[tuple[str, str]]]:
    """An arm's files but the page, which some tests do without, and what its metrics record, in order."""
    records = [json.loads(line) for line in (arm / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    files = sorted(str(path.relative_to(arm)) for path in arm.rglob("*") if path.is_file())
    files = [name for name in files if name != "report.html"]
    return files, [(r["kind"], str(r.get("name") or r.get("phase"))) for r in records]


def assert_same(one: Path, other: Path) -> None:
    """Every number of two comparisons, bit for bit, times and memory aside."""
    a, b = arms(one), arms(other)
    assert a.keys() == b.keys()
    for name in a:
        for mine, theirs in zip(evidence(one / name), evidence(other / name), strict=True):
            assert mine == theirs, name
        timed = ("seconds", "peak_memory_mb", "files", "warm")  # the last two are digests of files that have times
        assert {k: v for k, v in a[name][1].items() if k not in timed} == {
            k: v for k, v in b[name][1].items() if k not in timed
        }
        for row, twin in zip(a[name][0], b[name][0], strict=True):
            assert row.name == twin.name
            assert all(np.array_equal(row.values[m], twin.values[m]) for m in row.values)
        for model in ("retriever", "ranker"):
            weights = [load_file(out / name / "states" / "best" / f"{model}.safetensors") for out in (one, other)]
            assert all(bool((weights[0][key] == weights[1][key]).all()) for key in weights[0])


def test_every_arm_of_every_seed_is_trained_on_the_budget(whole: tuple[Path, Comparison]) -> None:
    found = arms(whole[0])
    folders = ("ar2", "rocketqav2-lists=undenoised", "separate")
    assert list(found) == [f"seed-{seed}/{arm}" for seed in (0, 1) for arm in folders]
    for _, facts in found.values():
        assert (facts["forwards"]["retriever_trained"], facts["forwards"]["ranker_trained"]) == (64, 64)
        assert facts["peak_memory_mb"] > 100
    assert found["seed-0/ar2"][1]["forwards"]["ranker_teacher"] == 64
    assert found["seed-0/separate"][1]["forwards"]["ranker_teacher"] == 0


def test_arms_of_a_seed_share_its_warm_start_and_seeds_do_not(whole: tuple[Path, Comparison]) -> None:
    found = arms(whole[0])
    count = found["seed-0/ar2"][1]["references"]

    def warm(name: str) -> list[float]:
        return [float(v) for row in found[name][0][count : count + 3] for v in row.values["nDCG@10"]]

    assert warm("seed-0/ar2") == warm("seed-0/separate") == warm("seed-0/rocketqav2-lists=undenoised")
    assert warm("seed-0/ar2") != warm("seed-1/ar2")


@pytest.mark.usefixtures("unshipped")
def test_an_arm_alone_gives_what_it_gives_among_others(
    whole: tuple[Path, Comparison], start: dict[str, Any], tmp_path: Path
) -> None:
    """No state leaks from one arm into the next: the last arm of the whole is the only one here."""
    out = tmp_path / "alone"
    compare(**{**start, "recipes": "rocketqav2:lists=undenoised"}, out=out)
    mine, whole_arms = arms(out), arms(whole[0])
    assert len(mine) == 2
    for name, (rows, _) in mine.items():
        assert all(np.array_equal(a.values[m], b.values[m])
                   for a, b in zip(rows, whole_arms[name][0], strict=True) for m in a.values)  # fmt: skip


def test_the_learning_rates_were_tried_on_dev_alone(whole: tuple[Path, Comparison]) -> None:
    out, result = whole
    assert sorted(p.name for p in (out / "tuning").iterdir()) == [
        "ar2.json", "rocketqav2-lists=undenoised.json", "separate.json",
    ]  # fmt: skip
    for arm in result.results:
        tried = result.evidence.tuning[arm.arm.name]
        assert [trial["factor"] for trial in tried] == [1.0, 0.5]
        assert arm.factor == max(tried, key=lambda trial: trial["dev"])["factor"]
        assert arm.settings["retriever_lr"] == pytest.approx(1e-3 * arm.factor)
        chosen = next(t["dev"] for t in tried if t["factor"] == arm.factor)
        assert arm.dev[0] == chosen, "the first seed is the one that was tuned on"


class Tuned(Exception):
    """The comparison came as far as its first arm."""


def test_every_arm_has_the_runs_of_all_its_rows(whole: tuple[Path, Comparison]) -> None:
    for arm in arms(whole[0]):
        names = {path.name for path in (whole[0] / arm / "runs").iterdir()}
        assert {"test-BM25.trec", "test-zero-shot-cascade.trec", "test-warm-start-cascade.trec"} <= names


def test_tuning_evaluates_dev_alone(start: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    three_rows, evaluate = experiment.three_rows, competition.evaluate

    def seen(qrels: Any, function: Any, *args: Any, **options: Any) -> Any:
        read.append("test" if qrels is labels["test"] else "dev" if qrels is labels["dev"] else "another")
        return function(*args, **options)

    labels: dict[str, Any] = {}
    splits = train.choose_splits

    def chosen(*args: Any) -> Any:
        found = splits(*args)
        labels.update((split.name, split.qrels) for split in found)
        return found

    def stop(*_: Any) -> None:
        raise Tuned

    monkeypatch.setattr(train, "choose_splits", chosen)
    monkeypatch.setattr(experiment, "three_rows", lambda q, *a, **o: seen(q, three_rows, q, *a, **o))
    monkeypatch.setattr(competition, "evaluate", lambda n, q, *a: seen(q, evaluate, n, q, *a))
    monkeypatch.setattr(module, "train_arm", stop)
    with pytest.raises(Tuned):
        compare(**{**start, "seeds": 1, "recipes": "separate"}, out=tmp_path / "compared")
    assert set(read) == {"dev"}
    assert len(read) >= 2 + 2 * 2  # BM25 and zero-shot, the warm start, and a round or more of each of two trials


def test_the_shipped_pair_is_two_plain_folders(whole: tuple[Path, Comparison]) -> None:
    out, result = whole
    retriever, ranker = SentenceTransformer(str(out / "best" / "retriever")), CrossEncoder(str(out / "best" / "ranker"))
    shipped = result.shipped
    kept = out / f"seed-{shipped.seed}" / shipped.arm.folder / "states" / "best"
    exported = load_file(out / "best" / "retriever" / "model.safetensors")
    trained = load_file(kept / "retriever.safetensors")
    for key, value in exported.items():
        (twin,) = (v for k, v in trained.items() if k == key or k.endswith("." + key))
        assert bool((twin == value).all()), key
    assert retriever.encode(["password reset"]).shape == (1, 32)
    assert ranker.predict([("password reset", "reset a user")]).shape == (1,)
    told = json.loads((out / "comparison.json").read_text())
    assert told["command"] == "a command"
    assert told["verdict"]["ship"]["arm"] == shipped.arm.name
    assert (out / "comparison.md").read_text() == result.text(markdown=True)
    for page in (out / "report.html", out / "seed-0" / "ar2" / "report.html"):
        assert "<html" in page.read_text()[:200]
    assert all(sentence.split(":")[0] in (out / "report.html").read_text() for sentence in result.sentences[:1])


@pytest.fixture
def unshipped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the export and the pages out, which take longer than the training here."""
    monkeypatch.setattr(module, "ship", lambda *_: None)
    monkeypatch.setattr(module, "write_report", lambda *_: None)


class Stop(Exception):
    """Where a test cuts a comparison off."""


@pytest.mark.usefixtures("unshipped")
@pytest.mark.parametrize("cut", [1, 7])
def test_a_comparison_goes_on_where_it_stopped(
    cut: int, whole: tuple[Path, Comparison], start: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut off inside the n-th training of an arm (trials included), then the same command: the same bits."""
    out = tmp_path / "cut"
    real, calls = module.contend, iter(range(100))

    def cut_off(x: Any, *args: Any) -> None:
        if next(calls) == cut:
            x.run.write_text("half", "a file that an unfinished arm left")
            raise Stop
        real(x, *args)

    monkeypatch.setattr(module, "contend", cut_off)
    with pytest.raises(Stop):
        compare(**start, out=out)
    monkeypatch.setattr(module, "contend", real)
    done = {p: p.stat().st_mtime_ns for p in out.glob("seed-*/*/arm.npz")}
    compare(**start, out=out)
    assert_same(out, whole[0])
    assert all(p.stat().st_mtime_ns == before for p, before in done.items()), "a finished arm was trained again"


def cut_in_fit(start: dict[str, Any], out: Path, number: int, patch: pytest.MonkeyPatch) -> list[str]:
    """Cut a comparison off in its n-th training phase.  -> the labels of all that begin, then and later"""
    real, begun = experiment.fit, []

    def fit(*args: Any, **options: Any) -> Any:
        begun.append(options["label"])
        if len(begun) == number:
            raise Stop
        return real(*args, **options)

    patch.setattr(experiment, "fit", fit)
    with pytest.raises(Stop):
        compare(**start, out=out)
    return begun


def made(folder: Path, arguments: dict[str, Any]) -> tuple[dict[str, Any], Path]:
    """The arguments, and what the comparison leaves that nothing stopped."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "ship", lambda *_: None)
        compare(**arguments, out=folder / "compared")
    return arguments, folder / "compared"


@pytest.fixture(scope="module")
def small(start: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """Arguments of a comparison of one arm and one seed, and what it leaves."""
    return made(tmp_path_factory.mktemp("small"), {**start, "recipes": "separate", "seeds": 1})


CHANGED = marked(
    ["checkpoint", "settings", "journal.jsonl", "journal", "metrics.jsonl"], short=("checkpoint", "settings")
)
"""What of an unfinished arm is damaged or changed."""
SECOND_ROUND = 5
"""The first phase of a comparison's first trial's second round: after two of the warm start, two of the first round."""


@pytest.mark.usefixtures("unshipped")
@pytest.mark.parametrize(("number", "where"), [(SECOND_ROUND, "tuning/separate-1"), (13, "seed-0/separate")])
def test_an_unfinished_arm_goes_on(
    number: int, where: str, small: tuple[dict[str, Any], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a trial and in an arm: the phase that was cut off is the first that is trained again, and the bits are the
    same; nothing that served to go on is left."""
    out = tmp_path / "cut"
    begun = cut_in_fit(small[0], out, number, monkeypatch)
    assert (out / where / "journal.jsonl").is_file()
    compare(**small[0], out=out)
    assert begun[number] == begun[number - 1] != begun[number - 2], begun
    assert_same(out, small[1])


@pytest.mark.usefixtures("unshipped")
@pytest.mark.parametrize("changed", CHANGED)
def test_an_unfinished_arm_that_cannot_go_on_begins_again(
    changed: str, small: tuple[dict[str, Any], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Damaged files of it, or another configuration, do not stand in the way of a comparison."""
    out = tmp_path / "cut"
    trial = out / "tuning" / "separate-1"
    if changed == "settings":
        begun = cut_in_fit({**small[0], "budget": 128}, out, SECOND_ROUND, monkeypatch)
    else:
        begun = cut_in_fit(small[0], out, SECOND_ROUND, monkeypatch)
        file = trial / changed
        file = max(file.glob("*.[sn]*"), key=lambda path: path.stat().st_size) if file.is_dir() else file
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 255
        file.write_bytes(content)
    compare(**small[0], out=out)
    assert begun[SECOND_ROUND] == "1-ranker"
    assert_same(out, small[1])


@pytest.mark.usefixtures("unshipped")
@pytest.mark.parametrize("refused", ["a write", "a read"])
def test_an_arm_that_goes_on_into_a_bad_disk_keeps_what_it_has(
    refused: str, small: tuple[dict[str, Any], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One error; nothing is trained again once the disk is well."""
    out = tmp_path / "cut"
    begun = cut_in_fit(small[0], out, SECOND_ROUND, monkeypatch)
    real = Path.read_bytes

    def read(path: Path) -> bytes:
        if path.name == "checkpoint.json":
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return real(path)

    with monkeypatch.context() as patch:
        if refused == "a read":
            patch.setattr(Path, "read_bytes", read)
        else:
            patch.setattr(experiment, "fit", lambda *_, **__: (_ for _ in ()).throw(DiskError("the disk is full")))
        with pytest.raises(DiskError):
            compare(**small[0], out=out)
    compare(**small[0], out=out)
    assert begun[SECOND_ROUND] == "2-ranker"
    assert_same(out, small[1])


READING = marked(["zero-shot rows", "best gone", "results", "best damaged"], short=("zero-shot rows", "best gone"))
"""Where in the reading of test an arm is cut, and what of its best weights is lost by then."""


@pytest.fixture(scope="module")
def two(start: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """Arguments of a comparison of two arms without trials, and what it leaves."""
    return made(tmp_path_factory.mktemp("two"), {**start, "recipes": "separate,ar2", "seeds": 1, "trials": 1})


@pytest.mark.usefixtures("unshipped")
@pytest.mark.parametrize("at", READING)
def test_an_arm_cut_while_test_is_read(
    at: str, two: tuple[dict[str, Any], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is trained again but where the best weights are not as they were; the next arm has all files, too."""
    out, real = tmp_path / "cut", experiment.fit
    begun: list[str] = []
    monkeypatch.setattr(experiment, "fit", lambda *a, **k: (begun.append(k["label"]), real(*a, **k))[1])

    def cut(*_: Any, **__: Any) -> None:
        raise Stop

    with monkeypatch.context() as patch:
        if at == "zero-shot rows":
            rows = competition.zero_shot_rows
            patch.setattr(
                competition, "zero_shot_rows", lambda x, split, it: (rows if split is x.dev else cut)(x, split, it)
            )
        else:
            patch.setattr(module, "write_results", cut)
        with pytest.raises(Stop):
            compare(**two[0], out=out)
    best = out / "seed-0" / "separate" / "states" / "best"
    if at == "best damaged":
        weights = bytearray((best / "ranker.safetensors").read_bytes())
        weights[-9] ^= 1
        (best / "ranker.safetensors").write_bytes(weights)
    elif at == "best gone":
        shutil.rmtree(best)
    cut_at = len(begun)
    compare(**two[0], out=out)
    again = begun[cut_at:]
    assert len(again) == (4 if at.endswith("rows") or at == "results" else 8), again
    assert_same(out, two[1])


@pytest.mark.usefixtures("unshipped")
def test_an_unfinished_warm_start_goes_on(
    whole: tuple[Path, Comparison], start: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, real = tmp_path / "cut", module.prepare
    trained: list[str] = []
    real_fit = experiment.fit
    monkeypatch.setattr(experiment, "fit", lambda *a, **k: (trained.append(k["label"]), real_fit(*a, **k))[1])

    def cut_off(x: Any, config: Any) -> Any:
        real(x, config)
        raise Stop

    monkeypatch.setattr(module, "prepare", cut_off)
    with pytest.raises(Stop):
        compare(**start, out=out)
    monkeypatch.setattr(module, "prepare", real)
    assert trained == ["warm-retriever", "warm-ranker"]
    compare(**start, out=out)
    assert_same(out, whole[0])
    assert trained.count("warm-retriever") == 2, "once for each seed"
    assert {p.name for p in (out / "seed-0" / "shared").iterdir()} == {
        p.name for p in (whole[0] / "seed-0" / "shared").iterdir()
    }


@pytest.mark.usefixtures("unshipped")
def test_a_process_killed_right_after_the_warm_start_leaves_nothing_of_it(
    whole: tuple[Path, Comparison], start: dict[str, Any], tmp_path: Path
) -> None:
    """What is there while a warm start is made is cleared away by the process that takes it up."""
    out = tmp_path / "cut"
    shutil.copytree(whole[0], out)
    shared = out / "seed-1" / "shared"
    for name in ("journal", "checkpoint", "index"):
        (shared / name).mkdir()
        (shared / name / "large").write_text("x")
    for name in ("journal.jsonl", ".lock"):
        (shared / name).touch()
    shutil.rmtree(out / "seed-1" / "ar2")
    compare(**start, out=out)
    assert_same(out, whole[0])
    assert {p.name for p in shared.iterdir()} == {p.name for p in (whole[0] / "seed-1" / "shared").iterdir()}


@pytest.mark.usefixtures("unshipped")
def test_arms_and_seeds_can_be_added_to_a_comparison(
    whole: tuple[Path, Comparison], start: dict[str, Any], tmp_path: Path
) -> None:
    out = tmp_path / "grown"
    compare(**{**start, "recipes": "separate", "seeds": 1}, out=out)
    result = compare(**start, out=out)
    assert_same(out, whole[0])
    assert [(t.arm, t.row, t.p_holm) for t in result.tests] == [(t.arm, t.row, t.p_holm) for t in whole[1].tests]


def test_other_settings_are_refused_by_name(
    whole: tuple[Path, Comparison], start: dict[str, Any], tmp_path: Path
) -> None:
    out = tmp_path / "copy"
    shutil.copytree(whole[0], out)
    for changed, named in (
        ({"assignments": ["warmup.ranker_lr=2e-3"]}, "warmup.ranker_lr: there 0.001, here 0.002"),
        ({"assignments": ["run.rerank_depth=9"]}, "run.rerank_depth: there 8, here 9"),
        ({"budget": 128}, "retriever_steps: there 2, here 4"),
    ):
        with pytest.raises(InputError) as error:
            compare(**{**start, **changed}, out=out)
        assert named in str(error.value)
    for name, value, key in (("choose_device", "cuda", "device"), ("choose_precision", "bf16", "precision")):
        with pytest.MonkeyPatch.context() as patch:  # another machine, on which "auto" means something else
            patch.setattr(module, name, lambda *_, value=value: Choice("", value, ""))
            with pytest.raises(InputError) as error:
                compare(**start, out=out)
            assert f"{key}: there " in str(error.value)
            assert f"here {value!r}" in str(error.value)
    damaged = out / "seed-0" / "ar2" / "arm.npz"
    damaged.write_bytes(damaged.read_bytes()[:200])
    with pytest.raises(InputError, match="cannot be read"):
        compare(**start, out=out)


@pytest.mark.parametrize(
    ("changed", "named"),
    [({"recipes": "separate,ar3"}, "--recipes"), ({"seeds": 0}, "--seeds"), ({"trials": 6}, "--trials"),
     ({"budget": -1}, "--budget"), ({"budget": 100}, "--budget"), ({"baseline": "ar2:x"}, "--baseline"),
     ({"retriever": "no/such/folder"}, "no/such/folder"), ({"assignments": ["run.test_split=dev"]}, "split"),
     ({"assignments": ["run.measures=['RR@10','R@500']"]}, "R@500"),
     ({"assignments": ["ar2.negatives=31"], "budget": 512}, "negatives"),
     ({"assignments": ["ar2.adv=1"]}, "adv"), ({"recipes": "ar2:adv_lambda=2"}, "adv_lambda")],
)  # fmt: skip
def test_bad_arguments_are_refused_before_anything_is_written(
    changed: dict[str, Any], named: str, start: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(InputError) as error:
        compare(**{**start, **changed}, out=tmp_path / "new")
    assert named in str(error.value)
    assert not (tmp_path / "new").exists()


def test_a_second_process_on_a_comparison_is_refused(whole: tuple[Path, Comparison], start: dict[str, Any]) -> None:
    held = Lock(whole[0])
    with pytest.raises(InputError, match="another process"):
        compare(**start, out=whole[0])
    held.close()


def test_a_launcher_of_several_processes_is_refused(
    start: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="one process"):
        compare(**start, out=tmp_path / "new")


@pytest.mark.usefixtures("unshipped")
def test_a_learning_rate_that_diverges_is_not_taken(
    start: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = module.contend

    def diverge(x: Any, recipe: str, config: Any, baselines: Any) -> None:
        if config.retriever_lr == 1e-3:
            raise NotFinite("the loss is not finite")
        real(x, recipe, config, baselines)

    monkeypatch.setattr(module, "contend", diverge)
    result = compare(**{**start, "recipes": "separate", "seeds": 1}, out=tmp_path / "new")
    assert [trial["dev"] is None for trial in result.evidence.tuning["separate"]] == [True, False]
    assert result.result("separate").factor == 0.5
    assert "diverged" in result.text()


def test_a_folder_with_other_files_is_refused(start: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match="already used"):
        compare(**start, out=tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]
