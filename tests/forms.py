"""Tests in a short form, which `make test` runs, and a long one: `make test-long`."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def marked(cases: Iterable[Any], short: Collection[Any]) -> list[Any]:
    """For `parametrize`: all cases, those that the short form leaves out marked `long`."""
    return [case if case in short else pytest.param(case, marks=pytest.mark.long) for case in _all(cases, short)]


def chosen(cases: Iterable[Any], short: Collection[Any], config: pytest.Config) -> list[Any]:
    """The cases of the form that is run, for a fixture that prepares them all at once."""
    return [case for case in _all(cases, short) if case in short or config.getoption("--long")]


def _all(cases: Iterable[Any], short: Collection[Any]) -> list[Any]:
    cases = list(cases)
    assert set(short) <= set(cases), "the short form is a part of the long one"
    return cases
