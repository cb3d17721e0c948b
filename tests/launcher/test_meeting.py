"""Ranks at one store before they start: who differs is refused everywhere, who is missing is named, nothing hangs."""

import threading
import time

import pytest
import torch.distributed as dist

from longctx.errors import ConfigError, DataError, LongctxError, RankLostError
from longctx.launcher.ranks import alike, meeting
from longctx.launcher.ranks.meeting import Meeting, RelayedError, differences

RULE = "all are started alike"


@pytest.fixture
def ends(monkeypatch):
    """Runs ranks as threads at one store; returns by rank what each ended with."""
    monkeypatch.setattr(meeting, "LEAST_PATIENCE", 0.6)
    monkeypatch.setattr(meeting, "BEAT", 0.05)
    store = dist.HashStore()

    def run(*bodies, world=None):
        found = [None] * len(bodies)

        def rank(number, body):
            try:
                with Meeting(store, number, world or len(bodies), 0.1).attended() as met:
                    found[number] = body(met)
            except LongctxError as error:
                found[number] = error

        threads = [threading.Thread(target=rank, args=each) for each in enumerate(bodies)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
            assert not thread.is_alive()
        return found

    return run


def says(**record):
    def body(met):
        met.agree("settings", record, ConfigError, RULE)
        return "started"

    return body


def test_equal_ranks_start(ends):
    assert ends(says(lr=1), says(lr=1), says(lr=1)) == ["started"] * 3


def test_all_ranks_refuse_where_some_differ_and_the_first_names_them(ends):
    first, second, same, fourth = ends(says(lr=1, sp=2), says(lr=2, sp=2), says(lr=1, sp=2), says(lr=2, sp=2))
    assert str(first) == f"ranks 1, 3 differ: lr=2 where rank 0 has 1; {RULE}"
    assert str(second) == f"rank 1 differs from rank 0: lr=2 where rank 0 has 1; {RULE}"
    assert isinstance(same, RelayedError)
    assert str(same) == str(first)
    assert {error.exit_code for error in (first, second, same, fourth)} == {78}


def test_worlds_of_another_size_do_not_wait_for_one_another(ends):
    found = ends(says(WORLD_SIZE=3), says(WORLD_SIZE=2), world=3)
    assert "WORLD_SIZE=2 where rank 0 has 3" in str(found[0])


def test_a_rank_that_never_comes_is_named(ends):
    found = ends(says(lr=1), says(lr=1), world=3)
    assert str(found[0]).startswith("rank 2 has not come for 0.6 s")
    assert found[1].exit_code == RankLostError.exit_code


def test_work_may_take_longer_than_any_patience(ends):
    def works(met):
        time.sleep(1.5)
        return says(data=1)(met)

    assert ends(works, says(data=1)) == ["started"] * 2


@pytest.mark.parametrize("failing", [0, 1])
def test_the_error_of_one_rank_ends_the_others_with_its_code(ends, failing):
    def fails(met):
        raise DataError("corpus.bin: damaged")

    bodies = [says(data=1), says(data=1), says(data=1)]
    bodies[failing] = fails
    found = ends(*bodies)
    assert {error.exit_code for error in found} == {65}
    assert all("corpus.bin: damaged" in str(error) for error in found)


def test_two_processes_of_one_rank_are_refused():
    store = dist.HashStore()
    with Meeting(store, 0, 2, 1).attended() as met:
        met.leave()
        with pytest.raises(ConfigError, match="two processes say that they are rank 0 of 2"):
            Meeting(store, 0, 2, 1).attended().__enter__()


def test_words_of_a_stranger_are_no_commands_to_a_terminal(ends):
    def garbage(met):
        met._set("settings/0", "no json")

    assert "\x1b" not in str(meeting._relayed({"code": 1, "message": "\x1b[2J"}))
    assert meeting._relayed({"code": 1}).exit_code == 70
    found = ends(garbage, says(lr=1))
    assert "not its ranks' own" in str(found[1])


def test_differences_are_counted_where_there_are_many():
    own = {f"key{number:02}": number for number in range(20)}
    assert differences(own, own) == ""
    assert differences(own, {}).endswith("and 12 more")
    assert differences({"lr": 1}, {"lr": 1.0}) == ""


def test_code_is_told_apart_by_its_content(tmp_path):
    package = tmp_path / "package"
    (package / "__pycache__").mkdir(parents=True)
    (package / "__pycache__" / "a.py").write_text("stale")
    (package / "a.py").write_text("a = 1")
    (package / "notes.txt").write_text("no code")
    (tmp_path / "outer").mkdir()
    (tmp_path / "outer" / "b.py").write_text("b = 1")
    (package / "linked").symlink_to(tmp_path / "outer")
    assert set(alike.code_digests(package)) == {"a.py", "linked/b.py"}
    began = time.perf_counter()
    alike.code_digests.__wrapped__()
    assert time.perf_counter() - began < 1  # 0.02 s on a quiet machine
