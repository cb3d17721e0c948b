"""Defines failures on purpose as plain data, and matches operations to them."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch

from longctx.sim.errors import whole

KINDS = ("kill", "hang", "drop", "delay", "corrupt")
OPERATIONS = (
    "all_gather",
    "all_reduce",
    "all_to_all",
    "barrier",
    "broadcast",
    "gather",
    "recv",
    "reduce",
    "reduce_scatter",
    "scatter",
    "send",
)
ANY_OPERATION = "*"
_NOTHING_TO_LOSE = {"drop": ("recv",), "corrupt": ("recv", "barrier"), "kill": (), "hang": (), "delay": ()}


@dataclass(frozen=True)
class Fault:
    """One thing that goes wrong, once.

    Attributes:
        kind: one of
            "kill": the rank raises RankKilled;
            "hang": the rank never goes on;
            "drop": what the rank sends or puts in never arrives;
            "delay": it arrives ``turns`` hand-overs of the baton later;
            "corrupt": one bit of it is flipped on the way, and the sender's own tensor stays intact.
        rank: global rank that the fault strikes.
        operation: name as in the ledger, or "recv"; "*" for any that the kind applies to.
        step: the rank's step, 0 until ``mark_step`` says otherwise.
        occurrence: 0 for the first such operation of the step, 1 for the second, ...
        turns: for "delay". If no rank can go on, time skips ahead: a delay alone is no deadlock.
        element, bit: for "corrupt": an element of the first non-empty tensor, and one of its bits. Both count from the
            low end or, if negative, from the high end. The default is the highest exponent bit.
    """

    kind: str
    rank: int
    operation: str = ANY_OPERATION
    step: int = 0
    occurrence: int = 0
    turns: int = 10
    element: int = 0
    bit: int = -2

    def __post_init__(self) -> None:
        _check_choice("fault kind", self.kind, KINDS)
        _check_choice("operation of a fault", self.operation, (ANY_OPERATION, *OPERATIONS))
        if self.operation in _NOTHING_TO_LOSE[self.kind]:
            raise ValueError(
                f"{self.kind!r} at {self.operation!r}: that operation sends no data; name the sender's operation, "
                f"for a lost or corrupted message 'send' on the sending rank"
            )
        for name in ("rank", "step", "occurrence", "turns", "element", "bit"):
            whole(f"{name} of a fault", getattr(self, name))
        for name in ("rank", "step", "occurrence", "turns"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} of a fault is {getattr(self, name)}, must not be negative; at least 0")

    def applies_to(self, operation: str) -> bool:
        """Returns whether the fault may strike this operation, place and time aside."""
        if self.operation != ANY_OPERATION:
            return operation == self.operation
        return operation not in _NOTHING_TO_LOSE[self.kind]


@dataclass(frozen=True)
class FaultPlan:
    """All faults of a run, in the order in which they are looked up."""

    faults: tuple[Fault, ...] = ()

    def __init__(self, faults: Iterable[Fault] = ()) -> None:
        object.__setattr__(self, "faults", tuple(faults))

    def check_world(self, world_size: int) -> None:
        """Raises ValueError if a fault names a rank that the cluster doesn't have."""
        for fault in self.faults:
            if fault.rank >= world_size:
                raise ValueError(
                    f"fault at rank {fault.rank}: the cluster has ranks 0 to {world_size - 1}; "
                    f"the nearest is {world_size - 1}"
                )


@dataclass
class FaultInjector:
    """Finds the fault, if any, that strikes an operation, and remembers which ones struck."""

    plan: FaultPlan
    fired: list[Fault] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._by_rank: dict[int, list[tuple[int, Fault]]] = {}
        self._seen = [0] * len(self.plan.faults)  # matching operations so far
        for index, fault in enumerate(self.plan.faults):
            self._by_rank.setdefault(fault.rank, []).append((index, fault))

    def strike(self, rank: int, step: int, operation: str) -> Fault | None:
        """Returns the fault for this operation of this rank, if any, and counts the operation."""
        struck = None
        for index, fault in self._by_rank.get(rank, ()):
            if fault.step == step and fault.applies_to(operation):
                self._seen[index] += 1
                if self._seen[index] == fault.occurrence + 1 and struck is None:
                    struck = fault
                    self.fired.append(fault)
        return struck


def with_flipped_bit(tensor: torch.Tensor, fault: Fault) -> torch.Tensor:
    """Returns a contiguous copy of ``tensor`` with the fault's bit flipped."""
    copy = tensor.detach().clone(memory_format=torch.contiguous_format)
    octets = copy.view(-1).view(torch.uint8)
    bits_per_element = 8 * copy.element_size()
    position = (fault.element % copy.numel()) * bits_per_element + fault.bit % bits_per_element
    octets[position // 8] ^= 1 << (position % 8)  # little-endian, as all machines that torch supports
    return copy


def _check_choice(what: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        nearest = difflib.get_close_matches(value, choices, n=1, cutoff=0.0)[0]
        raise ValueError(f"{what} {value!r} must be one of {', '.join(choices)}; the nearest is {nearest!r}")
