"""Defines what a data source declares, and opens the corpus that ``data.source`` names.

Each source's file holds its declaration; ``longctx.catalog`` maps its name to it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from longctx.catalog import SOURCES
from longctx.config import DataConfig
from longctx.data.corpus import Corpus
from longctx.data.files import local_path
from longctx.data.json_lines import Texts
from longctx.errors import ConfigError

Report = Callable[[int, int, str], None]  # (done, total, what) of work that takes long


def unreported(done: int, total: int, what: str) -> None:
    """Takes reports of how far some work is, for nobody."""


@dataclass(frozen=True)
class Check:
    """Says how what a corpus holds is looked at.

    ``progress``: told how far that is. ``cache``: folder of what was found earlier and holds while a file is unchanged,
    None for none. ``whole``: False leaves out what only a first look has to see.
    """

    progress: Report = unreported
    cache: Path | None = None
    whole: bool = True


@dataclass(frozen=True)
class TextFiles:
    """Holds files whose documents are text, before any of it is read.

    ``read(number, notes, at)`` yields the documents of one file in order, some at a time. It counts in ``notes`` what
    it passes over, and tells ``at`` how many bytes of the file it has read. ``facts``: what a run tells of the files.
    """

    root: Path
    paths: Sequence[Path]
    read: Callable[[int, Counter[str], Callable[[int], None]], Iterator[Texts]]
    facts: dict[str, Any]


@dataclass(frozen=True)
class Source:
    """Declares a data source.

    ``open(config, vocab_size, check)``: its corpus.
    ``reads``: fields of the section ``data`` that it reads among those that not every source does. ``ids``: its tokens
    are ids below this, where that is known before it is opened. ``texts(config)``: the files, of a source of text.
    """

    name: str
    open: Callable[[DataConfig, int, Check], Corpus]
    reads: frozenset[str] = frozenset()
    ids: int = 0
    texts: Callable[[DataConfig], TextFiles] | None = None

    def require_vocabulary(self, vocab_size: int) -> None:
        """Refuses a vocabulary that lacks ids which the source delivers. Raises ``ConfigError``."""
        if vocab_size < self.ids:
            raise ConfigError(
                f"model.vocab_size={vocab_size} must be at least {self.ids} for the bytes of data={self.name}; "
                f"nearest valid value: {self.ids}"
            )


def open_corpus(config: DataConfig, vocab_size: int, verify: bool = True, check: Check | None = None) -> Corpus:
    """Opens the corpus that ``config`` names for a model with ids 0 to ``vocab_size - 1``.

    ``verify=False`` leaves out the pass over all ids. ``check``: how that pass is made, and where it is remembered.

    Raises ``ConfigError`` for impossible settings, ``DataError`` naming the file for bad or missing data.
    """
    limit = config.max_documents
    if limit is not None and limit < 1:
        raise ConfigError(f"data.max_documents={limit}: take at least 1 document, or null for all of them")
    config = replace(config, path=local_path(config.path))
    source: Source = SOURCES.load(config.source)
    if config.tokenizer is None:
        source.require_vocabulary(vocab_size)
    return source.open(config, vocab_size, replace(check or Check(), whole=verify))


def preflight(config: DataConfig, vocab_size: int) -> None:
    """Raises all that opening the corpus would, before any process starts."""
    open_corpus(config, vocab_size)
