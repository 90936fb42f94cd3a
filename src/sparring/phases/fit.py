"""The only training loop. Methods differ in the step function and in who trains; everything else is here.

One optimiser and one schedule per model, counted in that model's own updates; both live in a `Trainee` and outlast
the phase, so that a later round goes on where the last one stopped (AR2 section 5; trap 8 of the method notes).
"""

from __future__ import annotations

import logging
import math
import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from typing import Any, Literal, Protocol

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from sparring.distributed import any_process, gather_rows, processes, rank, sum_over_processes, sum_tensor
from sparring.log import Metrics, progress
from sparring.losses import known_positive_mask
from sparring.models import Batches, Ranker, Retriever, TokenStore
from sparring.models.gradient_cache import CachedForward, Call
from sparring.models.memory import Pieces, TooLittleMemory, forget, out_of_memory
from sparring.models.modes import evaluating
from sparring.models.sharding import is_sharded, level, whole
from sparring.phases.teacher import Draw, TeacherScores
from sparring.types import InputError

logger = logging.getLogger("sparring")

Name = Literal["retriever", "ranker"]
_MANY = 1024
"""Tokens from which a forward without gradients lays weights out for faster products first (`evaluating`)."""
AHEAD = 2048
"""Pairs that a model at rest scores at a time, at least, while the phase has as many that it has not scored."""


@dataclass
class Trainee:
    """A model with what its training must remember between phases.

    ``updates`` counts this model's own optimiser steps, in all phases together; ``clip`` is the largest gradient norm,
    0 for none.
    """

    model: Retriever | Ranker
    wrapped: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    clip: float
    updates: int = 0


def make_trainee(
    model: Retriever | Ranker,
    accelerator: Accelerator,
    *,
    lr: float,
    updates: int,
    schedule: Literal["linear", "constant"] = "linear",
    warmup: float = 0.1,
    weight_decay: float = 0.01,
    clip: float = 2.0,
) -> Trainee:
    """AdamW (no decay on biases and norms) with a schedule over ``updates`` of this model's own steps.

    Args:
        updates: optimiser steps of this model over the whole run, all rounds together.
        warmup: share of ``updates`` in which the rate rises linearly from 0.
    """
    from transformers import get_scheduler

    decayed = [p for p in model.parameters() if p.requires_grad and p.ndim > 1]
    others = [p for p in model.parameters() if p.requires_grad and p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    if not is_sharded(model):
        model.to(accelerator.device)
    optimizer = torch.optim.AdamW(groups, lr=lr, fused=True)
    kind = "linear" if schedule == "linear" else "constant_with_warmup"
    scheduler = get_scheduler(kind, optimizer, num_warmup_steps=round(warmup * updates), num_training_steps=updates)
    wrapped = model if is_sharded(model) else accelerator.prepare_model(model)
    return Trainee(model, wrapped, optimizer, scheduler, clip)


@dataclass(frozen=True)
class Feed:
    """The cached tokens of both models, and the padded tokens that one forward call may hold."""

    retriever_queries: TokenStore
    retriever_passages: TokenStore
    ranker_queries: TokenStore
    ranker_passages: TokenStore
    token_budget: int = 8192


@dataclass(frozen=True)
class ListBatch:
    """b lists of 1 + n passages, column 0 labelled. ``total`` is the number of queries of the whole batch (B): over
    all micro-batches and processes."""

    queries: np.ndarray
    passages: np.ndarray
    total: int


class StepOutput(Protocol):
    """What a loss of `sparring.losses` returns."""

    @property
    def total(self) -> Tensor: ...
    @property
    def parts(self) -> dict[str, Tensor]: ...


class StepFunction(Protocol):
    """Scores a batch through the scorer and returns loss terms, with optional diagnostics (means over its queries)."""

    def __call__(self, batch: ListBatch, score: Scorer) -> tuple[StepOutput, dict[str, Tensor]]: ...


@dataclass(frozen=True)
class Step:
    """A method's step: which models it trains, and how a batch becomes a loss.

    ``teachers``: models at rest whose scores of the lists the step asks for. ``joins_queries``: the loss of one query
    reads other queries' passages (in-batch negatives), so the batch cannot be split into independent micro-batches.
    """

    name: str
    trains: tuple[Name, ...]
    function: StepFunction
    teachers: tuple[Name, ...] = ()
    joins_queries: bool = False

    def __post_init__(self) -> None:
        if set(self.trains) & set(self.teachers):
            raise AssertionError(f"{self.name}: a model that trains is no teacher at rest")


@dataclass
class Forwards:
    """Query-passage forwards by model and purpose. One query with one passage is one forward, also where the retriever
    encodes the query once for its whole list, or a teacher's score is known from an update before. Counted over all
    processes."""

    counts: Counter[str] = field(default_factory=Counter)

    def add(self, model: Name, purpose: Literal["trained", "teacher"], pairs: int) -> None:
        """Count ``pairs`` forwards."""
        self.counts[f"{model}_{purpose}"] += pairs

    def to_dict(self) -> dict[str, int]:
        """All four counters, zero where a model never ran."""
        names = ("retriever_trained", "ranker_trained", "retriever_teacher", "ranker_teacher")
        return {name: self.counts[name] for name in names}


class Scorer:
    """Scores lists with both models: with gradient for those in training, without gradient and with dropout off for
    the resting one, whose scores may be made ahead (`look_ahead`).

    With ``gradient_cache`` only one chunk's activations are in memory (`sparring.models.gradient_cache`): the same
    gradient for one more forward.
    """

    def __init__(
        self,
        team: Mapping[Name, Trainee],
        feed: Feed,
        trains: Sequence[Name],
        *,
        precision: str = "fp32",
        gradient_cache: bool = False,
        groups: np.ndarray | None = None,
        known: Callable[[np.ndarray], np.ndarray] | None = None,
        forwards: Forwards | None = None,
    ) -> None:
        self.team, self.feed, self.trains = team, feed, tuple(trains)
        self.precision, self.gradient_cache = precision, gradient_cache
        self.groups, self.known = groups, known
        self.forwards = forwards if forwards is not None else Forwards()
        self.pending: list[CachedForward] = []
        self.teachers: dict[Name, TeacherScores] = {}

    def work_in(self, pieces: Pieces) -> None:
        """Work through batches in these pieces from now on."""
        self.feed = replace(self.feed, token_budget=pieces.tokens)
        self.gradient_cache = pieces.gradient_cache

    def retriever(self, batch: ListBatch) -> Tensor:
        """Retriever scores of every list.  -> (b, 1+n) float32"""
        self._count("retriever", batch)
        if "retriever" in self.teachers:
            return self._known("retriever", batch)
        return self._retriever().score(*self._embed(batch))

    def ranker(self, batch: ListBatch, *, as_teacher: bool = False) -> Tensor:
        """Ranker logits of every list.  -> (b, 1+n) float32

        Args:
            as_teacher: score without gradient and with dropout off even while the ranker is in training; a forward
                of its own, counted as a teacher's.
        """
        b, n = batch.passages.shape
        self._count("ranker", batch, as_teacher)
        if "ranker" in self.teachers:
            return self._known("ranker", batch)
        return self._logits(np.repeat(batch.queries, n), batch.passages.reshape(-1), as_teacher).view(b, n)

    def in_batch(self, batch: ListBatch) -> tuple[Tensor, Tensor, Tensor]:
        """Every query against the passages of all queries and processes.

        Returns: scores (b, P), the labelled column of each query (b,), and the mask (b, P) of columns that must not
        count as negatives: the query's other known positives and repeated texts.
        """
        if self.groups is None or self.known is None:
            raise AssertionError("in-batch scoring needs the corpus groups and the known positives")
        n = batch.passages.shape[1]
        queries, passages = self._embed(batch)
        everyone = gather_rows(passages.reshape(-1, passages.shape[-1]))
        scores = self._retriever().scale * queries @ everyone.T
        device = scores.device
        columns = gather_rows(torch.from_numpy(self.groups[batch.passages.reshape(-1)].copy()).to(device))
        positive = torch.arange(len(queries), device=device) * n + rank() * len(queries) * n
        known = torch.from_numpy(self.known(batch.queries)).to(device)
        self._count("retriever", batch)
        return scores, positive, known_positive_mask(columns, known, positive)

    def rest(self, teachers: Sequence[Name], known: Mapping[Name, TeacherScores]) -> None:
        """From now on these models' scores are made by `look_ahead` alone; ``known``: what was made before."""
        rows = len(self.feed.ranker_passages)
        self.teachers = {name: known[name] if name in known else TeacherScores(rows) for name in teachers}

    def look_ahead(self, draw: Draw, number: int, steps: int) -> None:
        """Let the teachers score what step ``number`` will ask for and they have not scored yet; with it, of the steps
        after it, until there are `AHEAD` pairs. Several processes share these, and each gets all scores.

        By rounding, a score depends on which pairs are scored with it."""
        for name, known in self.teachers.items():
            missing = known.missing(draw, number, steps, AHEAD)
            if len(missing):
                known.add(missing, self._score_shared(name, *known.pairs(missing)))

    def _score_shared(self, name: Name, queries: np.ndarray, passages: np.ndarray) -> np.ndarray:
        """A teacher's scores of N pairs, float32 (N,)."""
        score = self._logits if name == "ranker" else self._similarities
        if len(queries) < processes():  # every process needs one
            return score(queries, passages).float().cpu().numpy()
        own = np.array_split(np.arange(len(queries)), processes())[rank()]
        scores = score(queries[own], passages[own]).float()
        shared = torch.zeros(len(queries), device=scores.device)
        shared[int(own[0]) : int(own[-1]) + 1] = scores
        found: np.ndarray = sum_tensor(shared).cpu().numpy()
        return found

    def _known(self, name: Name, batch: ListBatch) -> Tensor:
        found = torch.from_numpy(self.teachers[name].of(batch.queries, batch.passages))
        return found.to(self.team[name].model.device)

    def backward(self, loss: Tensor) -> None:
        """Differentiate, replaying what was cached. DDP and FSDP average over processes: a sum is scaled up first."""
        (loss * processes()).backward()
        for cached in self.pending:
            cached.replay()
        self.pending.clear()

    def _embed(self, batch: ListBatch) -> tuple[Tensor, Tensor]:
        """Each query once, each distinct passage of the batch once.  -> (b, d), (b, 1+n, d)"""
        distinct, position = np.unique(batch.passages.reshape(-1), return_inverse=True)
        queries, passages = self._embed_rows(batch.queries, distinct)
        return queries, passages[torch.from_numpy(position).to(passages.device)].view(*batch.passages.shape, -1)

    def _embed_rows(self, queries: np.ndarray, passages: np.ndarray) -> tuple[Tensor, Tensor]:
        model, budget = self._retriever(), self.feed.token_budget
        asked = model.batches(self.feed.retriever_queries, queries, "query", token_budget=budget)
        read = model.batches(self.feed.retriever_passages, passages, "passage", token_budget=budget)
        return (
            self._run("retriever", lambda module, inputs: module(inputs, "query"), asked),
            self._run("retriever", lambda module, inputs: module(inputs, "passage"), read),
        )

    def _similarities(self, queries: np.ndarray, passages: np.ndarray) -> Tensor:
        """Retriever scores of N pairs; each query and each passage encoded once.  -> (N,) float32"""
        asked, of_query = np.unique(queries, return_inverse=True)
        read, of_passage = np.unique(passages, return_inverse=True)
        left, right = self._embed_rows(asked, read)
        left, right = (x[torch.from_numpy(of).to(x.device)] for x, of in ((left, of_query), (right, of_passage)))
        return self._retriever().score(left, right[:, None]).squeeze(1)

    def _logits(self, queries: np.ndarray, passages: np.ndarray, as_teacher: bool = False) -> Tensor:
        """Ranker logits of N pairs.  -> (N,) float32"""
        stores = self.feed.ranker_queries, queries, self.feed.ranker_passages, passages
        pairs = self._ranker().batches(*stores, token_budget=self.feed.token_budget)
        return self._run("ranker", lambda model, inputs: model(inputs), pairs, as_teacher)

    def _retriever(self) -> Retriever:
        model = self.team["retriever"].model
        assert isinstance(model, Retriever)
        return model

    def _ranker(self) -> Ranker:
        model = self.team["ranker"].model
        assert isinstance(model, Ranker)
        return model

    def _count(self, name: Name, batch: ListBatch, as_teacher: bool = False) -> None:
        trained = name in self.trains and not as_teacher
        self.forwards.add(name, "trained" if trained else "teacher", batch.passages.size * processes())

    def _run(self, name: Name, call: Call, batches: Batches, as_teacher: bool = False) -> Tensor:
        trainee = self.team[name]
        if is_sharded(trainee.model):
            batches = level(batches, trainee.model.device)
        if name not in self.trains or as_teacher:
            with evaluating(trainee.model, self._dtype(), fuse=batches.tokens >= _MANY):
                return call(trainee.model, batches)
        if self.gradient_cache:
            self.pending.append(CachedForward.run(trainee.model, call, batches, self._dtype()))
            return self.pending[-1].outputs
        device = next(trainee.model.parameters()).device.type
        with torch.autocast(device, self._dtype(), enabled=self._dtype() is not None):
            return call(trainee.wrapped, batches)

    def _dtype(self) -> torch.dtype | None:
        return torch.bfloat16 if self.precision == "bf16" else None


@dataclass
class Reached:
    """How far a phase is.

    Attributes:
        done: updates.
        sums: of their terms.
        pieces: in which the last one was worked through; None is as asked.
        teachers: scores of models at rest that are known.
    """

    done: int = 0
    sums: dict[str, float] = field(default_factory=dict)
    pieces: Pieces | None = None
    teachers: Mapping[Name, TeacherScores] = field(default_factory=dict)


class Progress(Protocol):
    """Keeps what a stopped phase needs to go on."""

    def begun(self) -> Reached:
        """What is done already, its weights in place."""

    def ended(self, reached: Reached, *, keep: bool = False) -> None:
        """So much is done; ``keep``: it must not be lost."""


def _row_numbers(rows: np.ndarray) -> list[str]:
    return [str(row) for row in rows]


def fit(
    team: Mapping[Name, Trainee],
    scorer: Scorer,
    step: Step,
    draw: Callable[[int, int], tuple[np.ndarray, np.ndarray]],
    *,
    steps: int,
    batch: int,
    accumulate: int = 1,
    label: str = "",
    metrics: Metrics | None = None,
    names: Callable[[np.ndarray], list[str]] = _row_numbers,
    seed: int | None = None,
    progressed: Progress | None = None,
) -> dict[str, float]:
    """Run ``steps`` updates of the models that ``step`` trains; leave the others bit-identical.

    Args:
        draw: (step number, B) -> query rows (B,), passage rows (B, 1+n). Depends on these alone, not on the process;
            is asked for a step more than once.
        batch: B, queries (lists) per update, over all processes and micro-batches.
        accumulate: micro-batches that one update is split into; the gradient is that of the whole batch.
        names: query rows -> ids, for error messages.
        seed: of dropout, for each update together with its number and the process; None leaves torch's generator.
        progressed: told the sums of the terms after every update; what it knows at the start is not done again.

    An update for which memory does not suffice is repeated from its start in smaller pieces (`Pieces.smaller`), which
    last for the phase; with several processes it is an error, for the others are in the middle of theirs.

    Returns: means over the steps of every loss term and diagnostic.
    Raises: NotFinite when the loss is not finite (naming the queries); TooLittleMemory; InputError when B cannot be
        split as asked.
    """
    _check_split(step, batch, accumulate, scorer.gradient_cache)
    for name, trainee in team.items():
        trainee.model.train(name in step.trains)
        trainee.optimizer.zero_grad(set_to_none=True)
    so_far = progressed.begun() if progressed is not None else Reached()
    pieces = Pieces(scorer.feed.token_budget, accumulate, scorer.gradient_cache)
    if so_far.pieces is not None:
        pieces = pieces.at_most(so_far.pieces)
    scorer.rest(step.teachers, so_far.teachers)
    drawn = lru_cache(maxsize=64)(lambda number: draw(number, batch))  # teachers look ahead, and more than once
    with progress(label or step.name, steps, "steps") as bar:
        bar.update(so_far.done)
        for number in range(so_far.done, steps):
            lists, start, counted = drawn(number), _start(seed, number), Counter(scorer.forwards.counts)
            while True:
                start()
                scorer.work_in(pieces)
                try:
                    scorer.look_ahead(drawn, number, steps)
                    logged = _update(team, scorer, step, _micro_batches(*lists, pieces.accumulate), names)
                    break
                except NotFinite as error:
                    error.batch["update"] = number
                    raise
                except Exception as error:
                    if not out_of_memory(error):
                        raise
                    pieces = _smaller(pieces, step, batch, error, label or step.name)
                _undo(team, scorer, counted)
                if number == so_far.done:  # the first of this process: as if it had begun in the smaller pieces
                    scorer.rest(step.teachers, so_far.teachers)
                if metrics is not None:
                    metrics.write("memory", phase=label, step=number, **asdict(pieces))
                if progressed is not None:
                    progressed.ended(Reached(number, so_far.sums, pieces, scorer.teachers), keep=True)
            for key, value in logged.items():
                so_far.sums[key] = so_far.sums.get(key, 0.0) + value
            if metrics is not None:
                metrics.write("step", phase=label, step=number, **logged)
            bar.update(1)
            if progressed is not None:
                progressed.ended(Reached(number + 1, so_far.sums, pieces, scorer.teachers))
    for trainee in team.values():
        trainee.model.eval()
    for name, known in scorer.teachers.items():
        if len(known):
            logger.info("%s: the %s scored %s pairs, each once", label or step.name, name, f"{len(known):,}")
    scorer.rest((), {})
    return {key: value / max(steps, 1) for key, value in so_far.sums.items()}


def _seed_of(seed: int, number: int) -> int:
    """One seed for each update and process: dropout needs nothing of the updates before it."""
    return zlib.crc32(f"{seed} {number} {rank()}".encode())


def _start(seed: int | None, number: int) -> Callable[[], None]:
    """Sets torch's generators to where an update begins: as often as it is tried."""
    if seed is not None:
        of_update = _seed_of(seed, number)

        def seeded() -> None:
            torch.manual_seed(of_update)

        return seeded
    cpu, gpus = torch.get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []

    def restore() -> None:
        torch.set_rng_state(cpu)
        if gpus:
            torch.cuda.set_rng_state_all(gpus)

    return restore


def _smaller(pieces: Pieces, step: Step, batch: int, error: Exception, label: str) -> Pieces:
    """The next smaller pieces, with a warning; TooLittleMemory where there are none, or with several processes."""
    text = forget(error)
    found = pieces.smaller(step.joins_queries, batch) if processes() == 1 else None
    if found is None:
        raise TooLittleMemory(
            f"too little memory for an update of {label}", where="run.train_tokens, accumulate, run.gradient_cache",
            got=f"{text}, at {pieces}",
            fix="free memory; or make train_tokens smaller, accumulate larger, or set gradient_cache=true, with which "
            "a stopped run may go on: the same command with them added",
        )  # fmt: skip
    logger.warning("%s: too little memory (%s): this update again, and the phase on, in %s", label, text, found)
    return found


def _undo(team: Mapping[Name, Trainee], scorer: Scorer, counted: Counter[str]) -> None:
    """Leave nothing of an update that was given up, but what teachers scored."""
    scorer.pending.clear()
    scorer.forwards.counts.clear()
    scorer.forwards.counts.update(counted)
    for trainee in team.values():
        trainee.optimizer.zero_grad(set_to_none=True)


def _check_split(step: Step, batch: int, accumulate: int, gradient_cache: bool) -> None:
    if batch % (accumulate * processes()):
        raise InputError(
            "the batch cannot be split evenly",
            where="batch, accumulate",
            expected="queries per update divisible by accumulate x processes",
            got=f"batch={batch}, accumulate={accumulate}, processes={processes()}",
            fix="choose another batch or accumulate",
        )
    if step.joins_queries and accumulate > 1:
        raise InputError(
            "in-batch negatives cannot be accumulated: a micro-batch would see fewer negatives",
            where="accumulate",
            expected="accumulate=1",
            got=f"accumulate={accumulate}" + (", gradient_cache on" if gradient_cache else ""),
            fix="set gradient_cache=true, which gives the whole batch's gradient in the memory of a chunk",
        )


def _micro_batches(queries: np.ndarray, passages: np.ndarray, accumulate: int) -> list[ListBatch]:
    """This process's share of the batch, in ``accumulate`` pieces."""
    own = np.array_split(np.arange(len(queries)), processes())[rank()]
    return [ListBatch(queries[part], passages[part], len(queries)) for part in np.array_split(own, accumulate)]


def _update(
    team: Mapping[Name, Trainee],
    scorer: Scorer,
    step: Step,
    micro_batches: Sequence[ListBatch],
    names: Callable[[np.ndarray], list[str]],
) -> dict[str, float]:
    logged: dict[str, float] = {}
    for number, batch in enumerate(micro_batches):
        with ExitStack() as stack:
            if scorer.gradient_cache or number < len(micro_batches) - 1:
                for name in step.trains:
                    stack.enter_context(_no_sync(team[name].wrapped))
            output, diagnostics = step.function(batch, scorer)
            bad = not bool(torch.isfinite(output.total))
            if any_process(bad, output.total.device):  # all stop together: none is left waiting for the others
                raise _not_finite(step, output, batch, names(batch.queries) if bad else ["of another process"])
            scorer.backward(output.total)
        share = len(batch.queries) / batch.total
        shares = {**output.parts, **{key: value * share for key, value in diagnostics.items()}}
        for key, value in shares.items():
            logged[key] = logged.get(key, 0.0) + float(value)
    try:
        for name in step.trains:
            if scorer.gradient_cache and not is_sharded(team[name].model):  # FSDP has averaged chunk by chunk
                _average_gradients(team[name].model)
        norms = {name: _gradient_norm(team[name]) for name in step.trains}
        if not all(math.isfinite(norm) for norm in norms.values()):  # of all processes together: each of them raises
            raise _bad_gradient(step, micro_batches, logged, {k: float(v) for k, v in norms.items()}, names)
        for name in step.trains:
            _advance(team[name], norms[name])
    except Exception as error:
        if not out_of_memory(error):
            raise
        raise TooLittleMemory(  # weights may have moved: this update cannot be begun again
            "too little memory for the optimiser", where=step.name, got=forget(error),
            fix="free memory or take a smaller model; the same command goes on from the last checkpoint",
        ) from None  # fmt: skip
    return sum_over_processes(logged, output.total.device)


def _gradient_norm(trainee: Trainee) -> Tensor:
    """Of all the model's gradients together, not yet clipped."""
    return whole(torch.nn.utils.get_total_norm([p.grad for p in trainee.model.parameters() if p.grad is not None]))


def _advance(trainee: Trainee, norm: Tensor) -> None:
    """Clip the gradient, whose norm is given, and make the update."""
    if trainee.clip:
        torch.nn.utils.clip_grads_with_norm_(trainee.model.parameters(), trainee.clip, norm)
    trainee.optimizer.step()
    trainee.scheduler.step()
    trainee.optimizer.zero_grad(set_to_none=True)
    trainee.updates += 1


def _average_gradients(model: nn.Module) -> None:
    """After cached backwards, which run outside DDP: the mean over processes."""
    if processes() == 1:
        return
    for parameter in model.parameters():
        if parameter.grad is not None:
            torch.distributed.all_reduce(parameter.grad)
            parameter.grad /= processes()


def _no_sync(wrapped: nn.Module) -> AbstractContextManager[object]:
    """DDP's ``no_sync``; nothing for a bare module, nor a sharded one, whose whole gradient would have to be kept."""
    quiet = getattr(wrapped, "no_sync", None)
    return quiet() if quiet is not None else ExitStack()


class NotFinite(InputError):
    """A loss or a gradient that is no number: the training diverged, or a text broke it.

    ``batch``: what it was computed from: the step's name, the update's number, the loss and its terms, and this
    process's query rows [b] and passage rows [b, 1 + n] of the micro-batch.
    """

    batch: dict[str, Any]


def _not_finite(step: Step, output: StepOutput, batch: ListBatch, queries: list[str]) -> NotFinite:
    values = {name: float(value) for name, value in output.parts.items()}
    terms = ", ".join(f"{name}={value:g}" for name, value in values.items())
    error = NotFinite(
        "the loss is not finite",
        where=f"step {step.name!r}, queries {', '.join(queries)}",
        expected="a finite number",
        got=f"{float(output.total.detach())} ({terms})",
        fix="lower the learning rate, use precision=fp32, or look at these queries' texts with `sparring check`",
    )
    error.batch = {"step": step.name, "loss": float(output.total.detach()), "terms": values}
    error.batch |= {"queries": batch.queries, "passages": batch.passages}
    return error


def _bad_gradient(
    step: Step, micro_batches: Sequence[ListBatch], terms: Mapping[str, float], norms: Mapping[Name, float],
    names: Callable[[np.ndarray], list[str]],
) -> NotFinite:  # fmt: skip
    """Of a finite loss; the optimiser would turn every weight into NaN, and the next batch would be blamed."""
    queries = np.concatenate([batch.queries for batch in micro_batches])
    error = NotFinite(
        "the gradient is not finite",
        where=f"step {step.name!r}, queries {', '.join(names(queries))}",
        expected="a finite norm",
        got=", ".join(f"{norm} ({name})" for name, norm in norms.items()),
        fix="lower the learning rate, use precision=fp32, or look at these queries' texts with `sparring check`",
    )
    error.batch = {"step": step.name, "norms": dict(norms), "terms": dict(terms), "queries": queries}
    error.batch["passages"] = np.concatenate([batch.passages for batch in micro_batches])
    return error
