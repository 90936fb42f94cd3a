"""The store on disk: contents, caching, sharing; and what a tokenizer must offer."""

import contextlib
import errno
import itertools
import json
import logging
import os
import shutil
import signal
import stat
import subprocess
import sys
import time

import numpy as np
import pytest
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from sparring.files import FULL, Busy, DiskError, Lock, explained, write_sealed
from sparring.models import growing, tokens
from sparring.models.template import Template, longest_first
from sparring.models.tokens import TokenStore, tokenize
from sparring.types import InputError

TEXTS = ["create a bucket", "", "비밀번호를 어떻게 바꾸나요", "how to reset a password " * 9]


@pytest.fixture
def tokenizer(tiny_bert):
    return AutoTokenizer.from_pretrained(tiny_bert)


def test_rows_lengths_and_cap(tokenizer, tmp_path):
    store = tokenize(TEXTS, tokenizer, limit=10, cache=tmp_path, name="texts")
    expected = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in TEXTS]
    assert [store[row].tolist() for row in range(len(store))] == [ids[:10] for ids in expected]
    assert store.true_lengths.tolist() == [len(ids) for ids in expected]
    assert store.lengths.tolist() == [min(10, len(ids)) for ids in expected]
    assert store.ids.dtype == np.int32
    assert isinstance(store.ids, np.memmap)
    with pytest.raises(IndexError):
        store[len(TEXTS)]


def test_memory_and_disk_agree_over_many_chunks(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(tokens, "CHUNK", 3)
    texts = [f"{text} {i}" for i in range(5) for text in TEXTS]
    on_disk = tokenize(texts, tokenizer, limit=10, cache=tmp_path, name="texts")
    in_memory = tokenize(texts, tokenizer, limit=10, cache=None, name="texts")
    for name in ("ids", "offsets", "true_lengths"):
        assert np.array_equal(getattr(on_disk, name), getattr(in_memory, name)), name
    assert on_disk.fingerprint == in_memory.fingerprint


def test_a_second_call_reads_the_same_files(tokenizer, tmp_path):
    first = tokenize(TEXTS, tokenizer, limit=10, cache=tmp_path, name="texts")
    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    tokenizer(["state of truncation and padding"], truncation=True, max_length=4, padding="max_length")
    second = tokenize(TEXTS, tokenizer, limit=10, cache=tmp_path, name="other name")
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == files
    assert first.fingerprint == second.fingerprint


def test_a_known_fingerprint_is_not_computed_again(tokenizer, monkeypatch):
    settings = {"limit": 10, "cache": None, "name": "texts"}
    known = tokens.tokenizer_fingerprint(tokenizer)
    plain = tokenize(TEXTS, tokenizer, **settings)
    monkeypatch.delattr(tokens, "tokenizer_fingerprint")
    assert tokenize(TEXTS, tokenizer, **settings, tokenizer_id=known).fingerprint == plain.fingerprint


@pytest.mark.parametrize("change", ["texts", "prompt", "limit", "tokenizer"])
def test_fingerprint_covers(change, tokenizer, tiny_unigram, tmp_path):
    settings = {"prompt": "", "limit": 10}
    texts = TEXTS
    base = tokenize(texts, tokenizer, **settings, cache=tmp_path, name="texts")
    if change == "texts":
        texts = [*TEXTS[:-1], TEXTS[-1] + "!"]
    elif change == "tokenizer":
        tokenizer = AutoTokenizer.from_pretrained(tiny_unigram)
    else:
        settings[change] = {"prompt": "query: ", "limit": 11}[change]
    assert tokenize(texts, tokenizer, **settings, cache=tmp_path, name="texts").fingerprint != base.fingerprint
    assert len(list(tmp_path.iterdir())) == 2


def test_no_texts(tokenizer, tmp_path):
    for cache in (None, tmp_path):
        store = tokenize([], tokenizer, limit=10, cache=cache, name="texts")
        assert len(store) == 0
        assert store.lengths.tolist() == []


def test_an_interrupted_store_is_not_used(tokenizer, tmp_path):
    class Interrupted:
        fingerprint = "x"

        def __len__(self):
            return 2 * tokens.CHUNK

        def texts(self, rows):
            if rows[0]:
                raise KeyboardInterrupt
            return ["a"] * len(rows)

    with pytest.raises(KeyboardInterrupt):
        tokenize(Interrupted(), tokenizer, limit=10, cache=tmp_path, name="texts")
    assert list(tmp_path.iterdir()) == []


class Counted:
    """Texts that say which of them were asked for, and stop somewhere."""

    def __init__(self, count, stop=None):
        self.fingerprint, self.stop, self.asked = f"counted {count}", stop, []
        self._texts = [f"{TEXTS[row % len(TEXTS)]} {row}" for row in range(count)]

    def __len__(self):
        return len(self._texts)

    def texts(self, rows):
        if self.stop is not None and rows[-1] >= self.stop:
            raise KeyboardInterrupt
        self.asked += rows.tolist()
        return [self._texts[row] for row in rows]


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def often(monkeypatch):
    """Chunks of 4 texts; a clock that goes on by a second whenever it is looked at, so that a note is due every 8
    texts."""
    monkeypatch.setattr(tokens, "CHUNK", 4)
    monkeypatch.setattr(tokens, "NOTED", 2)
    monkeypatch.setattr(tokens, "monotonic", itertools.count().__next__)
    return {"limit": 10, "name": "texts"}


def stopped(tokenizer, cache, often, count=30, stop=21):
    """A cache in which the making of a store was stopped: 16 texts are noted. -> its part folder"""
    source = Counted(count, stop)
    with pytest.raises(KeyboardInterrupt):
        tokenize(source, tokenizer, cache=cache, **often)
    assert source.asked == list(range(20))
    (part,) = cache.iterdir()
    assert part.name.endswith(".part")
    return part


@pytest.mark.parametrize("stop", [21, 29])
def test_a_stopped_store_goes_on_and_has_the_same_bytes(stop, tokenizer, tmp_path, often, caplog):
    """Stopped while the 21st (29th) text is asked for; 16 (24) are noted and not asked for again."""
    tokenize(Counted(30), tokenizer, cache=tmp_path / "one go", **often)
    source = Counted(30, stop)
    with pytest.raises(KeyboardInterrupt):
        tokenize(source, tokenizer, cache=tmp_path / "cache", **often)
    noted = {21: 16, 29: 24}[stop]
    again = Counted(30)
    with caplog.at_level(logging.INFO):
        store = tokenize(again, tokenizer, cache=tmp_path / "cache", **often)
    assert again.asked == list(range(noted, 30))
    assert f"goes on after {noted} of 30" in caplog.text
    assert contents(tmp_path / "cache") == contents(tmp_path / "one go")
    assert len(contents(store.folder)) == 4
    expected = [tokenizer(text, add_special_tokens=False)["input_ids"][:10] for text in again._texts]
    assert [store[row].tolist() for row in range(30)] == expected


@pytest.mark.parametrize(("seconds", "asked"), [(0, [24, 25, 26, 27, 28, 29]), (600, list(range(30)))])
def test_notes_are_made_by_the_clock(seconds, asked, tokenizer, tmp_path, often, monkeypatch):
    """By the real one: after every chunk where no time lies between them, never where ten minutes do."""
    monkeypatch.setattr(tokens, "monotonic", time.monotonic)
    monkeypatch.setattr(tokens, "NOTED", seconds)
    with pytest.raises(KeyboardInterrupt):
        tokenize(Counted(30, stop=26), tokenizer, cache=tmp_path, **often)
    again = Counted(30)
    tokenize(again, tokenizer, cache=tmp_path, **often)
    assert again.asked == asked


def test_the_bar_goes_on_where_the_texts_do(tokenizer, tmp_path, often, monkeypatch):
    """What was done before is not in its rate."""
    bars, real = [], tokens.progress

    @contextlib.contextmanager
    def seen(*given, **named):
        with real(*given, **named) as bar:
            bars.append((named["total"], bar.n))
            yield bar

    stopped(tokenizer, tmp_path, often)
    monkeypatch.setattr(tokens, "progress", seen)
    tokenize(Counted(30), tokenizer, cache=tmp_path, **often)
    assert bars == [(30, 16)]


def test_the_part_of_a_finished_store_goes_away(tokenizer, tmp_path, often):
    """As one is left where two processes made the store and the one beside the part folder was the faster."""
    part = stopped(tokenizer, tmp_path, often)
    held = Lock(tmp_path, part.name.removeprefix(".").removesuffix(".part"))
    store = tokenize(Counted(30), tokenizer, cache=tmp_path, **often)
    before = contents(part)
    tokenize(Counted(30), tokenizer, cache=tmp_path, **often)  # it is still held
    assert contents(part) == before
    held.remove()
    again = Counted(30)
    tokenize(again, tokenizer, cache=tmp_path, **often)
    assert (again.asked, list(tmp_path.iterdir())) == ([], [store.folder])


def refused_lock(monkeypatch, place):
    """The lock file is another user's; also for root, who may open any."""
    real = os.open

    def closed(path, *rest, **named):
        if str(path).endswith(".lock"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return real(path, *rest, **named)

    monkeypatch.setattr(os, "open", closed)


def no_locks(monkeypatch, place):
    """The file system has none, as some NFS mounts."""
    fcntl = pytest.importorskip("fcntl")

    def refused(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refused)


def stuck_part(monkeypatch, place):
    """The part folder is another user's, its files cannot be opened to write; also for root."""
    os.truncate(place / "ids.int32", 100)
    real = shutil.rmtree

    def refused(path, ignore_errors=False, **named):
        if path != place:
            real(path, ignore_errors=ignore_errors, **named)
        elif not ignore_errors:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(shutil, "rmtree", refused)


@pytest.mark.parametrize("hinder", [refused_lock, no_locks, stuck_part])
def test_a_part_that_cannot_be_removed_is_no_error(hinder, tokenizer, tmp_path, often, monkeypatch):
    part = stopped(tokenizer, tmp_path, often)
    held = Lock(tmp_path, part.name.removeprefix(".").removesuffix(".part"))
    tokenize(Counted(30), tokenizer, cache=tmp_path, **often)
    held.remove()
    hinder(monkeypatch, part)
    before, again = sorted(tmp_path.iterdir()), Counted(30)
    tokenize(again, tokenizer, cache=tmp_path, **often)
    assert (again.asked, sorted(tmp_path.iterdir())) == ([], before)


def test_it_may_be_stopped_again_and_again(tokenizer, tmp_path, often):
    tokenize(Counted(60), tokenizer, cache=tmp_path / "one go", **often)
    asked = 0
    for stop in range(5, 60, 3):
        source = Counted(60, stop)
        with pytest.raises(KeyboardInterrupt):
            tokenize(source, tokenizer, cache=tmp_path / "cache", **often)
        asked += len(source.asked)
    last = Counted(60)
    tokenize(last, tokenizer, cache=tmp_path / "cache", **often)
    assert last.asked[0] >= 48
    assert asked + len(last.asked) < 60 + 19 * 8
    assert contents(tmp_path / "cache") == contents(tmp_path / "one go")


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 4] ^= 1
    path.write_bytes(data)


def cut(path, size=1):
    os.truncate(path, path.stat().st_size - size)


def lengthen(path):
    path.write_bytes(path.read_bytes() + b"garbage" * 999)


def drop(note, key):
    """The note without a key, sealed again."""
    write_sealed(
        note, {name: value for name, value in json.loads(note.read_text()).items() if name not in (key, "seal")}
    )


FILES = ["ids.int32", "offsets.npy", "true_lengths.npy"]
LEFT = {
    "longer columns": (lambda part: [lengthen(part / f) for f in FILES], 16),
    "half a note": (lambda part: (part / "done.json.part").write_text('{"of": "'), 16),
    **{f"shorter {f}": (lambda part, f=f: os.truncate(part / f, 100), 0) for f in FILES},
    **{f"a bit of {f}": (lambda part, f=f: flip(part / f), 0) for f in FILES},
    **{f"no {f}": (lambda part, f=f: (part / f).unlink(), 0) for f in FILES},
    "a cut note": (lambda part: cut(part / "done.json", 9), 0),
    "a changed note": (lambda part: flip(part / "done.json"), 0),
    "no note": (lambda part: (part / "done.json").unlink(), 0),
    "an old manifest": (lambda part: write_sealed(part / "manifest.json", {"files": {}}), 16),
    **{
        f"a note without {key}": (lambda part, key=key: drop(part / "done.json", key), 0)
        for key in ("of", "facts", "files")
    },
    "a note of others": (lambda part: write_sealed(part / "done.json", {"of": "x", "facts": {}, "files": {}}), 0),
}


@pytest.mark.parametrize("left", LEFT)
def test_what_a_crash_left_never_gives_another_store(left, tokenizer, tmp_path, often, caplog):
    tokenize(Counted(30), tokenizer, cache=tmp_path / "one go", **often)
    part = stopped(tokenizer, tmp_path / "cache", often)
    spoil, first = LEFT[left]
    spoil(part)
    again = Counted(30)
    tokenize(again, tokenizer, cache=tmp_path / "cache", **often)
    assert again.asked == list(range(first, 30))
    assert ("begun again" in caplog.text) == (first == 0 and left != "no note")
    assert contents(tmp_path / "cache") == contents(tmp_path / "one go")


def test_one_that_is_stopped_before_its_first_note_leaves_nothing(tokenizer, tmp_path, often):
    with pytest.raises(KeyboardInterrupt):
        tokenize(Counted(30, stop=7), tokenizer, cache=tmp_path, **often)
    assert list(tmp_path.iterdir()) == []


def test_parts_of_other_texts_stay(tokenizer, tmp_path, often):
    part = stopped(tokenizer, tmp_path, often)
    before = contents(part)
    tokenize(Counted(31), tokenizer, cache=tmp_path, **often)
    assert contents(part) == before


def test_a_part_that_another_process_holds_is_left_alone(tokenizer, tmp_path, often):
    tokenize(Counted(30), tokenizer, cache=tmp_path / "one go", **often)
    part = stopped(tokenizer, tmp_path / "cache", often)
    before, final = contents(part), part.name.removeprefix(".").removesuffix(".part")
    held = Lock(part.parent, final)
    source = Counted(30)
    store = tokenize(source, tokenizer, cache=tmp_path / "cache", **often)
    held.remove()
    assert source.asked == list(range(30))
    assert contents(part) == before
    assert contents(store.folder) == contents(tmp_path / "one go" / final)
    assert sorted(path.name for path in part.parent.iterdir()) == sorted([part.name, final])


def test_two_at_once_both_end_with_the_store(tokenizer, tmp_path, often):
    """The second begins and ends while the first is in the middle."""
    tokenize(Counted(30), tokenizer, cache=tmp_path / "one go", **often)
    second = Counted(30)

    class First(Counted):
        def texts(self, rows):
            if rows[0] == 12:
                tokenize(second, tokenizer, cache=tmp_path / "cache", **often)
            return super().texts(rows)

    first = First(30)
    store = tokenize(first, tokenizer, cache=tmp_path / "cache", **often)
    assert first.asked == second.asked == list(range(30))
    assert contents(tmp_path / "cache") == contents(tmp_path / "one go")
    assert store.folder.parent == tmp_path / "cache"


def test_one_that_was_finished_while_the_lock_was_waited_for_is_taken(tokenizer, tmp_path, often, monkeypatch):
    other, source, real = Counted(30), Counted(30), growing.Lock

    def late(*place):
        monkeypatch.setattr(growing, "Lock", real)
        tokenize(other, tokenizer, cache=tmp_path, **often)
        return real(*place)

    monkeypatch.setattr(growing, "Lock", late)
    store = tokenize(source, tokenizer, cache=tmp_path, **often)
    assert (len(other.asked), source.asked, len(store)) == (30, [], 30)
    assert [path.name for path in tmp_path.iterdir()] == [store.folder.name]


def test_without_locks_nothing_is_shared(tokenizer, tmp_path, often, monkeypatch):
    """A process then makes the store in a folder of its own, which goes away when it is stopped."""

    class NoLock:
        held = False

        def __init__(self, *_):
            pass

        def remove(self):
            pass

    part = stopped(tokenizer, tmp_path, often)
    before = contents(part)
    monkeypatch.setattr(growing, "Lock", NoLock)
    with pytest.raises(KeyboardInterrupt):
        tokenize(Counted(30, stop=29), tokenizer, cache=tmp_path, **often)
    assert list(tmp_path.iterdir()) == [part]
    source = Counted(30)
    tokenize(source, tokenizer, cache=tmp_path, **often)
    assert source.asked == list(range(30))
    assert contents(part) == before


@pytest.mark.parametrize("hinder", [refused_lock, no_locks, stuck_part])
def test_what_another_user_left_does_not_hinder(hinder, tokenizer, tmp_path, often, monkeypatch):
    """The store is made beside it, and may be read by as many as one that was made without hindrance."""
    plain = tokenize(Counted(30), tokenizer, cache=tmp_path / "one go", **often)
    part = stopped(tokenizer, tmp_path / "cache", often)
    hinder(monkeypatch, part)
    before, source = contents(part), Counted(30)
    with pytest.raises(KeyboardInterrupt):
        tokenize(Counted(30, stop=29), tokenizer, cache=tmp_path / "cache", **often)
    assert list(part.parent.iterdir()) == [part]
    store = tokenize(source, tokenizer, cache=tmp_path / "cache", **often)
    assert source.asked == list(range(30))
    assert contents(part) == before
    assert contents(store.folder) == contents(plain.folder)
    assert stat.S_IMODE(store.folder.stat().st_mode) == stat.S_IMODE(plain.folder.stat().st_mode)
    assert sorted(part.parent.iterdir()) == sorted([part, store.folder])


@pytest.mark.parametrize(
    ("size", "first"), [(50, range(1)), (300, range(1)), (1500, range(8, 96)), (-1, range(96, 97))]
)
def test_a_full_disk_is_named_as_the_caches(size, first, tokenizer, tmp_path, often):
    """Not as that of the output, which the command names where an error names no file. No file may have more than so
    many bytes (-1: one less than the ids have), which refuses the first note's columns, the note, a later one, the end.
    """
    resource = pytest.importorskip("resource")
    plain = tokenize(Counted(100), tokenizer, cache=tmp_path / "one go", **often)
    size = size if size > 0 else plain.ids.nbytes - 1
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        with pytest.raises(DiskError) as found, explained("the output"):
            tokenize(Counted(100), tokenizer, cache=tmp_path / "cache", **often)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert found.value.what == FULL
    assert found.value.where.startswith(str(tmp_path / "cache" / ".tokens-"))
    again = Counted(100)
    store = tokenize(again, tokenizer, cache=tmp_path / "cache", **often)
    assert again.asked[0] in first
    assert contents(store.folder) == contents(plain.folder)
    assert list((tmp_path / "cache").iterdir()) == [store.folder]


@pytest.mark.parametrize("why", [no_locks, "ever another file"])
def test_a_lock_that_cannot_be_held_leaves_no_file(why, tmp_path, monkeypatch):
    """But a file that was there stays: another process may hold it."""
    if why == "ever another file":
        pytest.importorskip("fcntl")
        monkeypatch.setattr(os.path, "samestat", lambda *_: False)
    else:
        why(monkeypatch, tmp_path)
    lock = Lock(tmp_path, "x")
    assert not lock.held
    assert list(tmp_path.iterdir()) == []
    (tmp_path / ".x.lock").touch()
    assert not Lock(tmp_path, "x").held
    assert [path.name for path in tmp_path.iterdir()] == [".x.lock"]


KILLED = """
import sys, time
from pathlib import Path
from transformers import AutoTokenizer
from sparring.models import tokens
tokens.CHUNK, tokens.NOTED = 4, 0

class Slow:
    fingerprint = "slow"
    def __len__(self): return 4000
    def texts(self, rows):
        time.sleep(0.005)
        return [f"create bucket {row} " * (1 + row % 5) for row in rows]

tokens.tokenize(Slow(), AutoTokenizer.from_pretrained(sys.argv[1]), limit=10, cache=Path(sys.argv[2]), name="texts")
"""


@pytest.mark.slow
def test_killed_in_the_middle_it_goes_on(tiny_bert, tokenizer, tmp_path, often):
    child = subprocess.Popen([sys.executable, "-c", KILLED, str(tiny_bert), str(tmp_path / "cache")])
    try:
        until, noted = time.monotonic() + 300, 0
        while noted < 80:
            assert child.poll() is None
            assert time.monotonic() < until, "no note appeared"
            for note in (tmp_path / "cache").glob(".tokens-*.part/done.json"):
                noted = json.loads(note.read_text())["facts"]["rows"]
            time.sleep(0.003)
        child.send_signal(signal.SIGKILL)
    finally:
        child.kill()
        child.wait(60)
    assert child.returncode == -signal.SIGKILL

    class Quick(Counted):
        def __init__(self):
            super().__init__(4000)
            self.fingerprint = "slow"
            self._texts = [f"create bucket {row} " * (1 + row % 5) for row in range(4000)]

    again, whole = Quick(), Quick()
    tokenize(again, tokenizer, cache=tmp_path / "cache", **often)
    assert again.asked == list(range(again.asked[0], 4000))
    assert noted <= again.asked[0] < 4000
    tokenize(whole, tokenizer, cache=tmp_path / "one go", **often)
    assert contents(tmp_path / "cache") == contents(tmp_path / "one go")


def test_a_lock_whose_file_was_removed_meanwhile_is_taken_anew(tmp_path, monkeypatch):
    """Its holder removed the file between its opening and its locking here."""
    import fcntl

    real, first = fcntl.flock, Lock(tmp_path, "x")

    def late(*given):
        monkeypatch.setattr(fcntl, "flock", real)
        first.remove()
        real(*given)

    monkeypatch.setattr(fcntl, "flock", late)
    second = Lock(tmp_path, "x")
    assert second.held
    with pytest.raises(Busy):
        Lock(tmp_path, "x")
    second.remove()
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_store_is_an_error(tokenizer, tmp_path):
    tokenize(TEXTS, tokenizer, limit=10, cache=tmp_path, name="texts")
    (folder,) = tmp_path.iterdir()
    (folder / "ids.int32").write_bytes(b"\0" * 8)
    with pytest.raises(InputError, match="damaged"):
        TokenStore.open(folder)


def test_what_is_no_damage_leaves_the_store(tokenizer, tmp_path, monkeypatch):
    tokenize(TEXTS, tokenizer, limit=10, cache=tmp_path, name="texts")
    files = sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*"))

    def refused(*_, **__):
        raise InputError("something else")

    monkeypatch.setattr(TokenStore, "open", refused)
    with pytest.raises(InputError, match="something else"):
        tokenize(TEXTS, tokenizer, limit=10, cache=tmp_path, name="texts")
    assert sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*")) == files


def test_longest_first_equals_the_tokenizers_library(tokenizer):
    backend = tokenizer.backend_tokenizer
    backend.no_padding()
    words = {1: "a", 2: "of"}
    first_id, second_id = (tokenizer.convert_tokens_to_ids(word) for word in words.values())
    lengths = np.arange(9)
    first, second = (grid.ravel() for grid in np.meshgrid(lengths, lengths))
    pairs = [("a " * a, "of " * b) for a, b in zip(first, second, strict=True)]
    for room in range(8):
        backend.enable_truncation(max_length=room + 3, strategy="longest_first")
        found = [encoding.ids for encoding in backend.encode_batch(pairs)]
        kept = longest_first(first, second, room)
        assert kept[0].tolist() == [ids.count(first_id) for ids in found], room
        assert kept[1].tolist() == [ids.count(second_id) for ids in found], room


def test_layouts_that_cannot_be_reproduced(tokenizer):
    tokenizer.truncation_side = "left"
    with pytest.raises(InputError, match="truncation_side"):
        Template.probe(tokenizer)
    tokenizer.truncation_side = "right"
    special = [("[CLS]", tokenizer.cls_token_id), ("[SEP]", tokenizer.sep_token_id)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $B [SEP] $A [SEP]", special_tokens=special
    )
    with pytest.raises(InputError, match="pair in order"):
        Template.probe(tokenizer)
    tokenizer.pad_token = None
    with pytest.raises(InputError, match="padding token"):
        Template.probe(tokenizer)
