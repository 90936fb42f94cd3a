"""Every command on plain files, as a user would chain them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cli_fixtures import call, settings, write_toy

from sparring.data import read_run
from sparring.files import SEAL, write_sealed


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy(tmp_path_factory.mktemp("toy"))


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARRING_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


def test_check_counts_and_passes(toy: Path, tiny_st: Path) -> None:
    result = call("-q", "check", toy, "--retriever", tiny_st, "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["counts"]["passages"] == 64
    assert report["counts"]["queries"] == 64


def test_phases_chain_on_plain_files(toy: Path, tiny_st: Path, tiny_ce: Path, tmp_path: Path) -> None:
    passages, queries = tmp_path / "p.npy", tmp_path / "q.npy"
    for kind, out in (("passage", passages), ("query", queries)):
        result = call("-q", "encode", toy, "--retriever", tiny_st, "--kind", kind, "--out", out, "--precision", "fp32")
        assert result.exit_code == 0, result.output
    assert call("-q", "index", passages, "--out", tmp_path / "i.faiss").exit_code == 0
    run = tmp_path / "run.trec"
    found = call("-q", "search", "--index", tmp_path / "i.faiss", "--passages", passages, "--query-embeddings", queries,
                 "-k", 20, "--out", run)  # fmt: skip
    assert found.exit_code == 0, found.output
    assert {len(ranking) for ranking in read_run(run).values()} == {20}
    again = ("-q", "search", "--index", tmp_path / "i.faiss", "--passages", passages, "--out", tmp_path / "no.trec")
    refused = call(*again, "--query-embeddings", passages)
    assert refused.exit_code == 2
    assert "these are no query embeddings" in refused.stderr
    note = tmp_path / "q.npy.json"
    was = note.read_bytes()
    write_sealed(note, {key: value for key, value in json.loads(was).items() if key != SEAL} | {"weights": "0" * 64})
    refused = call(*again, "--query-embeddings", queries)
    assert refused.exit_code == 2
    assert "encoded by two models" in refused.stderr
    note.write_bytes(was)
    mined = call("-q", "mine", toy, "--run", run, "--negatives", 5, "--out", tmp_path / "m.jsonl")
    assert mined.exit_code == 0, mined.output
    lines = [json.loads(line) for line in (tmp_path / "m.jsonl").read_text().splitlines()]
    assert len(lines) == 40
    assert all(len(set(line["negatives"])) == 5 and line["positive"] not in line["negatives"] for line in lines)
    assert all(line["positive"] == line["query"].replace("q", "p") for line in lines)
    ranked = call("-q", "rerank", toy, "--ranker", tiny_ce, "--run", run, "--depth", 10, "--out", tmp_path / "r.trec")
    assert ranked.exit_code == 0, ranked.output
    before, after = read_run(run), read_run(tmp_path / "r.trec")
    for query, ranking in after.items():
        assert set(ranking) == set(list(before[query])[:10])


def test_ids_of_any_text_survive(tiny_st: Path, tmp_path: Path) -> None:
    from sparring.recipes.standalone import read_embeddings

    toy, out = write_toy(tmp_path / "toy"), tmp_path / "q.npy"
    ids = ["a\u2028b", "c\u0085d", "e f"]
    (toy / "queries.jsonl").write_text("".join(json.dumps({"_id": i, "text": "list the keys"}) + "\n" for i in ids))
    for split in ("train", "dev", "test"):
        (toy / "qrels" / f"{split}.tsv").write_text("query-id\tcorpus-id\tscore\ne f\tp0\t1\n")
    encode = ("-q", "encode", toy, "--retriever", tiny_st, "--kind", "query", "--out", out)
    assert call(*encode).exit_code == 0
    assert read_embeddings(out)[1] == ids
    assert call(*encode).exit_code == 0, "the same again is reused"
    (tmp_path / "q.npy.ids.txt").write_text("precious\n")
    assert call(*encode).exit_code == 2
    assert (tmp_path / "q.npy.ids.txt").read_text() == "precious\n"


def test_denoising_marks_what_it_promotes(toy: Path, tiny_ce: Path, tmp_path: Path) -> None:
    run, out = tmp_path / "run.trec", tmp_path / "m.jsonl"
    run.write_text("".join(f"q{q} Q0 p{p} 1 {64 - p} x\n" for q in range(64) for p in range(16)))
    thresholds = ("--negative-below", 0.5, "--positive-above", 0.5)
    result = call("-q", "mine", toy, "--run", run, "--negatives", 2, "--denoise", tiny_ce, *thresholds, "--out", out)
    assert result.exit_code == 0, result.output
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    for line in lines:
        assert line.get("promoted", False) == (line["positive"] != line["query"].replace("q", "p"))
    assert any(line.get("promoted") for line in lines)


def test_evaluate_takes_titles_from_the_run(
    toy: Path, tiny_st: Path, tiny_ce: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sparring import data

    (tmp_path / "config.toml").write_text("[run]\ntitles = false\n")
    seen: list[bool] = []
    load = data.load

    def watched(source: Path, *, titles: bool, **files: object) -> data.Dataset:
        seen.append(titles)
        return load(source, titles=titles)

    monkeypatch.setattr(data, "load", watched)
    pair = ("--retriever", tiny_st, "--ranker", tiny_ce)
    result = call("-q", "evaluate", tmp_path, "--data", toy, *pair, "--measures", "RR@10,R@200", "--depth", 3, "--json")
    assert result.exit_code == 0, result.output
    assert seen == [False]
    assert [row["R@200"][0] for row in json.loads(result.stdout)["rows"][1:]] == [1.0, 1.0, 1.0]


def test_rerank_agrees_with_plain_cross_encoder(toy: Path, tiny_ce: Path, tmp_path: Path) -> None:
    from sentence_transformers import CrossEncoder

    run = tmp_path / "run.trec"
    run.write_text("".join(f"q0 Q0 p{i} {i + 1} {10 - i} x\n" for i in range(8)))
    call("-q", "rerank", toy, "--ranker", tiny_ce, "--run", run, "--precision", "fp32", "--out", tmp_path / "r.trec")
    passages = [json.loads(line) for line in (toy / "corpus.jsonl").read_text().splitlines()][:8]
    query = json.loads((toy / "queries.jsonl").read_text().splitlines()[0])["text"]
    model = CrossEncoder(str(tiny_ce), device="cpu", local_files_only=True)
    scores = model.predict([(query, f"{p['title']} {p['text']}") for p in passages], show_progress_bar=False)
    expected = [p["_id"] for _, p in sorted(zip(scores, passages, strict=True), key=lambda x: -x[0])]
    assert list(read_run(tmp_path / "r.trec")["q0"]) == expected
    fused = ("--fusion", 0.05, "--out", tmp_path / "both.trec")
    assert call("-q", "rerank", toy, "--ranker", tiny_ce, "--run", run, "--precision", "fp32", *fused).exit_code == 0
    both = [score + 0.05 * (10 - i) for i, score in enumerate(scores)]
    summed = [p["_id"] for _, p in sorted(zip(both, passages, strict=True), key=lambda x: -x[0])]
    assert list(read_run(tmp_path / "both.trec")["q0"]) == summed != expected
    refused = call("-q", "rerank", toy, "--ranker", tiny_ce, "--run", run, "--fusion", -1, "--out", tmp_path / "n.trec")
    assert refused.exit_code == 2


def test_evaluate_orders_the_cascade_as_the_run_does(toy: Path, tiny_st: Path, tiny_ce: Path, tmp_path: Path) -> None:
    pair = ("--retriever", tiny_st, "--ranker", tiny_ce, "--measures", "RR@10")

    def cascade(name: str, *arguments: object) -> dict[str, dict[str, float]]:
        out = tmp_path / name
        found = call("-q", "evaluate", *arguments, "--data", toy, *pair, "--depth", 5, "--runs", out)
        assert found.exit_code == 0, found.output
        return dict(read_run(out / "cascade.trec"))

    (tmp_path / "results.json").write_text('{"fusion": 2.0}')
    plain, given, of_run = cascade("a"), cascade("b", "--fusion", 2), cascade("c", tmp_path)
    assert given == of_run != plain
    assert cascade("d", tmp_path, "--fusion", 0) == plain
    (tmp_path / "results.json").write_text('{"fusion": "much"}')
    refused = call("-q", "evaluate", tmp_path, "--data", toy, *pair, "--depth", 5)
    assert refused.exit_code == 2
    assert "fusion is no weight" in refused.output


@pytest.mark.slow
def test_train_then_evaluate_then_export(toy: Path, tiny_st: Path, tiny_bert: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    result = call("-q", "train", toy, "--recipe", "ar2", "--retriever", tiny_st, "--ranker", tiny_bert, "--out", out,
                  *settings("ar2.retriever_steps=2", "ar2.ranker_steps=2"))  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "cascade" in result.stdout
    evaluated = call("-q", "evaluate", out, "--data", toy, "--split", "test", "--json", "--runs", tmp_path / "runs")
    assert evaluated.exit_code == 0, evaluated.output
    names = [row["name"] for row in json.loads(evaluated.stdout)["rows"]]
    assert names == ["BM25", "retriever", "ranker on fixed candidates", "cascade"]
    assert sorted(p.name for p in (tmp_path / "runs").iterdir()) == [
        "BM25.trec", "cascade.trec", "ranker-on-fixed-candidates.trec", "retriever.trec",
    ]  # fmt: skip
    pair = ("--retriever", out / "retriever", "--ranker", out / "ranker")
    exported = call("-q", "export", *pair, "--out", tmp_path / "e")
    assert exported.exit_code == 0, exported.output


def test_doctor_and_config(tmp_path: Path) -> None:
    doctor = call("doctor")
    assert doctor.exit_code == 0
    assert all(word in doctor.stdout for word in ("device", "precision", "threads", "torch"))
    shown = call("config", "--recipe", "rocketqav2")
    assert shown.exit_code == 0
    file = tmp_path / "c.toml"
    file.write_text(shown.stdout)
    from sparring.recipes.train import resolve_config

    assert resolve_config("rocketqav2", file) == resolve_config("rocketqav2")
