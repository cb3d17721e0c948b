"""Opens text as ids: tokenized once into the user's cache, mapped from there ever after.

A text is tokenized again when its files, the tokenizer or a setting are others: all of them name the cached file. A few
documents of it, and all of them without a folder for the file, are held in memory instead; text that is too long for
that is sent to ``longctx tokenize``.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from longctx.config import DataConfig
from longctx.data.corpus import Corpus, Int64
from longctx.data.files import printable
from longctx.data.source import Check, TextFiles
from longctx.data.tokenizer import Policy, Tokenizer, open_tokenizer, require_ids
from longctx.data.tokenizing.build import Tokenizing, available_cores, build, dtype_for, key_of
from longctx.data.tokens import open_tokens
from longctx.errors import StorageError

FOLDER = "tokens"
# A process encodes some 2 MB a second, so that each rank of a run is held up for half a minute at most.
MOST_IN_MEMORY = 1 << 26


def policy_of(config: DataConfig) -> Policy:
    """Returns what stands around a document's ids."""
    return Policy(config.bos, config.eos, config.special_tokens)


def open_tokenized(
    texts: TextFiles, config: DataConfig, vocab_size: int, check: Check, settings: tuple[Any, ...]
) -> Corpus:
    """Opens documents of text as ids of ``data.tokenizer``, for a model with so many ids.

    ``settings``: what besides the files determines the documents. Raises ``ConfigError`` for a vocabulary that is too
    small, ``DataError`` naming file and place for bad text.
    """
    assert config.tokenizer is not None, "the source has bytes otherwise"
    tokenizer = open_tokenizer(config.tokenizer, policy_of(config))
    require_ids(tokenizer, config.tokenizer, vocab_size)
    folder = _folder(check.cache)
    if folder is None or config.max_documents is not None:
        return _in_memory(texts, tokenizer, config, vocab_size, check)
    job = Tokenizing(texts, folder, config.tokenizer, policy_of(config), settings, workers=available_cores())
    key = key_of(job, tokenizer, dtype_for(job.dtype, tokenizer))
    job = replace(job, out=folder / f"{key[:32]}.bin")
    summary, _ = build(job, check.progress, waits=True, tokenizer=tokenizer)
    corpus = open_tokens(str(job.out), summary["dtype"], vocab_size, config.max_documents, check.whole, check)
    read = {name: value for name, value in summary["read"].items() if name != "path"}
    facts = {**read, "tokenizer": tokenizer.facts(), "first_document": corpus.facts.get("first_document")}
    return replace(corpus, source=str(texts.root), facts=facts, tokenizer=tokenizer.digest)


def _folder(cache: Path | None) -> Path | None:
    if cache is None:
        return None
    try:
        (cache / FOLDER).mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError:
        return None
    return cache / FOLDER


def _in_memory(texts: TextFiles, tokenizer: Tokenizer, config: DataConfig, vocab_size: int, check: Check) -> Corpus:
    from longctx.data.text import collect

    size = sum(path.stat().st_size for path in texts.paths) if config.max_documents is None else 0
    plain = None if size > MOST_IN_MEMORY else collect(texts, config.max_documents, check.progress)
    if plain is None or plain.total_tokens > MOST_IN_MEMORY:
        raise StorageError(
            f"{printable(texts.root)}: {plain.total_tokens if plain else size} bytes of text are too many to tokenize "
            f"at each start (at most {MOST_IN_MEMORY}); make a token file once with `longctx tokenize` for data=tokens"
            + (", or set XDG_CACHE_HOME to a folder that keeps their tokens" if config.max_documents is None else "")
        )
    parts: list[Any] = []
    for number in range(len(plain)):
        text = plain.tokens[plain.bounds[number] : plain.bounds[number + 1]].tobytes()
        parts += tokenizer.encode_documents([text], lambda _, number=number: plain.origin(number))  # type: ignore[misc]
        check.progress(number, len(plain), "documents tokenized")
    full = np.flatnonzero([len(ids) for ids in parts])
    bounds: Int64 = np.concatenate([[0], np.cumsum([len(parts[one]) for one in full], dtype=np.int64)]).astype(np.int64)
    tokens = np.concatenate(parts).astype(dtype_for("auto", tokenizer)) if len(full) else np.empty(0, dtype=np.uint16)
    facts = {**plain.facts, "tokenizer": tokenizer.facts()}
    skipped = plain.skipped_empty + len(parts) - len(full)
    return Corpus(
        tokens,
        bounds,
        lambda document: plain.origin(int(full[document])),
        vocab_size,
        plain.source,
        skipped,
        facts=facts,
        tokenizer=tokenizer.digest,
    )
