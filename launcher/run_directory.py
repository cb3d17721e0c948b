"""Manages a run's directory: its name, its ``config.yaml``, and the rule that one directory holds one run.

What an earlier run or an earlier attempt has left there is never overwritten: it gets another name.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import secrets
from collections.abc import Callable, Hashable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from longctx.config import Config
from longctx.errors import ConfigError, StorageError
from longctx.launcher.rundir.lock import LAUNCHER, WRITER, writing
from longctx.launcher.rundir.records import (
    CONFIG_FILE,
    RECORDS,
    committed_steps,
    holds,
    keep_attempt,
    keep_before,
    set_later_aside,
)

_LARGEST_CONFIG = 1 << 20

Lock = Callable[[Path], AbstractContextManager[None]]


def with_directory(config: Config, run_id: str) -> Config:
    """Returns ``config`` with ``run.dir`` chosen, if the user left it: by an id on which all processes agree."""
    return config if config.run.dir is not None else in_directory(config, Path("runs") / f"job-{run_id}")


def directory_by_the_clock() -> Path:
    """Names a directory by the clock, and by chance where another run of this second has that name."""
    named = Path("runs") / datetime.datetime.now().strftime("%Y-%m-%d-%H%M%S")
    return named.with_name(f"{named.name}-{secrets.token_hex(2)}") if os.path.lexists(named) else named


@contextlib.contextmanager
def claimed(config: Config, lock: Lock = writing) -> Iterator[Config]:
    """Makes ``run.dir`` if need be, and lets no other process into it; yields ``config`` with the directory's name.

    Where the user left the name it is chosen by making the directory, which of several machines one can. A directory
    that was made here and got nothing into it is removed. Raises ``StorageError`` while another process is at work.

    Until the end this process, and those that it starts, make files that only their user can read.
    """
    config, made = _made(config)
    directory = directory_of(config)
    with _private(), lock(directory):
        try:
            yield config
        except BaseException:
            if made:
                _remove_unused(directory)
            raise


@contextlib.contextmanager
def _private() -> Iterator[None]:
    before = os.umask(0o077)
    try:
        yield
    finally:
        os.umask(before)


def open_directory(config: Config, step: int | None, rewound: bool = False) -> Path:
    """Writes ``config.yaml`` into ``run.dir``, and keeps what lies there of an earlier attempt under other names.

    ``step``: that of the checkpoint from which the run goes on; None for a start. ``rewound``: the user chose it, and
    later ones are set aside.
    """
    directory = directory_of(config)
    text = yaml.safe_dump(config.to_dict(), sort_keys=False, allow_unicode=True)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if step is None:
            keep_attempt(directory)
        else:
            if rewound:
                set_later_aside(directory, step)
            keep_before(directory, step, text)
        unfinished = directory / f".{CONFIG_FILE}.new"
        unfinished.write_text(text, encoding="utf-8")
        unfinished.replace(directory / CONFIG_FILE)
    except OSError as error:
        raise StorageError(f"run.dir={directory} cannot be written: {error.strerror or error}") from None
    return directory


def refuse_occupied(config: Config) -> None:
    """Refuses to start a run where anything lies of an earlier one."""
    directory = directory_of(config)
    steps = committed_steps(directory)
    left = [f"checkpoint step-{steps[-1]}"] if steps else []
    left += [name for name in RECORDS if holds(directory / name)]
    if left:
        raise ConfigError(
            f"run.dir={directory} already holds a run ({', '.join(left)}); go on from its newest checkpoint with "
            "--resume, start over beside what it left if it has none with --auto-resume, or choose another run.dir"
        )


def directory_of(config: Config) -> Path:
    """Returns ``run.dir`` as a path; it must have been chosen before."""
    assert config.run.dir is not None, "claimed() or with_directory() comes first"
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
    try:
        return Config.from_run(mapping)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def in_directory(config: Config, directory: Path) -> Config:
    """Returns ``config`` with another ``run.dir``."""
    return replace(config, run=replace(config.run, dir=str(directory)))


def _made(config: Config) -> tuple[Config, bool]:
    """Returns the configuration with its directory's name, and whether the directory was made here."""
    named = config.run.dir is not None
    while True:
        directory = directory_of(config) if named else directory_by_the_clock()
        try:
            directory.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileExistsError):
                directory.mkdir(mode=0o700)
                return in_directory(config, directory), True
        except OSError as error:
            raise StorageError(f"run.dir={directory} cannot be written: {error.strerror or error}") from None
        if named and not directory.is_dir():
            raise StorageError(f"run.dir={directory} is no directory; name another run.dir")
        if named:
            return config, False


def _remove_unused(directory: Path) -> None:
    """Removes a directory in which there is nothing but locks."""
    locks = {LAUNCHER, WRITER}
    with contextlib.suppress(OSError):
        if {path.name for path in directory.iterdir()} <= locks:
            for name in locks:
                (directory / name).unlink(missing_ok=True)
            directory.rmdir()


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
