"""Starts the ranks of this machine, passes signals on to them, and ends all when one has failed.

They are plain processes. torchrun's agent, which this replaces, unpickles what it finds in a store that listens on
every interface: whoever reaches that port runs code as the launching user.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from longctx.errors import RequeueError
from longctx.launcher.failures import CRASH
from longctx.launcher.stopping import BEFORE_STEPS, STOP_SIGNALS

# How long ranks may take to save after a signal, counted from the last sign of a checkpoint being written.
SHUTDOWN_SECONDS = 60.0
LOOK = 0.05  # seconds between two looks at the ranks
SETTLE = 0.5  # seconds in which the cause of a failure shows, where another rank is seen first
GRACE = 3.0  # seconds that ranks have to put away their files after another has failed


@dataclass(frozen=True)
class RanksEnd:
    """How the ranks ended: a shell's status, and a message where a rank may have left none."""

    status: int
    message: str | None = None
    killed: bool = False  # a signal from outside ended a rank, which explains the crashes of the others
    stopped: Sequence[int] = ()  # ranks that others may have waited for in vain: they were stopped, as by SIGSTOP


@dataclass(frozen=True)
class Exit:
    """How one rank's process ended, negative for a signal as ``subprocess`` has it."""

    rank: int
    status: int


@dataclass(frozen=True)
class RankJob:
    """What is started. ``command``: a rank's words, given the number of its lifeline. ``environment``: of a rank.

    ``handed``: open files that every rank inherits. ``saving``: something that changes while a checkpoint is written.
    """

    processes: int
    command: Callable[[int], Sequence[str]]
    environment: Callable[[int], Mapping[str, str]]
    handed: Sequence[int] = ()
    saving: Callable[[], object] = lambda: None


def run_ranks(job: RankJob) -> RanksEnd:
    """Runs the ranks of ``job`` to their end; none of them outlives this."""
    with _received() as signals:
        ranks = _Ranks(job)
        try:
            ranks.start()
            return ranks.watch(signals)
        finally:
            ranks.kill()


def cause_of(exits: Sequence[Exit]) -> RanksEnd:
    """Returns the end that the exits of ranks tell, the first one first; none of them was ended by their launcher."""
    failed = [end for end in exits if end.status]
    if not failed:
        return RanksEnd(0)
    # Whoever was killed explains those that lost their peer. NCCL's watchdog aborts a rank that has lost one.
    killed = [end for end in failed if end.status < 0 and end.status != -signal.SIGABRT]
    cause = (killed or failed)[0]
    if cause.status >= 0:
        return RanksEnd(cause.status, f"rank {cause.rank} ended with status {cause.status} and left no message")
    number = signal.Signals(-cause.status)
    memory = "; the machine may have run out of memory" if number == signal.SIGKILL else ""
    message = f"rank {cause.rank} was killed by {number.name}{memory}; --resume goes on from the newest checkpoint"
    return RanksEnd(CRASH, message, killed=bool(killed))


@contextlib.contextmanager
def _received() -> Iterator[list[int]]:
    """Yields a list that signals are appended to as they come; what is ignored, as under nohup, stays so."""
    received: list[int] = []
    before = {number: old for number in STOP_SIGNALS if (old := signal.getsignal(number)) != signal.SIG_IGN}
    for number in before:
        signal.signal(number, lambda which, _: received.append(which))
    try:
        yield received
    finally:
        for number, old in before.items():
            signal.signal(number, old)


class _Patience:
    """Says how long to wait for ranks that were asked to end: so many seconds after the last sign of a save."""

    def __init__(self, seconds: float, saving: Callable[[], object]) -> None:
        self._seconds, self._saving = seconds, saving
        self._sign, self._since = saving(), time.monotonic()

    def is_over(self) -> bool:
        sign = self._saving()
        if sign != self._sign:
            self._sign, self._since = sign, time.monotonic()
        return time.monotonic() - self._since > self._seconds


class _Ranks:
    """The processes of a job, and what has become of them."""

    def __init__(self, job: RankJob) -> None:
        self._job = job
        self._started: list[subprocess.Popen[bytes]] = []
        self._lifelines: list[int] = []
        self._exits: dict[int, Exit] = {}  # in the order in which they were seen

    def start(self) -> None:
        for rank in range(self._job.processes):
            # A rank is killed once nobody holds the other end of its pipe; see lifeline.py.
            end, mine = os.pipe()
            self._lifelines.append(mine)
            try:
                self._started.append(
                    subprocess.Popen(
                        self._job.command(end),
                        env=self._job.environment(rank),
                        pass_fds=[end, *self._job.handed],
                        start_new_session=True,  # a terminal's signals come from here, once
                    )
                )
            finally:
                os.close(end)

    def watch(self, signals: list[int]) -> RanksEnd:
        """Waits for all, or for the first that fails; passes on the first signal to stop."""
        while len(self._exits) < len(self._started):
            time.sleep(LOOK)
            self._look()
            if signals:
                return self._stop(signals)
            if self._failed():
                return self._end_others()
        return cause_of(list(self._exits.values()))

    def kill(self) -> None:
        for process in self._started:
            process.kill()
            process.wait()
        for lifeline in self._lifelines:
            os.close(lifeline)
        self._lifelines.clear()

    def _stop(self, signals: list[int]) -> RanksEnd:
        """Passes on the first of ``signals`` and gives the ranks time to save."""
        number = signal.Signals(signals.pop(0))
        self._send(number)
        patience = _Patience(SHUTDOWN_SECONDS, self._job.saving)
        while len(self._exits) < len(self._started):
            if patience.is_over():
                message = f"ranks {self._left()} had not ended {SHUTDOWN_SECONDS:g} s after {number.name}: killed"
                return RanksEnd(128 + number, f"{message}; --resume goes on from the newest checkpoint")
            time.sleep(LOOK)
            self._look()
        # A rank that cannot take the signal yet, since its interpreter is just starting, dies of it.
        if any(end.status == -number for end in self._exits.values()):
            return RanksEnd(RequeueError.exit_code, BEFORE_STEPS)
        return cause_of(list(self._exits.values()))

    def _end_others(self) -> RanksEnd:
        """Lets the cause of a failure show, and the others put away their files; whoever is left then is killed."""
        time.sleep(SETTLE)
        self._look()
        told = cause_of(list(self._exits.values()))
        stopped = [rank for rank in self._left() if _is_stopped(self._started[rank].pid)]
        seconds = SHUTDOWN_SECONDS if told.status == RequeueError.exit_code else GRACE
        patience = _Patience(seconds, self._job.saving)
        while len(self._exits) + len(stopped) < len(self._started) and not patience.is_over():
            time.sleep(LOOK)
            self._look()
        return replace(told, stopped=stopped)

    def _look(self) -> None:
        for rank in self._left():
            status = self._started[rank].poll()
            if status is not None:
                self._exits[rank] = Exit(rank, status)

    def _left(self) -> list[int]:
        return [rank for rank in range(len(self._started)) if rank not in self._exits]

    def _failed(self) -> bool:
        return any(end.status for end in self._exits.values())

    def _send(self, number: int) -> None:
        for rank in self._left():
            self._started[rank].send_signal(number)


def _is_stopped(process: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    return False
