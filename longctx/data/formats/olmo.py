"""Reads what the Dolma toolkit writes for OLMo: ``X.npy``, raw tokens, beside ``X.csv.gz``, where documents lie.

``X.npy`` has no header of NumPy, in spite of its name: little-endian uint16 or uint32, nothing else. ``X.csv.gz`` has a
line for each document: ``start,end`` in tokens, and whatever its producer added behind. Documents follow one another
and cover the file. Boundaries are never guessed from an end-of-text token: where a producer left it out, two documents
would be one in silence.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from longctx.config import DataConfig
from longctx.data.corpus import Corpus, Int64
from longctx.data.files import excerpt, open_unpacked, printable
from longctx.data.formats.joined import TokenShard, joined
from longctx.data.formats.kept import kept_offsets
from longctx.data.formats.numbers import Numbers
from longctx.data.formats.raw import RawFile
from longctx.data.formats.shards import asked, find_shards
from longctx.data.source import Check, Report, Source
from longctx.data.token_file import TokenFile
from longctx.data.tokens import token_dtype
from longctx.errors import DataError

RULE = "an OLMo corpus is X.npy beside X.csv.gz; set data.path to X.npy, a folder, or a pattern of them"
NUMPY = b"\x93NUMPY"
BLOCK = 1 << 20  # bytes of lines that are taken apart in one go
LONGEST = 1 << 20  # bytes of a line
CHECK = "olmo 1 offsets"
SPARE = 1024  # empty documents that a file may have beyond one for each token


def open_olmo(config: DataConfig, vocab_size: int, check: Check) -> Corpus:
    """Opens the corpus of a ``.npy`` file, a folder or a pattern. Raises ``DataError`` naming file, line and rule."""
    how = asked(config, check)
    places = find_shards(config.path, "olmo", (".npy",), RULE, config.files)
    shards = [open_file(place, config.token_dtype, how) for place in places]
    return joined(shards, str(config.path), vocab_size, "olmo", config.max_documents, how)


def open_file(path: Path, dtype: str, check: Check) -> TokenShard:
    """Opens a file of tokens and its boundaries. Raises ``DataError`` where the two do not agree."""
    raw = RawFile(path)
    if raw.read(0, min(raw.size, len(NUMPY))) == NUMPY:
        raise DataError(
            f"{printable(path)}, byte 0: begins with the header of numpy.save; an OLMo file is raw {dtype} without "
            "one: write it with array.tofile, or as a token file"
        )
    file, table = TokenFile(path, token_dtype(dtype)), path.with_name(path.name[: -len(".npy")] + ".csv.gz")
    lines = RawFile(table)  # which names the table where it is missing

    def find(progress: Report) -> Int64:
        return _offsets(table, lines.size, file, progress)

    stamps = [lines.stamp, file.stamp]
    offsets = kept_offsets(check.cache, f"{CHECK} {dtype}", stamps, find, check.progress)
    return TokenShard(file, offsets, f"olmo 1 {dtype}", (lines.stamp,))


def _offsets(table: Path, size: int, file: TokenFile, progress: Report) -> Int64:
    """Returns the offsets of documents, int64 ``[D + 1]``, that the lines of a table say."""
    offsets, where, end = Numbers(), printable(table), 0
    offsets.extend(np.zeros(1))
    with open_unpacked(table, ".gz") as (unpacked, position):
        for first, lines in _lines(where, unpacked):
            progress(position() >> 20, -(-size >> 20), f"MiB of {printable(table.name)} read")
            starts, ends = _pairs(where, first, lines)
            before = np.concatenate([[end], ends[:-1]])
            wrong = (starts != before) | (ends < starts) | (ends > len(file))
            if wrong.any():
                one = int(np.argmax(wrong))
                raise DataError(
                    f"{where}, line {first + one}: a document from {int(starts[one])} to {int(ends[one])}; the one "
                    f"before it ends at {int(before[one])}, and {printable(file.path.name)} holds {len(file)} tokens: "
                    "documents follow one another and end with the file"
                )
            if first + len(lines) > len(file) + SPARE:
                raise DataError(f"{where}, line {first}: more documents than the {len(file)} tokens of the file")
            offsets.extend(ends)
            end = int(ends[-1])
    if end != len(file):
        raise DataError(
            f"{where} ends at token {end}, and {printable(file.path)} holds {len(file)}; the two must agree: set "
            "data.token_dtype, or copy both again"
        )
    return offsets.done()


def _lines(where: str, file: BinaryIO) -> Iterator[tuple[int, list[bytes]]]:
    """Yields lines without their ends, and the number of the first, from 1."""
    number, rest = 1, b""
    while True:
        block = file.read(BLOCK)
        whole = rest + block
        lines = whole.split(b"\n")
        rest = lines.pop()
        if len(rest) > LONGEST:
            raise DataError(f"{where}, line {number + len(lines)}: longer than {LONGEST} bytes; it has a few numbers")
        if not block and rest:
            lines.append(rest)
        if lines:
            yield number, lines
            number += len(lines)
        if not block:
            return


def _pairs(where: str, first: int, lines: list[bytes]) -> tuple[Int64, Int64]:
    """Returns the two numbers at the beginning of each line."""
    fields = [line.rstrip(b"\r").split(b",", 2) for line in lines]
    for number, found in enumerate(fields, first):
        if len(found) < 2 or not (found[0].isdigit() and found[1].isdigit()) or max(map(len, found[:2])) > 18:
            line = lines[number - first]
            raise DataError(f"{where}, line {number}: {excerpt(line)}; a line begins with start,end in tokens")
    pairs = np.array([(int(found[0]), int(found[1])) for found in fields], dtype=np.int64)
    return pairs[:, 0], pairs[:, 1]


OLMO = Source("olmo", open_olmo, reads=frozenset({"path", "files", "token_dtype", "recheck"}))
