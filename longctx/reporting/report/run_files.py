"""Reads what a run has left in its directory, as far as it can be: a report is made of whatever is there."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from longctx.checkpoint.directory import CheckpointDirectory
from longctx.config.renamed import translated
from longctx.reporting.memory import MEMORY
from longctx.reporting.metrics_file import METRICS, read_records
from longctx.rules import redacted

UNKNOWN = "unknown"
_LARGEST_FILE = 1 << 20  # of config.yaml, environment.json and memory.json


@dataclass(frozen=True)
class RunFiles:
    """Holds the files of one run. What is missing or damaged is empty; URLs in them hold no passwords.

    ``records``: the lines of ``metrics.jsonl``, ascending by step. ``config``: the sections of ``config.yaml``
    in today's names, ``config_text`` as it was written. ``memory``: the text of ``memory.json``. ``checkpoints``:
    committed steps.
    """

    directory: Path
    records: list[dict[str, Any]]
    config: dict[str, Any]
    config_text: str
    environment: dict[str, Any]
    memory: str
    checkpoints: list[int]

    @classmethod
    def read(cls, directory: Path) -> RunFiles:
        """Reads all files of a run."""
        text = redacted(_text(directory / "config.yaml"))
        return cls(
            directory,
            list(read_records(directory / METRICS)),
            _sections(lambda text: translated(yaml.safe_load(text)), text),
            text,
            _sections(json.loads, redacted(_text(directory / "environment.json"))),
            _text(directory / MEMORY),
            CheckpointDirectory(directory / "checkpoints").steps(),
        )

    @property
    def name(self) -> str:
        """Names the run: ``run.name``, or its directory's name."""
        return str(self.setting("run", "name") or self.directory.resolve().name)

    def setting(self, section: str, key: str) -> Any:
        """Looks up a value of ``config.yaml``; None where it has none."""
        inside = self.config.get(section)
        return inside.get(key) if type(inside) is dict else None

    def column(self, key: str) -> list[float | None]:
        """Lists a metric's number per step; None where it is unknown or was not finite."""
        return [plain_number(record.get(key)) for record in self.records]

    def known(self, key: str) -> list[float]:
        """Lists a metric's numbers that are known, by step."""
        return [value for value in self.column(key) if value is not None]

    def median(self, key: str, form: Callable[[float], str]) -> str:
        """Writes the median of a metric over all steps in words."""
        values = self.known(key)
        return form(statistics.median(values)) if values else UNKNOWN


_LARGEST = 1e150  # an axis is some times as long; not reached by infinity, nor by what is not a number


def plain_number(value: Any) -> float | None:
    """Returns the value if it is a number that a chart can show, None otherwise."""
    return value if type(value) in (int, float) and abs(value) < _LARGEST else None


def numbers_below(values: Sequence[Any], limit: int) -> bool:
    """Tells whether all values are numbers from 0 up to ``limit``."""
    return all(type(value) in (int, float) and 0 <= value < limit for value in values)


def _sections(parse: Callable[[str], Any], text: str) -> dict[str, Any]:
    try:
        found = parse(text) if text else {}
    except (ValueError, TypeError, AttributeError, RecursionError, yaml.YAMLError):
        return {}
    return found if type(found) is dict else {}


def _text(path: Path) -> str:
    """Reads a small text file of the run, empty where there is none."""
    if not path.is_file() or path.stat().st_size > _LARGEST_FILE:
        return ""
    return path.read_text(encoding="utf-8", errors="replace")
