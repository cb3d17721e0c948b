"""Stops a run inside a long step: what the last update left is saved by a thread, while the step goes on.

Between two updates nothing changes weights and optimizer. So a step that takes minutes need not end, and need not be
interrupted, before the state from before it is saved. All that ranks must agree on is which change is the last one. A
change is an update with what belongs to it: the step's record, and a checkpoint where one is due.

    request   a rank was asked to stop, and has not stopped between steps after ``patience`` seconds; it tells all ranks
    hold      each rank's thread lets its main thread begin no further change, and proposes the number of its last
    target    the largest of them; a rank that is behind may go on up to it, since its peers have allowed that
    save      once a rank is through with the target's change, its thread saves with those of the others by a store
    end       the process ends; the step that still runs is dropped

No collective is left half done by those who still need it: the main threads' groups are not used any more. Pipelines,
recompute and whatever else happens inside a step need no rule here. A step costs two locks that nobody else wants.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from longctx.checkpoint.agreement import this_rank, through, world_size
from longctx.checkpoint.store_channel import Closed, StoreChannel
from longctx.checkpoint.train_state import StateAtRest
from longctx.errors import LongctxError

_log = logging.getLogger(__name__)

LOOK = 0.2  # seconds between two looks at this process's own request
POLL = 1.0  # seconds between two looks at the store, for a request that came to another rank
RANKS_PER_POLL = 1000.0  # more ranks look less often: the store answers them one after another
HOLD = "hold"


@dataclass(frozen=True)
class Stopping:
    """Says how a run is stopped.

    ``asked``: was this process asked to? ``working(doing)``: a context in which the run answers requests itself,
    and where one came says what it is ``doing``. ``end_with``: ends the process with an error's code, from any thread,
    unless it soon ends by itself. ``store``: reaches all ranks, for this purpose alone. ``patience``: seconds that a
    step is let go on after a request.
    """

    asked: Callable[[], bool]
    working: Callable[[Callable[[], str] | None], contextlib.AbstractContextManager[None]]
    end_with: Callable[[LongctxError], None]
    store: dist.Store
    patience: float = 5.0


class InsideStep:
    """Watches one rank's steps.

    ``save``: saves a state with all ranks and returns the error that the run ends with. ``settle``: a collective of all
    ranks, so that one that has come to the end of its step lets the others run.
    """

    def __init__(
        self,
        stop: Stopping,
        rest: StateAtRest,
        device: torch.device,
        save: Callable[[StateAtRest], LongctxError],
        settle: Callable[[], Any],
    ) -> None:
        self.error: LongctxError | None = None  # what the run ends with, once it is stopped from here
        self._stop, self._device, self._save, self._settle = stop, device, save, settle
        self._channel = StoreChannel(stop.store, this_rank(), world_size())
        self._state, self._last = rest, False
        self._begun = self._done = 0  # changes of the state
        self._limit: int | None = None  # the last change that may begin, None: any
        self._target: int | None = None
        self._proposed = self._closed = self._ended = False
        self._changed = threading.Condition()
        threading.Thread(target=self._watch, name="inside step", daemon=True).start()

    def change(self) -> None:
        """Lets the main thread begin to change the state; where it must not, raises what the run was stopped for."""
        with self._changed:
            change = self._begun + 1
            self._changed.wait_for(lambda: self._limit is None or change <= self._limit or self._target is not None)
            if self._target is None or change <= self._target:
                self._begun = change
                return
        # Ranks that have ended already are missed in it.
        with contextlib.suppress(Exception):
            self._settle()
        with self._changed:
            self._changed.wait_for(lambda: self._ended)
        assert self.error is not None
        raise self.error

    def rest(self, state: StateAtRest, last: bool) -> None:
        """Takes the state that will not change before the next call of ``change``; ``last``: none will follow."""
        with self._changed:
            self._state, self._last, self._done = state, last, self._begun
            self._changed.notify_all()

    def close(self) -> None:
        """Stops watching. The other ranks learn how far this one has come, for they may be waiting for that."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        with contextlib.suppress(Exception):
            self._propose()
        self._channel.close()

    def _propose(self) -> None:
        with self._changed:
            if self._proposed:
                return
            self._proposed = True
            self._limit = begun = self._begun
        self._channel.propose(begun)

    def _watch(self) -> None:
        try:
            self._await_request()
            self._propose()
            rest = self._state_after(self._channel.largest())
        except Closed:
            return
        except Exception as error:
            # The process that held the store is gone, and with it the run.
            _log.debug("stops inside a step are not watched any more: %s", error)
            return
        self._end(self._saved(rest))

    def _await_request(self) -> None:
        asked, poll = None, 0.0
        while True:
            now = time.monotonic()
            if asked is None and self._stop.asked():
                asked = now
            if asked is not None and now - asked >= self._stop.patience:
                self._channel.announce(HOLD)
                return
            if now >= poll:
                poll = now + POLL * max(1.0, self._channel.world / RANKS_PER_POLL)
                if self._channel.announced(HOLD):
                    return
            with self._changed:
                if self._changed.wait_for(lambda: self._closed, LOOK):
                    raise Closed

    def _state_after(self, target: int) -> StateAtRest:
        with self._changed:
            self._target = target
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._closed or self._done >= target)
            if self._closed or self._last:
                raise Closed
            return self._state

    def _saved(self, rest: StateAtRest) -> LongctxError:
        with through(self._channel), _beside(self._device):
            try:
                return self._save(rest)
            except LongctxError as error:
                return error
            finally:
                # The first rank may hold the store, and what it still writes is not to be cut short by the others' end.
                with contextlib.suppress(Exception):
                    self._channel.exchange(b"")

    def _end(self, error: LongctxError) -> None:
        with self._changed:
            self.error, self._ended = error, True
            self._changed.notify_all()
        self._stop.end_with(error)


@contextlib.contextmanager
def _beside(device: torch.device) -> Any:
    """Works on the device on a stream of its own: the main thread's is full of the step that is to be dropped."""
    with torch.no_grad(), contextlib.ExitStack() as stack:
        if device.type == "cuda":
            stack.enter_context(torch.cuda.device(device))
            stack.enter_context(torch.cuda.stream(torch.cuda.Stream(device)))
        yield
