"""Holds documents out of training, and delivers them for validation: each token once, in the same rows every time.

Which documents are held out follows from their number alone, whatever seed, mesh or sequence length a run has. So runs
with one corpus and one fraction validate on the same text. A document stays where it is when others are added behind.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from longctx.config import DataConfig
from longctx.config.sections.data import ValidationConfig
from longctx.data.checked import check_corpus, require_labels
from longctx.data.corpus import Corpus, Int64
from longctx.data.packing import Packing
from longctx.data.source import Check, Report, open_corpus, unreported
from longctx.errors import ConfigError
from longctx.sequence import IGNORE, Batch

_SPLIT = 0x7A11DA7E  # of the draw that splits; no run's own seed reaches it
_ORDER = 0  # seed of the order in which held-out documents are read: drawn, so that the first rows are a fair sample


def split(corpus: Corpus, fraction: float) -> tuple[Int64, Int64]:
    """Returns the numbers of the documents to train on and of those held out, int64, both ascending.

    Each document is drawn with probability ``fraction``; where none was, the one nearest to it. Of a mixture each
    source is split as it would be alone. Raises ``ConfigError`` when there is but one document.
    """
    kept, held, first = list[Int64](), list[Int64](), 0
    for name, documents in corpus.parts.items() or (("", len(corpus)),):
        if documents < 2:
            raise ConfigError(
                f"data.validation.fraction={fraction} holds out whole documents, and "
                + (f"data.mixture.{name} has {documents}; give it more, or fraction=0" if name else _alone(documents))
            )
        for into, own in zip((kept, held), _split(documents, fraction), strict=True):
            into.append(first + own)
        first += documents
    return np.concatenate(kept), np.concatenate(held)


def _alone(documents: int) -> str:
    return f"the corpus has {documents}; name a file of its own by data.validation.path"


def _split(documents: int, fraction: float) -> tuple[Int64, Int64]:
    words = np.random.Philox(np.random.SeedSequence(_SPLIT)).random_raw(documents)
    held = words < np.uint64(fraction * 2.0**64)
    if not held.any():
        held[np.argmin(words)] = True
    if held.all():
        held[np.argmax(words)] = False
    return np.flatnonzero(~held).astype(np.int64), np.flatnonzero(held).astype(np.int64)


def trained_on(asked: ValidationConfig, corpus: Corpus) -> Int64 | None:
    """Returns the numbers of the documents that a run is trained on, None for all of them."""
    return split(corpus, asked.fraction)[0] if asked.fraction else None


def open_held_out(config: DataConfig, corpus: Corpus, vocab_size: int) -> tuple[Corpus, Int64 | None]:
    """Returns what a run validates on: a corpus, and the numbers of the documents in it, None for all of them.

    ``corpus``: what the run is trained on, of which a part may be held out.
    """
    if config.validation.path is None:
        return corpus, split(corpus, config.validation.fraction)[1]
    return open_corpus(elsewhere(config), vocab_size, verify=False, check=Check(cache=corpus.cache)), None


def check_held_out(
    config: DataConfig,
    corpus: Corpus,
    vocab_size: int,
    progress: Report = unreported,
    cache: Path | None = None,
) -> None:
    """Refuses what a run cannot be validated on; all that is held out is read. ``corpus``: what the run trains on.

    ``progress``, ``cache``: as of ``check_corpus``. Raises ``DataError`` when one of the two parts has no label.
    """
    if config.validation.path is not None:
        check_corpus(elsewhere(config), vocab_size, progress, cache)
    elif config.validation.fraction:
        trained, held = split(corpus, config.validation.fraction)
        require_labels(corpus, trained)
        require_labels(corpus, held, use="validate on")


def elsewhere(config: DataConfig) -> DataConfig:
    """Returns the section ``data`` of the documents that ``data.validation.path`` names."""
    return replace(config, path=config.validation.path, max_documents=None)


class HeldOut:
    """Yields the microbatches of one validation pass, as a ``Loader`` yields those of a step.

    A pass takes the rows of one epoch of ``packing`` in their order, ``global_batch`` at a time; what fills up its last
    batch has no labels. So it counts every label of the documents once. ``sequences``: rows that a pass takes at most,
    None for all.
    """

    def __init__(
        self,
        packing: Packing,
        global_batch: int,
        dp_rank: int = 0,
        dp_world: int = 1,
        micro_batch: int = 1,
        sequences: int | None = None,
    ) -> None:
        assert 0 <= dp_rank < dp_world, f"rank {dp_rank} of {dp_world}"
        self.packing = packing
        self.next_sample = 0
        rows = -(-packing.epoch_tokens // packing.seq_len)
        self.sequences = rows if sequences is None else min(rows, sequences)
        self.steps = -(-self.sequences // global_batch)
        self._global_batch = global_batch
        self._own = np.arange(global_batch).reshape(dp_world, -1, micro_batch)[dp_rank]

    def advance(self) -> None:
        """Notes that one step's microbatches have been used; after the last of a pass comes the first again."""
        self.next_sample = (self.next_sample + self._global_batch) % (self.steps * self._global_batch)

    def batches(self, first_sample: int) -> list[Batch]:
        """Reads this rank's microbatches of the step that starts at a row: ``[micro_batch, S]`` each."""
        return [self._batch((first_sample + rows).tolist()) for rows in self._own]

    def _batch(self, rows: list[int]) -> Batch:
        tokens, labels, documents = zip(*(self.packing.row(row) for row in rows), strict=True)
        counted = np.stack(labels)
        for row, own in zip(rows, counted, strict=True):
            left = self.packing.epoch_tokens - row * self.packing.seq_len if row < self.sequences else 0
            own[max(left, 0) :] = IGNORE
        return Batch(torch.from_numpy(np.stack(tokens)), torch.from_numpy(counted), documents)


def packing_of(corpus: Corpus, chosen: Int64 | None, seq_len: int, document_mask: bool) -> Packing:
    """Packs held-out documents in the one order that all runs read them in; ``chosen``: their numbers, None for all."""
    return Packing(corpus, seq_len, _ORDER, document_mask, chosen=chosen)
