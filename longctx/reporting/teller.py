"""Tells a person, line by line, what a run is about to do: on standard output, as the progress line is.

Nobody's reading may end a run: an output that is closed or full is passed over.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from typing import TextIO


class Teller:
    """Writes lines to ``stream`` (standard output), unless it is ``silent``."""

    def __init__(self, silent: bool = False, stream: TextIO | None = None) -> None:
        self._silent = silent
        self._stream = stream

    def say(self, text: str, end: str = "\n") -> None:
        """Writes a line at once."""
        stream = self._stream or sys.stdout
        if self._silent or stream is None:
            return
        with contextlib.suppress(OSError, ValueError):
            stream.write(text + end)
            stream.flush()

    @contextlib.contextmanager
    def stage(self, what: str) -> Iterator[None]:
        """Says what begins, and on the same line how long it took."""
        started = time.monotonic()
        self.say(f"{what} ...", end="")
        try:
            yield
        except BaseException:
            self.say("")  # what went wrong is told by whoever catches it
            raise
        self.say(f" ok in {time.monotonic() - started:.1f} s")

    @contextlib.contextmanager
    def after(self, what: str) -> Iterator[None]:
        """Says what has been done, and how long it took; work that shows its own progress leaves no line open."""
        started = time.monotonic()
        yield
        self.say(f"{what}: {time.monotonic() - started:.1f} s")
