"""The rows of speed.py: each compares results first, then times its arms in turn and returns what was found."""

from __future__ import annotations

import copy
import tempfile
from argparse import Namespace
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from accelerate import Accelerator
from sentence_transformers.util import semantic_search

import ar2_step
import baselines
import joint_step
from harness import PeakMemory, Ratio, Roofline, interleave, ratio, timed
from material import Material, without_dropout
from ports import Batch, Lengths, Side, compare
from sparring.models import Ranker, Retriever, TokenStore, lean, parallel
from sparring.models.compiling import compile_layers
from sparring.models.inputs import input_module
from sparring.phases import sieve
from sparring.phases.encode import encode
from sparring.phases.fit import Feed, Scorer, Step, fit, make_trainee
from sparring.phases.index import build_index
from sparring.phases.mine import mine
from sparring.recipes.ar2 import AR2Config, retriever_step
from sparring.recipes.steps import ranker_step

DTYPES: dict[str, torch.dtype | None] = {"fp32": None, "bf16": torch.bfloat16}
LR = 2e-5


@dataclass
class Row:
    """One line of the table: ratios are the other arm's time over ours, shares are of the matrix-product peak."""

    what: str
    against: str
    check: str
    ratio: dict[str, float] | None = None
    goal: float | None = None
    share: dict[str, float] | None = None
    share_goal: float | None = None
    note: str = ""
    peak_gib: float = 0.0
    seconds: dict[str, list[float]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def agreed(what: str, apart: float, allowed: float) -> str:
    """The check as text; the benchmark ends where the arms do not agree."""
    if not apart <= allowed:
        raise SystemExit(f"{what} differ by {apart:g}, allowed are {allowed:g}: nothing to compare")
    return f"{what} apart by {apart:.1e}"


def forward_flops(retriever: Retriever, store: TokenStore) -> float:
    """Multiplications and additions of the encoder's products for real tokens: no padding, no embeddings."""
    config, read = input_module(retriever.model, "document").model.config, retriever.inputs["passage"]
    lengths = np.minimum(store.true_lengths + read.template.single.overhead, read.max_length).astype(float)
    size, inner = config.hidden_size, config.intermediate_size
    each = 8 * size**2 + 4 * size * inner
    return float(config.num_hidden_layers * (each * lengths + 4 * size * lengths**2).sum())


def overlap(a: np.ndarray, b: np.ndarray) -> float:
    """Mean share of a list's rows that the other list has too."""
    return float(np.mean([len(np.intersect1d(x, y)) / len(x) for x, y in zip(a, b, strict=True)]))


def encoding(m: Material) -> list[Row]:
    """Corpus encoding in fp32 and bf16 against SentenceTransformer.encode_document as it is called by default."""
    retriever = m.retriever().eval()
    store, queries = retriever.tokenize(m.passages, "passage", None), retriever.tokenize(m.queries, "query", None)
    flops, rooflines = forward_flops(retriever, store), {
        name: Roofline(dtype or torch.float32, m.options.device) for name, dtype in DTYPES.items()
    }  # fmt: skip

    def ours(precision: str, tokenised: bool = True, model: Retriever = retriever) -> np.ndarray:
        tokens = store if tokenised else model.tokenize(m.passages, "passage", None)
        return encode(model, tokens, "passage", token_budget=m.budget, dtype=DTYPES[precision])

    settings = {"show_progress_bar": False, "normalize_embeddings": True}
    theirs = partial(retriever.model.encode_document, m.passages, **settings)
    exact, reduced = ours("fp32"), ours("bf16")
    check = agreed("embeddings", float(np.abs(exact - theirs()).max()), 1e-4)
    asked = encode(retriever, queries, "query")
    k = min(100, len(m.passages))
    kept = overlap(build_index(exact).search(asked, k)[1], build_index(reduced).search(
        encode(retriever, queries, "query", dtype=torch.bfloat16), k)[1])  # fmt: skip
    cast = copy.deepcopy(retriever.model).to(torch.bfloat16)
    def without(module: Any, name: str, value: Any, precision: str) -> np.ndarray:
        with mock.patch.object(module, name, value):
            return ours(precision)

    plain = partial(without, lean, "_pays", lambda _: False)
    in_turn = partial(without, parallel, "MOST", 1)
    on_cpu = m.options.device == "cpu"
    arms: dict[str, Callable[[], Any]] = {
        **({f"ours, {p}, torch's products": partial(plain, p) for p in DTYPES} if on_cpu else {}),
        **({f"ours, {p}, chunks in turn": partial(in_turn, p) for p in DTYPES} if on_cpu else {}),
        "ours, fp32": partial(ours, "fp32"), "ours, fp32, tokenising too": partial(ours, "fp32", False),
        "ours, bf16": partial(ours, "bf16"), "ours, bf16, tokenising too": partial(ours, "bf16", False),
        "sentence-transformers": theirs,
        "sentence-transformers, bf16 weights": partial(cast.encode_document, m.passages, **settings),
        "peak, fp32": partial(rooflines["fp32"].run, flops), "peak, bf16": partial(rooflines["bf16"].run, flops),
    }  # fmt: skip
    compiled = ""
    if not on_cpu:
        faster = copy.deepcopy(retriever)
        compile_layers(faster)
        compiled = f"{_seconds(lambda: ours('bf16', model=faster)):.0f} s for the first time"
        arms["ours, bf16, compiled"] = partial(ours, "bf16", model=faster)
    with PeakMemory() as memory:
        s = interleave(arms, m.options.repetitions)
    gib, other = memory.bytes / 2**30, "sentence-transformers"
    rows = []
    for precision, goal in (("fp32", 1.3), ("bf16", 2.5)):
        mine_, tokenising = f"ours, {precision}", f"ours, {precision}, tokenising too"
        note = f"tokenising too: {ratio(s, other, tokenising)}; ours against ours "
        ways = ("torch's products", "chunks in turn") if on_cpu else ()
        note += ", ".join(f"with {way} {ratio(s, f'{mine_}, {way}', mine_)}" for way in ways)
        if precision == "bf16":
            note += f", in fp32 {ratio(s, 'ours, fp32', mine_)}"
            note += f", compiled {ratio(s, 'ours, bf16, compiled', mine_)} ({compiled})" if compiled else ""
            note += f"; against bf16 weights: {ratio(s, 'sentence-transformers, bf16 weights', mine_)}"
        rows.append(Row(
            f"corpus encoding, {precision}", f"{other} encode, fp32",
            check if precision == "fp32" else f"R@{k} against the fp32 lists {kept:.4f}",
            ratio(s, other, mine_).to_dict(), goal, ratio(s, f"peak, {precision}", mine_).to_dict(),
            0.85 if precision == "fp32" else None, note, gib, s,
        ))  # fmt: skip
    return rows


def mining(m: Material) -> list[Row]:
    """Exact search of synthetic unit vectors, top 100."""
    o, rng = m.options, np.random.default_rng(m.options.seed)
    centres = rng.standard_normal((max(4, o.search_passages // 100), o.dim)).astype(np.float32)

    def vectors(count: int) -> np.ndarray:
        drawn = centres[rng.integers(len(centres), size=count)]
        drawn += 0.7 * rng.standard_normal(drawn.shape, dtype=np.float32)
        return drawn / np.linalg.norm(drawn, axis=1, keepdims=True)

    passages, queries, k = vectors(o.search_passages), vectors(o.search_queries), min(100, o.search_passages)
    sample = queries[:: max(1, len(queries) // 50)]
    exact = sample.astype(np.float64) @ passages.astype(np.float64).T
    best = np.sort(exact, axis=1)[:, ::-1][:, :k]
    check = agreed("the scores of the top 100 and float64's",
                   float(np.abs(build_index(passages).search(sample, k)[0] - best).max()), 1e-5)  # fmt: skip
    right, left, roofline = torch.from_numpy(passages), torch.from_numpy(queries), Roofline(torch.float32)
    flops = 2.0 * len(queries) * len(passages) * o.dim

    def plain() -> None:
        for start in range(0, len(left), 128):
            torch.topk(left[start : start + 128] @ right.T, k)

    def by_faiss() -> None:
        with mock.patch.object(sieve, "suits", return_value=False):
            build_index(passages).search(queries, k)

    faiss = baselines.InstalledFaiss(passages, queries)
    arms: dict[str, Callable[[], Any]] = {
        "ours": lambda: build_index(passages).search(queries, k),
        "ours by faiss alone": by_faiss,
        "matrix product and topk": plain,
        "faiss as installed": partial(faiss.search, k),
        "sentence-transformers": lambda: semantic_search(left, right, top_k=k),
        "peak": partial(roofline.run, flops),
    }
    sifted = sieve.pays(len(queries), len(passages), o.dim, k)
    if sifted:
        arms["peak in bf16"] = partial(Roofline(torch.bfloat16).run, flops)
    try:
        with PeakMemory() as memory:
            s = interleave(arms, o.repetitions)
    finally:
        faiss.close()
    note = ", ".join(f"{name}: {ratio(s, name, 'ours')}" for name in list(arms)[1:5])
    note += f"; share of the peak in bf16: {ratio(s, 'peak in bf16', 'ours').percent()}" if sifted else ""
    note += f"; by faiss alone, share of the peak: {ratio(s, 'peak', 'ours by faiss alone').percent()}"
    what = f"mining, {o.search_queries:,} queries x {o.search_passages:,} passages, top {k}, exact"
    return [Row(what, "the peak", check, None, None, ratio(s, "peak", "ours").to_dict(), 0.8,
                f"times as fast as {note}", memory.bytes / 2**30, s)]  # fmt: skip


def team(models: Mapping[Any, Any], updates: int) -> dict[Any, Any]:
    """Our optimisers and schedules, as the trainers of sentence-transformers set theirs."""
    on_cpu = all(model.device.type == "cpu" for model in models.values())
    accelerator = Accelerator(cpu=on_cpu)  # with the precision that the other arm's trainer has set for this process
    return {
        name: make_trainee(model, accelerator, lr=LR, updates=updates, warmup=0.0, weight_decay=0.0, clip=1.0)
        for name, model in models.items()
    }


def train(models: Mapping[Any, Any], feed: Feed, step: Step, lists: tuple[np.ndarray, np.ndarray], batch: int,
          precision: str, pair: Mapping[Any, Any] | None = None) -> None:  # fmt: skip
    """All lists once, in order, through our training loop; ``pair`` are models that only score."""
    queries, passages = lists
    steps = len(queries) // batch
    members = team({**(pair or {}), **models}, steps)

    def draw(number: int, size: int) -> tuple[np.ndarray, np.ndarray]:
        part = slice(number * size, (number + 1) * size)
        return queries[part], passages[part]

    scorer = Scorer(members, feed, step.trains, precision=precision)
    fit(members, scorer, step, draw, steps=steps, batch=batch, seed=0)


def ranker_training(m: Material) -> list[Row]:
    """Listwise training of the ranker; the loss is ListNet with a one-hot label on both sides."""
    o, base, retriever = m.options, m.ranker(), m.retriever()
    feed, lists = m.feed(retriever, base), m.lists(o.batch * o.steps, o.list_size)
    data = baselines.ranker_lists([m.queries[q] for q in lists[0]], [[m.passages[p] for p in r] for r in lists[1]])
    apart = _ranker_gradients(base, feed, lists, data, o.batch)
    check = f"{agreed('losses', apart[0], 1e-4)}, {agreed('gradients', apart[1], 1e-3)} (relative, fp32)"
    rows = []

    def in_turn(precision: str) -> None:
        with mock.patch.object(parallel, "MOST_TRAINED", 1):
            train({"ranker": copy.deepcopy(base)}, feed, ranker_step(), lists, o.batch, precision)

    for precision in DTYPES:
        arms: dict[str, Callable[[], Any]] = {
            "ours": lambda p=precision: train({"ranker": copy.deepcopy(base)}, feed, ranker_step(), lists, o.batch, p),
            "ours, chunks in turn": partial(in_turn, precision),
            "sentence-transformers": lambda p=precision: baselines.train_ranker(
                copy.deepcopy(base.model), data, batch=o.batch, steps=o.steps, lr=LR, bf16=p == "bf16"),
        }  # fmt: skip
        with PeakMemory() as memory:
            s = interleave(arms, o.repetitions)
        rate = o.batch * o.steps * o.list_size / float(np.median(s["ours"]))
        rows.append(Row(f"ranker training, {precision}", f"CrossEncoderTrainer, {precision}", check,
                        ratio(s, "sentence-transformers", "ours").to_dict(), 1.3,
                        note=f"{rate:.0f} pairs/s; chunks in turn: {ratio(s, 'ours, chunks in turn', 'ours')}",
                        peak_gib=memory.bytes / 2**30, seconds=s))  # fmt: skip
    return rows


def _ranker_gradients(base: Ranker, feed: Feed, lists: Any, data: Any, batch: int) -> tuple[float, float]:
    """Relative difference of losses and of gradients on one batch, dropout off, fp32."""
    ours, theirs = copy.deepcopy(base), copy.deepcopy(base.model)
    without_dropout(ours, theirs)
    members = team({"ranker": ours}, 1)
    from sparring.phases.fit import ListBatch

    part = ListBatch(lists[0][:batch], lists[1][:batch], batch)
    terms, _ = ranker_step().function(part, Scorer(members, feed, ("ranker",)))
    terms.total.backward()
    rows = data[:batch]
    labels = [torch.tensor(label, device=theirs.device) for label in rows["labels"]]
    loss = baselines.ListNetLoss(theirs)([rows["query"], rows["docs"]], labels)
    loss.backward()
    own, other = (torch.cat([p.grad.reshape(-1) for p in model.parameters() if p.grad is not None])
                  for model in (ours.model, theirs))  # fmt: skip
    total = float(terms.total.detach())
    expected = float(loss.detach())
    return abs(total - expected) / abs(expected), float((own - other).norm() / other.norm())


def joint(m: Material) -> list[Row]:
    """RocketQAv2's joint step on lists of 32 against a straightforward port of the official one."""
    o, rows = m.options, []
    retriever, ranker, feed, lengths, batch = _for_ports(m, o.joint_lists, o.joint_size)
    for precision in DTYPES:
        port = joint_step.Port(copy.deepcopy(retriever), copy.deepcopy(ranker), feed, lengths, precision)
        ours = joint_step.our_side(copy.deepcopy(retriever), copy.deepcopy(ranker), feed, precision)
        what = f"RocketQAv2 joint step, lists of {o.joint_size}"
        rows.append(_against_port(what, ours, port, batch, precision, o.repetitions, goal=3.0))
    return rows


def ar2_updates(m: Material) -> list[Row]:
    """AR2's two updates on lists of 1 + 15 against straightforward ports of the official ones."""
    o, rows = m.options, []
    retriever, ranker, feed, lengths, batch = _for_ports(m, o.ar2_lists, o.ar2_size)
    for update in ar2_step.UPDATES:
        for precision in DTYPES:
            port = ar2_step.Port(update, copy.deepcopy(retriever), copy.deepcopy(ranker), feed, lengths, precision)
            ours = ar2_step.our_side(update, copy.deepcopy(retriever), copy.deepcopy(ranker), feed, precision)
            what = f"AR2 {update} update, lists of {o.ar2_size}"
            rows.append(_against_port(what, ours, port, batch, precision, o.repetitions, rounding=0.1))
    return rows


def _for_ports(m: Material, count: int, size: int) -> tuple[Retriever, Ranker, Feed, Lengths, Batch]:
    """Models and tokens cut to the ports' fixed lengths, and lists of queries that fit."""
    o = m.options
    lengths = Lengths(o.query_length, o.passage_length, o.pair_length)
    shorter = copy.copy(o)
    shorter.retriever_length, shorter.ranker_length = o.passage_length, o.pair_length
    long = Material(m.passages, m.queries, m.labelled, m.model, shorter)
    retriever, ranker = long.retriever(), long.ranker()
    feed = m.feed(retriever, ranker)
    short = np.flatnonzero(feed.retriever_queries.true_lengths + 2 <= lengths.query)
    queries, passages = Material(
        m.passages, [m.queries[q] for q in short], m.labelled[short], m.model, o
    ).lists(count, size)  # fmt: skip
    return retriever, ranker, feed, lengths, (short[queries], passages)


def _against_port(what: str, ours: Side, port: Side, batch: Batch, precision: str, repetitions: int,
                  goal: float | None = None, rounding: float = 1e-2) -> Row:  # fmt: skip
    """Losses and gradients first, then the times of both sides; ``rounding``: how far apart bf16's losses may be. AR2's
    multiply two rounded logarithms: with a random encoder each side's is up to 3 % from fp32's."""
    loss, gradient = compare(ours, port, batch)
    allowed = (1e-4, 1e-3) if precision == "fp32" else (rounding, float("inf"))
    check = f"{agreed('losses', loss, allowed[0])}, {agreed('gradients', gradient, allowed[1])} (relative)"
    with PeakMemory() as memory:
        s = interleave({"ours": partial(ours.step, *batch), "port": partial(port.step, *batch)}, repetitions)
    return Row(f"{what}, {precision}", f"the port, {precision}", check, ratio(s, "port", "ours").to_dict(), goal,
               note=f"{len(batch[0])} lists", peak_gib=memory.bytes / 2**30, seconds=s)  # fmt: skip


def pools(retriever: Retriever, m: Material, feed: Feed, dtype: torch.dtype | None, depth: int) -> Any:
    """Our refresh: encode passages and queries, index, mine."""
    corpus = encode(retriever, feed.retriever_passages, "passage", token_budget=m.budget, dtype=dtype)
    asked = encode(retriever, feed.retriever_queries, "query", token_budget=m.budget, dtype=dtype)
    positives = {row: [int(passage)] for row, passage in enumerate(m.labelled)}
    groups = np.arange(len(m.passages))
    return mine(asked, np.arange(len(asked)), positives, build_index(corpus), groups, depth=depth + 1,
                scale=retriever.scale)  # fmt: skip


def refresh(m: Material) -> list[Row]:
    """A refresh from the second round on (tokens are stored) against mine_hard_negatives, which does all of it."""
    o, retriever = m.options, m.retriever().eval()
    feed, depth = m.feed(retriever, m.ranker()), min(100, len(m.passages) // 2)
    positives = [m.passages[p] for p in m.labelled]
    theirs = partial(baselines.mine, retriever.model, m.queries, positives, m.passages, depth)
    place = {text: row for row, text in enumerate(m.passages)}
    expected = theirs()
    rows, arms = [], {"sentence-transformers": theirs}
    arms |= {f"ours, {p}": partial(pools, retriever, m, feed, dtype, depth) for p, dtype in DTYPES.items()}
    with PeakMemory() as memory:
        s = interleave(arms, o.repetitions)
    for precision, dtype in DTYPES.items():
        found = pools(retriever, m, feed, dtype, depth)
        same = []
        for query, (start, end) in enumerate(zip(found.offsets[:-1], found.offsets[1:], strict=True)):
            other = expected.get(m.queries[found.queries[query]])
            if other is not None:
                own = found.candidates[start:end][:depth]
                same.append(len(np.intersect1d(own, [place[text] for text in other])) / len(own))
        if precision == "fp32":
            agreed("pools (1 - overlap)", 1 - float(np.mean(same)), 0.01)
        rows.append(Row(
            f"refresh from round 2 on, {precision}", "mine_hard_negatives, fp32",
            f"top-{depth} pools overlap {np.mean(same):.4f}",
            ratio(s, "sentence-transformers", f"ours, {precision}").to_dict(), 3.0 if precision == "bf16" else None,
            note=f"{len(m.passages):,} passages, {len(m.queries):,} queries", peak_gib=memory.bytes / 2**30, seconds=s,
        ))  # fmt: skip
    return rows


def ar2_round(m: Material) -> list[Row]:
    """Ranker, retriever taught by it, refresh: ours against CrossEncoderTrainer, predict, DistillKLDivLoss, mining.

    At least as much refresh to a pair as on the whole AWS set at the recipe's defaults: 18,908 passages and 6,070
    queries encoded for 128,000 pairs of each model.
    """
    o, m = m.options, m.smaller(m.options.round_passages, m.options.round_queries)
    retriever, ranker, steps = m.retriever(), m.ranker(), o.round_steps
    feed, lists = m.feed(retriever, ranker), m.lists(o.batch * steps, o.list_size)
    depth = min(o.depth, len(m.passages) - 2)
    queries, texts = [m.queries[q] for q in lists[0]], [[m.passages[p] for p in row] for row in lists[1]]
    pairs = [(q, p) for q, row in zip(queries, texts, strict=True) for p in row]
    positives = [m.passages[p] for p in m.labelled]

    parts: dict[str, dict[str, float]] = {}

    def ours(precision: str) -> None:
        pair = {"retriever": copy.deepcopy(retriever), "ranker": copy.deepcopy(ranker)}
        one = {"ranker": pair["ranker"]}, feed, ranker_step(), lists, o.batch, precision
        two = {"retriever": pair["retriever"]}, feed, retriever_step(AR2Config()), lists, o.batch, precision, pair
        parts[f"ours, {precision}"] = {
            "ranker": _seconds(train, *one), "teacher and retriever": _seconds(train, *two),
            "refresh": _seconds(pools, pair["retriever"], m, feed, DTYPES[precision], depth),
        }  # fmt: skip

    def theirs(precision: str) -> None:
        one, two, bf16 = copy.deepcopy(ranker.model), copy.deepcopy(retriever.model), precision == "bf16"
        settings: dict[str, Any] = {"batch": o.batch, "steps": steps, "lr": LR, "bf16": bf16}

        def taught() -> None:
            with torch.autocast(o.device, torch.bfloat16, enabled=bf16):
                scores = one.predict(pairs, activation_fn=torch.nn.Identity()).reshape(len(queries), -1)
            columns = {f"passage_{i}": [row[i] for row in texts] for i in range(o.list_size)}
            data = baselines.Dataset.from_dict({"query": queries, **columns, "label": scores.tolist()})
            baselines.train_retriever(two, data, scale=retriever.scale, **settings)

        def refreshed() -> None:
            with torch.autocast(o.device, torch.bfloat16, enabled=bf16):
                baselines.mine(two, m.queries, positives, m.passages, depth)

        data = baselines.ranker_lists(queries, texts)
        parts[f"theirs, {precision}"] = {
            "ranker": _seconds(lambda: baselines.train_ranker(one, data, **settings)),
            "teacher and retriever": _seconds(taught), "refresh": _seconds(refreshed),
        }  # fmt: skip

    arms = {f"{name}, {p}": partial(run, p) for p in DTYPES for name, run in (("ours", ours), ("theirs", theirs))}
    with PeakMemory() as memory:
        s = interleave(arms, max(1, o.repetitions - 2))
    forwards, size = o.batch * steps * o.list_size, f"{len(m.passages):,} passages, {len(m.queries):,} queries"
    note = f"{forwards:,} pairs a model, {size}; seconds of the last repetition, theirs and ours: "
    found = [("fp32", "fp32", None), ("bf16", "bf16", 3.0), ("bf16", "fp32", None)]
    return [
        Row(f"a round of AR2, {own}", f"its pieces in sentence-transformers, {other}",
            "losses, gradients and pools: see the rows above",
            ratio(s, f"theirs, {other}", f"ours, {own}").to_dict(), goal, peak_gib=memory.bytes / 2**30,
            seconds=s, note=note + ", ".join(
                f"{part} {parts[f'theirs, {other}'][part]:.1f} and {value:.1f}"
                for part, value in parts[f"ours, {own}"].items()))
        for own, other, goal in found
    ]  # fmt: skip


def memory(m: Material) -> list[Row]:
    """Encode to a file and mine from it: resident memory and seconds by number of passages (synthetic tokens)."""
    retriever, rows, rng = m.retriever().eval(), [], np.random.default_rng(m.options.seed)
    read, tokens = retriever.inputs["passage"], m.options.memory_tokens
    queries = encode(retriever, retriever.tokenize(m.queries, "query", None), "query")
    vocabulary = len(read.tokenizer)
    for count in m.options.memory_passages:
        with tempfile.TemporaryDirectory(dir=m.options.scratch) as place:
            file = Path(place) / "ids.int32"
            with file.open("wb") as out:
                for start in range(0, count, 1 << 20):
                    size = min(1 << 20, count - start)
                    out.write(rng.integers(5, vocabulary, size * tokens, dtype=np.int32).tobytes())
            store = TokenStore(
                np.memmap(file, np.int32, "r"), np.arange(count + 1, dtype=np.int64) * tokens,
                np.full(count, tokens, np.int32), read.stored_limit, read.prompt, read.tokenizer_id, f"{count}",
            )  # fmt: skip
            with PeakMemory() as peak:
                s = {
                    "encode": [_seconds(_encoded, retriever, store, place)],
                    "mine": [_seconds(_mined, place, queries)],
                }
        rows.append(Row(
            f"{count:,} passages encoded (bf16) and mined, {len(queries):,} queries", "4 GiB", "",
            note=f"{1e6 * s['encode'][0] / count:.0f} + {1e6 * s['mine'][0] / count:.1f} us a passage",
            peak_gib=peak.bytes / 2**30, seconds=s,
        ))  # fmt: skip
    return rows


def _seconds(run: Callable[..., Any], *arguments: Any) -> float:
    return timed(partial(run, *arguments))[0]


def _encoded(retriever: Retriever, store: TokenStore, place: str) -> None:
    out = Path(place) / "passages.npy"
    encode(retriever, store, "passage", out=out, token_budget=2048, dtype=torch.bfloat16)


def _mined(place: str, queries: np.ndarray) -> None:
    corpus = np.load(Path(place) / "passages.npy", mmap_mode="r")
    rows = np.arange(len(queries))
    positives = {int(row): [int(row)] for row in rows}
    mine(queries, rows, positives, build_index(corpus), np.arange(len(corpus)), depth=100)


ROWS: dict[str, Callable[[Material], list[Row]]] = {
    "encoding": encoding, "mining": mining, "refresh": refresh, "ranker": ranker_training, "joint": joint,
    "ar2step": ar2_updates, "round": ar2_round, "memory": memory,
}  # fmt: skip


def met(row: Mapping[str, Any]) -> str:
    """Whether the goals of a row are met: yes, no, or nothing where there is none."""
    wanted = [(row["ratio"], row["goal"]), (row["share"], row["share_goal"])]
    answers = [value["median"] >= goal for value, goal in wanted if value is not None and goal is not None]
    if row["against"] == "4 GiB":
        answers.append(row["peak_gib"] <= 4)
    return "" if not answers else "yes" if all(answers) else "no"


def spread(value: Mapping[str, float] | None, share: bool = False) -> str:
    """median (lowest .. highest)"""
    if value is None:
        return ""
    text = "{:.0%} ({:.0%} .. {:.0%})" if share else "{:.2f} ({:.2f} .. {:.2f})"
    return text.format(value["median"], value["min"], value["max"])


__all__ = ["ROWS", "Namespace", "Ratio", "Row", "met", "spread"]
