"""A handful of Gloo processes on this machine for one job, which meet by a file and answer by files."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from longctx.errors import NumericsError
from longctx.launcher.env import share_cores

TIMEOUT = 600.0  # seconds that a whole job may take


@dataclass(frozen=True)
class Workers:
    """How ranks are run. ``python``: the interpreter. ``limit``: seconds for the whole job. ``within``: by rank, the
    words before the command, such as those that run it in a network namespace."""

    python: str = sys.executable
    limit: float = TIMEOUT
    within: Sequence[Sequence[str]] = ()


def run_gloo(module: str, job: str, world: int, folder: Path, workers: Workers = Workers()) -> None:
    """Runs ``python -m module JOB FOLDER RANK WORLD`` on ``world`` processes and waits for them.

    Answers are files: what other packages print does not mix with this command's output. Raises NumericsError with
    the last line that the first failing rank wrote.
    """
    with unwinding():
        _run(module, job, world, folder, workers)


def _run(module: str, job: str, world: int, folder: Path, workers: Workers) -> None:
    share_cores(world)
    command = [workers.python, "-m", module, job, str(folder)]
    before = workers.within or [()] * world
    started: list[subprocess.Popen[bytes]] = []
    try:
        for rank in range(world):
            words = [*before[rank], *command, str(rank), str(world)]
            started.append(subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE))
        complaints = [worker.communicate(timeout=workers.limit)[1] for worker in started]
    finally:
        for worker in started:
            worker.kill()
            worker.wait()
    for rank, worker in enumerate(started):
        if worker.returncode:
            last = complaints[rank].decode(errors="replace").strip().splitlines()[-1:]
            raise NumericsError(f"rank {rank} of {module} ended with {worker.returncode}: {' '.join(last)}")


@contextmanager
def unwinding() -> Iterator[None]:
    """Meanwhile a request to stop (SIGTERM) unwinds like Ctrl-C, so that nothing that was started outlives it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, _stop)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGTERM) is _stop:
            signal.signal(signal.SIGTERM, before)


def _stop(*_: object) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second request must not interrupt the unwinding
    sys.exit(128 + signal.SIGTERM)


@contextmanager
def gloo_rank(words: Sequence[str], pinned: bool = False) -> Iterator[tuple[Any, Path, int]]:
    """A process that ``run_gloo`` started, in the default process group: its job, the folder for answers, its rank.

    ``pinned``: to a core of its own, where there are as many as ranks.
    """
    job, folder, rank, world = json.loads(words[0]), Path(words[1]), int(words[2]), int(words[3])
    cores = sorted(os.sched_getaffinity(0))
    if pinned and len(cores) >= world:
        os.sched_setaffinity(0, {cores[rank]})
    join(folder, rank, world, "gloo")
    yield job, folder, rank
    dist.barrier()
    dist.destroy_process_group()


def join(folder: Path, rank: int, world: int, backend: str) -> torch.device:
    """The default process group over Gloo or NCCL; returns the rank's device, under NCCL the one of its number."""
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
