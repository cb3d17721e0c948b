"""Writes the line that a person watches: step, loss, speed, time left."""

from __future__ import annotations

import statistics
import sys
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TextIO

from longctx.reporting.units import duration, number, quantity

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.live import Live

_REMEMBERED = 20  # steps whose median time predicts the rest
_LINES = 40  # lines per run, roughly, where each is kept
_LONGEST_SILENCE = 10  # steps
_NARROWEST_BAR, _WIDEST_BAR = 8, 40  # columns
_GAP = 2  # columns between two words


@dataclass(frozen=True)
class ProgressText:
    """Holds one step in words, and which share of all steps is done."""

    share: float
    step: str
    loss: str
    grad: str
    lr: str
    speed: str
    left: str
    validation: str = ""  # where the step was followed by one

    def line(self) -> str:
        """Writes step, loss, speed and time left as one line of a log."""
        words = (self.step, self.loss, self.validation, self.grad, self.lr)
        return "  ".join((*filter(None, words), f"{self.speed} tokens/s", f"ETA {self.left}"))

    def before_bar(self, width: int) -> list[str]:
        """Chooses what stands left of the bar in a terminal of ``width`` columns: the step, then the loss."""
        return _fitting([word for word in (self.step, self.loss, self.validation) if word], width)

    def after_bar(self, width: int) -> list[str]:
        """Chooses what stands right of the bar in ``width`` columns; the time left is dropped last."""
        for words, bar in (
            ([self.grad, f"{self.speed} tokens/s", f"{self.left} left"], 2 * _NARROWEST_BAR),
            ([f"{self.speed} tokens/s", f"{self.left} left"], _NARROWEST_BAR),
            ([f"{self.speed}/s", self.left], _NARROWEST_BAR),
            ([f"{self.speed}/s", self.left], 0),
            ([self.left], 0),
        ):
            if _columns(words) + bar + _GAP * (2 if bar else 1) <= width:
                return words
        return []


class Progress:
    """Shows how far a run is: on a terminal one line that is rewritten, elsewhere a line now and then."""

    def __init__(self, steps: int, stream: TextIO | None = None) -> None:
        self._steps = steps
        self._stream = stream or sys.stdout
        self._every = min(max(1, steps // _LINES), _LONGEST_SILENCE)
        self._seconds: deque[float] = deque(maxlen=_REMEMBERED)
        self._live = _live(self._stream) if self._stream.isatty() else None
        self._first = True

    def step(self, record: dict[str, Any]) -> None:
        """Shows a record, if its turn has come."""
        self._seconds.append(record["step_seconds"])
        step = record["step"]
        due = self._first or record["validation_loss"] is not None or step % self._every == 0 or step == self._steps
        self._first = False
        if self._live is not None:
            self._rewrite(self._live, self._progressed(record))
        elif due:
            self._stream.write(self._progressed(record).line() + "\n")
            self._stream.flush()

    def close(self, summary: dict[str, Any]) -> None:
        """Ends the line, so that what follows starts on a new one."""
        if self._live is not None and self._live.is_started:
            self._live.stop()
        self._stream.flush()

    def _progressed(self, record: dict[str, Any]) -> ProgressText:
        step, width = record["step"], len(str(self._steps))
        validated = record["validation_loss"]
        return ProgressText(
            share=step / self._steps,
            step=f"step {step:>{width}}/{self._steps}",
            loss=f"loss {number(record['loss'], '.4f')}",
            grad=f"grad {number(record['grad_norm'], '.3f')}",
            lr=f"lr {number(record['lr'], '.2e')}",
            speed=quantity(record["tokens_per_second"]),
            validation="" if validated is None else f"validation {validated:.4f}",
            left=duration((self._steps - step) * statistics.median(self._seconds)),
        )

    def _rewrite(self, live: Live, progressed: ProgressText) -> None:
        if not live.is_started:
            live.start()
            # A run that is killed must not leave a terminal without a cursor.
            live.console.show_cursor(True)
        width = live.console.width - 1  # some terminals wrap when the last column is written
        live.update(_drawn(progressed, width), refresh=True)


def _live(stream: TextIO) -> Live | None:
    """Opens a line that can be rewritten; None on a terminal that cannot move its cursor."""
    # Imported here: most runs write into a log.
    from rich.console import Console
    from rich.live import Live

    console = Console(file=stream, highlight=False)
    # It redraws when a step is done, not by a thread; what others print goes above the line.
    return None if console.is_dumb_terminal else Live(console=console, auto_refresh=False, redirect_stderr=False)


def _drawn(progressed: ProgressText, width: int) -> RenderableType:
    """Draws one line of at most ``width`` columns, with a bar wherever there is space for one."""
    from rich.progress_bar import ProgressBar
    from rich.table import Table

    before = progressed.before_bar(width)
    room = width - _columns(before)
    after = progressed.after_bar(room)
    bar = min(room - _columns(after) - _GAP * (2 if after else 1), _WIDEST_BAR)
    line = Table.grid(padding=(0, _GAP, 0, 0), pad_edge=False)
    cells: list[RenderableType] = [*before]
    if bar >= _NARROWEST_BAR:
        cells.append(ProgressBar(total=1.0, completed=progressed.share, width=bar))
    cells += after
    for _ in cells:
        line.add_column(no_wrap=True)
    line.add_row(*cells)
    return line


def _columns(words: list[str]) -> int:
    return sum(map(len, words)) + _GAP * max(len(words) - 1, 0)


def _fitting(words: list[str], width: int) -> list[str]:
    """Returns the first of ``words`` that fit beside one another."""
    while words and _columns(words) > width:
        words = words[:-1]
    return words
