"""Turns a prompt into ids, and ids into text as they come."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from longctx.data.tokenizer import ByteTokenizer, Policy, Tokenizer, open_tokenizer
from longctx.data.tokenizing.definition import TOKENIZER_FILE, find_file, read_definition
from longctx.errors import DataError

_BROKEN = "\ufffd"  # what decoding makes of bytes that are no whole character


def tokenizer_in(folder: Path) -> Tokenizer | None:
    """Opens the tokenizer of a folder, None where it has none; special tokens that stand written are what they name.

    The begin-of-text token is added where ``tokenizer_config.json`` says so.
    """
    if folder.is_dir() and not (folder / TOKENIZER_FILE).is_file():
        return None
    bos = read_definition(find_file(folder)).adds("bos_token")
    return open_tokenizer(folder, Policy(bos=bos, special_tokens="ids"))


def stop_ids_in(folder: Path) -> tuple[int, ...]:
    """Returns the ids at which a directory's model stops: those of its generation configuration, else of its own."""
    for name in ("generation_config.json", "config.json"):
        if (folder / name).is_file():
            found = _ends(folder / name)
            if found or name == "generation_config.json":
                return found
    return ()


def _ends(file: Path) -> tuple[int, ...]:
    try:
        content: Any = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{file} cannot be read as JSON: {error}") from None
    value = content.get("eos_token_id") if isinstance(content, dict) else None
    if value is None and isinstance(content, dict) and isinstance(content.get("text_config"), dict):
        value = content["text_config"].get("eos_token_id")
    found = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(one) is int and one >= 0 for one in found):
        raise DataError(f"{file}: eos_token_id={value!r} must be a token id or a list of them; mend the file")
    return tuple(found)


def encode(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """Returns the ids of a prompt."""
    ids: list[int] = tokenizer.encode_documents([prompt], lambda _: "the prompt")[0].tolist()
    return ids


def text_of(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """Returns the text of ids, without special tokens."""
    if isinstance(tokenizer, ByteTokenizer):
        return tokenizer.decode(ids)
    known = [one for one in ids if one < tokenizer.vocab_size]  # vocabularies are padded
    return tokenizer.decode(known, skip_special_tokens=True)


class TextStream:
    """Writes text as its ids come, never half a character; without a tokenizer the ids themselves."""

    def __init__(self, tokenizer: Tokenizer | None, write: Callable[[str], object]) -> None:
        self._tokenizer = tokenizer
        self._write = write
        self._ids: list[int] = []
        self._said = self._start = 0  # ids whose text has been written; where decoding begins again

    def add(self, token: int) -> None:
        """Takes the next token."""
        if self._tokenizer is None:
            self._write(f"{' ' if self._ids else ''}{token}")
        self._ids.append(token)
        self._flush(whole=False)

    def end(self) -> None:
        """Writes what was held back, and ends the line."""
        self._flush(whole=True)
        self._write("\n")

    def _flush(self, whole: bool) -> None:
        if self._tokenizer is None:
            return
        # A word's space depends on the tokens before it, so those of the last piece are decoded again.
        before = text_of(self._tokenizer, self._ids[self._start : self._said])
        now = text_of(self._tokenizer, self._ids[self._start :])
        if len(now) > len(before) and (whole or not now.endswith(_BROKEN)):
            self._write(now[len(before) :])
            self._start, self._said = self._said, len(self._ids)
