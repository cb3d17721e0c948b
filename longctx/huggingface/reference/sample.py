"""Draws random tokens for a directory's model: ids that text could have, never one with a meaning of its own."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longctx.errors import DataError

TOKENIZER = "tokenizer.json"
_CONFIGS = ("config.json", "generation_config.json")


def draw_tokens(directory: Path, vocab_size: int, batch: int, seq: int, seed: int) -> Tensor:
    """Draws tokens int64 ``[B, S]`` below the real vocabulary, without special ids.

    Rows of an embedding past the tokenizer's ids are padding. Without a tokenizer all of ``vocab_size`` are real.
    """
    added, known = _tokenizer(directory)
    special = {one["id"] for one in added if one.get("special")}
    for name in _CONFIGS:  # give ids a meaning too, such as the end of a text
        special |= set(_token_ids(_read(directory / name)))
    ids = [*known, *(one["id"] for one in added)]
    usable = [one for one in range(min(vocab_size, max(ids, default=vocab_size - 1) + 1)) if one not in special]
    if not usable:
        raise DataError(f"{directory} has {vocab_size} ids, and each of them is special; none is left to draw")
    drawn = torch.randint(len(usable), (batch, seq), generator=torch.Generator().manual_seed(seed))
    return torch.tensor(usable)[drawn]


def _token_ids(values: dict[str, Any]) -> Iterator[int]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _token_ids(value)
        elif name.endswith(("_token_id", "_token_ids", "_token_index")):
            yield from (one for one in (value if isinstance(value, list) else [value]) if type(one) is int)


def _tokenizer(directory: Path) -> tuple[list[dict[str, Any]], list[int]]:
    """Returns the tokens that were added to the directory's tokenizer, and the ids of all others."""
    path = directory / TOKENIZER
    values = _read(path)
    added, model = values.get("added_tokens") or [], values.get("model") or {}
    try:
        vocabulary = model.get("vocab") or {}
        ids = [*(vocabulary.values() if isinstance(vocabulary, dict) else range(len(vocabulary)))]
        sound = all(type(one) is int for one in (*ids, *(one["id"] for one in added)))
    except (AttributeError, KeyError, TypeError):
        sound = False
    if not sound:
        raise DataError(f"{path} is damaged: its tokens have no whole numbers as ids")
    return added, ids


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} cannot be read: {error}") from None
    if not isinstance(values, dict):
        raise DataError(f"{path} holds {type(values).__name__}, where a mapping belongs")
    return values
