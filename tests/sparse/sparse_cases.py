"""What tests of mixers with operators of their own share: runs on sim, against a definition on whole sequences."""

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from longctx.comm import group_of
from longctx.sequence import Documents, Mask, SequencePlan, make_layout, unshard
from longctx.sim import Cluster
from longctx.verify.run import cut

WORLDS = (1, 2, 3, 4, 8)
LAYOUTS = (("contiguous", 1), ("zigzag", 1), ("striped", 1), ("striped", 5))
# Batch rows of document lengths, and the length of a row where that leaves padding.
PACKINGS: dict[str, tuple[list[list[int]], int | None]] = {
    "one": ([[37]], None),
    "packed": ([[12, 1, 1, 17, 6], [1, 1, 33]], 40),
    "exact": ([[8, 8, 16]], None),
    "singles": ([[1] * 9], None),
    "lopsided": ([[3], [40], []], 40),
    "edges": ([[9, 1, 10, 1, 19]], None),
}

Attend = Callable[..., Tensor]  # (*tensors, plan handle, group name)


def plan_for(rows: Sequence[Sequence[int]], world: int, layout: str, block: int = 1, length: int | None = None):
    documents = tuple(Documents.from_lengths(lengths) for lengths in rows)
    length = length or max(packed.length for packed in documents)
    return SequencePlan(documents, Mask(True, None), make_layout(layout, block), length, world)


def draw(plan: SequencePlan, inputs: int, heads: int, width: int, seed: int = 0) -> list[Tensor]:
    """Inputs and the upstream gradient, ``[B, S, H, D]``; nothing is asked of padding, but it is not 0."""
    generator = torch.Generator().manual_seed(seed)
    shape = (len(plan.documents), plan.length, heads, width)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(inputs + 1)]


def run(attend: Attend, plan: SequencePlan, tensors: Sequence[Tensor], dout: Tensor):
    """By rank: outputs and gradients, bytes forward and backward; and the cluster's ledger by rank."""

    def rank_main():
        ranks = group_of(dist.group.WORLD)
        local = [cut(whole, plan, ranks.rank).requires_grad_() for whole in tensors]
        before = ranks.traffic.bytes
        out = attend(*local, plan.handle, ranks.name)
        between = ranks.traffic.bytes
        grads = torch.autograd.grad(out, local, cut(dout, plan, ranks.rank))
        return [out.detach(), *grads], (between - before, ranks.traffic.bytes - between)

    cluster = Cluster(plan.world, trace=False)
    found = cluster.run(rank_main)
    return [one for one, _ in found], [sent for _, sent in found], [cluster.ledger.sent(r) for r in range(plan.world)]


def whole(shards: list[list[Tensor]], plan: SequencePlan) -> list[Tensor]:
    return [unshard(list(of_ranks), plan) for of_ranks in zip(*shards, strict=True)]


def check(attend: Attend, definition: Callable[..., Tensor], plan: SequencePlan, tensors: Sequence[Tensor], dout):
    """Outputs and all gradients against the definition; returns bytes by rank, counted and by the ledger."""
    for row, packed in enumerate(plan.documents):
        dout[row, packed.length :] = 3.0  # asked of padding, and yet no gradient comes of it
    asked = [one.clone().requires_grad_() for one in tensors]
    expected = definition(*asked, plan.documents)
    upstream = dout.clone()
    for row, packed in enumerate(plan.documents):
        upstream[row, packed.length :] = 0.0
    if plan.documents and any(packed.length for packed in plan.documents):
        gradients = torch.autograd.grad(expected, asked, upstream)
    found, sent, ledger = run(attend, plan, tensors, dout)
    for name, mine, reference in zip(range(9), whole(found, plan), [expected.detach(), *gradients], strict=False):
        tolerance = 1e-10 * (reference.norm() + 1e-3 * upstream.norm())
        for rank in range(plan.world):
            error = (cut(mine, plan, rank) - cut(reference, plan, rank)).norm()
            assert error <= tolerance, f"tensor {name} of rank {rank}: {error} against {tolerance}"
        for row, packed in enumerate(plan.documents):
            assert not mine[row, packed.length :].any(), f"tensor {name}: padding is not 0"
    return sent, ledger
