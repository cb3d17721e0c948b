"""From chunks to segments and back: what a rank's segments do to a state, and which state enters each chunk."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from longctx.linear.affine import affine_exscan, applied, transition_gradient
from longctx.linear.chunks import Chunks
from longctx.linear.states import Summary


@dataclass(frozen=True)
class LocalScan:
    """The scan over a rank's chunks as if nothing entered its segments.

    ``entering`` ``[B, N, H, K, V + c]``: the state at each chunk and, in the last c columns, what the transitions up
    to there make of one that enters the segment: a diagonal (c = 1) or a matrix (c = K). ``leaving``
    ``[B, n, H, K, V + c]``: the same at the end of each segment. ``rows``: 1 where the diagonal is one number.
    """

    entering: Tensor
    leaving: Tensor
    values: int
    rows: int

    @property
    def transitions(self) -> Tensor:
        """Of the segments, ``[B, n, H, 1 or K, 1 or K]``."""
        return self.leaving[..., : self.rows, self.values :]

    @property
    def summary(self) -> Summary:
        return Summary(self.transitions, self.leaving[..., : self.values])

    def states(self, entered: Tensor, chunks: Chunks) -> Tensor:
        """The state that enters each chunk ``[B, N, H, K, V]``; ``entered`` ``[B, n, H, K, V]``: the segments."""
        alone, through = self.entering.split([self.values, self.entering.shape[-1] - self.values], -1)
        return alone + applied(through, entered.index_select(1, chunks.segment))

    def entered_gradient(self, dstates: Tensor, chunks: Chunks) -> Tensor:
        """Gradient of ``entered``, from that of the states."""
        back = applied(self.entering[..., self.values :].mT, dstates)
        sums = [back[:, start:stop].sum(1) for start, stop in chunks.runs]
        return torch.stack(sums, 1) if sums else back

    def gradients(self, dstates: Tensor, entered: Tensor, leaving: Tensor, chunks: Chunks) -> tuple[Tensor, Tensor]:
        """Gradients of (``entering``, ``leaving``), from those of the states and of what leaves the segments."""
        columns = (*self.entering.shape[:-1], self.entering.shape[-1] - self.values)
        through = transition_gradient(dstates, entered.index_select(1, chunks.segment), torch.Size(columns))
        transitions = transition_gradient(leaving, entered, self.transitions.shape)
        padded = leaving.new_zeros(*leaving.shape[:-1], columns[-1])
        padded[..., : self.rows, :] = transitions
        return torch.cat([dstates, through], -1), torch.cat([leaving, padded], -1)


def scan_chunks(transitions: Tensor, additions: Tensor, chunks: Chunks) -> LocalScan:
    """Scans the columns of S and those of the transitions' products together."""
    batch, count, heads, keys, values = additions.shape
    matrix = transitions.shape[-1] > 1
    start = torch.eye(keys, dtype=additions.dtype, device=additions.device) if matrix else additions.new_ones(keys, 1)
    columns = start.shape[1]
    nothing = additions.new_zeros(batch, count, heads, keys, columns)
    initial = additions.new_zeros(batch, len(chunks.runs), heads, keys, values + columns)
    initial[..., values:] = start
    entering, leaving = affine_exscan(transitions, torch.cat([additions, nothing], -1), initial, chunks.runs)
    return LocalScan(entering, leaving, values, transitions.shape[-2])
