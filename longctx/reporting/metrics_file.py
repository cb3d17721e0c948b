"""Writes and reads ``metrics.jsonl``: the record of a run, one JSON object per step.

No step is lost to a disk that is full for a while: lines wait in memory and are written once it takes them. What a
resume does not keep goes into files beside it: lines that cannot be read, and steps that will be done again.
"""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Self

from longctx.errors import StorageError

_log = logging.getLogger(__name__)

KEYS = (
    "step",
    "loss",
    "grad_norm",
    "lr",
    "tokens",
    "tokens_per_second",
    "step_seconds",
    "flops",
    "mfu_causal",
    "mfu_full",
    "memory_peak_bytes",
    "comm_bytes",
    "comm_bytes_between_nodes",
    "balance",
    "work_by_rank",
    "bytes_by_rank",
    "bytes_between_nodes_by_rank",
    "straggler_tokens",
    "padding",
    "validation_loss",
    "validation_seconds",
)
ALWAYS_KNOWN = ("loss", "grad_norm")  # None in these means that the number was not finite
METRICS = "metrics.jsonl"
DAMAGED, REDONE = "metrics.damaged.jsonl", "metrics.redone.jsonl"
_LARGEST_LINE = 1 << 26  # three numbers of each rank take about 36 bytes: a million ranks fit
_MOST_WAITING = 1 << 26  # bytes of lines that wait for a disk with space
_ALARM_SECONDS = 60.0  # between two alarms


class JsonLines:
    """Writes ``metrics.jsonl``: one object per step, each step once, however often the run was resumed.

    Opening raises ``StorageError`` when the file cannot be written; later a disk that fails is only told of.
    """

    def __init__(self, path: Path, resume_step: int) -> None:
        self._path = path
        self._waiting: deque[bytes] = deque()
        self._lost = 0
        self._alarmed = -math.inf
        unfinished = path.with_name(f".{path.name}.new")
        try:
            unfinished.unlink(missing_ok=True)
            self._file = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(os.dup(self._file), "wb") as kept:
                _sort_lines(path, kept, resume_step)
            self._size = os.fstat(self._file).st_size
            os.fsync(self._file)
            unfinished.replace(path)
        except OSError as error:
            raise StorageError(f"cannot write {path}: {error.strerror or error}") from error

    def step(self, record: dict[str, Any]) -> None:
        """Appends a record as one line. JSON has no NaN: such a number is null, and ``nonfinite`` names it."""
        line = {key: _plain(record[key]) for key in KEYS}
        nonfinite = [k for k in KEYS if line[k] is None and (record[k] is not None or k in ALWAYS_KNOWN)]
        if nonfinite:
            line["nonfinite"] = nonfinite
        self._waiting.append(json.dumps(line, allow_nan=False).encode() + b"\n")
        self._write()

    def close(self, summary: dict[str, Any]) -> None:
        """Makes all lines durable on disk. Raises ``StorageError`` when steps of this process are missing from them."""
        failure = self._write()
        try:
            os.fsync(self._file)
        except OSError as error:
            failure = failure or error
        os.close(self._file)
        missing = self._lost + len(self._waiting)
        if missing or failure:
            why = f": {failure.strerror or failure}" if failure else ""
            raise StorageError(f"{missing} steps of this run could not be written into {self._path}{why}")

    def _write(self) -> OSError | None:
        """Writes the lines that wait, oldest first; returns why one could not be written."""
        try:
            waited = len(self._waiting)
            while self._waiting:
                line, written = self._waiting[0], 0
                # At the end of the last whole line: what a full disk took of this one is written over.
                while written < len(line):
                    written += os.pwrite(self._file, line[written:], self._size + written)
                self._size += len(line)
                self._waiting.popleft()
        except OSError as error:
            self._alarm(error)
            return error
        if self._alarmed > -math.inf:
            _log.warning("%s is written again, with %d steps that had waited", self._path, waited)
            self._alarmed = -math.inf
        return None

    def _alarm(self, error: OSError) -> None:
        """Tells of lines that cannot be written, now and then; the oldest give way where too many wait."""
        while len(self._waiting) > 1 and sum(map(len, self._waiting)) > _MOST_WAITING:
            self._waiting.popleft()
            self._lost += 1
        if time.monotonic() - self._alarmed < _ALARM_SECONDS:
            return
        self._alarmed = time.monotonic()
        _log.warning(
            "cannot write %s: %s; the run goes on, %d steps wait in memory until it can be written%s",
            self._path,
            error.strerror or error,
            len(self._waiting),
            f", {self._lost} are lost" if self._lost else "",
        )


@dataclass(frozen=True)
class MetricsLine:
    """Holds one line of the file: its number from 1, its bytes, and its record; None for one that cannot be read."""

    number: int
    text: bytes
    record: dict[str, Any] | None

    @property
    def whole(self) -> bool:
        """Tells whether the line has its end."""
        return self.text.endswith(b"\n")


def read_records(path: Path) -> Iterator[dict[str, Any]]:
    """Reads the records of a ``metrics.jsonl``, each step once and ascending; skips lines that cannot be read."""
    last = 0
    for line in _lines(path):
        if line.record is not None and line.record["step"] > last:
            last = line.record["step"]
            yield line.record


def _sort_lines(path: Path, kept: BinaryIO, resume_step: int) -> None:
    """Copies lines up to ``resume_step`` into ``kept`` and others into files beside it; tells what is damaged."""
    last, missing, damaged = 0, 0, []
    with _Beside(path) as beside:
        for line in _lines(path):
            step = 0 if line.record is None else line.record["step"]
            if step > resume_step:
                beside.write(REDONE, line.text)
            elif step > last:
                kept.write(line.text)
                missing += step - last - 1
                last = step
            elif line.whole:
                beside.write(DAMAGED, line.text)
                damaged.append(line.number)
            # Otherwise a kill tore the last line, and its step will be done again.
    missing += resume_step - last
    if damaged:
        where = f"{len(damaged)} lines cannot be read, the first is line {damaged[0]}"
        _log.warning("%s: %s; they are kept in %s", path, where, DAMAGED)
    if missing:
        _log.warning("%s lacks %d of the %d steps that are done", path, missing, resume_step)


class _Beside:
    """Appends lines to files beside ``path``, which are made when there is something for them."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._files: dict[str, BinaryIO] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files.values():
            file.close()

    def write(self, name: str, line: bytes) -> None:
        if name not in self._files:
            opened = os.open(self._path.with_name(name), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            self._files[name] = os.fdopen(opened, "wb")
        self._files[name].write(line)


def _lines(path: Path) -> Iterator[MetricsLine]:
    """Reads the lines of a file, none if there is no file; one that is longer than any of ours comes in parts."""
    if not path.exists():
        return
    with path.open("rb") as file:
        for number, text in enumerate(iter(lambda: file.readline(_LARGEST_LINE), b""), 1):
            record = _parsed(text)
            # A kill may leave the last line without its end alone.
            yield MetricsLine(number, text.removesuffix(b"\n") + b"\n" if record else text, record)


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if type(record) is dict and type(record.get("step")) is int else None


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
