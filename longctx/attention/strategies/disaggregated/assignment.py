"""Plans of ``longctx.planner`` for the batches of sequence plans: who computes what for whom."""

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
from longctx.sequence import SequencePlan
from longctx.sequence.documents import Int64

BLOCK = 128  # rows that a cut counts by; a kernel's tile
PER_RANK = 16  # blocks that a rank has at least: short sequences are cut finer


def topology_of(ranks: Sequence[int]) -> Topology:
    """Returns how these global ranks lie on nodes, and what joins them; the same on all of them."""
    links = links_of(ranks)
    return Topology(len(ranks), per_node(ranks), links.link, links.nic, links.nics)


def one_node(servers: int) -> Topology:
    """Returns the topology of servers that are all on one node."""
    return Topology(servers, per_node=servers, nics=1)


def planned(plans: Sequence[SequencePlan | None], planner: str, widths: AttentionShape, topology: Topology) -> Plan:
    """Returns who computes what of the batches of these plans; the same on every rank.

    Tokens are where ``home_of`` says.
    """
    shard = next(plan.shard for plan in plans if plan is not None)
    options = PlannerOptions(block=max(1, min(BLOCK, shard // PER_RANK)), widths=widths)
    return plan(planner, mask_of(*plans), topology, options, home_of(*plans))


def fitting(batch: SequencePlan, made: Plan) -> Plan:
    """Returns a plan made by hand, if it is legal and of this batch. Raises ``ConfigError`` otherwise."""
    home, mask = home_of(batch), mask_of(batch)
    if made.home.ranks != home.ranks or not all(map(np.array_equal, made.home.columns, home.columns)):
        raise ConfigError(
            f"the plan is of {int(made.home.lengths.sum())} tokens on {made.home.ranks} ranks, which are not where the "
            f"batch has its {int(home.lengths.sum())} on {home.ranks}; make it for home_of(plan)"
        )
    if made.mask.per_doc != mask.per_doc or not all(map(np.array_equal, made.mask.columns, mask.columns)):
        raise ConfigError(f"the plan's mask is not the batch's, {batch.mask}; make it for mask_of(plan)")
    check(made)
    return made


def mask_of(*plans: SequencePlan | None) -> MaskSlices:
    """Returns the mask of the documents of all batch rows, one after another."""
    of, mask = _lengths(plans).tolist(), next(plan.mask for plan in plans if plan is not None)
    if mask.window is not None:
        return window(of, mask.window, two_sided=not mask.causal)
    return causal(of) if mask.causal else full(of)


def home_of(*plans: SequencePlan | None) -> DocumentPlacement:
    """Returns where the layout puts the tokens of a batch: spans of every rank, in the order of its memory.

    Several plans are of groups of ranks one behind the other. Each holds a batch of its own, or (None) nothing. They
    are of one run: of one mask and layout, and of sequences of one length. Rows of all batches count on, and a rank's
    local rows are those of its tensors ``[B * T/SP]``.
    """
    one = next(plan for plan in plans if plan is not None)
    found: list[tuple[Int64, ...]] = []
    rows: list[int] = []
    documents = 0
    for number, batch in enumerate(plans):
        rows += [0 if batch is None else len(batch.documents) * one.shard] * one.world
        if batch is None:
            continue
        assert (batch.mask, batch.length, batch.shard) == (one.mask, one.length, one.shard), "plans of one run"
        for row, packed in enumerate(batch.documents):
            for rank in range(one.world):
                spans = _spans(batch.positions(rank), packed.cu_seqlens)
                doc, start, stop, offset = spans
                ranks = np.full_like(doc, number * one.world + rank)
                found.append((ranks, documents + doc, start, stop, row * one.shard + offset))
            documents += len(packed.lengths)
    columns = [np.concatenate(column) for column in zip(*found, strict=True)]
    order = np.argsort(columns[0], kind="stable")  # a rank's batch rows ascend with its memory
    held = [column[order] for column in columns]
    return DocumentPlacement(_lengths(plans), len(rows), held, np.array(rows, dtype=np.int64))


def _spans(positions: Int64, edges: Int64) -> tuple[Int64, Int64, Int64, Int64]:
    """Documents, their tokens ``[start, stop)`` and local rows of one rank's ascending ``positions`` in a batch row."""
    places = np.arange(len(positions))
    doc = np.searchsorted(edges, positions, "right") - 1
    inside = positions < edges[-1]
    positions, places, doc = positions[inside], places[inside], doc[inside]
    opens = np.append(True, (np.diff(positions) != 1) | (np.diff(doc) != 0))[: len(positions)]
    first = np.flatnonzero(opens)
    last = np.append(first[1:], len(positions)) - 1
    start = positions[first] - edges[doc[first]]
    return doc[first], start, start + last - first + 1, places[first]


def _lengths(plans: Sequence[SequencePlan | None]) -> Int64:
    return np.concatenate([row.lengths for plan in plans if plan is not None for row in plan.documents])
