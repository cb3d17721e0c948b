"""Takes requests to stop, from the first line of a command on: SIGTERM, SIGUSR1, SIGINT (Ctrl-C), SIGHUP.

All of them ask for the same: save, and end with 75. Before the first step there is nothing to save, so the command
ends at once, with 75 as well. A second Ctrl-C ends at once without saving, with 130.

A thread takes the signals, for Python runs handlers in the main thread alone, and only between two of its
instructions: never while that thread waits for other ranks inside a collective.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from longctx.errors import LongctxError, RequeueError
from longctx.launcher.failures import INTERRUPTED

# Slurm's end of time, torchrun's and the user's, the keyboard's, a terminal's that was closed.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
# A launcher passes on what the terminal has sent to all its processes already: that is no second Ctrl-C.
SAME_SECONDS = 1.0
# How long a command may take to unwind by itself, before its process is ended from here.
UNWIND_SECONDS = 3.0
AGAIN = "Ctrl-C again ends at once without saving"
BEFORE_STEPS = "asked to stop before the first step: nothing is lost and nothing was saved; start it as before"

_STARTING, _WORKING, _OVER = "starting", "working", "over"
_current: Requests | None = None


class Requests:
    """Holds whether this process was asked to stop, and sees to it that it ends.

    ``tell``: tells the command that started this one, or the user, why the process ends. ``at_once``: is called
    before a second Ctrl-C ends the process, to end what it has started.
    """

    def __init__(self, tell: Callable[[LongctxError], Any]) -> None:
        self.at_once: Callable[[], None] = _nothing
        self._tell = tell
        self._doing: Callable[[], str] = str
        self._phase = _STARTING
        self._asked = threading.Event()
        self._unwound = threading.Event()
        self._first = 0.0

    def asked(self) -> bool:
        """Returns whether a request to stop has come."""
        return self._asked.is_set()

    @contextlib.contextmanager
    def working(self, doing: Callable[[], str] | None = None) -> Iterator[None]:
        """Leaves what follows a request to the caller, who asks; ``doing``: what it will do, told at the request."""
        self._doing, self._phase = doing or self._doing, _WORKING
        try:
            yield
        finally:
            self._phase = _OVER

    def end_with(self, error: LongctxError) -> None:
        """Ends the process with the error's code, from whichever thread, unless it soon unwinds by itself."""
        if self._unwound.wait(UNWIND_SECONDS):
            return
        self._leave(error)

    def take(self, number: int) -> None:
        """Takes one signal; the listening thread calls it."""
        now, phase = time.monotonic(), self._phase
        if not self._asked.is_set():
            self._first = now
            # Told first: whoever does it may be done, and the process gone, at once.
            if phase == _WORKING and (doing := self._doing()):
                _say(f"{doing}; {AGAIN}" if number == signal.SIGINT else doing)
            self._asked.set()
            if phase == _STARTING:
                threading.Thread(target=self._await_unwinding, name="unwinding", daemon=True).start()
        elif number == signal.SIGINT and now - self._first >= SAME_SECONDS:
            _within(UNWIND_SECONDS, self.at_once)
            _say("ended at once, without saving")
            os._exit(INTERRUPTED)

    def in_main_thread(self, _number: int, _frame: FrameType | None) -> None:
        """Unwinds a command that has not begun to work; the handler of all signals."""
        until = time.monotonic() + SAME_SECONDS
        while self._phase == _STARTING and not self._asked.is_set() and time.monotonic() < until:
            time.sleep(
                0.001
            )  # the listening thread acts upon the phase in which the request came; no lock in a handler
        if self._phase == _STARTING:
            self._phase = _OVER
            raise RequeueError(BEFORE_STEPS)

    def close(self) -> None:
        """Says that the command has come to its end by itself."""
        self._unwound.set()

    def _await_unwinding(self) -> None:
        """Ends the process where the main thread does not: it may wait for a rank that has ended already."""
        if not self._unwound.wait(UNWIND_SECONDS) and self._phase != _WORKING:
            self._leave(RequeueError(BEFORE_STEPS))

    def _leave(self, error: LongctxError) -> None:
        _within(UNWIND_SECONDS, lambda: self._tell(error))
        _within(UNWIND_SECONDS, sys.stdout.flush)
        os._exit(error.exit_code)


def answered_by_ranks() -> contextlib.AbstractContextManager[None]:
    """Leaves requests to the ranks that this process has started, while the block runs."""
    return contextlib.nullcontext() if _current is None else _current.working()


@contextlib.contextmanager
def listening(tell: Callable[[LongctxError], Any], for_good: bool = False) -> Iterator[Requests]:
    """Takes requests to stop while the block runs; inside of another such block that one goes on.

    ``for_good``: signals are taken until the process has ended, so that none kills it on its last way. Outside of the
    main thread, where no handler can be set, no request ever comes.
    """
    global _current
    if _current is not None:
        yield _current
        return
    requests = Requests(tell)
    if threading.current_thread() is not threading.main_thread():
        yield requests
        return
    with contextlib.ExitStack() as undo:
        _listen(requests, undo)
        _current = requests
        try:
            yield requests
        finally:
            requests.close()
            if for_good:
                undo.pop_all()
            else:
                _current = None


def _listen(requests: Requests, undo: contextlib.ExitStack) -> None:
    """Sets the handlers and starts the thread; ``undo`` will take both back."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)

    def listen() -> None:
        while numbers := os.read(reader, 1):
            if not numbers[0]:
                break
            if numbers[0] in STOP_SIGNALS:  # others may have handlers too
                requests.take(numbers[0])
        os.close(reader)

    thread = threading.Thread(target=listen, name="stop requests", daemon=True)
    thread.start()
    undo.callback(os.close, writer)
    undo.callback(thread.join)
    undo.callback(os.write, writer, b"\0")
    undo.callback(signal.set_wakeup_fd, signal.set_wakeup_fd(writer, warn_on_full_buffer=False))
    for number in STOP_SIGNALS:
        if not _stays_ignored(number):
            undo.callback(signal.signal, number, signal.signal(number, requests.in_main_thread))


def _stays_ignored(number: signal.Signals) -> bool:
    """Tells what was ignored for a purpose: SIGHUP under nohup; Ctrl-C that is meant for others of a shell's script.

    A script's background job ignores SIGINT too where no terminal is: there only somebody who means it sends one.
    """
    if signal.getsignal(number) != signal.SIG_IGN:
        return False
    return number == signal.SIGHUP or (number == signal.SIGINT and _hears_keyboard())


def _hears_keyboard() -> bool:
    try:
        terminal = os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY)
    except OSError:
        return False
    try:
        return os.tcgetpgrp(terminal) == os.getpgrp()
    except OSError:
        return False
    finally:
        os.close(terminal)


def _say(words: str) -> None:
    _within(UNWIND_SECONDS, lambda: print(f"longctx: {words}", file=sys.stderr, flush=True))


def _within(seconds: float, action: Callable[[], Any]) -> None:
    """Does something that a full pipe may hold up or a closed terminal refuse, and goes on after ``seconds``."""

    def tried() -> None:
        with contextlib.suppress(OSError, ValueError):
            action()

    thread = threading.Thread(target=tried, name="last words", daemon=True)
    thread.start()
    thread.join(seconds)


def _nothing() -> None:
    pass
