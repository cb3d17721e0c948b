"""Reads what datatrove's tokenizers write, which Nanotron reads as Nanosets: ``X.ds`` and files beside it.

==================  ===========================================================================================
file                content
==================  ===========================================================================================
``X.ds``            tokens of all documents, raw little-endian uint16 or uint32
``X.ds.index``      uint64 for each document: where it ends, in tokens
``X.ds.loss``       may be there: a byte for each token, 1 to learn it, 0 to leave it out
``X.ds.metadata``   may be there: lines of the tokenizer's name, ``|`` and bytes per token; and the token count
==================  ===========================================================================================

A token whose byte of the loss file is 0 is no label. The token before it learns nothing, and all see it.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from longctx.config import DataConfig
from longctx.data.corpus import Corpus
from longctx.data.files import excerpt, printable
from longctx.data.formats.joined import TokenShard, joined
from longctx.data.formats.numbers import Rising, numbers_in
from longctx.data.formats.raw import RawFile
from longctx.data.formats.shards import asked, find_shards
from longctx.data.source import Check, Source
from longctx.data.token_file import TokenFile
from longctx.data.tokens import DTYPES, token_dtype
from longctx.errors import DataError

RULE = "a datatrove corpus is X.ds beside X.ds.index; set data.path to X.ds, a folder, or a pattern of them"
LONGEST = 1 << 16  # bytes of a metadata file
BYTE = np.dtype("u1")


def open_datatrove(config: DataConfig, vocab_size: int, check: Check) -> Corpus:
    """Opens the corpus of a ``.ds`` file, a folder or a pattern. Raises ``DataError`` naming file, offset and rule."""
    places = find_shards(config.path, "datatrove", (".ds",), RULE, config.files)
    shards = [open_file(place, config.token_dtype) for place in places]
    return joined(shards, str(config.path), vocab_size, "datatrove", config.max_documents, asked(config, check))


def open_file(path: Path, dtype: str) -> TokenShard:
    """Opens a file and those beside it. Raises ``DataError`` where they do not agree."""
    file = TokenFile(path, token_dtype(dtype))
    index = RawFile(_beside(path, ".index"))
    where = printable(index.path)
    if index.size % 8:
        raise DataError(f"{where}: {index.size} bytes is not a multiple of the 8 bytes of an end; it is truncated")
    rising = Rising(where, "document", lambda number: f"byte {8 * number}")
    for _, part in numbers_in(index, 0, index.size // 8, "<u8"):
        rising.extend(part.astype(np.int64))
    offsets = rising.done()
    if int(offsets[-1]) != len(file):
        raise DataError(
            f"{printable(path)} holds {len(file)} tokens of {dtype}, and {printable(index.path.name)} ends at "
            f"{int(offsets[-1])} (byte {max(0, index.size - 8)}); the two must agree: set "
            "data.token_dtype, or copy both again"
        )
    metadata = _beside(path, ".metadata")
    if metadata.exists():
        _check_metadata(RawFile(metadata), dtype, len(file))
    mask = _mask(_beside(path, ".loss"), len(file))
    return TokenShard(file, offsets, f"datatrove 1 {dtype}", (index.stamp,), mask=mask)


def _beside(path: Path, end: str) -> Path:
    return path.with_name(path.name + end)


def _mask(path: Path, count: int) -> TokenFile | None:
    if not path.exists():
        return None
    mask = TokenFile(path, BYTE)
    if len(mask) != count:
        raise DataError(
            f"{printable(path)}: {len(mask)} bytes for {count} tokens; it has one for each: copy the file again"
        )
    return mask


def _check_metadata(file: RawFile, dtype: str, count: int) -> None:
    where = printable(file.path)
    text = file.read(0, min(file.size, LONGEST)).decode("utf-8", "replace")
    lines = text.split("\n")
    _, bar, size = lines[0].rpartition("|")
    if bar and size.strip() != str(DTYPES[dtype].itemsize):
        names = [one for one, kind in DTYPES.items() if size.strip() == str(kind.itemsize)]
        advice = f"set data.token_dtype={names[0]}" if names else "it has 2 or 4"
        raise DataError(
            f"{where}, byte 0: {excerpt(lines[0])} says {excerpt(size)} bytes per token, data.token_dtype={dtype} has "
            f"{DTYPES[dtype].itemsize}; {advice}"
        )
    if len(lines) > 1 and lines[1].strip() != str(count):
        raise DataError(
            f"{where}, byte {len(lines[0].encode()) + 1}: says {excerpt(lines[1])} tokens, and the file has {count}; "
            "the two must agree: copy both again"
        )


DATATROVE = Source("datatrove", open_datatrove, reads=frozenset({"path", "files", "token_dtype", "recheck"}))
