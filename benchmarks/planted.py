"""A synthetic help desk with planted unlabelled positives, and a tiny encoder: what benchmarks/audit*.py measure on.

A need is a subject with an aspect ("reset" of "password"), each worded in several ways. A passage answers exactly one
need; so do one to three passages of the corpus, by construction, for every need. A query asks for one need, and its
label names ONE of the passages that answer it: the others are true, and planted, because no training or dev label names
them. Which one is drawn at random, or (``labels="wording"``) it is the one with most of the query's own words, as where
people labelled what a search by words had found, or (``labels="source"``) the one from an older source, whose passages
read otherwise, as where a collection grew after it was labelled. Test labels are complete.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

Labels = Literal["random", "wording", "source"]
FORMS = 4  # words for one subject or aspect
FILLERS = 60


@dataclass(frozen=True)
class Planted:
    """The data set's folder, and the truth: query id -> ids of all passages that answer it; training queries' planted
    pairs (query id, passage id)."""

    folder: Path
    truth: dict[str, frozenset[str]]
    planted: frozenset[tuple[str, str]]


@dataclass(frozen=True)
class World:
    """How big the help desk is, how often a need has more passages than the one that a label names, and which it is."""

    subjects: int = 50
    aspects: int = 8
    asked: int = 4
    share: float = 0.6
    labels: Labels = "random"
    sources: bool = False
    """Whether a passage is from an older or a newer source, which its fillers tell and queries do not; at random where
    labels are not by source. By source, a need that several passages answer has one from the older, which is labelled,
    and a need with one passage has it from either."""

    def __post_init__(self) -> None:
        if self.labels == "source" and not self.sources:
            raise ValueError("labels by source need sources")


def words(kind: str, number: int) -> list[str]:
    """The ways to say one subject (kind s) or aspect (kind a)."""
    return [f"{kind}{number}x{form}" for form in range(FORMS)]


def vocabulary(world: World) -> list[str]:
    """Every word there is."""
    concepts = [("s", world.subjects), ("a", world.aspects)]
    found = [word for kind, count in concepts for number in range(count) for word in words(kind, number)]
    fillers = "fon" if world.sources else "f"
    return found + [f"{filler}{number}" for filler in fillers for number in range(FILLERS)]


def write_planted(folder: Path, seed: int, world: World | None = None) -> Planted:
    """A BEIR folder: a need is asked for ``asked`` times; two of these queries train, the others are dev and test."""
    from sparring.data import beir

    world, rng = world or World(), np.random.default_rng(seed)
    needs = [(s, a) for s in range(world.subjects) for a in range(world.aspects)]
    passages: list[tuple[str, str, str]] = []
    answers: dict[tuple[int, int], list[str]] = {}
    for need in needs:
        count = 1 + (int(rng.integers(1, 3)) if rng.random() < world.share else 0)
        for number in range(count):
            answers.setdefault(need, []).append(f"p{len(passages)}")
            older = world.sources and rng.random() < 0.5
            if world.labels == "source" and count > 1:
                older = number == 0
            source = ("o" if older else "n") if world.sources else "f"
            passages.append((f"p{len(passages)}", "", passage_text(need, world, rng, source)))
    queries: list[tuple[str, str, tuple[str, ...]]] = []
    truth: dict[str, frozenset[str]] = {}
    splits: dict[str, dict[str, dict[str, int]]] = {"train": {}, "dev": {}, "test": {}}
    for need in needs:
        for number in range(world.asked):
            id = f"q{len(queries)}"
            queries.append((id, query_text(need, rng), ()))
            mostly = answers[need]
            if world.labels == "wording":
                mostly = likeliest(queries[-1][1], answers[need], passages)
            elif world.labels == "source":
                mostly = answers[need][:1]
            truth[id] = frozenset(answers[need])
            split = "train" if number < world.asked - 2 else ("dev", "test")[number - world.asked + 2]
            labelled = answers[need] if split == "test" else [str(rng.choice(mostly))]
            splits[split][id] = dict.fromkeys(labelled, 1)
    beir.write_passages([passages[i] for i in rng.permutation(len(passages))], folder / "corpus.jsonl")
    beir.write_queries(queries, folder / "queries.jsonl")
    for split, labels in splits.items():
        beir.write_qrels(labels, folder / "qrels" / f"{split}.tsv")
    planted = frozenset((q, p) for q, labels in splits["train"].items() for p in truth[q] - labels.keys())
    return Planted(folder, truth, planted)


def likeliest(query: str, answers: list[str], passages: list[tuple[str, str, str]]) -> list[str]:
    """Those of the answers that share most words with the query, fillers left out."""
    wanted = {word for word in query.split() if not word.startswith("f")}
    shared = {id: len(wanted & set(passages[int(id[1:])][2].split())) for id in answers}
    return [id for id in answers if shared[id] == max(shared.values())]


def passage_text(need: tuple[int, int], world: World, rng: np.random.Generator, source: str = "f") -> str:
    """Three words for the subject, two for the aspect, one each of another subject and aspect, its source's fillers;
    shuffled."""
    subject, aspect = need
    others = [("s", int(rng.integers(world.subjects))), ("a", int(rng.integers(world.aspects)))]
    text = [*rng.choice(words("s", subject), 3, replace=False), *rng.choice(words("a", aspect), 2, replace=False)]
    text += [str(rng.choice(words(kind, number))) for kind, number in others]
    text += [f"{source}{number}" for number in rng.integers(FILLERS, size=5)]
    return " ".join(rng.permutation(text))


def query_text(need: tuple[int, int], rng: np.random.Generator) -> str:
    """One word for the subject, one for the aspect, two fillers; shuffled."""
    text = [str(rng.choice(words("s", need[0]))), str(rng.choice(words("a", need[1])))]
    return " ".join(rng.permutation(text + [f"f{number}" for number in rng.integers(FILLERS, size=2)]))


def write_encoder(folder: Path, seed: int, world: World | None = None, *, dim: int = 64) -> Path:
    """A BERT of two layers with one token a word, random but for two things that pre-training would bring: words of one
    subject or aspect have similar vectors, and attention looks at similar words (queries and keys share one orthogonal
    matrix, positions are faint)."""
    import torch
    from transformers import BertConfig, BertModel, BertTokenizerFast

    world = world or World()
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *vocabulary(world)]
    config = BertConfig(
        vocab_size=len(pieces), hidden_size=dim, num_hidden_layers=2, num_attention_heads=4, intermediate_size=2 * dim,
        max_position_embeddings=48, initializer_range=0.1,
    )  # fmt: skip
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        model = BertModel(config)
        concepts = {name: torch.randn(dim) for name in dict.fromkeys(piece.partition("x")[0] for piece in pieces)}
        for row, piece in enumerate(pieces[5:], 5):
            vector = concepts[piece.partition("x")[0]] + 0.3 * torch.randn(dim)
            model.embeddings.word_embeddings.weight[row] = 0.1 * vector
        model.embeddings.position_embeddings.weight *= 0.1
        for layer in model.encoder.layer:
            shared = torch.linalg.qr(torch.randn(dim, dim))[0]
            layer.attention.self.query.weight.copy_(shared)
            layer.attention.self.key.weight.copy_(shared)
    model.save_pretrained(folder)
    tokenizer = BertTokenizerFast(vocab={p: i for i, p in enumerate(pieces)}, do_lower_case=True, model_max_length=48)
    tokenizer.save_pretrained(folder)
    return folder
