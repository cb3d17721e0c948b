"""Reads and plans the next step's batches while the present one runs.

Who serves which attention cells follows from document lengths alone, long before the tokens are needed. Worked out in
the first layer's forward it would stand still for all ranks. A thread of its own reads the samples and plans them. It
makes nothing but host memory and talks to no rank. Cutting, and moving to the device, stay with the caller.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

from longctx.sequence import Batch, LocalBatch, SequencePlan
from longctx.train.batch_sharder import BatchSharder

Planned = list[tuple[Batch, SequencePlan]]
Prepare = Callable[[list[SequencePlan]], None]

# Ranks of a simulated cluster have the same batches, and share the plan that the first of them makes.
_one_at_a_time = threading.Lock()


class Readable(Protocol):
    """Delivers microbatches by the number of a step's first sample, and knows which step comes next."""

    next_sample: int

    def advance(self) -> None:
        """Notes that the next step's microbatches have been used."""

    def batches(self, first_sample: int) -> list[Batch]:
        """Reads this rank's microbatches of the step that starts at a sample."""
        ...


class Prefetcher:
    """Reads and plans the next step's micro-batches while the present step runs.

    ``prepare``: what else the plans of one step's micro-batches are wanted for.

    The loader's position stays that of the batches that were taken, so a checkpoint knows nothing of those read ahead.
    """

    def __init__(self, loader: Readable, sharder: BatchSharder, prepare: Prepare) -> None:
        self._loader, self._sharder, self._prepare = loader, sharder, prepare
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="ahead")
        self._made: tuple[int, Future[Planned]] | None = None  # of the step that begins at this sample

    def take(self, more: bool) -> list[LocalBatch]:
        """Hands over this rank's micro-batches of the next step; ``more``: begins with those of the step after.

        Raises what reading or planning them raised.
        """
        first = self._loader.next_sample
        if self._made is None or self._made[0] != first:
            self._begin(first)
        assert self._made is not None, "it has been begun"
        planned = self._made[1].result()
        self._loader.advance()
        if more:
            self._begin(self._loader.next_sample)
        return [self._sharder(batch, plan) for batch, plan in planned]

    def close(self) -> None:
        """Waits for what is under way and throws it away."""
        self._worker.shutdown(cancel_futures=True)

    def _begin(self, first: int) -> None:
        self._made = first, self._worker.submit(self._plan, first)

    def _plan(self, first: int) -> Planned:
        batches = self._loader.batches(first)
        with _one_at_a_time:
            plans = [self._sharder.plan(batch) for batch in batches]
            self._prepare(plans)
        return list(zip(batches, plans, strict=True))
