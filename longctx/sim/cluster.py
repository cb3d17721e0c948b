"""Runs a cluster in one process: every rank is a thread in which ``torch.distributed`` works."""

from __future__ import annotations

import contextlib
import functools
import random
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist

from longctx.sim.baton import Baton
from longctx.sim.compute import ComputeRecorder
from longctx.sim.errors import RankFailed, Stopped, whole
from longctx.sim.fake import FakeFloats
from longctx.sim.faults import Fault, FaultInjector, FaultPlan
from longctx.sim.ledger import Ledger
from longctx.sim.process_group import create_group
from longctx.sim.runtime import RankContext, Runtime, current_rank_context, set_rank_context
from longctx.sim.sharding_decisions import shared_sharding_decisions
from longctx.sim.store import SimStore
from longctx.sim.trace import Event, Trace
from longctx.sim.world import BACKEND_NAME, isolated_world

Result = TypeVar("Result")

_one_run_at_a_time = threading.Lock()


class Cluster:
    """A cluster that runs N ranks as threads of this process, one at a time.

    Results depend only on the ranks' own code and on torch's random number generator at the start. Every rank inherits
    its state; a seed must not change results. Only torch's default CPU generator is kept per rank; ``random`` and
    ``numpy.random`` are shared by the ranks of a run.

    Args:
        world_size: number of ranks, at least 1.
        seed: shuffles the order in which waiting ranks go on; None takes them in rank order.
        faults: what goes wrong, see ``FaultPlan``.
        trace: record communication in ``trace``.
        trace_compute: record operators in ``trace`` too; slows each operator down.
        fake: make all floating tensors of the ranks fake, shapes without numbers, see ``longctx.sim.fake``.

    Attributes:
        ledger: bytes sent in the latest run, see ``longctx.sim.ledger`` for the conventions.

    Raises:
        ValueError: no ranks, or a fault at a rank that doesn't exist.
    """

    def __init__(
        self,
        world_size: int,
        seed: int | None = None,
        faults: FaultPlan | Iterable[Fault] | None = None,
        trace: bool = True,
        *,
        trace_compute: bool = False,
        fake: bool = False,
    ) -> None:
        world_size = whole("world_size", world_size)
        if seed is not None:
            whole("seed", seed)
        if world_size < 1:
            raise ValueError(f"world_size is {world_size}, must be positive; the nearest is 1")
        self.world_size = world_size
        self.seed = seed
        self.faults = faults if isinstance(faults, FaultPlan) else FaultPlan(faults or ())
        self.faults.check_world(world_size)
        self.ledger = Ledger()
        self._trace_enabled = trace or trace_compute
        self._trace_compute = trace_compute
        self._fake = fake
        self._trace = Trace(world_size, self._trace_enabled)
        self._fired: list[Fault] = []

    @property
    def trace(self) -> list[list[Event]]:
        """Events of the latest run: one list per rank, in that rank's order."""
        return self._trace.events

    @property
    def fired(self) -> list[Fault]:
        """The faults that struck in the latest run, in order."""
        return self._fired

    def run(self, function: Callable[..., Result], *args: Any, **kwargs: Any) -> list[Result]:
        """Calls ``function(*args, **kwargs)`` on every rank, with torch.distributed initialised.

        Ledger, trace and ``fired`` start afresh. Afterwards the caller's process is as before, whatever happened:
        process groups, random number generators, registered backends, threads.

        Returns:
            What the ranks returned, by rank.

        Raises:
            RankFailed: a rank raised; from its exception.
            DeadlockError: all ranks wait for each other.
            RuntimeError: called inside a rank, or while another run goes on.
        """
        if current_rank_context() is not None:
            raise RuntimeError("Cluster.run() inside a rank of a cluster; a rank can't host another cluster")
        if not _one_run_at_a_time.acquire(blocking=False):
            raise RuntimeError("another Cluster.run() goes on in this process; only one can at a time")
        try:
            with isolated_world(create_group), shared_sharding_decisions(), _random_state_kept():
                run = _Run(self._new_runtime(), self._trace_compute, self._fake)
                return run(functools.partial(function, *args, **kwargs))
        finally:
            _one_run_at_a_time.release()

    def _new_runtime(self) -> Runtime:
        self.ledger.reset()
        self._trace = Trace(self.world_size, self._trace_enabled)
        injector = FaultInjector(self.faults)
        self._fired = injector.fired
        return Runtime(self.world_size, Baton(self.world_size, self.seed), self.ledger, self._trace, injector)


class _Run:
    """The threads of one run."""

    def __init__(self, runtime: Runtime, trace_compute: bool, fake: bool) -> None:
        self._runtime = runtime
        self._baton = runtime.baton
        self._trace_compute = trace_compute
        self._fake = fake
        self._store = SimStore(_wait_in_current_rank)
        self._results: list[Any] = [None] * runtime.world_size

    def __call__(self, body: Callable[[], Result]) -> list[Result]:
        threads = [
            threading.Thread(target=self._rank_thread, args=(rank, body), name=f"sim-rank-{rank}", daemon=True)
            for rank in range(self._runtime.world_size)
        ]
        for thread in threads:
            thread.start()
        try:
            self._baton.run_ranks()
        finally:
            for thread in threads:
                thread.join()
        cause = self._baton.cause
        if cause is not None:
            # A failing rank names its own exception as the cause; a deadlock has none.
            raise cause from cause.__cause__
        return self._results

    def _rank_thread(self, rank: int, body: Callable[[], Any]) -> None:
        self._baton.begin(rank)
        context = RankContext(rank, self._runtime)
        set_rank_context(context)
        try:
            self._baton.check()
            dist.init_process_group(BACKEND_NAME, rank=rank, world_size=self._runtime.world_size, store=self._store)
            with self._modes(context):
                self._results[rank] = body()
        except Stopped:
            pass
        except BaseException as error:
            self._fail(rank, error)
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
            set_rank_context(None)
            self._baton.finish(rank)

    def _fail(self, rank: int, error: BaseException) -> None:
        if self._baton.cause is not None:
            return  # an aftermath of the run's end
        # The first frame is this file's own.
        callers = error.__traceback__ and error.__traceback__.tb_next
        report = "".join(traceback.format_exception(type(error), error, callers))
        others = [line for line in self._baton.waits() if not line.startswith(f"rank {rank}:")]
        if others:
            report += "the other ranks were stopped:\n" + "\n".join(f"  {line}" for line in others)
        failure = RankFailed(rank, f"rank {rank} failed\n{report}")
        failure.__cause__ = error
        self._baton.stop(failure)

    @contextlib.contextmanager
    def _modes(self, context: RankContext) -> Iterator[None]:
        with contextlib.ExitStack() as modes:
            fake_mode = modes.enter_context(FakeFloats()) if self._fake else None
            if self._trace_compute:
                modes.enter_context(ComputeRecorder(context, fake_mode))
            yield


def _wait_in_current_rank(what: Any) -> None:
    context = current_rank_context()
    if context is not None:
        context.wait(what)
    elif not what.ready():
        raise RuntimeError(f"{what.describe()} outside of a rank thread, which can't hand over; ask check() first")


@contextlib.contextmanager
def _random_state_kept() -> Iterator[None]:
    """Puts the process's generators back afterwards."""
    saved = torch.get_rng_state(), random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        torch.set_rng_state(saved[0])
        random.setstate(saved[1])
        np.random.set_state(saved[2])
