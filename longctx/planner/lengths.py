"""Provides document lengths for benchmarks and tests: synthetic ones, and rows cut from a draw."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from longctx.errors import DataError
from longctx.planner.slices import Int64

LONG = 65536  # documents from here on count as long


def synthetic(seed: int, count: int = 20000) -> Int64:
    """Draws lengths in tokens that resemble a long-context mixture: lognormal, and one in a thousand from a long tail.

    Median near 1,900, longest near 340,000; a thousandth of the documents has about half of the sum of squares.
    """
    rng = np.random.default_rng(seed)
    lengths = np.exp(rng.normal(np.log(1900), 0.75, count))
    tail = rng.random(count) < 0.001
    lengths[tail] = LONG * (1 + rng.pareto(2.5, int(tail.sum())))
    return np.clip(lengths, 64, 340_000).astype(np.int64)


def read_lengths(path: str) -> Int64:
    """Reads a JSON list of lengths in tokens. Raises DataError where it is something else."""
    try:
        found = np.array(json.loads(Path(path).read_text(encoding="utf-8")), dtype=np.int64)
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"{path} must hold a JSON list of document lengths: {error}") from None
    if found.ndim != 1 or not len(found) or found.min() < 1:
        raise DataError(f"{path} must hold a JSON list of at least one document length, each at least 1")
    return found


def draw_rows(lengths: Int64, tokens: int, rows: int, rng: np.random.Generator) -> list[Int64]:
    """Draws ``rows`` rows of exactly ``tokens``: documents one by one with replacement; the row's end cuts the last."""
    found = []
    for _ in range(rows):
        row, left = [], tokens
        while left:
            row.append(min(left, int(lengths[rng.integers(len(lengths))])))
            left -= row[-1]
        found.append(np.array(row, dtype=np.int64))
    return found


def long_mixture(lengths: Int64, context: int, rng: np.random.Generator) -> Int64:
    """Lengthens a mixture as DistCA's evaluation does, and shuffles it.

    Of the documents below 64K 50-90% stay; longer ones are repeated 2-4 times. All grow by ``context / 64K``, and 30%
    of the long ones become ``context``.
    """
    short, long = lengths[lengths < LONG], lengths[lengths >= LONG]
    short = rng.permutation(short)[: int(len(short) * rng.uniform(0.5, 0.9))]
    long = np.repeat(long, rng.integers(2, 5)) * context // LONG
    long[rng.random(len(long)) < 0.3] = context
    return rng.permutation(np.concatenate([short * context // LONG, long]))


def stream_rows(lengths: Int64, tokens: int, rows: int) -> list[Int64]:
    """Cuts documents, one after another, into ``rows`` rows of exactly ``tokens``.

    A document that crosses a row's end is cut.
    """
    ends = np.cumsum(lengths)
    assert len(ends) and ends[-1] >= tokens * rows, "not enough documents"
    edges = np.unique(np.concatenate([ends[ends < tokens * rows], np.arange(rows + 1) * tokens, [0]]))
    pieces = np.diff(edges)
    row = edges[:-1] // tokens
    return [pieces[row == number] for number in range(rows)]
