"""Mixes sources: every sample is a row of one of them, and the shares of tokens are those that were asked for.

Each source has a stream of rows of its own, with its own epochs. No document of one is cut for another's sake.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from longctx.data.balance import Balance, Piece
from longctx.data.corpus import Corpus, Int64
from longctx.data.mixing.interleave import SMALLEST, Interleave
from longctx.data.packing import Packing
from longctx.errors import ConfigError
from longctx.sequence import Documents


@dataclass(frozen=True)
class MixturePart:
    """Holds one source of a mixture.

    ``share``: of the mixture's tokens. ``packing``: its rows. ``documents``, ``tokens``: that it has, each once.
    ``max_epochs``: how often a run may go over it, None for any number of times.
    """

    name: str
    share: Fraction
    packing: Packing
    documents: int
    tokens: int
    max_epochs: float | None = None


@dataclass(frozen=True)
class Usage:
    """Tells what a number of samples takes of one source: rows, and how often it goes over all its documents."""

    part: MixturePart
    rows: int
    epochs: float

    @property
    def facts(self) -> dict[str, Any]:
        """Returns it as plain JSON values."""
        part = self.part
        return {
            "name": part.name,
            "documents": part.documents,
            "tokens": part.tokens,
            "share": float(part.share),
            "sequences": self.rows,
            "epochs": self.epochs,
        }


class Mixture:
    """Cuts samples of ``seq_len`` tokens from the sources of ``corpus``, as ``Packing`` does from one.

    ``chosen``: numbers of the documents that are trained on, None for all. ``order``: the name that a checkpoint gives
    to how documents become samples.
    """

    def __init__(self, corpus: Corpus, parts: Sequence[MixturePart], order: str, chosen: Int64 | None = None) -> None:
        first = parts[0].packing
        self.corpus = corpus
        self.parts = tuple(parts)
        self.order = order
        self.chosen = chosen
        self.seq_len: int = first.seq_len
        self.seed: int = first.seed
        self.balance: Balance | None = first.balance
        self.document_mask: bool = first.document_mask
        self.epoch_tokens = sum(part.tokens for part in parts)
        for part in parts:
            if part.share < SMALLEST:
                raise ConfigError(
                    f"data.mixture.{part.name}.weight: its share is {float(part.share):.2g} of the sequences, "
                    f"less than one in {1 / SMALLEST:,}; give it more weight, or data.mixture.{part.name}.weight=0"
                )
        self.interleave = Interleave([part.share for part in parts])

    def sample(self, index: int) -> tuple[Int64, Int64, Documents]:
        """Returns tokens, labels and documents of a sample, as ``Packing.sample`` does."""
        part, row = self._place(index)
        return part.packing.sample(row)

    def work(self, index: int) -> int:
        """Returns what attention costs for a sample, in (query, key) pairs of a layer."""
        part, row = self._place(index)
        return part.packing.work(row)

    def lengths(self, index: int) -> Int64:
        """Returns the tokens of each of a sample's documents, int64 ``[D]``."""
        part, row = self._place(index)
        return part.packing.lengths(row)

    def pieces(self, index: int) -> list[Piece]:
        """Returns the pieces of documents that a sample is made of."""
        part, row = self._place(index)
        return part.packing.pieces(row)

    def usage(self, samples: int) -> list[Usage]:
        """Returns what the first ``samples`` samples take of each source."""
        counts = self.interleave.counts(samples)
        return [
            Usage(part, rows, float(rows / part.packing.epoch_rows))
            for part, rows in zip(self.parts, counts, strict=True)
        ]

    def _place(self, index: int) -> tuple[MixturePart, int]:
        place = self.interleave.place(index)
        return self.parts[place.source], place.row
