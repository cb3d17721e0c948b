"""Predicts how long ranks wait for each other over late links: replays what they posted, awaited and computed.

A message needs its receiver's word that there is space for it, so that one of a bare link is there

    max(sent, word of the receiver at the sender) + latency,    word at the sender = receive posted + latency

which is how Gloo does it. Links are wide: bytes take no time. A rank's program is what it did in its own order; the
replay asks how long its waits are with that computing and another network.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from longctx.comm import ExchangeEvent


@dataclass(frozen=True)
class Compute:
    """Computes for ``seconds``."""

    seconds: float


@dataclass(frozen=True)
class Post:
    """Posts exchange ``number`` of this rank: a message to each of ``sends``, and one from each of ``receives``."""

    number: int
    sends: tuple[int, ...] = ()
    receives: tuple[int, ...] = ()


@dataclass(frozen=True)
class Wait:
    """Waits until all that exchange ``number`` receives is here and all that it sends has left."""

    number: int


Program = Sequence[Compute | Post | Wait]


@dataclass(frozen=True)
class RankSeconds:
    """Tells the seconds of one rank: from the common start to its end, and how many of them it waited for exchanges."""

    total: float
    waited: float


def program_of(timeline: Sequence[ExchangeEvent], started: float, ended: float) -> list[Compute | Post | Wait]:
    """Lists what a rank did between two moments; whatever is between its exchanges is computing, posting included."""
    program: list[Compute | Post | Wait] = []
    now = started
    for moment in timeline:
        program.append(Compute((moment.ended if moment.posted else moment.started) - now))
        program.append(Post(moment.number, moment.sends, moment.receives) if moment.posted else Wait(moment.number))
        now = moment.ended
    return [*program, Compute(ended - now)]


def wait_seconds(timeline: Sequence[ExchangeEvent]) -> float:
    """Returns the seconds that the rank spent in waits."""
    return sum(moment.ended - moment.started for moment in timeline if not moment.posted)


def replay(programs: Sequence[Program], latency: float) -> list[RankSeconds]:
    """Returns every rank's time, when all start at 0 and a link takes ``latency`` seconds one way.

    Ranks that wait for each other are an assert.
    """
    mail = _Mail(latency)
    ranks = [_Rank(number, program, mail) for number, program in enumerate(programs)]
    steps = {rank.number: rank.run() for rank in ranks}
    while steps:
        before = {number: ranks[number].done for number in steps}
        steps = {number: run for number, run in steps.items() if next(run, "ended") != "ended"}
        assert any(ranks[number].done > done for number, done in before.items()), "ranks wait for each other"
    return [RankSeconds(rank.now, rank.waited) for rank in ranks]


class _Mail:
    """Knows when both ends of each message were posted. Between two ranks messages match in order."""

    def __init__(self, latency: float) -> None:
        self.latency = latency
        self.sent: dict[tuple[int, int], list[float]] = defaultdict(list)
        self.expected: dict[tuple[int, int], list[float]] = defaultdict(list)

    def leaves(self, edge: tuple[int, int], number: int) -> float | None:
        """Returns when a message can leave; None while one of its ends has not been posted."""
        sent, expected = self.sent[edge], self.expected[edge]
        if number >= min(len(sent), len(expected)):
            return None
        return max(sent[number], expected[number] + self.latency)


class _Rank:
    def __init__(self, number: int, program: Program, mail: _Mail) -> None:
        self.number, self._program, self._mail = number, program, mail
        self.now = self.waited = 0.0
        self.done = 0  # entries of the program
        self._posted: dict[int, list[tuple[tuple[int, int], int, float]]] = {}

    def run(self) -> Iterator[None]:
        """Goes on as far as is known of the others; pauses where it is not."""
        for entry in self._program:
            if isinstance(entry, Compute):
                self.now += entry.seconds
            elif isinstance(entry, Post):
                self._post(entry)
            else:
                while (ends := self._ends(entry)) is None:
                    yield
                self.waited += max(0.0, ends - self.now)
                self.now = max(self.now, ends)
            self.done += 1

    def _post(self, entry: Post) -> None:
        messages = self._posted[entry.number] = []
        for table, peers, late in (
            (self._mail.sent, entry.sends, 0.0),
            (self._mail.expected, entry.receives, self._mail.latency),
        ):
            for peer in peers:
                edge = (self.number, peer) if table is self._mail.sent else (peer, self.number)
                messages.append((edge, len(table[edge]), late))
                table[edge].append(self.now)

    def _ends(self, entry: Wait) -> float | None:
        """Returns when all of an exchange is done; None while that is not known."""
        left = [(self._mail.leaves(edge, number), late) for edge, number, late in self._posted[entry.number]]
        if any(leaves is None for leaves, _ in left):
            return None
        return max((leaves + late for leaves, late in left if leaves is not None), default=0.0)
