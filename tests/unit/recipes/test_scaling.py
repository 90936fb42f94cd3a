"""Corpus work of larger corpora, worked out by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from sparring.phases.sharded import SearchJob, SpanSearcher
from sparring.recipes.scaling import Rates, scaled, size, spoken, text

RATES = Rates(
    convert=2e-5, tokenise=1e-4, encode=1e-3, score=1e-9, index=1e-6, join=1e-9, digest=5e-10, merge=1e-8, disk=2e-9,
    network=1e9, text=400, tokens=252, read=152, stores=2, dim=100, asked={"all": (32768, 200)}, refreshes=4,
    wanted="exact", threads=1, gpus=0, shard=8192, memory=16 * 10**9, room=10**12,
)  # fmt: skip
"""Two passes of 16,384 queries; a list of 200 results is 2,400 bytes, a vector 400; all queries' vectors 13,107,200."""
MILLION, BLOCKS = 10**6, 64 * 131072
"""Passages; the second are 64 spans of one block each, and 1,024 shards of 8,192: 3,355,443,200 bytes of vectors."""


def test_a_million_passages_in_one_process() -> None:
    found = scaled(RATES, MILLION, 1)  # 0.4 GB of vectors and texts, 0.252 GB of tokens: all stays in memory
    assert found.once == pytest.approx(20 + 100)
    assert found.once_files == pytest.approx(0.504), "tokens are written; the table's file is in its conversion"
    assert found.compute == pytest.approx(1000 + 32.768)
    assert found.alone == pytest.approx(0.4 + 1), "join, look for NaN"
    assert found.disk == pytest.approx(0.8), "the shards are written; the joined file is in its joining"
    assert found.network == 0
    assert found.stored == pytest.approx(0.4e9 + 0.252e9 + 2 * 0.4e9)
    assert found.exact == 131072 * (2 * 400 + 200) + 13_107_200 + 2 * 32768 * 2400
    assert (found.hnsw, found.ivf, found.converted) == (688e6, 416e6, 110e6)
    assert found.refresh == pytest.approx(1032.768 + 1.4 + 0.8), "one after another"
    assert found.total == pytest.approx(120.504 + 4 * 1034.968)
    assert found.parts == pytest.approx(
        {"compute": 4131.072, "one process": 120 + 5.6, "disk": 0.504 + 3.2, "network": 0}
    )
    assert found.binds == "compute"


def test_vectors_larger_than_memory_are_read_in_every_pass() -> None:
    found = scaled(replace(RATES, memory=8 * 10**8), 2 * MILLION, 1)
    assert found.disk == pytest.approx(6 * 0.8e9 * 2e-9), "shards written; join, checksum, NaN and two passes read"
    texts, tokens = 0.8e9, 0.504e9  # texts do not stay in memory: two checksums, and read for each of two stores
    assert found.once_files == pytest.approx((tokens + 4 * texts) * 2e-9)


def test_eight_million_passages_on_eight_workers() -> None:
    found = scaled(RATES, BLOCKS, 8)  # a worker: 128 shards, 8 spans
    vectors = 3_355_443_200
    results = 32768 * 8 * 200 * (1 + 1 / 2 + 1 / 3 + 1 / 4 + 1 / 5 + 1 / 6 + 1 / 7 + 1 / 8)  # 21.7 lists of 200 a query
    lists = 12 * results + 64 * 32768 * 8  # a span's file says for every query how many there are
    assert found.once == pytest.approx(BLOCKS * 1.2e-4), "not divided"
    assert found.once_files == pytest.approx(BLOCKS * 0.652e-6), "texts and tokens are written"
    assert found.compute == pytest.approx(1048.576 + 1.048576 + 34.359738368), "encode, look for NaN, search"
    joining = vectors * (0.5e-9 + 1e-9)  # every shard's checksum when it arrives, then one file
    merging = lists * 0.5e-9 + (32768 * 22 * 200 + results) * 1e-8
    assert found.alone == pytest.approx(joining + merging)
    assert found.disk == 0
    passed = BLOCKS * 152  # tokens of the retriever
    passed += 3 * vectors  # shards written, read; the file written
    passed += vectors  # spans read once: they stay in memory
    passed += 13_107_200 * (1 + 8)  # queries written, read by every worker
    passed += 2 * lists
    assert found.network == pytest.approx(passed / 1e9)
    assert found.stored == pytest.approx(BLOCKS * 652 + 2 * vectors)
    worker = 131072 * (2 * 400 + 200) + 13_107_200 + 32768 * (4 * 2400 + 2 * 8)
    merging = 32768 * (3 * 2400 + 2 * 8) + 100 * 2**18  # the best, as much that waits, one file more; what is sorted
    assert found.exact == worker + merging, "the starting machine's"
    assert found.hnsw == BLOCKS * 688, "the whole corpus, in one process"
    assert sum(found.parts.values()) == pytest.approx(found.total)


@pytest.mark.parametrize(("k", "merged"), [(1, 2), (100, 23), (200, 22)])
def test_lists_are_merged_once_for_files_as_large_as_they_are(k: int, merged: int) -> None:
    """A file has 12 bytes a result and 262,144 of offsets: 25 MB in all for k = 1, where 16 MiB wait; 872 MB for
    k = 100, where the lists are 39 MB; 1,727 MB for k = 200, where they are 79 MB."""
    found = scaled(replace(RATES, asked={"all": (32768, k)}, join=0, digest=0), BLOCKS, 8)
    results = 32768 * 8 * k * 761 / 280  # 21.7 for each query and place
    assert found.alone == pytest.approx((merged * 32768 * k + results) * 1e-8)


DEPTHS = {"dev": (1000, 1000), "test": (15_768, 1000), "train": (16_000, 200)}


def test_on_a_cluster_each_depth_is_a_search_of_its_own() -> None:
    """Training's 16,000 queries at depth 1,000 would keep 12.8 million entries more than are asked for."""
    found = scaled(replace(RATES, asked=DEPTHS), BLOCKS, 8)
    parts = [scaled(replace(RATES, asked={"all": one}), BLOCKS, 8) for one in ((16_000, 200), (16_768, 1000))]
    assert found.compute == pytest.approx(1048.576 + 2 * 1.048576 + 34.359738368), "two looks for NaN"
    assert found.alone == pytest.approx(sum(part.alone for part in parts) - 3_355_443_200 * 1.5e-9), "joined once"
    lists = [12 * 8 * 761 / 280 * queries * k + 64 * 8 * queries for queries, k in ((16_000, 200), (16_768, 1000))]
    merged = 22 * 16_000 * 200 + 22 * 16_768 * 1000 + 8 * 761 / 280 * (16_000 * 200 + 16_768 * 1000)
    assert found.alone == pytest.approx(3_355_443_200 * 1.5e-9 + sum(lists) * 0.5e-9 + merged * 1e-8)
    passed = BLOCKS * 152 + (3 + 1 + 1) * 3_355_443_200 + 32_768 * 400 * 9 + 2 * sum(lists)
    assert found.network == pytest.approx(passed / 1e9), "each reads the spans"
    one = scaled(replace(RATES, asked={"all": (32_768, 1000)}), BLOCKS, 8)
    assert found.exact == parts[1].exact + 16_000 * 2400, "the second's, with the first one's lists"
    assert found.alone < one.alone
    together = {**DEPTHS, "train": (12_000, 200)}  # 9.6 million
    as_one = scaled(replace(RATES, asked={"all": (28_768, 1000)}), BLOCKS, 8)
    assert scaled(replace(RATES, asked=together), BLOCKS, 8) == as_one


def test_in_one_process_each_split_is_a_search_of_its_own() -> None:
    kept, read = (scaled(replace(RATES, asked=DEPTHS, memory=m), 2 * MILLION, 1) for m in (16 * 10**9, 8 * 10**8))
    assert read.disk - kept.disk == pytest.approx((3 + 3) * 0.8e9 * 2e-9), "three passes, one a split"
    assert kept.compute == pytest.approx(2000 + 65.536)
    test = 131072 * (2 * 400 + 200) + 15_768 * (400 + 2 * 12_000)
    assert kept.exact == test + 1000 * 12_000, "the test queries', with dev's lists"
    deep = scaled(replace(RATES, asked={**DEPTHS, "train": (40_000, 200)}), MILLION, 1)
    assert deep.exact == 131072 * (2 * 400 + 200) + 40_000 * (400 + 2 * 2400) + 16_768 * 12_000, "training's, with both"


def test_what_does_not_stay_in_memory_passes_the_line_again() -> None:
    kept, read = scaled(RATES, BLOCKS, 8), scaled(replace(RATES, memory=4 * 10**7), BLOCKS, 8)
    vectors = 3_355_443_200
    more = 2 * vectors  # the shards once more to be joined, the file for its checksum
    more += 2 * vectors  # 16,384 queries at a time: a span of 52 MB does not stay
    more += 12 * 32768 * 8 * 200 * 761 / 280 + 64 * 32768 * 8  # lists: 79 MB of them wait to be merged
    assert read.network - kept.network == pytest.approx(more / 1e9)
    texts, tokens = BLOCKS * 400, BLOCKS * 252
    assert read.once_files - kept.once_files == pytest.approx((4 * texts + 2 * tokens) / 1e9)


def test_more_workers_than_spans_search_no_faster() -> None:
    few, many = scaled(RATES, BLOCKS, 64), scaled(RATES, BLOCKS, 128)
    searching = 131072 * (1e-6 + 32768e-9)  # a span
    assert few.compute == pytest.approx(16 * 8.192 + searching)
    assert many.compute == pytest.approx(8 * 8.192 + searching)
    assert many.once == few.once
    assert many.alone == few.alone, "64 spans whose lists are whole, whoever searches them"
    assert many.network == few.network


def test_twice_the_workers_halve_compute_and_lengthen_the_lists() -> None:
    four, eight = scaled(RATES, BLOCKS, 4), scaled(RATES, BLOCKS, 8)
    assert eight.compute == pytest.approx(four.compute / 2)
    assert eight.alone > four.alone
    assert eight.network > four.network
    assert eight.converted == four.converted


def test_a_machine_has_a_ray_worker_for_each_thread_or_gpu() -> None:
    one, two = scaled(RATES, BLOCKS, 16), scaled(replace(RATES, threads=2), BLOCKS, 8)
    encoding, finite, searching = 64 * 8.192, 4 * 131072 * 1e-6, 4 * 131072 * 32768e-9
    assert one.compute == pytest.approx(encoding + finite + searching)
    assert two.compute == pytest.approx(2 * encoding + finite + 2 * searching), "the rates are two threads'"
    assert two.alone == pytest.approx(one.alone), "sixteen lists either way"
    assert one.network - two.network == pytest.approx(8 * 13_107_200 / 1e9), "a machine reads the queries once"
    worker = 131072 * (2 * 400 + 200) + 13_107_200 + 32768 * (4 * 2400 + 2 * 8)
    assert two.exact - one.exact == worker, "one process merges"
    gpu = scaled(replace(RATES, threads=4, gpus=1), BLOCKS, 16)
    assert gpu.compute == pytest.approx(encoding + finite + 4 / 3 * searching), "three threads: one stays for reads"
    many = scaled(replace(RATES, threads=4, gpus=8), BLOCKS, 2)
    assert many.compute == pytest.approx(encoding + finite + 4 * searching), "at least one thread each"


def test_one_shard_stays_in_the_starting_process() -> None:
    found = scaled(replace(RATES, threads=4), 8000, 2)
    assert found.compute == pytest.approx(8)
    assert found.alone == pytest.approx(3.2e6 * 1.5e-9 + 8000 * (1e-6 + 32768e-9))
    assert found.network == pytest.approx((8000 * 152 + 3 * 3.2e6) / 1e9)


def test_uneven_parts_take_as_long_as_the_largest() -> None:
    found = scaled(RATES, 10 * 8192, 4)  # ten shards and ten spans: three for two of them
    assert found.compute == pytest.approx(3 * 8192 * (1e-3 + 1e-6 + 32768e-9))


@pytest.mark.parametrize(
    ("changed", "passages", "workers", "binds", "words"),
    [
        ({}, BLOCKS, 8, "compute", "compute 72.3 min, one process 17.4 min, network"),
        ({}, BLOCKS, 1024, "one process", "compute 50 s, one process 17.8 min, network"),
        ({"network": 1e6}, BLOCKS, 8, "network", "network"),
        ({"encode": 0, "score": 0, "convert": 0, "tokenise": 0}, MILLION, 1, "one process", "process 5.6 s, disk 3.7"),
        ({"encode": 0, "score": 0, "convert": 0, "tokenise": 0, "index": 0}, MILLION, 1, "disk", "1.6 s, disk 3.7 s"),
        ({"room": 15 * 10**8}, MILLION, 1, "disk", "fit: 1.4 GiB are needed on the disk, 1.4 GiB are free"),
        ({"room": 10**10}, BLOCKS, 8, "disk", "11.3 GiB are needed on the file system that all share, 9.3 GiB are"),
        ({"memory": 10**10}, 10**8, 8, "memory", "converting the texts, in one process, needs 10.2 GiB"),
        ({"memory": 2 * 10**8}, MILLION, 1, "memory", "exact search, with the lists of all queries, needs 288 MiB"),
        ({"wanted": "hnsw"}, 3 * 10**7, 1, "memory", "HNSW, the whole corpus in one process, needs 19.2 GiB"),
        ({"wanted": "ivf"}, 4 * 10**7, 1, "memory", "IVF, the whole corpus in one process, needs 15.5 GiB"),
        ({"wanted": "milvus:http://host:19530"}, 4 * 10**7, 1, "compute", "compute"),
        ({"wanted": "faiss"}, 4 * 10**7, 1, "compute", "compute"),
        ({"wanted": "exact"}, 4 * 10**7, 1, "compute", "compute"),
        ({"memory": None}, 10**8, 8, "compute", "compute"),
    ],
)
def test_what_binds(changed: dict, passages: int, workers: int, binds: str, words: str) -> None:
    found = scaled(replace(RATES, **changed), passages, workers)
    assert found.binds == binds
    assert words in found.reason


@pytest.mark.parametrize(
    ("wanted", "passages", "memory", "kind"),
    [
        ("exact", 10**7, 16 * 10**9, "exact"),
        ("faiss", 10**5, 16 * 10**9, "exact"),
        ("faiss", 150_000, 16 * 10**9, "hnsw"),
        ("faiss", 150_000, 2 * 10**8, "exact"),  # 103 MB of 100 to be had
        ("faiss", 3 * 10**6, None, "ivf"),
        ("milvus:work/index.db", 10**7, 16 * 10**9, "milvus"),
    ],
)
def test_the_kind_of_index_is_that_of_a_refresh(wanted: str, passages: int, memory: int | None, kind: str) -> None:
    assert scaled(replace(RATES, wanted=wanted, memory=memory), passages, 1).kind == kind


def test_a_worker_leaves_as_many_results_as_are_counted(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    np.save(tmp_path / "passages.npy", rng.standard_normal((8 * 512, 16), dtype=np.float32))
    np.save(tmp_path / "queries.npy", rng.standard_normal((200, 16), dtype=np.float32))
    folder = tmp_path / "parts"
    folder.mkdir()
    paths = [str(tmp_path / name) for name in ("passages.npy", "queries.npy")]
    worker = SpanSearcher(SearchJob(paths[0], paths[1], 8 * 512, str(folder), 20))
    files = [worker({"start": start, "stop": start + 512})["file"] for start in range(0, 8 * 512, 512)]
    left = sum(len(np.load(folder / name)["rows"]) for name in files)
    counted = 200 * 20 * 761 / 280  # 1 + 1/2 + ... + 1/8
    assert left == pytest.approx(counted, rel=0.03)


def test_the_example_of_the_documentation() -> None:
    """docs/scale.md and docs/plan.md: 500,000 queries, 21 million passages of 768 dimensions, 100 GFLOP/s, k = 200."""
    rates = replace(
        RATES, dim=768, asked={"all": (500_000, 200)}, score=2 * 768 / 1e11, encode=0, index=0, join=3e-9, digest=1e-9,
        merge=1e-7, network=10e9 / 8, memory=64 * 2**30, text=600, tokens=1024, read=512, stores=2,
    )  # fmt: skip
    sizes = [scaled(rates, 21_015_324, workers) for workers in (1, 8, 64)]
    assert [[spoken(x) for x in (s.compute, s.alone, s.disk, s.network)] for s in sizes] == [
        ["44.8 h", "3.2 min", "75.3 min", "0.0 s"],
        ["5.6 h", "21.2 min", "0.0 s", "7.1 min"],
        ["44.0 min", "87.6 min", "0.0 s", "14.2 min"],
    ]
    merging = (238 + 64 * 3.645) * 500_000 * 200 * 1e-7  # 64 workers of 21 spans: 285 GB, 1.2 GB of lists at a time
    assert sizes[2].alone == pytest.approx(merging + 64.56 * (3 + 1) + 285, rel=0.01), "joining; the lists' checksums"
    found = sizes[1]
    assert found.compute == pytest.approx(161 * 16384 * 500_000 * 2 * 768 / 1e11), "161 of 1,283 spans"
    assert spoken(found.compute) == "5.6 h"
    vectors, lists = 21_015_324 * 3072, [500_000 * (w * h * 2400 + 8 * 1283) for w, h in ((8, 5.662), (64, 3.645))]
    assert lists == pytest.approx([59e9, 285e9], rel=0.01)
    assert found.stored == pytest.approx(21_015_324 * 1624 + 2 * vectors), "shards, which take more than the lists"
    assert sizes[2].stored == pytest.approx(21_015_324 * 1624 + vectors + lists[1] + 1.536e9, rel=1e-3)
    worker, merging = 16384 * (2 * 3072 + 1536) + 1.536e9 + 4.8e9 + 8e6, 3.6e9 + 8e6 + 26e6
    assert found.exact == pytest.approx(worker + merging, rel=1e-3)


def test_the_text_says_what_is_assumed() -> None:
    shown = text([scaled(RATES, 10**8, 50)], RATES)
    assert "100,000,000" in shown
    assert "run.engine = ray" in shown
    assert "8 Gbit/s are assumed" in shown
    assert "Gbit" not in text([scaled(RATES, 10**8, 1)], RATES)
    times = (0.5, 90, 3600, 86400 * 3, 86400 * 800)
    assert [spoken(s) for s in times] == ["0.5 s", "90 s", "60.0 min", "3.0 days", "2.2 years"]
    assert [size(s) for s in (1 << 20, 1 << 30, 1 << 40)] == ["1 MiB", "1.0 GiB", "1.0 TiB"]
