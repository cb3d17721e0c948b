"""Reads words and numbers with commas between, as options of benchmarks have them."""

from __future__ import annotations

from collections.abc import Iterable

from longctx.errors import ConfigError


def numbers(option: str, text: str) -> list[int]:
    """Reads whole numbers with commas between; refuses anything else."""
    try:
        return [int(word) for word in text.split(",")]
    except ValueError:
        raise ConfigError(f"--{option} {text!r} must be whole numbers with commas between") from None


def words(option: str, text: str, valid: Iterable[str]) -> list[str]:
    """Reads words with commas between; refuses those that are not in ``valid``."""
    found = text.split(",")
    for word in found:
        if word not in valid:
            raise ConfigError(f"--{option} {word!r} is unknown; valid: {', '.join(valid)}")
    if len(set(found)) < len(found):
        raise ConfigError(f"--{option} {text} names one twice; name each once")
    return found
