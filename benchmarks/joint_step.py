"""One RocketQAv2 joint step: ours against a straightforward port of the official step, same lists and weights.

    python benchmarks/joint_step.py

The port does what the official code does: it encodes the query once per passage of its list, pads queries, passages
and pairs to fixed lengths (32, 128, 160), and runs each model once on the whole batch. Its tokens are given to it, so
the tokenisation that the official reader pays is not counted. Both sides: forward and backward of both models, losses
of the `official` variant, gradient clipping, AdamW. Loss and gradients are compared first, with dropout off.
"""

from __future__ import annotations

import copy
import os
from dataclasses import dataclass
from functools import partial

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from harness import arguments, interleave, ratio, report
from sparring.data import Dataset, load
from sparring.data.demo import prepare_aws, prepare_minilm
from sparring.data.loading import default_cache
from sparring.distributed import make_accelerator
from sparring.losses import Terms, rocketqav2
from sparring.models import Ranker, Retriever, load_ranker, load_retriever
from sparring.phases.fit import Feed, ListBatch, Name, Scorer, Trainee, fit, make_trainee
from sparring.recipes.rocketqav2 import RocketQAv2Config, joint_step
from sparring.recipes.train import tokenise

RATE = 1e-5
CLIP = 1.0
UNCUT = 1 << 40  # a token budget that keeps everything in one batch


@dataclass(frozen=True)
class Lengths:
    """Fixed lengths of the port, special tokens included."""

    query: int
    passage: int
    pair: int


class Port:
    """The official step, straightforwardly: everything once per pair, padded to fixed lengths, one big batch."""

    def __init__(self, retriever: Retriever, ranker: Ranker, feed: Feed, lengths: Lengths, precision: str) -> None:
        self.retriever, self.ranker, self.feed, self.lengths = retriever, ranker, feed, lengths
        self.bf16 = precision == "bf16"
        self.optimizers = [torch.optim.AdamW(model.parameters(), lr=RATE) for model in (retriever, ranker)]

    def loss(self, queries: np.ndarray, passages: np.ndarray) -> Terms:
        b, m = passages.shape
        every, flat, feed = np.repeat(queries, m), passages.reshape(-1), self.feed
        budget = {"token_budget": UNCUT}
        questions = self.retriever.batches(feed.retriever_queries, every, "query", **budget)
        texts = self.retriever.batches(feed.retriever_passages, flat, "passage", **budget)
        pairs = self.ranker.batches(feed.ranker_queries, every, feed.ranker_passages, flat, **budget)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
            left = self.retriever.embed(self._pad(questions.inputs, self.lengths.query), "query")
            right = self.retriever.embed(self._pad(texts.inputs, self.lengths.passage), "passage")
            logits = self.ranker.logits(self._pad(pairs.inputs, self.lengths.pair))
        scores = self.retriever.scale * (left[questions.restore] * right[texts.restore]).sum(-1)
        return rocketqav2(scores.view(b, m), logits[pairs.restore].view(b, m), variant="official")

    def step(self, queries: np.ndarray, passages: np.ndarray) -> None:
        self.retriever.train()
        self.ranker.train()
        self.loss(queries, passages).total.backward()
        for model, optimizer in zip((self.retriever, self.ranker), self.optimizers, strict=True):
            torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def _pad(self, inputs: list[dict[str, Tensor]], length: int) -> dict[str, Tensor]:
        (one,) = inputs
        fills = {"input_ids": self.ranker.input.template.pad_id}
        missing = length - one["input_ids"].shape[1]
        if missing < 0:
            raise SystemExit(f"an input is longer than {length} tokens: choose larger --lengths")
        return {name: functional.pad(values, (0, missing), value=fills.get(name, 0)) for name, values in one.items()}


class Ours:
    """Our step, through the training loop itself."""

    def __init__(self, retriever: Retriever, ranker: Ranker, feed: Feed, precision: str) -> None:
        accelerator = make_accelerator("cpu")
        models: dict[Name, Retriever | Ranker] = {"retriever": retriever, "ranker": ranker}
        self.team: dict[Name, Trainee] = {
            name: make_trainee(model, accelerator, lr=RATE, updates=10**6, schedule="constant", warmup=0.0, clip=CLIP)
            for name, model in models.items()
        }
        self.method = joint_step(RocketQAv2Config(variant="official"))
        self.scorer = Scorer(self.team, feed, self.method.trains, precision=precision)

    def loss(self, queries: np.ndarray, passages: np.ndarray) -> Terms:
        terms, _ = self.method.function(ListBatch(queries, passages, len(queries)), self.scorer)
        return terms  # type: ignore[return-value]

    def step(self, queries: np.ndarray, passages: np.ndarray) -> None:
        fit(self.team, self.scorer, self.method, lambda _, __: (queries, passages), steps=1, batch=len(queries))


def lists(
    dataset: Dataset, feed: Feed, count: int, size: int, lengths: Lengths, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Query rows and passage rows [count, size]: a labelled passage in column 0, random ones after it."""
    rng = np.random.default_rng(seed)
    labels = dataset.split("train")
    rows = dataset.queries.rows(list(labels))
    fits = [i for i, row in enumerate(rows) if feed.retriever_queries.true_lengths[row] + 2 <= lengths.query]
    chosen = rng.choice(fits, count, replace=False)
    positives = dataset.corpus.rows([next(iter(list(labels.values())[i])) for i in chosen])
    passages = rng.integers(0, len(dataset.corpus), (count, size))
    passages[:, 0] = positives
    return rows[chosen], passages


def compare(ours: Ours, port: Port, batch: tuple[np.ndarray, np.ndarray]) -> tuple[float, float]:
    """With dropout off: relative difference of the losses, and of the gradients (norm of difference over norm)."""
    losses, gradients = [], []
    for side, models in ((ours, [t.model for t in ours.team.values()]), (port, [port.retriever, port.ranker])):
        for model in models:
            model.eval()
        terms = side.loss(*batch)
        terms.total.backward()
        losses.append(float(terms.total.detach()))
        gradients.append(torch.cat([p.grad.reshape(-1) for m in models for p in m.parameters() if p.grad is not None]))
        for model in models:
            model.zero_grad(set_to_none=True)
    apart = float((gradients[0] - gradients[1]).norm() / gradients[1].norm())
    return abs(losses[0] - losses[1]) / abs(losses[1]), apart


def main() -> None:
    parser = arguments(__doc__.splitlines()[0], repetitions=5)
    parser.add_argument("--lists", type=int, default=4, help="queries a step")
    parser.add_argument("--size", type=int, default=8, help="passages a list; the papers use 32 and 128")
    parser.add_argument("--lengths", type=int, nargs=3, default=[32, 128, 160], help="query, passage, pair tokens")
    parser.add_argument("--train-tokens", type=int, default=2048, help="our padded tokens a forward")
    parser.add_argument("--no-dropout", action="store_true", help="leave dropout out on both sides")
    parser.add_argument("--precision", choices=["fp32", "bf16", "both"], default="both")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    lengths, dataset, folder = Lengths(*options.lengths), load(prepare_aws()), prepare_minilm()
    retriever = load_retriever(folder, layers=options.layers, max_length=lengths.passage)
    ranker = load_ranker(folder, layers=options.layers, max_length=lengths.pair)
    if options.no_dropout:
        for module in [*retriever.modules(), *ranker.modules()]:
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
    feed = tokenise(dataset, retriever, ranker, default_cache() / "tokens", options.train_tokens)
    batch = lists(dataset, feed, options.lists, options.size, lengths, options.seed)
    rows: list[list[object]] = []
    result: dict[str, object] = {"options": {k: str(v) for k, v in vars(options).items()}}
    for precision in ("fp32", "bf16") if options.precision == "both" else (options.precision,):
        port = Port(copy.deepcopy(retriever), copy.deepcopy(ranker), feed, lengths, precision)
        ours = Ours(copy.deepcopy(retriever), copy.deepcopy(ranker), feed, precision)
        loss, gradient = compare(ours, port, batch)
        if precision == "fp32" and max(loss, gradient) > 1e-4:
            raise SystemExit(f"loss apart by {loss:g}, gradients by {gradient:g} (relative): nothing to compare")
        arms = {"ours": partial(ours.step, *batch), "port": partial(port.step, *batch)}
        seconds = interleave(arms, options.repetitions)
        faster = ratio(seconds, "port", "ours")
        medians = [f"{np.median(seconds[name]):.2f}" for name in ("port", "ours")]
        rows.append([precision, *medians, str(faster), f"{loss:.1e}", f"{gradient:.1e}"])
        result[precision] = {"ratio": faster.to_dict(), "loss": loss, "gradient": gradient, "seconds": seconds}
    head = ["precision", "port, s", "ours, s", "times as fast", "loss apart", "gradients apart"]
    notes = [
        f"{options.lists} queries x {options.size} passages, {options.layers or 'all'} layers of MiniLM for both; "
        f"the port pads to {'/'.join(map(str, options.lengths))}, ours to the longest of at most "
        f"{options.train_tokens} tokens.",
        "Apart: relative, dropout off, before training. bf16 is autocast on both sides: gradients differ by rounding.",
        f"Ratios: median (lowest .. highest) of {options.repetitions} interleaved repetitions.",
    ]
    report("RocketQAv2 joint step: the port's time over ours", rows, head, notes, result, options.out)


if __name__ == "__main__":
    main()
