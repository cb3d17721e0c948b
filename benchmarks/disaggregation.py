"""Times a skewed batch under disaggregated attention, per-document context parallelism and plain data parallelism.

Every rank has equal tokens, so the linear parts cost the same everywhere, and one rank has most of the attention. A
step here is one layer, forward and backward: of attention by itself, and of a whole block. All ways take turns in one
process group on the same tokens, and a step has ended when the last rank has.

The mean work's time: every rank replays its own kernel calls (``longctx.bench.floor``), all at once, and the ranks'
times are averaged. That is what a step would take if work were equal to the last cell, nothing were sent or packed,
and nobody waited. For a block the linear parts are added, as one block takes that has no attention.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.attention import TENSORS
from longctx.attention import StrategyAttention
from longctx.attention.core import CoreAttention, Started
from longctx.attention.runtime.local_kernel import kernel_for
from longctx.bench.floor import NAME, ForwardCall, recorded_pass, replay
from longctx.bench.timing import Report, Timing, silent
from longctx.comm import group_of
from longctx.config import ModelConfig
from longctx.errors import NumericsError
from longctx.model.block import SoftmaxBlock
from longctx.model.rotary import rotations
from longctx.planner import zigzag
from longctx.sequence import Contiguous, Documents, Explicit, Layout, Mask, SequencePlan, make_plan, unshard
from longctx.sequence.documents import Int64
from longctx.verify.run import cut

Pass = Callable[[], object]
CAUSAL = Mask(True, None)
LIMIT = 1e-5  # relative, of out, dq, dk, dv in float32: beyond it nothing is timed
WIDE = 8 / 3  # hidden width over model width, as of a Llama


@dataclass(frozen=True)
class Problem:
    """Holds the tokens and heads that all ways compute.

    ``shares``: lengths of the documents that each rank has under plain data parallelism, equal in tokens.
    """

    shares: tuple[tuple[int, ...], ...]
    heads: int
    kv_heads: int
    head_dim: int
    dtype: str = "float32"
    seed: int = 0

    @property
    def world(self) -> int:
        """Counts the ranks."""
        return len(self.shares)

    @cached_property
    def documents(self) -> Documents:
        """Returns the documents of all ranks in one row, by rank."""
        return Documents.from_lengths([length for share in self.shares for length in share])

    def plan(self, layout: Layout) -> SequencePlan:
        """Plans the whole row under a layout."""
        return make_plan((self.documents,), CAUSAL, layout, self.documents.length, self.world)

    @cached_property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Makes (q, k, v, dout) ``[1, S, H or Hkv, D]``, the same on every rank."""
        generator = torch.Generator().manual_seed(self.seed)
        dtype = getattr(torch, self.dtype)
        q, k, v, dout = (
            torch.randn(1, self.documents.length, heads, self.head_dim, generator=generator, dtype=dtype)
            for heads in (self.heads, self.kv_heads, self.kv_heads, self.heads)
        )
        return q, k, v, dout


def skewed(world: int, tokens: int, longest: int, short: tuple[int, int], seed: int) -> tuple[tuple[int, ...], ...]:
    """Draws the lengths of each rank's documents, ``tokens / world`` in all; the first rank has the longest.

    The other documents have uniform lengths in ``short``, until all ranks are full; the last of a rank is what is left.
    """
    generator, budget = np.random.default_rng(seed), tokens // world
    shares = []
    for rank in range(world):
        share = [longest] if rank == 0 else []
        while (left := budget - sum(share)) > 0:
            share.append(min(left, int(generator.integers(short[0], short[1] + 1))))
        shares.append(tuple(share))
    return tuple(shares)


def per_document(problem: Problem) -> Layout:
    """Returns the layout that has every document in zigzag over all ranks; what is left over is dealt round-robin."""
    home, starts = zigzag(problem.documents.lengths, problem.world), problem.documents.cu_seqlens.tolist()

    def spans(rank: int) -> tuple[tuple[int, int], ...]:
        return tuple(sorted((starts[one.doc] + one.start, starts[one.doc] + one.stop) for one in home.spans(rank)))

    return Explicit(tuple(map(spans, range(problem.world))))


@dataclass(frozen=True)
class Way:
    """Shares the row's attention in one way; ``alone``: each rank attends to its own documents, as a batch."""

    strategy: str
    title: str
    layout: Callable[[Problem], Layout] = lambda problem: Contiguous()
    alone: bool = False

    def positions(self, problem: Problem, rank: int) -> Int64:
        """Returns which tokens of the row the rank has."""
        return problem.plan(self.layout(problem)).positions(rank)

    def entry(self, problem: Problem) -> tuple[SequencePlan, list[Tensor]]:
        """Returns the plan that its attention is called with, and this rank's q, k, v and dout."""
        plan, rank = problem.plan(self.layout(problem)), dist.get_rank()
        local = [cut(whole, plan, rank) for whole in problem.tensors]
        if self.alone:
            own = Documents.from_lengths(problem.shares[rank])
            plan = make_plan((own,), CAUSAL, Contiguous(), own.length, 1)
        return plan, local

    def attention(self, kernel: str = "auto") -> StrategyAttention:
        """Builds the attention that computes it."""
        return StrategyAttention(self.strategy, None if self.alone else dist.group.WORLD, kernel)


WAYS = {
    "disaggregated": Way("disaggregated", "disaggregated (cad)"),
    "zeppelin": Way("zeppelin", "zeppelin"),
    "zigzag_ring": Way("ring", "zigzag per document, ring", per_document),
    "zigzag_gather": Way("gather", "zigzag per document, all-gather", per_document),
    "data_parallel": Way("local", "plain data parallelism", alone=True),
}


def attend(problem: Problem, way: Way) -> list[Tensor]:
    """Computes (out, dq, dk, dv) of this rank's tokens; all ranks call it."""
    plan, local = way.entry(problem)
    q, k, v, dout = local
    for leaf in (q, k, v):
        leaf.requires_grad_()
    out = way.attention()(q, k, v, plan.handle)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), dout)]


class _NoAttention(torch.autograd.Function):
    """The linear parts by themselves: queries go through, and keys and values get gradients of the right size."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ctx.save_for_backward(k)
        return q.view_as(q)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        (k,) = ctx.saved_tensors
        return upstream[0], torch.zeros_like(k), torch.zeros_like(k)


class NoAttention:
    """Stands in for attention that costs nothing: the linear parts of a block by themselves."""

    def start(self, q: Tensor, k: Tensor, v: Tensor, plan: Tensor) -> Started:
        """Passes the queries on; nothing is left for ``finish`` to wait for."""
        return Started(_NoAttention.apply(q, k, v))

    def finish(self, started: Started) -> Tensor:
        """Returns what ``start`` passed on."""
        return started.out


@dataclass(frozen=True)
class DisaggregationRow:
    """Tells what one way took. ``attention`` and ``block``: seconds of the last rank.

    ``work``: mean over ranks of the seconds of their kernel calls alone. ``over_*``: paired ratios to the mean work's
    time of a step. ``cells``: (query, key) pairs of each rank. ``bytes``: what each sends forward and backward.
    """

    way: str
    error: float
    cells: list[int]
    bytes: list[int]
    attention: Timing
    work: Timing
    over_attention: Timing
    block: Timing
    over_block: Timing


@dataclass
class _Entrant:
    name: str
    attention: Pass
    work: Pass
    block: Pass
    error: float
    cells: list[int]
    bytes: list[int]
    seconds: dict[str, list[list[float]]] = field(default_factory=dict)  # by what was timed: repeats of ranks

    def row(self, linear: list[list[float]]) -> DisaggregationRow:
        worst = {what: [max(one) for one in self.seconds[what]] for what in ("attention", "block")}
        mean = [statistics.fmean(one) for one in self.seconds["work"]]
        whole = [work + statistics.fmean(one) for work, one in zip(mean, linear, strict=True)]
        return DisaggregationRow(
            WAYS[self.name].title,
            self.error,
            self.cells,
            self.bytes,
            Timing.of(worst["attention"]),
            Timing.of(mean),
            Timing.of([one / under for one, under in zip(worst["attention"], mean, strict=True)]),
            Timing.of(worst["block"]),
            Timing.of([one / under for one, under in zip(worst["block"], whole, strict=True)]),
        )


def measure(problem: Problem, ways: list[str], repeats: int, report: Report = silent) -> dict[str, Any]:
    """Times all ways in turn, round after round, in an order that reverses each time; all ranks call it together."""
    truth: list[Tensor] = []
    entrants: list[_Entrant] = []
    for name in dict.fromkeys(["data_parallel", *ways]):  # the others are judged against it
        report(len(entrants), len(ways), f"checking {name}")
        entrant = _entrant(problem, name, truth)
        if name in ways:
            entrants.append(entrant)
    block = _linear_pass(problem)
    linear: list[list[float]] = []
    block()
    for repeat in range(repeats):
        passes = [(seconds, run) for one in entrants for seconds, run in _turn(one, repeat)]
        passes.insert(len(passes) // 2, (linear, block))
        report(repeat, repeats, "all ways in turn")
        for seconds, run in passes[:: -1 if repeat % 2 else 1]:
            seconds.append(timed(run))
    entrants.sort(key=lambda entrant: ways.index(entrant.name))
    rows = [asdict(entrant.row(linear)) for entrant in entrants]
    return {"rows": rows, "linear": asdict(Timing.of([statistics.fmean(one) for one in linear]))}


def _linear_pass(problem: Problem) -> Pass:
    plan = problem.plan(Contiguous())
    return _block_pass(problem, NoAttention(), plan, plan.positions(dist.get_rank()))


def _turn(entrant: _Entrant, repeat: int) -> list[tuple[list[list[float]], Pass]]:
    runs = (("attention", entrant.attention), ("work", entrant.work), ("block", entrant.block))
    return [(entrant.seconds.setdefault(what, []), run) for what, run in runs]


def timed(run: Pass) -> list[float]:
    """Returns the seconds of each rank from a common start."""
    dist.barrier()
    start = time.perf_counter()
    run()
    mine = torch.tensor([time.perf_counter() - start], dtype=torch.float64)
    ranks = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(ranks, mine)
    return [float(one) for one in ranks]


def _entrant(problem: Problem, name: str, truth: list[Tensor]) -> _Entrant:
    """Returns the way judged by its first pass, and warm."""
    way, traffic = WAYS[name], group_of(dist.group.WORLD).traffic
    before = traffic.bytes
    computed = attend(problem, way)
    sent = traffic.bytes - before
    error = _error(problem, way, computed, truth)
    plan, local = way.entry(problem)
    kernel = kernel_for("auto", local[0], local[1])
    calls = recorded_pass(lambda: way.attention(NAME), plan, local, kernel)
    # A call may be of some of the heads.
    asked = [(tiles.cells, call.q.shape[2]) for call in calls if isinstance(call, ForwardCall) for tiles in call.tiles]
    cells = sum(cells * heads for cells, heads in asked) // problem.heads
    attention, (q, k, v, dout) = way.attention(), local
    for leaf in (q, k, v):
        leaf.requires_grad_()

    def run() -> None:
        torch.autograd.grad(attention(q, k, v, plan.handle), (q, k, v), dout)

    block = _block_pass(problem, attention, plan, way.positions(problem, dist.get_rank()))
    entrant = _Entrant(name, run, replay(kernel, calls), block, error, _by_rank(cells), _by_rank(sent))
    entrant.work()
    entrant.block()
    return entrant


def _by_rank(number: int) -> list[int]:
    mine = torch.tensor([number])
    ranks = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(ranks, mine)
    return [int(one) for one in ranks]


def _error(problem: Problem, way: Way, computed: list[Tensor], truth: list[Tensor]) -> float:
    """Returns the error of the worst tensor, against what every rank computes for its documents alone.

    That comes first.
    """
    plan, whole = problem.plan(way.layout(problem)), []
    for mine in computed:
        parts = [torch.empty_like(mine) for _ in range(problem.world)]
        dist.all_gather(parts, mine.contiguous())
        whole.append(unshard(parts, plan))
    if not truth:
        truth += whole
        return 0.0
    upstream = 1e-3 * problem.tensors[3].norm()
    errors = {
        name: float((mine - true).norm() / (true.norm() + upstream))
        for name, mine, true in zip(TENSORS, whole, truth, strict=True)
    }
    if not max(errors.values()) <= LIMIT:
        raise NumericsError(f"{way.title} is off by {errors}, more than {LIMIT}; it is not timed")
    return max(errors.values())


def _block_pass(problem: Problem, attention: CoreAttention, plan: SequencePlan, where: Int64) -> Pass:
    """Runs one block forward and backward on the tokens at these positions of the row; parameters get gradients too."""
    dim = problem.heads * problem.head_dim
    torch.manual_seed(problem.seed)
    config = ModelConfig(
        dim=dim, layers=1, heads=problem.heads, kv_heads=problem.kv_heads, head_dim=problem.head_dim,
        hidden_dim=int(dim * WIDE) // 8 * 8,
    )  # fmt: skip
    block = SoftmaxBlock(config)
    block.attention = attention
    positions = torch.zeros(1, plan.shard, dtype=torch.int64)
    positions[0, : len(where)] = torch.from_numpy(where - problem.documents.bounds_of(where)[0])
    x = torch.randn(1, plan.shard, dim, requires_grad=True)
    rotation = rotations(positions, config, torch.float32)["S"]
    wanted, upstream = [x, *block.parameters()], torch.randn_like(x)

    def run() -> None:
        torch.autograd.grad(block(x, rotation, plan.handle), wanted, upstream)

    return run
