"""The process group of backend ``sim``: what torch calls, in the names that torch 2.13 uses.

``torch.distributed`` calls these methods directly, functional collectives and DDP through C++. Both accept an
options object; a few callers give the root or the reduction itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch._C import _distributed_c10d as c10d

from longctx.sim import collectives as co
from longctx.sim import ledger
from longctx.sim.faults import Fault, corrupted
from longctx.sim.messages import Message, Receive
from longctx.sim.runtime import Seat, current_seat
from longctx.sim.tensors import dtype_name, has_no_numbers, nbytes, reduction_kind, shapes, unobserved
from longctx.sim.trace import Event
from longctx.sim.work import BUFFERED_SEND, Awaited, AwaitedMeeting, AwaitedReceive, CoalescedWork, SimWork

Tensors = Sequence[torch.Tensor]


class SimProcessGroup(dist.ProcessGroup):
    """One rank's end of one group.

    Args:
        seat: the rank that owns this object.
        store: of the group.
        name: c10d's unique name of the group.
        ranks: global ranks of the group.
        member: this rank's position in ``ranks``.
    """

    supports_coalescing = False
    supports_splitting = False
    supports_shrinking = False
    supports_time_estimate = False

    def __init__(self, seat: Seat, store: dist.Store, name: str, ranks: tuple[int, ...], member: int) -> None:
        super().__init__(member, len(ranks))
        self._seat = seat
        self._store = store
        self._ranks = ranks
        self._member = member
        self._name = name
        self._description = "undefined"
        self._title = f"group {name!r} of ranks {list(ranks)}"
        self._key = (name, ranks)
        self._sequence = 0
        self._coalescing: list[SimWork] | None = None

    def allreduce(self, tensors: Tensors | torch.Tensor, opts: Any = c10d.AllreduceOptions()) -> SimWork:
        tensors = _listed(tensors)
        op = _reduction(opts)
        call = co.Call("all_reduce", tensors, tensors, _op_name(op), _sizes(tensors))
        sent = ledger.all_reduce_bytes(self._member, self.size(), nbytes(tensors))
        return self._meet(call, co.combine_all_reduce(op), sent, tensors)

    def allreduce_coalesced(self, tensors: Tensors, opts: Any = c10d.AllreduceCoalescedOptions()) -> SimWork:
        return self.allreduce(tensors, opts)

    def reduce(self, tensors: Tensors | torch.Tensor, opts: Any = c10d.ReduceOptions()) -> SimWork:
        tensors = _listed(tensors)
        op, root = _reduction(opts), _root(opts)
        outputs = tensors if root == self._member else []
        call = co.Call("reduce", tensors, outputs, f"{_op_name(op)} to rank {self._ranks[root]}", _sizes(tensors))
        sent = ledger.reduce_bytes(self._member, self.size(), root, nbytes(tensors))
        return self._meet(call, co.combine_reduce(op, root), sent, tensors)

    def broadcast(self, tensors: Tensors | torch.Tensor, opts: Any = c10d.BroadcastOptions()) -> SimWork:
        tensors = _listed(tensors)
        root = _root(opts)
        inputs, outputs = (tensors, []) if root == self._member else ([], tensors)
        _check_contiguous("broadcast", outputs)
        call = co.Call("broadcast", inputs, outputs, f"from rank {self._ranks[root]}", _sizes(tensors))
        sent = ledger.broadcast_bytes(self._member, self.size(), root, nbytes(tensors))
        return self._meet(call, co.combine_broadcast(root), sent, tensors)

    def all_gather_single(self, output: torch.Tensor, input: torch.Tensor, opts: Any = None) -> SimWork:
        return self.all_gather_single_coalesced([output], [input], opts)

    def all_gather_single_coalesced(self, outputs: Tensors, inputs: Tensors, opts: Any = None) -> SimWork:
        for output, input in zip(outputs, inputs, strict=True):
            _check_ratio("all_gather", "output", output, "input", input, self.size())
        call = co.Call("all_gather", list(inputs), list(outputs), "single", _sizes(inputs))
        sent = ledger.all_gather_bytes(self._member, [nbytes(inputs)] * self.size())
        return self._meet(call, co.combine_all_gather_single, sent, outputs)

    def allgather(self, outputs: Sequence[Tensors], inputs: Tensors | torch.Tensor, opts: Any = None) -> SimWork:
        inputs = _listed(inputs)
        blocks = [tensor for tensors in outputs for tensor in _listed(tensors)]
        per_rank = len(inputs)
        if len(blocks) != self.size() * per_rank:
            raise ValueError(f"all_gather: {len(blocks)} outputs; need one per rank and input, {self.size() * per_rank}")
        call = co.Call("all_gather", inputs, blocks, "list", (inputs[0].dtype, per_rank))
        sizes = [nbytes(blocks[rank * per_rank : (rank + 1) * per_rank]) for rank in range(self.size())]
        sent = ledger.all_gather_bytes(self._member, sizes)
        return self._meet(call, co.combine_all_gather, sent, blocks)

    def allgather_coalesced(self, outputs: Sequence[Tensors], inputs: Tensors, opts: Any = None) -> SimWork:
        return self.allgather(outputs, inputs, opts)

    def gather(self, outputs: Sequence[Tensors], inputs: Tensors, opts: Any = c10d.GatherOptions()) -> SimWork:
        root = _root(opts)
        inputs = _listed(inputs)
        blocks = _listed(outputs[0]) if root == self._member else []
        call = co.Call("gather", inputs, blocks, f"to rank {self._ranks[root]}", _sizes(inputs))
        return self._meet(call, co.combine_gather(root), [(root, nbytes(inputs))], blocks)

    def scatter(self, outputs: Tensors, inputs: Sequence[Tensors], opts: Any = c10d.ScatterOptions()) -> SimWork:
        root = _root(opts)
        outputs = _listed(outputs)
        blocks = _listed(inputs[0]) if root == self._member else []
        call = co.Call("scatter", blocks, outputs, f"from rank {self._ranks[root]}", _sizes(outputs))
        sent = [(rank, nbytes([block])) for rank, block in enumerate(blocks)]
        return self._meet(call, co.combine_scatter(root), sent, outputs)

    def reduce_scatter_single(self, output: torch.Tensor, input: torch.Tensor, opts: Any = None) -> SimWork:
        return self.reduce_scatter_single_coalesced([output], [input], opts)

    def reduce_scatter_single_coalesced(self, outputs: Tensors, inputs: Tensors, opts: Any = None) -> SimWork:
        op = _reduction(opts)
        for output, input in zip(outputs, inputs, strict=True):
            _check_ratio("reduce_scatter", "input", input, "output", output, self.size())
        call = co.Call("reduce_scatter", list(inputs), list(outputs), f"single {_op_name(op)}", _sizes(inputs))
        sent = ledger.reduce_scatter_bytes(self._member, [nbytes(outputs)] * self.size())
        return self._meet(call, co.combine_reduce_scatter_single(op), sent, outputs)

    def reduce_scatter(self, outputs: Tensors, inputs: Sequence[Tensors], opts: Any = None) -> SimWork:
        op = _reduction(opts)
        blocks = _listed(inputs[0])
        call = co.Call("reduce_scatter", blocks, list(outputs), f"list {_op_name(op)}", _sizes(blocks))
        sent = ledger.reduce_scatter_bytes(self._member, [nbytes([block]) for block in blocks])
        return self._meet(call, co.combine_reduce_scatter(op), sent, outputs)

    def all_to_all_single(
        self,
        output: torch.Tensor,
        input: torch.Tensor,
        output_split_sizes: Sequence[int] | None = None,
        input_split_sizes: Sequence[int] | None = None,
        opts: Any = None,
    ) -> SimWork:
        _check_contiguous("all_to_all", [output])
        sends = _element_splits("input", input, input_split_sizes, self.size())
        receives = _element_splits("output", output, output_split_sizes, self.size())
        call = co.Call("all_to_all", [input], [output], "single", (input.dtype,), sends, receives)
        sent = [(rank, count * input.element_size()) for rank, count in enumerate(sends)]
        return self._meet(call, co.combine_all_to_all_single, sent, [output])

    def alltoall(self, outputs: Tensors, inputs: Tensors, opts: Any = None) -> SimWork:
        call = co.Call("all_to_all", list(inputs), list(outputs), "list", (inputs[0].dtype,))
        sent = [(rank, nbytes([tensor])) for rank, tensor in enumerate(inputs)]
        return self._meet(call, co.combine_all_to_all, sent, outputs)

    def barrier(self, opts: Any = None) -> SimWork:
        return self._meet(co.Call("barrier", [], []), co.combine_nothing, [], [])

    def monitored_barrier(self, timeout: Any = None, wait_all_ranks: bool = False) -> None:
        self.barrier().wait()

    def send(self, tensors: Tensors, destination: int, tag: int = 0) -> SimWork:
        (tensor,) = tensors
        _check_contiguous("send", tensors)
        seat, office = self._seat, self._seat.runtime.post_office(self._key)
        fault = seat.enter("send")
        sequence = office.next_sequence("send", self._member, destination, tag)
        post = self._post("send", tensors, [(destination, nbytes(tensors))], (self._ranks[destination],), tag, sequence)
        message = Message(self._member, tag, tensor.numel(), tensor.dtype, None, sequence, self._due(fault))
        if not has_no_numbers(tensors):
            with unobserved():
                flip = fault is not None and fault.kind == "corrupt" and tensor.numel()
                message.payload = corrupted(tensor, fault) if flip else tensor.detach().clone().view(-1)
        if fault is None or fault.kind != "drop":
            office.send(destination, message)
        return self._work(BUFFERED_SEND, tensors, post)

    def recv(self, tensors: Tensors, source: int, tag: int = 0) -> SimWork:
        return self._receive(tensors, source, tag)

    def recv_anysource(self, tensors: Tensors, tag: int = 0) -> SimWork:
        return self._receive(tensors, None, tag)

    _allgather_base = all_gather_single
    allgather_into_tensor_coalesced = all_gather_single_coalesced
    _reduce_scatter_base = reduce_scatter_single
    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced
    alltoall_base = all_to_all_single

    def size(self) -> int:
        return len(self._ranks)

    def rank(self) -> int:
        return self._member

    def name(self) -> str:
        return "sim"

    getBackendName = name
    _get_backend_name = name

    @property
    def group_name(self) -> str:
        return self._name

    pg_name = group_name

    @property
    def group_desc(self) -> str:
        return self._description

    def _set_group_name(self, name: str) -> None:
        self._name = name

    def _set_group_desc(self, description: str) -> None:
        self._description = description
        self._title = f"group {self._name!r} ({description}) of ranks {list(self._ranks)}"

    @property
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
        return self._sequence

    def _set_sequence_number_for_group(self) -> None:
        """Counting starts at 0 by itself."""

    def _has_hooks(self) -> bool:
        return False

    def set_timeout(self, timeout: Any) -> None:
        """There is no clock; a rank that would wait for ever is a deadlock and noticed at once."""

    def shutdown(self) -> None:
        """Nothing to close."""

    def abort(self) -> None:
        """Nothing to close."""

    def _start_coalescing(self, device: torch.device) -> None:
        self._coalescing = []

    def _end_coalescing(self, device: torch.device) -> CoalescedWork:
        works, self._coalescing = self._coalescing or [], None
        return CoalescedWork(works)

    def __repr__(self) -> str:
        return f"SimProcessGroup({self._title}, rank {self._ranks[self._member]})"

    def _meet(self, call: co.Call, combine: co.Combine, sent: ledger.Sent, tensors: Tensors) -> SimWork:
        """Join this group's next collective."""
        seat, runtime = self._seat, self._seat.runtime
        _check_contiguous(call.operation, call.inputs)
        fault = seat.enter(call.operation)
        sequence, self._sequence = self._sequence, self._sequence + 1
        others = self._ranks[: self._member] + self._ranks[self._member + 1 :]
        post = self._post(call.operation, call.inputs, sent, others, 0, sequence)
        if fault is not None and fault.kind == "corrupt":
            with unobserved():
                call.inputs = _first_corrupted(call.inputs, fault)
        key = self._key, sequence
        meeting = runtime.meetings.get(key)
        if meeting is None:
            meeting = co.Meeting(f"{self._title}, sequence {sequence}", self._ranks, combine)
            runtime.meetings[key] = meeting
        meeting.check(self._member, call)
        meeting.due = max(meeting.due, self._due(fault))
        if fault is None or fault.kind != "drop":
            meeting.arrive(self._member, call)
            if meeting.complete:
                del runtime.meetings[key]
        return self._work(AwaitedMeeting(seat, meeting, self._member, call), tensors, post)

    def _receive(self, tensors: Tensors, source: int | None, tag: int) -> SimWork:
        (tensor,) = tensors
        _check_contiguous("recv", tensors)
        office = self._seat.runtime.post_office(self._key)
        fault = self._seat.enter("recv")
        sequence = office.next_sequence("recv", source, self._member, tag)
        peers = () if source is None else (self._ranks[source],)
        post = self._post("recv", tensors, [], peers, tag, sequence)
        receive = Receive(source, tag, tensor)
        office.receive(self._member, receive)
        awaited = AwaitedReceive(self._seat, receive, self._ranks, self._title, sequence, self._due(fault))
        return self._work(awaited, tensors, post)

    def _post(
        self, operation: str, tensors: Tensors, sent: ledger.Sent, peers: tuple[int, ...], tag: int, sequence: int
    ) -> Event | None:
        """Enter an operation in ledger and, if there is one, trace."""
        seat, runtime = self._seat, self._seat.runtime
        to_global = [(self._ranks[member], count) for member, count in sent]
        total = runtime.ledger.add(operation, seat.rank, to_global)
        if not runtime.trace.enabled:
            return None
        event = Event(
            phase="post",
            id=runtime.trace.next_id(),
            step=seat.step,
            operation=operation,
            bytes=total,
            group=self._name,
            ranks=self._ranks,
            peers=peers,
            shapes=shapes(tensors),
            dtype=dtype_name(tensors),
            tag=tag,
            sequence=sequence,
        )
        seat.record(event)
        return event

    def _work(self, what: Awaited, tensors: Tensors, post: Event | None) -> SimWork:
        work = SimWork(self._seat, what, tensors, post)
        if self._coalescing is not None:
            self._coalescing.append(work)
        return work

    def _due(self, fault: Fault | None) -> int:
        """Turn of the baton at which what is posted now arrives."""
        if fault is None or fault.kind != "delay":
            return 0
        baton = self._seat.runtime.baton
        due = baton.turn + fault.turns
        baton.hold_until(due)
        return due


def create_group(options: Any, backend_options: Any = None) -> SimProcessGroup:
    """What torch calls to make a group of backend ``sim``; only works in a rank thread."""
    seat = current_seat()
    if seat is None:
        raise RuntimeError("backend 'sim' exists only inside the ranks of longctx.sim.Cluster.run()")
    # torch names no ranks when it makes the default group.
    ranks = tuple(options.global_ranks_in_group) or tuple(range(options.group_size))
    return SimProcessGroup(seat, options.store, options.group_id, ranks, options.group_rank)


def _listed(tensors: Any) -> list[torch.Tensor]:
    return [tensors] if isinstance(tensors, torch.Tensor) else list(tensors)


def _reduction(options: Any) -> Any:
    """The ReduceOp of an options object, or the ReduceOp given itself; a sum by default."""
    return dist.ReduceOp.SUM if options is None else getattr(options, "reduceOp", options)


def _op_name(op: Any) -> str:
    return reduction_kind(op).name.lower()


def _root(options: Any) -> int:
    return options if isinstance(options, int) else options.rootRank


def _sizes(tensors: Tensors) -> tuple[tuple[int, torch.dtype], ...]:
    return tuple((tensor.numel(), tensor.dtype) for tensor in tensors)


def _check_contiguous(operation: str, tensors: Tensors) -> None:
    """Gloo and NCCL refuse these too; code that passes here must run there. Only lists of outputs are exempt."""
    for tensor in tensors:
        if not tensor.is_contiguous():
            raise ValueError(
                f"{operation}: tensor of shape {tuple(tensor.shape)} has strides {tensor.stride()}, must be "
                f"contiguous; call .contiguous() first"
            )


def _check_ratio(operation: str, big: str, many: torch.Tensor, small: str, one: torch.Tensor, size: int) -> None:
    _check_contiguous(operation, [many, one])
    if many.numel() != size * one.numel() or many.dtype != one.dtype:
        raise ValueError(
            f"{operation}: {big} is {tuple(many.shape)} {many.dtype}, {small} {tuple(one.shape)} {one.dtype}; "
            f"in a group of {size} the {big} needs {size * one.numel()} elements of {one.dtype}"
        )


def _element_splits(which: str, tensor: torch.Tensor, rows: Sequence[int] | None, size: int) -> list[int]:
    """Elements per rank, from rows per rank; equal parts by default."""
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


def _first_corrupted(tensors: Tensors, fault: Fault) -> list[torch.Tensor]:
    """The tensors with the first one that holds numbers replaced by a corrupted copy."""
    result = list(tensors)
    for position, tensor in enumerate(result):
        if tensor.numel() and not has_no_numbers([tensor]):
            result[position] = corrupted(tensor, fault)
            break
    return result
