"""Asks Hydra for the configuration: overrides in, a checked ``Config`` out. Nothing behind it knows Hydra.

Values are data: an interpolation such as ``${oc.env:HOME}`` is refused wherever it stands, so no override can
read the environment or run code. Words that Hydra would refuse in its own terms are refused here first, with
the nearest valid choice.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import longctx
from longctx.catalog import ENGINES, LINEAR_STRATEGIES, OPTIMIZERS, SOURCES, STRATEGIES, Registry
from longctx.config import Config
from longctx.config.parsing import dotted_paths, holds_any_key, unknown_key
from longctx.config.renamed import refuse_old_key
from longctx.errors import ConfigError, UsageError
from longctx.rules import suggestion

CONF = Path(longctx.__file__).parent / "conf"


def compose(overrides: Sequence[str]) -> Config:
    """Returns the configuration that ``conf/train.yaml`` and ``overrides`` state."""
    return Config.from_dict(compose_mapping(overrides))


def compose_mapping(overrides: Sequence[str]) -> dict[str, Any]:
    """Returns the plain nested mapping behind ``compose``, not yet checked against the schema."""
    for override in overrides:
        _check_override(override)
    # Hydra costs a third of a second to import; commands that compose nothing start without it.
    import hydra
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    GlobalHydra.instance().clear()
    _register()
    try:
        with hydra.initialize_config_dir(config_dir=str(CONF.resolve()), version_base="1.3"):
            composed = hydra.compose("train", overrides=[_for_hydra(override) for override in overrides])
        mapping = OmegaConf.to_container(composed, resolve=False)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_first_lines(error)) from None
    assert isinstance(mapping, dict)
    return {str(key): value for key, value in mapping.items() if key != "recipe"}


# Groups whose options are names of the catalog -> the field that holds the name.
NAMED: dict[str, tuple[str, tuple[Registry, ...]]] = {
    "attention": ("strategy", (STRATEGIES, LINEAR_STRATEGIES)),
    "data": ("source", (SOURCES,)),
    "engine": ("name", (ENGINES,)),
    "optim": ("name", (OPTIMIZERS,)),
}


def groups() -> dict[str, list[str]]:
    """Lists every configuration group with its options: those that have a file, and names of the catalog."""
    found = {folder.name: {file.stem for file in folder.glob("*.yaml")} for folder in CONF.iterdir() if folder.is_dir()}
    for group, (_, registries) in NAMED.items():
        found.setdefault(group, set()).update(*registries)
    return {group: sorted(options) for group, options in sorted(found.items())}


def _register() -> None:
    """Registers the schema with its defaults at Hydra, and an option for each name that has no file."""
    from hydra.core.config_store import ConfigStore

    store = ConfigStore.instance()
    store.store(name="schema", node=Config().to_dict())
    for group, (field, registries) in NAMED.items():
        for name in itertools.chain(*registries):
            if (CONF / group / f"{name}.yaml").exists():
                continue
            store.store(group=group, name=name, node={field: name})


def _check_override(text: str) -> None:
    if "${" in text:
        raise ConfigError(f"{text!r} holds an interpolation; values are data: write the value itself")
    key, equals, value = text.partition("=")
    key = key.removeprefix("++").removeprefix("+")
    if key.startswith("~") or "@" in key:
        raise ConfigError(f"{text!r}: keys can only be set, not removed or moved; write key=value")
    if not equals or not key:
        raise UsageError(f"{text!r} is not an override; write key=value, for example data.seq_len=4096")
    options = groups().get(key)
    if options is not None:
        _check_option(key, value, options)
    elif _is_free(key):
        _check_grammar(text)
    else:
        known = dotted_paths(Config)
        if key not in known:
            refuse_old_key(key)
            raise unknown_key(key, known + list(groups()))
        fields = [path for path in known if path.startswith(f"{key}.")]
        if fields:
            raise ConfigError(f"{text!r}: {key} is a section; set its fields, for example {fields[0]}=...")
        _check_grammar(text)


def _is_free(key: str) -> bool:
    """Returns whether ``key`` is one of the user's own in a mapping, such as cluster.sbatch.mem."""
    parent, _, name = key.rpartition(".")
    return bool(name) and holds_any_key(Config, parent)


def _for_hydra(text: str) -> str:
    """Lets a key of the user's own be added, which Hydra otherwise wants a plus for."""
    return f"++{text.lstrip('+')}" if _is_free(text.partition("=")[0].lstrip("+")) else text


def _check_option(group: str, option: str, options: list[str]) -> None:
    if option in options or (group == "recipe" and option == "null"):
        return
    raise ConfigError(f"{group}={option} is not known; {suggestion(option, options)}")


def _check_grammar(text: str) -> None:
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        (override,) = OverridesParser.create().parse_overrides([text])
    except HydraException as error:
        raise UsageError(f"{text!r} cannot be read: {_first_lines(error)}") from None
    if override.is_sweep_override():
        raise ConfigError(f"{text!r} is a sweep; one run takes one value, and a list stands in [brackets]")


def _first_lines(error: Exception) -> str:
    """Returns Hydra's own words without its pages of advice."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return "; ".join(lines[:2])


def refuse_overrides(words: Sequence[str], fixed: Sequence[str]) -> None:
    """Refuses an override of one of ``fixed``: a command that sets these keys itself would ignore it."""
    for word in words:
        key = word.split("=")[0].lstrip("+~")
        if key in fixed:
            raise UsageError(f"{word}: this command sets {key} itself; leave it out")
