"""A damaged file of a run, a comparison or the cache is made again or refused by name, and never used.

Every kind of file is cut and has a bit flipped, then the same command goes on; it must end as the undamaged one did, or
with an `InputError` that names the file.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli_fixtures import write_toy
from kill_worker import save_weights
from test_resume import SETTINGS, Cut, assert_same
from test_train import CONFIG

from sparring.files import Lock
from sparring.recipes import compare as compare_module
from sparring.recipes import train as train_module
from sparring.recipes.compare import compare
from sparring.recipes.experiment import Progressed
from sparring.recipes.standalone import encode_to, export_to, index_to, search_to
from sparring.recipes.store import load_rows
from sparring.recipes.train import train
from sparring.types import InputError

pytestmark = pytest.mark.slow
DAMAGES = ("cut", "flip")


def spoil(path: Path, damage: str) -> None:
    content = bytearray(path.read_bytes())
    assert content, f"{path} is empty"
    content[len(content) // 2] ^= 4
    path.write_bytes(content if damage == "flip" else content[: len(content) // 2])


@pytest.fixture(scope="module")
def quick() -> Iterator[None]:
    """Without the export and the pages, which take longer than the training here."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (train_module, compare_module):
            at: Any = module
            patch.setattr(at, "export", save_weights)
            patch.setattr(at, "write_report", lambda _: None)
        yield


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory, tiny_st: Path, tiny_ce: Path) -> dict[str, Any]:
    return {
        "data": str(write_toy(tmp_path_factory.mktemp("toy"))), "retriever": str(tiny_st), "ranker": str(tiny_ce),
        "cache": str(tmp_path_factory.mktemp("cache")), "config": CONFIG, "command": "a command",
    }  # fmt: skip


# --- a stopped run ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(start: dict[str, Any], quick: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "run"
    train(**start, recipe="ar2", assignments=SETTINGS, out=out)
    return out


@pytest.fixture(scope="module")
def stopped(start: dict[str, Any], quick: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that stopped in its second round's ranker phase."""
    out, real = tmp_path_factory.mktemp("stopped") / "run", Progressed.ended

    def cut(self: Progressed, *reached: Any, **options: Any) -> None:
        real(self, *reached, **options)
        if self.x.run.metrics.records[-1]["phase"] == "2-ranker":
            raise Cut

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Progressed, "ended", cut)
        with pytest.raises(Cut):
            train(**start, recipe="ar2", assignments=SETTINGS, out=out)
    return out


RUN_FILES = (
    "journal.jsonl", "metrics.jsonl", "checkpoint/checkpoint.json", "checkpoint/checkpoint-*.safetensors",
    "journal/*-warm.npz", "journal/*-bm25-*.npz", "journal/*-dev-warm-start.npz", "states/best/retriever.safetensors",
    "states/warm start/ranker.safetensors", "states/zero-shot/ranker.safetensors", "runs/dev-warm-start-cascade.trec",
    "runs/dev-BM25.trec", "audit/warm.tsv", "audit.json", "environment.json", "config.toml", "rounds/warm-start.md",
)  # fmt: skip


def test_every_kind_of_file_of_a_stopped_run_is_tried(stopped: Path) -> None:
    known = {path for pattern in RUN_FILES for path in stopped.glob(pattern)}
    kinds = {(path.parent.name, path.suffix) for path in known}
    left = {path for path in stopped.rglob("*") if path.is_file() and path.name != ".lock"}
    assert {(path.parent.name, path.suffix) for path in left} <= kinds | {("1", ".md")}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("pattern", RUN_FILES)
def test_a_damaged_file_of_a_stopped_run(
    pattern: str, damage: str, stopped: Path, whole: Path, start: dict[str, Any], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    shutil.copytree(stopped, out)
    path = sorted(out.glob(pattern))[0]
    spoil(path, damage)
    try:
        train(**start, recipe="ar2", assignments=SETTINGS, out=out)
    except InputError as error:
        assert path.name in str(error)  # noqa: PT017
        return
    assert_same(out, whole)
    for table in (whole / "audit").iterdir():
        assert (out / "audit" / table.name).read_bytes() == table.read_bytes()
    for name in ("config.toml", "environment.json", *(p.relative_to(whole).as_posix() for p in whole.glob("rounds/*"))):
        assert (out / name).read_bytes() == (whole / name).read_bytes(), name


@pytest.mark.parametrize("lines", [0, 3, 12])
def test_a_journal_that_lost_whole_lines(
    lines: int, stopped: Path, whole: Path, start: dict[str, Any], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    shutil.copytree(stopped, out)
    journal = out / "journal.jsonl"
    journal.write_bytes(b"".join(journal.read_bytes().splitlines(keepends=True)[:lines]))
    with pytest.raises(InputError, match="journal of the stopped run is cut"):
        train(**start, recipe="ar2", assignments=SETTINGS, out=out)


def test_a_run_of_other_code_is_not_continued(
    stopped: Path, start: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    shutil.copytree(stopped, out)
    real = train_module.code()
    for name in ("sparring", "torch", "tokenizers", "numpy", "faiss-cpu", "bm25s", "accelerate"):
        monkeypatch.setattr(train_module, "code", lambda name=name: {**real, name: real[name] + ".1"})
        with pytest.raises(InputError, match=rf"versions\.{name}"):
            train(**start, recipe="ar2", assignments=SETTINGS, out=out)


def test_a_run_that_goes_on_with_other_threads_says_so(
    stopped: Path, start: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "run"
    shutil.copytree(stopped, out)
    with caplog.at_level("WARNING", "sparring"):
        train(**start, recipe="ar2", assignments=[*SETTINGS, "run.threads=2"], out=out)
    (told,) = [record.message for record in caplog.records if "other pieces" in record.message]
    assert "config.run.threads: there 1, here 2; threads: there 1, here 2" in told
    assert (out / "results.json").is_file()


def test_a_second_encode_of_the_same_file_is_refused(plain: Path, start: dict[str, Any], tmp_path: Path) -> None:
    """The first one would remove the shards under it."""
    from sparring.data import load

    out, held = tmp_path / "p.npy", Lock(tmp_path, "p.npy")
    data = load(start["data"], cache=start["cache"])
    with pytest.raises(InputError, match="another process is writing this file"):
        encode_to(data, start["retriever"], "passage", out)
    with pytest.raises(InputError, match="another process is writing this file"):
        export_to(start["retriever"], start["ranker"], out)
    held.close()
    encode_to(data, start["retriever"], "passage", out)
    assert out.read_bytes() == (plain / "passage.npy").read_bytes()
    assert {p.name for p in tmp_path.iterdir()} == {"p.npy", "p.npy.json", "p.npy.ids.txt"}


# --- a comparison -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compared(start: dict[str, Any], quick: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("compared") / "out"
    compare(**start, recipes="separate", seeds=1, budget=64, trials=2, out=out)
    return out


def arm(out: Path, name: str) -> bytes:
    rows, facts = load_rows(out / "seed-0" / name / "arm.npz")
    values = b"".join(row.values[m].tobytes() for row in rows for m in row.values)
    return values + repr((facts["dev"], facts["kept"], facts["forwards"])).encode()


@pytest.fixture(scope="module")
def grown(compared: Path, start: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The comparison with another arm, from a sound folder."""
    out = tmp_path_factory.mktemp("grown") / "out"
    shutil.copytree(compared, out)
    compare(**start, recipes="separate,ar2", seeds=1, budget=64, trials=2, out=out)
    return out


COMPARISON_FILES = (
    "shared.json", "tuning/separate.json", "seed-0/shared/baselines.npz", "seed-0/shared/warm.npz",
    "seed-0/shared/zero-shot.npz", "seed-0/shared/states/warm start/retriever.safetensors",
    "seed-0/shared/states/zero-shot/ranker.safetensors", "seed-0/shared/metrics.jsonl", "seed-0/shared/audit.json",
    "seed-0/shared/environment.json", "seed-0/separate/arm.npz", "seed-0/separate/results.json",
    "seed-0/separate/evidence.json", "seed-0/separate/environment.json", "comparison.json", "best/retriever/weights.pt",
)  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", COMPARISON_FILES)
def test_a_damaged_file_of_a_comparison(
    name: str, damage: str, compared: Path, grown: Path, start: dict[str, Any], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(compared, out)
    spoil(out / name, damage)
    try:
        compare(**start, recipes="separate,ar2", seeds=1, budget=64, trials=2, out=out)
    except InputError as error:
        assert Path(name).name in str(error)  # noqa: PT017
        return
    assert all(arm(out, n) == arm(grown, n) for n in ("separate", "ar2"))
    assert (out / "comparison.md").read_bytes() != b""
    one, other = (torch.load(o / "best" / "retriever" / "weights.pt", weights_only=True) for o in (out, grown))
    assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_weights_are_never_shipped(damage: str, compared: Path, start: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(compared, out)
    spoil(out / "seed-0" / "separate" / "states" / "best" / "ranker.safetensors", damage)
    with pytest.raises(InputError, match=r"ranker\.safetensors") as refused:
        compare(**start, recipes="separate", seeds=1, budget=64, trials=2, out=out)
    assert refused.value.fix == f"remove {out / 'seed-0' / 'separate'}: this arm is trained again"


def test_a_warm_start_is_not_made_again_under_arms_that_came_from_it(
    compared: Path, start: dict[str, Any], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(compared, out)
    (out / "seed-0" / "shared" / "baselines.npz").unlink()
    with pytest.raises(InputError, match="warm start"):
        compare(**start, recipes="separate,ar2", seeds=1, budget=64, trials=2, out=out)
    shutil.rmtree(out / "seed-0" / "separate")
    with pytest.raises(InputError, match="warm start"):  # the tuning came from it, too
        compare(**start, recipes="separate,ar2", seeds=1, budget=64, trials=2, out=out)
    assert (out / "seed-0" / "shared" / "warm.npz").is_file(), "nothing was removed"


def test_nothing_is_left_of_the_making_of_a_warm_start(compared: Path) -> None:
    names = {path.name for path in (compared / "seed-0" / "shared").iterdir()}
    assert not names & {".lock", "index", "journal", "journal.jsonl", "checkpoint"}


# --- encode, index, search on plain files -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain(start: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    from sparring.data import load

    folder = tmp_path_factory.mktemp("plain")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPARRING_CACHE", start["cache"])
        data = load(start["data"], cache=start["cache"])
        for kind in ("passage", "query"):
            encode_to(data, start["retriever"], kind, folder / f"{kind}.npy")  # type: ignore[arg-type]
    index_to(folder / "passage.npy", "exact", folder / "x.index")
    return folder


def searched(folder: Path) -> int:
    return search_to(folder / "x.index", folder / "passage.npy", folder / "query.npy", 5, folder / "run.trec")


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["x.index", "x.index.json", "passage.npy", "passage.npy.json", "query.npy"])
def test_damaged_embeddings_and_indexes_are_refused(name: str, damage: str, plain: Path, tmp_path: Path) -> None:
    folder = tmp_path / "plain"
    shutil.copytree(plain, folder)
    spoil(folder / name, damage)
    with pytest.raises(InputError) as error:
        searched(folder)
    assert Path(name).name in str(error.value)
    assert not (folder / "run.trec").exists()


def test_a_sound_index_is_searched_and_a_stale_one_is_not(plain: Path, tmp_path: Path) -> None:
    folder = tmp_path / "plain"
    shutil.copytree(plain, folder)
    assert searched(folder) == 64
    vectors = np.load(folder / "passage.npy")
    (folder / "passage.npy.json").unlink()  # a file of the user's own
    np.save(folder / "passage.npy", vectors * 2)
    (folder / "run.trec").unlink()
    with pytest.raises(InputError, match="other embeddings"):
        searched(folder)


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("out", ["passage.npy", "passage.npy.json"])
def test_embeddings_that_are_damaged_are_not_taken_up_again(
    out: str, damage: str, plain: Path, start: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sparring.data import load

    folder = tmp_path / "plain"
    shutil.copytree(plain, folder)
    spoil(folder / out, damage)
    monkeypatch.setenv("SPARRING_CACHE", start["cache"])
    with pytest.raises(InputError, match="damaged"):
        encode_to(load(start["data"]), start["retriever"], "passage", folder / "passage.npy")


def test_what_a_killed_encode_left_is_removed_by_the_next(
    plain: Path, start: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sparring.data import load

    monkeypatch.setenv("SPARRING_CACHE", start["cache"])
    for name in (f".p.npy.{2**22 + 1}.tmp", f".p.npy.ids.txt.{2**22 + 1}.part"):
        (tmp_path / name).write_text("half")
    (tmp_path / ".p.npy.0123456789abcdef.parts").mkdir()
    encode_to(load(start["data"]), start["retriever"], "passage", tmp_path / "p.npy")
    assert {p.name for p in tmp_path.iterdir()} == {"p.npy", "p.npy.json", "p.npy.ids.txt"}
    assert np.array_equal(np.load(tmp_path / "p.npy"), np.load(plain / "passage.npy"))
    (tmp_path / ".p.npy.0123456789abcdef.parts").mkdir()  # of one that was killed when the file was whole
    (tmp_path / ".p.npy.other.0123456789abcdef.parts").mkdir()  # another file's
    encode_to(load(start["data"]), start["retriever"], "passage", tmp_path / "p.npy")
    assert sorted(p.name for p in tmp_path.glob(".*")) == [".p.npy.other.0123456789abcdef.parts"]


