"""Passes every frame on after a fixed time: links with latency where the kernel has no netem.

``python -m benchmarks.hosts.late_switch SECONDS PORT...`` makes a TAP device for each port in its network namespace,
says ``ready``, and passes frames between them, each ``SECONDS`` after it came. It ends with its standard input, so that
it outlives nobody, and its devices end with it. One thread of Python: for links that carry few bytes.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import struct
import sys
import time
from collections import deque
from typing import NamedTuple

TUN = "/dev/net/tun"
TUNSETIFF = 0x400454CA
IFF_TAP, IFF_NO_PI = 0x0002, 0x1000
LARGEST = 1 << 16  # bytes of a frame
ADDRESS = 6  # bytes of a hardware address; a frame starts with its receiver's, then its sender's


class Frame(NamedTuple):
    """Holds one Ethernet frame on its way, and when it is due."""

    due: float
    port: int
    content: bytes


def open_tap(name: str) -> int:
    """Opens a file that reads what goes out of the device ``name`` and writes what comes into it."""
    tap = os.open(TUN, os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(tap, TUNSETIFF, struct.pack("16sH22x", name.encode(), IFF_TAP | IFF_NO_PI))
    return tap


def serve(taps: list[int], seconds: float, until: int) -> None:
    """Passes frames between the files ``taps`` until ``until`` has something to read, or has ended."""
    waiting: deque[Frame] = deque()  # in order of time, for all wait equally long
    known: dict[bytes, int] = {}
    while True:
        rest = max(0.0, waiting[0].due - time.monotonic()) if waiting else None
        readable, _, _ = select.select([*taps, until], [], [], rest)
        if until in readable:
            return
        for port, tap in enumerate(taps):
            if tap in readable:
                waiting.extend(Frame(time.monotonic() + seconds, port, content) for content in _read(tap))
        while waiting and waiting[0].due <= time.monotonic():
            frame = waiting.popleft()
            receiver, sender = frame.content[:ADDRESS], frame.content[ADDRESS : 2 * ADDRESS]
            known[sender] = frame.port
            ports = [known[receiver]] if receiver in known else range(len(taps))
            for port in ports:
                if port != frame.port:
                    _write(taps[port], frame.content)


def _read(tap: int) -> list[bytes]:
    frames = []
    while True:
        try:
            frames.append(os.read(tap, LARGEST))
        except BlockingIOError:
            return frames


def _write(tap: int, content: bytes) -> None:
    # A device that is full or not up loses frames, as any network does; TCP sends them again.
    with contextlib.suppress(OSError):
        os.write(tap, content)


def raise_priority() -> None:
    """Moves this process ahead of others on a busy machine, where that is allowed.

    A frame that waits for a core is late.
    """
    with contextlib.suppress(PermissionError):
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))


def main(words: list[str]) -> None:
    seconds, names = float(words[0]), words[1:]
    taps = [open_tap(name) for name in names]
    raise_priority()
    print("ready", flush=True)
    serve(taps, seconds, sys.stdin.fileno())


if __name__ == "__main__":
    main(sys.argv[1:])
