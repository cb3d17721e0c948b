"""Puts together what a run is trained on: the documents of one source, or of a mixture, packed as it asks for."""

from __future__ import annotations

from fractions import Fraction

import numpy as np

from longctx.config import DataConfig
from longctx.config.sections.mixture import MixtureSource
from longctx.data.balance import Balance
from longctx.data.corpus import Corpus, Int64
from longctx.data.held_out import trained_on
from longctx.data.mixing.mixture import Mixture, MixturePart
from longctx.data.packing import Packing
from longctx.errors import ConfigError


def packing_of_run(
    config: DataConfig, corpus: Corpus, seed: int, document_mask: bool = True, window: int | None = None
) -> Packing | Mixture:
    """Packs what a run is trained on. ``window``: of its attention, by which work is evened out."""
    balance = None if config.balance == "none" else Balance(config.balance == "documents", window)
    chosen = trained_on(config.validation, corpus)

    def packing(chosen: Int64 | None) -> Packing:
        return Packing(corpus, config.seq_len, seed, document_mask, balance, chosen, config.long_documents)

    if not corpus.parts:
        return packing(chosen)
    parts, first = [], 0
    for name, documents in corpus.parts.items():
        one, own = config.mixture[name], np.arange(first, first + documents)
        if chosen is not None:
            own = chosen[slice(*np.searchsorted(chosen, [first, first + documents]))]
        try:
            once = found = packing(own)
            if one.repeat_longer:
                found = packing(np.repeat(own, repeats(one, corpus.lengths_of(own))))
        except ConfigError as error:
            raise ConfigError(f"data.mixture.{name}: {error}") from error
        share = Fraction(repr(one.weight))
        if config.weights == "documents":
            share = share * found.epoch_tokens / found.documents
        parts.append(MixturePart(name, share, found, documents, once.epoch_tokens, one.max_epochs))
        first += documents
    total = sum(part.share for part in parts)
    shared = [MixturePart(p.name, p.share / total, p.packing, p.documents, p.tokens, p.max_epochs) for p in parts]
    return Mixture(corpus, shared, _order(config, corpus, shared[0].packing.order), chosen)


def repeats(one: MixtureSource, lengths: Int64) -> Int64:
    """Returns how often documents of these lengths come in an epoch of a source: of several buckets the last counts."""
    times = np.ones(len(lengths), dtype=np.int64)
    for length, factor in sorted(one.repeat_longer.items()):
        times[lengths > length] = factor
    return times


def require_epochs(packing: Packing | Mixture, samples: int, global_batch: int) -> None:
    """Refuses a run of so many samples that goes over a source more often than its bound. Raises ``ConfigError``."""
    if not isinstance(packing, Mixture):
        return
    for used in packing.usage(samples):
        part, most = used.part, used.part.max_epochs
        if most is not None and used.epochs > most:
            share = float(packing.interleave.shares[packing.parts.index(part)])
            fewer = int(most * part.packing.epoch_rows / share) // global_batch
            while fewer and packing.usage(fewer * global_batch)[packing.parts.index(part)].epochs > most:
                fewer -= 1
            raise ConfigError(
                f"data.mixture.{part.name}.max_epochs={most:g}: {samples:,} sequences take {used.epochs:.2f} epochs "
                f"of it; nearest: train.steps={fewer}, or less data.mixture.{part.name}.weight"
            )


def _order(config: DataConfig, corpus: Corpus, packing: str) -> str:
    """Names what decides which document is read when, beside the documents themselves."""
    each = []
    for name in corpus.parts:
        one = config.mixture[name]
        longer = [f"{times} times above {length}" for length, times in sorted(one.repeat_longer.items())]
        each.append(" ".join([name, repr(one.weight), *longer]))
    return f"{packing}; mixture by {config.weights}: {', '.join(each)}"
