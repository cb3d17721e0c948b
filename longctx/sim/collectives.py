"""Computes collectives: every rank of a group adds its call, and the last one to arrive computes all results.

Results are kept until each rank awaits its handle, and only then written into that rank's tensors. A program that
reads an output before it waits sees the old contents, as it may on a real network.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from longctx.sim.errors import MismatchError
from longctx.sim.tensors import copy_data, dtype_name, has_no_data, reduce_in_rank_order, shapes, without_dispatch_modes


@dataclass(slots=True)
class CollectiveCall:
    """What one rank brings to a collective.

    Attributes:
        operation: the ledger's name.
        inputs: tensors that this rank puts in.
        outputs: tensors that receive this rank's results, in the order of what ``combine`` returns.
        detail: what must agree besides the operation: "sum", "from rank 2".
        agreed: sizes and dtypes that must be the same on all ranks.
        send_splits, receive_splits: all_to_all only; elements for and from each rank of the group.
    """

    operation: str
    inputs: list[torch.Tensor]
    outputs: list[torch.Tensor]
    detail: str = ""
    agreed: tuple[object, ...] = ()
    send_splits: list[int] = field(default_factory=list)
    receive_splits: list[int] = field(default_factory=list)

    def describe(self) -> str:
        """Names operation, detail and tensors, such as "all_reduce (sum) of (4, 8) float32"."""
        detail = f" ({self.detail})" if self.detail else ""
        tensors = self.inputs or self.outputs
        what = ", ".join(str(shape) for shape in shapes(tensors))
        return f"{self.operation}{detail}" + (f" of {what} {dtype_name(tensors)}" if what else "")

    def matches(self, other: CollectiveCall) -> bool:
        """Returns whether both calls can be the same collective."""
        return (self.operation, self.detail, self.agreed) == (other.operation, other.detail, other.agreed)


# The calls of all ranks in order -> for each rank the new tensors for its outputs.
Combine = Callable[[Sequence[CollectiveCall]], list[list[torch.Tensor]]]


class PendingCollective:
    """One collective of one group that waits for the calls of all its ranks.

    Args:
        title: names the group and the sequence number: "group '0' of ranks (0, 1), sequence 3".
        ranks: global ranks of the group.
        combine: computes all results once every rank has arrived.
    """

    def __init__(self, title: str, ranks: tuple[int, ...], combine: Combine) -> None:
        self.title = title
        self.ranks = ranks
        self.combine = combine
        self.due = 0  # turn of the baton before which the results have not arrived
        self.complete = False
        self._first: tuple[int, CollectiveCall] | None = None
        self._arrived: dict[int, CollectiveCall] = {}
        self._results: list[list[torch.Tensor]] | None = None

    def check(self, member: int, call: CollectiveCall) -> None:
        """Raises MismatchError if this member (group rank) calls something else than the first one did."""
        if self._first is None:
            self._first = member, call
            return
        first_member, first_call = self._first
        if not call.matches(first_call):
            raise MismatchError(
                f"mismatched collectives in {self.title}: rank {self.ranks[member]} called {call.describe()}, "
                f"rank {self.ranks[first_member]} called {first_call.describe()}; "
                f"all ranks of a group must make the same calls in the same order"
            )

    def arrive(self, member: int, call: CollectiveCall) -> None:
        """Adds a member's call; the last one to come computes the results of all."""
        self._arrived[member] = call
        if len(self._arrived) < len(self.ranks):
            return
        calls = [self._arrived[rank] for rank in range(len(self.ranks))]
        if not any(has_no_data((*call.inputs, *call.outputs)) for call in calls):
            with without_dispatch_modes():
                self._results = self.combine(calls)
            self._check_results(calls)
        self.complete = True

    def deliver(self, member: int, call: CollectiveCall) -> None:
        """Writes the member's results into its output tensors."""
        if self._results is not None:
            with without_dispatch_modes():
                for output, result in zip(call.outputs, self._results[member], strict=True):
                    copy_data(output, result)

    def missing(self) -> list[int]:
        """Returns the global ranks that have not arrived."""
        return [rank for member, rank in enumerate(self.ranks) if member not in self._arrived]

    def _check_results(self, calls: Sequence[CollectiveCall]) -> None:
        assert self._results is not None
        for rank, call, results in zip(self.ranks, calls, self._results, strict=True):
            for position, (output, result) in enumerate(zip(call.outputs, results, strict=True)):
                if output.numel() != result.numel() or output.dtype != result.dtype:
                    raise MismatchError(
                        f"{call.describe()} in {self.title}: output {position} of rank {rank} is "
                        f"{tuple(output.shape)} {output.dtype}, but receives {result.numel()} elements of "
                        f"{result.dtype}; sizes and dtypes of sender and receiver must agree"
                    )


def combine_all_reduce(op: dist.ReduceOp) -> Combine:
    """Returns a function that reduces every tensor over ranks, for all of them."""

    def combine(calls: Sequence[CollectiveCall]) -> list[list[torch.Tensor]]:
        results = [reduce_in_rank_order(tensors, op) for tensors in zip(*(call.inputs for call in calls), strict=True)]
        return [results] * len(calls)

    return combine


def combine_reduce(op: dist.ReduceOp, root: int) -> Combine:
    """Returns a function that reduces every tensor over ranks, for the root."""
    combine_all = combine_all_reduce(op)

    def combine(calls: Sequence[CollectiveCall]) -> list[list[torch.Tensor]]:
        return [results if rank == root else [] for rank, results in enumerate(combine_all(calls))]

    return combine


def combine_all_gather_single(calls: Sequence[CollectiveCall]) -> list[list[torch.Tensor]]:
    """Concatenates inputs in rank order, one flat tensor per input, for all ranks."""
    results = [_flat_concatenation(tensors) for tensors in zip(*(call.inputs for call in calls), strict=True)]
    return [results] * len(calls)


def combine_all_gather(calls: Sequence[CollectiveCall]) -> list[list[torch.Tensor]]:
    """Gives all ranks the inputs of every rank in rank order, each its own tensor; sizes may differ."""
    results = [_snapshot(tensor) for call in calls for tensor in call.inputs]
    return [results] * len(calls)


def combine_gather(root: int) -> Combine:
    """Returns a function that gives the root the inputs of every rank, each its own tensor."""

    def combine(calls: Sequence[CollectiveCall]) -> list[list[torch.Tensor]]:
        return [results if rank == root else [] for rank, results in enumerate(combine_all_gather(calls))]

    return combine


def combine_reduce_scatter_single(op: dist.ReduceOp) -> Combine:
    """Returns a function that reduces each input over ranks and cuts it into equal parts, one per rank."""

    def combine(calls: Sequence[CollectiveCall]) -> list[list[torch.Tensor]]:
        sums = [
            reduce_in_rank_order([tensor.reshape(-1) for tensor in tensors], op).view(len(calls), -1)
            for tensors in zip(*(call.inputs for call in calls), strict=True)
        ]
        return [[total[rank] for total in sums] for rank in range(len(calls))]

    return combine


def combine_reduce_scatter(op: dist.ReduceOp) -> Combine:
    """Returns a function that reduces input number r of every rank for rank r; sizes may differ."""

    def combine(calls: Sequence[CollectiveCall]) -> list[list[torch.Tensor]]:
        return [[reduce_in_rank_order([call.inputs[rank] for call in calls], op)] for rank in range(len(calls))]

    return combine


def combine_broadcast(root: int) -> Combine:
    """Returns a function that gives the root's inputs to all other ranks."""

    def combine(calls: Sequence[CollectiveCall]) -> list[list[torch.Tensor]]:
        results = [_snapshot(tensor) for tensor in calls[root].inputs]
        return [[] if rank == root else results for rank in range(len(calls))]

    return combine


def combine_scatter(root: int) -> Combine:
    """Returns a function that gives input number r of the root to rank r."""

    def combine(calls: Sequence[CollectiveCall]) -> list[list[torch.Tensor]]:
        return [[_snapshot(tensor)] for tensor in calls[root].inputs]

    return combine


def combine_all_to_all_single(calls: Sequence[CollectiveCall]) -> list[list[torch.Tensor]]:
    """Concatenates split r of every rank's input in rank order, for rank r."""
    for source, sender in enumerate(calls):
        for destination, receiver in enumerate(calls):
            if sender.send_splits[destination] != receiver.receive_splits[source]:
                raise MismatchError(
                    f"all_to_all: group rank {source} sends {sender.send_splits[destination]} elements to group "
                    f"rank {destination}, which expects {receiver.receive_splits[source]}; "
                    f"input and output splits of a pair must agree"
                )
    pieces = [call.inputs[0].reshape(-1).split(call.send_splits) for call in calls]
    return [[_flat_concatenation([piece[rank] for piece in pieces])] for rank in range(len(calls))]


def combine_all_to_all(calls: Sequence[CollectiveCall]) -> list[list[torch.Tensor]]:
    """Gives rank r the input number r of every rank in rank order, each its own tensor."""
    return [[_snapshot(call.inputs[rank]) for call in calls] for rank in range(len(calls))]


def combine_nothing(calls: Sequence[CollectiveCall]) -> list[list[torch.Tensor]]:
    """Returns the results of a barrier, which has none."""
    return [[] for _ in calls]


def _snapshot(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().clone(memory_format=torch.contiguous_format)


def _flat_concatenation(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors])
