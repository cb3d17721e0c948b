"""Carries documents to a worker process and ids back: counted bytes in a pipe, nothing that is unpickled."""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from longctx.data.corpus import Int64
from longctx.data.tokenizer import Ids

_COUNT = struct.Struct("<Q")


class Encoded(NamedTuple):
    """Ids of some documents, one after another. ``lengths``: of each; ``unknown``: how many stand for unknown text."""

    lengths: Int64
    ids: Ids
    unknown: int


def write_texts(pipe: BinaryIO, texts: Sequence[bytes]) -> None:
    """Sends documents to a worker."""
    lengths = np.array([len(text) for text in texts], dtype="<i8")
    pipe.write(_COUNT.pack(len(texts)) + lengths.tobytes())
    for text in texts:
        pipe.write(text)
    pipe.flush()


def read_texts(pipe: BinaryIO) -> list[bytes] | None:
    """Takes documents in a worker; None when the other side has ended."""
    header = pipe.read(_COUNT.size)
    if len(header) < _COUNT.size:
        return None
    lengths = np.frombuffer(_exactly(pipe, 8 * _COUNT.unpack(header)[0]), dtype="<i8")
    return [_exactly(pipe, length) for length in lengths.tolist()]


def write_ids(pipe: BinaryIO, documents: Sequence[Ids], unknown: int) -> None:
    """Answers with the ids of each document."""
    lengths = np.array([len(ids) for ids in documents], dtype="<i8")
    pipe.write(b"+" + _COUNT.pack(len(documents)) + _COUNT.pack(unknown) + lengths.tobytes())
    for ids in documents:
        pipe.write(ids.astype("<u4", copy=False).tobytes())
    pipe.flush()


def write_refusal(pipe: BinaryIO, error: str, message: str) -> None:
    """Answers with what is wrong; ``error``: the class's name."""
    text = json.dumps([error, message]).encode()
    pipe.write(b"-" + _COUNT.pack(len(text)) + text)
    pipe.flush()


def read_answer(pipe: BinaryIO) -> Encoded | list[Any]:
    """Takes a worker's answer: ids, or the class and message of an error. Raises ``EOFError`` where it has ended."""
    kind = _exactly(pipe, 1)
    (count,) = _COUNT.unpack(_exactly(pipe, _COUNT.size))
    if kind == b"-":
        found: list[Any] = json.loads(_exactly(pipe, count))
        return found
    (unknown,) = _COUNT.unpack(_exactly(pipe, _COUNT.size))
    lengths = np.frombuffer(_exactly(pipe, 8 * count), dtype="<i8").astype(np.int64, copy=False)
    ids = np.frombuffer(_exactly(pipe, 4 * int(lengths.sum())), dtype="<u4").astype(np.uint32, copy=False)
    return Encoded(lengths, ids, unknown)


def _exactly(pipe: BinaryIO, size: int) -> bytes:
    found = pipe.read(size)
    if len(found) < size:
        raise EOFError(f"{len(found)} of {size} bytes")
    return found
