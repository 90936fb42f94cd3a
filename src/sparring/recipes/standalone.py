"""Each phase alone, on plain files: what the commands besides `train` call. Names outside, objects inside."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch

from sparring import __version__, files
from sparring.cluster import Cluster
from sparring.data import Dataset, default_cache, read_run, write_run
from sparring.data.corrections import SPLIT, Corrections, read_corrections
from sparring.distributed import choose_device, choose_precision, choose_tokens
from sparring.log import Metrics, table
from sparring.models import Ranker, Retriever, load_ranker, load_retriever
from sparring.models.lean import forward_of
from sparring.phases import export as exporting
from sparring.phases.bm25 import Bm25
from sparring.phases.encode import SHARD, encode
from sparring.phases.evaluate import (
    CASCADE,
    RETRIEVER,
    Row,
    check_measures,
    evaluate,
    fused,
    run_of,
    three_rows,
    verdict,
)
from sparring.phases.index import Index, Kind, build_index, choose_kind
from sparring.phases.mine import denoise, mine, pools_from_lists, positives_of, report
from sparring.phases.pools import Method, Pools, draw, trainable
from sparring.phases.rerank import rerank, score_pairs
from sparring.phases.sharded import ModelFiles, ShardedIndex, on_cluster
from sparring.recipes.audits import Audits, audited
from sparring.recipes.experiment import choose_split
from sparring.rundir import RunDir, make_folder, require_unused
from sparring.types import InputError, Run

logger = logging.getLogger("sparring")

Model = TypeVar("Model", Retriever, Ranker)

Lists = tuple[np.ndarray, np.ndarray]


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A place to write aside, renamed to ``path`` at the end; an existing file is never overwritten."""
    if path.exists():
        fix = "choose another --out, or remove it yourself"
        raise InputError("the output already exists", where=str(path), fix=fix)
    files.make_parents(path.parent, path)
    partial = files.beside(path)
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def alone(out: Path) -> Iterator[None]:
    """An output that is written in parts or as a folder, held for this process; InputError when another one has it."""
    files.make_parents(out.parent, out)
    held = files.Lock(out.parent, out.name)
    try:
        yield
    finally:
        held.remove()


def autocast_type(precision: str) -> torch.dtype | None:
    """The autocast type that this precision means on this device."""
    chosen = choose_precision(precision, choose_device().value)  # type: ignore[arg-type]
    return torch.bfloat16 if chosen.value == "bf16" else None


def token_lengths(retriever: str) -> dict[str, Any]:
    """What `check` needs to compare texts with a model's maximum: a length function, and the maximum in tokens."""
    model = load_retriever(retriever)
    read = model.inputs["passage"]

    def lengths(texts: Sequence[str]) -> list[int]:
        overhead = len(read.tokenizer("")["input_ids"])
        encoded = read.tokenizer(list(texts), add_special_tokens=False, truncation=False, verbose=False)
        return [len(ids) + overhead for ids in encoded["input_ids"]]

    return {"tokenizer_lengths": lengths, "max_length": read.max_length}


def encode_to(
    dataset: Dataset,
    retriever: str,
    kind: Literal["passage", "query"],
    out: Path,
    *,
    batch_tokens: int = 0,
    precision: str = "auto",
    pooling: str = "mean",
    max_length: int = 0,
    trust_remote_code: bool = False,
    cluster: Cluster | None = None,
) -> tuple[int, int]:
    """Embeddings into a .npy file, ids in the same order into OUT.ids.txt.  -> (rows, d)

    ``cluster``: its workers encode the shards, where there is more than one.
    """
    with alone(out):
        texts = dataset.corpus if kind == "passage" else dataset.queries
        ids = _ids_file(out)
        lines = "".join(f"{texts.id(row)}\n" for row in range(len(texts))).encode()
        if ids.exists() and ids.read_bytes() != lines:
            raise InputError("the output already exists, with other ids", where=str(ids), fix="choose another --out")
        if cluster:
            cluster.check()
        options: dict[str, Any] = {"pooling": pooling, "max_length": max_length, "trust_remote_code": trust_remote_code}
        model = load_retriever(retriever, **options)
        _placed(model)
        store = model.tokenize(texts, kind, default_cache() / "tokens")
        tokens = choose_tokens(batch_tokens, choose_device().value, 16384)
        workers = None
        if cluster:
            workers = on_cluster(cluster, ModelFiles.named(retriever, model, **options), store, tokens=batch_tokens)
        vectors = encode(
            model, store, kind, out=out, token_budget=tokens, dtype=autocast_type(precision),
            shard=cluster.shard if cluster else SHARD, elsewhere=workers,
        )  # fmt: skip
        if not ids.exists():
            with new_file(ids) as partial:
                partial.write_bytes(lines)
    return len(vectors), vectors.shape[1]


def _ids_file(embeddings: Path) -> Path:
    return embeddings.with_name(embeddings.name + ".ids.txt")


def read_embeddings(path: Path) -> tuple[np.ndarray, list[str]]:
    """What `encode_to` wrote: embeddings (mapped) and ids. A file with a note beside it must be as it was written."""
    ids = _ids_file(path)
    for file in (path, ids):
        if not file.is_file():
            raise InputError("no such file", where=str(file), expected="a file of `sparring encode`")
    require_as_noted(path, "the embeddings", fix="remove the file and its .json, and encode again")
    try:
        with path.open("rb") as opened:
            np.lib.format.read_magic(opened)
        vectors = np.load(path, mmap_mode="r", allow_pickle=False)
        if vectors.dtype.kind != "f":
            raise ValueError(f"values of type {vectors.dtype}, no floats")
    except Exception as error:  # a damaged header raises what numpy's, ast's and tokenize's parsers do
        raise InputError("not an embeddings file", where=str(path), got=str(error)) from None
    names = ids_in(ids)
    if vectors.ndim != 2 or len(names) != len(vectors):
        got = f"shape {list(vectors.shape)}, {len(names)} ids"
        raise InputError("embeddings and ids do not agree", where=str(path), expected="one id a row", got=got)
    return vectors, names


def ids_in(path: Path) -> list[str]:
    """The ids in a file with one a line; InputError when it is cut off or not UTF-8."""
    try:
        names = path.read_bytes().decode("utf-8").split("\n")  # only this ends a line: ids are any text
    except UnicodeDecodeError as error:
        raise InputError("a file of ids is not UTF-8", where=str(path), got=str(error)) from None
    if names.pop():
        raise InputError("a file of ids is cut off", where=str(path), expected="a line end after the last id")
    return names


def note_of(path: Path) -> Path:
    """The file beside an output that says what it holds, with its SHA-256."""
    return path.with_name(f"{path.name}.json")


def require_as_noted(path: Path, what: str, *, fix: str) -> dict[str, Any]:
    """The note beside a file, empty where there is none; InputError when the file is not as it was written."""
    if not note_of(path).exists():
        return {}
    note = files.read_sealed(note_of(path), f"the note about {what}", fix=fix)
    if files.sha256(path) != note.get("sha256"):
        raise InputError(
            f"{what} are damaged" if what.endswith("s") else f"{what} is damaged", where=str(path),
            expected="the file as it was written", got="contents that do not agree with its note", fix=fix,
        )  # fmt: skip
    return note


def index_to(embeddings: Path, kind: Kind | Literal["faiss"], out: Path) -> tuple[int, Kind]:
    """A faiss index file from embeddings, and OUT.json, which says from which; "faiss" is a kind by the size rule.

    -> passages, kind
    """
    with new_file(out) as partial:
        if note_of(out).exists():  # of an index that was not finished; nothing else is overwritten
            files.read_sealed(note_of(out), "the note about an index", fix="choose another --out")
        vectors, _ = read_embeddings(embeddings)
        kind = choose_kind(len(vectors), vectors.shape[1]) if kind == "faiss" else kind
        build_index(vectors, kind=kind).save(partial)
        made = {"kind": kind, "rows": len(vectors), "dim": vectors.shape[1], "embeddings": files.sha256(embeddings)}
        files.write_sealed(note_of(out), {**made, "version": __version__, "sha256": files.sha256(partial)})
    return len(vectors), kind


def search_to(
    index_file: Path | None, passages: Path, queries: Path, k: int, out: Path, *, cluster: Cluster | None = None
) -> int:
    """A TREC run from an index and query embeddings.  -> queries

    ``cluster``: its workers search the passages' embeddings exactly; an index may be named, and must then be an exact
    one of these embeddings.
    """
    with new_file(out) as partial:
        if cluster is None and index_file is None:
            raise InputError("an index is missing", expected="--index FILE", fix="build it: sparring index")
        if cluster:
            run = _searched_by(cluster, index_file, passages, queries, k)
        else:
            assert index_file is not None
            run = _searched(index_file, passages, queries, k)
        write_run(run, partial)
    return len(run)


def _searched_by(cluster: Cluster, index_file: Path | None, passages: Path, queries: Path, k: int) -> Run:
    cluster.check()
    _, passage_ids = read_embeddings(passages)
    vectors, query_ids = read_embeddings(queries)
    _require_one_model(passages, queries)
    if index_file is not None and (kind := _require_index_of(index_file, passages)["kind"]) != "exact":
        raise InputError(
            "a cluster searches exactly", where=str(index_file), expected="an exact index, or none", got=str(kind),
            fix="leave --index out, or --engine ray",
        )  # fmt: skip
    scores, rows = ShardedIndex(passages, cluster).search(vectors, k)
    return run_of(query_ids, lambda numbers: [passage_ids[i] for i in numbers], scores, rows)


def _require_one_model(passages: Path, queries: Path) -> None:
    """InputError where the notes beside two embeddings files say that they are no passages and queries of one model."""
    notes = [
        json.loads(note_of(path).read_text(encoding="utf-8")) if note_of(path).is_file() else {}
        for path in (passages, queries)
    ]
    if "weights" in notes[0] and "weights" in notes[1] and notes[0]["weights"] != notes[1]["weights"]:
        raise InputError(
            "passages and queries were encoded by two models", where=str(queries), expected=f"the model of {passages}",
            got=f"weights {notes[1]['weights'][:12]}, not {notes[0]['weights'][:12]}", fix="encode one of them again",
        )  # fmt: skip
    for path, note, kind in zip((passages, queries), notes, ("passage", "query"), strict=True):
        if note.get("kind", kind) != kind:
            raise InputError(
                f"these are no {kind} embeddings", where=str(path), expected=f"sparring encode --kind {kind}",
                got=f"--kind {note['kind']}",
            )  # fmt: skip


def _require_index_of(index_file: Path, passages: Path) -> dict[str, Any]:
    """The note beside an index, which must have been built from these embeddings."""
    if not index_file.is_file() or not note_of(index_file).is_file():
        missing = index_file if not index_file.is_file() else note_of(index_file)
        raise InputError("no such file", where=str(missing), expected="what `sparring index` wrote")
    note = require_as_noted(index_file, "the index", fix="remove it and its .json, and build it again")
    if note.get("embeddings") != files.sha256(passages):
        raise InputError(
            "the index was built from other embeddings", where=str(index_file), expected=str(passages),
            fix="build it again from these: sparring index",
        )  # fmt: skip
    return note


def _searched(index_file: Path, passages: Path, queries: Path, k: int) -> Run:
    _, passage_ids = read_embeddings(passages)
    _require_index_of(index_file, passages)
    found = Index.load(index_file)
    vectors, query_ids = read_embeddings(queries)
    _require_one_model(passages, queries)
    if len(found) != len(passage_ids):
        got = f"{len(found)} indexed, {len(passage_ids)} ids"
        expected = "the same embeddings"
        raise InputError("the index holds other passages", where=str(index_file), expected=expected, got=got)
    if vectors.shape[1] != found.dim:
        got = f"queries {vectors.shape[1]}, index {found.dim}"
        raise InputError("dimensions differ", where=str(queries), expected="embeddings of one model", got=got)
    scores, rows = found.search(vectors, k)
    return run_of(query_ids, lambda numbers: [passage_ids[i] for i in numbers], scores, rows)


def read_known_run(file: Path, dataset: Dataset) -> Run:
    """A run file all of whose queries and passages are in the data; InputError names the file and the first other."""
    run = read_run(file)
    for query, ranking in run.items():
        if query not in dataset.queries:
            got = f"query {query!r}"
            raise InputError("the run names a query that the data lacks", where=str(file), expected=_SAME, got=got)
        try:
            dataset.corpus.rows(ranking)
        except InputError as error:
            where, got = f"{file}, query {query!r}", f"passage {error.got}"
            raise InputError(
                "the run names a passage that the data lacks", where=where, expected=_SAME, got=got
            ) from None
    return run


_SAME = "a run of this data set"


def lists_of(run: Run, dataset: Dataset, query_ids: Sequence[str]) -> Lists:
    """A run as arrays (scores, passage rows) [Q, K]; shorter lists are filled with row -1."""
    ranked = [sorted(run.get(q, {}).items(), key=lambda item: -item[1]) for q in query_ids]
    width = max((len(pairs) for pairs in ranked), default=0)
    scores = np.full((len(ranked), width), -np.inf, dtype=np.float32)
    rows = np.full((len(ranked), width), -1, dtype=np.int64)
    for i, pairs in enumerate(ranked):
        rows[i, : len(pairs)] = dataset.corpus.rows([p for p, _ in pairs])
        scores[i, : len(pairs)] = [s for _, s in pairs]
    return scores, rows


@dataclass(frozen=True)
class Denoising:
    """A ranker that cleans the pools; thresholds of None are the rule's own."""

    ranker: str
    rule: str = "calibrated"
    negative: float | None = None
    positive: float | None = None
    trust_remote_code: bool = False


def mine_to(
    dataset: Dataset,
    run_file: Path,
    split: str,
    out: Path,
    *,
    negatives: int,
    sampling: Method,
    answer_filter: bool,
    seed: int,
    simans: tuple[float, float] = (0.5, 0.0),
    denoising: Denoising | None = None,
    corrections: Sequence[Path] = (),
) -> str:
    """Hard negatives of a split's queries as JSONL lines {"query", "positive", "negatives"}.  -> what was found

    A line whose positive is no label but a passage that denoising promoted has also ``"promoted": true``.
    """
    corrected = corrections_of(corrections, dataset, split)
    dataset = corrected.apply(dataset)
    with new_file(out) as partial:
        positives = positives_of(dataset.split(split), dataset.queries, dataset.corpus)
        pools = _mined(dataset, run_file, split, positives, answer_filter, corrected)
        if denoising:
            pools = _denoised(dataset, pools, denoising, corrected)
        usable = trainable(pools, negatives)
        rng = np.random.default_rng(seed)
        lists = draw(pools, usable, negatives, rng, method=sampling, a=simans[0], b=simans[1])
        with partial.open("w", encoding="utf-8") as file:
            for query, passages in zip(pools.queries[usable], lists, strict=True):
                ids = dataset.corpus.ids(passages)
                line: dict[str, Any] = {
                    "query": dataset.queries.id(int(query)),
                    "positive": ids[0],
                    "negatives": ids[1:],
                }
                if passages[0] not in positives[int(query)]:
                    line["promoted"] = True
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
    lines = [f"{out}: {len(usable)} lists of 1 + {negatives}", str(report(pools, negatives))]
    return "\n".join([*lines, *([str(corrected)] if corrected.verdicts else [])])


def corrections_of(files: Sequence[Path], dataset: Dataset, split: str) -> Corrections:
    """Verdicts on the mined negatives of a split, which must be the training split: no other labels are changed."""
    if files and split != SPLIT:
        raise InputError(
            "corrections are for the training split alone", where="--corrections", expected=f"--split {SPLIT}",
            got=f"--split {split}", fix="leave --corrections out: labels of other splits are never changed",
        )  # fmt: skip
    return read_corrections(files, dataset)


def _mined(
    dataset: Dataset, run_file: Path, split: str, positives: Mapping[int, np.ndarray], answer_filter: bool,
    corrections: Corrections,
) -> Pools:  # fmt: skip
    query_rows = np.array(sorted(positives), dtype=np.int64)
    query_ids = dataset.queries.ids(query_rows)
    answers = {int(r): dataset.answers.get(q, ()) for r, q in zip(query_rows, query_ids, strict=True)}
    if answer_filter and not any(answers.values()):
        expected = "queries with answers, as in DPR's lists"
        raise InputError("--answer-filter has no answers to look for", where=dataset.source, expected=expected)
    run = read_known_run(run_file, dataset)
    if not any(query in run for query in query_ids):
        expected, got = f"some of its {len(query_ids)} labelled queries", f"{len(run)} other queries"
        raise InputError(f"{run_file} has no query of split {split}", where="--run", expected=expected, got=got)
    scores, rows = lists_of(run, dataset, query_ids)
    return pools_from_lists(
        rows, scores, query_rows, positives, dataset.corpus.groups, known=corrections.rows("drop", dataset),
        answers=answers if answer_filter else None, passage_text=dataset.corpus.text, generation=run_file.name,
    )  # fmt: skip


def _placed(model: Model) -> Model:
    """The model on the device, with a line in the log on the forward that it gets there."""
    model.to(choose_device().value)
    logger.info("%s: %s", type(model).__name__.lower(), forward_of(model))
    return model


def _denoised(dataset: Dataset, pools: Pools, how: Denoising, corrections: Corrections) -> Pools:
    model = _placed(load_ranker(how.ranker, trust_remote_code=how.trust_remote_code))
    score = pair_scorer(dataset, model, autocast_type("auto"))
    candidates, heads = score(pools.pair_queries(), pools.candidates), score(pools.queries, pools.heads)
    return denoise(
        pools, candidates, heads,
        rule=how.rule, negative=how.negative, positive=how.positive, groups=dataset.corpus.groups,
        sure_negatives=corrections.rows("keep", dataset),
    ).pools  # fmt: skip


def pair_scorer(
    dataset: Dataset, ranker: Ranker, dtype: torch.dtype | None
) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """Ranker logits of (query rows, passage rows)."""
    cache = default_cache() / "tokens"
    queries, passages = ranker.tokenize(dataset.queries, cache, "query"), ranker.tokenize(dataset.corpus, cache)
    tokens = choose_tokens(0, ranker.device.type, 16384)
    return lambda q, p: score_pairs(ranker, queries, passages, q, p, token_budget=tokens, dtype=dtype)


def rerank_to(
    dataset: Dataset,
    ranker: str,
    run_file: Path,
    depth: int,
    out: Path,
    *,
    precision: str = "auto",
    max_length: int = 0,
    trust_remote_code: bool = False,
    fusion: float = 0.0,
) -> int:
    """The top ``depth`` of each query of a run by ranker score + ``fusion`` x the run's score.  -> pairs scored"""
    with new_file(out) as partial:
        run = read_known_run(run_file, dataset)
        query_rows = dataset.queries.rows(run)
        first, top = (part[:, :depth] for part in lists_of(run, dataset, list(run)))
        inside = top >= 0
        model = load_ranker(ranker, max_length=max_length, trust_remote_code=trust_remote_code)
        score = pair_scorer(dataset, _placed(model), autocast_type(precision))
        values = np.full(top.shape, -np.inf, dtype=np.float32)
        values[inside] = score(np.broadcast_to(query_rows[:, None], top.shape)[inside], top[inside])
        scores, ordered = rerank(top, fused(values, first, fusion))
        write_run(run_of(list(run), dataset.corpus.ids, scores, ordered), partial)
    return int(inside.sum())


def export_to(
    retriever: str, ranker: str, out: Path, *, layers: int = 0, trust_remote_code: bool = False, command: str = ""
) -> None:
    """A pair as plain sentence-transformers folders, verified in a fresh process."""
    card = {"retriever": Path(retriever).name, "ranker": Path(ranker).name, "command": command}
    pair = (
        load_retriever(retriever, layers=layers, trust_remote_code=trust_remote_code),
        load_ranker(ranker, layers=layers, trust_remote_code=trust_remote_code),
    )
    with alone(out):
        exporting.export(*pair, out, card=card, trust_remote_code=trust_remote_code)


@dataclass(frozen=True)
class Evaluation:
    """Rows on one split, and whether the ranker helps its own retriever."""

    split: str
    rows: Sequence[Row]
    measures: Sequence[str]
    sentence: str

    def text(self) -> str:
        """A table and the sentence."""
        cells = [[row.name, *(str(row.estimates[m]) for m in self.measures)] for row in self.rows]
        count = len(next(iter(self.rows[0].values.values())))
        head = f"{self.split}: {count} queries, means with 95 % intervals"
        return "\n".join([head, "", table(cells, ["system", *self.measures]), "", self.sentence])

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"split": self.split, "rows": [row.as_dict() for row in self.rows], "sentence": self.sentence}


def evaluate_pair(
    dataset: Dataset,
    retriever: str,
    ranker: str,
    *,
    split: str,
    depth: int,
    candidates: Path | None,
    measures: Sequence[str],
    precision: str = "auto",
    runs: Path | None = None,
    pooling: str = "mean",
    trust_remote_code: bool = False,
    fusion: float = 0.0,
) -> Evaluation:
    """BM25 and the pair's three rows on a split. Fixed candidates are a given run's, or BM25's.

    ``fusion``: the cascade orders by ranker score + fusion x retriever score.
    """
    check_measures(measures, sys.maxsize)
    width = max(100, depth, *(int(name.partition("@")[2]) for name in measures))
    if runs is not None:
        _require_unused(runs)
    chosen = choose_split(dataset, split, 0)
    ids = dataset.queries.ids(chosen.rows)
    given = _candidates(candidates, dataset, ids) if candidates else None
    dtype = autocast_type(precision)
    second = _placed(load_ranker(ranker, trust_remote_code=trust_remote_code))
    _require_head(second, ranker)
    first = _placed(load_retriever(retriever, pooling=pooling, trust_remote_code=trust_remote_code))
    retrieved = _retrieve(dataset, first, chosen.rows, width, dtype)
    corpus = (dataset.corpus.text(row) for row in range(len(dataset.corpus)))
    queries = (dataset.queries.text(int(row)) for row in chosen.rows)
    bm25 = Bm25(corpus, len(dataset.corpus)).search(queries, len(chosen.rows), width)
    result = three_rows(
        chosen.qrels, ids, chosen.rows, dataset.corpus.ids, retrieved, given or bm25,
        pair_scorer(dataset, second, dtype), depth=depth, measures=measures, fusion=fusion,
    )  # fmt: skip
    bm25_run = run_of(ids, dataset.corpus.ids, *bm25)
    rows = [evaluate("BM25", chosen.qrels, bm25_run, measures, 0), *result.table.rows]
    if runs is not None:
        _write_runs(runs, {"BM25": bm25_run, **result.runs})
    sentence = verdict(result.table.row(RETRIEVER), result.table.row(CASCADE), measure=measures[0])
    return Evaluation(split, rows, measures, sentence)


def _candidates(file: Path, dataset: Dataset, query_ids: Sequence[str]) -> Lists:
    """A run's lists of these queries; queries without one are named."""
    run = read_known_run(file, dataset)
    missing = [query for query in query_ids if query not in run]
    if len(missing) == len(query_ids):
        raise InputError("the candidates hold no query of the split", where=str(file), got=f"{len(run)} other queries")
    if missing:
        named = ", ".join(missing[:5])
        logger.warning("%s: no candidates for %d of %d queries: %s", file, len(missing), len(query_ids), named)
    return lists_of(run, dataset, query_ids)


def _retrieve(dataset: Dataset, model: Retriever, rows: np.ndarray, k: int, dtype: torch.dtype | None) -> Lists:
    queries, index = _indexed(dataset, model, dtype)
    scores, found = index.search(queries[rows], k)
    return scores * np.float32(model.scale), found


def _indexed(dataset: Dataset, model: Retriever, dtype: torch.dtype | None) -> tuple[np.ndarray, Index]:
    """All queries' embeddings, and an exact index of all passages."""
    cache = default_cache() / "tokens"
    budget = choose_tokens(0, model.device.type, 16384)
    store = model.tokenize(dataset.corpus, "passage", cache)
    passages = encode(model, store, "passage", token_budget=budget, dtype=dtype)
    queries = encode(model, model.tokenize(dataset.queries, "query", cache), "query", token_budget=budget, dtype=dtype)
    return queries, build_index(passages)


def audit_to(
    dataset: Dataset,
    retriever: str,
    ranker: str,
    out: Path,
    *,
    lists: int,
    depth: int,
    mine_depth: int,
    seed: int = 0,
    corrections: Sequence[Path] = (),
    precision: str = "auto",
    pooling: str = "mean",
    trust_remote_code: bool = False,
) -> str:
    """Mine the training queries with a retriever and let a ranker look for right answers among the negatives.

    OUT (a new folder) gets audit.json and audit/pair.tsv.  -> what was found
    """
    require_unused(out)
    corrected = read_corrections(corrections, dataset)
    dataset = corrected.apply(dataset)
    positives = positives_of(dataset.split(SPLIT), dataset.queries, dataset.corpus)
    dtype = autocast_type(precision)
    second = _placed(load_ranker(ranker, trust_remote_code=trust_remote_code))
    _require_head(second, ranker)
    first = _placed(load_retriever(retriever, pooling=pooling, trust_remote_code=trust_remote_code))
    queries, index = _indexed(dataset, first, dtype)
    rows = np.array(sorted(positives), dtype=np.int64)
    pools = mine(
        queries[rows], rows, positives, index, dataset.corpus.groups,
        depth=max(mine_depth, depth), scale=first.scale, known=corrected.rows("drop", dataset), generation="pair",
    )  # fmt: skip
    found = audited(
        pools, pair_scorer(dataset, second, dtype),
        lists=lists, depth=depth, seed=seed, groups=dataset.corpus.groups, settled=corrected.rows("keep", dataset),
    )  # fmt: skip
    audits = Audits(RunDir(make_folder(out), Metrics(None)), dataset)
    record = audits.add(pools.generation, found)
    return "\n".join([_audit_text(record), *audits.sentences()])


def _audit_text(record: Mapping[str, Any]) -> str:
    """Counts by rule and the histogram, as tables."""
    edges, bins = record["histogram"]["edges"], record["histogram"]
    rows = [
        [f"{low:.2f} .. {high:.2f}", positives, negatives]
        for low, high, positives, negatives in zip(
            edges[:-1], edges[1:], bins["positives"], bins["negatives"], strict=True
        )
    ]
    return "\n\n".join([
        table(list(record["counts"].items()), ["rule", "candidates dropped"]),
        table(rows, ["ranker score", "labelled positives", "mined negatives"]),
        f"median positive: {record['median_positive']:.4f}; {record['pairs_scored']} pairs scored",
    ])  # fmt: skip


def _require_head(model: Ranker, name: str) -> None:
    if model.new_head:
        raise InputError("the ranker has no trained head", where=name, expected="a CrossEncoder with one logit")


def _require_unused(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError("the runs folder is already used", where=str(folder), fix="choose another --runs")


def _write_runs(folder: Path, runs: Mapping[str, Run]) -> None:
    for name, run in runs.items():
        write_run(run, folder / f"{name.replace(' ', '-')}.trec")
