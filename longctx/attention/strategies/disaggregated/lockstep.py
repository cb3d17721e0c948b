"""Pipeline ticks for disaggregation across stages: all stages are in one phase, and each exchange has one plan.

Zhuang et al., "Efficient Long-context Language Model Training by Core Attention Disaggregation" (2025), section on
pipeline parallelism. M microbatches on P stages take M + P - 1 forward ticks and then as many backward:

    forward tick t    stage p holds microbatch t - p
    backward tick t   stage p holds microbatch t - (P - 1 - p)

What stage p does forward in tick t it does backward in tick t + P - 1 - 2p. A stage without a microbatch computes for
the others. Exchanges of a tick are numbered from the stage's first layer on, backward from its last. In number c take
part, with queries of their own, the stages that hold a microbatch and have more than c layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from enum import Enum

from longctx.attention.costs.disaggregated import volume_of
from longctx.attention.costs.estimate import Volume
from longctx.attention.runtime.sizes import Sizes
from longctx.attention.strategies.disaggregated.assignment import one_node, planned
from longctx.attention.strategies.disaggregated.dispatch import Dispatch
from longctx.planner import AttentionShape, Topology
from longctx.sequence import SequencePlan
from longctx.sequence.handles import shared

Held = tuple[int | None, ...]  # by stage: the microbatch whose tokens take part


class Phase(Enum):
    FORWARD = "forward"
    BACKWARD = "backward"


class LockstepPlan:
    """Plans the ticks of one step: a pure function of its batches, the same on all ranks of the pipeline.

    ``plans``: of the microbatches in order. ``layers``: softmax layers of every stage. Ranks of all stages that share
    sequences are one group, stage by stage, on nodes as ``topology`` has them. Every exchange is planned at first use.
    """

    def __init__(
        self,
        plans: Sequence[SequencePlan],
        layers: Sequence[int],
        planner: str,
        widths: AttentionShape,
        topology: Topology,
    ) -> None:
        self.plans, self.layers = tuple(plans), tuple(layers)
        self._planner, self._widths, self._topology = planner, widths, topology
        self._dispatches: dict[Held, Dispatch] = {}

    @property
    def count(self) -> int:
        """Returns how many ticks each phase has."""
        return len(self.plans) + len(self.layers) - 1

    def microbatch(self, phase: Phase, tick: int, stage: int) -> int | None:
        """Returns the number of the microbatch that a stage holds in a tick; None if it holds none."""
        number = tick - (stage if phase is Phase.FORWARD else len(self.layers) - 1 - stage)
        return number if 0 <= number < len(self.plans) else None

    def held(self, phase: Phase, tick: int, exchange: int) -> Held:
        """Returns, by stage, the microbatch whose tokens take part in an exchange of the tick."""
        numbers = [self.microbatch(phase, tick, stage) for stage in range(len(self.layers))]
        return tuple(number if exchange < layers else None for number, layers in zip(numbers, self.layers, strict=True))

    def exchanges(self, phase: Phase, tick: int) -> int:
        """Returns how many exchanges a tick has, which all ranks join: as many as the busiest stage has layers."""
        held = zip(self.held(phase, tick, 0), self.layers, strict=True)
        return max((layers for number, layers in held if number is not None), default=0)

    def dispatch(self, phase: Phase, tick: int, exchange: int) -> Dispatch:
        """Returns who computes what for whom in an exchange."""
        return self._dispatch(self.held(phase, tick, exchange))

    def assign(self, phase: Phase, tick: int, exchange: int, dispatch: Dispatch) -> None:
        """Sets who computes what for whom in an exchange, in place of what the planner would say."""
        self._dispatches[self.held(phase, tick, exchange)] = dispatch

    def ready(self, rank: int) -> None:
        """Plans all exchanges, and works out all that ``rank`` will ask for in them."""
        for phase in Phase:
            for dispatch in self._all(phase):
                dispatch.served(rank)

    def work(self, rank: int, phase: Phase = Phase.FORWARD) -> float:
        """Returns the (query, key) cells that a rank computes in a phase of the step, for all layers."""
        return sum(dispatch.cells(rank) for dispatch in self._all(phase))

    def volume(self, rank: int, sizes: Sizes) -> Volume:
        """Returns what a rank sends in the step, in all layers."""
        nothing = Volume(0, 0, 0, 0)
        forward = sum((volume_of(one, rank, sizes) for one in self._all(Phase.FORWARD)), nothing)
        backward = sum((volume_of(one, rank, sizes) for one in self._all(Phase.BACKWARD)), nothing)
        return Volume(forward.forward, backward.backward, forward.messages_forward, backward.messages_backward)

    def batches(self, held: Held) -> list[SequencePlan | None]:
        """Returns, by stage, the plan of the microbatch that takes part; None for none."""
        return [None if number is None else self.plans[number] for number in held]

    def _all(self, phase: Phase) -> Iterator[Dispatch]:
        for tick in range(self.count):
            for exchange in range(self.exchanges(phase, tick)):
                yield self.dispatch(phase, tick, exchange)

    def _dispatch(self, held: Held) -> Dispatch:
        if held not in self._dispatches:
            plan = planned(self.batches(held), self._planner, self._widths, self._topology)
            self._dispatches[held] = Dispatch(plan, self._topology)
        return self._dispatches[held]


def lockstep_plan_of(
    plans: Sequence[SequencePlan],
    layers: Sequence[int],
    planner: str,
    widths: AttentionShape,
    topology: Topology | None = None,
) -> LockstepPlan:
    """Returns the ticks of these batches, or those made before, as long as anybody holds them.

    Ranks of all stages are on one node, or as ``topology`` has them.
    """
    topology = topology or one_node(len(layers) * plans[0].world)
    key = (LockstepPlan, *(plan.id for plan in plans), *layers, planner, widths, topology)
    return shared(key, lambda: LockstepPlan(plans, layers, planner, widths, topology))
