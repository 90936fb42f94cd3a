"""Queries in groups by length and by script."""

from __future__ import annotations

import unicodedata

import numpy as np
import pytest

from sparring.phases.slices import by_length, by_script, measured, script
from sparring.phases.stats import interval


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("delete a bucket", "Latin"),
        ("crème brûlée", "Latin"),
        ("ＡＢＣ", "Latin"),
        ("비밀번호를 재설정", "Hangul"),
        (unicodedata.normalize("NFD", "비밀번호를 재설정"), "Hangul"),
        ("删除存储桶", "Han"),
        ("バケットを削除する方法", "Kana"),
        ("ﾊﾞｹｯﾄ", "Kana"),
        ("удалить", "Cyrillic"),
        ("διαγραφή", "Greek"),
        ("حذف", "Arabic"),
        ("हटाना", "Devanagari"),
        ("EC2 인스턴스", "mixed (Hangul, Latin)"),
        ("404 !?", "no letters"),
        ("", "no letters"),
        ("\U000e0001", "no letters"),
    ],
)
def test_script_of_a_text(text: str, expected: str) -> None:
    assert script(text) == expected


@pytest.mark.parametrize(("hangul", "expected"), [(7, "mixed (Hangul, Latin)"), (8, "Hangul"), (9, "Hangul")])
def test_four_fifths_of_the_letters_decide(hangul: int, expected: str) -> None:
    """8 of 10 letters are enough, 7 are not; digits and spaces count for nothing."""
    assert script("가" * hangul + " 123 " + "a" * (10 - hangul)) == expected


def test_scripts_are_counted_and_ordered_by_frequency() -> None:
    found = by_script(["list", "삭제", "copy", "404", "move"])
    assert {name: rows.tolist() for name, rows in found.items()} == {
        "Latin": [0, 2, 4], "Hangul": [1], "no letters": [3],
    }  # fmt: skip
    assert next(iter(found)) == "Latin"


def test_length_bins_are_quartiles_without_overlap_or_gap() -> None:
    lengths = np.random.default_rng(0).integers(3, 40, 401)
    found = by_length(lengths)
    assert len(found) == 4
    assert sorted(np.concatenate(list(found.values())).tolist()) == list(range(401))
    assert all(60 <= len(rows) <= 140 for rows in found.values())
    previous = int(lengths.min()) - 1
    for name, rows in found.items():
        low, high = (int(part) for part in (name.split(" to ") if " to " in name else (name, name)))
        assert low == previous + 1
        assert low <= lengths[rows].min() <= lengths[rows].max() <= high
        previous = high
    assert previous == lengths.max()


@pytest.mark.parametrize(
    ("lengths", "names"),
    [
        ([5, 5, 5], ["5"]),
        ([7], ["7"]),
        ([], []),
        ([1, 1, 1, 1, 9], ["1", "2 to 9"]),
        ([1, 2, 3, 4], ["1", "2", "3", "4"]),
    ],
)
def test_equal_lengths_stay_together(lengths: list[int], names: list[str]) -> None:
    assert list(by_length(lengths)) == names


def test_intervals_are_of_the_group_alone() -> None:
    before, after = np.array([0.0, 1.0, 0.5, 0.25, 0.5]), np.array([1.0, 1.0, 0.5, 0.5, 0.25])
    found = measured({"a": np.array([0, 3, 4]), "b": np.array([1])}, {"r": before}, {"r": after}, seed=3)
    assert found[0].before["r"] == interval(np.array([0.0, 0.25, 0.5]), 3)
    assert found[0].after["r"] == interval(np.array([1.0, 0.5, 0.25]), 3)
    assert found[0].difference["r"].mean == pytest.approx((1.0 + 0.25 - 0.25) / 3)
    assert np.isnan(found[1].before["r"].low), "one query has no interval"
    alone = measured({"a": np.array([0, 1])}, {"r": before})
    assert (alone[0].after, alone[0].difference) == ({}, {})
