"""What the tests of strategies with travelling blocks share: their runs on sim and their traces."""

from __future__ import annotations

import torch

from longctx.options import DEFAULT, StrategyOptions
from longctx.sequence import SequencePlan
from longctx.sim import Cluster, Event
from tests.volume.measure import attend

HEADS = {"mha": (2, 2), "gqa": (4, 2), "mqa": (3, 1)}
FLASH = "aten._scaled_dot_product_flash_attention_for_cpu"


def assert_no_order_matters(
    strategy: str, plan: SequencePlan, inner: int = 1, options: StrategyOptions = DEFAULT
) -> None:
    """Whatever order the ranks take turns in, every bit is the same."""
    arguments = (strategy, plan, (4, 2), torch.bfloat16, inner, options)
    expected = Cluster(plan.world).run(attend, *arguments)
    for seed in range(4):
        for mine, right in zip(Cluster(plan.world, seed=seed).run(attend, *arguments), expected, strict=True):
            assert mine[1] == right[1] and all(torch.equal(a, b) for a, b in zip(mine[0], right[0], strict=True))


def traced(
    strategy: str, plan: SequencePlan, heads: tuple[int, int], inner: int = 1, options: StrategyOptions = DEFAULT
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
