"""Ends a rank with the process that started it, so that none trains on unseen.

A rank whose launcher is gone stops at once and saves nothing. What killed the launcher wants the machine back, a save
needs all ranks, and a new start may be writing the same directory already. The last checkpoint stands.
"""

from __future__ import annotations

import fcntl
import os
import select
import signal
import threading

PARENT_LOOK = 0.5  # seconds between two looks at who the parent is


def end_with_launcher(lifeline: int) -> None:
    """Makes the kernel kill this process once the other end of the pipe ``lifeline`` is closed.

    Nothing of this process has to run for that: it may be stopped, or busy in a call that never returns.
    """
    os.set_inheritable(lifeline, False)
    fcntl.fcntl(lifeline, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(lifeline, fcntl.F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(lifeline, fcntl.F_SETFL, fcntl.fcntl(lifeline, fcntl.F_GETFL) | os.O_ASYNC)
    # It may have been closed before the kernel was asked to tell.
    look = select.poll()
    look.register(lifeline, 0)
    if look.poll(0):
        os.kill(os.getpid(), signal.SIGKILL)


def end_with_parent() -> None:
    """Kills this process once its parent has gone: the agent of torchrun, or Slurm's daemon of the step."""
    # The kernel's own notice (PR_SET_PDEATHSIG) also comes when the thread that started us ends, which means nothing.
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            pause.wait(PARENT_LOOK)
        os.kill(os.getpid(), signal.SIGKILL)

    pause = threading.Event()
    threading.Thread(target=watch, name="parent", daemon=True).start()
