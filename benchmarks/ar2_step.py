"""AR2's updates of retriever and ranker: ours against a straightforward port of the official ones, same lists.

    python benchmarks/ar2_step.py

The port does what the released code does (microsoft/AR2). The retriever's update: the ranker, in evaluation mode and
without gradients, scores the same lists; each query is encoded once, a passage as often as it is in a list. The
ranker's update: cross-entropy with column 0, the retriever at rest. Each model runs once on the whole batch, and its
optimiser is AdamW without weight decay, gradients clipped at 2. Inputs are padded to fixed lengths (32, 128, 160), as
the released reader of MS MARCO does; `--padding longest` is that of Wikipedia, to the longest of the batch. The port
writes its losses out and calls none of ours.

Left out, to the port's advantage: tokenisation, gradient checkpointing (in the released command), and a second head of
the ranker whose loss is multiplied by 0. Loss and gradients are compared first, with dropout off.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from harness import report
from ports import HEAD, RATE, Lengths, Ours, Padded, Setting, contest, notes, options, precisions
from sparring.models import Ranker, Retriever
from sparring.phases.fit import Feed, Name
from sparring.recipes.ar2 import AR2Config, retriever_step
from sparring.recipes.steps import ranker_step

UPDATES: tuple[Name, ...] = ("retriever", "ranker")
CLIP = 2.0
DECAY = 0.0
WEIGHT = 0.5
"""Of the adversarial term."""
EPS = 1e-7
"""What the released code adds to every probability before its logarithm."""


def retriever_loss(z: Tensor, s: Tensor) -> Tensor:
    r"""$\lambda \sum_q\sum_i r_i \log(p_i + \epsilon) - (1-\lambda) \frac1B \sum_q\sum_i t_i \log(p_i + \epsilon)$
    with $p = \mathrm{softmax}(z)$, $t = \mathrm{softmax}(s)$, $r_i = \log(\sigma(s_0 - s_i) + \epsilon)$; z, s [B, n].
    """
    log_p = (functional.softmax(z, dim=1) + EPS).log()
    reward = (torch.sigmoid(s[:, :1] - s) + EPS).log()
    teacher = functional.softmax(s, dim=1)
    return WEIGHT * (reward * log_p).sum() - (1 - WEIGHT) * (teacher * log_p).sum() / len(z)


def ranker_loss(s: Tensor) -> Tensor:
    r"""$-\frac1B \sum_q \log \mathrm{softmax}(s)_0$; s [B, n]."""
    return functional.cross_entropy(s, torch.zeros(len(s), dtype=torch.long, device=s.device))


class Port:
    """One of the two official updates; ``lengths`` None pads to the longest of the batch."""

    def __init__(self, update: Name, retriever: Retriever, ranker: Ranker, feed: Feed, lengths: Lengths | None,
                 precision: str) -> None:  # fmt: skip
        self.retriever, self.ranker = retriever, ranker
        self.trained, self.resting = (retriever, ranker) if update == "retriever" else (ranker, retriever)
        self.padded = Padded(retriever, ranker, feed, lengths, precision)
        self.optimizer = torch.optim.AdamW(self.trained.parameters(), lr=RATE, weight_decay=DECAY)

    def scores(self, queries: np.ndarray, passages: np.ndarray) -> tuple[Tensor | None, Tensor]:
        """z, None where the retriever is at rest, and s, without a gradient where the ranker is.  -> [b, m] float32"""
        with self.padded.autocast(), torch.set_grad_enabled(self.trained is self.ranker):
            s = self.padded.logits(queries, passages)
        if self.trained is self.ranker:
            return None, s
        with self.padded.autocast():
            left = self.padded.embed(queries, "query")
            right = self.padded.embed(passages.reshape(-1), "passage").view(*passages.shape, -1)
        return self.retriever.scale * (left[:, None] * right).sum(-1), s

    def loss(self, queries: np.ndarray, passages: np.ndarray) -> Tensor:
        z, s = self.scores(queries, passages)
        return ranker_loss(s) if z is None else retriever_loss(z, s)

    def step(self, queries: np.ndarray, passages: np.ndarray) -> None:
        self.trained.train()
        self.resting.eval()
        self.loss(queries, passages).backward()
        torch.nn.utils.clip_grad_norm_(self.trained.parameters(), CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def our_side(update: Name, retriever: Retriever, ranker: Ranker, feed: Feed, precision: str) -> Ours:
    """Our step of that update, of the `official` variant."""
    taught = retriever_step(AR2Config(variant="official", adv_lambda=WEIGHT))
    method = {"retriever": taught, "ranker": ranker_step()}[update]
    return Ours(retriever, ranker, feed, precision, method, clip=CLIP, weight_decay=DECAY)


def main() -> None:
    given = options(__doc__.splitlines()[0], size=16, papers="1 + 15")
    given.add_argument("--padding", choices=["fixed", "longest"], default="fixed", help="the port's; fixed: --lengths")
    chosen = given.parse_args()
    setting = Setting.of(chosen)
    lengths = setting.lengths if chosen.padding == "fixed" else None
    rows: list[list[object]] = []
    result: dict[str, object] = {"options": {k: str(v) for k, v in vars(chosen).items()}}
    for update in UPDATES:
        for precision in precisions(chosen):
            port = Port(update, *setting.models(), lengths, precision)
            ours = our_side(update, *setting.models(), precision)
            cells, found = contest(ours, port, setting.batch, precision, chosen.repetitions)
            rows.append([update, precision, *cells])
            result[f"{update}, {precision}"] = found
    padding = "/".join(map(str, chosen.lengths)) if lengths else "the longest of the batch"
    report("AR2's updates: the port's time over ours", rows, ["update", "precision", *HEAD], notes(chosen, padding),
           result, chosen.out)  # fmt: skip


if __name__ == "__main__":
    main()
