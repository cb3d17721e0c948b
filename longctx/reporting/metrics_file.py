"""Writes and reads ``metrics.jsonl``: the record of a run, one JSON object per step."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from longctx.errors import StorageError

KEYS = (
    "step",
    "loss",
    "grad_norm",
    "lr",
    "tokens",
    "tokens_per_second",
    "step_seconds",
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
_LARGEST_LINE = 1 << 16


class JsonLines:
    """Writes ``metrics.jsonl``: one object per step, each step once, however often the run was resumed."""

    def __init__(self, path: Path, resume_step: int) -> None:
        self._path = path
        with _storage(path):
            kept = [json.dumps(r) for r in read_records(path) if r["step"] <= resume_step]
            unfinished = path.with_name(f".{path.name}.new")
            unfinished.unlink(missing_ok=True)
            self._file = os.fdopen(
                os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8"
            )
            self._file.writelines(line + "\n" for line in kept)
            self._file.flush()
            os.fsync(self._file.fileno())
            unfinished.replace(path)

    def step(self, record: dict[str, Any]) -> None:
        """Appends a record as one line. JSON has no NaN: such a number is null, and ``nonfinite`` names it."""
        line = {key: _plain(record[key]) for key in KEYS}
        nonfinite = [k for k in KEYS if line[k] is None and (record[k] is not None or k in ALWAYS_KNOWN)]
        if nonfinite:
            line["nonfinite"] = nonfinite
        with _storage(self._path):
            self._file.write(json.dumps(line, allow_nan=False) + "\n")
            self._file.flush()

    def close(self, summary: dict[str, Any]) -> None:
        """Makes all lines durable on disk."""
        with _storage(self._path), self._file:
            self._file.flush()
            os.fsync(self._file.fileno())


def read_records(path: Path) -> Iterator[dict[str, Any]]:
    """Reads the records of a ``metrics.jsonl``, each step once and ascending; skips a line that a crash tore."""
    if not path.exists():
        return
    last = 0
    with path.open("rb") as lines:
        while line := lines.readline(_LARGEST_LINE):
            record = _parsed(line)
            if record is not None and record["step"] > last:
                last = record["step"]
                yield record


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not line.endswith(b"\n") or type(record) is not dict or type(record.get("step")) is not int:
        return None
    return record


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextlib.contextmanager
def _storage(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror or error}") from error
