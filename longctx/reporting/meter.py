"""What a step cost: time, arithmetic, traffic and memory. What cannot be known here is None."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from longctx.comm import group_of
from longctx.comm.rank_numbers import gather_numbers
from longctx.config import Config, ModelConfig
from longctx.mesh import Mesh
from longctx.model import LayerFlops
from longctx.sequence import LocalBatch, SequencePlan

# Dense peak in FLOP/s by a device's name and dtype, from the vendor's data sheets.
PEAK_FLOPS = {
    ("H200", torch.bfloat16): 989e12,
    ("H100", torch.bfloat16): 989e12,
    ("A100", torch.bfloat16): 312e12,
}


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Of one device; None for what no data sheet of ours names."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for (part, kind), peak in PEAK_FLOPS.items() if part in name and kind == dtype), None)


def training_flops(model: ModelConfig, chunk: int, tokens: float, cells: float) -> float:
    """Forward and backward of ``tokens`` with ``cells`` (query, key) pairs; recompute is not counted.

    The lookup of embeddings costs nothing, the head does. ``chunk``: tokens that a linear layer computes at once.
    """
    flops, softmax, linear = LayerFlops.of(model, chunk), model.kinds.count("S"), model.kinds.count("L")
    token = softmax * flops.softmax_weights + linear * (flops.linear_weights + flops.linear_core)
    head = 2.0 * model.vocab_size * model.dim
    return 3.0 * ((token + head) * tokens + softmax * flops.pair * cells)


def longest_document(plan: SequencePlan, rank: int) -> int:
    """Tokens of the longest document of which the rank holds some, 0 without any."""
    held = [row.bounds_of(plan.positions(rank)) for row in plan.documents]
    return max((int((stop - start).max()) for start, stop in held if len(start)), default=0)


@dataclass(frozen=True)
class Observation:
    """Facts of one step, equal on all ranks.

    ``tokens``: of the global batch, those without a label included. ``balance``: most attention work of a
    rank over the mean. ``work``, ``bytes``, ``bytes_between_nodes``: of each rank that tells of its work, the cells
    that it computes, what its attention sent, and what of that went to other nodes. ``straggler``: tokens of the
    longest document of the busiest one. ``padding``: share of the physical tokens that are none. ``comm_bytes``,
    ``comm_bytes_between_nodes``: what attention sent, all ranks together. ``stop``: somebody was asked to stop.
    """

    tokens: int
    cells: int
    full_cells: int
    balance: float
    work: list[float]
    bytes: list[int]
    bytes_between_nodes: list[int]
    straggler: int
    padding: float
    comm_bytes: int
    comm_bytes_between_nodes: int
    memory_peak_bytes: int | None
    stop: bool


def work_at_home(plans: Sequence[SequencePlan], stage: int, rank: int) -> float:
    """Cells of a layer that a rank of the sequence group computes for its own queries, on whatever stage."""
    return sum(plan.work(rank) for plan in plans)


def _never() -> bool:
    return False


def _unknown() -> None:
    return None


@dataclass
class Meter:
    """One rank's view of its own work, put together with that of the others once a step.

    ``memory``: peak bytes of this rank alone, or None. ``stop``: has this process been asked to end?
    ``peak``: FLOP/s of one device. ``work``: cells that a rank computes of a step's batches, by its stage and its place
    in the sequence group. ``every_stage``: ranks of all stages tell of theirs, which otherwise the first stands for.
    """

    mesh: Mesh
    device: torch.device
    memory: Callable[[], int | None] = _unknown
    stop: Callable[[], bool] = _never
    peak: float | None = None
    work: Callable[[Sequence[SequencePlan], int, int], float] = work_at_home
    every_stage: bool = False
    _sent: tuple[int, int] = field(default=(0, 0), init=False)

    def __post_init__(self) -> None:
        self._group = group_of(self.mesh.sequence_group)
        self._sent = self._all_sent()

    def observe(self, batches: Sequence[LocalBatch]) -> Observation:
        """After a step on these micro-batches; every rank calls it."""
        plans, me = [batch.plan for batch in batches], self.mesh.sequence_rank
        work = self.work(plans, self.mesh.pipeline.get_local_rank(), me)
        longest = max(longest_document(plan, me) for plan in plans)
        valid = sum(len(plan.positions(me)) * len(plan.documents) for plan in plans)
        physical = sum(plan.shard * len(plan.documents) for plan in plans)
        # Each sequence is counted by the first rank of its group, each token by one of those that hold it.
        counts = self.mesh.counts_tokens
        tells = counts or (self.every_stage and self.mesh.leads_tensor)
        first = counts and me == 0
        cells = sum(plan.work(me) for plan in plans) if counts else 0
        tokens = sum(plan.length * len(plan.documents) for plan in plans) if first else 0
        full = sum(plan.length**2 * len(plan.documents) for plan in plans) if first else 0
        before, self._sent = self._sent, self._all_sent()
        sent, across = (now - then for now, then in zip(self._sent, before, strict=True))
        memory = self.memory()
        own = [tells, cells, work, longest, valid, physical, tokens, full, sent, across]
        own += [-1 if memory is None else memory, self.stop()]
        rows = gather_numbers(own, self.mesh.world_group, self.device)
        (_, all_cells, works, documents, valids, physicals, *_) = zip(*(row for row in rows if row[0]), strict=True)
        *_, all_tokens, all_full, all_sent, all_across, memories, stops = zip(*rows, strict=True)
        return Observation(
            tokens=int(sum(all_tokens)),
            cells=int(sum(all_cells)),
            full_cells=int(sum(all_full)),
            balance=max(works) * len(works) / sum(works) if sum(works) else 1.0,
            work=list(works),
            bytes=[int(row_sent) for row, row_sent in zip(rows, all_sent, strict=True) if row[0]],
            bytes_between_nodes=[int(went) for row, went in zip(rows, all_across, strict=True) if row[0]],
            straggler=int(documents[works.index(max(works))]),
            padding=1.0 - sum(valids) / sum(physicals),
            comm_bytes=int(sum(all_sent)),
            comm_bytes_between_nodes=int(sum(all_across)),
            memory_peak_bytes=None if min(memories) < 0 else int(max(memories)),
            stop=any(stops),
        )

    def _all_sent(self) -> tuple[int, int]:
        """Bytes of this rank's attention until now, and those of them that went to other nodes."""
        return self._group.traffic.bytes, self._group.bytes_between_nodes

    def utilization(self, config: Config, tokens: int, cells: int, seconds: float) -> float | None:
        """Share of the devices' peak that the model's arithmetic took; None without a known peak."""
        if self.peak is None:
            return None
        ranks = dist.get_world_size(self.mesh.world_group)
        return training_flops(config.model, config.attention.chunk, tokens, cells) / (seconds * ranks * self.peak)
