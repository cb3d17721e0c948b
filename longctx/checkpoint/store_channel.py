"""Lets a thread of each rank talk to those of the others through a store, beside whatever the main threads do."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

LOOK = 0.05  # seconds between two looks at the store for what another rank has yet to say


class Closed(Exception):  # noqa: N818 - reads as what happened
    """The channel was closed while one of its calls waited for another rank."""


class StoreChannel:
    """Exchanges bytes between all ranks, of each of which one thread at a time calls.

    A store serves where collectives cannot: groups may be busy, or wait for a rank that computes. The first rank
    collects, so an exchange costs each other rank two messages.
    """

    def __init__(self, store: dist.Store, rank: int, world: int) -> None:
        self.rank, self.world = rank, world
        self._store: Any = store  # torch's stubs lack that values may be bytes
        self._exchanges = 0
        self._closed = threading.Event()

    def close(self) -> None:
        """Makes calls that wait, and all later ones, raise ``Closed``."""
        self._closed.set()

    def announce(self, key: str) -> None:
        """Makes ``announced`` true for ``key`` on all ranks."""
        self._store.set(key, b"1")

    def announced(self, key: str) -> bool:
        """Returns whether any rank has announced ``key``."""
        return bool(self._store.check([key]))

    def propose(self, number: int) -> None:
        """Proposes a number, once per rank; it may be called by another thread than what reads the largest."""
        known = -1
        while known < number:
            expected = "" if known < 0 else str(known)
            known = int(self._store.compare_set("largest", expected, str(number)))
        self._store.add("proposed", 1)

    def largest(self) -> int:
        """Returns the largest number that any rank proposed, once all have."""
        self._wait(lambda: self._store.add("proposed", 0) >= self.world)
        return int(self._store.get("largest"))

    def exchange(self, payload: bytes) -> list[bytes]:
        """Gathers every rank's payload, by rank."""
        name = f"exchange-{self._exchanges}"
        self._exchanges += 1
        self._store.set(f"{name}/{self.rank}", payload)
        if self.rank == 0:
            payloads = [self._awaited(f"{name}/{rank}") for rank in range(self.world)]
            sizes = json.dumps([len(each) for each in payloads]).encode()
            self._store.set(f"{name}/all", b"\n".join([sizes, b"".join(payloads)]))
            return payloads
        sizes, together = self._awaited(f"{name}/all").split(b"\n", 1)
        payloads, start = [], 0
        for size in json.loads(sizes):
            payloads.append(together[start : start + size])
            start += size
        return payloads

    def _awaited(self, key: str) -> bytes:
        self._wait(lambda: bool(self._store.check([key])))
        return bytes(self._store.get(key))

    def _wait(self, ready: Callable[[], bool]) -> None:
        """Looks again and again: a store's own wait can't be ended, and some of them hold up all other callers."""
        while not ready():
            if self._closed.wait(LOOK):
                raise Closed
