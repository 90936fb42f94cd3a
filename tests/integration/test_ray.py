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
from cli_fixtures import call, write_toy

# read when ray is imported
os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "5" * 64, "RAY_ENABLE_AUTO_CONNECT": "0"}
pytest.importorskip("ray")

from ray.cluster_utils import Cluster as Nodes
from ray_light import Counting, Mortal, Sleeping, Wrong
from ray_worker import Dying, DyingSearcher

from sparring.cluster import Cluster
from sparring.models import Retriever, TokenStore, load_retriever
from sparring.phases.encode import Missing, encode
from sparring.phases.index import build_index
from sparring.phases.parts import save_part
from sparring.phases.sharded import ModelFiles, ShardedIndex, on_cluster
from sparring.types import InputError

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(180)]

SHARD = 32
HERE = str(Path(__file__).parent)
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
    ours = {"PYTHONPATH": os.pathsep.join([HERE, *sys.path])}
    head = {"num_cpus": 1, "include_dashboard": False, "env_vars": {"HOME": str(homes[0]), **ours}}
    found = Nodes(initialize_head=True, head_node_args=head)
    try:
        found.add_node(num_cpus=2, env_vars={"HOME": str(homes[1]), **ours})
        yield found
    finally:
        found.shutdown()


@pytest.fixture
def cluster(nodes: Nodes) -> Cluster:
    return Cluster(nodes.address, workers=2, shard=SHARD, timeout=120, start_timeout=60)


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
    """Of seven shards one is there, one is damaged, and the worker dies at another."""
    how: dict[str, Any] = {"shard": SHARD, "token_budget": 2048}
    alone = encode(retriever, store, "passage", out=tmp_path / "alone.npy", **how)
    out = tmp_path / "p.npy"

    def two_of_them(missing: Missing) -> Iterator[tuple[int, Path]]:
        for start in (0, SHARD):
            vectors = alone[start : start + SHARD]
            yield start, save_part(missing.parts, start, ".npy", lambda file, vectors=vectors: np.save(file, vectors))
        raise InterruptedError

    with pytest.raises(InterruptedError):
        encode(retriever, store, "passage", out=out, **how, elsewhere=two_of_them)
    assert not out.exists(), "nothing is half published"
    (damaged,) = tmp_path.glob(f".p.npy.*.parts/{SHARD:012d}*.npy")
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")

    workers = on_cluster(cluster, ModelFiles.named(str(tiny_st), retriever), store, worker=Dying)
    found = encode(retriever, store, "passage", out=out, **how, elsewhere=workers)
    assert begun(tmp_path) == [32, 64, 96, 96, 128, 160, 192], "each lost shard once, the killed worker's again"
    np.testing.assert_array_equal(found, alone)
    assert not list(tmp_path.glob(".p.npy*")), "no parts are left"
    assert json.loads((tmp_path / "p.npy.json").read_text())["weights"] == retriever.fingerprint()


def test_lists_are_those_of_one_process(cluster: Cluster, tmp_path: Path) -> None:
    """Entries are eighths, so that every product is exact, in whatever order it is summed up, and many are equal."""
    rng = np.random.default_rng(0)
    passages, queries = (np.round(rng.standard_normal((n, 16), dtype=np.float32) * 8) / 8 for n in (200, 30))
    passages[150:190] = passages[10:50]  # equal scores in different spans
    np.save(tmp_path / "p.npy", passages)
    scores, rows = ShardedIndex(tmp_path / "p.npy", cluster).search(queries, 50)
    products = queries.astype(np.float64) @ passages.T.astype(np.float64)
    by_hand = np.argsort(-products, axis=1, kind="stable")[:, :50]
    np.testing.assert_array_equal(rows, by_hand)
    np.testing.assert_array_equal(scores, np.take_along_axis(products, by_hand, axis=1))
    alone = build_index(passages).search(queries, 50)
    np.testing.assert_array_equal(rows, alone[1])
    np.testing.assert_array_equal(scores, alone[0])
    assert not list(tmp_path.glob(".p.npy*"))


def test_a_search_goes_on_where_a_worker_died(cluster: Cluster, tmp_path: Path) -> None:
    """Only the span that it was at is searched again, and the lists are those of one process."""
    rng = np.random.default_rng(1)
    passages, queries = (np.round(rng.standard_normal((n, 16), dtype=np.float32) * 8) / 8 for n in (224, 20))
    np.save(tmp_path / "p.npy", passages)
    found = ShardedIndex(tmp_path / "p.npy", cluster, worker=DyingSearcher).search(queries, 40)
    alone = build_index(passages).search(queries, 40)
    np.testing.assert_array_equal(found[1], alone[1])
    np.testing.assert_array_equal(found[0], alone[0])
    assert begun(tmp_path) == [0, 32, 64, 96, 96, 128, 160, 192]
    assert not list(tmp_path.glob(".p.npy*")), "no parts are left"


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


@pytest.mark.timeout(600)
def test_commands_and_refresh_give_the_same_files(
    nodes: Nodes, tiny_st: Path, tiny_ce: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPARRING_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("RAY_ADDRESS", nodes.address)
    jobs: list[str] = []
    spread = Cluster.map

    def written_down(self: Cluster, make: type, *rest: Any, **more: Any) -> Any:
        jobs.append(make.__name__)
        return spread(self, make, *rest, **more)

    monkeypatch.setattr(Cluster, "map", written_down)
    toy, ray = write_toy(tmp_path / "toy"), ("--engine", "ray", "--ray-workers", 1, "--ray-shard", SHARD)
    for out, more in (("local", ()), ("spread", ray)):
        one = ("--retriever", tiny_st, "--precision", "fp32", "--out", tmp_path / f"{out}.npy")
        done = call("-q", "encode", toy, *one, *more)
        assert done.exit_code == 0, done.output
    np.testing.assert_allclose(np.load(tmp_path / "spread.npy"), np.load(tmp_path / "local.npy"), atol=1e-6, rtol=0)

    queries = ("--kind", "query", "--retriever", tiny_st, "--precision", "fp32", "--out", tmp_path / "q.npy")
    assert call("-q", "encode", toy, *queries).exit_code == 0
    vectors = tmp_path / "local.npy"
    assert call("-q", "index", vectors, "--out", tmp_path / "p.index").exit_code == 0
    both = ("--passages", vectors, "--query-embeddings", tmp_path / "q.npy", "-k", 10)
    for out, more in (("local", ("--index", tmp_path / "p.index")), ("spread", ray)):
        done = call("-q", "search", *both, "--out", tmp_path / f"{out}.trec", *more)
        assert done.exit_code == 0, done.output
    assert (tmp_path / "spread.trec").read_bytes() == (tmp_path / "local.trec").read_bytes()

    pair = ("--recipe", "separate", "--retriever", tiny_st, "--ranker", tiny_ce)
    quick = ("run.mine_depth=20", "run.rerank_depth=8", "run.search_depth=100", "run.precision=fp32", "run.threads=1",
             "run.audit_lists=0", "warmup.retriever_steps=0", "warmup.ranker_steps=1", "warmup.ranker_batch=4",
             "warmup.ranker_negatives=3", "separate.rounds=1", "separate.retriever_steps=1", "separate.ranker_steps=1",
             "separate.batch=4", "separate.negatives=3")  # fmt: skip
    for out, more in (("a", ()), ("b", ("run.engine=ray", "run.ray_workers=1", f"run.ray_shard={SHARD}"))):
        chosen = [word for setting in (*quick, *more) for word in ("--set", setting)]
        done = call("-q", "train", toy, *pair, "--out", tmp_path / out, *chosen)
        assert done.exit_code == 0, done.output
    for name in sorted(path.name for path in (tmp_path / "a" / "runs").iterdir()):
        rows = [[line.split()[:4] for line in (tmp_path / run / "runs" / name).read_text().splitlines()]
                for run in ("a", "b")]  # fmt: skip
        assert rows[0] == rows[1], name
    assert jobs == ["ShardEncoder", "SpanSearcher", *["ShardEncoder", "SpanSearcher"] * 2], "train's are two refreshes"


@pytest.mark.parametrize(
    ("worker", "wanted", "timeout", "longest"),
    [
        (Sleeping, "no shard was finished in time", 4, 40),
        (Mortal, "workers died at every attempt", 60, 90),
        (Wrong, "ZeroDivisionError: item 1", 60, 60),
    ],
)
def test_a_job_that_cannot_end_is_given_up(
    nodes: Nodes, worker: type, wanted: str, timeout: float, longest: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sparring.cluster._TASK_RETRIES", 1)
    place = Cluster(nodes.address, workers=2, timeout=timeout)
    began = time.monotonic()
    with pytest.raises(RuntimeError if worker is Wrong else InputError, match=wanted):
        list(place.map(worker, (), [{"n": 1}]))
    assert time.monotonic() - began < longest
    left = [thread.name for thread in threading.enumerate() if "StreamingExecutor" in thread.name]
    assert not left, "the job ended before the connection"


def test_search_beside_gpus_has_the_cpus_of_its_node(nodes: Nodes) -> None:
    """A node that says it has 7 CPUs and 2 GPUs: two workers, of one CPU each where the GPU works, else of three."""
    more = nodes.add_node(num_cpus=7, num_gpus=2, env_vars={"PYTHONPATH": os.pathsep.join([HERE, *sys.path])})
    try:
        place = Cluster(nodes.address, timeout=60, start_timeout=60)
        items = [{"n": n} for n in range(4)]
        assert {a["threads"] for a in place.map(Counting, (), items)} == {1}
        told = list(place.map(Counting, (), items, threads=True))
        assert {a["threads"] for a in told} == {3}
        assert sorted(a["n"] for a in told) == [0, 1, 2, 3]
    finally:
        nodes.remove_node(more)


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
            Cluster(f"127.0.0.1:{other.getsockname()[1]}", start_timeout=4).check()
        assert time.monotonic() - began < 60


@pytest.mark.parametrize("address", ["ray://a:1", "a", "http://a:1", ":5"])
def test_no_address(address: str) -> None:
    with pytest.raises(InputError, match="not an address"):
        Cluster(address).check()
