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
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from operator import add
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import ArrayLike, NDArray

from longctx.config import DataConfig
from longctx.data.corpus import CHUNK, Corpus, Int64
from longctx.data.files import data_path, excerpt, open_regular, printable
from longctx.data.source import Check, Report, Source
from longctx.data.token_file import TokenFile
from longctx.data.verdicts import Stamp, remembered
from longctx.errors import ConfigError, DataError, StorageError

MAGIC = b"LCTXIDX1"
CHECK = "tokens 1"  # names what a check finds; a new number makes all verdicts of before worthless
MIB = 1 << 20
SAMPLE = 16  # ids of the first document that a run shows
NO_MEMORY = Check()
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
    check: Check = NO_MEMORY,
) -> Corpus:
    """Opens a token file.

    Sizes and boundaries are always checked; ``verify`` also reads all tokens: each id must be inside the
    vocabulary, and the SHA-256 must be the recorded one. ``check``: how that is shown, and where it is remembered.
    Ranks that open what has just been verified leave it out, and ``Packing`` still checks the ids of each sample.

    Raises ``ConfigError`` for the settings, ``DataError`` naming the file for everything in it.
    """
    kind = token_dtype(dtype)
    bin_path = data_path(path, "tokens")
    if bin_path.suffix != ".bin":
        raise ConfigError(f"data.path={printable(bin_path)}: a token file ends in .bin, its boundaries in .idx")
    index = _read_index(bin_path.with_suffix(".idx"), dtype)
    offsets, file = index.offsets, TokenFile(bin_path, kind)
    if int(offsets[-1]) != len(file):
        raise DataError(
            f"{printable(bin_path)} holds {len(file)} tokens of {dtype}, its .idx ends at {int(offsets[-1])}; "
            "the two must agree: write both again with longctx.data.write_tokens"
        )
    full = np.flatnonzero(offsets[1:] > offsets[:-1])  # numbers of the documents that hold anything
    bounds = np.append(offsets[full], offsets[-1])
    skipped = len(offsets) - 1 - len(full)
    if max_documents is not None and max_documents <= len(full):
        skipped = int(full[max_documents - 1]) - (max_documents - 1)  # those before the last one taken
        bounds = bounds[: max_documents + 1]

    def origin(document: int) -> str:
        return f"{printable(bin_path)}, document {int(full[document])}"

    def corpus(bounds: Int64) -> Corpus:
        part = file.tokens[: int(bounds[-1])]
        facts: dict[str, Any] = {"files": {f"tokens {dtype}": 1}}
        if len(bounds) > 1:
            begins = file.read(0, min(SAMPLE, int(bounds[1]))).tolist()
            facts["first_document"] = {"from": origin(0), "begins": begins}
        digest = index.digest.hex()
        return Corpus(part, bounds, origin, vocab_size, str(bin_path), skipped, digest, facts, file.read)

    if verify:
        _verify(file, index, corpus(np.append(offsets[full], offsets[-1])), check)
    return corpus(bounds)


def _verify(file: TokenFile, index: Index, whole: Corpus, check: Check) -> None:
    """Checks the SHA-256 and all ids, or finds that done since the files were last changed."""

    def find(progress: Report) -> dict[str, Any]:
        return {"largest": _read_through(file, index, whole, progress), "sha256": index.digest.hex()}

    stamps = [file.stamp, index.stamp]
    found = remembered(check.cache, CHECK, stamps, find, check.progress)
    largest, digest = found.get("largest"), found.get("sha256")
    if type(largest) is not int or digest != index.digest.hex() or largest >= whole.vocab_size:
        find(check.progress)  # which names the first id that is too large


def _read_through(file: TokenFile, index: Index, whole: Corpus, progress: Report) -> int:
    """Reads all tokens once and returns the largest id. Raises ``DataError`` for ids and for the SHA-256."""
    digest, largest = hashlib.sha256(), -1
    total = -(-file.stamp.size // MIB)
    for start in range(0, len(file), CHUNK):
        progress(start * file.kind.itemsize // MIB, total, f"MiB of {printable(file.path.name)} checked")
        tokens = file.read(start, min(start + CHUNK, len(file)))
        whole.check_ids(tokens, partial(add, start))
        digest.update(tokens.data)
        largest = max(largest, int(tokens.max()))
    digest.update(index.offsets.astype("<i8", copy=False).data)
    if digest.digest() != index.digest:
        raise DataError(
            f"{printable(file.path)}: the content has SHA-256 {digest.hexdigest()[:12]}..., its .idx recorded "
            f"{index.digest.hex()[:12]}...; one of the two was changed or damaged: write both again"
        )
    return largest


@dataclass(frozen=True)
class Index:
    """What an ``.idx`` file holds: ``offsets`` int64 ``[D + 1]`` and the recorded SHA-256."""

    offsets: Int64
    digest: bytes
    stamp: Stamp


def _read_index(path: Path, dtype: str) -> Index:
    where = printable(path)
    with open_regular(path) as file:
        stamp = Stamp.of(path, file.fileno())
        size = stamp.size
        header = file.read(HEADER.size)
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
        offsets = np.frombuffer(file.read(), dtype="<i8").astype(np.int64, copy=False)
    _check_offsets(where, offsets)
    return Index(offsets, digest, stamp)


def _check_itemsize(where: str, itemsize: int, reserved: int, dtype: str) -> None:
    if itemsize == DTYPES[dtype].itemsize and not reserved:
        return
    names = [name for name, kind in DTYPES.items() if kind.itemsize == itemsize and not reserved]
    advice = f"set data.token_dtype={names[0]}" if names else "the header is damaged, write the file again"
    raise DataError(
        f"{where}: the header says {itemsize} bytes per token (reserved field {reserved}), "
        f"data.token_dtype={dtype} has {DTYPES[dtype].itemsize}; {advice}"
    )


def _check_offsets(where: str, offsets: Int64) -> None:
    if offsets[0] != 0:
        raise DataError(f"{where}: the first offset is {int(offsets[0])} (byte {HEADER.size}); it must be 0")
    falling = np.flatnonzero(offsets[1:] < offsets[:-1])
    if len(falling):
        first = int(falling[0])
        raise DataError(
            f"{where}: document {first} runs from {int(offsets[first])} to {int(offsets[first + 1])} (byte "
            f"{HEADER.size + 8 * first}); offsets must not decrease"
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
        lengths: list[int] = [0]
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


def _asked(config: DataConfig, check: Check | None) -> Check:
    asked = check or NO_MEMORY
    return replace(asked, cache=None) if config.recheck else asked


TOKENS = Source(
    "tokens",
    lambda config, vocab_size, check: open_tokens(
        config.path, config.token_dtype, vocab_size, config.max_documents, check is not None, _asked(config, check)
    ),
    reads=frozenset({"path", "token_dtype", "recheck"}),
)
