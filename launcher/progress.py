"""Shows how far a command is that takes more than a few seconds: always on stderr, so that output stays whole.

On a terminal it is one line that ``rich`` redraws; elsewhere a plain line every few seconds, so that logs stay
readable. Ranks in processes of their own leave word in a file of the job's folder, and whoever started them shows it.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TextIO, TypeVar

if TYPE_CHECKING:  # it brings torch, which commands that only tell how far they are do not need
    from longctx.bench.timing import Report

Item = TypeVar("Item")
SILENCE = 5.0  # seconds between two plain lines; what ends sooner says nothing
PROGRESS_FILE = "progress.json"


@contextmanager
def progress(command: str, stream: TextIO | None = None) -> Iterator[Report]:
    """Yields a function that takes reports of ``command``, from whichever thread, and shows the last one."""
    stream = stream or sys.stderr
    with _on_terminal(command, stream) if stream.isatty() else _in_lines(command, stream) as report:
        yield report


@contextmanager
def _on_terminal(command: str, stream: TextIO) -> Iterator[Report]:
    # Imported here: most commands end before there is anything to show.
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("[bold]{task.fields[command]}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}", markup=False),
    )
    with Progress(*columns, console=Console(file=stream), transient=True) as shown:
        task = shown.add_task("starting", total=None, command=command)

        def report(done: int, total: int, what: str) -> None:
            shown.update(task, completed=done, total=total or None, description=what)

        yield report


@contextmanager
def _in_lines(command: str, stream: TextIO) -> Iterator[Report]:
    started, latest = time.monotonic(), (0, 0, "starting")
    ended = threading.Event()

    def report(done: int, total: int, what: str) -> None:
        nonlocal latest
        latest = (done, total, what)

    def tell() -> None:
        while not ended.wait(SILENCE):
            stream.write(line(command, *latest, time.monotonic() - started) + "\n")
            stream.flush()

    teller = threading.Thread(target=tell, name="progress", daemon=True)
    teller.start()
    try:
        yield report
    finally:
        ended.set()
        teller.join()


def line(command: str, done: int, total: int, what: str, seconds: float) -> str:
    """Writes a plain line, such as "longctx verify: 12 of 40, 0:35, ring on zigzag"; without a total no count."""
    counted = f"{done} of {total}, " if total else ""
    return f"{command}: {counted}{int(seconds) // 60}:{int(seconds) % 60:02}, {what}"


def to_file(folder: Path, rank: int) -> Report:
    """Returns a function that takes a rank's reports: it writes the first rank's to a file in the job's folder."""
    if rank:
        return lambda done, total, what: None
    file, unfinished = folder / PROGRESS_FILE, folder / f".{PROGRESS_FILE}.new"

    def report(done: int, total: int, what: str) -> None:
        unfinished.write_text(json.dumps([done, total, what]), encoding="utf-8")
        unfinished.replace(file)

    return report


def with_progress(items: Sequence[Item], report: Report, name: Callable[[Item], str] = str) -> Iterator[Item]:
    """Yields the items, and reports each by name when its turn comes."""
    for number, item in enumerate(items):
        report(number, len(items), name(item))
        yield item


def labelled(part: str, report: Report) -> Report:
    """Returns a report that names the part of the work it is about."""
    return lambda done, total, what: report(done, total, f"{part}: {what}")


def from_file(folder: Path, report: Report) -> Callable[[], None]:
    """Returns a function that passes on what ``to_file`` has written last, whenever it is called."""

    def look() -> None:
        try:
            done, total, what = json.loads((folder / PROGRESS_FILE).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return
        report(done, total, what)

    return look
