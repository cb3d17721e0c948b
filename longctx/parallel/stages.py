"""Decides which layers each pipeline stage holds, by their estimated cost; plain data, the same on all ranks.

The slowest stage sets the pace of a pipeline, so the largest cost is made as small as it can be, exactly. The ends
of the model count: a head costs as much as several layers of a small model.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate, pairwise

from longctx.config import Config, ParallelConfig
from longctx.config.pipeline import RULES
from longctx.model import LayerFlops, Part


@dataclass(frozen=True)
class StageCosts:
    """What one sequence's forward pass costs in FLOP; the backward pass costs twice as much everywhere."""

    layers: tuple[float, ...]
    embedding: float
    head: float


def estimate_costs(config: Config) -> StageCosts:
    """Estimates the cost of a whole sequence without document edges: edges differ from batch to batch, stages do not.

    The embedding is a lookup: one operation per channel.
    """
    model, length = config.model, config.data.seq_len
    flops = LayerFlops.of(model, config.attention.chunk)

    def softmax(window: int | None) -> float:
        seen = min(window or length, length)
        pairs = seen * (seen + 1) // 2 + (length - seen) * seen
        return flops.softmax_weights * length + flops.pair * pairs

    cost = {
        "S": softmax(config.attention.window),
        "W": softmax(model.window),
        "L": (flops.linear_weights + flops.linear_core) * length,
    }
    return StageCosts(
        tuple(cost[kind] for kind in model.kinds),
        embedding=float(length * model.dim),
        head=2.0 * length * model.dim * model.vocab_size,
    )


def split_layers(costs: StageCosts, stages: int) -> list[range]:
    """Gives each stage consecutive layers, at least one, so that the largest cost of a stage is as small as possible.

    Of all such cuts the one with the smallest sum of squares is taken. So an expensive head does not leave the stages
    before it to chance.
    """
    assert 1 <= stages <= len(costs.layers), "the configuration refuses more stages than layers"
    sums = list(accumulate(costs.layers, initial=0.0))

    def cost(stage: int, start: int, stop: int) -> float:
        ends = costs.embedding * (stage == 0) + costs.head * (stage == stages - 1)
        return sums[stop] - sums[start] + ends

    largest, _ = _cut(len(costs.layers), stages, cost, max)
    bound = largest * (1.0 + 1e-12)  # sums in another order may differ in their last bits

    def square(stage: int, start: int, stop: int) -> float:
        own = cost(stage, start, stop)
        return own * own if own <= bound else math.inf

    _, bounds = _cut(len(costs.layers), stages, square, lambda before, own: before + own)
    return [range(start, stop) for start, stop in pairwise(bounds)]


def _cut(
    layers: int, stages: int, cost: Callable[[int, int, int], float], join: Callable[[float, float], float]
) -> tuple[float, tuple[int, ...]]:
    """Returns the least joined cost of cutting ``layers`` into ``stages``, and the bounds of that cut.

    It is dynamic programming over the layers that the first stages hold.
    """
    best: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, (0,))}
    for stage in range(stages):
        best = {
            stop: min(
                (join(value, cost(stage, start, stop)), (*bounds, stop))
                for start, (value, bounds) in best.items()
                if start < stop
            )
            for stop in range(stage + 1, layers - stages + stage + 2)
        }
    return best[layers]


def stage_numbers(parallel: ParallelConfig, rank: int) -> list[int]:
    """Returns the stages that pipeline rank ``rank`` holds, in the order in which data pass them.

    V-shaped schedules go down the ranks and up again, so that the first and the last stage share a rank;
    the others go around.
    """
    if RULES[parallel.pp_schedule].split_backward:
        return [rank, parallel.stages - 1 - rank]
    return list(range(rank, parallel.stages, parallel.pp))


def parts_of(config: Config) -> list[Part]:
    """Returns the part of the model that each stage holds."""
    stages = config.parallel.stages
    cut = split_layers(estimate_costs(config), stages)
    return [Part(layers, number == 0, number == stages - 1) for number, layers in enumerate(cut)]
