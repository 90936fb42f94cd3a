"""What a run will need of the disk, said before it begins.

Counted are weights, optimiser states, embeddings, pools, ranked lists and tokens, which grow with models and data, and
roughly the texts beside them. The moments of a run that hold most are compared; the largest is the forecast.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sparring.data import Dataset
from sparring.distributed import processes
from sparring.models import Ranker, Retriever
from sparring.models.tokens import expected_size
from sparring.recipes.experiment import QUERIES_IN_MEMORY, Split, vector_bytes

logger = logging.getLogger("sparring")

PAIR = 8 + 4
"""Bytes of a passage row with its score, in pools and ranked lists."""
LIST = 8 + 8 + 8 + 4
"""Bytes of a list besides its candidates."""
LINE = 58
"""Characters of a line of a TREC run besides its ids."""
STEP, PAGE, STATE, QUERY, REVIEW = 350, 130_000, 45_000, 2_500, 60
"""Bytes of an update's record, of a report, of what each state of the pair adds to it, of a test query's evidence and
place in it, of a judged pair besides its texts."""
TOKENIZER = 40
"""Bytes of a vocabulary's entry in the tokenizer's files."""


@dataclass(frozen=True)
class Forecast:
    """Bytes: the most that the run folder holds at any moment, what stays of it, and what the cache gets."""

    most: int
    stays: int
    cache: int

    def __str__(self) -> str:
        return (
            f"disk: about {_size(self.most)} in the run folder at most, of which {_size(self.stays)} stay, and "
            f"{_size(self.cache)} more in the cache"
        )


def forecast(
    dataset: Dataset,
    pair: tuple[Retriever, Ranker],
    objects: Mapping[str, Any],
    recipe: str,
    splits: tuple[Split, Split],
    cache: Path,
) -> Forecast:
    """What a run of this recipe with these settings will need."""
    run, own = objects["run"], objects.get(recipe)
    rounds = own.rounds if own is not None and recipe != "warmup" else 0
    weights = [sum(value.nbytes for value in model.state_dict().values()) for model in pair]
    trained = sum(p.nbytes for model in pair for p in model.parameters() if p.requires_grad)
    scored = not pair[1].new_head
    states = sum(weights) * (2 + scored + (rounds if run.checkpoints == "rounds" else 0))
    checkpoint = sum(weights) + 2 * trained + _taught(dataset, recipe, own, run) if run.checkpoints != "none" else 0
    journal = _results(dataset, objects, recipe, splits, rounds, scored) if run.checkpoints != "none" else 0
    passages, queries = (vector_bytes(len(texts), pair[0].dim) for texts in (dataset.corpus, dataset.queries))
    filed = queries if queries > QUERIES_IN_MEMORY else 0
    embeddings = max(2 * passages, passages + 2 * filed) * processes()  # shards, and the file they are joined to
    embeddings += 3 * len(dataset.corpus) * pair[0].dim * 4 if run.reencode == "focused" else 0
    texts = _texts(dataset, objects, recipe, splits, rounds, scored)
    exported = sum(weights) + TOKENIZER * sum(len(tokenizer) for tokenizer in _tokenizers(pair))
    kept = states if run.checkpoints == "rounds" else 0
    most = states + journal + texts + max(2 * checkpoint, checkpoint + embeddings, checkpoint + exported)
    return Forecast(most, exported + texts + kept, _tokens(dataset, pair, cache))


def tell(found: Forecast, out: Path, cache: Path) -> None:
    """Log the forecast beside the free space; a warning where it is more, for a full disk stops a run, which then goes
    on once there is room."""
    there = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    wanted = {_existing(out): max(0, found.most - there)}
    place = _existing(cache)
    shared = place.stat().st_dev == _existing(out).stat().st_dev
    wanted[_existing(out) if shared else place] = found.cache + (wanted[_existing(out)] if shared else 0)
    free = {folder: shutil.disk_usage(folder).free for folder in wanted}
    text = "; ".join(f"{_size(size)} are free in {folder}" for folder, size in free.items())
    short = any(need > free[folder] for folder, need in wanted.items())
    if short:
        logger.warning("%s; %s: THIS WILL NOT FIT, make room before or when the run stops", found, text)
    else:
        logger.info("%s; %s", found, text)


def _taught(dataset: Dataset, recipe: str, own: Any, run: Any) -> int:
    """Bytes of teachers' scores in a checkpoint: of every pair that a phase may draw."""
    if recipe not in ("ar2", "duet", "frozen-teacher") and not getattr(own, "static", False):
        return 0
    steps = max(getattr(own, name, 0) for name in ("steps", "retriever_steps", "ranker_steps"))
    heads = sum(grade > 0 for judged in dataset.split("train").values() for grade in judged.values())
    return PAIR * min(steps * own.batch * (1 + own.negatives), heads * (1 + run.mine_depth))


def _results(
    dataset: Dataset, objects: Mapping[str, Any], recipe: str, splits: tuple[Split, Split], rounds: int, scored: bool
) -> int:
    """Bytes of the journal's files: pools and ranked lists of every refresh, of BM25 and of denoising; result rows."""
    run, warm, own = objects["run"], objects["warmup"], objects.get(recipe)
    labels, passages = dataset.split("train"), len(dataset.corpus)
    heads = sum(grade > 0 for judged in labels.values() for grade in judged.values())
    judged = sum(len(split.rows) for split in splits)
    width = min(run.search_depth, passages)

    def pools(depth: int) -> int:
        return heads * (LIST + PAIR * max(0, min(depth, passages) - 1))

    deep = max(warm.ranker_depth, run.mine_depth)
    refreshes = [run.mine_depth] * (1 + rounds) + [deep] if warm.retriever_steps else [deep] + [run.mine_depth] * rounds
    total = sum(pools(depth) + judged * width * PAIR for depth in refreshes)
    total += judged * width * PAIR
    total += len(labels) * min(warm.bm25_depth, passages) * PAIR if warm.retriever_steps else 0
    if recipe == "rocketqav2" and own is not None and own.lists != "undenoised":
        total += pools(own.denoise_depth) * (rounds if own.refresh else 1)
    evaluations = (1 + scored + rounds) * len(splits[0].rows) + (2 + scored) * len(splits[1].rows)
    return total + 3 * evaluations * (8 * len(run.measures))


def _texts(
    dataset: Dataset, objects: Mapping[str, Any], recipe: str, splits: tuple[Split, Split], rounds: int, scored: bool
) -> int:
    """Bytes of what people read: runs, metrics, evidence, audits, the report. Roughly."""
    run, warm, own = objects["run"], objects["warmup"], objects.get(recipe)
    ids = [dataset.corpus.ids(np.arange(min(100, len(dataset.corpus)))), dataset.queries.ids(splits[1].rows[:100])]
    line = LINE + sum(int(np.mean([len(name.encode()) for name in part])) for part in ids)
    depth = min(run.search_depth, len(dataset.corpus))
    lines = len(splits[0].rows) * (1 + 3 * (1 + scored + rounds)) + len(splits[1].rows) * (1 + 3 * (2 + scored))
    steps = warm.retriever_steps + warm.ranker_steps
    if own is not None and recipe != "warmup":
        steps += rounds * sum(getattr(own, name, 0) for name in ("steps", "retriever_steps", "ranker_steps"))
    sample = dataset.corpus.texts(np.arange(min(100, len(dataset.corpus))))
    text = float(np.mean([len(words.encode()) for words in sample]))
    likely = (1 + scored + rounds) * min(run.audit_lists, len(dataset.split("train"))) * run.audit_depth // 5
    page = PAGE + STATE * (1 + scored + rounds) + QUERY * len(splits[1].rows)
    return int(lines * depth * line + steps * STEP + page + likely * (REVIEW + 2 * text))


def _tokens(dataset: Dataset, pair: tuple[Retriever, Ranker], cache: Path) -> int:
    """Bytes of the token stores that are not in the cache yet."""
    retriever, ranker = pair
    stores = {
        folder: size
        for table, read, prompt in (
            (dataset.queries, retriever.inputs["query"], retriever.inputs["query"].prompt),
            (dataset.corpus, retriever.inputs["passage"], retriever.inputs["passage"].prompt),
            (dataset.queries, ranker.input, ranker.input.prompt),
            (dataset.corpus, ranker.input, ""),
        )
        for folder, size in [
            expected_size(
                table, read.tokenizer, prompt=prompt, limit=read.stored_limit, cache=cache / "tokens",
                tokenizer_id=read.tokenizer_id,
            )
        ]
    }  # fmt: skip
    return sum(stores.values())


def _tokenizers(pair: tuple[Retriever, Ranker]) -> list[Any]:
    return [pair[0].inputs["passage"].tokenizer, pair[1].input.tokenizer]


def _existing(path: Path) -> Path:
    """The path, or the nearest folder above it that exists."""
    path = path.absolute()
    return path if path.is_dir() else _existing(path.parent)


def _size(count: int) -> str:
    """Bytes as MB or GB."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
