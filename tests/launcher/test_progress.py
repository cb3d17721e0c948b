"""Progress: a line now and then in a log, one line on a terminal, nothing of what ends soon."""

import io
import threading

from longctx.launcher import progress as shown
from longctx.launcher.progress import from_file, labelled, line, progress, to_file, with_progress


class Stream(io.StringIO):
    """Says when it has been written to."""

    def __init__(self, terminal=False):
        super().__init__()
        self.terminal, self.written = terminal, threading.Event()

    def isatty(self):
        return self.terminal

    def write(self, text):
        self.written.set()
        return super().write(text)


def test_what_ends_soon_says_nothing():
    stream = Stream()
    with progress("longctx verify", stream) as report:
        report(1, 2, "ring")
    assert stream.getvalue() == ""


def test_plain_lines_tell_the_latest_even_while_nothing_is_reported(monkeypatch):
    monkeypatch.setattr(shown, "SILENCE", 0.01)
    stream = Stream()
    with progress("longctx verify", stream) as report:
        report(3, 40, "ring on zigzag")
        for _ in range(2):
            stream.written.clear()
            assert stream.written.wait(60)
    lines = stream.getvalue().splitlines()
    assert len(lines) >= 2 and "longctx verify: 3 of 40, 0:00, ring on zigzag" in lines
    assert "\x1b" not in stream.getvalue() and "\r" not in stream.getvalue()


def test_a_terminal_has_one_line_that_is_gone_at_the_end():
    stream = Stream(terminal=True)
    with progress("longctx verify", stream) as report:
        report(3, 40, "ring [on] zigzag")
    assert "3/40" in stream.getvalue() and "ring [on] zigzag" in stream.getvalue()
    assert stream.getvalue().endswith("\x1b[2K")


def test_a_line_without_a_total_has_no_count():
    assert line("longctx bench step", 0, 0, "starting", 75.2) == "longctx bench step: 1:15, starting"
    assert line("longctx bench step", 2, 8, "timing", 605) == "longctx bench step: 2 of 8, 10:05, timing"


def test_ranks_leave_word_in_a_file(tmp_path):
    told = []
    look = from_file(tmp_path, lambda *words: told.append(words))
    look()
    to_file(tmp_path, 1)(9, 9, "of another rank")
    look()
    assert told == []
    report = labelled("8 tokens", to_file(tmp_path, 0))
    report(1, 2, "ring")
    look()
    report(2, 2, "gather")
    look()
    assert told == [(1, 2, "8 tokens: ring"), (2, 2, "8 tokens: gather")]


def test_items_are_reported_before_their_turn():
    told = []
    assert list(with_progress(["a", "b"], lambda *words: told.append(words), str.upper)) == ["a", "b"]
    assert told == [(0, 2, "A"), (1, 2, "B")]
