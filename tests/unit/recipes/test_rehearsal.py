"""What a run would do, counted by hand; no model is needed to count it."""

from __future__ import annotations

import numpy as np
import pytest

from sparring.phases.pools import Pools
from sparring.phases.sample import ListSampler
from sparring.recipes.ar2 import AR2Config
from sparring.recipes.controls import FrozenTeacherConfig
from sparring.recipes.duet import DuetConfig
from sparring.recipes.rehearsal import Rehearsal, Sizes, Sketch, Unit, UpdateKind, rehearse
from sparring.recipes.rocketqav2 import RocketQAv2Config
from sparring.recipes.settings import RunConfig
from sparring.recipes.warmup import WarmupConfig

SIZES = Sizes(
    passages=1000, queries=90, train=50, dev=10, test=20, heads=60, dim=8, weights=(400, 600), trained_head=False
)
RUN = RunConfig(mine_depth=30, rerank_depth=5, search_depth=40, audit_lists=7, audit_depth=3, measures=("RR@10",))


def amounts(x: Rehearsal) -> dict[Unit, float]:
    """Amount of each unit over the whole run."""
    found: dict[Unit, float] = {}
    for work in x.work:
        found[work.unit] = found.get(work.unit, 0) + work.amount
    return found


def test_ar2_counted_by_hand() -> None:
    config = AR2Config(rounds=3, batch=4, negatives=7, retriever_steps=11, ranker_steps=13)
    warm = WarmupConfig(retriever_steps=21, retriever_batch=8, ranker_steps=22, ranker_batch=2, ranker_depth=100)
    x = rehearse("ar2", config, warm, RUN, SIZES)
    found = amounts(x)
    updates = {(kind.step, kind.batch, kind.negatives): n for kind, n in found.items() if isinstance(kind, UpdateKind)}
    assert updates == {
        ("retriever in-batch", 8, 1): 21, ("ranker listwise", 2, 7): 22, ("ranker listwise", 4, 7): 39,
        ("retriever", 4, 7): 33,
    }  # fmt: skip
    assert set(x.steps) == {kind for kind in found if isinstance(kind, UpdateKind)}
    refreshes = 2 + 3
    assert found["passage"] == refreshes * 1000
    assert found["query"] == refreshes * 90
    assert found["score"] == refreshes * 1000 * (50 + 10 + 20)
    assert found["list entry"] == 50 * (30 + 100 + 3 * 30)
    assert found["BM25 passage"] == 1000
    assert found["BM25 query"] == 10 + 20 + 50
    audits = 4 * 7 * (1 + 3)  # the warm start's and each round's; the zero-shot pair has no head
    dev = 10 * 5 * (1 + 3 * 1.25)
    test = 20 * 5 * (1 + 1.25)
    taught = 3 * 11 * 4 * (1 + 7)  # 44 lists a phase, of 60: none is visited twice
    assert found["pair"] == audits + dev + test + taught
    assert found["tokenise"] == found["start"] == found["fresh process"] == 1


def test_a_teacher_scores_a_pair_once_a_phase() -> None:
    """Against draws of the real sampler: 40 lists of 12 negatives, visited seven times each."""
    lists, depth, n, draws = 40, 12, 5, 280
    pools = Pools(
        queries=np.arange(lists), heads=np.zeros(lists, np.int64), offsets=np.arange(lists + 1) * depth,
        candidates=np.tile(np.arange(1, depth + 1), lists), scores=np.zeros(lists * depth, np.float32),
        head_scores=np.zeros(lists, np.float32),
    )  # fmt: skip
    sampler, seen = ListSampler(pools, n, seed=0), []
    for step in range(draws // 4):
        queries, passages = sampler.batch(step, 4)
        seen += [(q, p) for q, row in zip(queries.tolist(), passages.tolist(), strict=True) for p in row]
    expected = Sketch(lists, depth).drawn(draws, n)
    assert expected == pytest.approx(len(set(seen)), rel=0.01)
    assert expected < 0.5 * len(seen)
    assert Sketch(lists, depth).drawn(40, n) == 40 * (1 + n)
    duet = rehearse("duet", DuetConfig(rounds=1), WarmupConfig(), RUN, SIZES)
    trained = [(work.phase, work.unit) for work in duet.work if work.category == "training"]
    assert {("1-ranker", "passage"), ("1-retriever", "pair")} <= set(trained)
    assert not any(unit in ("pair", "passage") for phase, unit in trained if phase.startswith("warm"))


def test_a_trained_head_is_evaluated_before_training() -> None:
    trained = Sizes(**{**SIZES.__dict__, "trained_head": True})
    config, warm = AR2Config(rounds=1), WarmupConfig()
    with_head, without = (amounts(rehearse("ar2", config, warm, RUN, sizes)) for sizes in (trained, SIZES))
    assert with_head["pair"] - without["pair"] == 7 * 4 + 10 * 5 + 20 * 5
    assert with_head["byte"] > without["byte"]


def test_rocketqav2_denoises_all_heads_or_some() -> None:
    warm = WarmupConfig(retriever_steps=0, ranker_steps=0)
    for heads, lists in ((0, 60), (25, 25), (500, 60)):
        config = RocketQAv2Config(rounds=2, steps=5, denoise_depth=20, denoise_heads=heads)
        work = [w for w in rehearse("rocketqav2", config, warm, RUN, SIZES).work if w.category == "denoising"]
        assert [w.amount for w in work] == [lists * 21]
    config = RocketQAv2Config(rounds=3, steps=5, refresh=True)
    work = [w for w in rehearse("rocketqav2", config, warm, RUN, SIZES).work if w.category == "denoising"]
    assert len(work) == 3, "before each round"


def test_no_warm_start_is_one_refresh_less() -> None:
    config = FrozenTeacherConfig(rounds=2)
    none, some = (
        amounts(rehearse("frozen-teacher", config, WarmupConfig(retriever_steps=n), RUN, SIZES)) for n in (0, 5)
    )
    assert (some["passage"] - none["passage"], some["BM25 query"] - none["BM25 query"]) == (1000, 50)


@pytest.mark.parametrize("recipe", ["warmup", "ar2", "rocketqav2", "duet", "separate", "frozen-teacher"])
def test_every_recipe_can_be_rehearsed(recipe: str) -> None:
    from sparring.recipes.train import resolve_config

    objects = resolve_config(recipe)
    x = rehearse(recipe, objects.get(recipe), objects["warmup"], objects["run"], SIZES)
    assert {"refresh", "training", "evaluation", "BM25", "saving"} <= {work.category for work in x.work}
    assert all(work.amount > 0 for work in x.work)
