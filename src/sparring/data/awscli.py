"""The AWS CLI help-desk set, made from the files of an awscli wheel.

Passage: what an API operation does (``botocore/data/SERVICE/DATE/service-2.json``, newest date), HTML removed.
Query: the heading a human wrote over an example (``examples/SERVICE/OPERATION.rst``, a line wholly in ``**bold**``).
Label: that operation. The split is by passage: queries that share a passage, directly or through others, stay together.
"""

from __future__ import annotations

import gzip
import json
import re
import zipfile
from collections.abc import Iterator, Mapping
from html.parser import HTMLParser

import numpy as np

SEED = 20
SHARES = (("train", 0.7), ("dev", 0.1), ("test", 0.2))
_MODEL = re.compile(r"awscli/botocore/data/([^/]+)/([^/]+)/service-2\.json(?:\.gz)?")
_EXAMPLES = re.compile(r"awscli/examples/([^/]+)/([^/]+)\.rst")
_HEADING = re.compile(r"\*\*([^*](?:\\.|(?!\*\*).)*)\*{2,3}")
_NUMBERING = re.compile(r"(?:examples?\s*\d*\s*[:.)-]|\d+[.)])\s*", re.IGNORECASE)
_NO_QUERY = re.compile(r"(?:output|title|examples?(?: \d+)?|note|command|input)", re.IGNORECASE)
_BLOCKS = frozenset(
    ["p", "br", "ul", "ol", "li", "dl", "dt", "dd", "div", "pre", "h1", "h2", "h3", "h4", "table", "tr", "td", "th"]
) | {"note", "important", "fullname"}
_WORDS = (re.compile(r"(.)([A-Z][a-z]+)"), re.compile(r"([a-z0-9])([A-Z])"))
_NAMES = {"WhatsApp": "Whatsapp", "OAuth2": "Oauth2", "OTel": "Otel", "PartiQL": "Partiql", "iSCSI": "Iscsi"}
_NAMES |= {"HITsFor": "HitsFor"}


def kebab(operation: str) -> str:
    """The command line's name of an API operation: ``ListMFADevices`` -> ``list-mfa-devices``.

    A plural acronym at the end is one word (``ListARNs`` -> ``list-arns``), and so are the names in ``_NAMES``.
    """
    for name, word in _NAMES.items():
        operation = operation.replace(name, word)
    if plural := re.search(r"[A-Z]{2,}s$", operation):
        operation = f"{operation[: plural.start()]}-{plural[0].lower()}"
    for boundary in _WORDS:
        operation = boundary.sub(r"\1-\2", operation)
    return operation.lower()


class _Text(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:  # noqa: ARG002
        if tag in _BLOCKS:
            self.parts.append(" ")

    def handle_endtag(self, tag: str) -> None:
        if tag in _BLOCKS:
            self.parts.append(" ")

    def handle_data(self, data: str) -> None:
        self.parts.append(data)


def plain_text(html: str) -> str:
    """HTML as text: tags dropped, references resolved, white space collapsed."""
    parser = _Text()
    parser.feed(html)
    parser.close()
    return " ".join("".join(parser.parts).split())


def passages(archive: zipfile.ZipFile) -> Iterator[tuple[str, str, str]]:
    """(id, title, text) of every documented operation: ``ec2:describe-vpcs``, ``ec2 describe-vpcs``, documentation."""
    newest: dict[str, tuple[str, str]] = {}
    for name in archive.namelist():
        if match := _MODEL.fullmatch(name):
            newest[match[1]] = max(newest.get(match[1], ("", "")), (match[2], name))
    for service, (_, name) in sorted(newest.items()):
        raw = archive.read(name)
        model = json.loads(gzip.decompress(raw) if name.endswith(".gz") else raw)
        for operation, entry in sorted(model["operations"].items()):
            text = plain_text(entry.get("documentation", ""))
            if text:
                command = kebab(operation)
                yield f"{service}:{command}", f"{service} {command}", text


def heading(line: str) -> str:
    """The query in a line of an examples file, or an empty string: whole-line bold, its "Example 2:" removed."""
    match = _HEADING.fullmatch(line.strip())
    if match is None:
        return ""
    text = " ".join(match[1].replace("``", "").replace("\\", "").split())
    text = _NUMBERING.sub("", text, count=1) if _NUMBERING.match(text) else text
    text = text.rstrip(":. ")
    return "" if _NO_QUERY.fullmatch(text) else text


def labels(archive: zipfile.ZipFile, known: frozenset[str]) -> dict[str, list[str]]:
    """Query text -> passage ids, both in order of the file names. Equal headings (case aside) are one query."""
    texts: dict[str, str] = {}
    out: dict[str, list[str]] = {}
    for name in sorted(archive.namelist()):
        match = _EXAMPLES.fullmatch(name)
        if match is None or f"{match[1]}:{match[2]}" not in known:
            continue
        passage = f"{match[1]}:{match[2]}"
        for text in filter(None, map(heading, archive.read(name).decode("utf-8").splitlines())):
            positives = out.setdefault(texts.setdefault(text.casefold(), text), [])
            if passage not in positives:
                positives.append(passage)
    return out


def split_by_passage(
    positives: Mapping[str, list[str]], shares: tuple[tuple[str, float], ...] = SHARES, seed: int = SEED
) -> dict[str, str]:
    """Query -> split, so that no passage is a positive in two splits.

    Queries linked by a shared passage form a group; groups are shuffled by ``seed`` and the splits filled in the order
    of ``shares`` from the last to the first, each up to its share of the queries.
    """
    groups = _linked(positives)
    order = np.random.default_rng(seed).permutation(len(groups))
    total = sum(map(len, groups))
    out: dict[str, str] = {}
    waiting = [groups[index] for index in order]
    for split, share in reversed(shares[1:]):
        room, later = round(share * total), []
        for group in waiting:
            if len(group) <= room:
                room -= len(group)
                out |= dict.fromkeys(group, split)
            else:
                later.append(group)
        waiting = later
    return out | {query: shares[0][0] for group in waiting for query in group}


def _linked(positives: Mapping[str, list[str]]) -> list[list[str]]:
    """Connected components of the query-passage graph, as lists of queries in order of first appearance."""
    parent: dict[str, str] = {}

    def root(query: str) -> str:
        while parent[query] != query:
            parent[query] = query = parent[parent[query]]
        return query

    owner: dict[str, str] = {}
    for query, passages in positives.items():
        parent[query] = query
        for passage in passages:
            one, two = root(owner.setdefault(passage, query)), root(query)
            parent[two] = one
    groups: dict[str, list[str]] = {}
    for query in positives:
        groups.setdefault(root(query), []).append(query)
    return list(groups.values())
