"""Defines what can go wrong on a simulated cluster, each as its own type."""

from __future__ import annotations

import operator


class DeadlockError(RuntimeError):
    """Every rank waits and nothing is on its way.

    For every rank the message names the operation, group, peers, tag and sequence number that it waits for. It also
    names the line of the caller's code.
    """


class RankFailed(RuntimeError):  # noqa: N818 - reads as what happened
    """A rank raised; the others were stopped.

    The message begins with the rank's number and its traceback. The original exception is ``__cause__``.

    Attributes:
        rank: global rank that failed first (in the order of the baton).
    """

    def __init__(self, rank: int, message: str) -> None:
        super().__init__(message)
        self.rank = rank


class MismatchError(RuntimeError):
    """Two ranks disagree about one operation: another collective, another size, another dtype."""


class RankKilled(BaseException):
    """A fault plan killed this rank.

    It is no ``Exception``, so that ``except Exception`` in rank code can't survive it, as it can't a SIGKILL.
    ``finally`` clauses and ``__exit__`` do run, which SIGKILL would not allow.
    """


class Stopped(BaseException):
    """Ends a rank because another one failed, or because all of them are deadlocked."""


def whole(name: str, value: object) -> int:
    """Returns a whole number; raises ValueError for true, 2.7 or "2"."""
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise ValueError(f"{name} is {value!r}, must be a whole number such as 2") from None
