"""What a strategy really sends, forward and backward, by rank; and all that the tests of strategies ask them for."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist

from longctx.attention import AttentionCase, StrategyAttention, get_strategy, refusal
from longctx.attention.costs.estimate import Costs, Volume
from longctx.attention.runtime.registry import costs_of
from longctx.attention.runtime.sizes import Sizes
from longctx.catalog import STRATEGIES
from longctx.comm import group_of
from longctx.options import DEFAULT, StrategyOptions
from longctx.rules import divisors
from longctx.sequence import Contiguous, Documents, Layout, Mask, SequencePlan, Striped, Zigzag
from longctx.sim import Cluster, mark_step

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
FORWARD, BACKWARD = 1, 2  # steps of a trace


def plan_of(packing, mask: Mask, layout: Layout, length: int, world: int) -> SequencePlan:
    return SequencePlan([Documents.from_lengths(row) for row in packing], mask, layout, length, world)


def with_row(strategy: str, inner: int, options: StrategyOptions = DEFAULT) -> StrategyOptions:
    """These options, and rows of ``inner`` ranks where the strategy lets users choose them."""
    grid = get_strategy(strategy).grid
    return options if grid is None or grid.option is None else replace(options, **{grid.option: inner})


def choices(strategy: str, case: AttentionCase) -> Iterator[tuple[int, StrategyOptions]]:
    """Every (inner, options) that the strategy tells apart and takes for a case; none where it refuses the case."""
    found = get_strategy(strategy)
    chosen = found.grid is not None and found.grid.option is not None
    inners = divisors(case.world) if chosen else [1 if found.grid is None else case.world]
    sides = ("kv", "q") if "backward_rotates" in found.options else ("auto",)
    grad_dtypes = ("fp32", "compute") if "grad_dtype" in found.options else ("fp32",)
    for inner, side, grad_dtype in itertools.product(inners, sides, grad_dtypes):
        options = StrategyOptions(grad_dtype, side)
        asked = replace(case, options=with_row(strategy, inner, options))
        if refusal(found, asked) is None:
            yield inner, options


def costs(strategy: str) -> Costs:
    """The strategy's closed forms."""
    found = costs_of(get_strategy(strategy))
    assert found is not None, strategy
    return found


ESTIMATED = tuple(name for name in STRATEGIES if costs_of(get_strategy(name)) is not None)  # costs are optional


class Nothing:
    """A local kernel that computes nothing and needs no memory: what is sent does not depend on numbers."""

    name = "nothing"

    def refuses(self, problem: Any) -> None:
        return None

    def forward(self, *_: Any) -> None: ...

    def backward(self, *_: Any) -> None: ...


@dataclass(frozen=True)
class Case:
    """A layer to send. ``heads``: of queries, of keys and values."""

    strategy: str
    plan: SequencePlan
    heads: tuple[int, int]
    dtype: torch.dtype
    inner: int = 1
    options: StrategyOptions = DEFAULT
    kernel: str = "auto"

    @property
    def name(self) -> str:
        mask, rows = self.plan.mask, [row.lengths.tolist() for row in self.plan.documents]
        return f"{self.strategy} {self.plan.layout} {mask} {rows} heads {self.heads} {self.inner} {self.options}"

    @property
    def sizes(self) -> Sizes:
        return sizes_of(self.plan, self.heads, self.dtype, self.inner, self.options)

    def closed(self) -> list[Volume]:
        """What the strategy says that it sends, by rank."""
        volume = costs(self.strategy).volume
        return [volume(self.plan, rank, self.sizes) for rank in range(self.plan.world)]


def attend(
    strategy: str,
    plan: SequencePlan,
    heads: tuple[int, int],
    dtype: torch.dtype,
    inner: int = 1,
    options: StrategyOptions = DEFAULT,
) -> tuple[list[torch.Tensor], Volume]:
    """The calling rank's (out, dq, dk, dv), and what it counted as sent."""
    return attend_case(Case(strategy, plan, heads, dtype, inner, options))


def attend_case(case: Case, before: int = 0) -> tuple[list[torch.Tensor], Volume]:
    """The same, after so many steps of other cases."""
    plan, generator = case.plan, torch.Generator().manual_seed(dist.get_rank())
    q_heads, kv_heads = case.heads
    q, k, v, dout = (
        torch.randn(len(plan.documents), plan.shard, n, DIM, generator=generator).to(case.dtype).requires_grad_()
        for n in (q_heads, kv_heads, kv_heads, q_heads)
    )
    options = with_row(case.strategy, case.inner, case.options)
    attention = StrategyAttention(case.strategy, dist.group.WORLD, case.kernel, options=options)
    traffic = group_of(dist.group.WORLD).traffic
    start = traffic.bytes, traffic.messages
    mark_step(before + FORWARD)
    out = attention(q, k, v, plan.handle)
    between = traffic.bytes, traffic.messages
    mark_step(before + BACKWARD)
    grads = torch.autograd.grad(out, (q, k, v), dout.detach())
    sent = Volume(
        between[0] - start[0], traffic.bytes - between[0], between[1] - start[1], traffic.messages - between[1]
    )
    return [out.detach(), *grads], sent


def measured(
    strategy: str,
    plan: SequencePlan,
    heads: tuple[int, int],
    dtype: torch.dtype,
    inner: int = 1,
    options: StrategyOptions = DEFAULT,
    cluster: Cluster | None = None,
) -> list[Volume]:
    """By rank. What comm counts, what the trace of sim shows step by step, and its ledger are one."""
    return measured_together([Case(strategy, plan, heads, dtype, inner, options)], cluster)[0]


def measured_together(cases: Sequence[Case], cluster: Cluster | None = None) -> list[list[Volume]]:
    """``measured`` of each case, in one run of a cluster: starting one costs more than a layer does."""
    cluster = cluster or Cluster(cases[0].plan.world)
    ledger = cluster.ledger

    def send_all() -> list[tuple[Volume, int]]:
        sent = []
        for number, case in enumerate(cases):
            carried = ledger.sent(dist.get_rank())
            counted = attend_case(case, BACKWARD * number)[1]
            sent.append((counted, ledger.sent(dist.get_rank()) - carried))
        return sent

    by_rank = cluster.run(send_all)
    for rank, sent in enumerate(by_rank):
        posts: dict[int, list[int]] = {}
        for event in cluster.trace[rank]:
            if (event.phase, event.operation) == ("post", "send"):
                posts.setdefault(event.step, []).append(event.bytes)
        for number, (counted, carried) in enumerate(sent):
            steps = [posts.get(BACKWARD * number + step, []) for step in (FORWARD, BACKWARD)]
            assert counted == Volume(*map(sum, steps), *map(len, steps)), f"rank {rank}: {cases[number].name}"
            assert counted.forward + counted.backward == carried, f"rank {rank}: {cases[number].name}"
        assert sum(carried for _, carried in sent) == ledger.sent(rank), f"rank {rank}"
    return [[counted for counted, _ in of_case] for of_case in zip(*by_rank, strict=True)]


def sizes_of(
    plan: SequencePlan, heads: tuple[int, int], dtype: torch.dtype, inner: int = 1, options: StrategyOptions = DEFAULT
) -> Sizes:
    return Sizes(len(plan.documents), *heads, DIM, *BYTES[dtype], inner, options)


def closed(
    strategy: str,
    plan: SequencePlan,
    heads: tuple[int, int],
    dtype: torch.dtype,
    inner: int = 1,
    options: StrategyOptions = DEFAULT,
) -> list[Volume]:
    """What the strategy says that it sends, by rank."""
    return Case(strategy, plan, heads, dtype, inner, options).closed()


def assert_volume(
    strategy: str,
    plan: SequencePlan,
    heads: tuple[int, int],
    dtype: torch.dtype,
    inner: int = 1,
    options: StrategyOptions = DEFAULT,
) -> list[Volume]:
    """The closed form is what was sent; returns it by rank."""
    volumes = closed(strategy, plan, heads, dtype, inner, options)
    assert volumes == measured(strategy, plan, heads, dtype, inner, options)
    return volumes
