"""Carries the reason of a rank's end to the command that started it: a small file per failed rank.

torchrun reports that a process failed, not why or with which of our exit codes. So a rank that fails leaves
its message, its exit code and the time in a file; the command prints the first failure alone.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from longctx.errors import LongctxError, NumericsError
from longctx.launcher import streams
from longctx.rules import redacted

# A crash that no rule foresaw ends with the code of a crash loop: starting again would crash again.
CRASH = NumericsError.exit_code
INTERRUPTED = 130  # what shells report for Ctrl-C


@dataclass(frozen=True)
class Failure:
    """Why one rank ended."""

    rank: int
    seconds: float  # on the machine's clock: the earliest failure is the cause, later ones follow from it
    exit_code: int
    message: str
    traceback: str | None  # None for an error that its message explains
    where: str  # its process and machine: ranks are numbers of the run alone


def run_recorded(rank: int, folder: Path | None, work: Callable[[], None]) -> int:
    """Does ``work`` as ``rank`` and returns the exit code; a failure goes to ``folder``, without one to stderr."""
    try:
        work()
        return 0
    except LongctxError as error:
        return record(rank, folder, error)
    except Exception as error:
        return _leave(
            Failure(rank, time.time(), CRASH, _crash(error), redacted(traceback.format_exc()), _where()), folder
        )


def record(rank: int, folder: Path | None, error: LongctxError) -> int:
    """Leaves an error as the reason why ``rank`` ends, in ``folder`` or on stderr; returns its exit code."""
    return _leave(Failure(rank, time.time(), error.exit_code, redacted(str(error)), None, _where()), folder)


def report(failure: Failure) -> None:
    """Prints a failure for the user: one message, and the traceback of what no rule foresaw."""
    if failure.traceback is not None:
        print(failure.traceback.rstrip(), file=sys.stderr)
        print(f"longctx: rank {failure.rank} ({failure.where}) crashed: {failure.message}", file=sys.stderr)
    else:
        print(f"longctx: {failure.message}", file=sys.stderr)


def first_failure(folder: Path) -> Failure | None:
    """Returns the failure that came first, if any rank left one."""
    failures = [Failure(**json.loads(file.read_text(encoding="utf-8"))) for file in folder.glob("rank-*.json")]
    return min(failures, key=lambda failure: failure.seconds, default=None)


def error_of(failure: Failure) -> LongctxError:
    """Returns a failure that its message explains as an error that ends with its exit code."""
    return next(kind for kind in LongctxError.__subclasses__() if kind.exit_code == failure.exit_code)(failure.message)


def clear_failures(folder: Path) -> None:
    """Removes the failures of an earlier start."""
    folder.mkdir(exist_ok=True)
    for file in folder.glob("rank-*.json"):
        file.unlink()


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the first failure in the given folder and returns its exit code; 0 when no rank left one."""
    parser = argparse.ArgumentParser(prog="python -m longctx.launcher.failures", description=main.__doc__)
    parser.add_argument("folder", type=Path)
    failure = first_failure(parser.parse_args(argv).folder)
    if failure is None:
        return 0
    report(failure)
    return failure.exit_code


def _where() -> str:
    return f"process {os.getpid()} on {platform.node()}"


def _crash(error: Exception) -> str:
    return redacted(f"{type(error).__name__}: {error}")


def _leave(failure: Failure, folder: Path | None) -> int:
    if folder is None:
        report(failure)
    else:
        _write(failure, folder)
    return failure.exit_code


def _write(failure: Failure, folder: Path) -> None:
    unfinished = folder / f".rank-{failure.rank}.new"
    unfinished.write_text(json.dumps(asdict(failure)), encoding="utf-8")
    unfinished.replace(folder / f"rank-{failure.rank}.json")


if __name__ == "__main__":
    streams.protect()
    sys.exit(main())
