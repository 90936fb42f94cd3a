"""Exact search against NumPy, order of ties, files, and the choice of matrix kernels."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparring.phases import index as module
from sparring.phases.index import Index, build_index, choose_kind
from sparring.types import InputError


def numpy_search(queries: np.ndarray, passages: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    scores = queries.astype(np.float64) @ passages.astype(np.float64).T
    rows = np.lexsort((np.broadcast_to(np.arange(len(passages)), scores.shape), -scores), axis=1)[:, :k]
    return np.take_along_axis(scores, rows, 1), rows


@pytest.mark.parametrize("queries", [3, 70])  # below and above the number at which faiss uses matrix products
def test_exact_search_equals_numpy(queries: int) -> None:
    rng = np.random.default_rng(0)
    q, p = rng.standard_normal((queries, 24), dtype=np.float32), rng.standard_normal((500, 24), dtype=np.float32)
    scores, rows = build_index(p).search(q, 40)
    expected_scores, expected_rows = numpy_search(q, p, 40)
    assert scores.dtype == np.float32
    assert rows.dtype == np.int64
    np.testing.assert_array_equal(rows, expected_rows)
    np.testing.assert_allclose(scores, expected_scores, atol=1e-5)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 60), st.integers(1, 70), st.integers(1, 3))
def test_ties_are_ordered_by_row(seed: int, passages: int, k: int, dim: int) -> None:
    """Small whole numbers: products are exact, so ties are real, also across rank k and beyond the slack."""
    rng = np.random.default_rng(seed)
    q = rng.integers(-1, 2, (25, dim)).astype(np.float32)
    p = rng.integers(-1, 2, (passages, dim)).astype(np.float32)
    scores, rows = build_index(p).search(q, k)
    expected_scores, expected_rows = numpy_search(q, p, min(k, passages))
    np.testing.assert_array_equal(rows, expected_rows)
    np.testing.assert_array_equal(scores, expected_scores)


def test_an_index_of_equal_passages_gives_the_first_rows() -> None:
    """All 900 scores are equal: far more ties than the slack beyond k."""
    _, rows = build_index(np.ones((900, 4), dtype=np.float32)).search(np.ones((30, 4)), 5)
    np.testing.assert_array_equal(rows, np.tile(np.arange(5), (30, 1)))


@pytest.mark.parametrize("kind", ["exact", "hnsw", "ivf"])
def test_saved_index_answers_the_same(kind: module.Kind, tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    p, q = rng.standard_normal((2000, 16), dtype=np.float32), rng.standard_normal((20, 16), dtype=np.float32)
    built = build_index(p.astype(np.float64), kind=kind)
    built.save(tmp_path / "sub" / "index.faiss")
    loaded = Index.load(tmp_path / "sub" / "index.faiss")
    assert (len(loaded), loaded.dim, loaded.kind) == (2000, 16, kind)
    assert [f.name for f in (tmp_path / "sub").iterdir()] == ["index.faiss"]
    for found, again in zip(built.search(q, 10), loaded.search(q, 10), strict=True):
        np.testing.assert_array_equal(found, again)
    np.testing.assert_array_equal(loaded.vectors(np.array([7, 1999, 7])), p[[7, 1999, 7]])
    truth = numpy_search(q, p, 10)[1]
    recall = np.mean([len(np.intersect1d(a, b)) / 10 for a, b in zip(loaded.search(q, 10)[1], truth, strict=True)])
    assert recall >= (1.0 if kind == "exact" else 0.8)


def test_a_memory_map_is_indexed_without_being_changed(tmp_path: Path) -> None:
    values = np.random.default_rng(2).standard_normal((50, 8)).astype(np.float16)
    np.save(tmp_path / "e.npy", values)
    scores, _ = build_index(np.load(tmp_path / "e.npy", mmap_mode="r")).search(values[:4], 3)
    np.testing.assert_allclose(scores, numpy_search(values[:4], values, 3)[0], atol=1e-3)


def test_bad_input_is_named() -> None:
    index = build_index(np.eye(3, dtype=np.float32))
    with pytest.raises(InputError, match="NaN"):
        build_index(np.array([[1.0, np.nan]]))
    with pytest.raises(InputError, match="no passages"):
        build_index(np.empty((0, 4)))
    with pytest.raises(InputError, match="unknown index kind"):
        build_index(np.eye(3), kind="flat")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="dimensions"):
        index.search(np.ones((2, 4)), 1)
    with pytest.raises(InputError, match="NaN"):
        index.search(np.full((2, 3), np.nan), 1)
    with pytest.raises(InputError, match="at least one"):
        index.search(np.ones((2, 3)), 0)
    with pytest.raises(InputError, match="not in the index"):
        index.vectors(np.array([3]))


def test_missing_and_broken_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not found"):
        Index.load(tmp_path / "none")
    (tmp_path / "bad").write_bytes(b"this is not an index")
    with pytest.raises(InputError, match="not a readable index"):
        Index.load(tmp_path / "bad")


def test_kernels_are_never_beyond_the_cpu() -> None:
    assert module._best_core(frozenset()) is None
    assert module._best_core(frozenset({"avx2"})) is None
    assert module._best_core(frozenset({"avx2", "fma"})) == "Haswell"
    assert module._best_core(frozenset({"avx2", "fma", "avx512f"})) == "Haswell"  # not all that SkylakeX needs
    assert module._best_core(frozenset({"avx512f", "avx512bw", "avx512dq", "avx512vl"})) == "SkylakeX"


def test_a_users_choice_of_kernels_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENBLAS_CORETYPE", "Nehalem")
    assert module._choose_core() == (None, "OPENBLAS_CORETYPE is set by the user")


def test_importing_faiss_leaves_the_environment_as_it_was() -> None:
    code = "import os; before = dict(os.environ); from sparring.phases import index; import sys; "
    code += "assert 'faiss' not in sys.modules; index._faiss(); assert dict(os.environ) == before; print('same')"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ, check=True)
    assert found.stdout == "same\n"


@pytest.mark.parametrize("block", [1, 3, 7, 1000])
def test_blocks_of_passages_give_the_list_of_the_whole(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small integers, so that scores are exact and many are equal, within blocks and across them."""
    monkeypatch.setattr(module, "SCANNED", block)
    rng = np.random.default_rng(4)
    passages, queries = rng.integers(-1, 2, (60, 3)), rng.integers(-1, 2, (9, 3))
    scores, rows = build_index(passages.astype(np.float32)).search(queries.astype(np.float32), 17)
    exact = queries @ passages.T
    for query in range(len(queries)):
        expected = sorted(range(60), key=lambda row: (-exact[query, row], row))[:17]
        assert rows[query].tolist() == expected
        assert scores[query].tolist() == exact[query, expected].tolist()


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's account of resident memory")
def test_a_mapped_file_does_not_stay_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """64 MB of embeddings are searched; of the file no more than a few blocks of 1 MB stay resident."""
    monkeypatch.setattr(module, "SCANNED", 1 << 12)
    monkeypatch.setattr(module, "_ADD_BLOCK", 1 << 12)
    vectors = np.random.default_rng(0).standard_normal((1 << 18, 64), dtype=np.float32)
    np.save(tmp_path / "passages.npy", vectors)
    build_index(vectors[:100]).search(vectors[:2], 5)  # libraries are loaded

    def mapped() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("RssFile")) // 1024

    before = mapped()
    index = build_index(np.load(tmp_path / "passages.npy", mmap_mode="r"))
    _, rows = index.search(vectors[:20], 5)
    assert mapped() - before < 16
    expected = np.argsort(-(vectors[:20] @ vectors.T), axis=1)[:, :5]
    assert np.array_equal(rows, expected)
    assert np.array_equal(index.vectors(np.array([7, 200_000])), vectors[[7, 200_000]])


@pytest.mark.parametrize(
    ("passages", "queries", "memory", "kind"),
    [
        (100_000, 10**6, None, "exact"),
        (100_001, 20_000, None, "exact"),
        (100_001, 20_001, None, "hnsw"),
        (100_001, 0, None, "hnsw"),
        (2_000_000, 10**6, 10**13, "hnsw"),
        (2_000_001, 10**6, 10**13, "ivf"),
        (2_000_001, 10**6, 10**9, "exact"),
    ],
)
def test_the_size_rule_and_its_reason(
    passages: int, queries: int, memory: int | None, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The table of docs/scale.md, at its borders."""
    with caplog.at_level("INFO", "sparring"):
        assert choose_kind(passages, 384, queries, memory=memory) == kind
    (said,) = caplog.messages
    assert said.startswith(f"index: {kind} for {passages:,} passages")
    assert said.endswith(")")


def test_few_queries_are_multiplied_too():
    """In a process of its own: what a faiss that is there already is set to stays."""
    code = (
        "from sparring.phases.index import _faiss; a = _faiss().cvar.distance_compute_blas_threshold;"
        "import faiss; faiss.cvar.distance_compute_blas_threshold = 5;"
        "print(a, _faiss().cvar.distance_compute_blas_threshold)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    first, later = found.stdout.split()
    assert 0 < int(first) <= 2048
    assert later == "5"
