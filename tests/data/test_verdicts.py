"""What a check has found is remembered while files are unchanged, and by nothing that is damaged or too young."""

from __future__ import annotations

import json
import os
import random
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from longctx.config import DataConfig
from longctx.data import Corpus, tokens, verdicts, write_tokens
from longctx.data.checked import check_corpus
from longctx.data.formats import joined
from longctx.data.packing import Packing
from longctx.data.verdicts import Stamp, remembered
from longctx.errors import DataError

LONG_AGO = time.time() - 1000


class Counting:
    """Checks a corpus, and counts how often its tokens are read through."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.path, self.cache, self.count = folder / "a.bin", folder / "cache", 0
        read_through = joined.read_through

        def counted(*arguments: Any) -> dict[str, Any]:
            self.count += 1
            return read_through(*arguments)

        monkeypatch.setattr(joined, "read_through", counted)
        # Time stamps of the last change cannot be set: the clock goes instead.
        monkeypatch.setattr(verdicts, "TICK", -1000.0)
        write_tokens(self.path, [[1, 2, 3], [4, 5]])

    def __call__(self, vocab_size: int = 100, cache: Path | None = None, **settings: Any) -> int:
        """Returns how often the tokens were read by one check."""
        before = self.count
        config = DataConfig(source="tokens", path=str(self.path), **settings)
        assert check_corpus(config, vocab_size, cache=cache or self.cache).total_tokens == 5
        return self.count - before

    @property
    def verdict(self) -> Path:
        [found] = (self.cache / "checks").glob("*.json")
        return found


@pytest.fixture
def check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Counting:
    return Counting(tmp_path, monkeypatch)


def test_an_unchanged_file_is_read_once(check: Counting) -> None:
    assert [check(), check(), check(50)] == [1, 0, 0]
    assert check(recheck=True) == 1
    assert check(cache=check.cache / "other") == 1
    assert (check.cache / "checks").stat().st_mode & 0o77 == 0


def test_another_vocabulary_is_held_against_the_largest_id(check: Counting) -> None:
    check()
    with pytest.raises(DataError, match=r"document 1, token 1 of it: id 5 is outside the vocabulary of 5"):
        check(5)


def flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[0] ^= 8
    with path.open("r+b") as file:
        file.write(raw)


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_a_changed_file_is_read_again_even_under_its_old_time(check: Counting, suffix: str) -> None:
    check()
    path = check.path.with_suffix(suffix)
    before = path.stat()
    path.chmod(0o600)
    flip(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(DataError, match=r"SHA-256|begin with"):
        check()
    flip(path)
    assert check() == 1


def test_a_copy_in_its_place_is_read(check: Counting) -> None:
    check()
    raw = check.path.read_bytes()
    check.path.rename(check.path.with_suffix(".old"))
    check.path.write_bytes(raw)
    assert [check(), check()] == [1, 0]


def test_a_file_that_was_just_written_is_not_remembered(check: Counting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verdicts, "TICK", 1000.0)
    assert [check(), check()] == [1, 1]


def test_a_damaged_verdict_is_ignored(check: Counting) -> None:
    check()
    whole, rng = check.verdict.read_bytes(), random.Random(0)
    bad = [b"", b"{}", b"null", b"[" * 60_000, whole[:-3], json.dumps({**json.loads(whole), "facts": {}}).encode()]
    for _ in range(30):
        flipped = bytearray(whole)
        flipped[rng.randrange(len(whole))] ^= 1 << rng.randrange(7)
        bad.append(bytes(flipped))
    for content in bad:
        check.verdict.write_bytes(content)
        assert check() == 1, content
        assert check.verdict.read_bytes() == whole


def test_verdicts_that_are_no_files_are_ignored(check: Counting) -> None:
    check()
    place = check.verdict
    whole = place.read_bytes()
    place.unlink()
    place.symlink_to(place.with_suffix(".else"))
    place.with_suffix(".else").write_bytes(whole)
    assert check() == 1
    place.unlink()
    os.mkfifo(place)
    assert check() == 1


@pytest.mark.parametrize("place", ["a.bin/cache", "/proc/no/such"])
def test_no_place_for_verdicts_costs_only_the_memory(check: Counting, place: str) -> None:
    assert [check(cache=check.path.parent / place) for _ in range(2)] == [1, 1]


def test_those_who_want_the_same_take_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verdicts, "TICK", -1000.0)
    (tmp_path / "a").write_bytes(b"x")
    found, running, most, said = [], [0], [0], set()

    def find(report: Any) -> dict[str, Any]:
        running[0] += 1
        most[0] = max(most[0], running[0])
        found.append(1)
        time.sleep(0.15)
        running[0] -= 1
        return {"n": 1}

    def want() -> None:
        with (tmp_path / "a").open("rb") as file:
            stamp = Stamp.of(tmp_path / "a", file.fileno())
        assert remembered(tmp_path / "c", "x", [stamp], find, lambda *a: said.add(a[2])) == {"n": 1}

    threads = [threading.Thread(target=want) for _ in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert (len(found), most[0]) == (1, 1)
    assert said == {"another process is checking the same files"}


def test_nobody_waits_for_one_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    monkeypatch.setattr(verdicts, "PATIENCE", 0.2)
    (tmp_path / "a").write_bytes(b"x")
    with (tmp_path / "a").open("rb") as file:
        stamp = Stamp.of(tmp_path / "a", file.fileno())
    assert remembered(tmp_path, "x", [stamp], lambda report: {}, lambda *a: None) == {}
    [lock] = (tmp_path / "checks").glob("*.lock")
    with lock.open("rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert remembered(tmp_path, "x", [stamp], lambda report: {}, lambda *a: None) == {}


def opened(path: Path) -> Corpus:
    return tokens.open_tokens(str(path), "uint16", 1000, verify=False)


def test_a_file_that_is_cut_while_it_is_read_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    write_tokens(path, [np.arange(1000)] * 40)
    packing = Packing(opened(path), 500, 0)
    os.truncate(path, 4096)
    with pytest.raises(DataError, match=r"a\.bin ends at byte \d+, and had 80000 bytes when it was opened: it was cut"):
        [packing.sample(index) for index in range(80)]


def test_a_file_whose_name_goes_to_another_is_read_to_its_end(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    write_tokens(path, [np.arange(1000)])
    corpus = opened(path)
    write_tokens(path, [[7]])
    assert corpus.read(0, 1000).tolist() == list(range(1000))


def test_a_file_that_is_written_to_is_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "a.bin"
    write_tokens(path, [np.arange(1000)])
    corpus = opened(path)
    corpus.read(0, 10)
    assert not caplog.messages
    flip(path)
    assert [corpus.read(0, 2).tolist() for _ in range(2)] == [[8, 1], [8, 1]]
    assert [message.partition("was")[2] for message in caplog.messages] == [
        " changed while the run reads it: tokens from here on are not those that were checked"
    ]
