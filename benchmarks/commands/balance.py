"""``python -m benchmarks planning --balance`` shows what ``data.balance`` evens out, and what is left to servers.

Documents of the given lengths go through the trainer's own loader, without tokens: its rows, as it deals them.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from longctx.config import Config
from longctx.config.sections.data import BALANCES
from longctx.data import Balance, Corpus
from longctx.launcher.build import build_loader
from longctx.planner import PlannerOptions, Topology, causal, make_plan
from longctx.planner.document_placement import whole
from longctx.planner.pipelines import ClusterRun
from longctx.planner.slices import Int64

STEPS = 16  # of each draw

Step = list[list[Int64]]  # lengths of the documents of each rank, in each round of micro-batches of one row


@dataclass(frozen=True)
class MeanAndDeviation:
    """Holds the mean of a figure over all steps of all draws, and its standard deviation."""

    mean: float
    spread: float


@dataclass(frozen=True)
class BalanceRow:
    """Tells what one way to balance ``rows`` rows per rank and step gives, in micro-batches of one row.

    These are of the busiest rank, over the mean of all:
    - ``attention``: cells of a step.
    - ``floor``: what the longest document alone makes of that, at least 1.
    - ``step``: seconds with linear layers, when ranks wait for one another once a step.
    - ``lockstep``: seconds when they wait in every micro-batch, as under FSDP.

    ``seen``: tokens that a query sees, which rows decide by where they cut documents. ``gigabytes``: Q, O and KV that
    ``cad`` moves forward in a layer of an 8B model, bf16, for one micro-batch of all ranks. Each rank is a server.
    """

    context: int
    ranks: int
    rows: int
    balance: str
    attention: MeanAndDeviation
    floor: MeanAndDeviation
    step: MeanAndDeviation
    lockstep: MeanAndDeviation
    seen: MeanAndDeviation
    gigabytes: MeanAndDeviation


def balanced(lengths: Int64, context: int, ranks: int, rows: int, draws: int) -> list[BalanceRow]:
    """Measures all ways to balance on the same corpora, one shuffled by each draw's seed."""
    found = []
    for balance in BALANCES:
        steps = itertools.chain.from_iterable(
            _steps(lengths, context, ranks, rows, balance, draw) for draw in range(draws)
        )
        columns = zip(*map(_figures, steps), strict=True)
        measured = [MeanAndDeviation(float(np.mean(column)), float(np.std(column))) for column in columns]
        found.append(BalanceRow(context, ranks, rows, balance, *measured))
    return found


def _steps(lengths: Int64, context: int, ranks: int, rows: int, balance: str, draw: int) -> Iterator[Step]:
    """Yields what the trainer takes in the first steps of a run with that seed."""
    data, train = {"seq_len": context, "balance": balance}, {"seed": draw, "global_batch": ranks * rows}
    loader = build_loader(Config.from_dict({"data": data, "train": train}), _blank(lengths), 0, ranks)
    for step in range(STEPS):
        first = step * loader.global_batch
        samples = [loader.packing.lengths(first + number) for number in range(loader.global_batch)]
        yield [[samples[number] for number in held] for held in loader.rows(first)[:, :, 0].T.tolist()]


def _blank(lengths: Int64) -> Corpus:
    """Makes documents of these lengths, whose tokens are all 0 and take no memory."""
    bounds = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    tokens = np.broadcast_to(np.zeros(1, dtype=np.uint8), int(bounds[-1]))
    return Corpus(tokens, bounds, str, 1, "lengths", content_digest="")


def _figures(step: Step) -> tuple[float, ...]:
    """Computes the figures of one step, in the order of ``BalanceRow``."""
    run, ranks = ClusterRun(stages=1), len(step[0])
    cells = np.array([[Balance().cells(held).sum() for held in micro] for micro in step])  # [micro-batches, ranks]
    tokens = np.array([[held.sum() for held in micro] for micro in step])
    seconds = 3 * run.linear(1) * tokens + (1 + run.hardware.backward) * run.attention(1) * cells
    mean = seconds.sum() / ranks
    longest = max(int(held.max()) for micro in step for held in micro)
    return (
        cells.sum(0).max() * ranks / cells.sum(),
        max(1.0, Balance().cells(np.array(longest)) * ranks / cells.sum()),
        seconds.sum(0).max() / mean,
        seconds.max(1).sum() / mean,
        cells.sum() / tokens.sum(),
        float(np.mean([_moved(micro) for micro in step])) / 1e9,
    )


def _moved(micro: list[Int64]) -> int:
    home = whole(micro, len(micro))
    return make_plan("cad", causal(home.lengths), Topology(home.ranks), PlannerOptions(), home).cost.moved


def header() -> str:
    return (
        f"{'context':>8} {'ranks':>5} {'rows':>4} {'balance':<9} {'attention':>13} {'floor':>13} {'step':>13} "
        f"{'lockstep':>13} {'seen':>13} {'cad GB':>15}"
    )


def line(row: BalanceRow) -> str:
    ratios = [f"{one.mean:>6.2f} ±{one.spread:>5.2f}" for one in (row.attention, row.floor, row.step, row.lockstep)]
    rest = f"{row.seen.mean:>6.0f} ±{row.seen.spread:>5.0f} {row.gigabytes.mean:>8.2f} ±{row.gigabytes.spread:>5.2f}"
    return f"{row.context:>8} {row.ranks:>5} {row.rows:>4} {row.balance:<9} {' '.join(ratios)} {rest}"
