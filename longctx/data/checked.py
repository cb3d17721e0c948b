"""Checks a whole corpus before any rank waits for another: every hash, every id, and that there is something to learn.

All ways to start a run come through here while no timeout runs yet. What comes back is open, and its ``fingerprint``
is known: ranks compare it.
"""

from __future__ import annotations

from pathlib import Path

from longctx.config import DataConfig
from longctx.data.corpus import Corpus, Int64
from longctx.data.files import printable
from longctx.data.source import Check, Report, open_corpus, unreported
from longctx.errors import DataError


def check_corpus(
    config: DataConfig, vocab_size: int, progress: Report = unreported, cache: Path | None = None
) -> Corpus:
    """Opens the corpus of ``config`` after a check of all that is in it.

    ``progress``: told how far the check is, in MiB. ``cache``: folder of earlier checks that hold while a file is
    unchanged; None: everything is read. Raises as ``open_corpus`` does, and ``DataError`` when no token has a label.
    """
    corpus = open_corpus(config, vocab_size, check=Check(progress, cache))
    require_labels(corpus)
    corpus.fingerprint  # noqa: B018 - cached with the corpus: hashing takes long for one that is no token file
    return corpus


def require_labels(corpus: Corpus, chosen: Int64 | None = None, use: str = "learn") -> None:
    """Refuses documents that all have one token: a label is the token that follows in the same document.

    ``chosen``: numbers of the documents that are looked at, None for all. ``use``: what they are for, in the message.
    """
    lengths = corpus.lengths if chosen is None else corpus.lengths_of(chosen)
    if lengths.max(initial=0) <= 1:
        raise DataError(
            f"nothing to {use} in {printable(corpus.source)}: each of the {len(lengths)} documents has one token, and "
            "a label is the token that follows in the same document; give it documents of two tokens or more"
        )
