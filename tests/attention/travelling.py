"""What the tests of strategies with travelling blocks share: runs on sim, their traces and their ledgers."""

from __future__ import annotations

import torch
import torch.distributed as dist

from longctx.attention import StrategyAttention, get_strategy
from longctx.attention.operator import DEFAULT, Options
from longctx.attention.registry import Sizes, Volume
from longctx.comm import group_of
from longctx.sequence import Contiguous, Documents, Layout, Mask, SequencePlan, Striped, Zigzag
from longctx.sim import Cluster, Event

DIM = 4
BYTES = {torch.float64: (8, 8), torch.float32: (4, 4), torch.bfloat16: (2, 4)}  # of a number, of an accumulator
LAYOUTS: dict[str, Layout] = {
    "contiguous": Contiguous(),
    "zigzag": Zigzag(),
    "striped": Striped(),
    "striped4": Striped(4),
}
PACKINGS = {
    "one": [(96,)],
    "edges": [(24, 24, 48)],
    "mixed": [(47, 1, 1, 30, 17), (1,) * 20 + (50,)],
    "padded": [(10, 35), (), (65, 3)],
}
MASKS = {"causal": Mask(), "full": Mask(False), "window": Mask(window=15), "window full": Mask(False, 15)}
HEADS = {"mha": (2, 2), "gqa": (4, 2), "mqa": (3, 1)}
FLASH = "aten._scaled_dot_product_flash_attention_for_cpu"


def plan_of(packing, mask: Mask, layout: Layout, length: int, world: int) -> SequencePlan:
    return SequencePlan([Documents.from_lengths(row) for row in packing], mask, layout, length, world)


def attend(
    strategy: str,
    plan: SequencePlan,
    heads: tuple[int, int],
    dtype: torch.dtype,
    inner: int = 1,
    options: Options = DEFAULT,
) -> tuple[list[torch.Tensor], list[int]]:
    """The calling rank's (out, dq, dk, dv), and its (bytes, messages) sent forward and altogether."""
    generator = torch.Generator().manual_seed(dist.get_rank())
    q_heads, kv_heads = heads
    q, k, v, dout = (
        torch.randn(len(plan.documents), plan.shard, n, DIM, generator=generator).to(dtype).requires_grad_()
        for n in (q_heads, kv_heads, kv_heads, q_heads)
    )
    traffic = group_of(dist.group.WORLD).traffic
    out = StrategyAttention(strategy, dist.group.WORLD, inner=inner, options=options)(q, k, v, plan.handle)
    forward = [traffic.bytes, traffic.messages]
    grads = torch.autograd.grad(out, (q, k, v), dout.detach())
    return [out.detach(), *grads], [*forward, traffic.bytes, traffic.messages]


def assert_volume(
    strategy: str,
    plan: SequencePlan,
    heads: tuple[int, int],
    dtype: torch.dtype,
    inner: int = 1,
    options: Options = DEFAULT,
) -> list[Volume]:
    """The closed form is what each rank counted, and what the ledger carried; returns it by rank."""
    cluster = Cluster(plan.world, trace=False)
    counted = [sent for _, sent in cluster.run(attend, strategy, plan, heads, dtype, inner, options)]
    sizes = Sizes(len(plan.documents), *heads, DIM, *BYTES[dtype], inner, options)
    volumes = [get_strategy(strategy).volume(plan, rank, sizes) for rank in range(plan.world)]
    for rank, (one, sent) in enumerate(zip(volumes, counted, strict=True)):
        assert cluster.ledger.sent(rank) == sent[2], f"rank {rank}"
        assert [one.forward, one.messages_forward] == sent[:2], f"rank {rank}"
        both = [one.forward + one.backward, one.messages_forward + one.messages_backward]
        assert both == sent[2:], f"rank {rank}"
    return volumes


def assert_no_order_matters(strategy: str, plan: SequencePlan, inner: int = 1, options: Options = DEFAULT) -> None:
    """Whatever order the ranks take turns in, every bit is the same."""
    arguments = (strategy, plan, (4, 2), torch.bfloat16, inner, options)
    expected = Cluster(plan.world).run(attend, *arguments)
    for seed in range(4):
        for mine, right in zip(Cluster(plan.world, seed=seed).run(attend, *arguments), expected, strict=True):
            assert mine[1] == right[1] and all(torch.equal(a, b) for a, b in zip(mine[0], right[0], strict=True))


def traced(
    strategy: str, plan: SequencePlan, heads: tuple[int, int], inner: int = 1, options: Options = DEFAULT
) -> list[list[Event]]:
    """In bf16, where blocks travel as bfloat16 and accumulators as float32."""
    cluster = Cluster(plan.world, trace_compute=True)
    cluster.run(attend, strategy, plan, heads, torch.bfloat16, inner, options)
    return cluster.trace


def kernels(events: list[Event], direction: str = "both") -> list[int]:
    """Places of the kernel's calls in a rank's trace."""
    names = {"forward": [FLASH], "backward": [f"{FLASH}_backward"], "both": [FLASH, f"{FLASH}_backward"]}[direction]
    return [place for place, event in enumerate(events) if event.operation in names]


def spans(events: list[Event]) -> list[tuple[int, int, Event]]:
    """(place of the post, of the wait, the post) of every message; each is awaited exactly once."""
    found = []
    for place, event in enumerate(events):
        if event.phase == "post" and event.operation in ("send", "recv"):
            [wait] = [i for i, other in enumerate(events) if (other.phase, other.id) == ("wait", event.id)]
            found.append((place, wait, event))
    return found
