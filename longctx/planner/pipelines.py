"""Models training steps of three systems on one batch: fixed packing, WLB-LLM and CAD.

They run on the clock of ``events``. Compute is taken by operation counts at a fixed efficiency, in a 1F1B pipeline of
``stages`` for each of ``replicas``. The exchange of gradients is left out, since all systems share it. WLB-LLM (2025)
stands for variable-length packing with per-document context parallelism at its best degree. CAD (2025) stands for one
plan a tick across replicas and stages.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from longctx.planner.cost import AttentionShape, Topology
from longctx.planner.document_placement import whole
from longctx.planner.events import Float64, Hardware, Operation, ReplayedAttention, replay, replay_plan
from longctx.planner.options import PlannerOptions
from longctx.planner.plan import Plan
from longctx.planner.planners.cad import cad
from longctx.planner.slices import Int64, causal
from longctx.planner.tasks import Tasks


@dataclass(frozen=True)
class ClusterRun:
    """A training run that is modelled: a layer, a cluster and how they are divided; the default is an 8B model.

    ``layers`` and ``parameters`` over all ``stages``; ``microbatches`` a step on each replica.
    """

    hardware: Hardware = field(default_factory=Hardware)
    widths: AttentionShape = field(default_factory=AttentionShape)
    layers: int = 32
    parameters: float = 7.0e9
    replicas: int = 8
    stages: int = 4
    microbatches: int = 8
    tolerance: float = 0.1

    def linear(self, tokens: float) -> float:
        """Returns the forward seconds of a stage's linear layers; backward is twice that."""
        return 2 * self.parameters / self.stages * tokens / self.hardware.flops

    def attention(self, cells: float) -> float:
        """Returns the forward seconds of a stage's attention."""
        work = 4 * self.widths.heads * self.widths.head_dim * cells * self.layers / self.stages
        return work / self.hardware.flops


def kernel_cells(documents: Int64, chunks: int, tile: int) -> Float64:
    """Returns the cells that a kernel pays for each causal document in ``chunks`` equal runs of rows.

    Those are the cells of whole tiles.
    """
    rows = documents / chunks
    return np.asarray(documents * (documents + 1) / 2 * np.ceil(rows / tile) * tile / rows)


def one_forward_one_backward(forward: Sequence[float], backward: Sequence[float], stages: int) -> float:
    """Returns the seconds of a 1F1B pipeline.

    All its stages take ``forward[m]`` and ``backward[m]`` for micro-batch m.
    """
    count = len(forward)
    steps: list[tuple[str, int, int]] = []
    for stage in range(stages):
        warmup = min(count, stages - 1 - stage)
        order = [("f", m) for m in range(warmup)]
        for m in range(count - warmup):
            order += [("f", warmup + m), ("b", m)]
        order += [("b", m) for m in range(count - warmup, count)]
        steps += [(kind, m, stage) for kind, m in order]
    number = {step: at for at, step in enumerate(steps)}
    operations = []
    for kind, m, stage in steps:
        before = ("f", m, stage - 1) if kind == "f" else ("b", m, stage + 1)
        after = [number[before]] if before in number else []
        operations.append(Operation(f"stage {stage}", forward[m] if kind == "f" else backward[m], after))
    return float(replay(operations).max())


def fixed_packing(run: ClusterRun, rows: Sequence[Int64]) -> float:
    """Returns the seconds of a step with one row a micro-batch, dealt to replicas in order.

    The slowest replica's pipeline is the step.
    """
    cells = partial(kernel_cells, chunks=1, tile=run.hardware.tile)
    return max(
        _pipeline(run, [(float(row.sum()), float(cells(row).sum()), 0.0) for row in rows[replica :: run.replicas]])
        for replica in range(run.replicas)
    )


def _pipeline(run: ClusterRun, batches: Sequence[tuple[float, float, float]]) -> float:
    """Returns the seconds of a pipeline.

    ``batches``: (tokens, cells, exposed seconds in each pass) of the micro-batches, per rank.
    """
    linear = [run.linear(tokens) for tokens, _, _ in batches]
    attention = [run.attention(cells) for _, cells, _ in batches]
    exposed = [seconds for _, _, seconds in batches]
    forward = [a + b + c for a, b, c in zip(linear, attention, exposed, strict=True)]
    backward = [2 * a + run.hardware.backward * b + c for a, b, c in zip(linear, attention, exposed, strict=True)]
    return one_forward_one_backward(forward, backward, run.stages)


def wlb(run: ClusterRun, rows: Sequence[Int64], hidden: bool = False, token_cap: float = 1.1) -> float:
    """Returns the seconds of a step at the best degree of context parallelism.

    Documents are packed by work under a cap on tokens. ``hidden``: the gather of keys costs no time. Degree c joins c
    replicas, and a micro-batch has the tokens of c rows. The replicas share every document equally, in 2 c chunks that
    pay whole tiles of rows as all tasks do. There is an all-gather of KV forward and a reduce-scatter of its gradients
    backward.
    """
    degrees = [c for c in range(1, run.replicas + 1) if run.replicas % c == 0]
    return min(_wlb_at(run, rows, degree, hidden, token_cap) for degree in degrees)


def _wlb_at(run: ClusterRun, rows: Sequence[Int64], degree: int, hidden: bool, token_cap: float) -> float:
    context = int(rows[0].sum())
    groups = run.replicas // degree
    documents = np.sort(np.concatenate(rows))[::-1]
    work = kernel_cells(documents, 1 if degree == 1 else 2 * degree, run.hardware.tile)
    packed = _packed(run, documents, work, groups * run.microbatches, int(token_cap * context * degree))
    packed.sort(key=lambda batch: -(run.linear(batch[0]) + run.attention(batch[1])))
    assigned: list[list[tuple[float, float, float]]] = [[] for _ in range(groups)]
    for tokens, cells in packed:
        lightest = min(
            (group for group in range(groups) if len(assigned[group]) < run.microbatches),
            key=lambda group: sum(run.linear(t) + run.attention(a) for t, a, _ in assigned[group]),
        )
        received = (degree - 1) / degree * tokens * run.widths.kv * run.layers / run.stages
        exposed = 0.0 if hidden else received / run.hardware.bandwidth
        assigned[lightest].append((tokens / degree, cells / degree, exposed))
    return max(_pipeline(run, batches) for batches in assigned)


def _packed(run: ClusterRun, documents: Int64, work: Float64, bins: int, cap: int) -> list[tuple[float, float]]:
    """Returns (tokens, cells) of each bin.

    Documents go longest first into the bin of least time that has tokens left.
    """
    tokens, cells, seconds = np.zeros(bins, dtype=np.int64), np.zeros(bins), np.zeros(bins)
    for length, its_cells in zip(documents.tolist(), work.tolist(), strict=True):
        place = int(np.argmin(np.where(tokens + length <= cap, seconds, np.inf)))
        if tokens[place] + length > cap:  # none has: the emptiest, beyond the cap
            place = int(np.argmin(tokens))
        tokens[place] += length
        cells[place] += its_cells
        seconds[place] = run.linear(int(tokens[place])) + run.attention(float(cells[place]))
    return list(zip(tokens.tolist(), cells.tolist(), strict=True))


@dataclass(frozen=True)
class CadStep:
    """What a step with core attention disaggregation takes.

    ``seconds``: of the step. ``communication``: the busiest rank's exchange over the window of other work that should
    hide it, per tick, forward; above 1 it would not be hidden. ``received``: the most bytes that a server holds.
    """

    seconds: float
    communication: tuple[float, ...]
    received: float


def disaggregated(run: ClusterRun, rows: Sequence[Int64], idle_serve: bool = True) -> CadStep:
    """Returns what a step takes whose ticks go in step on all stages.

    Each tick takes its linear part and the slowest server's attention; exchanges are hidden. ``idle_serve``: stages
    without a micro-batch in warm-up and drain serve attention too. Backward ticks mirror the forward ones, so their
    plans have the same balance.
    """
    seconds, shares, received = 0.0, [], 0.0
    for tick in range(run.microbatches + run.stages - 1):
        active = [(stage, tick - stage) for stage in range(run.stages) if 0 <= tick - stage < run.microbatches]
        active_rows = [rows[batch * run.replicas + replica] for _, batch in active for replica in range(run.replicas)]
        layer = _tick(run, active_rows, run.replicas * (run.stages if idle_serve else len(active)))
        linear = run.linear(max(int(row.sum()) for row in active_rows))
        layers = run.layers / run.stages
        attention = float(layer.compute.max()) * layers
        seconds += linear * 3 + attention * (1 + run.hardware.backward)
        # Ping-pong: half of the batch travels while the other half computes.
        shares.append(float(layer.communication.max()) * layers / (linear + attention))
        received = max(received, float(layer.received.max()))
    return CadStep(seconds, tuple(shares), received)


def _tick(run: ClusterRun, rows: Sequence[Int64], servers: int) -> ReplayedAttention:
    """Replays one layer of one tick: row i lives on server i, the rest are idle but serve."""
    home = whole(rows, servers)
    mask = causal(home.lengths)
    runs = cad(home, mask, Topology(servers), PlannerOptions(tolerance=run.tolerance, widths=run.widths))
    return replay_plan(Plan("cad", home, mask, Tasks.of_runs(mask, runs), run.widths), run.hardware)
