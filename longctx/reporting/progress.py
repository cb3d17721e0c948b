"""The line that a person watches: step, loss, speed, time left."""

from __future__ import annotations

import statistics
import sys
from collections import deque
from typing import Any, TextIO

_REMEMBERED = 20  # steps whose median time predicts the rest
_LINES = 40  # lines per run, roughly, where each is kept
_LONGEST_SILENCE = 10  # steps


class Progress:
    """On a terminal one line, rewritten in place; elsewhere a line now and then, so that logs stay readable."""

    def __init__(self, steps: int, stream: TextIO | None = None) -> None:
        self._steps = steps
        self._stream = stream or sys.stdout
        self._terminal = self._stream.isatty()
        self._every = min(max(1, steps // _LINES), _LONGEST_SILENCE)
        self._seconds: deque[float] = deque(maxlen=_REMEMBERED)
        self._first = True

    def step(self, record: dict[str, Any]) -> None:
        """Shows a record, if its turn has come."""
        self._seconds.append(record["step_seconds"])
        step = record["step"]
        due = self._first or step % self._every == 0 or step == self._steps
        self._first = False
        if self._terminal:
            self._stream.write("\r\x1b[K" + self._line(record))
            self._stream.flush()
        elif due:
            self._stream.write(self._line(record) + "\n")
            self._stream.flush()

    def close(self, summary: dict[str, Any]) -> None:
        """Ends the line."""
        if self._terminal and not self._first:
            self._stream.write("\n")
        self._stream.flush()

    def _line(self, record: dict[str, Any]) -> str:
        left = (self._steps - record["step"]) * statistics.median(self._seconds)
        width = len(str(self._steps))
        return "  ".join(
            (
                f"step {record['step']:>{width}}/{self._steps}",
                f"loss {number(record['loss'], '.4f')}",
                f"grad {number(record['grad_norm'], '.3f')}",
                f"lr {number(record['lr'], '.2e')}",
                f"{quantity(record['tokens_per_second'])} tokens/s",
                f"ETA {duration(left)}",
            )
        )


def number(value: float | None, form: str) -> str:
    """A number as ``form`` writes it; None stands for one that is not finite."""
    return "nan" if value is None else format(value, form)


def quantity(value: float) -> str:
    """Three digits and a unit: 950, 18.2k, 3.41M."""
    unit, *larger = ("", "k", "M", "G", "T")
    while abs(value) >= 999.5 and larger:
        unit, *larger = larger
        value /= 1000
    digits = 0 if not unit or abs(value) >= 99.95 else 1 if abs(value) >= 9.995 else 2
    return f"{value:.{digits}f}{unit}"


def duration(seconds: float) -> str:
    """Hours, minutes and seconds; hours only where there are any."""
    whole = round(seconds)
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours}:{minutes:02d}:{whole % 60:02d}" if hours else f"{minutes}:{whole % 60:02d}"
