"""Reads text as bytes: a token is a byte, 0 to 255, so any text trains without a tokenizer or a download."""

from __future__ import annotations

import json
import sysconfig
from array import array
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np

from longctx.data.corpus import Corpus
from longctx.data.files import data_path, excerpt, find_files, open_regular, printable, read_bytes
from longctx.data.source import Source
from longctx.errors import DataError

BYTES = 256  # size of the byte vocabulary
JSONL = (".jsonl", ".ndjson")
LINE_LIMIT = 1 << 28  # bytes of one JSONL line; a file without line ends would be read into memory whole
NOT_STDLIB = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"})


class Document(NamedTuple):
    """One document that was read; ``line`` is its line in a JSONL file, from 1, or 0 for a whole file."""

    path: Path
    line: int
    content: bytes


def open_stdlib(max_documents: int | None = None) -> Corpus:
    """Reads the standard library of the running interpreter, one document per ``.py`` file, tests left out."""
    root = Path(sysconfig.get_paths()["stdlib"])
    # Some installations are farms of links, and nobody hides foreign files in the standard library: follow.
    paths = [path for path in find_files(root, NOT_STDLIB, follow=True) if path.suffix == ".py"]
    return _collect((Document(path, 0, read_bytes(path)) for path in paths), root, max_documents)


def open_text(path: str | None, text_key: str, max_documents: int | None = None) -> Corpus:
    """Reads a file or folder of text: a JSONL file holds one document per line, any other file is one document.

    Reading is strict: bad JSON, a missing or non-string ``text_key``, bad UTF-8 in JSONL, or a NUL raises
    ``DataError`` with ``file:line``. Hidden files and links inside a folder are left out. With
    ``max_documents``, nothing past the last document taken is read.
    """
    root = data_path(path, "text")
    paths = find_files(root) if root.is_dir() else [root]
    if not paths:
        raise DataError(
            f"the folder {printable(root)} holds no file to read (hidden files and links in it are left out); "
            "set data.path to one that holds text or JSONL"
        )
    return _collect(_documents(paths, text_key), root, max_documents)


def _documents(paths: list[Path], text_key: str) -> Iterator[Document]:
    for path in paths:
        if path.suffix.lower() in JSONL:
            yield from _read_jsonl(path, text_key)
        else:
            content = read_bytes(path)
            if b"\0" in content:
                raise DataError(
                    f"{printable(path)}: NUL at byte {content.index(0)}: text holds none, is this a binary file? "
                    "Take it out of data.path, or turn it into tokens for data=tokens"
                )
            yield Document(path, 0, content)


def _collect(documents: Iterator[Document], root: Path, max_documents: int | None) -> Corpus:
    """Joins the first ``max_documents`` documents that hold anything."""
    flat, lengths = bytearray(), array("q")
    files: list[Path] = []
    file_of, line_of = array("q"), array("q")
    skipped = 0

    def non_empty() -> Iterator[Document]:
        nonlocal skipped
        for document in documents:
            if document.content:
                yield document
            else:
                skipped += 1

    for path, line, content in islice(non_empty(), max_documents):
        if not files or files[-1] != path:
            files.append(path)
        flat += content
        lengths.append(len(content))
        file_of.append(len(files) - 1)
        line_of.append(line)

    def origin(document: int) -> str:
        line = line_of[document]
        return printable(files[file_of[document]]) + (f":{line}" if line else "")

    tokens = np.frombuffer(flat, dtype=np.uint8)
    tokens.flags.writeable = False
    bounds = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64)
    return Corpus(tokens, bounds, origin, BYTES, str(root), skipped)


def _read_jsonl(path: Path, text_key: str) -> Iterator[Document]:
    with open_regular(path) as file:
        for number in range(1, 1 << 62):
            line = file.readline(LINE_LIMIT + 1)
            if not line:
                return
            where = f"{printable(path)}:{number}"
            if len(line) > LINE_LIMIT:
                raise DataError(
                    f"{where}: the line is longer than {LINE_LIMIT} bytes; a JSONL file holds one document "
                    "per line, larger ones belong in files of their own"
                )
            yield Document(path, number, _parse_line(line, text_key, where))


def _parse_line(line: bytes, text_key: str, where: str) -> bytes:
    """Returns the text of one JSONL line as UTF-8; ``where`` names the line in messages."""
    try:
        record = json.loads(line.decode("utf-8"), object_pairs_hook=_object, parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        found = excerpt(line[error.start : error.start + 8])
        raise DataError(f"{where}: bad UTF-8 at byte {error.start}: {found}; save the file as UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{where}: bad JSON: {printable(str(error))}, found {excerpt(line.strip())}; "
            "every line must be one JSON object"
        ) from error
    if not isinstance(record, dict):
        raise DataError(f"{where}: found {excerpt(record)}; every line must be one JSON object")
    if text_key not in record:
        raise DataError(
            f"{where}: no field {text_key!a} (data.text_key); the line has {excerpt(sorted(record))}; set "
            "data.text_key to the one that holds the text"
        )
    text = record[text_key]
    if not isinstance(text, str):
        raise DataError(f"{where}: field {text_key!a} is {excerpt(text)}; it must be a string")
    if "\0" in text:
        raise DataError(f"{where}: {text_key!a} has a NUL at character {text.index(chr(0))}; remove it")
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: field {text_key!a} has the lone surrogate {excerpt(text[error.start])} at character "
            f"{error.start}, which UTF-8 cannot hold; escape the full pair"
        ) from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Returns a JSON object; a repeated key is refused, since one of its values would be lost in silence."""
    record = dict(pairs)
    if len(record) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"key {next(name for name in names if names.count(name) > 1)!a} appears twice")
    return record


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


PYTHON_STDLIB = Source("python_stdlib", lambda config, vocab_size, verify: open_stdlib(config.max_documents), ids=BYTES)
TEXT = Source(
    "text",
    lambda config, vocab_size, verify: open_text(config.path, config.text_key, config.max_documents),
    reads=frozenset({"path", "text_key"}),
    ids=BYTES,
)
