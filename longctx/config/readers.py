"""Marks fields that only some choices of another field read: the sizes of a mixer, the options of a data source."""

from __future__ import annotations

from dataclasses import MISSING, field, fields
from typing import Any

from longctx.catalog import Registry
from longctx.errors import ConfigError
from longctx.rules import as_word

FOR_SOME = {"for_some": True}  # metadata of such a field


def for_some(default: Any) -> Any:
    """Makes a field that only what the section names may read; the object behind the name says so in its ``reads``."""
    return field(default=default, metadata=FOR_SOME)


def refuse_unread(section: Any, prefix: str, registry: Registry, chosen: str | None, key: str) -> None:
    """Refuses fields of ``section`` that are set although what is chosen of ``registry`` does not read them.

    ``prefix``: of the section's keys. ``key``: what users write to choose. Raises ``ConfigError`` with who reads it.
    """
    marked = [one for one in fields(section) if one.metadata.get("for_some")]
    given = [one for one in marked if getattr(section, one.name) != default_of(one)]
    if not given:
        return  # what is chosen may bring torch, so it is loaded only where there is something to ask it
    reads = frozenset() if chosen is None else registry.load(chosen).reads
    for one in given:
        if one.name in reads:
            continue
        value = getattr(section, one.name)
        readers = [name for name in registry if one.name in registry.load(name).reads]
        raise ConfigError(
            f"{prefix}.{one.name}={as_word(value)} is not read by {key}={as_word(chosen)}; set "
            f"{key}={' or '.join(readers)}, or leave {prefix}.{one.name} at {as_word(default_of(one))}"
        )


def default_of(one: Any) -> Any:
    """Returns the default of a dataclass's field."""
    return one.default if one.default_factory is MISSING else one.default_factory()
