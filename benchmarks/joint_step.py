"""One RocketQAv2 joint step: ours against a straightforward port of the official step, same lists and weights.

    python benchmarks/joint_step.py

The port does what the official code does: it encodes the query once per passage of its list, pads queries, passages
and pairs to fixed lengths (32, 128, 160), and runs each model once on the whole batch. Its tokens are given to it, so
the tokenisation that the official reader pays is not counted. Both sides: forward and backward of both models, losses
of the `official` variant, gradient clipping, AdamW. Loss and gradients are compared first, with dropout off.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from torch import Tensor

from harness import report
from ports import HEAD, RATE, Lengths, Ours, Padded, Setting, contest, notes, options, precisions
from sparring.losses import rocketqav2
from sparring.models import Ranker, Retriever
from sparring.phases.fit import Feed
from sparring.recipes.rocketqav2 import RocketQAv2Config, joint_step

CLIP = 1.0


class Port:
    """The official step, straightforwardly: everything once per pair, padded to fixed lengths, one big batch."""

    def __init__(self, retriever: Retriever, ranker: Ranker, feed: Feed, lengths: Lengths, precision: str) -> None:
        self.retriever, self.ranker = retriever, ranker
        self.padded = Padded(retriever, ranker, feed, lengths, precision)
        self.optimizers = [torch.optim.AdamW(model.parameters(), lr=RATE) for model in (retriever, ranker)]

    def loss(self, queries: np.ndarray, passages: np.ndarray) -> Tensor:
        with self.padded.autocast():
            left = self.padded.embed(np.repeat(queries, passages.shape[1]), "query")
            right = self.padded.embed(passages.reshape(-1), "passage")
            logits = self.padded.logits(queries, passages)
        scores = self.retriever.scale * (left * right).sum(-1)
        return rocketqav2(scores.view(passages.shape), logits, variant="official").total

    def step(self, queries: np.ndarray, passages: np.ndarray) -> None:
        self.retriever.train()
        self.ranker.train()
        self.loss(queries, passages).backward()
        for model, optimizer in zip((self.retriever, self.ranker), self.optimizers, strict=True):
            torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)


def our_side(retriever: Retriever, ranker: Ranker, feed: Feed, precision: str) -> Ours:
    """Our joint step of the `official` variant."""
    return Ours(retriever, ranker, feed, precision, joint_step(RocketQAv2Config(variant="official")), clip=CLIP)


def main() -> None:
    chosen = options(__doc__.splitlines()[0], size=8, papers="32 and 128").parse_args()
    setting = Setting.of(chosen)
    rows: list[list[object]] = []
    result: dict[str, object] = {"options": {k: str(v) for k, v in vars(chosen).items()}}
    for precision in precisions(chosen):
        port = Port(*setting.models(), setting.lengths, precision)
        ours = our_side(*setting.models(), precision)
        cells, result[precision] = contest(ours, port, setting.batch, precision, chosen.repetitions)
        rows.append([precision, *cells])
    report("RocketQAv2 joint step: the port's time over ours", rows, ["precision", *HEAD],
           notes(chosen, "/".join(map(str, chosen.lengths))), result, chosen.out)  # fmt: skip


if __name__ == "__main__":
    main()
