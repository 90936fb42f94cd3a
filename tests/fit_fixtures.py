"""A tiny pair with its tokens, and the steps of the methods, for tests of the training loop."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import Tensor

from sparring.models import Ranker, Retriever, load_ranker, load_retriever
from sparring.models.sharding import whole
from sparring.phases import fit as loop
from sparring.phases.fit import Feed, Name, Scorer, Step, Trainee, make_trainee
from sparring.recipes.ar2 import AR2Config, retriever_step
from sparring.recipes.rocketqav2 import RocketQAv2Config, joint_step
from sparring.recipes.steps import in_batch_step

QUERIES = ["how to delete a bucket", "비밀번호 어떻게", "list user key", "what is a policy", "move file", "문서 검색"]
PASSAGES = [
    "delete the bucket", "reset the password of the user", "list of keys", "the policy is a document", "move a file",
    "문서 검색 모델", "copy folder", "undo a commit", "user and instance", "서울 대한민국 수도", "move a file",
]  # fmt: skip
GROUPS = np.array([0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 4])
POSITIVES = {0: [0], 1: [1], 2: [2, 8], 3: [3], 4: [4], 5: [5]}


def known(rows: np.ndarray) -> np.ndarray:
    """Text groups of each query's positives, padded with -1."""
    groups = [GROUPS[POSITIVES[int(row)]] for row in rows]
    result = np.full((len(groups), max(map(len, groups))), -1, dtype=np.int64)
    for row, values in enumerate(groups):
        result[row, : len(values)] = values
    return result


def draw(number: int, batch: int) -> tuple[np.ndarray, np.ndarray]:
    """Lists 1 + 3 with their positive first; a passage may be in several lists of a batch."""
    rng = np.random.default_rng(number)
    queries = np.concatenate([rng.permutation(len(QUERIES)) for _ in range(batch // len(QUERIES) + 1)])[:batch]
    lists = []
    for query in queries:
        others = [p for p in range(len(PASSAGES)) if GROUPS[p] not in GROUPS[POSITIVES[int(query)]]]
        lists.append([POSITIVES[int(query)][0], *rng.choice(others, 3, replace=False)])
    return queries, np.array(lists)


@dataclass
class Pair:
    """Two models and their tokens."""

    retriever: Retriever
    ranker: Ranker
    feed: Feed

    def team(self, accelerator: Accelerator, **options: Any) -> dict[Name, Trainee]:
        """Both models with optimisers; a constant rate unless said otherwise."""
        chosen = {"lr": 1e-3, "updates": 20, "schedule": "constant", "warmup": 0.0, **options}
        return {
            "retriever": make_trainee(self.retriever, accelerator, **chosen),
            "ranker": make_trainee(self.ranker, accelerator, **chosen),
        }

    def scorer(self, team: dict[Name, Trainee], step: Step, **options: Any) -> Scorer:
        """A scorer of the step."""
        return Scorer(team, self.feed, step.trains, groups=GROUPS, known=known, **options)


def load_pair(retriever: Path, ranker: Path, *, dropout: bool, token_budget: int = 8192, **options: Any) -> Pair:
    """The tiny models, with dropout 0.1 or none."""
    first, second = load_retriever(retriever, **options), load_ranker(ranker)
    for model in (first, second):
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout) and not dropout:
                module.p = 0.0
    feed = Feed(
        first.tokenize(QUERIES, "query", None), first.tokenize(PASSAGES, "passage", None),
        second.tokenize(QUERIES, None, "query"), second.tokenize(PASSAGES, None, "passage"), token_budget,
    )  # fmt: skip
    return Pair(first, second, feed)


STEPS: dict[str, Callable[[], Step]] = {
    "ar2 mean": lambda: retriever_step(AR2Config(variant="mean")),
    "ar2 official": lambda: retriever_step(AR2Config(variant="official")),
    "ar2 paper": lambda: retriever_step(AR2Config(variant="paper", temperature=2.0)),
    "rocketqav2 official": lambda: joint_step(RocketQAv2Config(variant="official")),
    "rocketqav2 paper": lambda: joint_step(RocketQAv2Config(variant="paper")),
    "rocketqav2 custom": lambda: joint_step(
        RocketQAv2Config(variant="custom", kl_direction="ce_de", kl_reduction="query_mean", supervised="pointwise")
    ),
    "in-batch": in_batch_step,
}
"""Steps whose gradient must not depend on how the batch is split."""


def gradient_of(
    pair: Pair, team: dict[Name, Trainee], step: Step, *, accumulate: int = 1, batch: int = 8, **options: Any
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The gradient of one whole batch and what was logged, through the loop's own update without the optimiser's."""
    kept: dict[str, Tensor] = {}

    def keep(trainee: Trainee, _: Tensor) -> None:
        grads = {name: p.grad for name, p in trainee.model.named_parameters() if p.grad is not None}
        kind = type(trainee.model).__name__.removeprefix("FSDP")
        kept.update({f"{kind} {name}": whole(value).clone() for name, value in grads.items()})
        trainee.optimizer.zero_grad()

    for name, trainee in team.items():
        trainee.model.train(name in step.trains)
    micro = loop._micro_batches(*draw(0, batch), accumulate)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "_advance", keep)
        logged = loop._update(team, pair.scorer(team, step, **options), step, micro, loop._row_numbers)
    return kept, logged


def assert_close(got: dict[str, Tensor], expected: dict[str, Tensor], rtol: float = 1e-5) -> None:
    """Relative to the largest entry of all: a gradient that is zero but for rounding has no relative error."""
    assert got.keys() == expected.keys()
    assert expected
    largest = max(float(value.abs().max()) for value in expected.values())
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=rtol, atol=rtol * largest, msg=lambda m, n=name: f"{n}: {m}")


def state(trainee: Trainee) -> dict[str, Tensor]:
    """A copy of all parameters, buffers and the optimiser's tensors."""
    kept = {name: value.clone() for name, value in trainee.model.state_dict().items()}
    kept |= {f"buffer {name}": value.clone() for name, value in trainee.model.named_buffers()}
    for number, values in trainee.optimizer.state_dict()["state"].items():
        kept |= {f"optimizer {number} {k}": torch.as_tensor(v).clone() for k, v in values.items()}
    return kept
