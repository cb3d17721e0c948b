"""A planner's plan of a batch: the bridge between where tokens are and ``longctx.planner``."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from longctx.comm import links_of, per_node
from longctx.errors import ConfigError
from longctx.planner import (
    AttentionShape,
    DocumentPlacement,
    MaskSlices,
    Plan,
    PlannerOptions,
    Topology,
    causal,
    check,
    full,
    plan,
    window,
)
from longctx.sequence import TokenOwnership
from longctx.sequence.documents import Int64
from longctx.sequence.token_ownership import touched

BLOCK = 128  # rows that a cut counts by; a kernel's tile
PER_RANK = 16  # blocks that a rank has at least: short sequences are cut finer


def topology_of(ranks: Sequence[int]) -> Topology:
    """How these global ranks lie on nodes, and what joins them; the same on all of them."""
    links = links_of(ranks)
    return Topology(len(ranks), per_node(ranks), links.link, links.nic, links.nics)


def one_node(servers: int) -> Topology:
    return Topology(servers, per_node=servers, nics=1)


def planned(homes: TokenOwnership, planner: str, widths: AttentionShape, topology: Topology) -> Plan:
    """Who serves what, on servers that are the ranks of ``homes``; the same on every rank."""
    options = PlannerOptions(block=max(1, min(BLOCK, homes.shard // PER_RANK)), widths=widths)
    return plan(planner, mask_of(homes), topology, options, home_of(homes))


def fitting(homes: TokenOwnership, made: Plan) -> Plan:
    """A plan made by hand, if it is legal and of this batch. Raises ConfigError otherwise."""
    home, mask = home_of(homes), mask_of(homes)
    if made.home.ranks != home.ranks or not all(map(np.array_equal, made.home.columns, home.columns)):
        raise ConfigError(
            f"the plan is of {int(made.home.lengths.sum())} tokens on {made.home.ranks} ranks, which are not where the "
            f"batch has its {int(home.lengths.sum())} on {home.ranks}; make it for home_of(TokenOwnership.of(plan))"
        )
    if made.mask.per_doc != mask.per_doc or not all(map(np.array_equal, made.mask.columns, mask.columns)):
        raise ConfigError(
            f"the plan's mask is not the batch's, {homes.mask}; make it for mask_of(TokenOwnership.of(plan))"
        )
    check(made)
    return made


def mask_of(homes: TokenOwnership) -> MaskSlices:
    """Of the documents of all batch rows, one after another."""
    of, mask = _lengths(homes).tolist(), homes.mask
    if mask.window is not None:
        return window(of, mask.window, two_sided=not mask.causal)
    return causal(of) if mask.causal else full(of)


def home_of(homes: TokenOwnership) -> DocumentPlacement:
    """Where the layout has the tokens: runs of every rank, in the order of its memory."""
    (begin, end), runs = homes.bounds, homes.runs
    run, doc = touched(begin, end, runs.start, runs.stop)
    start, stop = np.maximum(runs.start[run], begin[doc]), np.minimum(runs.stop[run], end[doc])
    order = np.argsort(runs.rank[run], kind="stable")  # a rank's numbers ascend with its memory
    columns = (runs.rank[run], doc, start - begin[doc], stop - begin[doc])
    return DocumentPlacement(_lengths(homes), homes.world, [column[order] for column in columns])


def _lengths(homes: TokenOwnership) -> Int64:
    return np.concatenate([row.lengths for row in homes.documents])
