"""Keeps what a command prints from ending it: standard streams that are closed, full, broken or in another encoding.

A run tells of itself on these streams, and its record is in its files. So a write that fails is dropped there, and
remembered: a command whose product is its standard output ends with 74 then.
"""

from __future__ import annotations

import io
import os
import select
import sys
from typing import TYPE_CHECKING, TextIO

from longctx.errors import StorageError

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

# Numbers of the standard streams; whatever a process opens next would get that of a closed one.
_INPUT, _OUTPUT, _ERROR = 0, 1, 2


class _Forgiving(io.RawIOBase):
    """Writes to a descriptor, and drops what it does not take."""

    def __init__(self, descriptor: int, failure: OSError | None = None) -> None:
        self._descriptor = descriptor
        self.failure = failure

    def writable(self) -> bool:
        """Says that this is written to."""
        return True

    def fileno(self) -> int:
        """Returns the descriptor, which child processes inherit."""
        return self._descriptor

    def isatty(self) -> bool:
        """Returns whether a person may be watching."""
        return os.isatty(self._descriptor)

    def write(self, data: ReadableBuffer, /) -> int:
        """Writes ``data`` whole, or remembers why it could not be."""
        rest = memoryview(data).cast("B")
        size = len(rest)
        while rest:
            try:
                rest = rest[os.write(self._descriptor, rest) :]
            except BlockingIOError:
                # A parent has made the pipe non-blocking, for itself and so for us: wait as a blocking write would.
                poll = select.poll()
                poll.register(self._descriptor, select.POLLOUT)
                poll.poll()
            except OSError as error:
                self.failure = self.failure or error
                break
        return size


def protect() -> None:
    """Makes the standard streams of this process such that no write to them raises; called before anything prints."""
    closed = _reopen_closed()
    sys.stdout = _wrapped(_OUTPUT, sys.stdout, closed)
    sys.stderr = _wrapped(_ERROR, sys.stderr, closed)
    if sys.stdin is None:
        sys.stdin = open(_INPUT, encoding="utf-8", closefd=False)  # noqa: SIM115 - lives as long as the process


def _reopen_closed() -> dict[int, OSError]:
    """Opens the null device for standard streams that are closed; returns which were, with the error of using them.

    Otherwise the next file or socket takes the number, and what some library prints ends up in it.
    """
    closed = {}
    for descriptor in (_INPUT, _OUTPUT, _ERROR):
        try:
            os.fstat(descriptor)
        except OSError as error:
            closed[descriptor] = error
            assert os.open(os.devnull, os.O_RDWR) == descriptor, "the lowest free number"
            os.set_inheritable(descriptor, True)
    return closed


def _wrapped(descriptor: int, stream: TextIO | None, closed: dict[int, OSError]) -> TextIO:
    raw = _Forgiving(descriptor, closed.get(descriptor))
    # On a terminal, and where the interpreter was told not to buffer, lines appear when they are printed.
    lines = raw.isatty() or descriptor == _ERROR or bool(getattr(stream, "line_buffering", False))
    return io.TextIOWrapper(
        io.BufferedWriter(raw),
        encoding=getattr(stream, "encoding", None) or "utf-8",
        errors="backslashreplace",  # a character that the encoding lacks is written as its escape
        line_buffering=lines,
        write_through=bool(getattr(stream, "write_through", False)),
    )


def require_written() -> None:
    """Refuses to end well where standard output has not been written whole. Raises ``StorageError``.

    For commands whose product it is; streams that ``protect`` has not made say so themselves.
    """
    sys.stdout.flush()
    raw = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    if isinstance(raw, _Forgiving) and raw.failure is not None:
        raise StorageError(f"standard output cannot be written: {raw.failure.strerror}")


def write_text(text: str) -> None:
    """Writes a product that must be exact to standard output. Raises ``StorageError`` for a lossy encoding."""
    encoding = sys.stdout.encoding or "utf-8"
    try:
        text.encode(encoding)
    except UnicodeEncodeError as error:
        lacking = text[error.start : error.end]
        raise StorageError(
            f"standard output is written in {encoding}, which has no {lacking!a}; set PYTHONIOENCODING=utf-8"
        ) from None
    sys.stdout.write(text)
