"""Attention forward and backward under each strategy, beside its own floor and beside other packages.

A cell is one problem: tokens and heads. All that is compared within it, floors and peers included, takes turns in one
process group, so that a slow minute of the machine hits all alike. Everyone's first pass is judged against dense
attention in float64 at full size.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.floor import floor_of
from benchmarks.peers import ATTENTION_PEERS
from longctx.errors import NumericsError
from longctx.sequence import SequencePlan
from longctx.verify import VerifyCase
from longctx.verify.case import TOLERANCE
from longctx.verify.run import attention_of, cut

Pass = Callable[[], object]
TENSORS = ("out", "dq", "dk", "dv")
LIMIT = TOLERANCE["float32"][0]  # relative, of the worst of out, dq, dk, dv: beyond it nothing is compared
SLOW = 3.0  # times the quickest pass of a cell, and
SLOW_SECONDS = 2.0  # whoever takes longer than both is timed in the first round only


@dataclass(frozen=True)
class Timing:
    """Seconds of one pass over all repeats: the slowest rank's, which is when the step is done."""

    median: float
    low: float
    high: float
    repeats: int

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Timing:
        return cls(statistics.median(seconds), min(seconds), max(seconds), len(seconds))


@dataclass(frozen=True)
class AttentionRow:
    """What is told of one way to compute a cell. ``refused``: why it was not timed."""

    who: str
    setting: str
    peer: bool
    errors: dict[str, float] = field(default_factory=dict)  # of out, dq, dk, dv
    refused: str | None = None
    time: Timing | None = None
    floor: Timing | None = None
    share_of_floor: Timing | None = None  # floor / time, paired by repeat; 1.0 is the limit


@dataclass(frozen=True)
class AttentionCell:
    """``ahead``: time of the best exact peer over that of our best strategy, paired by repeat: above 1, we are."""

    seq: int
    heads: int
    kv_heads: int
    rows: list[AttentionRow]
    best: str | None = None
    best_peer: str | None = None
    ahead: Timing | None = None


@dataclass
class _Entrant:
    """``positions``: global, of the rows of what ``run`` returns: out, dq, dk, dv, padding after them."""

    who: str
    setting: str
    peer: bool
    positions: Tensor
    run: Callable[[], tuple[Tensor, ...]]
    floor: Pass | None = None
    errors: dict[str, float] = field(default_factory=dict)
    first: float = 0.0  # seconds of the first pass, here
    seconds: list[float] = field(default_factory=list)
    floor_seconds: list[float] = field(default_factory=list)

    @property
    def exact(self) -> bool:
        return max(self.errors.values()) <= LIMIT

    def row(self) -> AttentionRow:
        measured = AttentionRow(self.who, self.setting, self.peer, self.errors, time=Timing.of(self.seconds))
        if self.floor is None:
            return measured
        shares = [floor / own for floor, own in zip(self.floor_seconds, self.seconds, strict=True)]
        return replace(measured, floor=Timing.of(self.floor_seconds), share_of_floor=Timing.of(shares))


def measure(cases: list[VerifyCase], peers: Sequence[str], repeats: int) -> AttentionCell:
    """One cell: the same problem by every case's strategy and by every peer; all ranks call it together."""
    problem = cases[0]
    truth = reference(problem)
    entrants, refused = [], []
    for case in cases:
        entrant = _ours(case)
        entrant.errors = _errors(entrant, _begin(entrant), truth, case)
        if not entrant.exact:
            raise NumericsError(
                f"{case.strategy} on {case.layout} is off by {entrant.errors}, more than {LIMIT}; it is not timed"
            )
        entrants.append(entrant)
    for name in peers:
        begun = _peer(name, problem)
        if isinstance(begun, AttentionRow):
            refused.append(begun)
        else:
            peer, computed = begun
            peer.errors = _errors(peer, computed, truth, problem)
            entrants.append(peer)
    _time(entrants, repeats)
    rows = [entrant.row() for entrant in entrants]
    cell = AttentionCell(problem.seq, problem.heads, problem.kv_heads, rows + refused)
    return _compared(cell, entrants)


def reference(case: VerifyCase) -> tuple[Tensor, ...]:
    """(out, dq, dk, dv) of dense attention in float64, whole; each rank computes its share of the heads."""
    world, rank = dist.get_world_size(), dist.get_rank()
    shares = world if case.kv_heads % world == 0 else 1
    alone = replace(
        case, strategy="local", layout="contiguous", world=1, dtype="float64", kernel="dense",
        heads=case.heads // shares, kv_heads=case.kv_heads // shares,
    )  # fmt: skip
    plan = alone.plan()
    q, k, v, dout = (whole.double().chunk(shares, dim=2)[rank % shares] for whole in case.inputs())
    q, k, v = (tensor.contiguous().requires_grad_() for tensor in (q, k, v))
    out = attention_of(alone, None)(q, k, v, plan.handle)
    own = (out.detach(), *torch.autograd.grad(out, (q, k, v), dout.contiguous()))
    return own if shares == 1 else tuple(_all_heads(tensor) for tensor in own)


def _all_heads(share: Tensor) -> Tensor:
    parts = [torch.empty_like(share) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, share.contiguous())
    return torch.cat(parts, dim=2)


def local_inputs(case: VerifyCase) -> tuple[SequencePlan, list[Tensor]]:
    """The case's plan, and this rank's q, k, v and dout."""
    plan, rank = case.plan(), dist.get_rank()
    return plan, [cut(whole, plan, rank) for whole in case.inputs()]


def _ours(case: VerifyCase) -> _Entrant:
    plan, (q, k, v, dout) = local_inputs(case)
    attention = attention_of(case, dist.group.WORLD)
    for tensor in (q, k, v):
        tensor.requires_grad_()

    def run() -> tuple[Tensor, ...]:
        out = attention(q, k, v, plan.handle)
        return out.detach(), *torch.autograd.grad(out, (q, k, v), dout)

    positions = torch.from_numpy(plan.positions(dist.get_rank()))
    return _Entrant(case.strategy, case.layout, False, positions, run, floor_of(case, dist.group.WORLD))


def _begin(entrant: _Entrant) -> tuple[Tensor, ...]:
    """The first pass; it warms up, is judged, and shows who is slow."""
    start = time.perf_counter()
    computed = entrant.run()
    entrant.first = time.perf_counter() - start
    return computed


def _peer(name: str, case: VerifyCase) -> tuple[_Entrant, tuple[Tensor, ...]] | AttentionRow:
    """The peer and what its first pass computed, or why it computed nothing; all ranks come to the same."""
    peer = ATTENTION_PEERS[name]
    reason = peer.missing()
    if reason is None:
        try:
            prepared = peer.prepare(case)
            entrant = _Entrant(peer.title, prepared.setting, True, prepared.positions, prepared.run)
            computed = _begin(entrant)
        except Exception as error:  # whatever another package raises is what its row says
            lines = str(error).strip().splitlines()
            reason = f"cannot run: {type(error).__name__}: {lines[0] if lines else ''}"
    refusing = torch.tensor(int(reason is not None))
    dist.all_reduce(refusing, dist.ReduceOp.MAX)
    if refusing:
        return AttentionRow(peer.title, "", True, refused=reason or "cannot run: another rank has said why")
    return entrant, computed


def _errors(
    entrant: _Entrant, computed: tuple[Tensor, ...], truth: tuple[Tensor, ...], case: VerifyCase
) -> dict[str, float]:
    """Of each tensor on the worst rank, by the rule of ``longctx verify``; no number counts as infinitely wrong."""
    upstream = 1e-3 * case.inputs()[3].double().norm()
    errors = []
    for mine, whole in zip(computed, truth, strict=True):
        difference = mine[:, : len(entrant.positions)].double() - whole[:, entrant.positions]
        errors.append(difference.norm() / (whole.norm() + upstream))
    worst = torch.stack(errors).nan_to_num(nan=torch.inf)
    dist.all_reduce(worst, dist.ReduceOp.MAX)
    return dict(zip(TENSORS, worst.tolist(), strict=True))


def _time(entrants: list[_Entrant], repeats: int) -> None:
    """All in turn, round after round; the order turns round each time, for the second finds warm caches.

    Whoever is slow takes part in the first round only, or the slowest would take most of the time.
    """
    first = torch.tensor([entrant.first for entrant in entrants])
    dist.all_reduce(first, dist.ReduceOp.MAX)
    slow = (first > max(SLOW * float(first.min()), SLOW_SECONDS)).tolist()
    for entrant, excused in zip(entrants, slow, strict=True):
        if entrant.floor and not excused:
            entrant.floor()
    for repeat in range(repeats):
        turns = [entrant for entrant, excused in zip(entrants, slow, strict=True) if not (excused and repeat)]
        for entrant in turns[:: 1 if repeat % 2 else -1]:
            for run in _turn(entrant, repeat):
                seconds = entrant.floor_seconds if run is entrant.floor else entrant.seconds
                seconds.append(slowest(run))


def _turn(entrant: _Entrant, repeat: int) -> list[Pass]:
    passes: list[Pass] = [entrant.run] if entrant.floor is None else [entrant.run, entrant.floor]
    return passes[:: 1 if repeat % 2 else -1]


def slowest(run: Pass) -> float:
    """Seconds from a common start until the last rank is done."""
    dist.barrier()
    start = time.perf_counter()
    run()
    taken = torch.tensor(time.perf_counter() - start, dtype=torch.float64)
    dist.all_reduce(taken, dist.ReduceOp.MAX)
    return float(taken)


def _compared(cell: AttentionCell, entrants: list[_Entrant]) -> AttentionCell:
    """Our best beside the best of the peers that are exact, by medians."""
    exact = [entrant for entrant in entrants if entrant.exact]
    ours = [entrant for entrant in exact if not entrant.peer]
    peers = [entrant for entrant in exact if entrant.peer]
    if not ours or not peers:
        return cell
    mine, theirs = (min(some, key=lambda one: statistics.median(one.seconds)) for some in (ours, peers))
    ratios = [their / own for their, own in zip(theirs.seconds, mine.seconds, strict=False)]
    return replace(cell, best=f"{mine.who} {mine.setting}", best_peer=theirs.who, ahead=Timing.of(ratios))
