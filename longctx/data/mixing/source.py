"""Opens the sources of a mixture as one corpus: their documents follow one another in the order they are named in."""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from longctx.config import DataConfig
from longctx.data.corpus import Corpus, Int64, Tokens
from longctx.data.formats.joined import JoinedRows
from longctx.data.formats.numbers import Numbers, blocks
from longctx.data.source import Check, Source, open_corpus
from longctx.data.text import TOKENIZING
from longctx.errors import LongctxError


@dataclass(frozen=True)
class _Row:
    """Shows a corpus as a row of tokens among others."""

    corpus: Corpus

    @property
    def kind(self) -> np.dtype[Any]:
        kind: np.dtype[Any] = self.corpus.tokens.dtype
        return kind

    def __len__(self) -> int:
        return self.corpus.total_tokens

    def read(self, start: int, stop: int) -> Tokens:
        return self.corpus.read(start, stop)


def open_mixture(config: DataConfig, vocab_size: int, check: Check) -> Corpus:
    """Opens every source that has a weight. Errors of one name it."""
    corpora: dict[str, Corpus] = {}
    for name, one in config.mixture.items():
        if not one.weight:
            continue
        try:
            corpora[name] = open_corpus(config.of_source(name), vocab_size, check.whole, check)
        except LongctxError as error:
            raise type(error)(f"data.mixture.{name}: {error}") from error
    return join(corpora, vocab_size, check.cache)


def join(corpora: Mapping[str, Corpus], vocab_size: int, cache: Path | None = None) -> Corpus:
    """Returns the corpus that has the documents of all of ``corpora``, which are its parts."""
    each = list(corpora.values())
    firsts = list(accumulate((len(corpus) for corpus in each), initial=0))
    makers = {corpus.tokenizer for corpus in each}
    row = JoinedRows([_Row(corpus) for corpus in each])

    def origin(document: int) -> str:
        number = bisect_right(firsts, document) - 1
        return each[number].origin(document - firsts[number])

    def digest() -> str:
        return hashlib.sha256("".join(corpus.fingerprint for corpus in each).encode()).hexdigest()

    return Corpus(
        row,
        _bounds(each),
        origin,
        vocab_size,
        f"mixture of {', '.join(corpora)}",
        sum(corpus.skipped_empty for corpus in each),
        digest,
        {"sources": {name: _facts(corpus) for name, corpus in corpora.items()}},
        row.read,
        _learned(each),
        cache,
        {name: len(corpus) for name, corpus in corpora.items()},
        makers.pop() if len(makers) == 1 else None,
    )


def _facts(corpus: Corpus) -> dict[str, Any]:
    return {"documents": len(corpus), "tokens": corpus.total_tokens, "sha256": corpus.fingerprint, **corpus.facts}


def _bounds(corpora: Sequence[Corpus]) -> Int64:
    bounds, base = Numbers(), 0
    for corpus in corpora:
        for _, part in blocks(corpus.bounds):
            bounds.extend(base + part[:-1])
        base += corpus.total_tokens
    bounds.extend(np.array([base]))
    return bounds.done()


def _learned(corpora: Sequence[Corpus]) -> Callable[[int, int], NDArray[np.bool_]] | None:
    """Returns what tells which tokens are labels to learn; None where all are."""
    if all(corpus.learned is None for corpus in corpora):
        return None
    starts = list(accumulate((corpus.total_tokens for corpus in corpora), initial=0))

    def learned(start: int, stop: int) -> NDArray[np.bool_]:
        found = np.ones(stop - start, dtype=bool)
        for base, corpus in zip(starts, corpora, strict=False):
            first, last = max(start, base), min(stop, base + corpus.total_tokens)
            if first < last and corpus.learned is not None:
                found[first - start : last - start] = corpus.learned(first - base, last - base)
        return found

    return learned


MIXTURE = Source("mixture", open_mixture, reads=TOKENIZING | {"mixture", "weights", "recheck"})
