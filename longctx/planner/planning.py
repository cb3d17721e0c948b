"""Plans batches: the one interface of all planners, and the cache of what was planned."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from longctx.errors import ConfigError
from longctx.planner.cost import Topology
from longctx.planner.document_placement import DocumentPlacement, contiguous, streamed, zigzag
from longctx.planner.options import PlannerOptions
from longctx.planner.plan import Plan
from longctx.planner.planners.all_gather import all_gather
from longctx.planner.planners.cad import cad
from longctx.planner.planners.local import local
from longctx.planner.planners.min_heap import min_heap
from longctx.planner.planners.per_document_zigzag import per_document_zigzag
from longctx.planner.planners.zeppelin import zeppelin, zone_layout
from longctx.planner.slices import Int64, MaskSlices
from longctx.planner.tasks import TaskRuns, Tasks

KEPT = 32  # plans in the cache; one of 512 servers is about 5 MB


@dataclass(frozen=True)
class Planner:
    """A planner that is registered under a name.

    ``runs``: which rank computes what, given where tokens live. ``home``: the layout that it is meant for.
    """

    runs: Callable[[DocumentPlacement, MaskSlices, Topology, PlannerOptions], TaskRuns]
    home: Callable[[Int64, Topology, PlannerOptions], DocumentPlacement]
    gathered: bool = False


def _streamed(lengths: Int64, topology: Topology, options: PlannerOptions) -> DocumentPlacement:
    return streamed(lengths, topology.servers)


PLANNERS = {
    "local": Planner(local, _streamed),
    "per_document_zigzag": Planner(per_document_zigzag, lambda n, topology, _: zigzag(n, topology.servers)),
    "all_gather": Planner(all_gather, lambda n, topology, _: contiguous(n, topology.servers), gathered=True),
    "min_heap": Planner(min_heap, _streamed),
    "cad": Planner(cad, _streamed),
    "zeppelin": Planner(zeppelin, zone_layout),
}

_cache: OrderedDict[bytes, Plan] = OrderedDict()
_planning = threading.Lock()  # batches are planned in threads of their own, while others run


def plan(
    planner: str,
    mask: MaskSlices,
    topology: Topology,
    options: PlannerOptions | None = None,
    home: DocumentPlacement | None = None,
) -> Plan:
    """Returns the plan that says which rank computes which cells of ``mask`` on ``topology``.

    It is a pure function of all its arguments. ``home``: where the tokens live; left out, the layout that the planner
    is meant for. Equal arguments give the same object, so every rank that calls it with the same lengths holds the same
    plan. Raises ConfigError for an unknown planner, or a home of other documents or ranks.
    """
    options = options or PlannerOptions()
    if planner not in PLANNERS:
        raise ConfigError(f"planner {planner!r} is unknown; valid planners: {', '.join(PLANNERS)}")
    if home is not None and (home.ranks != topology.servers or not np.array_equal(home.lengths, mask.lengths)):
        raise ConfigError(
            f"home has {len(home.lengths)} documents on {home.ranks} ranks, but the mask has {len(mask.lengths)} "
            f"documents and the topology {topology.servers} servers; they must be the same"
        )
    key = _key(planner, mask, topology, options, home)
    with _planning:
        if key not in _cache:
            _cache[key] = make_plan(planner, mask, topology, options, home)
            if len(_cache) > KEPT:
                _cache.popitem(last=False)
        _cache.move_to_end(key)
        return _cache[key]


def make_plan(
    planner: str, mask: MaskSlices, topology: Topology, options: PlannerOptions, home: DocumentPlacement | None = None
) -> Plan:
    """Makes the plan that ``plan`` returns, without the cache."""
    chosen = PLANNERS[planner]
    where = home if home is not None else chosen.home(mask.lengths, topology, options)
    runs = chosen.runs(where, mask, topology, options)
    return Plan(planner, where, mask, Tasks.of_runs(mask, runs), options.widths, gathered=chosen.gathered)


def _key(
    planner: str, mask: MaskSlices, topology: Topology, options: PlannerOptions, home: DocumentPlacement | None
) -> bytes:
    digest = hashlib.blake2b(repr((planner, topology, options, mask.per_doc, home and home.ranks)).encode())
    for array in (*mask.columns, *(home.columns if home is not None else ())):
        digest.update(len(array).to_bytes(8, "little") + np.ascontiguousarray(array).tobytes())
    return digest.digest()
