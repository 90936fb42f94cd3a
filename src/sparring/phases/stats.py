"""Intervals and paired tests over queries."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy import stats as scipy_stats

from sparring.types import InputError

_CELLS = 4_000_000  # resampled values held at a time


class Estimate(NamedTuple):
    """A mean over queries with its 95 % interval. One query gives no interval: low and high are NaN."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        if math.isnan(self.low):
            return f"{self.mean:.4f}"
        return f"{self.mean:.4f} [{self.low:.4f}, {self.high:.4f}]"


@dataclass(frozen=True)
class PairedTest:
    """Two systems on the same queries: ``difference`` is the mean of a - b; both p values are two-sided."""

    difference: float
    p_randomisation: float
    p_t: float
    queries: int


def interval(values: np.ndarray, seed: int = 0, *, resamples: int = 2000) -> Estimate:
    """Mean over queries with a 95 % percentile bootstrap interval (Efron); queries are the units that are resampled.

    Constant values have an interval of no width; a single query has none (NaN).

    Raises:
        InputError: no values.
    """
    values = np.asarray(values, dtype=np.float64)
    if not len(values):
        raise InputError("no query to average over", where="measure values")
    mean = float(values.mean())
    if len(values) == 1:
        return Estimate(mean, math.nan, math.nan)
    if np.ptp(values) == 0:
        return Estimate(mean, mean, mean)
    found = scipy_stats.bootstrap(
        (values,),
        np.mean,
        n_resamples=resamples,
        batch=max(1, _CELLS // len(values)),
        confidence_level=0.95,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return Estimate(mean, float(found.low), float(found.high))


def paired_test(a: np.ndarray, b: np.ndarray, seed: int = 0, *, resamples: int = 9999) -> PairedTest:
    """Do two systems differ on the same queries? Fisher's randomisation of signs, and Student's paired t.

    Exact (all 2^Q signs) where there are no more than ``resamples`` of them. Equal systems have p = 1.

    Raises:
        InputError: no queries, or arrays of different lengths.
    """
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if a.shape != b.shape or a.ndim != 1 or not len(a):
        got = f"{list(a.shape)} and {list(b.shape)}"
        raise InputError("a paired test needs the same queries twice", expected="two equal, non-empty arrays", got=got)
    difference = a - b
    if not difference.any():
        return PairedTest(0.0, 1.0, 1.0, len(a))
    p = _randomisation(difference[difference != 0], seed, resamples)
    return PairedTest(float(difference.mean()), p, _t(difference), len(a))


def largest_share(hits: int, count: int, confidence: float) -> float:
    """Upper Clopper-Pearson bound of a share of which ``hits`` of ``count`` were seen."""
    return 1.0 if hits >= count else float(scipy_stats.beta.ppf(confidence, hits + 1, count - hits))


def largest_mean(values: np.ndarray, confidence: float) -> float:
    """Upper bound of a mean by Student's t, one-sided; two values or more."""
    values = np.asarray(values, dtype=np.float64)
    error = float(values.std(ddof=1)) / math.sqrt(len(values))
    return float(values.mean() + scipy_stats.t.ppf(confidence, len(values) - 1) * error)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment: with these, rejecting at alpha keeps the family's error rate at alpha.

    In the order given; NaN is not accepted. The smallest of m is multiplied by m, the next by m - 1, and so on, and
    no adjusted value is below one of a smaller p (Holm, 1979).
    """
    order = np.argsort(np.asarray(p_values, dtype=np.float64), kind="stable")
    adjusted, least = [0.0] * len(order), 0.0
    for place, index in enumerate(order):
        least = max(least, min(1.0, (len(order) - place) * float(p_values[index])))
        adjusted[int(index)] = least
    return adjusted


def _randomisation(moved: np.ndarray, seed: int, resamples: int) -> float:
    """Two-sided p of the mean over signs: all of them if no more than ``resamples``, else that many at random.

    The sign of a zero difference changes nothing, so the caller leaves those queries out. Random signs count the
    observed ones as one more draw, so that p is never 0. Written out because of the time that scipy's general
    permutation test takes (docs/decisions/0006-own-randomisation-test.md); the tests compare the two.
    """
    count, far = len(moved), abs(float(moved.sum())) - 1e-12 * float(np.abs(moved).sum())
    if count <= math.log2(resamples):
        signs = (np.arange(2**count)[:, None] >> np.arange(count)) & 1
        return float((np.abs((2 * signs - 1) @ moved) >= far).mean())
    rng = np.random.default_rng(seed)
    beyond, step = 0, max(1, _CELLS // count)
    for start in range(0, resamples, step):
        signs = rng.integers(0, 2, (min(step, resamples - start), count), dtype=np.int8).astype(np.float64)
        beyond += int((np.abs(2 * (signs @ moved) - moved.sum()) >= far).sum())
    return (1 + beyond) / (1 + resamples)


def _t(difference: np.ndarray) -> float:
    """Two-sided p of the paired t test. 1 for one query (nothing can be said); 0 for equal, non-zero differences."""
    count = len(difference)
    if count < 2:
        return 1.0
    error = float(difference.std(ddof=1)) / math.sqrt(count)
    if error == 0:
        return 0.0
    return float(2 * scipy_stats.t.sf(abs(float(difference.mean())) / error, count - 1))
