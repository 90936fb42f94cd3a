"""From the public files of MS MARCO, NQ and TriviaQA to what `sparring train` reads, and from a run to R@k by answers.

``marco FOLDER --out DATA [--para para.txt --titles para.title.txt]``
    dev.small is the test split, the rest of dev selects. With the two files of RocketQA the corpus has titles.
``dpr FOLDER --name nq --out DATA`` (or ``trivia``)
    psgs_w100.tsv with DPR's lists. The dev list is halved: even places select, odd ones are the test split of the run.
``answers RUN.trec --corpus psgs_w100.tsv --questions nq-test.qa.csv``
    The measure of the papers' tables: the share of questions with an answer string among the first k passages.
``top1000 top1000.dev.tsv --out RUN.trec``
    BM25's candidates as a run for ``sparring rerank``; the file has no order, so the scores mean nothing.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from sparring.data import load, read_qrels, read_run, write_qrels, write_run
from sparring.data.dpr import Question, questions, write_list
from sparring.data.msmarco import candidates, with_titles, write_passages
from sparring.types import InputError, Qrels, Run

CUTS = (1, 5, 20, 100)


def need(folder: Path, *names: str) -> list[Path]:
    """The first of some files that may be there gzipped; InputError naming what is missing."""
    found = []
    for name in names:
        at = next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)
        if at is None:
            raise InputError("a public file is missing", where=str(folder), expected=f"{name} or {name}.gz")
        found.append(at.resolve())
    return found


def fresh(folder: Path) -> Path:
    """A new folder."""
    if folder.exists() and any(folder.iterdir()):
        raise InputError("the output folder is already used", where=str(folder), fix="choose another --out")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def marco(folder: Path, out: Path, para: Path | None = None, titles: Path | None = None) -> Path:
    """MS MARCO passages as a data set. -> its dataset.toml"""
    if (para is None) != (titles is None):
        raise InputError("titles come in two files", where="--para, --titles", expected="both or neither")
    names = ("queries.train.tsv", "queries.dev.tsv", "qrels.train.tsv", "qrels.dev.tsv", "qrels.dev.small.tsv")
    q_train, q_dev, train, dev, small = need(folder, *names)
    corpus = need(folder, "collection.tsv")[0] if para is None else out.resolve() / "corpus.tsv"
    fresh(out)
    if para is not None and titles is not None:
        rows = ((row.id, row.title, row.text) for row in with_titles(para, titles))
        write_passages(rows, corpus, titles=True)
    test = read_qrels(small)
    write_qrels(test, out / "qrels.test.tsv", style="trec")
    rest: Qrels = {query: grades for query, grades in read_qrels(dev).items() if query not in test}
    write_qrels(rest, out / "qrels.dev.tsv", style="trec")
    own = {split: out.resolve() / f"qrels.{split}.tsv" for split in ("dev", "test")}
    return manifest(out, corpus, {"queries": {"train": q_train, "dev": q_dev}, "qrels": {"train": train, **own}})


def dpr(folder: Path, name: str, out: Path) -> Path:
    """NQ or TriviaQA in DPR's files as a data set. -> its dataset.toml"""
    corpus, train, dev = need(
        folder, "psgs_w100.tsv", f"biencoder-{name}-train.json", f"biencoder-{name}-dev.json"
    )  # fmt: skip
    fresh(out)
    lists = {"train": train}
    for parity, split in enumerate(("dev", "test")):
        lists[split] = out.resolve() / f"biencoder-{name}-{split}.json"
        write_list(_every_other(dev, parity), lists[split])
    return manifest(out, corpus, {"dpr": lists})


def _every_other(path: Path, parity: int) -> Iterator[tuple]:
    for place, question in enumerate(questions(path, "dev")):
        if place % 2 == parity and question.positives:
            yield _item(question)


def _item(question: Question) -> tuple:
    return question.row, question.positives, question.others


def manifest(out: Path, corpus: Path, tables: Mapping[str, Mapping[str, Path]]) -> Path:
    """Write dataset.toml."""
    lines = [f"corpus = {json.dumps(str(corpus))}"]
    for table, files in tables.items():
        lines += ["", f"[{table}]", *(f"{split} = {json.dumps(str(path))}" for split, path in files.items())]
    path = out / "dataset.toml"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def answered(run: Run, corpus: Path, asked: Path, cuts: Sequence[int] = CUTS) -> dict[int, float]:
    """R@k as NQ's and TriviaQA's tables have it, over all questions: a run's passages are looked up and read."""
    from sparring.phases.mine import contains, normalised

    data = load(corpus=corpus, queries=asked)
    if unknown := run.keys() - data.answers.keys():
        raise InputError("the run has questions without answers", where=str(asked), got=", ".join(sorted(unknown)[:3]))
    hits = dict.fromkeys(cuts, 0)
    for query, scores in run.items():
        best = sorted(scores, key=lambda passage: -scores[passage])[: max(cuts)]
        wanted = [normalised(answer) for answer in data.answers[query]]
        texts = (normalised(text) for text in data.corpus.texts(data.corpus.rows(best)))
        first = next((place for place, text in enumerate(texts, 1) if any(contains(text, w) for w in wanted)), None)
        for cut in cuts:
            hits[cut] += first is not None and first <= cut
    return {cut: count / len(data.queries) for cut, count in hits.items()}


def top1000(file: Path, out: Path) -> int:
    """A top1000 file as a run. -> how many lines it has"""
    run, lines = Run(), 0
    for row in candidates(file):
        of_query = run.setdefault(row.query, {})
        of_query[row.passage] = -float(len(of_query))
        lines += 1
    write_run(run, out, tag="top1000")
    return lines


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("marco")
    one.add_argument("folder", type=Path)
    one.add_argument("--out", type=Path, required=True)
    one.add_argument("--para", type=Path)
    one.add_argument("--titles", type=Path)
    two = commands.add_parser("dpr")
    two.add_argument("folder", type=Path)
    two.add_argument("--name", choices=("nq", "trivia"), required=True)
    two.add_argument("--out", type=Path, required=True)
    three = commands.add_parser("answers")
    three.add_argument("run", type=Path)
    three.add_argument("--corpus", type=Path, required=True)
    three.add_argument("--questions", type=Path, required=True)
    four = commands.add_parser("top1000")
    four.add_argument("file", type=Path)
    four.add_argument("--out", type=Path, required=True)
    given = parser.parse_args(arguments)
    try:
        if given.command == "marco":
            print(marco(given.folder, given.out, given.para, given.titles))
        elif given.command == "dpr":
            print(dpr(given.folder, given.name, given.out))
        elif given.command == "answers":
            found = answered(read_run(given.run), given.corpus, given.questions)
            print("\n".join(f"R@{cut}\t{value:.4f}" for cut, value in found.items()))
        else:
            print(f"{top1000(given.file, given.out)} lines")
    except InputError as error:
        parser.exit(2, f"{error}\n")


if __name__ == "__main__":
    main()
