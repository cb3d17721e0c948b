"""Manages a run's directory: its name, its ``config.yaml``, and the rule that one directory holds one run."""

from __future__ import annotations

import datetime
import re
from collections.abc import Hashable
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from longctx.config import Config
from longctx.errors import ConfigError, StorageError

CONFIG_FILE = "config.yaml"
_LARGEST_CONFIG = 1 << 20
_STEP = re.compile(r"step-\d+")


def with_directory(config: Config, run_id: str | None = None) -> Config:
    """Returns ``config`` with ``run.dir`` chosen, if the user left it: by the launch's id, or by the clock."""
    if config.run.dir is not None:
        return config
    if run_id is not None:
        chosen = Path("runs") / f"job-{run_id}"
    else:
        stamp = datetime.datetime.now().strftime("%Y-%m-%d-%H%M%S")
        chosen = Path("runs") / stamp
        number = 2
        while chosen.exists():
            chosen = Path("runs") / f"{stamp}-{number}"
            number += 1
    return replace(config, run=replace(config.run, dir=str(chosen)))


def open_directory(config: Config, resume: bool) -> Path:
    """Creates ``run.dir`` and writes ``config.yaml`` into it; refuses to mix a new run into an old one."""
    directory = directory_of(config)
    refuse_occupied(config, resume)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        text = yaml.safe_dump(config.to_dict(), sort_keys=False, allow_unicode=True)
        unfinished = directory / f".{CONFIG_FILE}.new"
        unfinished.write_text(text, encoding="utf-8")
        unfinished.replace(directory / CONFIG_FILE)
    except OSError as error:
        raise StorageError(f"run.dir={directory} cannot be written: {error.strerror or error}") from None
    return directory


def refuse_occupied(config: Config, resume: bool) -> None:
    """Refuses a fresh run where checkpoints of another one lie."""
    directory = directory_of(config)
    if resume:
        return
    try:
        steps = [p.name for p in (directory / "checkpoints").iterdir() if _STEP.fullmatch(p.name)]
    except FileNotFoundError:
        return
    except OSError as error:
        raise StorageError(f"run.dir={directory} cannot be read: {error.strerror or error}") from None
    if steps:
        newest = max(steps, key=lambda name: int(name.removeprefix("step-")))
        raise ConfigError(
            f"run.dir={directory} already holds a run with checkpoint {newest}; "
            "go on with --resume, or choose another run.dir"
        )


def directory_of(config: Config) -> Path:
    """Returns ``run.dir`` as a path; it must have been chosen before."""
    assert config.run.dir is not None, "with_directory() comes first"
    return Path(config.run.dir)


def read_config(path: Path) -> Config:
    """Reads the configuration in a ``config.yaml`` as data: no tags, no aliases, no duplicate keys."""
    try:
        if path.stat().st_size > _LARGEST_CONFIG:
            raise ConfigError(f"{path} has {path.stat().st_size} bytes; a configuration has at most 1 MiB")
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise StorageError(f"{path} cannot be read: {error}") from None
    try:
        mapping = _DataLoader(text).get_single_data()
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"{path} is not plain YAML: {' '.join(str(error).split())}") from None
    return Config.from_run(mapping)


class _DataLoader(yaml.SafeLoader):
    """PyYAML's safe loader, which would let the last of two equal keys win and expand aliases without end."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.constructor.ConstructorError(None, None, "aliases are not allowed", self.peek_event().start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
        mapping: dict[Hashable, Any] = super().construct_mapping(node, deep=deep)
        if len(mapping) != len(node.value):
            raise yaml.constructor.ConstructorError(None, None, "a key stands twice", node.start_mark)
        return mapping
