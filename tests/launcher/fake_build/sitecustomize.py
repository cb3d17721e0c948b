"""A composition root without a trainer, for processes started by tests: the run's name says what happens."""

import contextlib
import os
import signal
import sys
import time
import types
from pathlib import Path


def preflight(config, resume):
    from longctx.errors import DataError

    if config.run.name == "bad-data":
        raise DataError("corpus.bin: document 3, offset 17: id 999 is outside the vocabulary of 256")


def run_rank(config, resume, store):
    from longctx.errors import DataError, RequeueError

    rank, folder = int(os.environ["RANK"]), Path(config.run.dir)
    (folder / f"started-{rank}").write_text(
        f"{os.environ['WORLD_SIZE']} {resume is not None} {os.environ['OMP_NUM_THREADS']}"
    )
    name = config.run.name
    if name == "data-on-rank-1":
        print("step 1/1", flush=True)
        if rank == 1:
            raise DataError("corpus.bin: document 5 is truncated")
        time.sleep(60)
        (folder / "slept").touch()
    if name == "crash-on-rank-0" and rank == 0:
        raise ZeroDivisionError("a bug")
    if name.startswith("killed-rank-1"):
        connection = folder / "connection"  # a pipe ends with the process that writes to it, as a socket does
        with contextlib.suppress(FileExistsError):
            os.mkfifo(connection)
        if rank == 1:
            with connection.open("w"):
                os.kill(os.getpid(), getattr(signal, name.rpartition("-")[2]))
        connection.read_text()  # returns once the peer is gone; torchrun may then see both ends at one look
        raise ConnectionError("the peer is gone")
    if name == "wait":
        from longctx.launcher.stopping import listening

        with listening(print) as requests, requests.working():
            (folder / f"ready-{rank}").touch()
            while not requests.asked():
                time.sleep(0.02)
        raise RequeueError("stopped at step 7; checkpoint step-7 is committed")


def run_sim(config, resume):
    (Path(config.run.dir) / "simulated").write_text(str(config.parallel.sp))


fake = types.ModuleType("longctx.launcher.build")
fake.preflight, fake.run_rank, fake.run_sim = preflight, run_rank, run_sim
sys.modules["longctx.launcher.build"] = fake
