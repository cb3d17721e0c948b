"""Prints tables on standard output: as wide as a terminal, and elsewhere as wide as their words."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table

PIPED_WIDTH = 240  # nothing wraps in a file


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], notes: Sequence[str] = ()) -> None:
    """Prints a table whose first column holds names, the others numbers and words; ``notes`` stand below."""
    console = Console(width=None if sys.stdout.isatty() else PIPED_WIDTH, highlight=False, markup=False)
    console.print(title)
    shown = Table(show_edge=False, pad_edge=False, show_header=any(columns))
    for number, column in enumerate(columns):
        shown.add_column(column, justify="right" if number else "left")
    for row in rows:
        shown.add_row(*row)
    console.print(shown)
    for note in notes:
        console.print(note)


def mebibytes(count: float) -> str:
    """Writes bytes in MiB, with as many digits as small numbers need."""
    return f"{count / 2**20:,.{0 if count >= 100 * 2**20 else 2}f}"
