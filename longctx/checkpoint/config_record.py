"""Records the configuration in a checkpoint, and tells how another one differs from it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from longctx.checkpoint.manifest import plain
from longctx.config import Config
from longctx.config.renamed import translated

# Where a run lies and what it tells nobody needs to know about when it is resumed.
_INCIDENTAL = ("run.", "logger.")


def recorded_config(config: Mapping[str, Any]) -> Any:
    """Keeps the configuration, so that a run that resumes can tell what has changed."""
    kept = {key: value for key, value in config.items() if f"{key}." not in _INCIDENTAL}
    return plain(kept, "configuration")


# What decides which function of the tokens the weights are, beside the weights themselves. In which dtype it is
# computed, and by which strategy, kernel or mesh, decides only how it is rounded.
_FUNCTION = ("model.", "attention.window", "attention.document_mask")
_LABELS = ("model.name", "model.path", "model.init_std")  # what weights are called, and where they came from


def another_model(changed: Mapping[str, str]) -> list[str]:
    """Lists, in words, the changes that make another model of the same weights."""
    return [words for key, words in changed.items() if key.startswith(_FUNCTION) and key not in _LABELS]


def changed_keys(saved: Any, now: Any) -> dict[str, str]:
    """Returns the keys whose values differ, ascending, with both values in words.

    ``saved`` may be an earlier version's: old names are understood, and keys that it lacks had their defaults.
    """
    before, after = dict(leaves(translated(saved))), dict(leaves(now))
    defaults = dict(leaves(Config().to_dict()))
    before = {**{key: defaults[key] for key in after if key in defaults}, **before}
    return {
        key: f"{key}={after.get(key, 'absent')} (was {before.get(key, 'absent')})"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
    }


def leaves(value: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Lists dotted keys of a configuration, and their values as a user writes them."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from leaves(inner, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, value if isinstance(value, str) else json.dumps(value, default=str)
