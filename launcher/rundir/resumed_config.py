"""Composes the configuration of a run that goes on: its own ``config.yaml`` is the base, overrides apply on top.

A group option that the run already has changes nothing: ``model=llama_1b`` again does not take back what the run was
started with beside it. Another option sets what its file says, and what only the earlier one read is forgotten.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from longctx.catalog import SOURCES, STRATEGIES
from longctx.checkpoint.directory import source_of
from longctx.config import Config, DataConfig, OptimConfig
from longctx.errors import ConfigError, StorageError, UsageError
from longctx.launcher.compose import compose_mapping
from longctx.launcher.hydra.groups import NAMED
from longctx.launcher.resuming import Resume
from longctx.launcher.run_directory import read_config
from longctx.launcher.rundir.records import CONFIG_FILE, committed_steps
from longctx.options import OPTIONS

Mapping = dict[str, dict[str, Any]]

# Which field holds the name of a group's option, so that the run says which one it has.
_NAMES = {**{group: name for group, (name, _) in NAMED.items()}, "model": "name", "comm": "backend", "cluster": "name"}
# Of these another option keeps the fields that it says nothing of; options of other groups state the whole section.
_KEPT = tuple(NAMED)


def configuration(overrides: Sequence[str], resume: Resume | None) -> Config:
    """Returns what a command's overrides state: of a new run, or of one that goes on. Raises errors of ours."""
    stated = compose_mapping(overrides)
    if resume is None:
        return _with_source(Config.from_dict(stated))
    if stated["run"]["dir"] is None:
        option = resume.words[0]
        example = " (or --resume=runs/mine)" if resume.required else ""
        raise UsageError(f"{option} needs the run that it is to go on with; set run.dir=runs/mine{example}")
    directory = Path(stated["run"]["dir"])
    if not resume.required and not committed_steps(directory):
        return _with_source(Config.from_dict(stated))
    return _on_top(_base(directory), overrides, directory)


def _with_source(config: Config) -> Config:
    """Returns the configuration with the checkpoint itself that a new run starts from; newer ones may come."""
    if config.init.from_ is None:
        return config
    return replace(config, init=replace(config.init, from_=str(source_of(config.init.from_))))


def _base(directory: Path) -> Config:
    """Reads what the run was last trained with."""
    path = directory / CONFIG_FILE
    if not directory.is_dir():
        raise StorageError(f"--resume: run.dir={directory} is no directory; name the run.dir that has a checkpoint")
    if not path.exists() and committed_steps(directory):
        raise StorageError(
            f"--resume: {path} is missing, which says what the run is trained with; put it back ('config' in a "
            "checkpoint's state.json has its sections), or start a new run with its weights"
        )
    if not path.exists():
        raise StorageError(
            f"--resume: {directory} holds no committed checkpoint; start without --resume, or with --auto-resume, "
            "or name the run.dir that has one"
        )
    return read_config(path)


def _on_top(run: Config, overrides: Sequence[str], directory: Path) -> Config:
    before, defaults = run.to_dict(), Config().to_dict()
    base, words = run.to_dict(), []
    for word in overrides:
        group, _, option = word.lstrip("+").partition("=")
        name = _NAMES.get(group)
        if name is not None and before[group][name] == option:
            continue  # the run has it
        words.append(word)
        if group in _KEPT and name is not None:
            base[group][name] = defaults[group][name]
        elif group in base:
            base[group] = defaults[group]
    after: Mapping = compose_mapping(words, base)
    explicit = {word.lstrip("+").partition("=")[0] for word in words}
    _forget(before, after, explicit)
    if "parallel.dp_shard" not in explicit and "parallel" not in explicit and after["comm"]["backend"] != "sim":
        after["parallel"]["dp_shard"] = -1  # what the other degrees leave of the processes that there are now
    data = after["data"]
    for section, key in ((data, "data.path"), (data["validation"], "data.validation.path"), (data, "data.tokenizer")):
        name = key.rpartition(".")[2]
        if key not in explicit and "data" not in explicit:
            section[name] = _found_again(section[name], directory)
    config = Config.from_dict(after)
    _require_begun_from(run, config)
    return replace(config, init=run.init)


def _require_begun_from(run: Config, config: Config) -> None:
    """Refuses to start from other weights in a run that goes on: they would not be read."""
    told, begun = config.init.from_, run.init.from_
    # The command that started the run may have named the other run, of which it took the newest step.
    if told != begun and (told is None or begun is None or Path(told) != Path(begun).parent.parent):
        raise ConfigError(
            f"init.from={told} is for a new run, and this one began with {begun or 'weights of its own'}; leave it out"
        )


def _forget(before: Mapping, after: Mapping, explicit: set[str]) -> None:
    """Sets to their defaults the options that another strategy, source or schedule than before does not read.

    Left as they were, they would be refused, or mean something else. What the command sets stays, for the rules.
    """
    for section, key, unread in (
        ("attention", "strategy", _unread_options(after["attention"]["strategy"])),
        ("data", "source", _unread(DataConfig, SOURCES, after["data"]["source"])),
        ("optim", "schedule", _for_some(OptimConfig)),  # each schedule counts its decay in its own way
        ("comm", "backend", {"shuffle_seed"}),
    ):
        if before[section][key] == after[section][key]:
            continue
        defaults = Config().to_dict()[section]
        for name in unread:
            if f"{section}.{name}" not in explicit and after[section][name] == before[section][name]:
                after[section][name] = defaults[name]


def _unread_options(strategy: str) -> set[str]:
    return set(OPTIONS) - set(STRATEGIES.load(strategy).options if strategy in STRATEGIES else ())


def _for_some(section: type) -> set[str]:
    return {one.name for one in fields(section) if one.metadata.get("for_some")}


def _unread(section: type, registry: Any, chosen: str) -> set[str]:
    return _for_some(section) - set(registry.load(chosen).reads if chosen in registry else ())


def _found_again(path: str | None, directory: Path) -> str | None:
    """Returns where data lie that the run named from the folder that it was started in, which may be another one."""
    if path is None or Path(path).is_absolute() or Path(path).exists():
        return path
    try:
        started_in = json.loads((directory / "environment.json").read_text(encoding="utf-8"))["working_directory"]
        there = Path(started_in) / path
        return str(there) if there.exists() else path
    except (OSError, ValueError, TypeError, KeyError):
        return path
