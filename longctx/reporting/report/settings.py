"""Lists what differs from the defaults in the configuration, for the report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from longctx.checkpoint.config_record import leaves
from longctx.config import Config


@dataclass(frozen=True)
class Setting:
    """Holds one key of the configuration as an override names it, with its value and its default."""

    key: str
    value: str
    default: str


def changed_settings(config: Mapping[str, Any]) -> list[Setting]:
    """Lists the keys of ``config``, a mapping of sections, whose values are not the defaults."""
    defaults = dict(leaves(Config().to_dict()))
    return [
        Setting(key, value, defaults.get(key, "no default"))
        for key, value in leaves(config)
        if value != defaults.get(key)
    ]
