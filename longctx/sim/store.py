"""Implements the key-value store of a simulated cluster: a blocking read hands the baton over."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist


@dataclass(slots=True)
class _Keys:
    store: dict[str, bytes]
    keys: list[str]

    def ready(self) -> bool:
        return all(key in self.store for key in self.keys)

    def describe(self) -> str:
        missing = [key for key in self.keys if key not in self.store]
        return f"waiting for the store's keys {missing}"


class SimStore(dist.Store):
    """An in-memory store that all rank threads share.

    Args:
        wait: blocks the calling rank until the given waitable is ready. Timeouts are not kept: on one
            machine without a clock a key either comes or its absence is a deadlock.
    """

    def __init__(self, wait: Callable[[_Keys], None]) -> None:
        super().__init__()
        self._values: dict[str, bytes] = {}
        self._wait = wait

    def set(self, key: str, value: str | bytes) -> None:
        self._values[key] = _octets(value)

    def get(self, key: str) -> bytes:
        self.wait([key])
        return self._values[key]

    def add(self, key: str, amount: int) -> int:
        value = int(self._values.get(key, b"0")) + amount
        self._values[key] = str(value).encode()
        return value

    def compare_set(self, key: str, expected: str | bytes, desired: str | bytes) -> bytes:
        current = self._values.get(key)
        if current == _octets(expected) or (current is None and not expected):
            self._values[key] = _octets(desired)
        return self._values.get(key, _octets(expected))

    def check(self, keys: list[str]) -> bool:
        return all(key in self._values for key in keys)

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        self._wait(_Keys(self._values, list(keys)))

    def delete_key(self, key: str) -> bool:
        return self._values.pop(key, None) is not None

    def num_keys(self) -> int:
        return len(self._values)


def _octets(value: str | bytes | list[int]) -> bytes:
    return value.encode() if isinstance(value, str) else bytes(value)
