"""Turns plain mappings into frozen dataclasses and back, strict at every depth.

Nothing is guessed. An unknown key, a string for a number or a number for a string is an error that names the full
dotted path. An integer for a real number is the one conversion.
"""

from __future__ import annotations

import functools
import math
import types
import typing
import unicodedata
from collections.abc import Hashable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar, cast

from longctx.config.renamed import refuse_old_key, refuse_old_value
from longctx.errors import ConfigError
from longctx.other_names import meaning_of_key
from longctx.rules import as_word, nearness, redacted

T = TypeVar("T")

# What fits a signed 64-bit integer, the widest that torch takes.
_LARGEST_INT = 2**63 - 1

# Control characters, lone surrogates, line and paragraph separators.
_UNSOUND = {"Cc", "Cs", "Zl", "Zp"}


def parse(cls: type[T], mapping: Any, prefix: str = "") -> T:
    """Builds ``cls`` from a mapping; keys that are left out keep their defaults."""
    if not isinstance(mapping, Mapping):
        where = prefix.rstrip(".") or "the configuration"
        raise ConfigError(f"{where}={mapping!r} must be a mapping with the keys {', '.join(_names(cast(Any, cls)))}")
    hints, names = _hints(cast(Any, cls)), {key_of(one.name): one.name for one in fields(cast(Any, cls))}
    values: dict[str, Any] = {}
    for key, value in mapping.items():
        path = f"{prefix}{key}"
        if key not in hints:
            refuse_old_key(path)
            raise unknown_key(path, dotted_paths(cls, prefix))
        hint = hints[key]
        nested = isinstance(hint, type) and is_dataclass(hint)
        values[names[key]] = parse(hint, value, f"{path}.") if nested else read_value(path, hint, value)
    return cls(**values)


def as_dict(tree: Any) -> dict[str, Any]:
    """Returns the plain nested mapping of a dataclass tree, in the order of its fields."""
    return {
        key_of(field.name): as_dict(value) if is_dataclass(value) else _plain(value)
        for field in fields(tree)
        for value in [getattr(tree, field.name)]
    }


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        return as_dict(value)
    if type(value) is dict:
        return {str(key): _plain(entry) for key, entry in value.items()}  # whole numbers are words in JSON
    return list(value) if type(value) is tuple else value


def unknown_key(path: str, known: list[str]) -> ConfigError:
    """Returns the error for a key that nothing reads, with the key it may stand for."""
    near = closest_path(path, known) or meaning_of_key(path)
    return ConfigError(f"unknown configuration key {path}" + (f"; did you mean {near}?" if near else ""))


def closest_path(path: str, known: list[str]) -> str | None:
    """Returns the known dotted path that ``path`` most likely stands for, or None.

    Section and name must both be near. A name that is right may stand in another section, or in none.
    """
    section, _, name = path.rpartition(".")
    scored = []
    for candidate in known:
        known_section, _, known_name = candidate.rpartition(".")
        far = nearness(name, known_name)
        if far is not None and (not section or far == 0):
            scored.append((far + (0.1 if known_section else 0.0), candidate))
        if far is not None and section and known_section and (apart := nearness(section, known_section)) is not None:
            scored.append((far + apart - 0.1, candidate))
    return min(scored)[1] if scored else None


def dotted_paths(cls: type, prefix: str = "") -> list[str]:
    """Lists every section and every field below ``cls``, as dotted paths."""
    paths = []
    for name, hint in _hints(cls).items():
        paths.append(f"{prefix}{name}")
        if is_dataclass(hint):
            paths += dotted_paths(cast(type, hint), f"{prefix}{name}.")
    return paths


def entry_paths(cls: type, path: str) -> list[str]:
    """Lists the valid forms of a dotted path that leads into a mapping of sections, such as data.mixture.NAME.weight.

    NAME is the one in ``path``. Empty where the path leads elsewhere.
    """
    hint: Any = cls
    parts = path.split(".")
    for place, name in enumerate(parts):
        hint = _hints(cast(Any, hint)).get(name) if is_dataclass(hint) else None
        if typing.get_origin(hint) is dict and is_dataclass(typing.get_args(hint)[1]):
            inner = typing.get_args(hint)[1]
            return dotted_paths(inner, ".".join(parts[: place + 2]) + ".") if len(parts) > place + 2 else []
    return []


def holds_any_key(cls: type, path: str) -> bool:
    """Returns whether the field at the dotted ``path`` is a mapping whose keys are the user's own."""
    hint: Any = cls
    for name in path.split("."):
        hint = _inside(hint, name)
    return typing.get_origin(hint) is dict


def _inside(hint: Any, name: str) -> Any:
    """Returns what a section or a mapping of sections has under a name, None where that is nothing."""
    if is_dataclass(hint):
        return _hints(cast(Any, hint)).get(name)
    return typing.get_args(hint)[1] if typing.get_origin(hint) is dict else None


def holds_text(cls: type, path: str) -> bool:
    """Tells whether the field of a dotted path below ``cls`` holds text, or nothing."""
    hint: Any = cls
    for name in path.split("."):
        hint = _inside(hint, name)
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    return str in options and set(options) <= {str, type(None)}


@functools.cache
def _hints(cls: Hashable) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    return {key_of(field.name): hints[field.name] for field in fields(cast(Any, cls))}


def key_of(name: str) -> str:
    """Returns the key of a field; where the key is a word of Python's, as ``from``, the field has a ``_`` behind it."""
    return name.removesuffix("_")


def _names(cls: Hashable) -> list[str]:
    return list(_hints(cls))


def read_value(path: str, hint: Any, value: Any) -> Any:
    """Returns ``value`` as the type ``hint`` has it; raises ``ConfigError`` that names ``path`` where it is another."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value is None and type(None) in options:
        return None
    for option in options:
        if typing.get_origin(option) is dict and isinstance(value, Mapping):
            return _mapping(path, option, value)
        if typing.get_origin(option) is tuple and type(value) in (list, tuple):
            (item, _) = typing.get_args(option)
            return tuple(read_value(f"{path}[{place}]", item, entry) for place, entry in enumerate(value))
        if option is float and type(value) in (int, float):
            return _finite(path, value)
        if option is not type(None) and type(value) is option:
            refuse_old_value(path, value)
            return _sound(path, value)
    got = f"{path} is null" if value is None else f"{path}={_written(value)} is {_kind(value)}"
    raise ConfigError(f"{got}, expected {_expected(options)}{_hint(options, value)}")


def _mapping(path: str, hint: Any, value: Mapping[Any, Any]) -> dict[Any, Any]:
    """Reads a mapping whose keys are the user's own: words or whole numbers."""
    (kind, item) = typing.get_args(hint)
    found: dict[Any, Any] = {}
    for given, entry in value.items():
        key = _number_key(path, given) if kind is int else _key(path, given)
        if key in found:
            raise ConfigError(f"{path}.{key} is given twice, as a number and as a word; leave one out")
        inner = f"{path}.{key}"
        found[key] = (
            parse(cast(type, item), entry, f"{inner}.") if is_dataclass(item) else read_value(inner, item, entry)
        )
    return found


def _number_key(path: str, key: Any) -> int:
    if type(key) is int or (isinstance(key, str) and key.isdecimal() and key.isascii()):
        return int(_sound(path, int(key)))
    raise ConfigError(f"{path}: the key {key!r} is {_kind(key)}, expected a whole number of 0 or more")


def _key(path: str, key: Any) -> str:
    if not isinstance(key, str):
        raise ConfigError(f"{path}: the key {key!r} is {_kind(key)}, expected a string")
    return str(_sound(path, key))


def _finite(path: str, value: float) -> float:
    try:
        real = float(value)
    except OverflowError:  # of a whole number
        real = math.inf
    if not math.isfinite(real):
        raise ConfigError(f"{path}={real} must be a finite number")
    return real


def _sound(path: str, value: Any) -> Any:
    if isinstance(value, str) and not _UNSOUND.isdisjoint(map(unicodedata.category, value)):
        # A line break in a job or file name would otherwise reach scripts and logs.
        raise ConfigError(f"{path}={value!r} must not hold control characters")
    if isinstance(value, str) and not value:
        raise ConfigError(f"{path}='' must not be empty")
    if isinstance(value, str) and redacted(value) != value:
        # It would stand in config.yaml, in the checkpoints' record and in the job's script.
        raise ConfigError(f"{path}={redacted(value)!r} holds a login; keep it in the environment or in a file")
    if type(value) is int and abs(value) > _LARGEST_INT:
        raise ConfigError(f"{path}={value} must fit 64 bits; nearest valid value: {_LARGEST_INT}")
    return value


_KINDS = {str: "a string", int: "an integer", float: "a number", bool: "true or false", type(None): "null"}


_CONTAINERS = {dict: "a mapping", tuple: "a list"}


def _written(value: Any) -> str:
    return as_word(value) if isinstance(value, bool) else repr(value)


def _kind(value: Any) -> str:
    return _KINDS.get(type(value), f"a {type(value).__name__}")


def _expected(options: tuple[Any, ...]) -> str:
    return " or ".join(_KINDS.get(option, _CONTAINERS.get(typing.get_origin(option), "a list")) for option in options)


def _hint(options: tuple[Any, ...], value: Any) -> str:
    """Says how a value of the wrong kind would be written, where that is plain."""
    if str in options and isinstance(value, int | float):
        return f"""; quote it: "'{as_word(value)}'\""""
    if bool in options and str(value).lower() in _SWITCHES:
        return f"; write {_SWITCHES[str(value).lower()]}"
    if int in options and type(value) is float and value.is_integer():
        return f"; write {int(value)}"
    if isinstance(value, str) and {int, float} & set(options):
        return _number_hint(value.strip(), int in options)
    if isinstance(value, str) and any(typing.get_origin(option) is tuple for option in options):
        return f"; write [{value}]"
    return ""


_SWITCHES = {"yes": "true", "on": "true", "1": "true", "no": "false", "off": "false", "0": "false"}
_SWITCHES |= {"true": "true without quotes", "false": "false without quotes"}
_THOUSANDS = {"k": 1, "m": 2, "g": 3}


def _number_hint(text: str, whole: bool) -> str:
    factor = _THOUSANDS.get(text[-1:].lower())
    if factor and text[:-1].isdecimal():
        count = int(text[:-1])
        return f"; write {count * 1024**factor} or {count * 1000**factor}"
    try:
        number = int(text) if whole else float(text)
    except ValueError:
        return ""
    return f"; write {number} without quotes"
