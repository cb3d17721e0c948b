"""Times attention forward and backward under each strategy, beside its own floor and beside other packages.

A cell is one problem: tokens and heads. All that is compared within it takes turns in one process group, floors and
peers included. So a slow minute of the machine hits all alike. Everyone's first pass is judged against dense
attention in float64 at full size.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.peers import ATTENTION_PEERS
from longctx.bench.floor import floor_of
from longctx.bench.timing import CPU, Entrant, Report, Timing, seconds_of, silent, time_in_turn
from longctx.errors import NumericsError
from longctx.sequence import SequencePlan
from longctx.verify import VerifyCase
from longctx.verify.case import TOLERANCE
from longctx.verify.run import attention_of, cut

TENSORS = ("out", "dq", "dk", "dv")
LIMIT = TOLERANCE["float32"][0]  # relative, of the worst of out, dq, dk, dv: beyond it nothing is compared


@dataclass(frozen=True)
class AttentionRow:
    """Holds the times and errors of one way to compute a cell; ``refused``: why it was not timed."""

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
    """Holds one problem, and what each way to compute it took.

    ``ahead``: time of the best exact peer over that of our best strategy, paired by repeat. Above 1, ours is faster.
    """

    seq: int
    heads: int
    kv_heads: int
    rows: list[AttentionRow]
    best: str | None = None
    best_peer: str | None = None
    ahead: Timing | None = None


@dataclass(kw_only=True)
class _Entrant(Entrant):
    """One way to compute a cell, which is timed beside others.

    ``positions``: global, of the rows of what ``run`` returns: out, dq, dk, dv, padding after them.
    """

    setting: str
    peer: bool
    positions: Tensor
    run: Callable[[], tuple[Tensor, ...]]
    errors: dict[str, float] = field(default_factory=dict)

    @property
    def exact(self) -> bool:
        return max(self.errors.values()) <= LIMIT

    def row(self) -> AttentionRow:
        measured = AttentionRow(self.name, self.setting, self.peer, self.errors, time=Timing.of(self.seconds))
        if self.floor is None:
            return measured
        return replace(measured, floor=Timing.of(self.floor_seconds), share_of_floor=Timing.of(self.shares))


def measure(cases: list[VerifyCase], peers: Sequence[str], repeats: int, report: Report = silent) -> AttentionCell:
    """Measures one cell: the same problem by every case's strategy and by every peer; all ranks call it together."""
    problem = cases[0]
    truth = reference(problem)
    entrants, refused = [], []
    for number, case in enumerate(cases):
        report(number, len(cases), f"checking {case.strategy} on {case.layout}")
        entrant = _ours(case)
        entrant.errors = _errors(entrant, _begin(entrant), truth, case)
        if not entrant.exact:
            raise NumericsError(
                f"{case.strategy} on {case.layout} is off by {entrant.errors}, more than {LIMIT}; it is not timed"
            )
        entrants.append(entrant)
    for number, name in enumerate(peers):
        report(number, len(peers), f"checking {ATTENTION_PEERS[name].title}")
        begun = _peer(name, problem)
        if isinstance(begun, AttentionRow):
            refused.append(begun)
        else:
            peer, computed = begun
            peer.errors = _errors(peer, computed, truth, problem)
            entrants.append(peer)
    time_in_turn(entrants, repeats, CPU, report)
    rows = [entrant.row() for entrant in entrants]
    cell = AttentionCell(problem.seq, problem.heads, problem.kv_heads, rows + refused)
    return _compared(cell, entrants)


def reference(case: VerifyCase) -> tuple[Tensor, ...]:
    """Computes (out, dq, dk, dv) of dense attention in float64, whole; each rank computes its share of the heads."""
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
    """Returns the case's plan, and this rank's q, k, v and dout."""
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
    return _Entrant(
        name=case.strategy,
        setting=case.layout,
        peer=False,
        positions=positions,
        run=run,
        floor=floor_of(case, dist.group.WORLD),
    )


def _begin(entrant: _Entrant) -> tuple[Tensor, ...]:
    """Runs the first pass; it warms up, is judged, and shows who is slow."""
    computed: list[tuple[Tensor, ...]] = []
    entrant.first = seconds_of(lambda: computed.append(entrant.run()), CPU)
    return computed[0]


def _peer(name: str, case: VerifyCase) -> tuple[_Entrant, tuple[Tensor, ...]] | AttentionRow:
    """Returns the peer and what its first pass computed, or why it computed nothing; all ranks come to the same."""
    peer = ATTENTION_PEERS[name]
    reason = peer.missing()
    if reason is None:
        try:
            prepared = peer.prepare(case)
            entrant = _Entrant(
                name=peer.title, setting=prepared.setting, peer=True, positions=prepared.positions, run=prepared.run
            )
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
    """Returns the error of each tensor on the worst rank, by the rule of ``longctx verify``; NaN counts as infinite."""
    upstream = 1e-3 * case.inputs()[3].double().norm()
    errors = []
    for mine, whole in zip(computed, truth, strict=True):
        difference = mine[:, : len(entrant.positions)].double() - whole[:, entrant.positions]
        errors.append(difference.norm() / (whole.norm() + upstream))
    worst = torch.stack(errors).nan_to_num(nan=torch.inf)
    dist.all_reduce(worst, dist.ReduceOp.MAX)
    return dict(zip(TENSORS, worst.tolist(), strict=True))


def _compared(cell: AttentionCell, entrants: list[_Entrant]) -> AttentionCell:
    """Compares our best with the best of the peers that are exact, by medians."""
    exact = [entrant for entrant in entrants if entrant.exact]
    ours = [entrant for entrant in exact if not entrant.peer]
    peers = [entrant for entrant in exact if entrant.peer]
    if not ours or not peers:
        return cell
    mine, theirs = (min(some, key=lambda one: statistics.median(one.seconds)) for some in (ours, peers))
    ratios = [their / own for their, own in zip(theirs.seconds, mine.seconds, strict=False)]
    return replace(cell, best=f"{mine.name} {mine.setting}", best_peer=theirs.name, ahead=Timing.of(ratios))
