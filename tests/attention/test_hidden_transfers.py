"""Every strategy: which transfers are under way while what is computed, and which are exposed, from sim's traces.

``SCHEDULE`` says it by name for four ranks without a mask: behind how many calls of the local kernel each transfer of
a kind hides, in order; 0 is exposed. For any mask and layout, what is not named there as exposed hides behind a call,
and what is exposed could not be hidden: nothing is left to compute in its pass, or nothing can be computed yet.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from longctx import catalog
from longctx.attention import AttentionCase, StrategyAttention, get_strategy, refusal
from longctx.catalog import KERNELS
from longctx.options import DEFAULT, StrategyOptions
from longctx.sequence import Mask, SequencePlan
from longctx.sim import Cluster, Event, mark_step
from tests.attention import marking_kernel
from tests.attention.travelling import spans
from tests.equivalence.pairwise import pairwise
from tests.volume.measure import BACKWARD, FORWARD, LAYOUTS, MASKS, plan_of, with_row

WORLD, H, K, D = 4, 8, 4, 8


@dataclass(frozen=True)
class Transfer:
    """A kind of message: in which pass, what, its dtype and shape without rows, and what each hides behind."""

    step: int
    what: str
    dtype: str
    shape: tuple[int, ...]
    behind: tuple[int, ...]
    instead: bool = False  # it could hide, and something that is longer would be exposed in its place

    @property
    def exposed(self) -> bool:
        return 0 in self.behind


@dataclass(frozen=True)
class Row:
    strategy: str
    transfers: tuple[Transfer, ...]
    inner: int = 1
    options: StrategyOptions = DEFAULT

    def __str__(self) -> str:
        return f"{self.strategy}-{self.inner}-{self.options.backward_rotates}-{self.options.grad_dtype}"


def forward(what: str, shape: tuple[int, ...], behind: tuple[int, ...], dtype: str = "bfloat16") -> Transfer:
    return Transfer(FORWARD, what, dtype, shape, behind)


def backward(what: str, shape: tuple[int, ...], behind: tuple[int, ...], dtype: str = "bfloat16") -> Transfer:
    return Transfer(BACKWARD, what, dtype, shape, behind)


KEYS, QUERIES, SUMS = (2, 1, K, D), (2, 1, H, D), (2, 1, H)  # of a block without its rows
WIDE = "float32"
EACH, LAST, FIRST = (1, 1, 1), (1, 1, 0), (0, 0, 0)  # of three hops, or of three ranks at once
KEY_RING = (
    forward("keys and values", KEYS, EACH),
    backward("keys and values", KEYS, EACH),
    backward("the last dk and dv", KEYS, LAST, WIDE),
)
QUERIES_BACK = (
    backward("queries and dout", QUERIES, EACH),
    backward("lse and delta", SUMS, EACH, WIDE),
    backward("the last dq", (1, 1, H, D), LAST, WIDE),
)
SCHEDULE = (
    Row("ring", KEY_RING),
    Row("striped", KEY_RING),
    Row("burst", (forward("keys and values", KEYS, EACH), *QUERIES_BACK), 4, StrategyOptions(backward_rotates="q")),
    Row(
        "burst",
        (
            forward("keys and values", KEYS, (2, 1, 1)),
            backward("keys and values", KEYS, (2, 1, 1)),
            backward("the last dk and dv", KEYS, (2, 1, 0), WIDE),
        ),
        2,
        StrategyOptions(backward_rotates="kv"),
    ),
    Row(
        "burst",  # two rows of two: the first is the copy that crosses, under way for a lap of two
        (
            forward("keys and values", KEYS, (2, 1, 1)),
            backward("queries and dout", QUERIES, (2, 1, 1)),
            backward("lse and delta", SUMS, (2, 1, 1), WIDE),
            # The first lap's sum goes home while the second computes.
            backward("the last dq", (1, 1, H, D), (2, 1, 0), WIDE),
        ),
        2,
        StrategyOptions(backward_rotates="q"),
    ),
    Row(
        "token_ring",
        (
            forward("queries", (1, 1, H, D), EACH),
            forward("the last out", (1, 1, H, D), LAST, WIDE),
            forward("the last lse", (1, 1, H), LAST, WIDE),
            *QUERIES_BACK,
        ),
    ),
    Row(
        "tree",
        (
            forward("queries", (1, H, D), EACH),
            forward("the last out", (1, H, D), LAST, WIDE),
            forward("the last lse", (1, H), LAST, WIDE),
            backward("queries, dout, out", (1, H, D), EACH * 3),
            backward("lse", (1, H), EACH, WIDE),
            backward("the last dq", (1, H, D), LAST, WIDE),
        ),
    ),
    Row(
        "gather",  # four groups of heads, to three ranks each
        (
            forward("the first keys and values", (2, 1, K // 4, D), FIRST + EACH * 3),
            backward("the first keys and values", (2, 1, K // 4, D), FIRST + EACH * 3),
            backward("the last dk and dv", (2, 1, K // 4, D), EACH * 3 + FIRST, WIDE),
        ),
    ),
    Row(
        "ulysses",  # of a key/value head each, which is one group
        (
            forward("q, k, v to heads", (1, (H + 2 * K) // 4, D), FIRST),
            forward("out to tokens", (1, H // 4, D), FIRST),
            backward("dout to heads", (1, H // 4, D), FIRST),
            backward("dq, dk, dv to tokens", (1, (H + 2 * K) // 4, D), FIRST),
        ),
        4,
    ),
    Row(
        "usp",  # two groups of heads, each a ring of two hops
        (
            forward("q, k, v to heads", (1, (H + 2 * K) // 4, D), (0, 2)),
            forward("keys and values", (2, 1, K // 4, D), (1, 1)),
            forward("out to tokens", (1, H // 4, D), (2, 0)),
            backward("dout to heads", (1, H // 4, D), (0, 2)),
            backward("keys and values", (2, 1, K // 4, D), (1, 1)),
            # Those of the first group would keep its dq, dk, dv from going home behind the second.
            replace(backward("the last dk and dv", (2, 1, K // 4, D), (0, 0), WIDE), instead=True),
            backward("dq, dk, dv to tokens", (1, (H + 2 * K) // 4, D), (2, 0)),
        ),
        2,
    ),
    Row(
        "rsa",  # behind matrix products: a hop computes one, or in the backward's last two rings two
        (
            forward("keys; values", (1, K, D), EACH * 2),
            backward("keys; values; keys", (1, K, D), EACH + (2, 2, 2) * 2),
            # The last dv arrives while the ring of keys turns.
            backward("the last dk", (1, K, D), (2, 2, 8, 2, 2, 0), WIDE),
        ),
    ),
)


@pytest.fixture(autouse=True)
def marking(monkeypatch):
    monkeypatch.setitem(KERNELS, "marking", f"{marking_kernel.__name__}:Marking")


def run(row: Row, plan: SequencePlan) -> None:
    batch = len(plan.documents)
    q, k, v, dout = (
        torch.randn(batch, plan.shard, heads, D).to(torch.bfloat16).requires_grad_() for heads in (H, K, K, H)
    )
    kernel = "auto" if row.strategy == "rsa" else "marking"
    options = with_row(row.strategy, row.inner, row.options)
    attention = StrategyAttention(row.strategy, dist.group.WORLD, kernel, options=options)
    mark_step(FORWARD)
    out = attention(q, k, v, plan.handle)
    mark_step(BACKWARD)
    torch.autograd.grad(out, (q, k, v), dout.detach())


def traced(row: Row, plan: SequencePlan) -> list[list[Event]]:
    cluster = Cluster(plan.world, trace_compute=True)
    cluster.run(run, row, plan)
    return cluster.trace


def calls(row: Row, events: list[Event], step: int) -> list[int]:
    """Places of the local kernel's calls in a pass, those that owe nothing included."""
    mark = {FORWARD: marking_kernel.FORWARD, BACKWARD: marking_kernel.BACKWARD}[step]
    name = "aten.bmm" if row.strategy == "rsa" else mark
    return [place for place, event in enumerate(events) if (event.operation, event.step) == (name, step)]


def kinds_of(row: Row, event: Event) -> list[Transfer]:
    """Kinds whose shape the message has but for its rows, which are the second or third dim. Where sums travel
    in the inputs' dtype their dtype does not tell them from what else has their shape."""
    [shape] = event.shapes
    shapes = [(*shape[:rows], *shape[rows + 1 :]) for rows in (1, 2)]
    return [
        one
        for one in row.transfers
        if one.step == event.step
        and one.shape in shapes
        and (one.dtype == event.dtype or row.options.grad_dtype == "compute")
    ]


def test_every_strategy_is_there():
    # Those whose messages are as a planner has assigned them have their schedule in test_disaggregated.
    assert {row.strategy for row in SCHEDULE} == set(catalog.STRATEGIES) - {"local", "disaggregated", "zeppelin"}


@pytest.mark.parametrize("row", SCHEDULE, ids=str)
@pytest.mark.parametrize("operation", ["send", "recv"])
def test_each_transfer_hides_behind_what_the_table_says(row, operation):
    plan = plan_of([(64,)], Mask(False), LAYOUTS["striped"], 64, WORLD)
    for events in traced(row, plan):
        found: dict[Transfer, list[int]] = {one: [] for one in row.transfers}
        for post, wait, event in spans(events):
            if event.operation == operation:
                computed = calls(row, events, event.step)
                [kind] = kinds_of(row, event)
                found[kind].append(sum(post < at < wait for at in computed))
        for one, counts in found.items():
            assert tuple(counts) == one.behind, one


@pytest.mark.parametrize(
    ("row", "grad_dtype", "layout", "mask", "lengths"),
    pairwise((SCHEDULE, ("fp32", "compute"), tuple(LAYOUTS), tuple(MASKS), ((64,), (20, 1, 43), (16, 16, 32), (3,)))),
    ids=str,
)
def test_under_any_mask_only_the_named_are_exposed_and_they_could_not_be_hidden(row, grad_dtype, layout, mask, lengths):
    row = replace(row, options=replace(row.options, grad_dtype=grad_dtype))
    case = AttentionCase(
        WORLD, H, K, layout.removesuffix("4"), MASKS[mask], options=row.options, documents=len(lengths) > 1
    )
    if refusal(get_strategy(row.strategy), case):
        return
    for events in traced(row, plan_of([lengths], MASKS[mask], LAYOUTS[layout], 64, WORLD)):
        for post, wait, event in spans(events):
            computed = calls(row, events, event.step)
            if not any(post < at < wait for at in computed):
                kinds = kinds_of(row, event)
                assert any(kind.exposed for kind in kinds), event
                chosen = any(kind.instead for kind in kinds)
                assert chosen or post > computed[-1] or wait < computed[0], f"{event} could have been hidden"


def test_the_documentation_names_what_is_exposed():
    page = (Path(__file__).parents[2] / "docs/attention.md").read_text(encoding="utf-8")
    table = page.partition("## What hides behind what")[2].partition("\n## ")[0]
    for row in SCHEDULE:
        [line] = [line for line in table.splitlines() if f"`{row.strategy}`" in line.partition(" | ")[0]]
        exposed = line.rpartition(" | ")[2]
        for transfer in row.transfers:
            assert not transfer.exposed or transfer.what in exposed, (row, transfer.what)
