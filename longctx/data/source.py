"""From ``data.source`` to a corpus."""

from __future__ import annotations

from difflib import get_close_matches

from longctx.config import DataConfig
from longctx.data.corpus import Corpus
from longctx.data.text import BYTES, open_stdlib, open_text
from longctx.data.tokens import open_tokens
from longctx.errors import ConfigError

SOURCES = ("python_stdlib", "text", "tokens")


def open_corpus(config: DataConfig, vocab_size: int, verify: bool = True) -> Corpus:
    """Opens what ``config`` names for a model with ids 0 to ``vocab_size - 1``.

    ``verify=False`` leaves out the pass over a whole token file, for runs that passed ``preflight``.

    Raises ``ConfigError`` for impossible settings, ``DataError`` naming the file for bad or missing data.
    """
    limit = config.max_documents
    if limit is not None and limit < 1:
        raise ConfigError(f"data.max_documents={limit}: take at least 1 document, or null for all of them")
    if config.source == "tokens":
        return open_tokens(config.path, config.token_dtype, vocab_size, limit, verify)
    if config.source not in SOURCES:
        near = (get_close_matches(str(config.source), SOURCES, n=1) or SOURCES)[0]
        raise ConfigError(f"data.source={config.source!r} must be one of {', '.join(SOURCES)}; did you mean {near}?")
    if vocab_size < BYTES:
        raise ConfigError(
            f"model.vocab_size={vocab_size}: data={config.source} delivers bytes, which need at least {BYTES}"
            f"; set model.vocab_size={BYTES}"
        )
    if config.source == "text":
        return open_text(config.path, config.text_key, limit)
    return open_stdlib(limit)


def preflight(config: DataConfig, vocab_size: int) -> None:
    """Raises all that opening would, before any process starts."""
    open_corpus(config, vocab_size)
