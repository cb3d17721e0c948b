# mypy: disable-error-code="override"
# torch's stubs give each method several overloads; one signature here takes what torch really passes.
"""Implements the process group of backend ``sim``: what torch 2.13 calls, under its names.

``torch.distributed`` calls these methods directly, functional collectives and DDP through C++. Both pass an
options object; a few callers give the root or the reduction itself. Ranks here are group ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from longctx.sim import collectives as co
from longctx.sim import ledger
from longctx.sim.group_member import GroupMember, Tensors
from longctx.sim.runtime import current_rank_context
from longctx.sim.tensors import check_contiguous, nbytes, reduction_kind
from longctx.sim.work import CoalescedWork, SimWork


class SimProcessGroup(dist.ProcessGroup):
    """One rank's end of one group, as torch calls it.

    Args:
        member: posts the operations.
        store: of the group.
    """

    supports_coalescing = False
    supports_splitting = False
    supports_shrinking = False
    supports_time_estimate = False

    def __init__(self, member: GroupMember, store: dist.Store) -> None:
        # The constructor that also takes the store can't be used by subclasses.
        super().__init__(member.position, member.size)  # type: ignore[call-arg]
        self._member = member
        self._store = store
        self._description = ""
        self._coalescing: list[SimWork] | None = None

    def allreduce(self, tensors: Tensors | torch.Tensor, opts: Any = None) -> SimWork:
        tensors = _listed(tensors)
        op = _reduction(opts)
        call = co.CollectiveCall("all_reduce", tensors, tensors, _op_name(op), _sizes(tensors))
        sent = ledger.all_reduce_bytes(self._member.position, self.size(), nbytes(tensors))
        return self._start(call, co.combine_all_reduce(op), sent, tensors)

    def allreduce_coalesced(self, tensors: Tensors, opts: Any = None) -> SimWork:
        return self.allreduce(tensors, opts)

    def reduce(self, tensors: Tensors | torch.Tensor, opts: Any = None) -> SimWork:
        tensors = _listed(tensors)
        op, root = _reduction(opts), _root(opts)
        outputs = tensors if root == self._member.position else []
        call = co.CollectiveCall(
            "reduce", tensors, outputs, f"{_op_name(op)} to rank {self._member.ranks[root]}", _sizes(tensors)
        )
        sent = ledger.reduce_bytes(self._member.position, self.size(), root, nbytes(tensors))
        return self._start(call, co.combine_reduce(op, root), sent, tensors)

    def broadcast(self, tensors: Tensors | torch.Tensor, opts: Any = None) -> SimWork:
        tensors = _listed(tensors)
        root = _root(opts)
        inputs, outputs = (tensors, []) if root == self._member.position else ([], tensors)
        check_contiguous("broadcast", outputs)
        call = co.CollectiveCall("broadcast", inputs, outputs, f"from rank {self._member.ranks[root]}", _sizes(tensors))
        sent = ledger.broadcast_bytes(self._member.position, self.size(), root, nbytes(tensors))
        return self._start(call, co.combine_broadcast(root), sent, tensors)

    def all_gather_single(self, output: torch.Tensor, input: torch.Tensor, opts: Any = None) -> SimWork:
        return self.all_gather_single_coalesced([output], [input], opts)

    def all_gather_single_coalesced(self, outputs: Tensors, inputs: Tensors, opts: Any = None) -> SimWork:
        for output, source in zip(outputs, inputs, strict=True):
            _check_ratio("all_gather", "output", output, "input", source, self.size())
        call = co.CollectiveCall("all_gather", list(inputs), list(outputs), "single", _sizes(inputs))
        sent = ledger.all_gather_bytes(self._member.position, [nbytes(inputs)] * self.size())
        return self._start(call, co.combine_all_gather_single, sent, outputs)

    def allgather(self, outputs: Sequence[Tensors], inputs: Tensors | torch.Tensor, opts: Any = None) -> SimWork:
        inputs = _listed(inputs)
        blocks = [tensor for tensors in outputs for tensor in _listed(tensors)]
        per_rank = len(inputs)
        if len(blocks) != self.size() * per_rank:
            raise ValueError(
                f"all_gather: {len(blocks)} outputs; need one per rank and input, {self.size() * per_rank}"
            )
        call = co.CollectiveCall("all_gather", inputs, blocks, "list", (inputs[0].dtype, per_rank))
        sizes = [nbytes(blocks[rank * per_rank : (rank + 1) * per_rank]) for rank in range(self.size())]
        sent = ledger.all_gather_bytes(self._member.position, sizes)
        return self._start(call, co.combine_all_gather, sent, blocks)

    def allgather_coalesced(self, outputs: Sequence[Tensors], inputs: Tensors, opts: Any = None) -> SimWork:
        return self.allgather(outputs, inputs, opts)

    def gather(self, outputs: Sequence[Tensors], inputs: Tensors, opts: Any = None) -> SimWork:
        root = _root(opts)
        inputs = _listed(inputs)
        blocks = _listed(outputs[0]) if root == self._member.position else []
        call = co.CollectiveCall("gather", inputs, blocks, f"to rank {self._member.ranks[root]}", _sizes(inputs))
        return self._start(call, co.combine_gather(root), [(root, nbytes(inputs))], blocks)

    def scatter(self, outputs: Tensors, inputs: Sequence[Tensors], opts: Any = None) -> SimWork:
        root = _root(opts)
        outputs = _listed(outputs)
        blocks = _listed(inputs[0]) if root == self._member.position else []
        call = co.CollectiveCall("scatter", blocks, outputs, f"from rank {self._member.ranks[root]}", _sizes(outputs))
        sent = [(rank, nbytes([block])) for rank, block in enumerate(blocks)]
        return self._start(call, co.combine_scatter(root), sent, outputs)

    def reduce_scatter_single(self, output: torch.Tensor, input: torch.Tensor, opts: Any = None) -> SimWork:
        return self.reduce_scatter_single_coalesced([output], [input], opts)

    def reduce_scatter_single_coalesced(self, outputs: Tensors, inputs: Tensors, opts: Any = None) -> SimWork:
        op = _reduction(opts)
        for output, source in zip(outputs, inputs, strict=True):
            _check_ratio("reduce_scatter", "input", source, "output", output, self.size())
        call = co.CollectiveCall(
            "reduce_scatter", list(inputs), list(outputs), f"single {_op_name(op)}", _sizes(inputs)
        )
        sent = ledger.reduce_scatter_bytes(self._member.position, [nbytes(outputs)] * self.size())
        return self._start(call, co.combine_reduce_scatter_single(op), sent, outputs)

    def reduce_scatter(self, outputs: Tensors, inputs: Sequence[Tensors], opts: Any = None) -> SimWork:
        op = _reduction(opts)
        blocks = _listed(inputs[0])
        call = co.CollectiveCall("reduce_scatter", blocks, list(outputs), f"list {_op_name(op)}", _sizes(blocks))
        sent = ledger.reduce_scatter_bytes(self._member.position, [nbytes([block]) for block in blocks])
        return self._start(call, co.combine_reduce_scatter(op), sent, outputs)

    def all_to_all_single(
        self,
        output: torch.Tensor,
        input: torch.Tensor,
        output_split_sizes: Sequence[int] | None = None,
        input_split_sizes: Sequence[int] | None = None,
        opts: Any = None,
    ) -> SimWork:
        check_contiguous("all_to_all", [output])
        sends = _element_splits("input", input, input_split_sizes, self.size())
        receives = _element_splits("output", output, output_split_sizes, self.size())
        call = co.CollectiveCall("all_to_all", [input], [output], "single", (input.dtype,), sends, receives)
        sent = [(rank, count * input.element_size()) for rank, count in enumerate(sends)]
        return self._start(call, co.combine_all_to_all_single, sent, [output])

    def alltoall(self, outputs: Tensors, inputs: Tensors, opts: Any = None) -> SimWork:
        call = co.CollectiveCall("all_to_all", list(inputs), list(outputs), "list", (inputs[0].dtype,))
        sent = [(rank, nbytes([tensor])) for rank, tensor in enumerate(inputs)]
        return self._start(call, co.combine_all_to_all, sent, outputs)

    def barrier(self, opts: Any = None) -> SimWork:
        return self._start(co.CollectiveCall("barrier", [], []), co.combine_nothing, [], [])

    def monitored_barrier(self, timeout: Any = None, wait_all_ranks: bool = False) -> None:
        self.barrier().wait()

    def send(self, tensors: Tensors, destination: int, tag: int = 0) -> SimWork:
        return self._posted(self._member.send(_single(tensors), destination, tag))

    def recv(self, tensors: Tensors, source: int, tag: int = 0) -> SimWork:
        return self._posted(self._member.receive(_single(tensors), source, tag))

    def recv_anysource(self, tensors: Tensors, tag: int = 0) -> SimWork:
        return self._posted(self._member.receive(_single(tensors), None, tag))

    # Names that older callers use.
    _allgather_base = all_gather_single
    allgather_into_tensor_coalesced = all_gather_single_coalesced  # type: ignore[assignment]
    _reduce_scatter_base = reduce_scatter_single  # type: ignore[assignment]
    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced  # type: ignore[assignment]
    alltoall_base = all_to_all_single  # type: ignore[assignment]

    def size(self) -> int:
        return self._member.size

    def rank(self) -> int:
        return self._member.position

    def name(self) -> str:
        return "sim"

    _get_backend_name = name

    @property
    def group_name(self) -> str:
        return self._member.name

    @property
    def group_desc(self) -> str:
        return self._description

    def _set_group_name(self, name: str) -> None:
        """The name was known from the start; a different one would break the pairing of ranks."""
        assert name == self._member.name

    def _set_group_desc(self, description: str) -> None:
        self._description = description
        self._member.describe("" if description == "undefined" else description)

    @property  # type: ignore[misc]
    def bound_device_id(self) -> None:
        return None

    @property
    def _device_types(self) -> list[torch.device]:
        return [torch.device("cpu")]

    def _get_backend(self, device: torch.device) -> SimProcessGroup:
        return self

    def supports_tensor_alloc(self, device: torch.device) -> bool:
        return False

    def get_group_store(self) -> dist.Store:
        return self._store

    def _get_sequence_number_for_group(self) -> int:
        return self._member.collectives

    def _set_sequence_number_for_group(self) -> None:
        """Counting starts at 0 by itself."""

    def _has_hooks(self) -> bool:
        return False

    def set_timeout(self, timeout: Any) -> None:
        """Does nothing, as there is no clock: a rank that would wait for ever is a deadlock, reported at once."""

    def shutdown(self) -> None:
        """Does nothing, as there is nothing to close."""

    def abort(self) -> None:
        """Does nothing, as there is nothing to close."""

    def _start_coalescing(self, device: torch.device) -> None:
        self._coalescing = []

    def _end_coalescing(self, device: torch.device) -> CoalescedWork:
        works, self._coalescing = self._coalescing or [], None
        return CoalescedWork(works)

    def __repr__(self) -> str:
        return f"SimProcessGroup({self._member.title}, rank {self._member.ranks[self._member.position]})"

    def _start(self, call: co.CollectiveCall, combine: co.Combine, sent: ledger.Sent, tensors: Tensors) -> SimWork:
        return self._posted(self._member.start_collective(call, combine, sent, tensors))

    def _posted(self, work: SimWork) -> SimWork:
        if self._coalescing is not None:
            self._coalescing.append(work)
        return work


def create_group(options: Any, backend_options: Any = None) -> SimProcessGroup:
    """Makes a group of backend ``sim`` when torch asks for one; it works only in a rank thread."""
    context = current_rank_context()
    if context is None:
        raise RuntimeError("backend 'sim' exists only inside the ranks of longctx.sim.Cluster.run()")
    # torch names no ranks when it makes the default group.
    ranks = tuple(options.global_ranks_in_group) or tuple(range(options.group_size))
    member = GroupMember(context, options.group_id, ranks, options.group_rank)
    return SimProcessGroup(member, options.store)


def _single(tensors: Tensors) -> torch.Tensor:
    (tensor,) = tensors
    return tensor


def _listed(tensors: Any) -> list[torch.Tensor]:
    return [tensors] if isinstance(tensors, torch.Tensor) else list(tensors)


def _reduction(options: Any) -> Any:
    """Returns the ReduceOp of an options object, or the ReduceOp given itself; a sum by default."""
    return dist.ReduceOp.SUM if options is None else getattr(options, "reduceOp", options)


def _op_name(op: Any) -> str:
    return reduction_kind(op).name.lower()


def _root(options: Any) -> int:
    """Returns the root of an options object, or the root given itself; group rank 0 by default."""
    return options or 0 if isinstance(options, int | None) else options.rootRank


def _sizes(tensors: Tensors) -> tuple[tuple[int, torch.dtype], ...]:
    return tuple((tensor.numel(), tensor.dtype) for tensor in tensors)


def _check_ratio(operation: str, big: str, many: torch.Tensor, small: str, one: torch.Tensor, size: int) -> None:
    check_contiguous(operation, [many, one])
    if many.numel() != size * one.numel() or many.dtype != one.dtype:
        raise ValueError(
            f"{operation}: {big} is {tuple(many.shape)} {many.dtype}, {small} {tuple(one.shape)} {one.dtype}; "
            f"in a group of {size} the {big} needs {size * one.numel()} elements of {one.dtype}"
        )


def _element_splits(which: str, tensor: torch.Tensor, rows: Sequence[int] | None, size: int) -> list[int]:
    """Returns elements per rank, from rows per rank; equal parts by default."""
    length = tensor.shape[0] if tensor.dim() else 1
    if not rows:
        if length % size:
            raise ValueError(f"all_to_all: {which} has {length} rows, not divisible by {size} ranks; give splits")
        rows = [length // size] * size
    if len(rows) != size or sum(rows) != length:
        raise ValueError(
            f"all_to_all: {which} splits {list(rows)} for {length} rows; need {size} numbers that add up to {length}"
        )
    elements = tensor[:1].numel() if length else 0
    return [count * elements for count in rows]
