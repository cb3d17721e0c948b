"""Reads and writes token files: tokenized once, memory-mapped ever after.

``X.bin`` holds the tokens of all documents one after another, raw little-endian uint16 or uint32.
``X.idx`` stands beside it, all little-endian:

======  ==========  ==================================================================================
byte    type        content
======  ==========  ==================================================================================
0       8 bytes     ``LCTXIDX1``
8       uint32      bytes per token: 2 for uint16, 4 for uint32
12      uint32      0
16      uint64      D, the number of documents
24      32 bytes    SHA-256 of the bytes of ``X.bin`` followed by the bytes of the offsets below
56      int64 * D+1 offsets in tokens: document i is tokens ``offsets[i]`` to ``offsets[i + 1]``; they start
                    at 0, never decrease (equal ones are an empty document) and end at the token count
======  ==========  ==================================================================================

Nothing may follow. ``write_tokens`` writes both; ``open_tokens`` checks all of the above.
"""

from __future__ import annotations

import hashlib
import os
import struct
from array import array
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import ArrayLike, NDArray

from longctx.config import DataConfig
from longctx.data.corpus import Corpus, Int64
from longctx.data.files import excerpt, printable
from longctx.data.formats.joined import TokenShard, joined
from longctx.data.formats.numbers import Rising, numbers_in
from longctx.data.formats.raw import RawFile
from longctx.data.formats.shards import asked, find_shards
from longctx.data.source import Check, Source
from longctx.data.token_file import TokenFile
from longctx.errors import ConfigError, DataError, StorageError

MAGIC = b"LCTXIDX1"
RULE = "a token file ends in .bin, its boundaries in .idx"
CHECK = "tokens 1"  # names what a check finds; a new number makes all verdicts of before worthless
READ_ONCE = Check()
HEADER = struct.Struct("<8sIIQ32s")
DTYPES: dict[str, np.dtype[Any]] = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}


def token_dtype(name: str) -> np.dtype[Any]:
    """Returns the numpy dtype of ``data.token_dtype``. Raises ``ConfigError`` for anything but uint16 and uint32."""
    if name not in DTYPES:
        raise ConfigError(f"data.token_dtype={name!r}: a token file holds uint16 or uint32; set one of them")
    return DTYPES[name]


def open_tokens(
    path: str | None,
    dtype: str,
    vocab_size: int,
    max_documents: int | None = None,
    verify: bool = True,
    check: Check = READ_ONCE,
    files: str | None = None,
) -> Corpus:
    """Opens a token file, or all of a folder or pattern.

    Sizes and boundaries are always checked; ``verify`` also reads all tokens: each id must be inside the
    vocabulary, and the SHA-256 must be the recorded one. ``check``: how that is shown, and where it is remembered.
    Ranks that open what has just been verified leave it out, and ``Packing`` still checks the ids of each sample.

    Raises ``ConfigError`` for the settings, ``DataError`` naming the file for everything in it.
    """
    token_dtype(dtype)
    places = find_shards(path, "tokens", (".bin",), RULE, files)
    return _corpus_of(places, str(path), dtype, vocab_size, max_documents, replace(check, whole=verify))


def _corpus_of(
    places: Sequence[Path], path: str, dtype: str, vocab_size: int, max_documents: int | None, check: Check
) -> Corpus:
    shards = [open_pair(place, dtype) for place in places]
    return joined(shards, path, vocab_size, "tokens", max_documents, check)


def open_pair(bin_path: Path, dtype: str) -> TokenShard:
    """Opens a token file and its boundaries. Raises ``DataError`` where the two do not agree."""
    file = TokenFile(bin_path, token_dtype(dtype))
    index = RawFile(bin_path.with_suffix(".idx"))
    offsets, digest = _read_index(index, dtype)
    if int(offsets[-1]) != len(file):
        raise DataError(
            f"{printable(bin_path)} holds {len(file)} tokens of {dtype}, its .idx ends at {int(offsets[-1])}; "
            "the two must agree: write both again with longctx.data.write_tokens"
        )
    return TokenShard(file, offsets, CHECK, (index.stamp,), recorded=digest.hex())


def _read_index(file: RawFile, dtype: str) -> tuple[Int64, bytes]:
    """Returns the offsets int64 ``[D + 1]`` and the recorded SHA-256."""
    where, size = printable(file.path), file.size
    header = file.read(0, min(size, HEADER.size))
    if len(header) < HEADER.size or not header.startswith(MAGIC):
        raise DataError(
            f"{where}: {size} bytes that begin with {excerpt(header[:8])}; an index begins with "
            f"{MAGIC!r} and has at least {HEADER.size} bytes: write it with longctx.data.write_tokens"
        )
    _, itemsize, reserved, count, digest = HEADER.unpack(header)
    _check_itemsize(where, itemsize, reserved, dtype)
    expected = HEADER.size + 8 * (count + 1)
    if size != expected:
        raise DataError(f"{where}: {size} bytes, but {count} documents make {expected}; write it again")
    rising = Rising(where, "document", lambda number: f"byte {HEADER.size + 8 * number}")
    for first, part in numbers_in(file, HEADER.size, count + 1, "<i8"):
        if first == 0 and part[0] != 0:
            raise DataError(f"{where}: the first offset is {int(part[0])} (byte {HEADER.size}); it must be 0")
        rising.extend(part if first else part[1:])
    return rising.done(), digest


def _check_itemsize(where: str, itemsize: int, reserved: int, dtype: str) -> None:
    if itemsize == DTYPES[dtype].itemsize and not reserved:
        return
    names = [name for name, kind in DTYPES.items() if kind.itemsize == itemsize and not reserved]
    advice = f"set data.token_dtype={names[0]}" if names else "the header is damaged, write the file again"
    raise DataError(
        f"{where}: the header says {itemsize} bytes per token (reserved field {reserved}), "
        f"data.token_dtype={dtype} has {DTYPES[dtype].itemsize}; {advice}"
    )


def write_tokens(path: str | Path, documents: Iterable[ArrayLike], dtype: str = "uint16") -> None:
    """Writes ``X.bin`` and ``X.idx`` for documents of token ids, streaming.

    Each file appears under its name only when both are whole and on disk. If a crash falls between the two
    renames over an older pair, the mix is refused on opening, since the digest covers both.

    Raises ``DataError`` for ids that ``dtype`` cannot hold, ``ConfigError`` for the arguments,
    ``StorageError`` when writing fails; nothing is left behind then.
    """
    kind = token_dtype(dtype)
    bin_path = Path(path)
    if bin_path.suffix != ".bin":
        raise ConfigError(f"{printable(bin_path)}: a token file ends in .bin, with its boundaries in .idx")
    idx_path = bin_path.with_suffix(".idx")
    with ExitStack() as stack:
        bin_file, bin_temporary = stack.enter_context(_temporary(bin_path))
        idx_file, idx_temporary = stack.enter_context(_temporary(idx_path))
        digest = hashlib.sha256()
        lengths = array("q", [0])
        for number, document in enumerate(documents):
            ids = _checked_ids(document, kind, dtype, number)
            digest.update(ids.data)
            with _writing(bin_path):
                bin_file.write(ids.data)
            lengths.append(len(ids))
        offsets = np.cumsum(lengths, dtype="<i8")
        digest.update(offsets.data)
        with _writing(idx_path):
            idx_file.write(HEADER.pack(MAGIC, kind.itemsize, 0, len(lengths) - 1, digest.digest()))
            idx_file.write(offsets.data)
            for file in (bin_file, idx_file):
                file.flush()
                os.fsync(file.fileno())
            bin_temporary.replace(bin_path)
            idx_temporary.replace(idx_path)


def _checked_ids(document: ArrayLike, kind: np.dtype[Any], dtype: str, number: int) -> NDArray[Any]:
    ids = np.asarray(document)
    if not ids.size:
        return np.empty(0, dtype=kind)
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise DataError(f"document {number}: {ids.dtype} of shape {ids.shape}; it must be a row of integer ids")
    limit = int(np.iinfo(kind).max)
    bad = np.flatnonzero((ids < 0) | (ids > limit))
    if len(bad):
        raise DataError(
            f"document {number}, token {int(bad[0])}: id {int(ids[bad[0]])} does not fit {dtype} (0 to {limit})"
        )
    return np.ascontiguousarray(ids, dtype=kind)


@contextmanager
def _temporary(path: Path) -> Iterator[tuple[BinaryIO, Path]]:
    """Opens a new file beside ``path``, removed at the end unless it was renamed."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with _writing(path):
        file = temporary.open("wb")
    try:
        yield file, temporary
    finally:
        with suppress(OSError):  # what matters was flushed before; on a full disk closing fails once more
            file.close()
        temporary.unlink(missing_ok=True)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StorageError(f"cannot write {printable(path)}: {error.strerror or error}") from error


def _open(config: DataConfig, vocab_size: int, check: Check) -> Corpus:
    from longctx.data.tokenizing.maker import with_tokenizer  # which the writer of such files imports, too

    how, limit, dtype = asked(config, check), config.max_documents, config.token_dtype
    places = find_shards(config.path, "tokens", (".bin",), RULE, config.files)
    corpus = _corpus_of(places, str(config.path), dtype, vocab_size, limit, how)
    return with_tokenizer(corpus, places, config, vocab_size)


TOKENS = Source("tokens", _open, reads=frozenset({"path", "token_dtype", "recheck", "files", "tokenizer"}))
