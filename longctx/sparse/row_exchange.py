"""Exchanges of rows between any ranks: tokens go where a rank needs them, and their gradients return.

For mixers that look at tokens anywhere in a document. What a reader wants is a set of places (``document_blocks``): all
of them, the ends of chunks, or blocks that its queries chose. A ``RowExchange`` is planned once and then used in both
directions. All ranks know what every one of them wants, so messages carry rows and nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from longctx.comm import Group, Pending, exchange
from longctx.sequence.documents import Int64


@dataclass(frozen=True)
class RowsInFlight:
    """Holds rows in flight. Between posting and awaiting them a rank may compute."""

    pending: Pending
    own: Tensor
    me: int

    def wait(self) -> list[Tensor]:
        """Returns the rows that came, by rank."""
        blocks = self.pending.wait()
        blocks[self.me] = self.own
        return blocks


class RowExchange:
    """Plans who sends which of its rows ``[1, n, ...]`` to whom.

    Also where they lie among those that the reader wants.
    """

    def __init__(self, held: Sequence[Int64], wanted: Sequence[Int64], me: int, device: torch.device) -> None:
        """``held``: ascending places by owner, together all; ``wanted``: ascending places by reader."""
        self.me = me
        self.places = wanted[me]
        self._held = len(held[me])
        self._sent = [_common(held[me], its, device)[0] for its in wanted]
        self._kept = [_common(its, wanted[me], device)[1] for its in held]

    @property
    def rows_sent(self) -> tuple[int, int]:
        """Returns how many rows leave this rank in ``fetch`` and in ``send_gradients``."""
        sent, kept = ([len(one) for one in side] for side in (self._sent, self._kept))
        return sum(sent) - sent[self.me], sum(kept) - kept[self.me]

    def fetch(self, x: Tensor, ranks: Group) -> RowsInFlight:
        """Sends this rank's rows ``[1, n, ...]`` to whoever wants them; ``arrange`` makes a buffer of what comes."""
        return self._post([x.index_select(1, rows) for rows in self._sent], [len(rows) for rows in self._kept], ranks)

    def arrange(self, in_flight: RowsInFlight) -> Tensor:
        """Returns what this rank wants, ``[1, wanted, ...]`` in order of place."""
        blocks = in_flight.wait()
        whole = in_flight.own.new_empty(1, len(self.places), *in_flight.own.shape[2:])
        for block, rows in zip(blocks, self._kept, strict=True):
            whole.index_copy_(1, rows, block)
        return whole

    def send_gradients(self, shares: Tensor, ranks: Group) -> RowsInFlight:
        """Sends gradients of what was fetched, ``[1, wanted, ...]``, to the owners; ``total`` sums what comes."""
        sends = [shares.index_select(1, rows) for rows in self._kept]
        return self._post(sends, [len(rows) for rows in self._sent], ranks)

    def total(self, in_flight: RowsInFlight) -> Tensor:
        """Returns the sum of all ranks' shares of this rank's rows, ``[1, n, ...]``, in rank order."""
        whole = in_flight.own.new_zeros(1, self._held, *in_flight.own.shape[2:])
        for share, rows in zip(in_flight.wait(), self._sent, strict=True):
            whole.index_add_(1, rows, share)
        return whole

    def _post(self, sends: list[Tensor], expected: list[int], ranks: Group) -> RowsInFlight:
        own = sends[self.me]
        others = [(other, tensor) for other, tensor in enumerate(sends) if other != self.me]
        buffers = [
            (other, own.new_empty(1, rows if other != self.me else 0, *own.shape[2:]))
            for other, rows in enumerate(expected)
        ]
        return RowsInFlight(exchange(ranks, others, buffers), own, self.me)


def _common(some: Int64, others: Int64, device: torch.device) -> tuple[Tensor, Tensor]:
    """Where the places that both have lie in each."""
    near = np.searchsorted(others, some)
    mine = np.flatnonzero(np.append(others, -1)[near] == some)
    return torch.from_numpy(mine).to(device), torch.from_numpy(near[mine]).to(device)
