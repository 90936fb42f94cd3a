"""The training loop on a tiny real pair: what is updated, with which gradient, and what stays as it was."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import Tensor

from fit_fixtures import PASSAGES, QUERIES, STEPS, Pair, assert_close, draw, gradient_of, load_pair, state
from sparring.log import Metrics
from sparring.losses import Terms, list_softmax
from sparring.phases import fit as loop
from sparring.phases.fit import ListBatch, Scorer, Step, fit
from sparring.recipes.ar2 import AR2Config, retriever_step
from sparring.recipes.rocketqav2 import RocketQAv2Config, joint_step, static_step
from sparring.recipes.steps import in_batch_step, ranker_step
from sparring.recipes.steps import retriever_step as hard_labels
from sparring.types import InputError

Load = Callable[..., Pair]


@pytest.fixture(scope="module")
def accelerator() -> Accelerator:
    return Accelerator(cpu=True)


@pytest.fixture
def load(tiny_st: Path, tiny_ce: Path) -> Load:
    return lambda dropout=False, **options: load_pair(tiny_st, tiny_ce, dropout=dropout, **options)


def gradient(pair: Pair, accelerator: Accelerator, step: Step, **options: Any) -> dict[str, Tensor]:
    """The gradient of one whole batch, with new optimisers."""
    return gradient_of(pair, pair.team(accelerator), step, **options)[0]


@pytest.mark.parametrize("name", [name for name in STEPS if name != "in-batch"])
def test_accumulation_gives_the_gradient_of_the_whole_batch(name: str, load: Load, accelerator: Accelerator) -> None:
    pair = load()
    whole = gradient(pair, accelerator, STEPS[name]())
    assert_close(gradient(pair, accelerator, STEPS[name](), accumulate=4), whole)
    trained = {key.split()[0] for key in whole}
    assert trained == ({"Retriever"} if name.startswith("ar2") else {"Retriever", "Ranker"})


@pytest.mark.parametrize("name", STEPS)
def test_the_cached_gradient_is_the_plain_one(name: str, load: Load, accelerator: Accelerator) -> None:
    pair = load(token_budget=64)
    plain = gradient(pair, accelerator, STEPS[name]())
    assert_close(gradient(pair, accelerator, STEPS[name](), gradient_cache=True), plain)


@pytest.mark.parametrize("name", ["in-batch", "ar2 mean", "rocketqav2 paper"])
def test_the_cached_gradient_is_the_plain_one_with_dropout(name: str, load: Load, accelerator: Accelerator) -> None:
    """One thread of random numbers, drawn in the same order: the replayed masks are those of the first forward."""
    pair = load(dropout=True, token_budget=64)
    found = []
    for cached in (False, True, True):
        torch.manual_seed(5)
        found.append(gradient(pair, accelerator, STEPS[name](), gradient_cache=cached))
        after = torch.rand(1)
    assert_close(found[1], found[0])
    assert all(torch.equal(found[1][key], found[2][key]) for key in found[1])
    torch.manual_seed(5)
    gradient(pair, accelerator, STEPS[name](), gradient_cache=False)
    assert torch.equal(torch.rand(1), after), "the replay moved the random state"
    torch.manual_seed(6)
    other = gradient(pair, accelerator, STEPS[name](), gradient_cache=True)
    assert any(not torch.allclose(other[key], found[1][key]) for key in other), "dropout was off"


def test_caching_with_two_towers(load: Load, accelerator: Accelerator) -> None:
    pair = load(two_towers=True, token_budget=64)
    plain = gradient(pair, accelerator, in_batch_step())
    assert_close(gradient(pair, accelerator, in_batch_step(), gradient_cache=True), plain)
    embeddings = [name for name in plain if name.endswith("word_embeddings.weight")]
    assert len(embeddings) == 2


# --- frozen means frozen ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("step", "resting"),
    [
        (retriever_step(AR2Config()), "ranker"),
        (static_step(RocketQAv2Config(static=True)), "ranker"),
        (ranker_step(), "retriever"),
        (in_batch_step(), "ranker"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.name,
)
@pytest.mark.parametrize("cached", [False, True])
def test_the_resting_model_is_bit_identical(
    step: Step, resting: str, cached: bool, load: Load, accelerator: Accelerator
) -> None:
    pair = load(dropout=True)
    team = pair.team(accelerator)
    fit(team, pair.scorer(team, joint := joint_step(RocketQAv2Config())), joint, draw, steps=1, batch=4)
    before = {name: state(trainee) for name, trainee in team.items()}
    schedules = {name: trainee.scheduler.state_dict() for name, trainee in team.items()}
    fit(team, pair.scorer(team, step, gradient_cache=cached), step, draw, steps=2, batch=4)
    after = {name: state(trainee) for name, trainee in team.items()}
    assert before[resting].keys() == after[resting].keys()
    assert any("exp_avg" in key for key in before[resting])
    assert all(torch.equal(before[resting][key], after[resting][key]) for key in before[resting])
    assert team[resting].scheduler.state_dict() == schedules[resting]
    assert all(p.grad is None for p in team[resting].model.parameters())
    moved = next(name for name in team if name != resting)
    assert any(not torch.equal(before[moved][key], after[moved][key]) for key in before[moved])
    assert (team[resting].updates, team[moved].updates) == (1, 3)


def test_the_teacher_has_its_dropout_off_whatever_its_mode(load: Load, accelerator: Accelerator) -> None:
    pair = load(dropout=True)
    step = retriever_step(AR2Config())
    team = pair.team(accelerator)
    scorer = pair.scorer(team, step)
    batch = ListBatch(*draw(0, 4), 4)
    pair.ranker.eval()
    with torch.no_grad():
        expected = scorer.ranker(batch)
    pair.ranker.train()
    found = scorer.ranker(batch)
    assert torch.equal(found, expected)
    assert not found.requires_grad
    assert all(module.training for module in pair.ranker.modules()), "the mode was not put back"
    pair.retriever.train()
    assert not torch.equal(scorer.retriever(batch), scorer.retriever(batch)), "the student's dropout is off"


# --- RocketQAv2's teacher ---------------------------------------------------------------------------------------


def test_the_target_of_a_custom_variant_has_dropout_off_and_the_supervised_loss_on(
    load: Load, accelerator: Accelerator
) -> None:
    pair = load(dropout=True)
    cfg = RocketQAv2Config(variant="custom", kl_direction="ce_de", kl_reduction="query_mean")
    step = joint_step(cfg)
    team = pair.team(accelerator)
    scorer = pair.scorer(team, step)
    batch = ListBatch(*draw(0, 4), 4)
    for trainee in team.values():
        trainee.model.train()
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        with torch.random.fork_rng():
            student = scorer.retriever(batch)
        output, diagnostics = step.function(batch, scorer)
        target = scorer.ranker(batch, as_teacher=True)
        kl = (target.softmax(1) * (target.log_softmax(1) - student.log_softmax(1))).sum() / 4
        torch.testing.assert_close(output.parts["kl"], kl.detach(), rtol=1e-4, atol=1e-6)
        found.append((output.parts["supervised"], diagnostics["reward"]))
    assert found[0][0] != found[1][0], "the supervised loss reads scores without dropout"
    assert found[0][1] == found[1][1], "the diagnostics read the teacher's scores with dropout"


@pytest.mark.parametrize(
    ("options", "second"),
    [
        ({"variant": "official"}, False),
        ({"variant": "paper"}, False),
        ({"variant": "custom"}, True),
        ({"variant": "custom", "detach_teacher": True}, True),
        ({"variant": "custom", "teacher_dropout": "on"}, False),
        ({"variant": "custom", "detach_teacher": False}, False),
    ],
    ids=str,
)
def test_a_second_forward_of_the_ranker_is_counted(
    options: dict[str, Any], second: bool, load: Load, accelerator: Accelerator
) -> None:
    if options["variant"] == "custom":
        options = {"kl_direction": "ce_de", "kl_reduction": "element_mean", **options}
    pair = load(dropout=True)
    step = joint_step(RocketQAv2Config(**options))
    team = pair.team(accelerator)
    scorer = pair.scorer(team, step)
    fit(team, scorer, step, draw, steps=1, batch=4)
    expected = {"retriever_trained": 16, "ranker_trained": 16, "retriever_teacher": 0, "ranker_teacher": 16 * second}
    assert scorer.forwards.to_dict() == expected


# --- optimisers, schedules, counters ----------------------------------------------------------------------------


def test_two_fits_are_one_longer_fit(load: Load, accelerator: Accelerator) -> None:
    """The optimiser's moments and the schedule's place outlast a phase, also with the other model's phase between."""
    weights = []
    for parts in ([4], [2, 2]):
        pair = load()
        team = pair.team(accelerator, schedule="linear", updates=6, warmup=0.34, weight_decay=0.0)
        start, rates = 0, []
        for steps in parts:
            step = hard_labels()
            at = start
            if start:
                fit(team, pair.scorer(team, still := _still("ranker")), still, draw, steps=3, batch=4)
            fit(team, pair.scorer(team, step), step, lambda n, b, at=at: draw(at + n, b), steps=steps, batch=4)
            start += steps
            rates.append(team["retriever"].scheduler.get_last_lr()[0])
        weights.append(state(team["retriever"]))
        assert team["retriever"].updates == 4
        assert rates[-1] == pytest.approx(1e-3 * 2 / 4)
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


def _still(name: Any) -> Step:
    """A step that updates a model with a gradient of zero: without decay only its counters change."""

    def function(batch: ListBatch, score: Scorer) -> tuple[Terms, dict[str, Tensor]]:
        loss = score.ranker(batch).sum() * 0
        return Terms(loss, {}), {}

    return Step("still", (name,), function)


def test_schedules_count_each_models_own_updates(load: Load, accelerator: Accelerator) -> None:
    pair = load()
    team = pair.team(accelerator, schedule="linear", updates=4, warmup=0.5)
    fit(team, pair.scorer(team, ranker_step()), ranker_step(), draw, steps=3, batch=2)
    assert (team["ranker"].updates, team["retriever"].updates) == (3, 0)
    assert team["ranker"].scheduler.get_last_lr()[0] == pytest.approx(0.5e-3)
    assert team["retriever"].scheduler.get_last_lr()[0] == 0.0
    assert team["ranker"].optimizer is not team["retriever"].optimizer


def test_decay_is_on_matrices_only(load: Load, accelerator: Accelerator) -> None:
    pair = load()
    trainee = loop.make_trainee(pair.ranker, accelerator, lr=1.0, updates=2)
    matrices, others = trainee.optimizer.param_groups
    assert (matrices["weight_decay"], others["weight_decay"]) == (0.01, 0.0)
    assert all(p.ndim > 1 for p in matrices["params"])
    assert all(p.ndim == 1 for p in others["params"])


@pytest.mark.parametrize(("clip", "moved"), [(0.0, None), (1e-3, 1e-3)])
def test_the_gradient_is_clipped_to_a_norm_and_0_does_not_clip(clip: float, moved: float | None) -> None:
    """With plain descent at rate 1 the weights move by the clipped gradient: here all ones, of norm sqrt(30)."""
    model = torch.nn.Linear(5, 5)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    before = torch.nn.utils.parameters_to_vector(model.parameters()).detach().clone()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    trainee = loop.Trainee(model, model, optimizer, scheduler, clip)  # type: ignore[arg-type]
    norm = loop._gradient_norm(trainee)
    assert float(norm) == pytest.approx(30**0.5)
    loop._advance(trainee, norm)
    after = torch.nn.utils.parameters_to_vector(model.parameters()).detach()
    assert float((after - before).norm()) == pytest.approx(moved or 30**0.5, rel=1e-3)
    assert trainee.updates == 1


@pytest.mark.parametrize("accumulate", [1, 2])
def test_forwards_by_model_and_purpose(accumulate: int, load: Load, accelerator: Accelerator) -> None:
    pair = load()
    step = retriever_step(AR2Config())
    team = pair.team(accelerator)
    scorer = pair.scorer(team, step)
    fit(team, scorer, step, draw, steps=2, batch=4, accumulate=accumulate)
    counted = {"retriever_trained": 32, "ranker_trained": 0, "retriever_teacher": 0, "ranker_teacher": 32}
    assert scorer.forwards.to_dict() == counted
    fit(team, pair.scorer(team, ranker_step(), forwards=scorer.forwards), ranker_step(), draw, steps=1, batch=4)
    assert scorer.forwards.to_dict() == {**counted, "ranker_trained": 16}


# --- scores -----------------------------------------------------------------------------------------------------


def test_each_query_once_and_each_distinct_passage_once(load: Load, accelerator: Accelerator) -> None:
    """Equal to encoding the query for every passage, with dropout off; and it is m times less work."""
    pair = load()
    step = retriever_step(AR2Config())
    team = pair.team(accelerator)
    queries, passages = draw(1, 6)
    seen: list[int] = []
    handle = pair.retriever.register_forward_hook(lambda *args: seen.append(len(args[2])))
    pair.retriever.train()
    found = pair.scorer(team, step).retriever(ListBatch(queries, passages, 6))
    handle.remove()
    assert seen == [6, len(np.unique(passages))]
    assert len(np.unique(passages)) < passages.size
    model = pair.retriever.model
    once_a_pair = model.encode_query([QUERIES[q] for q in np.repeat(queries, 4)], convert_to_tensor=True)
    naive = model.encode_document([PASSAGES[p] for p in passages.reshape(-1)], convert_to_tensor=True)
    expected = (pair.retriever.scale * (once_a_pair * naive).sum(1)).view(6, 4)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_in_batch_scores_mask_known_positives_and_repeated_texts(load: Load, accelerator: Accelerator) -> None:
    pair = load()
    team = pair.team(accelerator)
    queries, passages = np.array([4, 2, 0]), np.array([[4, 6], [2, 10], [0, 8]])  # 10 repeats the text of 4; 8 is 2's
    scores, positive, masked = pair.scorer(team, in_batch_step()).in_batch(ListBatch(queries, passages, 3))
    assert scores.shape == (3, 6)
    assert positive.tolist() == [0, 2, 4]
    assert masked.int().tolist() == [[0, 0, 0, 1, 0, 0], [0, 0, 0, 1, 0, 1], [0, 0, 0, 1, 0, 0]]
    lists = pair.scorer(team, in_batch_step()).retriever(ListBatch(queries, passages, 3))
    torch.testing.assert_close(scores[torch.arange(3), positive], lists[:, 0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("name", ["rocketqav2 official", "in-batch"])
def test_bf16_trains_float32_weights(name: str, cached: bool, load: Load, accelerator: Accelerator) -> None:
    pair = load(dropout=True)
    step = STEPS[name]()
    team = pair.team(accelerator)
    before = state(team["retriever"])
    logged = fit(
        team, pair.scorer(team, step, precision="bf16", gradient_cache=cached), step, draw, steps=2, batch=4
    )  # fmt: skip
    assert all(np.isfinite(value) for value in logged.values())
    after = state(team["retriever"])
    assert all(after[key].dtype == before[key].dtype for key in before)
    assert any(not torch.equal(after[key], before[key]) for key in before)


# --- logs and errors --------------------------------------------------------------------------------------------


def test_logged_means_do_not_depend_on_the_split(load: Load, accelerator: Accelerator) -> None:
    found = []
    for accumulate in (1, 4):
        pair = load()
        team = pair.team(accelerator, lr=0.0)
        step = joint_step(RocketQAv2Config(variant="paper"))
        metrics = Metrics(None)
        scorer = pair.scorer(team, step)
        means = fit(
            team, scorer, step, draw, steps=2, batch=8, accumulate=accumulate, metrics=metrics, label="1-joint"
        )  # fmt: skip
        steps = [record for record in metrics.records if record["kind"] == "step"]
        assert [record["step"] for record in steps] == [0, 1]
        assert means["kl"] == pytest.approx(np.mean([record["kl"] for record in steps]))
        found.append(means)
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    names = {"kl", "supervised", "retriever_entropy", "reward", "ranker_prefers_negative", "retriever_prefers_negative"}
    assert set(found[0]) == names


def test_a_loss_that_is_not_a_number_names_the_queries(load: Load, accelerator: Accelerator) -> None:
    pair = load()
    team = pair.team(accelerator)

    def function(batch: ListBatch, score: Scorer) -> tuple[Terms, dict[str, Tensor]]:
        loss = list_softmax(score.ranker(batch), queries=batch.total)
        return Terms(loss * float("nan"), {"ranker_supervised": loss.detach()}), {}

    step = Step("broken", ("ranker",), function)
    before = state(team["ranker"])
    queries = draw(0, 4)[0]
    with pytest.raises(InputError, match="the loss is not finite") as caught:
        fit(
            team, pair.scorer(team, step), step, draw, steps=1, batch=4, accumulate=2,
            names=lambda rows: [f"Q{row}" for row in rows],
        )  # fmt: skip
    assert caught.value.where == f"step 'broken', queries Q{queries[0]}, Q{queries[1]}"
    assert caught.value.fix
    after = state(team["ranker"])
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("clip", [2.0, 0.0])
@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_a_number_stops_before_the_weights(
    broken: float, clip: float, load: Load, accelerator: Accelerator
) -> None:
    """The loss is finite. Were the update made, every weight would be NaN and the next batch would be blamed."""
    pair = load()
    team = pair.team(accelerator)
    team["ranker"].clip = clip

    def function(batch: ListBatch, score: Scorer) -> tuple[Terms, dict[str, Tensor]]:
        scores = score.ranker(batch)
        if 1 in calls:
            scores.register_hook(lambda gradient: gradient * broken)
        calls.append(len(calls))
        loss = list_softmax(scores, queries=batch.total)
        return Terms(loss, {"ranker_supervised": loss.detach()}), {}

    calls: list[int] = []
    step = Step("broken", ("ranker",), function)
    states: list[Any] = []
    queries, passages = draw(1, 4)
    with pytest.raises(loop.NotFinite, match="the gradient is not finite") as caught:
        fit(
            team, pair.scorer(team, step), step, lambda n, b: (states.append(state(team["ranker"])), draw(n, b))[1],
            steps=3, batch=4, accumulate=2, names=lambda rows: [f"Q{row}" for row in rows],
        )  # fmt: skip
    assert caught.value.where == "step 'broken', queries " + ", ".join(f"Q{row}" for row in queries)
    assert caught.value.batch["update"] == 1
    assert np.array_equal(caught.value.batch["passages"], passages)
    assert team["ranker"].updates == 1
    after = state(team["ranker"])
    assert all(torch.equal(states[1][key], after[key]) for key in after)


def test_batches_that_cannot_be_split_are_refused(load: Load, accelerator: Accelerator) -> None:
    pair = load()
    team = pair.team(accelerator)
    step = ranker_step()
    with pytest.raises(InputError, match="cannot be split evenly"):
        fit(team, pair.scorer(team, step), step, draw, steps=1, batch=4, accumulate=3)
    step = in_batch_step()
    with pytest.raises(InputError, match="in-batch negatives cannot be accumulated"):
        fit(team, pair.scorer(team, step), step, draw, steps=1, batch=4, accumulate=2)
