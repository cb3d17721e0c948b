"""Bytes of one token's tensors in a layer; strategies choose by them, and estimates are made of them."""

from __future__ import annotations

from dataclasses import dataclass

from longctx.options import DEFAULT, StrategyOptions
from longctx.planner import Topology


@dataclass(frozen=True)
class Sizes:
    """Gives the bytes of one token's tensors.

    ``element``: bytes of an element of q, k and v; ``wide``: of an accumulator. ``inner``: ranks in a row, where they
    are a grid. ``topology``: how ranks lie on nodes; None: all on one.
    """

    batch: int
    heads: int
    kv_heads: int
    head_dim: int
    element: int
    wide: int
    inner: int = 1
    options: StrategyOptions = DEFAULT
    topology: Topology | None = None

    @property
    def keys(self) -> int:
        """Returns the bytes of one token's keys (or values) over the batch."""
        return self.batch * self.kv_heads * self.head_dim * self.element

    @property
    def key_gradients(self) -> int:
        """Returns the bytes of one token's dk (or dv) in the accumulation dtype."""
        return self.batch * self.kv_heads * self.head_dim * self.wide

    @property
    def queries(self) -> int:
        """Returns the bytes of one token's queries (or out, or dout)."""
        return self.batch * self.heads * self.head_dim * self.element

    @property
    def query_gradients(self) -> int:
        """Returns the bytes of one token's dq, or of a partial out, in the accumulation dtype."""
        return self.batch * self.heads * self.head_dim * self.wide

    def held(
        self, queries: float = 0, outputs: float = 0, sums: float = 0, keys: float = 0, gradients: float = 0
    ) -> int:
        """Returns the bytes of one token in so many tensors of each kind.

        ``queries``: q, out or dout. ``outputs``, ``sums``: out or dq, and lse, in the accumulation dtype. ``keys``:
        keys with values. ``gradients``: of both.
        """
        wide = outputs * self.query_gradients + sums * self.lse + 2 * gradients * self.key_gradients
        return round(queries * self.queries + wide + 2 * keys * self.keys)

    @property
    def lse(self) -> int:
        """Returns the bytes of one token's log-sum-exp (or of its delta)."""
        return self.batch * self.heads * self.wide
