"""Measures what strategies send over the links between nodes: by closed form, as counted, and how long it takes.

Exchange only: the strategy runs as it is, with a kernel that computes nothing. The same messages leave in the same
order, each when what it carries has arrived; casts and sums of what came home are still done. Its time is compared with
that of the same messages on links of the given rate (``benchmarks.dependence``), and told beside bytes over rate.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.attention import local_inputs
from longctx.attention import get_strategy
from longctx.attention.costs.estimate import Volume
from longctx.attention.runtime.local_kernel import KernelProblem
from longctx.attention.runtime.partial import Partial, accumulation_dtype
from longctx.attention.runtime.registry import costs_of, inner_of
from longctx.attention.runtime.sizes import Sizes
from longctx.bench.timing import Report, Timing, silent, slowest
from longctx.catalog import KERNELS
from longctx.comm import group_of
from longctx.sequence import TileSet
from longctx.verify import VerifyCase
from longctx.verify.case import DTYPES
from longctx.verify.run import attention_of

PASSES = ("forward", "backward")
HEADERS = 14 + 20 + 32  # bytes of a packet before its payload: Ethernet, IPv4, TCP with timestamps
UNEXPLAINED = 0.01  # of the formula: what a link's counter may show beyond headers; Gloo's preambles, barriers
LATE = 1.15  # exchange-only time over what was predicted
EQUAL = 0.05  # predictions closer than this are in no order

Edge = tuple[int, int]  # from node, to node


class NoComputeKernel:
    """Stands in for a kernel and computes nothing, where only messages are of interest."""

    name = "silent"

    def refuses(self, problem: KernelProblem) -> str | None:
        """Refuses nothing."""
        return None

    def forward(self, q: Tensor, k: Tensor, v: Tensor, tiles: Sequence[TileSet], scale: float, into: Partial) -> None:
        """Leaves out at 0 and lse at -inf."""

    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        tiles: Sequence[TileSet],
        scale: float,
        grads: tuple[Tensor, Tensor, Tensor],
    ) -> None:
        """Leaves the gradients as they are."""


def sizes_of(case: VerifyCase) -> Sizes:
    """Returns the bytes that the case's tensors take in messages."""
    dtype = DTYPES[case.dtype]
    numbers = (dtype.itemsize, accumulation_dtype(dtype).itemsize)
    inner = inner_of(get_strategy(case.strategy), case.attention_case)
    return Sizes(case.batch, case.heads, case.kv_heads, case.head_dim, *numbers, inner, case.options)


def bytes_between_nodes(case: VerifyCase, nodes: int) -> dict[Edge, Volume]:
    """Returns what all ranks send between each pair of nodes in one layer, by the strategy's closed form.

    Nodes hold as many ranks each, in order.
    """
    costs, ranks = costs_of(get_strategy(case.strategy)), case.world // nodes
    assert costs is not None and costs.sends is not None, f"{case.strategy} publishes no closed form by receiver"
    assert case.world % nodes == 0, f"{case.world} ranks do not divide over {nodes} nodes"
    plan, sizes = case.plan(), sizes_of(case)
    found = {edge: Volume(0, 0, 0, 0) for edge in itertools.permutations(range(nodes), 2)}
    for rank in range(case.world):
        for receiver, cost in costs.sends(plan, rank, sizes):
            edge = (rank // ranks, receiver // ranks)
            if edge in found:
                found[edge] += cost
    return found


def busiest(sent: dict[Edge, int]) -> int:
    """Returns the bytes on the busiest of the nodes' links, in its busier direction."""
    nodes = {node for edge in sent for node in edge}
    ways = [(node, end) for node in nodes for end in (0, 1)]
    return max((sum(size for edge, size in sent.items() if edge[end] == node) for node, end in ways), default=0)


@dataclass(frozen=True)
class PassTraffic:
    """Tells what one rank saw of one pass.

    ``seconds``: from a common start until the last rank was done. ``sent``: this rank's payload bytes by receiver, as
    counted in ``longctx.comm``. ``link_bytes`` and ``link_packets``: what the node sent through its link meanwhile.
    """

    seconds: float
    sent: dict[int, int]
    link_bytes: int
    link_packets: int


def measure(
    cases: list[VerifyCase], repeats: int, counters: Callable[[], tuple[int, int]], report: Report = silent
) -> list[list[list[PassTraffic]]]:
    """Measures, by case and repeat, the forward and the backward pass of this rank; only exchanges, cases interleaved.

    ``counters``: bytes and packets that this node has sent through its link. The silent kernel must be known.
    """
    found: list[list[list[PassTraffic]]] = [[] for _ in cases]
    exchanges = [LinkTraffic(case) for case in cases]
    for repeat, number in itertools.product(range(repeats + 1), range(len(cases))):
        report(repeat * len(cases) + number, (repeats + 1) * len(cases), cases[number].strategy)
        passed = [_measured(run, counters) for run in (exchanges[number].forward, exchanges[number].backward)]
        if repeat:  # the first round opens connections and warms up
            found[number].append(passed)
    return found


@contextmanager
def silent_kernel() -> Iterator[None]:
    """Makes the silent kernel known."""
    KERNELS["silent"] = f"{__name__}:NoComputeKernel"  # the last of all, so that auto never comes to it
    try:
        yield
    finally:
        del KERNELS["silent"]


class LinkTraffic:
    """Runs both passes of one case on this rank, with the silent kernel, which must be known."""

    def __init__(self, case: VerifyCase) -> None:
        self._plan, (q, k, v, dout) = local_inputs(case)
        self._inputs = tuple(tensor.requires_grad_() for tensor in (q, k, v))
        self._dout = dout
        self._attention = attention_of(replace(case, kernel="silent"), dist.group.WORLD)
        self._out = self._dout

    def forward(self) -> None:
        """Runs the forward pass."""
        q, k, v = self._inputs
        self._out = self._attention(q, k, v, self._plan.handle)

    def backward(self) -> None:
        """Runs the backward pass."""
        torch.autograd.grad(self._out, self._inputs, self._dout)


def _measured(run: Callable[[], None], counters: Callable[[], tuple[int, int]]) -> PassTraffic:
    counted = group_of(dist.group.WORLD).traffic.by_receiver
    dist.barrier()
    sent, (link_bytes, link_packets) = dict(counted), counters()
    seconds = slowest(run)
    link_bytes_now, link_packets_now = counters()
    return PassTraffic(
        seconds,
        {receiver: size - sent.get(receiver, 0) for receiver, size in counted.items()},
        link_bytes_now - link_bytes,
        link_packets_now - link_packets,
    )


@dataclass(frozen=True)
class NodeSent:
    """Tells what one node sent through its link in one pass, in bytes, counted in three ways.

    By closed form, as its ranks counted, and by the link's own counter less headers. Of the last, repeats lie between
    ``link_least`` and ``link_most``.
    """

    formula: int
    counted: int
    link_least: int
    link_most: int

    @property
    def unexplained(self) -> float:
        """Returns what the link counted beyond the formula, as a share of it.

        It is that of the repeat with the fewest packets sent twice: a busy machine makes TCP repeat some.
        """
        return (self.link_least - self.formula) / max(self.formula, 1)


@dataclass(frozen=True)
class PassRow:
    """Tells what one pass of one case took, in seconds.

    ``busy``: what its bytes take at the links' rate if the busiest is never idle. ``predicted``: what they take in the
    order in which they need each other, which is no less.
    """

    name: str
    edges_equal: bool  # counted = formula on every edge between nodes, in every repeat
    nodes: tuple[NodeSent, ...]
    seconds: Timing
    busy: float
    predicted: float

    @property
    def ratio(self) -> float:
        """Returns the measured time over the predicted one."""
        return self.seconds.median / self.predicted if self.predicted else 1.0


def judged(
    case: VerifyCase, nodes: int, rate_mbit: int, ranks: list[list[list[PassTraffic]]], predicted: Sequence[float]
) -> list[PassRow]:
    """Compares the case's passes with what was predicted of each.

    ``ranks[rank][repeat][pass]`` is what every rank saw.
    """
    closed, per_node = bytes_between_nodes(case, nodes), case.world // nodes
    rows = []
    for number, name in enumerate(PASSES):
        formula = {edge: getattr(cost, name) for edge, cost in closed.items()}
        repeats = [[repeat[number] for repeat in seen] for seen in zip(*ranks, strict=True)]
        counted = [_crossed(repeat, per_node, formula) for repeat in repeats]
        shown = [
            [passed.link_bytes - HEADERS * passed.link_packets for passed in repeat[::per_node]] for repeat in repeats
        ]
        sent = tuple(
            NodeSent(_of(node, formula), _of(node, counted[0]), min(links), max(links))
            for node, links in enumerate(zip(*shown, strict=True))
        )
        equal = all(one == formula for one in counted)
        seconds = Timing.of([max(passed.seconds for passed in repeat) for repeat in repeats])
        busy = busiest(formula) * 8 / (rate_mbit * 1e6)
        rows.append(PassRow(name, equal, sent, seconds, busy, predicted[number]))
    return rows


def _crossed(repeat: Sequence[PassTraffic], per_node: int, edges: Iterable[Edge]) -> dict[Edge, int]:
    """Counts the bytes between nodes, as their ranks counted them."""
    found = dict.fromkeys(edges, 0)
    for rank, passed in enumerate(repeat):
        for receiver, size in passed.sent.items():
            edge = (rank // per_node, receiver // per_node)
            if edge in found:
                found[edge] += size
    return found


def _of(node: int, edges: dict[Edge, int]) -> int:
    return sum(size for (sender, _), size in edges.items() if sender == node)


def as_predicted(predicted: Sequence[float], measured: Sequence[float]) -> bool:
    """Tells whether what should be faster is, wherever predictions are apart."""
    pairs = itertools.permutations(zip(predicted, measured, strict=True), 2)
    return all(one[1] < other[1] for one, other in pairs if one[0] * (1 + EQUAL) < other[0])
