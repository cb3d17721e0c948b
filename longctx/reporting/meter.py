"""Measures what a step cost: time, arithmetic, traffic and memory. What cannot be known here is None."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from longctx.comm import group_of
from longctx.config import Config, ModelConfig
from longctx.mesh import Mesh
from longctx.model import LayerFlops
from longctx.reporting.observation import Observation, RankCounts
from longctx.sequence import LocalBatch, SequencePlan

# Dense peak in FLOP/s by a device's name and dtype, from the vendor's data sheets.
PEAK_FLOPS = {
    ("H200", torch.bfloat16): 989e12,
    ("H100", torch.bfloat16): 989e12,
    ("A100", torch.bfloat16): 312e12,
}


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Looks up the peak FLOP/s of one device; None for what no data sheet of ours names."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for (part, kind), peak in PEAK_FLOPS.items() if part in name and kind == dtype), None)


def training_flops(model: ModelConfig, chunk: int, tokens: float, cells: float) -> float:
    """Counts FLOP of forward and backward over ``tokens`` with ``cells`` (query, key) pairs, without recompute.

    The lookup of embeddings costs nothing, the head does. ``chunk``: tokens that a linear layer computes at once.
    """
    flops, softmax, linear = LayerFlops.of(model, chunk), model.softmax_layers, model.kinds.count("L")
    token = softmax * flops.softmax_weights + linear * (flops.linear_weights + flops.linear_core)
    head = 2.0 * model.vocab_size * model.dim
    return 3.0 * ((token + head) * tokens + softmax * flops.pair * cells)


def longest_document(plan: SequencePlan, rank: int) -> int:
    """Counts the tokens of the longest document of which the rank holds some, 0 without any."""
    held = [row.bounds_of(plan.positions(rank)) for row in plan.documents]
    return max((int((stop - start).max()) for start, stop in held if len(start)), default=0)


@dataclass(frozen=True)
class SentBytes:
    """Counts what this rank's attention has sent until now, and what of that went to other nodes."""

    total: int
    between_nodes: int


def work_of_queries(plans: Sequence[SequencePlan], stage: int, rank: int) -> float:
    """Counts the cells of a layer that a rank computes for its own queries, on whatever stage."""
    return sum(plan.work(rank) for plan in plans)


def _never() -> bool:
    return False


def _unknown() -> None:
    return None


@dataclass
class Meter:
    """Counts what each step costs this rank, and puts it together with the others' counts.

    ``memory``: peak bytes of this rank alone, or None. ``stop``: has this process been asked to end? ``save``: is it
    time for a checkpoint, which the first rank decides? ``peak``: FLOP/s of one device. ``work``: cells that a rank
    computes of a step's batches, by its stage and its place in the sequence group. ``every_stage``: ranks of all stages
    tell of theirs; otherwise the first stage stands for all. ``cells``: of a layer,
    that a rank's own queries see.
    """

    mesh: Mesh
    device: torch.device
    memory: Callable[[], int | None] = _unknown
    stop: Callable[[], bool] = _never
    peak: float | None = None
    work: Callable[[Sequence[SequencePlan], int, int], float] = work_of_queries
    every_stage: bool = False
    save: Callable[[], bool] = _never
    cells: Callable[[SequencePlan, int], float] = SequencePlan.work

    def __post_init__(self) -> None:
        self._group = group_of(self.mesh.sequence_group)
        self._sent = self._all_sent()

    def observe(self, batches: Sequence[LocalBatch]) -> Observation:
        """Tells what a step on these micro-batches came to; every rank calls it after the step."""
        return Observation.of(self._counts(batches).gathered(self.mesh.world_group, self.device))

    def _counts(self, batches: Sequence[LocalBatch]) -> RankCounts:
        """Counts this rank's own facts of the step that has just been taken."""
        plans, me = [batch.plan for batch in batches], self.mesh.sequence_rank
        # Each sequence is counted by the first rank of its group, each token by one of those that hold it.
        counts = self.mesh.counts_tokens
        whole = plans if counts and me == 0 else []
        before, self._sent = self._sent, self._all_sent()
        return RankCounts(
            reports_work=counts or (self.every_stage and self.mesh.leads_tensor),
            cells=sum(self.cells(plan, me) for plan in plans) if counts else 0,
            work=self.work(plans, self.mesh.pipeline.get_local_rank(), me),
            longest_document=max(longest_document(plan, me) for plan in plans),
            valid_tokens=sum(len(plan.positions(me)) * len(plan.documents) for plan in plans),
            physical_tokens=sum(plan.shard * len(plan.documents) for plan in plans),
            tokens=sum(plan.length * len(plan.documents) for plan in whole),
            full_cells=sum(plan.length**2 * len(plan.documents) for plan in whole),
            sent_bytes=self._sent.total - before.total,
            bytes_between_nodes=self._sent.between_nodes - before.between_nodes,
            memory_peak_bytes=self.memory(),
            stop=self.stop(),
            save=self.save(),
        )

    def _all_sent(self) -> SentBytes:
        return SentBytes(self._group.traffic.bytes, self._group.bytes_between_nodes)

    def flops(self, config: Config, tokens: int, cells: int) -> float:
        """Counts the FLOP of the model's arithmetic in a step of so many tokens and attention cells, all ranks."""
        return training_flops(config.model, config.attention.chunk, tokens, cells)

    def utilization(self, config: Config, tokens: int, cells: int, seconds: float) -> float | None:
        """Computes the share of the devices' peak that the model's arithmetic took; None without a known peak."""
        if self.peak is None:
            return None
        ranks = dist.get_world_size(self.mesh.world_group)
        return self.flops(config, tokens, cells) / (seconds * ranks * self.peak)
