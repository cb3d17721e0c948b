"""Lets exactly one rank thread run at a time: the one that holds the baton.

A rank hands the baton over only inside a blocking wait. So a run is deterministic and ranks have no data races. The
moment when no rank can go on is noticed at once.
"""

from __future__ import annotations

import _thread
import heapq
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Protocol

import torch

from longctx.sim.errors import DeadlockError, Stopped

# A rank that polls is_completed() while no other can run will never see an answer. So many polls in a row count as
# waiting for ever.
_FRUITLESS_POLLS = 1000
_LIBRARY_FOLDERS = tuple(f"{Path(file).parent}/" for file in (torch.__file__, __file__))


class Waitable(Protocol):
    """Something that a rank can wait for."""

    def ready(self) -> bool:
        """Returns True once the rank may go on.

        It may become True only through what other ranks do, or through time.
        """
        ...

    def describe(self) -> str:
        """Names the operation, group, peers, tag and sequence number for a deadlock report."""
        ...


class _Always:
    """Waits for nothing: a rank that merely lets the others run."""

    def ready(self) -> bool:
        return True

    def describe(self) -> str:
        return "polling is_completed()"


class Baton:
    """Runs rank threads one at a time.

    The default random number generator of torch is one per process, so its state travels with the baton.

    Args:
        world_size: number of ranks.
        seed: None hands over in rank order. A number shuffles the order; a rank may then also hand over at a wait
            that could return at once.
    """

    def __init__(self, world_size: int, seed: int | None) -> None:
        self.turn = 0  # counts hand-overs: the only clock here, used by delayed messages
        self.cause: BaseException | None = None
        self._shuffle = None if seed is None else random.Random(seed)
        # A bare lock used as a binary semaphore costs a tenth of threading.Semaphore.
        self._locks = [_thread.allocate_lock() for _ in range(world_size)]
        self._over = _thread.allocate_lock()
        for lock in (*self._locks, self._over):
            lock.acquire()
        self._alive = [True] * world_size
        self._waits: list[Waitable | None] = [None] * world_size
        self._threads = [0] * world_size
        self._generator = torch.default_generator
        self._rng = [self._generator.get_state()] * world_size
        self._expected: list[int] = []  # turns at which delayed messages come due
        self._fruitless = 0

    def run_ranks(self) -> None:
        """Starts the first rank and returns when the last one has finished; the main thread calls it.

        An interrupt (Ctrl-C) stops all ranks at their next operation, then goes on as usual.
        """
        self._hand_to(self._next_after(len(self._locks) - 1))
        try:
            # A signal that another thread caught is handled here only between two acquires.
            while not self._over.acquire(timeout=0.5):
                pass
        except BaseException as interrupt:
            self.stop(interrupt)
            self._over.acquire()
            raise

    def begin(self, rank: int) -> None:
        """Waits until the rank thread first gets the baton; each thread calls it before anything else."""
        self._threads[rank] = _thread.get_ident()
        self._locks[rank].acquire()
        self._generator.set_state(self._rng[rank])

    def finish(self, rank: int) -> None:
        """Hands the baton on for good; a rank that is done calls it."""
        self._alive[rank] = False
        successor = self._next_after(rank)
        if successor is None and any(self._alive):
            self.stop(self._deadlock())
            successor = self._next_after(rank)
        if successor is None:
            self._over.release()
        else:
            self._hand_to(successor)

    def check(self) -> None:
        """Raises Stopped if the run is over; every operation begins with this."""
        if self.cause is not None:
            raise Stopped

    def stop(self, cause: BaseException) -> None:
        """Ends the run: the rank that holds the baton goes on, every other one gets Stopped in turn.

        Of several causes the first one counts.
        """
        if self.cause is None:
            self.cause = cause

    def expect_at(self, turn: int) -> None:
        """Records that something becomes ready at this turn, so that waiting for it is no deadlock."""
        heapq.heappush(self._expected, turn)

    def wait(self, rank: int, what: Waitable) -> None:
        """Returns when ``what`` is ready, and lets the other ranks run until then.

        Raises:
            Stopped: another rank failed, or all ranks wait for each other.
        """
        self.check()
        if what.ready() and (self._shuffle is None or self._shuffle.random() < 0.5):
            return
        self._switch(rank, what)

    def poll(self, rank: int) -> None:
        """Lets the other ranks run once, for code that asks ``is_completed()`` in a loop."""
        self.check()
        if self._switch(rank, _Always()):
            self._fruitless = 0
        elif self._expected:
            self._let_time_pass()
        else:
            self._fruitless += 1
        if self._fruitless > _FRUITLESS_POLLS:
            self._waits[rank] = _Always()
            self.stop(self._deadlock())
            raise Stopped

    def waits(self) -> list[str]:
        """Returns one line for every rank: what it waits for, and from where in the caller's code."""
        frames = sys._current_frames()
        lines = []
        for rank, waiting in enumerate(self._waits):
            if not self._alive[rank]:
                lines.append(f"rank {rank}: finished")
            elif waiting is not None:
                where = _caller_line(frames.get(self._threads[rank]))
                lines.append(f"rank {rank}: {waiting.describe()}{where}")
            else:
                lines.append(f"rank {rank}: not waiting")
        return lines

    def _switch(self, rank: int, what: Waitable) -> bool:
        """Hand over and come back once ``what`` is ready. True if another rank ran in between."""
        self._waits[rank] = what
        successor = self._next_after(rank)
        if successor is None:
            self.stop(self._deadlock())
            raise Stopped
        if successor != rank:
            self._rng[rank] = self._generator.get_state()
            self._hand_to(successor)
            self._locks[rank].acquire()
            self._generator.set_state(self._rng[rank])
        self._waits[rank] = None
        self.check()
        return successor != rank

    def _hand_to(self, rank: int | None) -> None:
        assert rank is not None
        self.turn += 1
        self._locks[rank].release()

    def _next_after(self, rank: int) -> int | None:
        """The rank that runs next, ``rank`` itself last; None if nobody can."""
        world_size = len(self._alive)
        order: Sequence[int] = (*range(rank + 1, world_size), *range(rank + 1))
        if self._shuffle is not None:
            order = self._shuffle.sample(order, world_size)
        while True:
            for candidate in order:
                if self._alive[candidate]:
                    waiting = self._waits[candidate]
                    if self.cause is not None or waiting is None or waiting.ready():
                        return candidate
            if not self._expected:
                return None
            self._let_time_pass()

    def _let_time_pass(self) -> None:
        """Nobody can go on now: skip to the turn at which the next delayed message arrives."""
        self.turn = max(self.turn, heapq.heappop(self._expected))

    def _deadlock(self) -> DeadlockError:
        return DeadlockError("deadlock: every rank waits\n" + "\n".join(f"  {line}" for line in self.waits()))


def _caller_line(frame: FrameType | None) -> str:
    """The innermost line outside torch and this package, as " (at file:line in function)"."""
    while frame is not None:
        code = frame.f_code
        if not code.co_filename.startswith(_LIBRARY_FOLDERS) and "/threading.py" not in code.co_filename:
            return f" (at {code.co_filename}:{frame.f_lineno} in {code.co_name})"
        frame = frame.f_back
    return ""
