"""Intervals cover, tests agree with exact enumeration."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import permutation_test, ttest_rel

from sparring.phases.stats import holm, interval, paired_test
from sparring.types import InputError


def test_interval_covers_the_true_mean() -> None:
    """Of 200 samples of 60 skewed values, about 95 % of the intervals hold the mean (percentile: a little fewer)."""
    rng = np.random.default_rng(0)
    hits = 0
    for trial in range(200):
        found = interval(rng.beta(0.5, 1.5, 60), trial, resamples=400)
        assert found.low <= found.mean <= found.high
        hits += found.low <= 0.25 <= found.high
    assert 0.88 <= hits / 200 <= 0.99


def test_interval_equals_a_written_out_bootstrap() -> None:
    values = np.random.default_rng(1).random(40)
    means = [values[np.random.default_rng(i + 10).integers(0, 40, 40)].mean() for i in range(4000)]
    found = interval(values, 3)
    assert found.mean == values.mean()
    np.testing.assert_allclose([found.low, found.high], np.quantile(means, [0.025, 0.975]), atol=0.01)
    assert interval(values, 3) == found


def test_constant_single_and_no_values() -> None:
    assert interval(np.full(9, 0.3))[:] == pytest.approx((0.3, 0.3, 0.3))
    assert str(interval(np.ones(2))) == "1.0000 [1.0000, 1.0000]"
    one = interval(np.array([0.7]))
    assert one.mean == 0.7
    assert math.isnan(one.low)
    assert math.isnan(one.high)
    assert str(one) == "0.7000"
    with pytest.raises(InputError, match="no query"):
        interval(np.array([]))


def enumerated(difference: np.ndarray) -> float:
    """Share of all 2^Q sign patterns whose mean is at least as far from zero, by hand."""
    means = [abs(np.dot(signs, difference)) for signs in itertools.product((-1, 1), repeat=len(difference))]
    return float(np.mean(np.array(means) >= abs(difference.sum()) - 1e-12))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from([-0.5, -0.25, 0.0, 0.1, 0.3, 1.0]), min_size=1, max_size=9))
def test_randomisation_test_is_exact_for_few_queries(differences: list[float]) -> None:
    """Zero differences included: leaving them out must change nothing."""
    difference = np.array(differences)
    base = np.random.default_rng(0).random(len(difference))
    found = paired_test(base + difference, base)
    assert found.difference == pytest.approx(difference.mean())
    assert found.p_randomisation == pytest.approx(min(1.0, enumerated(difference)), abs=1e-9)


def test_randomisation_test_is_scipys() -> None:
    """Exact for 10 queries; by draws for 60, where both draw 9,999 signs of their own."""
    rng = np.random.default_rng(4)
    for count, tolerance in ((10, 1e-9), (60, 0.03)):
        a, b = rng.random(count), rng.random(count) - 0.08
        scipys = permutation_test(
            (a, b), lambda x, y, axis: np.mean(x - y, axis=axis), permutation_type="samples", vectorized=True,
            rng=np.random.default_rng(0),
        )  # fmt: skip
        assert paired_test(a, b).p_randomisation == pytest.approx(scipys.pvalue, abs=tolerance)


def test_many_queries_agree_with_the_t_test() -> None:
    rng = np.random.default_rng(2)
    a, b = rng.random(300), rng.random(300)
    found = paired_test(a, b, seed=1)
    assert found.p_t == pytest.approx(float(ttest_rel(a, b).pvalue))
    assert found.p_randomisation == pytest.approx(found.p_t, abs=0.03)
    assert paired_test(a, b, seed=1) == found
    assert paired_test(a + 0.2, b).p_randomisation == pytest.approx(1e-4)  # no random signs are as far: 1 / 10,000
    assert 0 < paired_test(rng.random(3000), rng.random(3000), resamples=99).p_randomisation <= 1
    swapped = paired_test(b, a, seed=1)
    assert swapped.difference == -found.difference
    assert swapped.p_randomisation == pytest.approx(found.p_randomisation, abs=0.03)


def test_degenerate_pairs() -> None:
    same = paired_test(np.ones(5), np.ones(5))
    assert (same.difference, same.p_randomisation, same.p_t) == (0, 1, 1)
    shifted = paired_test(np.ones(5), np.zeros(5))
    assert shifted.p_randomisation == pytest.approx(2 / 32)
    assert shifted.p_t == 0
    assert paired_test(np.ones(1), np.zeros(1)).p_t == 1
    with pytest.raises(InputError, match="same queries twice"):
        paired_test(np.ones(2), np.ones(3))


def test_holm_by_hand() -> None:
    """Four tests: .01 x 4, .02 x 3, then .03 x 2 = .06 = the one before, then .04 x 1 raised to .06."""
    assert holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_rejects_what_the_step_down_procedure_rejects(p_values: list[float]) -> None:
    """Holm (1979) as written: reject the smallest while p <= alpha / (hypotheses left), then stop."""
    alpha, left, rejected = 0.05, len(p_values), set()
    for index in sorted(range(len(p_values)), key=lambda i: p_values[i]):
        if p_values[index] * left > alpha:
            break
        rejected.add(index)
        left -= 1
    assert {i for i, p in enumerate(holm(p_values)) if p <= alpha} == rejected
