"""TextTable: rows, ids, groups, fingerprints, collisions, damage."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparring import files
from sparring.data import TextTable, normalise
from sparring.data import table as module
from sparring.machine import give_back
from sparring.types import InputError

ROWS = [("a", "T", "x y"), ("b", "", "t  X\ty"), ("007", "", "seven"), ("7", "only title", ""), ("한", "", "글")]


def test_rows_come_back_as_they_went_in(tmp_path: Path) -> None:
    table = TextTable.from_rows(ROWS, tmp_path / "t")
    assert len(table) == 5
    assert table.ids([4, 0, 4]) == ["한", "a", "한"]
    assert table.texts(np.array([0, 3, 1])) == ["T x y", "only title", "t  X\ty"]
    assert (table.title(0), table.body(0), table.text(2)) == ("T", "x y", "seven")
    assert table.row("007") == 2
    assert table.row("7") == 3
    assert table.rows(["한", "a"]).tolist() == [4, 0]
    assert table.rows([]).dtype == np.int64
    assert "b" in table
    assert "0007" not in table
    assert None not in table


def test_groups_are_the_first_row_with_the_same_normalised_text(tmp_path: Path) -> None:
    table = TextTable.from_rows(ROWS, tmp_path / "t")
    assert table.groups.dtype == np.int64
    assert table.groups.tolist() == [0, 0, 2, 3, 4]  # "T x y" == "t  X\ty"


def test_unknown_id_and_row(tmp_path: Path) -> None:
    table = TextTable.from_rows(ROWS, tmp_path / "t")
    with pytest.raises(InputError, match="'zz'"):
        table.row("zz")
    with pytest.raises(InputError, match="'zz'"):
        table.rows(["a", "zz"])
    for wrong in (-1, 5):
        with pytest.raises(IndexError):
            table.text(wrong)
        with pytest.raises(IndexError):
            table.texts([0, wrong])


def test_many_batches_in_any_order(tmp_path: Path) -> None:
    count = 3 * 4096 + 5
    table = TextTable.from_rows(((f"i{n}", "", f"text {n}") for n in range(count)), tmp_path / "t")
    rows = np.random.default_rng(0).permutation(count)
    assert table.texts(rows) == [f"text {n}" for n in rows]
    assert all(table.row(f"i{n}") == n for n in (0, 4095, 4096, 8191, count - 1))


def test_a_long_walk_gives_pages_back_and_reads_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    count, given = 3 * 4096, []
    TextTable.from_rows(((f"i{n}", "", f"text {n} " * 40) for n in range(count)), tmp_path / "t")
    monkeypatch.setattr(module, "_KEPT", 1 << 21)
    monkeypatch.setattr(module, "give_back", lambda mapped: given.append(len(mapped)) or give_back(mapped))
    table = TextTable.open(tmp_path / "t")
    size = (tmp_path / "t" / "text.arrow").stat().st_size
    for _ in range(2):
        for start in range(0, count, 4096):
            assert table.texts(np.arange(start, start + 4096))[5] == f"text {start + 5} " * 40
    assert len(given) >= 2 * size // (1 << 21) - 2
    before = len(given)
    assert [table.text(row) for row in range(200)][7] == "text 7 " * 40
    assert len(given) > before, "rows read one by one count, too"


def test_duplicate_ids_are_kept_and_resolve_to_the_first(tmp_path: Path) -> None:
    table = TextTable.from_rows([("a", "", "1"), ("b", "", "2"), ("a", "", "3"), ("a", "", "1")], tmp_path / "t")
    assert len(table) == 4
    assert table.row("a") == 0
    assert table.rows(["b", "a"]).tolist() == [1, 0]
    assert table.duplicate_rows().tolist() == [2, 3]


def test_colliding_hashes_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_hash", lambda id: len(id) % 2)
    ids = [f"{'x' * (n % 3)}{n}" for n in range(40)]
    table = TextTable.from_rows([(id, "", "t") for id in ids], tmp_path / "t")
    assert [table.row(id) for id in ids] == list(range(40))
    assert table.rows(reversed(ids)).tolist() == list(reversed(range(40)))
    assert "nope" not in table
    assert table.duplicate_rows().tolist() == []


def test_fingerprint_follows_content_only(tmp_path: Path) -> None:
    first = TextTable.from_rows(ROWS, tmp_path / "one").fingerprint
    assert TextTable.from_rows(ROWS, tmp_path / "two").fingerprint == first
    changed = [[("a", "T x", "y"), *ROWS[1:]], [("A", *ROWS[0][1:]), *ROWS[1:]], ROWS[:-1], [*ROWS[1:], ROWS[0]]]
    assert len({TextTable.from_rows(rows, tmp_path / "three").fingerprint for rows in changed} | {first}) == 5


def test_empty_table(tmp_path: Path) -> None:
    table = TextTable.from_rows([], tmp_path / "t")
    assert len(table) == 0
    assert table.texts([]) == []
    assert table.groups.tolist() == []
    assert "a" not in table
    assert table.duplicate_rows().tolist() == []
    with pytest.raises(InputError):
        table.rows(["a"])


def test_writing_is_all_or_nothing(tmp_path: Path) -> None:
    path = tmp_path / "t"
    TextTable.from_rows(ROWS, path)

    def broken():
        yield ROWS[0]
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        TextTable.from_rows(broken(), path)
    assert len(TextTable.open(path)) == 5
    assert len(TextTable.from_rows(ROWS[:2], path)) == 2
    assert [item.name for item in tmp_path.iterdir()] == ["t"]


def test_ids_are_never_file_names(tmp_path: Path) -> None:
    ids = ["../../evil", "/etc/passwd", "a" * 5000, ".", "CON", "a\\b"]
    table = TextTable.from_rows([(id, "", "t") for id in ids], tmp_path / "t")
    assert [table.row(id) for id in ids] == list(range(6))
    assert [item.name for item in tmp_path.iterdir()] == ["t"]


def test_damage_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not a table"):
        TextTable.open(tmp_path / "none")
    path = tmp_path / "t"
    TextTable.from_rows(ROWS, path)
    (path / "text.arrow").write_bytes(b"ARROW1 nothing")
    with pytest.raises(InputError, match="damaged"):
        TextTable.open(path)
    TextTable.from_rows(ROWS, path)
    np.save(path / "order.npy", np.arange(2))
    with pytest.raises(InputError, match="damaged"):
        TextTable.open(path)
    files.write_sealed(path / "table.json", {"format": 0, "files": {}})
    with pytest.raises(InputError, match="another version"):
        TextTable.open(path)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.text(), st.text(), st.text()), max_size=12))
def test_any_unicode_round_trips(rows: list[tuple[str, str, str]]) -> None:
    rows = [tuple(part.encode("utf-8", "ignore").decode() for part in row) for row in rows]  # type: ignore[misc]
    with tempfile.TemporaryDirectory() as folder:
        table = TextTable.from_rows(rows, Path(folder) / "t")
        assert [(table.id(n), table.title(n), table.body(n)) for n in range(len(rows))] == rows
        texts = [normalise(text) for text in table.texts(range(len(rows)))]
        for one in range(len(rows)):
            assert table.row(rows[one][0]) == [row[0] for row in rows].index(rows[one][0])
            for two in range(len(rows)):
                assert (table.groups[one] == table.groups[two]) == (texts[one] == texts[two])


@given(st.text())
def test_normalise_is_idempotent(text: str) -> None:
    assert normalise(normalise(text)) == normalise(text)


def test_normalise_examples() -> None:
    assert normalise("  Ｆｕｌｌ\u3000Width\n STRASSE ") == normalise("full width Straße")
    assert normalise("\u1112\u1161\u11ab") == "한"  # NFD Hangul equals NFC
