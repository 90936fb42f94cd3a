"""Feed every reader with damaged, hostile and odd files: ``python tests/fuzz.py --seconds 600 [--reader NAME]``.

What is demanded of each input: nothing but an `InputError` comes out; a file that is read is read whole (rows counted
by an independent reader, or for files with a checksum: the same content as before); and no file appears beside it.

Inputs are guided by coverage where atheris is installed, else drawn at random from valid files and `mutate`. The short
form is in the test suite (tests/property/test_readers_property.py).
"""

from __future__ import annotations

import argparse
import csv
import gzip
import io
import json
import random
import re
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
try:
    import atheris
except ImportError:
    atheris = None

GUIDED = "--guided" in sys.argv
if GUIDED:
    with atheris.instrument_imports(include=["sparring.data", "sparring.files", "sparring.config", "tomllib"]):
        pass

from sparring.config import build, read_toml  # noqa: E402
from sparring.data import beir, dpr, formats, load, msmarco, trec  # noqa: E402
from sparring.data.corrections import read_corrections  # noqa: E402
from sparring.data.layout import find  # noqa: E402
from sparring.data.table import TextTable  # noqa: E402
from sparring.log import read_metrics  # noqa: E402
from sparring.types import InputError  # noqa: E402

Check = Callable[[bytes, Any], bool]


@dataclass
class Case:
    """One reader: the file that is damaged, valid contents of it, the call, and what a successful call must give.

    ``whole`` is asked whether the result is all that the bytes hold; the default trusts the reader.
    """

    path: Path
    seeds: list[bytes]
    read: Callable[[], Any]
    whole: Check = field(default=lambda _data, _result: True)


# --- what a damaged file looks like -----------------------------------------------------------------------------

ODD = [
    b"\xef\xbb\xbf", b"\x00", b"\r\n", b"\r", b"\n", b"\t", b" ", b"\\ud800", b"\\udfff", b"\xed\xa0\x80", b"\xff\xfe",
    b'"', b'""', b"{", b"}", b"[", b"]", b",", b":", b"null", b"true", b"NaN", b"Infinity", b"-1", b"1e999", b"9" * 400,
    b"9" * 5000, "\u2028".encode(), "\u0085".encode(), "한".encode(), "한".encode(), b"<top>", b"</top>", b"<title>",
    b"../../x", b"/etc/passwd", b"..\\x", b"a" * 300, b"_id", b"text", b"1_0", "１".encode(), b"0x10", b"[" * 2000,
    b'{"a":' * 2000, b"\x1f\x8b", b"PK\x03\x04",
]  # fmt: skip


def mutate(data: bytes, rng: random.Random) -> bytes:
    """One or a few kinds of damage."""
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        data = rng.choice(DAMAGES)(data, rng)
    return data


def _flip(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    if changed:
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _cut(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data) + 1)]


def _insert(data: bytes, rng: random.Random) -> bytes:
    place = rng.randrange(len(data) + 1)
    return data[:place] + rng.choice(ODD) + data[place:]


def _replace(data: bytes, rng: random.Random) -> bytes:
    start = rng.randrange(len(data) + 1)
    return data[:start] + rng.choice([*ODD, b""]) + data[start + rng.randrange(1, 12) :]


def _value(data: bytes, rng: random.Random) -> bytes:
    """Another value where JSON, TOML or a column has one."""
    found = list(re.finditer(rb'"[^"\n]{0,80}"|-?\d+(?:\.\d+)?|[^\t\n]+', data))
    if not found:
        return data
    one = rng.choice(found)
    values = (b"null", b"[]", b"{}", b"-1", b"1.5", b'"x"', b"true", b"9" * 30, b"9" * 5000, b"NaN", b"")
    return data[: one.start()] + rng.choice(values) + data[one.end() :]


def _lines(data: bytes, rng: random.Random) -> bytes:
    """Lines twice, gone, in another order, or with other ends."""
    rows = data.split(b"\n")
    row = rng.randrange(len(rows))
    kind = rng.randrange(5)
    if kind == 0:
        rows.insert(rng.randrange(len(rows) + 1), rows[row])
    elif kind == 1:
        del rows[row]
    elif kind == 2:
        rng.shuffle(rows)
    elif kind == 3:
        rows[row] += rng.choice((b"\r", b"\t", b" ", b"\tx"))
    return (b"\r\n" if kind == 4 else b"\n").join(rows)


def _long(data: bytes, rng: random.Random) -> bytes:
    """A line of a megabyte, now and then."""
    if rng.random() < 0.9:
        return _flip(data, rng)
    place = rng.randrange(len(data) + 1)
    return data[:place] + rng.choice((b"a", "é".encode(), b"[", b"\t", b'"a",')) * 2**20 + data[place:]


DAMAGES = (_flip, _cut, _insert, _replace, _value, _lines, _long)


# --- independent counts of rows -----------------------------------------------------------------------------------


def plain_lines(data: bytes) -> list[str]:
    """Lines that are not blank, as any UTF-8 editor would show them."""
    text = data.decode("utf-8")
    text = text[1:] if text.startswith("\ufeff") else text
    return [line for line in text.split("\n") if line.removesuffix("\r").strip(" ")]


def by_lines(header: str | None = None) -> Check:
    """As many rows as lines, a header left out."""

    def whole(data: bytes, rows: Any) -> bool:
        found = plain_lines(data)
        headed = header is not None and found and re.split(r"\s+", found[0].strip()) == header.split()
        return len(rows) == len(found) - bool(headed)

    return whole


def by_topics(data: bytes, rows: Any) -> bool:
    return len(rows) == data.decode("utf-8").lower().count("<top>")


def by_json(data: bytes, rows: Any) -> bool:
    return len(rows) == len(json.loads(data.decode("utf-8-sig")))


def by_csv(data: bytes, rows: Any) -> bool:
    text = io.StringIO(data.decode("utf-8-sig").replace("\r\n", "\n"), newline="")
    csv.field_size_limit(2**31 - 1)
    found = [row for row in csv.reader(text, delimiter="\t", strict=True) if row]
    return len(rows) == len(found) - (found[:1] == [["id", "text", "title"]])


def gzipped(check: Check) -> Check:
    return lambda data, rows: check(gzip.decompress(data), rows)


# --- the readers --------------------------------------------------------------------------------------------------

CORPUS = '{"_id": "007", "title": "Bond", "text": "shaken"}\n{"_id": 7, "title": null, "text": "한 \\ud83d\\ude00"}\n'
QUERIES = '{"_id": "q1", "text": "who"}\n{"_id": "q 2", "text": "what", "metadata": {"answers": ["a", "나"]}}\n'
BEIR_QRELS = "query-id\tcorpus-id\tscore\nq1\t007\t1\nq 2\t7\t0\n"
LIST = (
    '[{"id": "a", "question": "who", "answers": ["x"], "positive_ctxs": '
    '[{"title": "t", "text": "p", "passage_id": "1"}], "negative_ctxs": [], '
    '"hard_negative_ctxs": [{"title": "", "text": "n", "psg_id": 2}]},\n'
    '{"question": "what", "positive_ctxs": [{"text": "bare"}]}]\n'
)
TABLE = 'id\ttext\ttitle\n1\t"a ""quoted""\ttext"\tone\n2\tplain\t\n3\t"two\nlines"\tthree\n'
TOPICS = (
    "<top>\n<num> Number: 1\n<title> one\n two\n<desc> x\n</top>\n<top><num>2</num><title>Topic: 한</title></top>\n"
)
QUESTIONS = "who wrote it\t['a', \"나\"]\nwhat, then\t['b']\n"
TOP = "1\t7\twho\tsomeone\n1\t8\twho\t누구\n"
RUN = "q1\tQ0\t007\t1\t2.5\ttag\nq1 Q0 7 2 -1e-3 tag\nq 2\tQ0\t7\t1\tinf\ttag\n"


def text_case(name: str, text: str, read: Callable[[Path], Any], whole: Check) -> Callable[[Path], Case]:
    def case(folder: Path) -> Case:
        path, data = folder / name, text.encode()
        seeds = [data, b"\xef\xbb\xbf" + data, data.replace(b"\n", b"\r\n")]
        if path.suffix == ".gz":
            seeds = [gzip.compress(seed, mtime=0) for seed in seeds]
        return Case(path, seeds, lambda: read(path), gzipped(whole) if path.suffix == ".gz" else whole)

    return case


def titled(folder: Path) -> Case:
    """Passages whose titles are in another file, which is whole; one passage has none."""
    path = folder / "para.txt"
    (folder / "para.title.txt").write_text("1\tone\n3\t셋\n", encoding="utf-8")
    seed = "1\ta\n2\t한\n3\tc\n".encode()
    seeds = [seed, b"\xef\xbb\xbf" + seed, seed.replace(b"\n", b"\r\n")]
    return Case(path, seeds, lambda: list(msmarco.with_titles(path, folder / "para.title.txt")), by_lines())


def card(folder: Path) -> Case:
    """The card of published vectors, as a server hands it back: the text that was written, or refused."""
    from sparring.stores.card import Card, read_card

    path, made = folder / "card.json", Card("m", "f" * 64, "p" * 64, 3, 2, "dot", "exact", "0")
    path.write_text(made.text(), encoding="utf-8")

    def read() -> Any:
        return read_card(path.read_bytes().decode("utf-8", "replace"), "x")

    return Case(path, [path.read_bytes()], read, unchanged(read))


def publication(folder: Path) -> Case:
    """The note of published vectors, its file beside it."""
    from sparring.stores.card import Card
    from sparring.stores.folder import NOTE, commit, read

    place = folder / "published"
    place.mkdir()
    (place / "passages-1.parquet").write_bytes(b"vectors")
    made = Card("m", "f" * 64, "p" * 64, 3, 2, "dot", "exact", "0")
    commit(place, "parquet", made, {"vectors": place / "passages-1.parquet"})
    written = partial(read, place, "parquet")
    return Case(place / NOTE, [(place / NOTE).read_bytes()], written, unchanged(written))


def run_rows(path: Path) -> list[Any]:
    return [pair for ranking in trec.read_run(path).values() for pair in ranking]


def corrections(folder: Path) -> Case:
    data = beir_folder(folder / "data")
    dataset, path = load(data, cache=folder / "cache"), folder / "verdicts.tsv"
    text = "verdict\tquery_id\tpassage_id\tscore\npositive\tq1\t7\t0.5\n\tq1\t007\t1\ndrop\tq 2\t7\t-1\n"

    def whole(raw: bytes, found: Any) -> bool:
        rows = [line.removesuffix("\r").split("\t") for line in plain_lines(raw)]
        judged = {(row[1], row[2]) for row in rows if len(row) > 2 and row[0].strip() and row[0] != "verdict"}
        return set(found.verdicts) == judged

    return Case(path, [text.encode()], lambda: read_corrections([path], dataset), whole)


def beir_folder(folder: Path) -> Path:
    (folder / "qrels").mkdir(parents=True, exist_ok=True)
    (folder / "corpus.jsonl").write_text(CORPUS)
    (folder / "queries.jsonl").write_text(QUERIES)
    (folder / "qrels" / "train.tsv").write_text("query-id\tcorpus-id\tscore\nq1\t007\t1\nq 2\t007\t1\n")
    return folder


def manifest(folder: Path) -> Case:
    beir_folder(folder)
    text = 'corpus = "corpus.jsonl"\nqueries = ["queries.jsonl"]\ntitles = false\n[qrels]\ntrain = "qrels/train.tsv"\n'
    path = folder / "dataset.toml"
    return Case(path, [text.encode()], lambda: find(path, corpus=None, queries=None, qrels=None, titles=True))


def dataset_case(name: str) -> Callable[[Path], Case]:
    """A whole data set of which one file is damaged."""

    def case(folder: Path) -> Case:
        path = beir_folder(folder / "data") / name
        return Case(path, [path.read_bytes()], lambda: load(folder / "data", cache=folder / "cache"))

    return case


def config(folder: Path) -> Case:
    from sparring.recipes.settings import RunConfig, TurnsConfig

    path = folder / "config.toml"
    text = '[run]\nseed = 3\nmeasures = ["RR@10"]\nprecision = "fp32"\n[ar2]\nrounds = 2\nretriever_lr = 1e-5\n'

    def read() -> Any:
        return build({"run": RunConfig, "ar2": TurnsConfig}, (str(path), read_toml(path)))

    return Case(path, [text.encode()], read)


def metrics(folder: Path) -> Case:
    path = folder / "metrics.jsonl"
    text = '{"kind": "phase", "seconds": 1.5, "name": "x", "took": 1}\n{"kind": "a", "seconds": 2}\n'
    return Case(path, [text.encode()], lambda: read_metrics(path), lambda d, r: len(r) == d.count(b"\n"))


def unchanged(read: Callable[[], Any], plain: Callable[[Any], Any] = repr) -> Check:
    """For files with a checksum: what is read is what was written, whatever the bytes look like."""
    expected = plain(read())
    return lambda _data, found: plain(found) == expected


def journal(folder: Path) -> Case:
    from sparring.recipes.journal import Journal

    made = Journal(folder)
    for n in range(5):
        made.add("fit", f"phase {n}", forwards={"ranker_trained": n}, metrics={"size": n, "sha256": "x"})
    path = folder / "journal.jsonl"
    expected = [dict(entry) for entry in made.entries]
    return Case(
        path, [path.read_bytes()], lambda: Journal(folder, writes=False).entries,
        lambda _data, found: [dict(entry) for entry in found] == expected[: len(found)],
    )  # fmt: skip


def checkpoint(folder: Path) -> Case:
    from sparring.files import write_sealed
    from sparring.phases.checkpoint import Checkpoint

    store = Checkpoint(folder, 0)
    write_sealed(store.note, {"file": "x", "sha256": "y", "states": {}, "facts": {"done": 3, "sums": {"loss": 0.1}}})
    return Case(store.note, [store.note.read_bytes()], store.facts, unchanged(store.facts))


def stored(kind: str) -> Callable[[Path], Case]:
    """The .npz files of a run or a comparison."""

    def case(folder: Path) -> Case:
        import numpy as np

        from sparring.phases.evaluate import Row
        from sparring.phases.pools import Pools
        from sparring.phases.stats import Estimate
        from sparring.recipes import store
        from sparring.recipes.generation import Generation

        path, rows = folder / "x.npz", np.arange(4)
        lists = (np.ones((2, 2), np.float32), np.zeros((2, 2), np.int64))
        if kind == "generation":
            pools = Pools(
                queries=rows[:2], heads=rows[:2], offsets=np.array([0, 1, 2]), candidates=rows[2:],
                scores=np.ones(2, np.float32), head_scores=np.ones(2, np.float32), generation="g", depth=1, counts={},
            )  # fmt: skip
            store.save_generation(path, Generation("g", pools, {"dev": lists}))
        elif kind == "lists":
            store.save_lists(path, lists)
        else:
            row = Row("r", {"RR@10": Estimate(0.5, 0.4, 0.6)}, {"RR@10": np.array([0.5, 0.5])})
            store.save_rows(path, [row], {"seed": 1})
        generation = partial(store.load_generation, vectors=folder)
        readers = {"generation": generation, "lists": store.load_lists, "rows": store.load_rows}

        def read() -> Any:
            return readers[kind](path)

        return Case(path, [path.read_bytes()], read, unchanged(read))

    return case


def table_case(name: str) -> Callable[[Path], Case]:
    def case(folder: Path) -> Case:
        TextTable.from_rows([("a", "t", "x"), ("나", "", "y" * 99)], folder / "t")

        def read() -> Any:
            table = TextTable.open(folder / "t")
            return [(table.id(r), table.title(r), table.body(r), int(table.groups[r])) for r in range(len(table))]

        return Case(folder / "t" / name, [(folder / "t" / name).read_bytes()], read, unchanged(read))

    return case


def embeddings(noted: bool) -> Callable[[Path], Case]:
    """A .npy file of embeddings, with or without the note that has its checksum."""

    def case(folder: Path) -> Case:
        import numpy as np

        from sparring.files import sha256, write_sealed
        from sparring.recipes.standalone import read_embeddings

        path = folder / "e.npy"
        np.save(path, np.arange(6, dtype=np.float32).reshape(3, 2))
        (folder / "e.npy.ids.txt").write_text("a\nb\n한\n")
        if noted:
            write_sealed(folder / "e.npy.json", {"sha256": sha256(path)})

        def read() -> Any:
            vectors, ids = read_embeddings(path)
            return vectors.tolist(), ids

        return Case(path, [path.read_bytes()], read, unchanged(read) if noted else lambda _d, r: len(r[0]) == 3)

    return case


def report(kind: str, name: str) -> Callable[[Path], Case]:
    """A file of a run folder or a comparison that the report reads."""

    def case(folder: Path) -> Case:
        import report_fixtures
        from sparring.report.compared import read_comparison_folder
        from sparring.report.read import read_run_folder

        if kind == "run":
            report_fixtures.write_run(folder / "run", seed=1, gain=0.1)
            return Case(folder / "run" / name, [(folder / "run" / name).read_bytes()],
                        lambda: read_run_folder(folder / "run"))  # fmt: skip
        report_fixtures.write_comparison(folder / "compared", seeds=2)
        path = folder / "compared" / name
        return Case(path, [path.read_bytes()], lambda: read_comparison_folder(folder / "compared"))

    return case


def page(folder: Path) -> Case:
    """The page about a run, drawn from a damaged results.json."""
    import report_fixtures
    from sparring.report.page import render

    report_fixtures.write_run(folder / "run", seed=1, gain=0.1)
    path = folder / "run" / "results.json"
    return Case(path, [path.read_bytes()], lambda: render(folder / "run").encode("utf-8"))


def model(name: str) -> Callable[[Path], Case]:
    """The settings of a model's folder that are looked at before anything is loaded."""
    contents = {
        "modules.json": '[{"idx": 0, "path": "", "type": "sentence_transformers.models.Transformer"}]',
        "tokenizer_config.json": '{"chat_template": [{"name": "x", "template": "y"}]}',
        "router_config.json": '{"types": {"q_0_T": "sentence_transformers.T"}, "structure": {"q": ["q_0_T"]}}',
    }

    def case(folder: Path) -> Case:
        from sparring.models.folder import require_harmless

        def read() -> Any:
            require_harmless(folder, trust_remote_code=False)

        return Case(folder / name, [contents[name].encode()], read)

    return case


HEADER = "query-id corpus-id score"
READERS: Mapping[str, Callable[[Path], Case]] = {
    "beir passages": text_case("corpus.jsonl", CORPUS, lambda p: list(beir.passages(p)), by_lines()),
    "beir passages gz": text_case("corpus.jsonl.gz", CORPUS, lambda p: list(beir.passages(p)), by_lines()),
    "beir queries": text_case("queries.jsonl", QUERIES, lambda p: list(beir.queries(p)), by_lines()),
    "beir qrels": text_case("train.tsv", BEIR_QRELS, lambda p: list(formats.labels(p)), by_lines(HEADER)),
    "trec qrels": text_case(
        "qrels.txt", "1 0 d1 1\n2\t0\td 2\t-1\n", lambda p: list(formats.labels(p)), by_lines(HEADER)
    ),
    "msmarco passages": text_case("c.tsv", "1\ta\n2\t한\n", lambda p: list(msmarco.passages(p)), by_lines()),
    "msmarco queries": text_case("q.tsv", "1\ta\n2\t한\n", lambda p: list(msmarco.queries(p)), by_lines()),
    "trec topics": text_case("topics.txt", TOPICS, lambda p: list(trec.topics(p)), by_topics),
    "trec run": text_case("run.trec", RUN, run_rows, by_lines()),
    "trec run gz": text_case("run.trec.gz", RUN, run_rows, by_lines()),
    "dpr list": text_case("train.json", LIST, lambda p: list(dpr.questions(p, "train")), by_json),
    "dpr table": text_case("psgs.tsv", TABLE, lambda p: list(dpr.table(p)), by_csv),
    "dpr questions": text_case("nq-test.qa.csv", QUESTIONS, lambda p: list(dpr.answered(p, "test")), by_lines()),
    "msmarco candidates": text_case("top1000.tsv", TOP, lambda p: list(msmarco.candidates(p)), by_lines()),
    "rocketqa titled passages": titled,
    "publication": publication,
    "publication, card": card,
    "manifest": manifest,
    "data set, corpus": dataset_case("corpus.jsonl"),
    "data set, queries": dataset_case("queries.jsonl"),
    "data set, qrels": dataset_case("qrels/train.tsv"),
    "corrections": corrections,
    "config": config,
    "metrics": metrics,
    "journal": journal,
    "checkpoint": checkpoint,
    "generation": stored("generation"),
    "lists": stored("lists"),
    "rows": stored("rows"),
    "table, facts": table_case("table.json"),
    "table, texts": table_case("text.arrow"),
    "table, hashes": table_case("hashes.npy"),
    "embeddings": embeddings(True),
    "embeddings of others": embeddings(False),
    "model, modules": model("modules.json"),
    "model, tokenizer": model("tokenizer_config.json"),
    "model, router": model("router_config.json"),
    "run, results": report("run", "results.json"),
    "run, evidence": report("run", "evidence.json"),
    "run, metrics": report("run", "metrics.jsonl"),
    "run, audit": report("run", "audit.json"),
    "comparison": report("comparison", "comparison.json"),
    "page": page,
}


# --- trying ----------------------------------------------------------------------------------------------------------


class Wrong(AssertionError):
    """A reader did what it must not."""


def attempt(case: Case, data: bytes) -> str:
    """Read one input. -> "read" or "refused"; raises `Wrong` for anything else."""
    case.path.write_bytes(data)
    try:
        result = case.read()
    except InputError as error:
        if not str(error).strip():
            raise Wrong("an error that says nothing") from error
        return "refused"
    except Exception as error:
        raise Wrong(f"{type(error).__name__}: {error}") from error
    if not case.whole(data, result):
        raise Wrong(f"read, but not whole: {str(result)[:300]}")
    return "read"


def search(
    name: str, *, seconds: float = 1e9, inputs: int = 10**9, seed: int = 0
) -> tuple[int, int, tuple[bytes, str] | None]:
    """Try random inputs. -> (inputs tried, of which were read, the first that went wrong with what happened)"""
    rng = random.Random(f"{name} {seed}")
    with tempfile.TemporaryDirectory() as place:
        case = READERS[name](Path(place))
        pool, tried, read, until = list(case.seeds), 0, 0, time.monotonic() + seconds
        while tried < inputs and time.monotonic() < until:
            data = pool[tried] if tried < len(case.seeds) else mutate(rng.choice(pool), rng)
            try:
                was_read = attempt(case, data) == "read"
            except Wrong:
                return tried + 1, read, (data, traceback.format_exc())
            tried, read = tried + 1, read + was_read
            if was_read and len(data) < 10_000 and rng.random() < 0.05:
                pool = [*pool[:50], data]
    return tried, read, None


def guided(name: str, seconds: float, seed: int) -> None:
    """The same under atheris, which does not return."""
    place = tempfile.TemporaryDirectory()
    case = READERS[name](Path(place.name))
    rng, corpus = random.Random(seed), Path(place.name) / "inputs"
    corpus.mkdir()
    for number, content in enumerate(case.seeds):
        (corpus / str(number)).write_bytes(content)

    def mutator(data: bytes, size: int, chosen: int) -> bytes:
        changed = mutate(data, random.Random(chosen)) if rng.random() < 0.5 else atheris.Mutate(data, len(data) + 64)
        return bytes(changed[:size])

    found = f"{tempfile.gettempdir()}/fuzz-{re.sub('[^a-z]+', '-', name)}-"
    arguments = ["fuzz", f"-max_total_time={int(seconds)}", f"-seed={seed + 1}", "-max_len=2000000"]
    arguments += ["-rss_limit_mb=0", f"-artifact_prefix={found}"]
    def one(data: bytes) -> None:
        attempt(case, data)

    atheris.Setup([*arguments, str(corpus)], one, custom_mutator=mutator)
    atheris.Fuzz()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--seconds", type=float, default=60, help="for all readers together")
    parser.add_argument("--reader", choices=READERS, help="only this one")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--random", action="store_true", help="without atheris, also where it is installed")
    parser.add_argument("--guided", action="store_true", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    names = [chosen.reader] if chosen.reader else list(READERS)
    each = chosen.seconds / len(names)
    if chosen.guided:
        guided(chosen.reader, each, chosen.seed)
    failed = total = 0
    for name in names:
        if atheris is not None and not chosen.random:
            command = [sys.executable, __file__, "--reader", name, "--seconds", str(max(1, each)), "--guided"]
            done = subprocess.run(
                [*command, "--seed", str(chosen.seed)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False
            )
            said = done.stdout.decode("utf-8", "replace")
            counted = re.findall(r"Done (\d+) runs|^#(\d+)\s", said, re.MULTILINE)
            tried = max((int(a or b) for a, b in counted), default=0)
            wrong, shown = bool(done.returncode) or not tried, said[-3000:]
        else:
            tried, read, found = search(name, seconds=each, seed=chosen.seed)
            wrong, shown = found is not None, f"{found[0][:2000]!r}\n{found[1]}" if found else ""
            name = f"{name} ({read} read)"
        total, failed = total + tried, failed + wrong
        print(f"{tried:>9}  {name}{'  WRONG' if wrong else ''}", flush=True)
        if wrong:
            print(shown, flush=True)
    print(f"{total:>9}  inputs in all; {failed} reader(s) went wrong")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
