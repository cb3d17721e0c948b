"""Asks Hydra for the configuration: overrides in, a checked ``Config`` out. Nothing behind it knows Hydra."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from longctx.config import Config
from longctx.errors import ConfigError, UsageError
from longctx.launcher.hydra.groups import CONF, NAMED, groups
from longctx.launcher.hydra.overrides import SEARCH_PATH, Reading, first_lines, quoted, read
from longctx.launcher.model_directory import with_directory_model

_ON_BASE = "on-base"  # conf/train.yaml without an option of any group
_FILE = "file-of-ones-own"  # the option under which Hydra knows it


def compose(overrides: Sequence[str]) -> Config:
    """Returns the configuration that ``conf/train.yaml`` and ``overrides`` state."""
    return Config.from_dict(compose_mapping(overrides))


def compose_mapping(overrides: Sequence[str], base: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Returns the plain nested mapping behind ``compose``, not yet checked against the schema.

    ``base``: whole sections that stand in place of the schema's defaults and of the options that conf/train.yaml has.
    """
    reading = read(overrides)
    # Hydra costs a third of a second to import; commands that compose nothing start without it.
    import hydra
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    GlobalHydra.instance().clear()
    _register(reading, Config().to_dict() if base is None else dict(base))
    try:
        with hydra.initialize_config_dir(config_dir=str(CONF.resolve()), version_base="1.3"):
            composed = hydra.compose("train" if base is None else _ON_BASE, overrides=_words(reading))
        mapping = OmegaConf.to_container(composed, resolve=False)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(first_lines(error)) from None
    except (yaml.YAMLError, OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"a file of --config-dir cannot be read: {' '.join(str(error).split())}") from None
    assert isinstance(mapping, dict)
    _refuse_unread(mapping)
    if base is None:  # a run that goes on has in its config.yaml what the directory said
        mapping["model"] = with_directory_model(mapping["model"], _set_keys(mapping, overrides))
    return {str(key): value for key, value in mapping.items() if key != "recipe"}


def _words(reading: Reading) -> list[str]:
    """Returns what Hydra is asked for."""
    words = list(reading.words)
    if reading.folders:
        words.append(f"{SEARCH_PATH}=[{','.join(quoted(f'file://{folder}') for folder in reading.folders)}]")
    if reading.recipe is not None:
        words.append(f"recipe={_FILE}")
    return words


def _refuse_unread(mapping: Mapping[Any, Any]) -> None:
    """Refuses what a file of one's own says that would not be read, or would read something else."""
    if isinstance(mapping.get("recipe"), dict):
        raise ConfigError(
            "a recipe begins with the line `# @package _global_`; without it nothing that it sets would count"
        )
    for key, value in _leaves(mapping):
        if isinstance(value, str) and "${" in value:
            raise ConfigError(f"{key}={value!r} holds an interpolation; values are data: write the value itself")


def _set_keys(mapping: Mapping[Any, Any], overrides: Sequence[str]) -> set[str]:
    """Lists the keys that the user set, on the command line or in a file, be it to the default."""
    defaults = dict(_leaves(Config().to_dict()))
    changed = {key for key, value in _leaves(mapping) if value != defaults.get(key)}
    return changed | {word.partition("=")[0].lstrip("+") for word in overrides}


def _leaves(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _leaves(inner, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, value


def _register(reading: Reading, schema: dict[str, Any]) -> None:
    """Registers at Hydra sections with their values, an option for each name that has no file, and one's own file."""
    from hydra.core.config_store import ConfigStore

    store = ConfigStore.instance()
    store.store(name="schema", node=schema)
    chosen = [{group: None} for group in groups() if group != "recipe"]
    store.store(name=_ON_BASE, node={"defaults": ["schema", *chosen, "_self_", {"recipe": None}]})
    for group, (field, registries) in NAMED.items():
        for name in itertools.chain(*registries):
            if (CONF / group / f"{name}.yaml").exists():
                continue
            store.store(group=group, name=name, node={field: name})
    if reading.recipe is not None:
        store.store(group="recipe", name=_FILE, node=_recipe(reading.recipe), package="_global_")


def _recipe(path: Path) -> dict[str, Any]:
    """Reads a recipe as plain data: a mapping of sections, with Hydra's ``defaults`` if it has them."""
    try:
        mapping = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"recipe={path} cannot be read: {error.strerror or error}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"recipe={path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(mapping, dict) or not mapping:
        raise ConfigError(f"recipe={path} must hold sections, such as data: {{seq_len: 4096}}")
    return mapping


def refuse_overrides(words: Sequence[str], fixed: Sequence[str]) -> None:
    """Refuses an override of one of ``fixed``: a command that sets these keys itself would ignore it."""
    for word in words:
        key = word.split("=")[0].lstrip("+~")
        if key in fixed:
            raise UsageError(f"{word}: this command sets {key} itself; leave it out")
