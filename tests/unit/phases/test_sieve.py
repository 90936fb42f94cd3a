"""The sieve against float64: what it lets pass holds every best list, and its bound holds every score."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparring.models.lean import has_fused_products
from sparring.phases import index as index_module
from sparring.phases import sieve
from sparring.phases.index import build_index

HAS_OPS = hasattr(torch.ops.mkldnn, "_linear_pointwise")
pytestmark = pytest.mark.skipif(not HAS_OPS, reason="this torch is built without oneDNN")


@pytest.fixture(autouse=True)
def small_products(monkeypatch):
    """Several products, the later ones after the threshold is known, with few vectors; bf16 also where it is slow."""
    monkeypatch.setattr(sieve, "_QUERIES", 32)
    monkeypatch.setattr(sieve, "_PASSAGES", 128)
    monkeypatch.setattr(sieve, "RESULTS", 8)
    monkeypatch.setattr(sieve, "suits", lambda *_: True)
    monkeypatch.setattr(sieve, "QUERIES", 1)


def vectors(kind: str, count: int, dim: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((count, dim))
    if kind == "unit":
        x /= np.linalg.norm(x, axis=1, keepdims=True)
    elif kind == "shared":  # scores between .8 and .9, as some models' are
        x = 3 * np.ones(dim) + 0.3 * x
        x /= np.linalg.norm(x, axis=1, keepdims=True)
    elif kind == "lengths":
        x *= 10.0 ** rng.uniform(-3, 3, (count, 1))
    elif kind == "twins":  # many equal scores, also at rank k
        x = x[rng.integers(0, 1 + count // 6, count)]
    elif kind == "small":
        x *= 1e-30
    elif kind == "large":
        x *= 1e12
    elif kind == "whole":
        x = np.rint(x)
    else:
        assert kind == "plain"
    return x.astype(np.float32)


def candidates(q: np.ndarray, p: np.ndarray, k: int, floor: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Rows of all queries, -1 where there are no more, and the open ones."""
    floor = np.full(len(q), -np.inf, np.float32) if floor is None else floor
    found = list(sieve.candidates(q, p, k, floor))
    assert [part.start for part, _, _ in found] == list(range(0, len(q), found[0][0].stop))
    rows = np.full((len(q), max(some.shape[1] for _, some, _ in found)), -1)
    for part, some, _ in found:
        rows[part, : some.shape[1]] = some
    open_ = np.concatenate([part.start + one for part, _, one in found])
    assert (rows[open_] < 0).all(), "what is open takes no room"
    return rows, open_


KINDS = ["plain", "unit", "shared", "lengths", "twins", "small", "large", "whole"]


def best(queries: np.ndarray, passages: np.ndarray, k: int) -> np.ndarray:
    """float64 scores [Q, k], falling."""
    return -np.sort(-(queries.astype(np.float64) @ passages.astype(np.float64).T), axis=1)[:, :k]


def close(queries: np.ndarray, passages: np.ndarray) -> np.ndarray:
    """What fp32 sums of these products may be wrong by.  [Q, 1]"""
    longest = float(np.linalg.norm(passages.astype(np.float64), axis=1).max())
    return passages.shape[1] * 2.0**-24 * longest * np.linalg.norm(queries.astype(np.float64), axis=1, keepdims=True)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=6, deadline=None)
@given(seed=st.integers(0, 10_000), passages=st.integers(330, 1500), dim=st.sampled_from([3, 17, 64]))
def test_searching_finds_the_best_scores_and_their_rows(kind: str, seed: int, passages: int, dim: int) -> None:
    q, p = vectors(kind, 45, dim, seed), vectors(kind, passages, dim, seed + 1)
    scores, rows = build_index(p).search(q, 10)
    off = close(q, p) + 1e-42
    assert (np.abs(scores - best(q, p, 10)) <= off).all()
    own = np.einsum("qd,qkd->qk", q.astype(np.float64), p[rows].astype(np.float64))
    assert (np.abs(scores - own) <= off).all()
    assert all(len(set(row)) == 10 for row in rows.tolist())
    equal = scores[:, 1:] == scores[:, :-1]
    assert (rows[:, 1:] > rows[:, :-1])[equal].all()


@pytest.mark.parametrize("kind", ["plain", "unit", "shared", "lengths", "twins"])
def test_most_passages_are_shown_not_to_matter(kind: str) -> None:
    """Otherwise it would all be done by the products that it is to spare."""
    q, p = vectors(kind, 64, 64, 0), vectors(kind, 4000, 64, 1)
    rows, open_ = candidates(q, p, 12)
    assert len(open_) == 0
    assert ((rows >= 0).sum(axis=1) >= 12).all()
    assert (rows >= 0).sum(axis=1).mean() < {"plain": 60, "unit": 60, "shared": 200}.get(kind, 400)


@pytest.mark.parametrize("kind", KINDS)
def test_the_bound_holds_for_every_pair(kind: str) -> None:
    q, p = vectors(kind, 40, 48, 2), vectors(kind, 600, 48, 3)
    passing = sieve._Passages(p, 5, 40)
    bound = passing._bound(torch.from_numpy(q))
    centred = p.astype(np.float64) - passing.mean.astype(np.float64)
    exact = q.astype(np.float64) @ centred.T
    for tile in passing.tiles:
        own = torch.ops.mkldnn._linear_pointwise(torch.from_numpy(q).bfloat16(), tile.weight, None, "none", [], "")
        own = own[:, : tile.count].float().numpy()
        score = exact[:, tile.first :: tile.step]
        least = sieve._lowest(score.astype(np.float32), bound[:, None])
        most = -sieve._lowest(-score.astype(np.float32), bound[:, None])
        assert (least <= own).all()
        assert (own <= most).all()
    # not by being boundless: what bf16 can lose of the longest product, without the part that all passages share
    if kind != "small":
        assert (bound <= 2.0**-7 * np.linalg.norm(q, axis=1) * np.linalg.norm(centred, axis=1).max()).all()


def test_a_result_that_reaches_the_best_is_rounded_at_most_half_a_step_up() -> None:
    """By hand: bf16 has steps of 2^-7 from 1 to 2. A k-th result of 1.5 was 1.5 - 2^-8 at least; less 1/8 for its
    error, and less 1/8 for another's: 1.24609375 is between the steps 1.2421875 and 1.25, halfway: to the even one."""
    assert sieve._reaching(np.float32([1.5]), np.float32([0.125])).tolist() == [1.25]
    assert sieve._reaching(np.float32([-1.5]), np.float32([0.0])).tolist() == [-1.5]  # -1.50390625, to the even one
    assert sieve._lowest(np.float32([-np.inf]), np.float32([1.0])).tolist() == [-np.inf]


def test_what_cannot_be_sifted_is_left_open() -> None:
    q, p = vectors("plain", 4, 16, 0), vectors("plain", 5000, 16, 1)
    q[1] = 0  # all passages are equal to it
    rows, open_ = candidates(q, p, 5)
    assert open_.tolist() == [1]
    assert rows.shape[1] < 100, "the open query's thousands take no room"
    p[7] *= 1e20  # squares overflow
    assert candidates(q, p, 5)[1].tolist() == [0, 1, 2, 3]
    assert candidates(q, p[10:200], 100)[1].tolist() == [0, 1, 2, 3]  # all would pass
    scores, rows = build_index(p).search(q, 5)
    assert rows[1].tolist() == [0, 1, 2, 3, 4]
    assert np.allclose(scores[2:], best(q, p, 5)[2:], rtol=1e-5)


def test_a_wrong_guess_is_seen(monkeypatch) -> None:
    """The k-th best of all is guessed from the first products; where too few reach the guess, all are compared."""
    monkeypatch.setattr(sieve._Passages, "_guess", lambda *a: np.full(len(a[2]), 1e3, np.float32))
    q, p = vectors("unit", 6, 32, 0), vectors("unit", 2000, 32, 1)
    assert candidates(q, p, 5)[1].tolist() == [0, 1, 2, 3, 4, 5]
    assert np.allclose(build_index(p).search(q, 5)[0], best(q, p, 5), atol=1e-6)


def test_a_floor_leaves_out_what_is_below_it_and_nothing_else() -> None:
    q, p = vectors("unit", 20, 32, 0), vectors("unit", 3000, 32, 1)
    exact = q @ p.T
    floor = -np.sort(-exact, axis=1)[:, 3]  # four reach it
    rows, open_ = candidates(q, p, 10, floor)
    assert len(open_) == 0
    for query in range(20):
        assert set(np.flatnonzero(exact[query] >= floor[query])) <= set(rows[query])
    assert (rows >= 0).sum(axis=1).mean() < 10
    nothing, open_ = candidates(q, p, 10, np.full(20, 2, np.float32))
    assert nothing.shape == (20, 0)
    assert len(open_) == 0


def test_blocks_of_a_file_and_parts_of_a_corpus_give_the_same_lists(monkeypatch) -> None:
    """Also bit for bit: a pair's score is computed for the pair alone."""
    q, p = vectors("unit", 50, 48, 5), vectors("unit", 3000, 48, 6)
    p[2900:] = p[100:200]  # equal ones, blocks apart
    whole = build_index(p).search(q, 30)
    part = build_index(p[:1700], of=3000).search(q, 30), build_index(p[1700:], first=1700, of=3000).search(q, 30)
    joined = index_module.merged(part[0], (part[1][0], part[1][1] + 1700), 30)
    monkeypatch.setattr(index_module, "SCANNED", 700)
    blocks = build_index(p).search(q, 30)
    for found in (joined, blocks):
        np.testing.assert_array_equal(found[1], whole[1])
        np.testing.assert_array_equal(found[0], whole[0])


def test_products_side_by_side_give_the_same_candidates() -> None:
    q, p = vectors("unit", 100, 32, 0), vectors("unit", 1000, 32, 1)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(build_index(p).search(q, 9))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    np.testing.assert_array_equal(found[0][1], found[1][1])
    np.testing.assert_array_equal(found[0][0], found[1][0])


@pytest.mark.parametrize("magnitudes", [(1e-25, 1e10), (1e10, 1e-25), (1e-38, 1e14), (1e-20, 1e-20), (1e14, 1e14)])
def test_lists_are_right_where_squares_are_too_small_or_large_to_be_seen(magnitudes: tuple[float, float]) -> None:
    """One side's norm is 0 in fp32, and its products with the other's are ordinary numbers."""
    q, p = vectors("plain", 60, 64, 0), vectors("plain", 3000, 64, 1)
    q, p = (q * np.float64(magnitudes[0])).astype(np.float32), (p * np.float64(magnitudes[1])).astype(np.float32)
    exact = q.astype(np.float64) @ p.astype(np.float64).T
    kth, off = -np.sort(-exact, axis=1)[:, 9:10], close(q, p) + 2.0**-120
    rows, open_ = candidates(q, p, 10)
    for query in np.setdiff1d(np.arange(60), open_):
        assert set(np.flatnonzero(exact[query] > kth[query] + 2 * off[query])) <= set(rows[query])


def test_mixed_magnitudes_in_one_vector() -> None:
    rng = np.random.default_rng(3)
    q, p = (vectors("plain", n, 48, n) * 10.0 ** rng.uniform(-12, 6, (n, 48)) for n in (50, 2500))
    q, p = q.astype(np.float32), p.astype(np.float32)
    scores, _ = build_index(p).search(q, 10)
    assert (np.abs(scores - best(q, p, 10)) <= close(q, p)).all()


def test_a_search_of_few_queries_and_one_of_many_have_the_same_bits(monkeypatch) -> None:
    """Also where equal scores at rank k make some queries be searched again, with few others."""
    monkeypatch.setattr(sieve, "QUERIES", 50)
    q, p = vectors("unit", 60, 64, 0), vectors("unit", 4000, 64, 1)
    p[1000:1200] = q[:1].mean(axis=0)  # as near as can be to the first, and all alike
    many = build_index(p).search(q, 10)
    assert many[1][0].tolist() == list(range(1000, 1010))
    for few in (slice(0, 1), slice(0, 40)):  # compared pair by pair by faiss, and by its products
        found = build_index(p).search(q[few], 10)
        np.testing.assert_array_equal(found[1], many[1][few])
        np.testing.assert_array_equal(found[0], many[0][few])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_callers_modes_change_nothing(dtype: torch.dtype) -> None:
    q, p = vectors("unit", 60, 64, 0), vectors("unit", 2000, 64, 1)
    expected = build_index(p).search(q, 10)
    p.flags.writeable = q.flags.writeable = False
    with torch.autocast("cpu", dtype=dtype), torch.inference_mode():
        found = build_index(p).search(q, 10)
    np.testing.assert_array_equal(found[1], expected[1])
    np.testing.assert_array_equal(found[0], expected[0])


def test_threads_come_back_after_an_error(monkeypatch) -> None:
    before = torch.get_num_threads()
    monkeypatch.setattr(index_module, "_scored", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        build_index(vectors("unit", 2000, 64, 1)).search(vectors("unit", 60, 64, 0), 10)
    assert torch.get_num_threads() == before


def test_passages_that_are_all_alike_end_it_early(monkeypatch) -> None:
    """Nothing can be left out: after the first products there are no more."""
    products, weights = [], torch.ops.mkldnn._linear_pointwise
    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", lambda *a: products.append(1) or weights(*a))
    monkeypatch.setattr(sieve, "_MOST", 200)
    _, open_ = candidates(vectors("unit", 20, 16, 0), np.ones((3000, 16), np.float32), 5)
    assert len(open_) == 20
    parts = -(-20 // min(32, -(-20 // torch.get_num_threads())))
    assert len(products) == parts * sieve._SAMPLE


def test_it_is_used_where_bf16_is_fast_and_the_search_large(monkeypatch) -> None:
    monkeypatch.undo()
    fast = has_fused_products(torch.bfloat16)
    assert sieve.suits(1 << 15, 128) == sieve.pays(512, 1 << 15, 128, 128) == fast
    monkeypatch.setattr(sieve, "has_fused_products", lambda *_: True)
    assert sieve.pays(512, 1 << 15, 128, 128)
    assert not sieve.pays(511, 1 << 15, 128, 128)
    assert not sieve.pays(512, (1 << 15) - 1, 128, 128)
    assert not sieve.pays(512, 1 << 15, 127, 128)
    assert not sieve.pays(512, 1 << 15, 128, 129)
    used = []
    monkeypatch.setattr(sieve, "candidates", lambda *a: used.append(a) or 1 / 0)
    p, q = np.ones((1 << 15, 128), np.float32), np.ones((512, 128), np.float32)
    with pytest.raises(ZeroDivisionError):
        build_index(p).search(q, 1)
    assert len(used) == 1
    with pytest.raises(ZeroDivisionError):
        build_index(p[:100], of=1 << 15).search(q, 1)
    assert build_index(p).search(q[:3], 1)[1].max() == 0
    monkeypatch.setattr(sieve, "has_fused_products", lambda *_: False)
    assert build_index(p).search(q, 1)[1].max() == 0
