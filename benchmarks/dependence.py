"""Predicts how long messages take that each leave as soon as their data is there: replays traces over nodes' links.

Bytes over rate is what a link takes that is never idle. A gradient goes home after its block has come. Where one
direction waits for the other, no exchange is as fast as that. Its time then is that of the longest chain of messages
that need each other. Computing, and messages inside a node, take no time here, so nothing of it is measured.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Protocol

Key = tuple[str, int, int, int, int]  # group, sender, receiver, tag, number
Pair = tuple[int, int]


class SentMessage(Protocol):
    """Tells what ``longctx.sim`` records of an operation, as far as it is read here."""

    @property
    def phase(self) -> str: ...
    @property
    def id(self) -> int: ...
    @property
    def operation(self) -> str: ...
    @property
    def bytes(self) -> int: ...
    @property
    def group(self) -> str: ...
    @property
    def peers(self) -> tuple[int, ...]: ...
    @property
    def tag(self) -> int: ...
    @property
    def sequence(self) -> int: ...


def chained_seconds(traces: Sequence[Sequence[SentMessage]], per_node: int, bytes_per_second: float) -> float:
    """Computes the seconds until the last rank has its last message.

    ``traces[rank]``: what it posts and awaits, in its order. Nodes hold ``per_node`` ranks each, in order. A message
    starts when both of its ranks have posted it, behind those before it between the two. Messages that pass a link in
    one direction share it evenly.
    """
    replay = _Replay(traces, per_node)
    now = 0.0
    while replay.proceed():
        rates = replay.rates(bytes_per_second)
        assert rates, "every message that is awaited is sent"
        step = min(replay.left(pair) / rate for pair, rate in rates.items())
        now += step
        replay.carry({pair: rate * step for pair, rate in rates.items()})
    return now


class _Replay:
    """Knows where every rank is in its trace, and the messages on the links."""

    def __init__(self, traces: Sequence[Sequence[SentMessage]], per_node: int) -> None:
        self._traces, self._per_node = traces, per_node
        self._places = [0] * len(traces)
        self._posted: dict[Key, int] = {}  # bytes of what one of both ranks has posted
        self._keys: dict[int, Key] = {}  # by the operation's id
        self._done: set[Key] = set()
        self._under_way: dict[Pair, deque[tuple[Key, float]]] = {}

    def proceed(self) -> bool:
        """Lets ranks go on as far as they can; tells whether any is left that waits."""
        while sum(self._proceed(rank) for rank in range(len(self._traces))):
            pass
        return any(place < len(trace) for place, trace in zip(self._places, self._traces, strict=True))

    def rates(self, bytes_per_second: float) -> dict[Pair, float]:
        """Returns, for each pair of ranks with a message under way, its share of the busier of the two nodes' links."""
        pairs = [pair for pair, queue in self._under_way.items() if queue]
        out, into = ([pair[end] // self._per_node for pair in pairs] for end in (0, 1))
        return {
            pair: bytes_per_second / max(out.count(pair[0] // self._per_node), into.count(pair[1] // self._per_node))
            for pair in pairs
        }

    def left(self, pair: Pair) -> float:
        return self._under_way[pair][0][1]

    def carry(self, moved: dict[Pair, float]) -> None:
        for pair, size in moved.items():
            key, left = self._under_way[pair].popleft()
            if left > size * (1 + 1e-9):
                self._under_way[pair].appendleft((key, left - size))
            else:
                self._done.add(key)

    def _proceed(self, rank: int) -> bool:
        """Lets one rank go on; tells whether it did."""
        trace, start = self._traces[rank], self._places[rank]
        while self._places[rank] < len(trace):
            event = trace[self._places[rank]]
            if event.phase == "post":
                self._post(rank, event)
            elif event.phase == "wait" and self._keys[event.id] not in self._done:
                break
            self._places[rank] += 1
        return self._places[rank] > start

    def _post(self, rank: int, event: SentMessage) -> None:
        assert event.operation in ("send", "recv"), f"{event.operation} is not a message between two ranks"
        sends = event.operation == "send"
        pair = (rank, event.peers[0]) if sends else (event.peers[0], rank)
        key = (event.group, *pair, event.tag, event.sequence)
        self._keys[event.id] = key
        size = self._posted.pop(key, None)
        if size is None:
            self._posted[key] = event.bytes
        elif pair[0] // self._per_node == pair[1] // self._per_node:
            self._done.add(key)
        else:
            self._under_way.setdefault(pair, deque()).append((key, float(max(size, event.bytes))))
