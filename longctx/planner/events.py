"""Simulates operations on ranks and links against a clock, and replays plans on it.

A resource (a rank's compute stream, its NIC) does its operations in program order, each as soon as those that it waits
for have ended. Times come from a kernel table and bandwidths; nothing here is measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from longctx.planner.plan import Plan

Float64 = NDArray[np.float64]


@dataclass(frozen=True)
class Hardware:
    """What one server can do; the default is eight H100 as one tensor-parallel group.

    ``flops`` a second at full efficiency; ``bandwidth`` bytes/s into and out of it; ``memory`` bytes for what attention
    receives. ``tile``: the kernel's query rows, which a shorter task pays for all the same. ``backward``: backward
    attention over forward, 2.5 by count of matrix products. Default: 55% of 989 TF and 40 GB/s for each H100.
    """

    flops: float = 8 * 0.55 * 989e12
    bandwidth: float = 8 * 40e9
    memory: float = 8 * 20e9
    tile: int = 128
    backward: float = 2.5


@dataclass
class Operation:
    """Work that takes ``seconds`` on ``resource`` and waits until the operations numbered ``after`` have ended."""

    resource: str
    seconds: float
    after: Sequence[int] = field(default_factory=tuple)


def replay(operations: Sequence[Operation]) -> Float64:
    """Returns when each operation ends, in seconds, ``[N]``.

    One resource keeps the order of the list. A cycle is an assert.
    """
    queues: dict[str, list[int]] = {}
    for number, one in enumerate(operations):
        queues.setdefault(one.resource, []).append(number)
    waiting = [len(one.after) for one in operations]
    followers: list[list[int]] = [[] for _ in operations]
    for number, one in enumerate(operations):
        for before in one.after:
            followers[before].append(number)
    heads = dict.fromkeys(queues, 0)
    free = dict.fromkeys(queues, 0.0)
    ends = np.full(len(operations), np.nan)
    ready = list(queues)
    while ready:
        resource = ready.pop()
        queue = queues[resource]
        while heads[resource] < len(queue) and not waiting[queue[heads[resource]]]:
            number = queue[heads[resource]]
            one = operations[number]
            start = max([free[resource], *(float(ends[before]) for before in one.after)])
            ends[number] = free[resource] = start + one.seconds
            heads[resource] += 1
            for other in followers[number]:
                waiting[other] -= 1
                if not waiting[other] and operations[other].resource != resource:
                    ready.append(operations[other].resource)
    assert not np.isnan(ends).any(), "operations wait for each other"
    return ends


@dataclass(frozen=True, eq=False)
class ReplayedAttention:
    """How long one layer's forward attention takes under a plan, in seconds ``[W]``.

    ``compute`` and ``communication``: of each rank. ``seconds``: from the first send to the last return if nothing else
    hides the exchange. ``received``: bytes of Q, K and V that a server holds at once.
    """

    compute: Float64
    communication: Float64
    seconds: float
    received: Float64

    def hidden(self, window: float) -> bool:
        """Returns whether the busiest rank's exchange fits a window of ``window`` seconds of other work."""
        return bool(self.communication.max(initial=0.0) <= window)


def attention_seconds(plan: Plan, hardware: Hardware) -> Float64:
    """Returns the forward seconds of each server.

    It counts cells times ``4 heads head_dim`` operations, rows rounded up to tiles.
    """
    tasks = plan.tasks
    rows = tasks.q1 - tasks.q0
    padded = tasks.area * (-(-rows // hardware.tile) * hardware.tile / np.maximum(rows, 1))
    cells = np.bincount(tasks.server, weights=padded, minlength=plan.servers)
    return cells * 4 * plan.widths.heads * plan.widths.head_dim / plan.groups / hardware.flops


def replay_plan(plan: Plan, hardware: Hardware) -> ReplayedAttention:
    """Replays one layer: send Q and KV, compute when all have arrived, return O.

    NICs send and receive at once, one message at a time.
    """
    compute, away = attention_seconds(plan, hardware), 1 - np.eye(plan.servers)
    q, kv = (moves.matrix(plan.servers) * away / plan.groups for moves in (plan.q, plan.kv))
    there = q * plan.widths.row + kv * plan.widths.kv
    back = q.T * (plan.widths.row + plan.widths.lse)
    operations: list[Operation] = []

    def messages(volume: Float64, after: Sequence[Sequence[int]]) -> list[list[int]]:
        """Numbers of the arrivals at each rank: a message leaves its sender's NIC, then passes its receiver's."""
        arrived: list[list[int]] = [[] for _ in range(plan.servers)]
        world = plan.servers
        for hop in range(1, world):  # as a ring of shifts, so that no receiver is everybody's first
            for rank in range(world):
                dest = (rank + hop) % world
                if volume[rank, dest] > 0:
                    seconds = float(volume[rank, dest]) / hardware.bandwidth
                    operations.append(Operation(f"out {rank}", seconds, tuple(after[rank])))
                    # Cut through: receiving overlaps sending and ends no earlier.
                    operations.append(Operation(f"in {dest}", seconds, tuple(after[rank])))
                    arrived[dest] += [len(operations) - 2, len(operations) - 1]
        return arrived

    arrived = messages(there, [[] for _ in range(plan.servers)])
    first = len(operations)
    operations += [Operation(f"rank {rank}", float(compute[rank]), arrived[rank]) for rank in range(plan.servers)]
    messages(back, [[first + rank] for rank in range(plan.servers)])
    ends = replay(operations)
    both = there + back
    communication = np.maximum(both.sum(axis=0), both.sum(axis=1)) / hardware.bandwidth
    return ReplayedAttention(compute, communication, float(ends.max(initial=0.0)), there.sum(axis=0))
