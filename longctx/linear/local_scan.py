"""Scans what a rank's segments do to a state, and which state enters each chunk.

It takes two steps of the same kind. Chunks are scanned piece by piece, as if nothing entered the piece's spans. Spans
are scanned to segments, as if nothing entered these.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from longctx.linear.affine import (
    Resets,
    Runs,
    affine_exscan,
    affine_exscan_adjoint,
    apply_transitions,
    dropped,
    transition_gradient,
)
from longctx.linear.chunks import Chunks, Pieces
from longctx.linear.states import Summary


@dataclass(frozen=True)
class LocalScan:
    """The scan over a piece's chunks that assumes that nothing entered its spans.

    ``entering`` ``[B, N, H, K, V + c]``: the state at each chunk. The last c columns are what the transitions up to
    there make of a state that enters the span. They are a diagonal (c = 1) or a matrix (c = K). ``leaving`` ``[B, n, H,
    K, V + c]``: the same at the end of each span. ``rows``: 1 where the diagonal is one number.
    """

    entering: Tensor
    leaving: Tensor
    values: int
    rows: int

    @property
    def transitions(self) -> Tensor:
        """Transitions of the spans, ``[B, n, H, 1 or K, 1 or K]``."""
        return self.leaving[..., : self.rows, self.values :]

    @property
    def additions(self) -> Tensor:
        """Additions of the spans, ``[B, n, H, K, V]``."""
        return self.leaving[..., : self.values]

    def states(self, entered: Tensor, chunks: Chunks) -> Tensor:
        """Returns the state that enters each chunk, ``[B, N, H, K, V]``.

        ``entered``: the states that enter the spans, ``[B, n, H, K, V]``.
        """
        alone, through = self.entering.split([self.values, self.entering.shape[-1] - self.values], -1)
        return alone + apply_transitions(through, dropped(entered.index_select(1, chunks.segment), chunks.unreached))

    def entered_gradient(self, dstates: Tensor, chunks: Chunks) -> Tensor:
        """Returns the gradient of the states that enter the spans, from that of the states that enter chunks."""
        back = dropped(apply_transitions(self.entering[..., self.values :].mT, dstates), chunks.unreached)
        sums = [back[:, start:stop].sum(1) for start, stop in chunks.runs]
        return torch.stack(sums, 1) if sums else back

    def gradients(self, dstates: Tensor, entered: Tensor, leaving: Tensor, chunks: Chunks) -> tuple[Tensor, Tensor]:
        """Returns the gradients of ``entering`` and ``leaving``.

        ``dstates``, ``leaving``: gradients of the chunks' states and of what leaves the spans.
        """
        columns = (*self.entering.shape[:-1], self.entering.shape[-1] - self.values)
        at_chunks = entered.index_select(1, chunks.segment)
        through = transition_gradient(dstates, at_chunks, torch.Size(columns), chunks.unreached)
        transitions = transition_gradient(leaving, entered, self.transitions.shape, chunks.run_resets)
        padded = leaving.new_zeros(*leaving.shape[:-1], columns[-1])
        padded[..., : self.rows, :] = transitions
        return torch.cat([dstates, through], -1), torch.cat([leaving, padded], -1)

    def detach(self) -> LocalScan:
        return LocalScan(self.entering.detach(), self.leaving.detach(), self.values, self.rows)


class SpanScan:
    """The scan over all spans of a rank that assumes that nothing entered its segments."""

    def __init__(self, scans: Sequence[LocalScan], pieces: Pieces) -> None:
        self._transitions = torch.cat([scan.transitions for scan in scans], 1)
        self._additions = torch.cat([scan.additions for scan in scans], 1)
        self._pieces = pieces

    @property
    def summary(self) -> Summary:
        """The summary of the rank's segments: their transitions and additions."""
        whole = scan_chunks(self._transitions, self._additions, self._pieces.runs, self._pieces.resets)
        return Summary(whole.transitions, whole.additions)

    def entering(self, entered: Tensor) -> tuple[Tensor, ...]:
        """Returns the states that enter the spans, by piece.

        ``entered``: the states that enter segments, ``[B, n, H, K, V]``.
        """
        runs, resets = self._pieces.runs, self._pieces.resets
        return self._pieces.split(affine_exscan(self._transitions, self._additions, entered, runs, resets)[0])

    def entered_gradient(self, dentering: Tensor) -> Tensor:
        """Returns the gradient of the states that enter segments.

        ``dentering``: gradients of the states that enter spans, by what their chunks read of them.
        """
        return affine_exscan_adjoint(self._transitions, dentering, None, self._pieces.runs, self._pieces.resets)[1]

    def leaving_gradients(self, dentering: Tensor, leaving: Tensor) -> tuple[Tensor, ...]:
        """Returns the gradients of the states that leave the spans, by piece.

        ``dentering``: gradients of the states that enter the spans. ``leaving``: gradients of the states that leave
        segments, ``[B, n, H, K, V]``.
        """
        runs, resets = self._pieces.runs, self._pieces.resets
        return self._pieces.split(affine_exscan_adjoint(self._transitions, dentering, leaving, runs, resets)[0])


def scan_chunks(transitions: Tensor, additions: Tensor, runs: Runs, resets: Resets | None) -> LocalScan:
    """Scans the columns of S and those of the transitions' products together."""
    batch, count, heads, keys, values = additions.shape
    matrix = transitions.shape[-1] > 1
    start = torch.eye(keys, dtype=additions.dtype, device=additions.device) if matrix else additions.new_ones(keys, 1)
    columns = start.shape[1]
    nothing = additions.new_zeros(batch, count, heads, keys, columns)
    initial = additions.new_zeros(batch, len(runs), heads, keys, values + columns)
    initial[..., values:] = start
    entering, leaving = affine_exscan(transitions, torch.cat([additions, nothing], -1), initial, runs, resets)
    return LocalScan(entering, leaving, values, transitions.shape[-2])
