"""Encoding and exact search on a Ray of two nodes: as in one process, whoever dies, and never without an end."""

from __future__ import annotations

import json
import os
import shutil
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli_fixtures import call, settings, write_toy

os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "5" * 64}  # read when ray is imported
pytest.importorskip("ray")

from ray.cluster_utils import Cluster as Nodes
from ray_light import Mortal, Sleeping, Wrong
from ray_worker import Dying, DyingSearcher, Failing

from sparring.cluster import Cluster
from sparring.models import Retriever, TokenStore, load_retriever
from sparring.phases.encode import encode
from sparring.phases.index import build_index
from sparring.phases.sharded import ModelFiles, ShardedIndex, on_cluster
from sparring.types import InputError

pytestmark = [pytest.mark.slow, pytest.mark.timeout(480)]

SHARD = 32
TEXTS = [f"how to {v} the {n} {'key policy ' * (i % 7)}{i}" for i, (v, n) in enumerate(
    (v, n) for v in ("create", "delete", "reset", "list", "삭제") for n in ("bucket", "user", "파일", "policy") * 10
)]  # fmt: skip


@pytest.fixture(scope="module")
def homes(tmp_path_factory: pytest.TempPathFactory, tiny_st: Path) -> tuple[Path, Path]:
    """Home folders of the two nodes: a model is in the first alone."""
    with_model, without = tmp_path_factory.mktemp("home-1"), tmp_path_factory.mktemp("home-2")
    shutil.copytree(tiny_st, with_model / "model")
    return with_model, without


@pytest.fixture(scope="module")
def nodes(homes: tuple[Path, Path]) -> Iterator[Nodes]:
    """Two nodes with 1 and 2 CPUs, so that of two workers one is on the second."""
    ours = {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    head = {"num_cpus": 1, "include_dashboard": False, "env_vars": {"HOME": str(homes[0]), **ours}}
    found = Nodes(initialize_head=True, head_node_args=head)
    try:
        found.add_node(num_cpus=2, env_vars={"HOME": str(homes[1]), **ours})
        yield found
    finally:
        found.shutdown()


@pytest.fixture
def cluster(nodes: Nodes) -> Cluster:
    return Cluster(nodes.address, workers=2, shard=SHARD, timeout=240, start_timeout=120)


@pytest.fixture
def retriever(tiny_st: Path) -> Retriever:
    return load_retriever(tiny_st)


@pytest.fixture
def store(retriever: Retriever, tmp_path: Path) -> TokenStore:
    return retriever.tokenize(TEXTS, "passage", tmp_path / "tokens")


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As many threads as a worker has, so that sums are taken in the same order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def begun(folder: Path) -> list[int]:
    return sorted(int(line) for line in (folder / "begun.txt").read_text().split())


@pytest.mark.usefixtures("one_thread")
def test_shards_are_those_of_one_process_and_only_lost_ones_are_done_again(
    cluster: Cluster, retriever: Retriever, store: TokenStore, tiny_st: Path, tmp_path: Path
) -> None:
    model, out = ModelFiles.named(str(tiny_st), retriever), tmp_path / "p.npy"
    how: dict[str, Any] = {"out": out, "shard": SHARD, "token_budget": 2048}
    with pytest.raises(InputError, match="shard refused") as error:
        encode(retriever, store, "passage", **how, elsewhere=on_cluster(cluster, model, store, worker=Failing))
    assert error.value.where.startswith("node ")
    assert error.value.where.endswith(": shard 64")
    assert error.value.fix == "do better"
    assert not out.exists(), "nothing is half published"
    (parts,) = tmp_path.glob(".p.npy.*.parts")
    whole = {int(path.name[:12]): path for path in parts.glob("*.npy")}
    assert 64 not in whole
    assert len(whole) >= 1, "shards that were finished before the error stay"
    damaged, path = next(iter(whole.items()))
    path.write_bytes(path.read_bytes()[:-1] + b"?")

    found = encode(retriever, store, "passage", **how, elsewhere=on_cluster(cluster, model, store, worker=Dying))
    todo = [start for start in range(0, len(TEXTS), SHARD) if start == damaged or start not in whole]
    assert 96 in todo or 96 in whole
    killed = [96] if 96 in todo else []
    assert begun(tmp_path) == sorted(todo + killed), "each lost shard once, the killed worker's again"
    alone = encode(retriever, store, "passage", out=tmp_path / "alone.npy", shard=SHARD, token_budget=2048)
    np.testing.assert_array_equal(found, alone)
    assert not list(tmp_path.glob(".p.npy*")), "no parts are left"
    assert json.loads((tmp_path / "p.npy.json").read_text())["weights"] == retriever.fingerprint()


def test_lists_are_those_of_one_process(cluster: Cluster, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    passages = rng.standard_normal((200, 16), dtype=np.float32).round(1)
    passages[150:190] = passages[10:50]  # equal scores in different spans
    queries = rng.standard_normal((30, 16), dtype=np.float32).round(1)
    np.save(tmp_path / "p.npy", passages)
    expected = build_index(passages).search(queries, 50)
    scores, rows = ShardedIndex(tmp_path / "p.npy", cluster, worker=DyingSearcher).search(queries, 50)
    np.testing.assert_array_equal(rows, expected[1])
    np.testing.assert_allclose(scores, expected[0], atol=1e-6, rtol=0)
    assert begun(tmp_path) == [0, 32, 64, 96, 96, 128, 160, 192]
    by_hand = np.lexsort((np.broadcast_to(np.arange(200), (30, 200)), -(queries @ passages.T)), axis=1)[:, :50]
    assert (rows == by_hand).mean() > 0.99, "but for the rounding of another product"
    assert not list(tmp_path.glob(".p.npy*"))


def test_a_node_without_the_model(
    cluster: Cluster, retriever: Retriever, store: TokenStore, homes: tuple[Path, Path], tmp_path: Path
) -> None:
    model = ModelFiles("~/model", retriever.fingerprint())
    workers = on_cluster(cluster, model, store)
    with pytest.raises(InputError, match=r"There is no model\.") as error:
        encode(retriever, store, "passage", out=tmp_path / "p.npy", shard=SHARD, elsewhere=workers)
    assert error.value.where.startswith(f"node {socket.gethostname()} (")
    assert error.value.where.endswith(f": {homes[1] / 'model'}"), "the second node's home"
    assert "shared" in error.value.fix
    assert not (tmp_path / "p.npy").exists()


def test_commands_and_refresh_give_the_same_files(
    nodes: Nodes, tiny_st: Path, tiny_ce: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPARRING_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("RAY_ADDRESS", nodes.address)
    toy, ray = write_toy(tmp_path / "toy"), ("--engine", "ray", "--ray-workers", 2, "--ray-shard", SHARD)
    one = ("--retriever", tiny_st, "--precision", "fp32")
    for out, more in (("local", ()), ("spread", ray)):
        done = call("-q", "encode", toy, *one, "--out", tmp_path / f"{out}.npy", *more)
        assert done.exit_code == 0, done.output
    assert call("-q", "encode", toy, *one, "--kind", "query", "--out", tmp_path / "q.npy").exit_code == 0
    np.testing.assert_allclose(np.load(tmp_path / "spread.npy"), np.load(tmp_path / "local.npy"), atol=1e-6, rtol=0)
    asked = ("--passages", tmp_path / "local.npy", "--query-embeddings", tmp_path / "q.npy", "-k", 20)
    assert call("-q", "index", tmp_path / "local.npy", "--out", tmp_path / "i").exit_code == 0
    for out, more in (("local", ("--index", tmp_path / "i")), ("spread", ray)):
        done = call("-q", "search", *asked, "--out", tmp_path / f"{out}.trec", *more)
        assert done.exit_code == 0, done.output
    lines = [(tmp_path / f"{out}.trec").read_text().splitlines() for out in ("local", "spread")]
    assert [line.split()[:4] for line in lines[0]] == [line.split()[:4] for line in lines[1]]

    pair = ("--recipe", "warmup", "--retriever", tiny_st, "--ranker", tiny_ce)
    quick = settings("warmup.retriever_steps=0", "warmup.ranker_steps=1", "run.audit_lists=0")
    for out, more in (("a", ()), ("b", ("run.engine=ray", "run.ray_workers=2", f"run.ray_shard={SHARD}"))):
        done = call("-q", "train", toy, *pair, "--out", tmp_path / out, *quick, *settings(*more)[-2 * len(more) :])
        assert done.exit_code == 0, done.output
    for name in sorted(path.name for path in (tmp_path / "a" / "runs").iterdir()):
        rows = [[line.split()[:4] for line in (tmp_path / run / "runs" / name).open()] for run in ("a", "b")]
        assert rows[0] == rows[1], name
    assert not (tmp_path / "b" / "index").exists()


@pytest.mark.parametrize(
    ("worker", "what", "more"),
    [
        (Sleeping, "no shard was finished in time", {"timeout": 4}),
        (Mortal, "workers died at every attempt", {}),
        (Wrong, "", {}),
    ],
)
def test_a_job_that_cannot_end_is_given_up(cluster: Cluster, worker: type, what: str, more: dict[str, float]) -> None:
    place = Cluster(cluster.address, 2, SHARD, **{"timeout": 60, **more})  # type: ignore[arg-type]
    began = time.monotonic()
    with pytest.raises(RuntimeError if worker is Wrong else InputError, match=what or "ZeroDivisionError: item"):
        list(place.map(worker, (), [{"n": 1}]))
    assert time.monotonic() - began < 200


def test_no_cpu_for_reads(nodes: Nodes) -> None:
    with pytest.raises(InputError, match="too small") as error:
        Cluster(nodes.address, workers=3).check()
    assert "one that stays free for reads: 4" in error.value.expected
    assert error.value.got == "3 CPUs, 0 GPUs"


def test_unreachable(tmp_path: Path, tiny_st: Path) -> None:
    toy = write_toy(tmp_path / "toy")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
        done = call("-q", "encode", toy, "--retriever", tiny_st, "--out", tmp_path / "p.npy", "--engine", "ray",
                    "--ray-address", address)  # fmt: skip
    assert done.exit_code == 2
    assert "the cluster cannot be reached" in done.output
    assert address in done.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["toy"], "nothing is half published"


def test_something_else_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        silent = threading.Thread(target=lambda: [other.accept() for _ in range(2)], daemon=True)
        silent.start()
        began = time.monotonic()
        with pytest.raises(InputError, match="no Ray answers"):
            Cluster(f"127.0.0.1:{other.getsockname()[1]}", start_timeout=8).check()
        assert time.monotonic() - began < 120


@pytest.mark.parametrize("address", ["ray://a:1", "a", "http://a:1", ":5"])
def test_no_address(address: str) -> None:
    with pytest.raises(InputError, match="not an address"):
        Cluster(address).check()
