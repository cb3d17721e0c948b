"""The dispatches of a batch, kept with its plan: made once, ahead of time or by the first operator."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

from torch import Tensor

from longctx.attention.runtime.operator import AttentionContext
from longctx.attention.strategies.disaggregated.assignment import fitting, one_node, planned, topology_of
from longctx.attention.strategies.disaggregated.dispatch import Dispatch
from longctx.planner import AttentionShape, Plan, Topology
from longctx.sequence import SequencePlan, view

_log = logging.getLogger(__name__)

Dispatches = tuple[Dispatch, Dispatch]  # of the forward and of the backward pass


@dataclass(frozen=True)
class DispatchKey:
    """Names what a planner was asked for."""

    planner: str
    widths: AttentionShape
    topology: Topology


@dataclass
class Known:
    """Holds the dispatches of one sequence plan.

    ``assigned``: by hand, by planner's name. ``prepared``: keys that were made ahead of time.
    """

    assigned: dict[str, Dispatches] = field(default_factory=dict)
    planned: dict[DispatchKey, Dispatches] = field(default_factory=dict)
    prepared: set[DispatchKey] = field(default_factory=set)


@view
def _known(plan: SequencePlan) -> Known:
    return Known()


def assign(plan: SequencePlan, forward: Plan, backward: Plan | None = None, planner: str = "cad") -> None:
    """Sets who computes what of the batch of this plan, in place of what ``planner`` would say.

    Raises ``ConfigError`` for a plan of other tokens or another mask, or that is not legal.
    """
    there, back = (Dispatch(fitting(plan, one)) for one in (forward, backward or forward))
    _known(plan).assigned[planner] = there, back
    plan.bound = "tasks were assigned by hand"


def dispatches(
    plan: SequencePlan, planner: str, widths: AttentionShape, topology: Topology | None = None
) -> Dispatches:
    """Returns the dispatches of both passes, planned at first use; all ranks come to the same.

    ``widths``: of the heads. ``topology``: how ranks lie on nodes; None: all on one.
    """
    return _found(plan, DispatchKey(planner, widths, topology or one_node(plan.world)))


def prepared(plan: SequencePlan, planner: str, widths: AttentionShape, topology: Topology | None = None) -> Dispatches:
    """Plans the dispatches of both passes ahead of the operators."""
    key = DispatchKey(planner, widths, topology or one_node(plan.world))
    _known(plan).prepared.add(key)
    return _found(plan, key)


def dispatches_of(context: AttentionContext, planner: str, q: Tensor, k: Tensor) -> Dispatches:
    """Returns the dispatches of an operator with queries and keys such as these."""
    key = DispatchKey(planner, widths_of(q, k), topology_of(context.group.ranks))
    known = _known(context.plan)
    ahead = [one for one in known.prepared if one.planner == planner]
    if ahead and key not in known.planned:
        # Another model of this process may have prepared this batch. In a run of one model it is a mistake, and slow.
        _log.warning("attention is planned now, in the step, for %s; planned ahead was %s", key, ahead)
    return _found(context.plan, key)


def first_dispatch(plan: SequencePlan, planner: str) -> Dispatch:
    """Returns the dispatch of the forward pass as it was planned first.

    If it was not planned yet, for heads of the planner's default widths.
    """
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
