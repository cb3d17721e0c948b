"""Reads overrides as people type them: refuses wrong words in one line each, and writes the rest for Hydra.

Values are data: an interpolation such as ``${oc.env:HOME}`` is refused wherever it stands, so no override can read the
environment or run code. The value of a key that holds text is that text, whatever letters are in it.
"""

from __future__ import annotations

import logging
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from longctx.config import Config
from longctx.config.parsing import dotted_paths, entry_paths, holds_any_key, holds_text, unknown_key
from longctx.config.renamed import refuse_old_key
from longctx.errors import ConfigError, UsageError
from longctx.launcher.hydra.groups import groups, own_folder
from longctx.rules import suggestion

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override

_log = logging.getLogger(__name__)

SEARCH_PATH = "hydra.searchpath"
# Of Hydra's own configuration: what is there for it here.
_HYDRA = {
    "hydra.run.dir": "run.dir=DIR names the run's directory",
    "hydra.output_subdir": "config.yaml lies in run.dir",
    "hydra.job.chdir": "a run stays in the folder that it was started in",
    "hydra.job.name": "run.name=NAME names a run",
    "hydra.verbose": "--cfg job shows the configuration",
    "hydra.sweep": "one command is one run; loop over them in the shell",
    "hydra.launcher": "`longctx launch` and `longctx submit` start runs",
}
_YAML = (".yaml", ".yml")


@dataclass
class Reading:
    """Holds overrides in Hydra's grammar. ``folders``: of the user's own options. ``recipe``: a file of his own."""

    words: list[str] = field(default_factory=list)
    folders: tuple[Path, ...] = ()
    recipe: Path | None = None


def read(overrides: Sequence[str]) -> Reading:
    """Returns the overrides as Hydra reads them. Raises ``UsageError`` or ``ConfigError`` for the first wrong one."""
    reading = Reading(folders=tuple(folder for word in overrides for folder in _search_path(word)))
    given: dict[str, str] = {}
    for place, word in enumerate(overrides):
        if word.startswith(f"{SEARCH_PATH}="):
            continue
        key, value = _split(word, overrides[place - 1] if place else None, groups(reading.folders))
        if key == "recipe" and value.endswith(_YAML):
            reading.recipe = Path(value)
            written = None
        else:
            written = _written(word, key, value, reading.folders)
        _note_twice(given, key, value, grouped=key in groups(reading.folders))
        if written is not None:
            reading.words.append(written)
    return reading


def quoted(text: str) -> str:
    """Writes text so that Hydra reads it as it is."""
    escaped = re.sub(r"(\\+)(?='|$)", r"\1\1", text).replace("'", "\\'")
    return f"'{escaped}'"


def _search_path(word: str) -> list[Path]:
    """Returns the folders that a word adds to those where options lie, as ``--config-dir`` and Hydra's key do."""
    if not word.startswith(f"{SEARCH_PATH}="):
        return []
    value = _override(word).value()
    folders = value if isinstance(value, list) else [value]
    return [own_folder(str(folder).removeprefix("file://")) for folder in folders]


def _split(word: str, before: str | None, known: dict[str, list[str]]) -> tuple[str, str]:
    """Splits an override into key and value, without a sign of Hydra's before the key."""
    if "${" in word:
        raise ConfigError(
            f"{word!r} holds an interpolation; values are data: write the value itself, or let the shell fill it in "
            'between double quotes, as in "run.dir=$HOME/runs/a"'
        )
    key, equals, value = word.partition("=")
    if key.startswith("~"):
        raise ConfigError(
            f"{word!r}: keys can only be set, not removed; set {key.lstrip('~')}=null where null is valid"
        )
    if "@" in key:
        raise ConfigError(f"{word!r}: a group goes where it is, and cannot be moved by @; write group=option")
    sign, key = re.fullmatch(r"(\+*)(.*)", key, re.DOTALL).groups()  # type: ignore[union-attr]
    if not equals or not key:
        raise UsageError(f"{word!r} is not an override; {_instead(word, before, known)}")
    if len(sign) == 1 and key in (*known, *dotted_paths(Config)):
        raise ConfigError(f"{word!r}: + adds a key, and {key} is there; write {shlex.quote(f'{key}={value}')}")
    return key, value


def _instead(word: str, before: str | None, known: dict[str, list[str]]) -> str:
    """Says what a word without ``=`` may have been meant to be."""
    for group, options in known.items():
        if word in options:
            return f"did you mean {group}={word}?"
    if before is not None and "=" in before:
        joined = shlex.quote(f"{before} {word}")
        return f"write key=value; if it belongs to the word before it, quote both: {joined}"
    if word.endswith(_YAML):
        return f"did you mean {shlex.quote(f'recipe={word}')}?"
    return "write key=value, for example data.seq_len=4096"


def _written(word: str, key: str, value: str, folders: tuple[Path, ...]) -> str:
    """Returns an override for Hydra, whose key and form are known to be right."""
    options = groups(folders).get(key)
    if options is not None:
        _check_option(key, value, options)
        return f"{key}={value}"
    if key.partition(".")[0].partition("/")[0] == "hydra":
        raise _of_hydra(key)
    entry = entry_paths(Config, key)
    if entry and key not in entry and not holds_any_key(Config, key.rpartition(".")[0]):
        raise unknown_key(key, entry)
    if entry and holds_text(Config, key):
        return f"++{_text(key, value)}"
    if entry or holds_any_key(Config, key.rpartition(".")[0]):
        return _of_ones_own(key, value)
    known = dotted_paths(Config)
    if key not in known:
        refuse_old_key(key)
        raise unknown_key(key, known + list(groups(folders)))
    inner = [path for path in known if path.startswith(f"{key}.")]
    if inner:
        raise ConfigError(f"{word!r}: {key} is a section; set its fields, for example {inner[0]}=...")
    return _text(key, value) if holds_text(Config, key) else _plain(key, value)


def _of_hydra(key: str) -> ConfigError:
    dotted = key.replace("/", ".")
    for name, instead in _HYDRA.items():
        if dotted.startswith(name):
            return ConfigError(f"{key} is Hydra's own and not used here: {instead}")
    return ConfigError(
        f"{key} is Hydra's own and not used here: it only composes; {SEARCH_PATH}=[DIR] adds own options"
    )


def _check_option(group: str, option: str, options: list[str]) -> None:
    if option in options or (group == "recipe" and option == "null"):
        return
    if "," in option:
        raise _several(f"{group}={option}", group, option.split(","))
    if group == "recipe" and Path(f"{option}.yaml").exists():
        raise ConfigError(f"recipe={option} is not known; did you mean recipe={option}.yaml? (a file of your own)")
    if not option:
        raise ConfigError(f"{group}= is empty; valid: {', '.join(options)}")
    raise ConfigError(f"{group}={option} is not known; {suggestion(option, options, group)}")


def _text(key: str, value: str) -> str:
    """Writes the value of a key that holds text: in quotes of Hydra's, null, or the letters as they stand."""
    if re.match(r"~[\w.-]*(/|$)", value):
        home = shlex.quote(value[2:]) if value[2:] else ""
        raise ConfigError(f'{key}={value}: the shell leaves ~ as it is there; write {key}="$HOME"/{home}')
    _refuse_none(key, value)
    word = f"{key}={value}"
    return word if _is_spelled_out(word, value) else f"{key}={quoted(value)}"


def _is_spelled_out(word: str, value: str) -> bool:
    """Tells whether Hydra reads a value as it is meant: as it stands, in quotes, with backslashes, or as null."""
    try:
        override = _override(word)
    except UsageError:
        return False
    if override.is_sweep_override():
        return False
    read = override.value()
    return read is None or (isinstance(read, str) and (read == value or "\\" in value or value[:1] in ("'", '"')))


def _of_ones_own(key: str, value: str) -> str:
    """Writes a key of the user's own in a mapping, such as cluster.sbatch.mem; Hydra wants a plus for it."""
    try:
        is_read = not _override(f"{key}={value}").is_sweep_override()
    except UsageError:
        is_read = False
    return f"++{key}={value if is_read else quoted(value)}"


def _plain(key: str, value: str) -> str:
    """Checks the value of a key that holds no text: a number, a switch, a list."""
    _refuse_none(key, value)
    word = f"{key}={value}"
    if re.fullmatch(r"[+-]?\d{1,3}(,\d{3})+", value):
        raise ConfigError(f"{word!r} has commas in a number; write {key}={value.replace(',', '')}")
    if _override(word).is_sweep_override():
        raise _several(word, key, value.split(",") if "," in value else [value])
    return word


def _refuse_none(key: str, value: str) -> None:
    if value == "None":
        raise ConfigError(f"{key}=None: nothing is written null here; write {key}=null")


def _override(word: str) -> Override:
    """Returns a word as Hydra's grammar reads it. Raises ``UsageError`` for what it cannot read."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        (override,) = OverridesParser.create().parse_overrides([word])
    except HydraException as error:
        raise UsageError(f"{word!r} cannot be read: {first_lines(error)}") from None
    return override


def _several(word: str, key: str, values: list[str]) -> ConfigError:
    """Returns the error for values that Hydra would make several runs of."""
    loop = f"for value in {' '.join(map(shlex.quote, values))}; do longctx ... {key}=$value; done"
    return ConfigError(
        f"{word!r} is a sweep, and one command is one run: loop in the shell: {loop}; a list stands in [brackets]"
    )


def _note_twice(given: dict[str, str], key: str, value: str, grouped: bool) -> None:
    """Refuses a group that is chosen twice, as Hydra does; of values the last counts, which is told."""
    if key in given and given[key] != value:
        if grouped:
            raise ConfigError(f"{key}={given[key]} and {key}={value}: a group is chosen once; leave one out")
        _log.warning("%s is given twice, %s and then %s: the last one counts", key, given[key], value)
    given[key] = value


def first_lines(error: Exception) -> str:
    """Returns Hydra's own words without its pages of advice."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return "; ".join(lines[:2])
