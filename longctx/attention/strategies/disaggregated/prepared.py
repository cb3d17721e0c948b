"""The dispatches of a batch, kept with its plan: made once, by the thread that plans ahead or by the first operator."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from longctx.attention.runtime.operator import AttentionContext
from longctx.attention.strategies.disaggregated.assignment import fitting, one_node, planned, topology_of
from longctx.attention.strategies.disaggregated.dispatch import Dispatch
from longctx.planner import AttentionShape, Plan, Topology
from longctx.sequence import SequencePlan, view

Dispatches = tuple[Dispatch, Dispatch]  # of the forward and of the backward pass


@dataclass(frozen=True)
class DispatchKey:
    """What a planner was asked for."""

    planner: str
    widths: AttentionShape
    topology: Topology


@dataclass
class Known:
    """What is known of one plan. ``assigned``: by hand, by planner's name. ``prepared``: keys that were made ahead."""

    assigned: dict[str, Dispatches] = field(default_factory=dict)
    planned: dict[DispatchKey, Dispatches] = field(default_factory=dict)
    prepared: set[DispatchKey] = field(default_factory=set)


@view
def _known(plan: SequencePlan) -> Known:
    return Known()


def assign(plan: SequencePlan, forward: Plan, backward: Plan | None = None, planner: str = "cad") -> None:
    """Serves the batch of this plan so, in place of what ``planner`` would say. Raises ConfigError for a plan of other
    tokens or another mask, or that is not legal."""
    there, back = (Dispatch(fitting(plan, one)) for one in (forward, backward or forward))
    _known(plan).assigned[planner] = there, back


def dispatches(
    plan: SequencePlan, planner: str, widths: AttentionShape, topology: Topology | None = None
) -> Dispatches:
    """Planned at first use, for heads of these ``widths`` and ranks on one node, or as ``topology`` has them; all ranks
    come to the same."""
    return _found(plan, DispatchKey(planner, widths, topology or one_node(plan.world)))


def prepared(plan: SequencePlan, planner: str, widths: AttentionShape, topology: Topology | None = None) -> Dispatches:
    """Likewise, ahead of the operators: from then on they may ask for nothing that was not prepared."""
    key = DispatchKey(planner, widths, topology or one_node(plan.world))
    _known(plan).prepared.add(key)
    return _found(plan, key)


def dispatches_of(context: AttentionContext, planner: str, q: Tensor, k: Tensor) -> Dispatches:
    """Those of an operator's call with queries and keys such as these."""
    key = DispatchKey(planner, widths_of(q, k), topology_of(context.group.ranks))
    ahead = [one for one in _known(context.plan).prepared if one.planner == planner]
    assert not ahead or key in ahead, f"an operator asks for {key}, and {ahead} was planned ahead"
    return _found(context.plan, key)


def first_dispatch(plan: SequencePlan, planner: str) -> Dispatch:
    """Of the forward pass as it was planned first; if it was not, for heads of the planner's default widths."""
    known = _known(plan)
    if planner in known.assigned:
        return known.assigned[planner][0]
    made = [there for key, (there, _) in known.planned.items() if key.planner == planner]
    return made[0] if made else dispatches(plan, planner, AttentionShape())[0]


def widths_of(q: Tensor, k: Tensor) -> AttentionShape:
    return AttentionShape(q.shape[2], k.shape[2], q.shape[3], q.element_size())


def _found(plan: SequencePlan, key: DispatchKey) -> Dispatches:
    known = _known(plan)
    if key.planner in known.assigned:
        return known.assigned[key.planner]
    if key not in known.planned:
        made = Dispatch(planned([plan], key.planner, key.widths, key.topology), key.topology)
        known.planned[key] = made, made
    return known.planned[key]
