"""Defines what every source delivers: one flat array of tokens, cut into documents."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from longctx.data.files import printable
from longctx.errors import DataError

Int64 = NDArray[np.int64]
Tokens = NDArray[np.unsignedinteger[Any]]

CHUNK = 1 << 22  # tokens looked at in one go: a few MiB, whatever the size of the corpus


@dataclass(frozen=True, eq=False)
class Corpus:
    """Documents that follow one another, none of them empty.

    ``tokens``: integers ``[N]``, read-only: an array, memory-mapped where it is a token file, or what reads slices of
    several files (``longctx.data.formats.joined``).
    ``bounds``: int64 ``[D + 1]``, strictly increasing from 0 to N; document i is
    ``tokens[bounds[i]:bounds[i + 1]]``. ``origin(i)``: where document i came from, for messages.
    ``vocab_size``: every token is below it. ``skipped_empty``: documents left out because they held nothing.
    ``content_digest``: hexadecimal SHA-256 of the tokens where the source knows one, or what finds it.
    ``reader(start, stop)``: those of ``tokens``, without the crash of a memory map whose file was cut meanwhile.
    ``facts``: what a run tells of where they came from, as JSON values. ``learned(start, stop)``: which of these tokens
    are labels to learn, bool; None: all. ``cache``: the folder in which the source looked for what is known already.
    ``parts``: of a mixture, each source's name and its number of documents, in their order.
    ``tokenizer``: digest of what made the ids, None where nobody knows.

    Raises ``DataError`` when there is no token at all.
    """

    tokens: Any
    bounds: Int64
    origin: Callable[[int], str]
    vocab_size: int
    source: str
    skipped_empty: int = 0
    content_digest: str | Callable[[], str] | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    reader: Callable[[int, int], Tokens] | None = None
    learned: Callable[[int, int], NDArray[np.bool_]] | None = None
    cache: Path | None = None
    parts: dict[str, int] = field(default_factory=dict)
    tokenizer: str | None = None

    def __post_init__(self) -> None:
        if not len(self.tokens):
            raise DataError(
                f"the corpus {printable(self.source)} is empty: 0 tokens, {self.skipped_empty} empty documents "
                "skipped; training needs at least one document of at least one token"
            )
        assert self.bounds.dtype == np.int64, "bounds are int64"
        assert self.bounds[0] == 0 and self.bounds[-1] == len(self.tokens), "bounds span the tokens"

    def __len__(self) -> int:
        """Returns the number of documents."""
        return len(self.bounds) - 1

    @property
    def total_tokens(self) -> int:
        return len(self.tokens)

    @property
    def lengths(self) -> Int64:
        """Tokens of each document, int64 ``[D]``, each at least 1."""
        return np.diff(self.bounds)

    def lengths_of(self, documents: Int64) -> Int64:
        """Returns the tokens of each of some documents, without those of all."""
        return self.bounds[documents + 1] - self.bounds[documents]

    def read(self, start: int, stop: int) -> Tokens:
        """Returns ``tokens[start:stop]``. Raises ``DataError`` where a file that is open no longer holds them."""
        found: Tokens = self.tokens[start:stop] if self.reader is None else self.reader(start, stop)
        return found

    def locate(self, position: int) -> str:
        """Names the place of the token at ``position`` of the flat array, for messages."""
        document = int(np.searchsorted(self.bounds, position, side="right")) - 1
        return f"{self.origin(document)}, token {position - int(self.bounds[document])} of it"

    @cached_property
    def fingerprint(self) -> str:
        """Hexadecimal SHA-256 over document lengths and content: any changed token or boundary changes it."""
        digest = hashlib.sha256(f"longctx corpus 1 {self.tokens.dtype.name} {len(self)}".encode())
        for start in range(0, len(self.bounds), CHUNK):
            digest.update(self.bounds[start : start + CHUNK].astype("<i8", copy=False).data)
        if self.content_digest is None:
            hash_tokens(digest, self.tokens)
        else:
            found = self.content_digest if isinstance(self.content_digest, str) else self.content_digest()
            digest.update(bytes.fromhex(found))
        return digest.hexdigest()

    def check_ids(self, tokens: Int64 | Tokens, positions: Callable[[int], int]) -> None:
        """Refuses the first of ``tokens`` that the vocabulary does not hold.

        ``positions(i)``: place of ``tokens[i]`` in the flat array. Raises ``DataError`` naming file,
        document, offset, id and vocabulary.
        """
        refuse_outside(tokens, self.vocab_size, lambda offset: self.locate(positions(offset)))


def refuse_outside(
    tokens: Int64 | Tokens, vocab_size: int, locate: Callable[[int], str], end: Callable[[int], str] = lambda _: ""
) -> None:
    """Refuses the first of ``tokens`` that a vocabulary does not hold.

    ``locate(i)``: names the place of ``tokens[i]``. ``end(i)``: what the message says of it at its end.
    """
    if not len(tokens) or (int(tokens.max()) < vocab_size and int(tokens.min()) >= 0):
        return
    first = int(np.argmax((tokens >= vocab_size) | (tokens < 0)))
    found = int(tokens[first])
    advice = f"set model.vocab_size to at least {found + 1} or " if found >= 0 else ""
    raise DataError(
        f"{locate(first)}: id {found} is outside the vocabulary of {vocab_size} (valid: 0 to {vocab_size - 1}); "
        f"{advice}tokenize the file again{end(first)}"
    )


def hash_tokens(digest: hashlib._Hash, tokens: Tokens) -> None:
    """Feeds the little-endian bytes of ``tokens`` to ``digest`` in chunks."""
    little = tokens.dtype.newbyteorder("<")
    for start in range(0, len(tokens), CHUNK):
        digest.update(np.ascontiguousarray(tokens[start : start + CHUNK], dtype=little).data)
