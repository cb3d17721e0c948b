"""Says which tokenizer made token files, by the summary that ``longctx tokenize`` left beside each."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from longctx.config import DataConfig
from longctx.data.corpus import Corpus
from longctx.data.files import printable
from longctx.data.tokenizer import open_tokenizer, require_ids
from longctx.data.tokenizing.summary import SUMMARY
from longctx.errors import ConfigError, DataError

_LARGEST = 1 << 22


def with_tokenizer(corpus: Corpus, places: Sequence[Path], config: DataConfig, vocab_size: int) -> Corpus:
    """Returns the corpus with what made its ids, where a summary beside each of its files says the same.

    Raises ``ConfigError`` where ``data.tokenizer`` is another one, naming both.
    """
    made = [_tokenizer_of(place) for place in places]
    facts = dict(corpus.facts)
    if config.tokenizer is not None:
        tokenizer = open_tokenizer(config.tokenizer)
        require_ids(tokenizer, config.tokenizer, vocab_size)
        for place, one in zip(places, made, strict=True):
            if one is not None and one["content"] != tokenizer.content:
                raise ConfigError(
                    f"{printable(place)} was made by the tokenizer {one['content']} ({one.get('path', 'bytes')}), and "
                    f"data.tokenizer={printable(config.tokenizer)} is {tokenizer.content}; name the one that made it"
                )
        facts["tokenizer"] = tokenizer.facts()
    first = made[0] if made else None
    if first is None or any(one is None or one["digest"] != first["digest"] for one in made):
        return replace(corpus, facts=facts)
    return replace(corpus, facts={**facts, "tokenizer": first}, tokenizer=first["digest"])


def _tokenizer_of(place: Path) -> dict[str, Any] | None:
    """Returns what a token file's summary says of its tokenizer; None without a summary."""
    summary = place.with_suffix(SUMMARY)
    try:
        with summary.open("rb") as file:
            found = json.loads(file.read(_LARGEST))["tokenizer"]
        found = {"content": found["digest"], **found}
        if not all(isinstance(found[key], str) for key in ("digest", "content")):
            raise TypeError("digest")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise DataError(
            f"{printable(summary)} is no token file's summary ({type(error).__name__}: {printable(str(error))[:90]}); "
            "copy it again from where the token file was made, or remove it"
        ) from None
    return found
