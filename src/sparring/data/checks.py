"""What is in a dataset and what is wrong with it: every finding says its level, how often, where, and what to do.

An *error* would stop training or make its numbers wrong; a *warning* deserves a look; *info* describes.
"""

from __future__ import annotations

import tempfile
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np

from sparring.data.dataset import Dataset
from sparring.data.findings import EXAMPLES, Finding, Level, Report, finding
from sparring.data.formats import rows_of
from sparring.data.layout import Files, Layout, find
from sparring.data.loading import Origin, convert, label_rows, open_converted
from sparring.data.table import TextTable
from sparring.data.textfiles import at, ignore_problem
from sparring.types import InputError

Lengths = Callable[[list[str]], Sequence[int]] | Mapping[str, Sequence[int] | np.ndarray]
"""Token counts: a function of texts, or arrays by kind: {"query": [...], "passage": [...]} in table order."""


@dataclass
class _Context:
    layout: Layout
    data: Dataset
    passages: Origin
    queries: Origin

    def where(self, kind: str, row: int) -> str:
        return (self.passages if kind == "passage" else self.queries).where(row)

    def tables(self) -> tuple[tuple[str, TextTable], tuple[str, TextTable]]:
        return ("passage", self.data.corpus), ("query", self.data.queries)


def check(
    source: str | Path | None = None,
    *,
    corpus: Files | None = None,
    queries: Files | None = None,
    qrels: Files | None = None,
    titles: bool = True,
    tokenizer_lengths: Lengths | None = None,
    max_length: int = 0,
) -> Report:
    """Look through a dataset, malformed rows included, and report everything at once.

    Args:
        source, corpus, queries, qrels, titles: as in :func:`sparring.data.load`.
        tokenizer_lengths: token counts (special tokens included) of texts under the model's tokenizer.
        max_length: the model's maximum in tokens; with ``tokenizer_lengths`` the share cut off is reported.

    Raises:
        InputError: when there is no dataset to look at: files that do not exist or cannot be told apart.
    """
    layout = find(source, corpus=corpus, queries=queries, qrels=qrels, titles=titles)
    problems: list[InputError] = []
    origins = Origin(), Origin()
    with tempfile.TemporaryDirectory(prefix="sparring-check-") as folder:
        converted = Path(folder) / "data"
        convert(layout, converted, problems.append, passage_origin=origins[0], query_origin=origins[1])
        context = _Context(layout, open_converted(layout, converted), *origins)
        findings = [
            *_malformed(problems),
            *_empty(context),
            *_duplicates(context),
            *_nowhere(context),
            *_splits(context),
            *_leakage(context),
            *_unicode(context),
            *_lengths(context, tokenizer_lengths, max_length),
        ]
        counts = _counts(context.data)
    levels = ("error", "warning", "info")
    return Report(layout.source, counts, tuple(sorted(findings, key=lambda found: levels.index(found.level))))


def _counts(data: Dataset) -> dict[str, int]:
    counts = {"passages": len(data.corpus), "queries": len(data.queries)}
    for split, labels in data.qrels.items():
        counts[f"labelled queries in {split}"] = len(labels)
        counts[f"positives in {split}"] = sum(grade > 0 for grades in labels.values() for grade in grades.values())
    return counts


def _malformed(problems: list[InputError]) -> list[Finding]:
    out: list[Finding] = []
    for what in dict.fromkeys(problem.what for problem in problems):
        same = [problem for problem in problems if problem.what == what]
        examples = [f"{problem.where}: expected {problem.expected}; got {problem.got}" for problem in same]
        out += finding("error", "malformed-row", examples, what, "correct or remove these lines")
    return out


def _empty(context: _Context) -> list[Finding]:
    out: list[Finding] = []
    for kind, table in context.tables():
        if not len(table):
            files = ", ".join(str(path) for path in context.layout.files)
            out += finding("error", f"no-{kind}", [files], f"the dataset has no {kind}", "check the files")
        empty = [row for row, (_, title, text) in enumerate(rows_of(table)) if not (title + text).strip()]
        examples = [f"{context.where(kind, row)}: {table.id(row)}" for row in empty]
        level: Level = "error" if kind == "query" else "warning"
        out += finding(level, f"empty-{kind}", examples, f"a {kind} has no text", "remove it, or give it its text")
    return out


def _duplicates(context: _Context) -> list[Finding]:
    out: list[Finding] = []
    for kind, table in context.tables():
        examples = [f"{context.where(kind, int(row))}: {table.id(int(row))}" for row in table.duplicate_rows()]
        out += finding("error", f"duplicate-{kind}-id", examples, f"a {kind} id occurs again", "make the ids unique")
        rows = np.arange(len(table))
        repeated = [row for row in rows[table.groups != rows].tolist() if table.text(row).strip()]
        examples = [
            f"{context.where(kind, row)}: {table.id(row)} has the text of {table.id(int(table.groups[row]))}"
            for row in repeated[:EXAMPLES]
        ]
        fix = (
            "harmless in training (a copy of a positive is never a negative); merge them to compare scores fairly"
            if kind == "passage"
            else "merge the labels of equal queries under one id"
        )
        message = f"a {kind} has the text of an earlier one (case and white space aside)"
        out += finding("warning", f"duplicate-{kind}-text", examples, message, fix, len(repeated))
    return out


def _nowhere(context: _Context) -> list[Finding]:
    out: list[Finding] = []
    for split in context.data.qrels:
        missing: dict[str, list[str]] = {"query": [], "passage": []}
        other_form = Counter[str]()
        for path, row in label_rows(context.layout, split, ignore_problem):
            for kind, id, table in (
                ("query", row.query, context.data.queries),
                ("passage", row.passage, context.data.corpus),
            ):
                if id not in table:
                    missing[kind].append(f"{at(path, row.line)}: {id}")
                    forms = {unicodedata.normalize(form, id) for form in ("NFC", "NFD")}
                    other_form[kind] += any(form in table for form in forms - {id})
        for kind, examples in missing.items():
            hint = f" ({other_form[kind]} would match in another Unicode form: NFC and NFD are mixed)"
            message = f"a label of {split!r} names a {kind} that does not exist" + (hint if other_form[kind] else "")
            out += finding("error", f"unknown-{kind}", examples, message, "correct the id or remove the label")
    return out


def _splits(context: _Context) -> list[Finding]:
    """Splits without labels, queries without a positive, and queries that two splits share."""
    data, out = context.data, list[Finding]()
    named = [split for split, _ in context.layout.queries if split and not split.startswith("#")]
    empty = [split for split in dict.fromkeys([*data.qrels, *named]) if not data.qrels.get(split)]
    fix = "add qrels for it, or do without: it can be searched, not trained on or measured"
    out += finding("warning", "unlabelled-split", empty, "a split has no labels", fix)
    if not any(_is_train(split) and labels for split, labels in data.qrels.items()):
        known = [", ".join(data.qrels) or "no qrels"]
        out += finding("warning", "no-train-split", known, "there are no labels to train on", "add qrels for 'train'")
    for split, labels in data.qrels.items():
        without = [f"{split}: {query}" for query, grades in labels.items() if not any(g > 0 for g in grades.values())]
        message = f"a query of {split!r} has labels and no positive"
        fix = "it is skipped in training and left out of every measure's mean"
        out += finding("warning", "query-without-positive", without, message, fix)
    labelled = {query for labels in data.qrels.values() for query in labels}
    unlabelled = [id for id, _, _ in rows_of(data.queries) if id not in labelled]
    out += finding("info", "unlabelled-query", unlabelled, "a query has no label in any split", "it is not used")
    for one, two in combinations(data.qrels, 2):
        out += _shared(context, one, two)
    return out


def _is_train(split: str) -> bool:
    return split == "train" or split.startswith(("train.", "train-", "train_"))


def _shared(context: _Context, one: str, two: str) -> list[Finding]:
    qrels, table = context.data.qrels, context.data.queries
    level: Level = "error" if _is_train(one) != _is_train(two) else "warning"
    same_id = [f"{id} is in {one!r} and {two!r}" for id in qrels[one] if id in qrels[two]]
    fix = "take it out of one of them: what was trained on cannot measure"
    out = finding(level, "query-in-two-splits", same_id, f"a query is in {one!r} and in {two!r}", fix)
    groups: dict[int, str] = {}
    for id in qrels[one]:
        if id in table:
            groups.setdefault(int(table.groups[table.row(id)]), id)
    same_text = [
        f"{id} in {two!r} has the text of {groups[group]} in {one!r}"
        for id in qrels[two]
        if id in table and id not in qrels[one] and (group := int(table.groups[table.row(id)])) in groups
    ]
    message = f"a query of {two!r} has the text of one of {one!r}"
    return out + finding("warning", "query-text-in-two-splits", same_text, message, fix)


def _positives(context: _Context, split: str) -> dict[int, str]:
    """Group of a positive passage -> its id, for one split."""
    table, out = context.data.corpus, dict[int, str]()
    for grades in context.data.qrels[split].values():
        for id, grade in grades.items():
            if grade > 0 and id in table:
                out.setdefault(int(table.groups[table.row(id)]), id)
    return out


def _leakage(context: _Context) -> list[Finding]:
    """Positives of dev and test that are positives in training too, by text: passages learnt, not generalised to."""
    splits = list(context.data.qrels)
    seen: dict[int, str] = {}
    for split in filter(_is_train, splits):
        seen |= _positives(context, split)
    out: list[Finding] = []
    for split in splits:
        if _is_train(split) or not seen:
            continue
        positives = _positives(context, split)
        shared = [f"{id} of {split!r}" for group, id in positives.items() if group in seen]
        share = len(shared) / max(1, len(positives))
        message = f"a positive of {split!r} is a positive in training ({share:.1%} of its {len(positives)})"
        fix = "split by passage if the scores should stand for passages never trained on"
        out += finding("warning", "positive-seen-in-training", shared, message, fix, share=share)
    return out


def _unicode(context: _Context) -> list[Finding]:
    """Text and ids that are not in NFC. Hangul from macOS comes as NFD: one syllable is two or three characters."""
    out: list[Finding] = []
    for kind, table in context.tables():
        examples, hangul = [], 0
        for row, parts in enumerate(rows_of(table)):
            if not all(unicodedata.is_normalized("NFC", part) for part in parts):
                hangul += any("\u1100" <= character <= "\u11ff" for part in parts for character in part)
                examples.append(f"{context.where(kind, row)}: {parts[0]}")
        korean = f" ({hangul} with decomposed Korean)" if hangul else ""
        message = f"a {kind} is not in Unicode's composed form NFC{korean}"
        fix = "convert the files to NFC (uconv -x nfc, unicodedata.normalize): many tokenizers read NFD as other words"
        out += finding("warning", f"{kind}-not-nfc", examples, message, fix, hangul=hangul)
    return out


def _lengths(context: _Context, tokens: Lengths | None, max_length: int) -> list[Finding]:
    out: list[Finding] = []
    for kind, table in context.tables():
        if not len(table):
            continue
        counted: dict[str, list[int]] = {"words": [], "characters": [], "tokens": []}
        for rows in np.array_split(np.arange(len(table)), -(-len(table) // 4096)):
            texts = table.texts(rows)
            counted["words"] += [len(text.split()) for text in texts]
            counted["characters"] += [len(text) for text in texts]
            if callable(tokens):
                counted["tokens"] += map(int, tokens(texts))
        if isinstance(tokens, Mapping) and kind in tokens:
            counted["tokens"] = [int(length) for length in tokens[kind]]
        for unit, lengths in counted.items():
            if lengths:
                out += _distribution(kind, unit, lengths)
        if counted["tokens"] and max_length:
            out += _truncated(context, kind, counted["tokens"], max_length)
    return out


def _distribution(kind: str, unit: str, lengths: Iterable[int]) -> list[Finding]:
    values = np.fromiter(lengths, dtype=np.int64)
    half, ninety, ninety_nine = np.percentile(values, [50, 90, 99]).tolist()
    spread = f"median {half:.0f}, 90 % up to {ninety:.0f}, 99 % up to {ninety_nine:.0f}, longest {values.max()}"
    message = f"{unit} per {kind}: {spread}"
    details = {
        "mean": float(values.mean()),
        "median": half,
        "p90": ninety,
        "p99": ninety_nine,
        "max": float(values.max()),
    }
    return finding("info", f"{kind}-{unit}", [], message, count=len(values), **details)


def _truncated(context: _Context, kind: str, lengths: list[int], max_length: int) -> list[Finding]:
    values = np.asarray(lengths)
    long = np.flatnonzero(values > max_length)
    share = len(long) / len(values)
    table = context.data.corpus if kind == "passage" else context.data.queries
    shown = long[:EXAMPLES].tolist()
    examples = [f"{context.where(kind, row)}: {table.id(row)} ({values[row]} tokens)" for row in shown]
    message = f"a {kind} is longer than the model's {max_length} tokens and is cut ({share:.1%} of them)"
    fix = "raise the maximum length if the model allows it, or split long passages"
    level: Level = "warning" if share >= 0.01 else "info"
    return finding(level, f"{kind}-truncated", examples, message, fix, len(long), share=share, max_length=max_length)
