"""Masks: which keys of its own document a query may see, an integer band around itself."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from longctx.errors import ConfigError
from longctx.rules import whole
from longctx.sequence.documents import Documents, Int64


@dataclass(frozen=True)
class Mask:
    """Describes a band of visible keys, ``-(window - 1) <= key - query <= (0 if causal else window - 1)``.

    ``window=None`` has no lower (and, when not causal, no upper) end. Document edges cut the band; they come
    from ``Documents``, so that one mask serves every batch of a run.
    """

    causal: bool = True
    window: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.causal, bool):
            raise ConfigError(f"causal={self.causal!r} of a mask must be True or False")
        if self.window is None:
            return
        if whole("attention window", self.window) < 1:
            raise ConfigError(
                f"attention window {self.window} must be at least 1 (a query sees itself); use null for no window"
            )

    def within(self, window: int) -> Mask:
        """Returns the mask of layers that see ``window`` tokens of it at most."""
        return Mask(self.causal, window if self.window is None else min(window, self.window))

    def reach(self, most: int) -> tuple[int, int]:
        """Returns how many tokens before and after itself a query may see, ``most`` where the band has no end."""
        back = most if self.window is None else self.window - 1
        return back, 0 if self.causal else back

    def key_range(self, queries: Int64, documents: Documents) -> tuple[Int64, Int64]:
        """Returns the half-open range of global key positions that each global query position sees.

        ``queries``: int64 ``[N]``. Padding sees nothing: its range is empty.
        """
        start, stop = documents.bounds_of(queries)
        alive = stop > start
        if self.window is not None:
            start = np.maximum(start, queries - (self.window - 1))
            stop = np.minimum(stop, queries + self.window)
        if self.causal:
            stop = np.minimum(stop, queries + 1)
        return np.where(alive, start, 0), np.where(alive, stop, 0)
