"""Reads what Megatron's ``preprocess_data`` writes: ``X.bin``, tokens of all sequences, and ``X.idx``.

``X.idx``, all little-endian and without gaps:

=======  =============  ================================================================================
byte     type           content
=======  =============  ================================================================================
0        9 bytes        ``MMIDIDX`` and two zeros
9        uint64         1, the version
17       uint8          type of a token: 1 uint8, 2 int8, 3 int16, 4 int32, 5 int64, 8 uint16
18       uint64         n, the number of sequences
26       uint64         D, one more than the number of documents
34       int32 * n      tokens of each sequence
..       int64 * n      byte of ``X.bin`` at which each begins: they follow one another
..       int64 * D      document i is sequences ``d[i]`` to ``d[i + 1]``; from 0 to n, none below the one before
..       int8 * n       may be there: kind of each sequence; all 0, which is text
=======  =============  ================================================================================

A document is what the index says: one sequence, as ``preprocess_data`` makes it, or several.
"""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np

from longctx.config import DataConfig
from longctx.data.corpus import Corpus, Int64
from longctx.data.files import data_path, excerpt, printable
from longctx.data.formats.joined import TokenShard, joined
from longctx.data.formats.numbers import Numbers, Rising, numbers_in
from longctx.data.formats.raw import RawFile
from longctx.data.formats.shards import asked, find_shards, is_pattern
from longctx.data.source import Check, Source
from longctx.data.token_file import TokenFile
from longctx.errors import ConfigError, DataError

MAGIC = b"MMIDIDX\0\0"
HEADER = struct.Struct("<9sQBQQ")
KINDS = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
FLOATS = {6: "float64", 7: "float32"}
RULE = "a Megatron corpus is X.bin beside X.idx; set data.path to X without the endings, a folder, or a pattern of them"


def open_megatron(config: DataConfig, vocab_size: int, check: Check) -> Corpus:
    """Opens the corpus of a prefix, a folder or a pattern. Raises ``DataError`` naming file, offset and rule."""
    shards = [open_pair(index) for index in _indexes(config)]
    return joined(shards, str(config.path), vocab_size, "megatron", config.max_documents, asked(config, check))


def _indexes(config: DataConfig) -> list[Path]:
    path = config.path or ""
    whole = Path(path)
    if whole.suffix in (".bin", ".idx") and not is_pattern(path):
        raise ConfigError(f"data.path={printable(path)}: {RULE}; nearest valid value: {whole.with_suffix('')}")
    if path and not is_pattern(path) and not whole.is_dir():
        data_path(f"{path}.idx", "megatron")
        return [Path(f"{path}.idx")]
    pattern = is_pattern(path) and whole.suffix not in (".bin", ".idx")
    found = find_shards(f"{path}.idx" if pattern else config.path, "megatron", (".idx", ".bin"), RULE, config.files)
    return list(dict.fromkeys(one.with_suffix(".idx") for one in found))


def open_pair(index_path: Path) -> TokenShard:
    """Opens one pair of files. Raises ``DataError`` where they do not agree."""
    index = _Index(RawFile(index_path))
    file = TokenFile(index_path.with_suffix(".bin"), index.kind, says=f"the type in {printable(index_path.name)}")
    offsets = index.documents(index.sequences(file))
    return TokenShard(file, offsets, f"megatron 1 {index.kind.str}", (index.file.stamp,))


class _Index:
    """Reads and checks an ``.idx`` file."""

    def __init__(self, file: RawFile) -> None:
        self.file = file
        self.where = printable(file.path)
        header = file.read(0, min(file.size, HEADER.size))
        if len(header) < HEADER.size or not header.startswith(MAGIC):
            raise DataError(
                f"{self.where}, byte 0: {file.size} bytes that begin with {excerpt(header[:9])}; an index of Megatron "
                f"begins with {MAGIC!r} and has at least {HEADER.size} bytes"
            )
        _, version, code, self._sequences, self._bounds = HEADER.unpack(header)
        if version != 1:
            raise DataError(f"{self.where}, byte 9: version {version}; only version 1 is known")
        if code not in KINDS:
            said = f"{FLOATS[code]}, which holds no ids" if code in FLOATS else "unknown"
            raise DataError(
                f"{self.where}, byte 17: type {code} is {said}; valid: 1 uint8, 2 int8, 3 int16, 4 int32, 5 int64, "
                "8 uint16"
            )
        self.kind = np.dtype(KINDS[code])
        self._pointers = HEADER.size + 4 * self._sequences
        self._documents = self._pointers + 8 * self._sequences
        self._modes = self._documents + 8 * self._bounds
        if file.size not in (self._modes, self._modes + self._sequences):
            raise DataError(
                f"{self.where}: {file.size} bytes, but {self._sequences} sequences (byte 18) and {self._bounds} bounds "
                f"of documents (byte 26) make {self._modes}, or {self._modes + self._sequences} with kinds of sequences"
            )
        if self._bounds < 1:
            raise DataError(f"{self.where}, byte 26: 0 bounds of documents; the first is always there, and is 0")

    def sequences(self, tokens: TokenFile) -> Int64:
        """Returns the offsets of sequences in tokens, int64 ``[n + 1]``."""
        offsets, end = Numbers(), 0
        offsets.extend(np.zeros(1))
        pointers = numbers_in(self.file, self._pointers, self._sequences, "<i8")
        for first, lengths in numbers_in(self.file, HEADER.size, self._sequences, "<i4"):
            if lengths.min() < 0:
                one = int(np.argmax(lengths < 0))
                raise DataError(
                    f"{self.where}, byte {HEADER.size + 4 * (first + one)}: sequence {first + one} has "
                    f"{int(lengths[one])} tokens; lengths are not negative"
                )
            ends = end + np.cumsum(lengths, dtype=np.int64)
            stated, begins = next(pointers)[1], (ends - lengths) * self.kind.itemsize
            if (stated != begins).any():
                one = int(np.argmax(stated != begins))
                raise DataError(
                    f"{self.where}, byte {self._pointers + 8 * (first + one)}: sequence {first + one} begins at byte "
                    f"{int(stated[one])}, but those before it end at {int(begins[one])}; sequences follow one another"
                )
            offsets.extend(ends)
            end = int(ends[-1])
        if end != len(tokens):
            raise DataError(
                f"{printable(tokens.path)} holds {len(tokens)} tokens ({tokens.stamp.size} bytes), and the sequences "
                f"of {printable(self.file.path.name)} end at {end}; the two must agree: copy both again"
            )
        self._check_modes()
        return offsets.done()

    def documents(self, sequences: Int64) -> Int64:
        """Returns the offsets of documents in tokens, int64 ``[D]``."""

        def byte(number: int) -> str:
            return f"byte {self._documents + 8 * number}"

        rising, offsets = Rising(self.where, "document", byte), Numbers()
        last = 0
        for first, part in numbers_in(self.file, self._documents, self._bounds, "<i8"):
            if first == 0 and part[0] != 0:
                raise DataError(f"{self.where}, {byte(0)}: documents begin at sequence {int(part[0])}; it must be 0")
            rising.extend(part if first else part[1:])
            if part[-1] > self._sequences:
                one = int(np.argmax(part > self._sequences))
                raise DataError(
                    f"{self.where}, {byte(first + one)}: a document ends at sequence {int(part[one])}, of "
                    f"{self._sequences}"
                )
            offsets.extend(sequences[part])
            last = int(part[-1])
        if last != self._sequences:
            raise DataError(
                f"{self.where}, {byte(self._bounds - 1)}: documents end at sequence {last}, and there are "
                f"{self._sequences}; the tokens of the others would be lost"
            )
        return offsets.done()

    def _check_modes(self) -> None:
        if self.file.size == self._modes:
            return
        for first, modes in numbers_in(self.file, self._modes, self._sequences, "i1"):
            if modes.any():
                one = int(np.argmax(modes != 0))
                raise DataError(
                    f"{self.where}, byte {self._modes + first + one}: sequence {first + one} is of kind "
                    f"{int(modes[one])}, no text (0); pictures and their like are not read"
                )


MEGATRON = Source("megatron", open_megatron, reads=frozenset({"path", "files", "recheck"}))
