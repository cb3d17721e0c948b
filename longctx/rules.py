"""Raises the errors of rules, each with the value, the rule and the nearest valid choice."""

from __future__ import annotations

import operator
import re
from collections.abc import Iterable, Sequence

from longctx.errors import ConfigError
from longctx.other_names import meaning_of_value, plain

# Who logs in where: in a URL of the web whatever stands before the host, elsewhere a name with a password.
_LOGIN_IN_URL = re.compile(r"(?i)(https?://)[^/\s]*@|(\w+://)[^/\s:]*:[^/\s]*@")


def redacted(text: str) -> str:
    """Returns ``text`` without names and passwords in its URLs."""
    return _LOGIN_IN_URL.sub(lambda found: f"{found[1] or found[2]}***@", text)


def distance(one: str, other: str) -> int:
    """Counts the letters to add, drop, change or swap with their neighbour to make one word of the other."""
    before: list[int] = []
    row = list(range(len(other) + 1))
    for i, letter in enumerate(one, 1):
        before, last, row = row, before, [i]
        for j, wanted in enumerate(other, 1):
            cost = min(before[j] + 1, row[-1] + 1, before[j - 1] + (letter != wanted))
            if i > 1 and j > 1 and letter == other[j - 2] and one[i - 2] == wanted:
                cost = min(cost, last[j - 2] + 1)
            row.append(cost)
    return row[-1]


def nearness(word: str, choice: str) -> float | None:
    """Returns how far two names are apart, or None when nobody would write one for the other.

    Case, ``-`` and ``_`` do not count. One letter in four or so may be wrong; the beginning of a name stands for it.
    """
    one, other = plain(word), plain(choice)
    far = distance(one, other)
    if far <= (max(len(one), len(other)) + 1) // 4:
        return far
    short, long = sorted((one, other), key=len)
    return 0.5 + far if len(short) >= 3 and long.startswith(short) else None


def closest(word: str, choices: Iterable[str]) -> str | None:
    """Returns the choice that ``word`` most likely stands for, or None when nothing is near."""
    near = [(found, choice) for choice in choices if (found := nearness(word, choice)) is not None]
    return min(near)[1] if near else None


def suggestion(word: str, choices: Sequence[str], key: str = "") -> str:
    """Returns the end of a message about an unknown ``word``: what it may mean, and all that is valid.

    ``key``: whose value it should be, for names that other trainers have.
    """
    valid = f"valid: {', '.join(choices)}"
    meant = meaning_of_value(key, word)
    if meant:
        return f"{meant} ({valid})"
    near = closest(word, choices)
    return f"did you mean {near}? ({valid})" if near else valid


def one_of(key: str, value: str, choices: Sequence[str]) -> None:
    """Refuses a name outside ``choices``."""
    if not isinstance(value, str):
        raise ConfigError(f"{key}={value!r} is {kind_of(value)}, not a name; {suggestion(str(value), choices)}")
    if value not in choices:
        raise ConfigError(f"{key}={value} is not known; {suggestion(value, choices, key)}")


def kind_of(value: object) -> str:
    """Names the kind of a value that is not of the right one."""
    return f"of type {type(value).__name__}"


def whole(key: str, value: object, low: int | None = None, high: int | None = None) -> int:
    """Returns a whole number of [low, high] as Python's own; refuses true, 2.7, "2" and numbers outside."""
    valid = f"a whole number{'' if low is None else f' of at least {low}'}{'' if high is None else f', at most {high}'}"
    try:
        found = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        found = None
    if found is None or isinstance(value, bool):
        raise ConfigError(f"{key}={value!r} is {kind_of(value)}; it must be {valid}")
    if (low is not None and found < low) or (high is not None and found > high):
        nearest = low if low is not None and found < low else high
        raise ConfigError(f"{key}={found} must be {valid}; nearest valid value: {nearest}")
    return found


def as_word(value: object) -> str:
    """Writes a value as YAML and the command line do."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def at_least(key: str, value: float | None, low: float, valid: object = None) -> None:
    """Refuses a number below ``low``; None passes, its type has been checked.

    ``valid``: what to name instead of ``low``, where another rule may refuse that.
    """
    if value is not None and value < low:
        nearest = low if valid is None else valid
        raise ConfigError(f"{key}={value} must be at least {low}; nearest valid value: {nearest}")


def above(key: str, value: float | None, low: float) -> None:
    """Refuses a number that is not greater than ``low``."""
    if value is not None and value <= low:
        raise ConfigError(f"{key}={value} must be greater than {low}")


def within(key: str, value: float, low: float, high: float, open_end: bool = False) -> None:
    """Refuses a number outside [low, high], or [low, high) with ``open_end``."""
    if value < low or value > high or (open_end and value == high):
        end = ")" if open_end else "]"
        nearest = low if value < low else high
        hint = "" if open_end and value >= high else f"; nearest valid value: {nearest}"
        raise ConfigError(f"{key}={value} must lie in [{low}, {high}{end}{hint}")


def divisors(number: int) -> list[int]:
    """Lists all divisors of a positive number, in order."""
    small = [d for d in range(1, int(number**0.5) + 1) if number % d == 0]
    return sorted({*small, *(number // d for d in small)})


def nearest_of(value: int, choices: Sequence[int], count: int = 2) -> str:
    """Names the ``count`` choices next to ``value``."""
    chosen = sorted(sorted(choices, key=lambda c: (abs(c - value), c))[:count])
    return " or ".join(str(c) for c in chosen)


def nearest_multiples(value: int, unit: int) -> str:
    """Names the positive multiples of ``unit`` next to ``value``."""
    below = value // unit * unit
    return f"{below} or {below + unit}" if below else str(unit)
