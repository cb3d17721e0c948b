"""Joins files of tokens into one corpus, and checks what is in them.

A shard is a file of tokens and the offsets of its documents. Several are one corpus: their documents follow one
another in the order of the shards, and none crosses from one into the next.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from longctx.data.corpus import CHUNK, Corpus, Int64, Tokens, refuse_outside
from longctx.data.files import printable
from longctx.data.formats.numbers import Numbers, blocks
from longctx.data.source import Check, Report
from longctx.data.token_file import TokenFile
from longctx.data.verdicts import Stamp, remembered
from longctx.errors import DataError

MIB = 1 << 20
SAMPLE = 16  # ids of the first document that a run shows

Learned = Callable[[int, int], NDArray[np.bool_]]


@dataclass(frozen=True, eq=False)
class TokenShard:
    """Holds a file of tokens and what divides it.

    ``offsets``: int64 ``[D + 1]`` in tokens, from 0 to the end of the file; equal ones are an empty document.
    ``checked``: names what a check finds, for its verdict. ``stamps``: of the files that say so. ``unit``: what a
    document is called in messages. ``recorded``: SHA-256 of tokens and offsets that is stated, None where nothing
    states it. ``named``: the file that the tokens are from, where they are a copy. ``mask``: a byte for each token, 0
    where it is no label to learn.
    """

    file: TokenFile
    offsets: Int64
    checked: str
    stamps: tuple[Stamp, ...] = ()
    unit: str = "document"
    recorded: str | None = None
    named: str | None = None
    mask: TokenFile | None = None

    def origin(self, document: int) -> str:
        """Names a document, by its number among all that the file has."""
        return f"{self.named or printable(self.file.path)}, {self.unit} {document}"

    def locate(self, position: int) -> str:
        """Names the place of a token of the file."""
        document = int(np.searchsorted(self.offsets, position, side="right")) - 1
        return f"{self.origin(document)}, token {position - int(self.offsets[document])} of it"

    def number_of(self, full: int) -> int:
        """Returns the number of a document, by its place among those that hold anything."""
        for first, part in blocks(self.offsets):
            found = np.flatnonzero(part[1:] > part[:-1])
            if full < len(found):
                return first + int(found[full])
            full -= len(found)
        raise AssertionError("no such document")


class Row(Protocol):
    """Promises rows of numbers of one kind."""

    @property
    def kind(self) -> np.dtype[Any]: ...

    def __len__(self) -> int: ...

    def read(self, start: int, stop: int) -> Tokens: ...


class _AllLearned:
    """Stands for the mask of a file that has none."""

    kind: np.dtype[Any] = np.dtype("u1")

    def __init__(self, count: int) -> None:
        self._count = count

    def __len__(self) -> int:
        return self._count

    def read(self, start: int, stop: int) -> Tokens:
        return np.ones(stop - start, dtype=self.kind)


class JoinedRows:
    """Reads files of tokens as one row of them, of which the first ``stop`` count; None: all."""

    def __init__(self, files: Sequence[Row], stop: int | None = None) -> None:
        self._files = files
        self._starts = list(accumulate((len(file) for file in files), initial=0))
        self._stop = self._starts[-1] if stop is None else stop
        self.dtype = np.result_type(*(file.kind for file in files))

    def __len__(self) -> int:
        """Returns how many tokens there are."""
        return self._stop

    def __getitem__(self, wanted: slice) -> Tokens:
        """Returns a slice of the tokens."""
        start, stop, step = wanted.indices(len(self))
        assert step > 0, "a corpus is read forwards"
        return self.read(start, max(start, stop))[::step]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        """Returns all tokens; for corpora that fit into memory."""
        return np.asarray(self[:], dtype=dtype)

    def tolist(self) -> list[int]:
        """Returns all tokens; for corpora that fit into memory."""
        found: list[int] = self[:].tolist()
        return found

    def read(self, start: int, stop: int) -> Tokens:
        """Reads tokens ``start`` to ``stop``. Raises ``DataError`` where a file no longer has them."""
        number = bisect_right(self._starts, start, hi=len(self._files)) - 1
        base = self._starts[number]
        if stop <= self._starts[number + 1]:
            return self._files[number].read(start - base, stop - base)
        parts = []
        while start < stop:
            base, end = self._starts[number], min(stop, self._starts[number + 1])
            if end > start:
                parts.append(self._files[number].read(start - base, end - base))
            start, number = end, number + 1
        return np.concatenate(parts, dtype=self.dtype)


def joined(
    shards: Sequence[TokenShard], source: str, vocab_size: int, form: str, max_documents: int | None, check: Check
) -> Corpus:
    """Returns the corpus of files of tokens. ``form``: names their format. ``source``: what the user named.

    Raises ``DataError`` naming file and offset for ids outside the vocabulary and whatever else is wrong.
    """
    bounds, starts, skipped = _bounds(shards, max_documents)
    shards = shards[: max(1, len(starts))]
    if check.whole:
        _verify(shards, vocab_size, check)
    files, stop = [shard.file for shard in shards], int(bounds[-1])
    row = JoinedRows(files, stop)

    def origin(document: int) -> str:
        number = bisect_right(starts, document) - 1
        return shards[number].origin(shards[number].number_of(document - starts[number]))

    facts: dict[str, Any] = {"files": {f"{form} {row.dtype.name}": len(shards)}}
    if len(bounds) > 1:
        begins = row.read(0, min(SAMPLE, int(bounds[1]))).tolist()
        facts["first_document"] = {"from": origin(0), "begins": begins}
    return Corpus(
        files[0].tokens[:stop] if len(files) == 1 else row,
        bounds,
        origin,
        vocab_size,
        source,
        skipped,
        cache(lambda: _digest(shards, check)),
        facts,
        row.read,
        _learned(shards, stop),
        check.cache,
    )


def _bounds(shards: Sequence[TokenShard], max_documents: int | None) -> tuple[Int64, list[int], int]:
    """Returns the bounds of documents that hold anything, the first document of each shard, and how many hold nothing.

    Shards behind the last document that is wanted have no part in it.
    """
    if len(shards) == 1 and max_documents is None:
        offsets = shards[0].offsets
        if all((part[1:] > part[:-1]).all() for _, part in blocks(offsets)):
            return offsets, [0], 0
    bounds, starts, skipped, taken, base = Numbers(), list[int](), 0, 0, 0
    end = 0
    for shard in shards:
        if taken == max_documents:
            break
        starts.append(taken)
        for _, part in blocks(shard.offsets):
            full = np.flatnonzero(part[1:] > part[:-1])
            left = len(full) if max_documents is None else max_documents - taken
            skipped += len(part) - 1 - len(full) if left >= len(full) else int(full[left - 1]) + 1 - left
            full = full[:left]
            bounds.extend(base + part[:-1][full])
            taken += len(full)
            end = base + int(part[1:][full[-1]]) if len(full) else end
            if taken == max_documents:
                break
        base += len(shard.file)
    bounds.extend(np.array([end]))
    return bounds.done(), starts, skipped


def _learned(shards: Sequence[TokenShard], stop: int) -> Learned | None:
    """Returns what tells which tokens are labels to learn; None where all are."""
    if all(shard.mask is None for shard in shards):
        return None
    row = JoinedRows([shard.mask or _AllLearned(len(shard.file)) for shard in shards], stop)
    return lambda start, stop: row.read(start, stop) != 0


def _verify(shards: Sequence[TokenShard], vocab_size: int, check: Check) -> None:
    """Checks all ids, and SHA-256 where one is recorded, or finds that done since the files were last changed."""
    total, done = sum(-(-shard.file.stamp.size // MIB) for shard in shards), 0
    for shard in shards:

        def report(own: int, _: int, what: str, done: int = done) -> None:
            check.progress(done + own, total, what)

        found = found_in(shard, check.cache, report, vocab_size)
        smallest, largest = found.get("smallest", 0), found.get("largest")
        if type(largest) is not int or type(smallest) is not int or smallest < 0 or largest >= vocab_size:
            read_through(shard, report, vocab_size)  # which names the first id that is too large
        done += -(-shard.file.stamp.size // MIB)


def found_in(shard: TokenShard, folder: Path | None, progress: Report, vocab_size: int | None = None) -> dict[str, Any]:
    """Returns what a pass over a shard finds, from memory where the files are unchanged."""

    def find(report: Report) -> dict[str, Any]:
        return read_through(shard, report, vocab_size)

    mask = () if shard.mask is None else (shard.mask.stamp,)
    stamps = [shard.file.stamp, *shard.stamps, *mask]
    found = remembered(folder, shard.checked, stamps, find, progress)
    stated = type(found.get("sha256")) is str and shard.recorded in (None, found["sha256"])
    return found if stated else find(progress)


def read_through(shard: TokenShard, progress: Report, vocab_size: int | None = None) -> dict[str, Any]:
    """Reads all tokens once and returns the smallest and largest id, and the SHA-256 of tokens and offsets.

    Raises ``DataError`` for an id outside the vocabulary, where that is known, and for a SHA-256 that is not the
    recorded one.
    """
    file, digest, found = shard.file, hashlib.sha256(), [0, -1]
    total = -(-file.stamp.size // MIB)
    for start in range(0, len(file), CHUNK):
        progress(start * file.kind.itemsize // MIB, total, f"MiB of {printable(file.path.name)} checked")
        tokens = file.read(start, min(start + CHUNK, len(file)))
        if vocab_size is not None:
            refuse_outside(tokens, vocab_size, partial(_located, shard, start), partial(_byte, shard, start))
        digest.update(tokens.data)
        found = [min(found[0], int(tokens.min())), max(found[1], int(tokens.max()))]
    for _, part in blocks(shard.offsets):
        digest.update(part[:-1].astype("<i8", copy=False).data)
    digest.update(shard.offsets[-1:].astype("<i8").data)
    if shard.mask is not None:
        _read_mask(shard, shard.mask, digest)
    if shard.recorded not in (None, digest.hexdigest()):
        raise DataError(
            f"{printable(file.path)}: the content has SHA-256 {digest.hexdigest()[:12]}..., its .idx recorded "
            f"{str(shard.recorded)[:12]}...; one of the two was changed or damaged: write both again"
        )
    return {"smallest": found[0], "largest": found[1], "sha256": digest.hexdigest()}


def _read_mask(shard: TokenShard, mask: TokenFile, digest: hashlib._Hash) -> None:
    for start in range(0, len(mask), CHUNK):
        part = mask.read(start, min(start + CHUNK, len(mask)))
        if part.max() > 1:
            first = int(np.argmax(part > 1))
            raise DataError(
                f"{printable(mask.path)}, byte {start + first}: {int(part[first])}, of {shard.locate(start + first)}; "
                "a loss mask holds 1 for a token to learn and 0 for one to leave out"
            )
        digest.update(part.data)


def _located(shard: TokenShard, start: int, position: int) -> str:
    return shard.locate(start + position)


def _byte(shard: TokenShard, start: int, position: int) -> str:
    if shard.named is not None:
        return ""
    return f"; it stands at byte {(start + position) * shard.file.kind.itemsize}"


def _digest(shards: Sequence[TokenShard], check: Check) -> str:
    """Returns the SHA-256 of what shards hold, each divided as it is."""
    each = [shard.recorded or found_in(shard, check.cache, check.progress)["sha256"] for shard in shards]
    return each[0] if len(each) == 1 else hashlib.sha256("".join(each).encode()).hexdigest()
