"""The report's part about configuration: what differs from the defaults."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from longctx.config import Config


@dataclass(frozen=True)
class Setting:
    """Holds one key of the configuration as an override names it, with its value and its default."""

    key: str
    value: str
    default: str


def changed_settings(config: Mapping[str, Any]) -> list[Setting]:
    """Lists the keys of ``config``, a mapping of sections, whose values are not the defaults."""
    defaults = dict(_leaves(Config.from_dict({}).to_dict()))
    return [
        Setting(key, value, defaults.get(key, "no default"))
        for key, value in _leaves(config)
        if value != defaults.get(key)
    ]


def _leaves(value: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Dotted keys, and values as a user writes them."""
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from _leaves(inner, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, value if isinstance(value, str) else json.dumps(value, default=str)
