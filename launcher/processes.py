"""Runs a handful of Gloo processes on this machine for one job, which meet by a file and answer by files."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import torch
import torch.distributed as dist

from longctx.bench.timing import Report
from longctx.comm import leave_world
from longctx.errors import LongctxError, NumericsError
from longctx.launcher.env import keep_to_loopback, share_cores
from longctx.launcher.failures import clear_failures, error_of, first_failure, record
from longctx.launcher.progress import from_file

TIMEOUT = 600.0  # seconds that a whole job may take
STOPS = (signal.SIGTERM, signal.SIGHUP)
LOOK = 0.1  # seconds between two looks at the processes
FAILURES = "failures"  # inside the job's folder: why ranks ended
SETTLE = 0.5  # seconds in which the cause of a failure shows, where another rank is seen first


def _nothing() -> None:
    pass


@dataclass(frozen=True)
class Workers:
    """Says how ranks are run. ``python``: the interpreter. ``limit``: seconds for the whole job.

    ``prefixes``: by rank, the words before the command, such as those that run it in a network namespace. ``report``:
    takes what the first rank reports by ``progress.to_file``. ``look``: called while they run.
    """

    python: str = sys.executable
    limit: float = TIMEOUT
    prefixes: Sequence[Sequence[str]] = ()
    report: Report | None = None
    look: Callable[[], None] = _nothing


def run_gloo(module: str, job: str, world: int, folder: Path, workers: Workers = Workers()) -> None:
    """Runs ``python -m module JOB FOLDER RANK WORLD`` on ``world`` processes and waits for them.

    Answers are files: what other packages print does not mix with this command's output. Raises the error that the rank
    left which failed first, or NumericsError with its last line. What the others say follows from it, and they are
    ended.
    """
    with unwind_on_stop():
        _run(module, job, world, folder, workers)


def _run(module: str, job: str, world: int, folder: Path, workers: Workers) -> None:
    share_cores(world)
    if not workers.prefixes:
        keep_to_loopback()
    clear_failures(folder / FAILURES)
    command = [workers.python, "-m", module, job, str(folder)]
    before = workers.prefixes or [()] * world
    with ExitStack() as files:
        complaints = [files.enter_context(TemporaryFile()) for _ in range(world)]

        def start(rank: int) -> subprocess.Popen[bytes]:
            words = [*before[rank], *command, str(rank), str(world)]
            return subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=complaints[rank])

        look = from_file(folder, workers.report) if workers.report else workers.look
        ends = run_together(start, world, workers.limit, look)
        if ends.failed is not None:
            complaints[ends.failed].seek(0)
            last = complaints[ends.failed].read().decode(errors="replace").strip().splitlines()[-1:]
            status = ends.statuses[ends.failed]
            failure = first_failure(folder / FAILURES)
            if failure is not None and status != -signal.SIGKILL:
                raise error_of(failure)
            raise NumericsError(f"rank {ends.failed} of {module} ended with {status}: {' '.join(last)}")
        if not ends.in_time:
            waiting = ", ".join(str(rank) for rank, status in enumerate(ends.statuses) if status is None)
            raise NumericsError(f"ranks {waiting} had not ended after {workers.limit:g} s")


@dataclass(frozen=True)
class ExitStatuses:
    """Tells how processes ended by themselves, as ``subprocess`` has it; None for one that had to be ended."""

    statuses: Sequence[int | None]
    failed: int | None  # whose failure explains those of the others

    @property
    def in_time(self) -> bool:
        """Tells whether time sufficed: all have ended by themselves, or one has failed."""
        return self.failed is not None or None not in self.statuses


def run_together(
    start: Callable[[int], subprocess.Popen[bytes]], world: int, limit: float, look: Callable[[], None] = _nothing
) -> ExitStatuses:
    """Runs processes 0 to ``world`` - 1 side by side until all have ended, one has failed, or time is up.

    ``limit``: seconds. When one has failed, the others would wait for it without end. None outlives this. ``look`` is
    called whenever they are looked at.
    """
    started: list[subprocess.Popen[bytes]] = []
    try:
        with _undisturbed():
            for rank in range(world):
                started.append(start(rank))  # noqa: PERF401 - those before one that cannot start are known
        return _ends(started, time.monotonic() + limit, look)
    finally:
        with _undisturbed():
            for worker in started:
                worker.kill()
                worker.wait()


def _ends(
    started: Sequence[subprocess.Popen[bytes]], deadline: float, look: Callable[[], None] = _nothing
) -> ExitStatuses:
    while True:
        look()
        statuses = [worker.poll() for worker in started]
        failed = next((rank for rank, status in enumerate(statuses) if status), None)
        if failed is not None:
            break
        if None not in statuses or time.monotonic() > deadline:
            return ExitStatuses(statuses, None)
        time.sleep(LOOK)
    # Of two that end together, the one that was killed tells why; the other merely lost its peer.
    time.sleep(SETTLE)
    statuses = [worker.poll() for worker in started]
    killed = -signal.SIGKILL
    return ExitStatuses(statuses, statuses.index(killed) if killed in statuses else failed)


@contextmanager
def unwind_on_stop() -> Iterator[None]:
    """Makes a request to stop unwind like Ctrl-C, so that nothing that was started outlives this command.

    Such are SIGTERM, and SIGHUP of a closed terminal.
    """
    if not _in_main_thread():
        yield
        return
    # What is ignored, as under nohup, stays so.
    before = {number: old for number in STOPS if (old := signal.getsignal(number)) != signal.SIG_IGN}
    for number in before:
        signal.signal(number, _stop)
    try:
        yield
    finally:
        for number, old in before.items():
            if signal.getsignal(number) is _stop:
                signal.signal(number, old)


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def _stop(number: int, _: object) -> None:
    for each in STOPS:
        signal.signal(each, signal.SIG_IGN)  # a second request must not interrupt the unwinding
    sys.exit(128 + number)


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Makes requests to stop wait for the end.

    One amid the start of a process would leave it unknown to its starter.
    """
    if not _in_main_thread():
        yield
        return
    asked: list[int] = []
    before = {number: old for number in (signal.SIGINT, *STOPS) if callable(old := signal.getsignal(number))}
    for number in before:
        signal.signal(number, lambda which, _: asked.append(which))
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
    for which in asked[:1]:
        signal.raise_signal(which)


def as_rank(worker: Callable[[list[str]], None]) -> int:
    """Runs a process that ``run_gloo`` started; returns its exit code. An error of ours is left for the command."""
    words = sys.argv[1:]
    try:
        worker(words)
    except LongctxError as error:
        return record(int(words[2]), Path(words[1]) / FAILURES, error)
    return 0


@contextmanager
def gloo_rank(words: Sequence[str], pinned: bool = False) -> Iterator[tuple[Any, Path, int]]:
    """Joins a process that ``run_gloo`` started to the default process group; yields its job, answers' folder and rank.

    ``pinned``: to a core of its own, where there are as many as ranks.
    """
    job, folder, rank, world = json.loads(words[0]), Path(words[1]), int(words[2]), int(words[3])
    cores = sorted(os.sched_getaffinity(0))
    if pinned and len(cores) >= world:
        os.sched_setaffinity(0, {cores[rank]})
    join(folder, rank, world, "gloo")
    yield job, folder, rank
    dist.barrier()
    leave_world()


def join(folder: Path, rank: int, world: int, backend: str) -> torch.device:
    """Joins the default process group over Gloo or NCCL; returns the rank's device.

    Under NCCL that is the one of its number.
    """
    device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        backend,
        store=dist.FileStore(str(folder / "store"), world),
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=TIMEOUT),
        device_id=device if device.type == "cuda" else None,
    )
    return device
