"""Maps names that a configuration had in earlier versions to those that they have now.

On the command line an old name is refused with the new one. A run's directory is data, not a command: its
``config.yaml`` and its checkpoints are understood as they were written.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from longctx.catalog import STRATEGIES
from longctx.errors import ConfigError

# Old key -> the keys that it may have become; of several, the one that the strategy reads; of none, it is gone.
KEYS: dict[str, tuple[str, ...]] = {
    "attention.travel": ("attention.grad_dtype",),
    "attention.backward": ("attention.backward_rotates",),
    "attention.inner": ("attention.ulysses_degree", "attention.inner_ring"),
    "attention.servers": ("attention.server_pool",),
    "logger.trace": (),
}

# Key, by its new name -> old value -> new value.
VALUES: dict[str, dict[str, str]] = {
    "attention.grad_dtype": {"wide": "fp32", "narrow": "compute"},
    "attention.backward_rotates": {"keys": "kv", "queries": "q"},
    "train.recompute_keep": {"attention_tail": "attention_half"},
}


def refuse_old_key(key: str) -> None:
    """Refuses a key that has another name now. Raises ``ConfigError``."""
    if key in KEYS:
        raise ConfigError(new_name(key))


def new_name(key: str) -> str:
    """Says what an old key is called now, and its values."""
    if not KEYS[key]:
        return f"{key} is gone: it did nothing; leave it out"
    values = [f"; {old} is now {new}" for name in KEYS[key] for old, new in VALUES.get(name, {}).items()]
    return f"{key} is now {' or '.join(KEYS[key])}{''.join(values)}"


def refuse_old_value(key: str, value: object) -> None:
    """Refuses a value that has another name now. Raises ``ConfigError``."""
    key = key.partition("[")[0]
    known = VALUES.get(key, {})
    if isinstance(value, str) and value in known:
        raise ConfigError(f"{key}: {value} is now {known[value]}")


def translated(mapping: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a configuration that an earlier version wrote, in today's names.

    What is not a mapping stays for the parser.
    """
    sections = {name: dict(section) if isinstance(section, Mapping) else section for name, section in mapping.items()}
    for old, candidates in KEYS.items():
        section, _, name = old.partition(".")
        fields = sections.get(section)
        if not isinstance(fields, dict) or name not in fields:
            continue
        value = fields.pop(name)
        new = candidates if len(candidates) == 1 else _read_by(fields, candidates)
        if new and value is not None:
            fields[new[0].partition(".")[2]] = value
    for key, known in VALUES.items():
        section, _, name = key.partition(".")
        fields = sections.get(section)
        if isinstance(fields, dict) and name in fields:
            fields[name] = _new_value(fields[name], known)
    _keep_end_of_cosine(sections)
    return sections


def _keep_end_of_cosine(sections: Mapping[str, Any]) -> None:
    """Records where the only schedule of earlier versions ended: more steps must not raise the rate again."""
    optim, train = sections.get("optim"), sections.get("train")
    if isinstance(optim, dict) and isinstance(train, dict) and "schedule" not in optim and "steps" in train:
        optim.setdefault("decay_steps", train["steps"])


def _read_by(attention: Mapping[str, Any], candidates: tuple[str, ...]) -> tuple[str, ...]:
    """Returns those of several keys that the strategy reads."""
    if attention.get("strategy") not in STRATEGIES:
        return ()
    options = STRATEGIES.load(attention["strategy"]).options
    return tuple(key for key in candidates if key.partition(".")[2] in options)


def _new_value(value: Any, known: Mapping[str, str]) -> Any:
    if isinstance(value, list | tuple):
        return [_new_value(one, known) for one in value]
    return known.get(value, value) if isinstance(value, str) else value
