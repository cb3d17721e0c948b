"""Times linear mixers forward and backward under each strategy, beside the floor of the same work without exchanges.

The floor of a rank is the same mixer by the same operators, on the rank's own tokens as a whole sequence of its own.
It has the same chunks with the same products, a state that enters (zeros in place of what would have come) and one
that leaves. It waits for nobody. It does not count packing and unpacking of states, the scan of the chain of segments,
and halos of short convolutions. Shards are contiguous, so that a rank's tokens are one segment here and there.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.distributed as dist

from longctx.bench.timing import Report, Timing, silent, slowest
from longctx.verify import VerifyCase
from longctx.verify.linear import mixer_of
from longctx.verify.run import core_of, local_inputs

Pass = Callable[[], object]
FLAT = 0.1  # how far the time of a token may be from its mean over lengths
SHARE = 0.95  # of its floor
TURN_TOKENS, TURN_PAIRS = 8192, 4  # a short sequence is timed several times in its turn, up to so many tokens and pairs


@dataclass(frozen=True)
class LinearCell:
    """Holds what one strategy took at one length. ``share``: floor / time, paired; 1.0 is the limit."""

    strategy: str
    mixer: str
    seq: int
    time: Timing
    floor: Timing
    share: Timing

    @property
    def per_token(self) -> float:
        """Returns the seconds of one token of the whole sequence."""
        return self.time.median / self.seq


def largest_deviation(cells: Sequence[LinearCell]) -> float:
    """Returns how far the time per token at one of the lengths is from its mean over them, at most."""
    times = [cell.per_token for cell in cells]
    mean = statistics.fmean(times)
    return max(abs(one - mean) for one in times) / mean


@dataclass
class _Entrant:
    case: VerifyCase
    run: Pass
    floor: Pass
    seconds: list[float] = field(default_factory=list)
    floor_seconds: list[float] = field(default_factory=list)

    @property
    def cell(self) -> LinearCell:
        shares = [floor / own for floor, own in zip(self.floor_seconds, self.seconds, strict=True)]
        timings = (Timing.of(one) for one in (self.seconds, self.floor_seconds, shares))
        return LinearCell(self.case.strategy, mixer_of(self.case).name, self.case.seq, *timings)


def measure(cases: list[VerifyCase], repeats: int, report: Report = silent) -> list[LinearCell]:
    """Times all cases of one mixer in turn, round after round; all ranks call it together.

    Each strategy and its floor go one after the other: A B, B A, and so on. The order of the cases reverses each time.
    So a slow minute of the machine hits all lengths, and both sides of a ratio.
    """
    rank = dist.get_rank()
    # One floor a length: strategies share it, and its tensors.
    floors = {case.seq: floor_of(case, rank) for case in cases}
    entrants = [_Entrant(case, pass_of(case, rank, dist.group.WORLD), floors[case.seq]) for case in cases]
    for entrant in entrants:
        entrant.run()
        entrant.floor()
    for repeat in range(repeats):
        for number, entrant in enumerate(entrants[:: -1 if repeat % 2 else 1]):
            what = f"{entrant.case.strategy}, {entrant.case.seq} tokens"
            report(repeat * len(entrants) + number, repeats * len(entrants), what)
            for side in _sides(entrant, repeat):
                own = side is entrant.run
                (entrant.seconds if own else entrant.floor_seconds).append(slowest(side))
    return [entrant.cell for entrant in entrants]


def _sides(entrant: _Entrant, repeat: int) -> Iterator[Pass]:
    """Yields whose turn it is, as often as a short sequence needs."""
    for pair in range(min(TURN_PAIRS, max(1, TURN_TOKENS // entrant.case.seq))):
        yield from (entrant.run, entrant.floor)[:: -1 if (repeat + pair) % 2 else 1]


def pass_of(case: VerifyCase, rank: int, group: dist.ProcessGroup | None) -> Pass:
    """Returns a rank's share forward and backward, with gradients of all that is learned or comes from tokens."""
    plan, local, dout = local_inputs(case, rank)
    for name in mixer_of(case).constants(case.heads, 0, 2):
        local[name].requires_grad_(False)
    wanted = [tensor for tensor in local.values() if tensor.requires_grad]
    compute = core_of(case, group)

    def run() -> None:
        torch.autograd.grad(compute(local, plan.handle), wanted, dout)

    return run


def floor_of(case: VerifyCase, rank: int) -> Pass:
    """Returns the same pass on the rank's own tokens alone, as a sequence of their own."""
    assert case.layout == "contiguous" and not case.documents, "a shard is one segment, like a sequence of its own"
    own = len(case.plan().positions(rank))
    return pass_of(replace(case, seq=own, world=1), 0, None)


def lengths_of(cells: Sequence[LinearCell]) -> Iterator[tuple[str, str, list[LinearCell]]]:
    """Groups cells as (mixer, strategy, its lengths)."""
    key: Callable[[LinearCell], tuple[str, str]] = lambda cell: (cell.mixer, cell.strategy)  # noqa: E731
    for (mixer, strategy), group in itertools.groupby(sorted(cells, key=key), key=key):
        yield mixer, strategy, sorted(group, key=lambda cell: cell.seq)
