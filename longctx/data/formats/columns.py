"""Takes documents out of a column of tables: text, or ids already.

What a column holds decides how it is read: strings are text, lists of whole numbers are ids. A null is an empty
document, and is counted.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from longctx.config import DataConfig
from longctx.data.corpus import Corpus, Int64
from longctx.data.files import excerpt, printable
from longctx.data.formats.joined import joined
from longctx.data.formats.kept import kept_tokens
from longctx.data.formats.shards import asked
from longctx.data.json_lines import Texts
from longctx.data.source import Check, Report, TextFiles
from longctx.data.text import open_texts, require_bytes
from longctx.data.verdicts import Stamp
from longctx.errors import ConfigError, DataError, NotAvailableError

TEXT, IDS = "text", "ids"
NULLS = "rows without a value"
CONVERSATIONS = frozenset({"messages", "conversations", "conversation"})
WHOLE_BATCH = 8 << 20  # bytes of a column that are looked at in one go, about
LARGEST = (1 << 32) - 1
_STRINGS = ("string", "large_string", "string_view", "binary", "large_binary", "binary_view")
_LISTS = ("list", "large_list", "fixed_size_list", "list_view", "large_list_view")

At = Callable[[int], None]


class TableFile(Protocol):
    """Promises a file of rows. ``path``: names it. ``schema``: its columns, as pyarrow says."""

    path: Path
    schema: Any
    stamp: Stamp

    def column(self, name: str, at: At) -> Iterator[Any]:
        """Yields a column piece by piece, as arrays; tells ``at`` how many bytes of the file have been read."""


@dataclass(frozen=True)
class Tables:
    """Holds the files of one corpus. ``root``: what the user named. ``form``: their format."""

    root: Path
    tables: Sequence[TableFile]
    form: str

    def kind(self, key: str) -> str:
        """Returns what the column holds in all of them, ``TEXT`` or ``IDS``. Raises ``ConfigError``, ``DataError``."""
        found = {kind_of_column(table, key): table for table in reversed(self.tables)}
        if len(found) > 1:
            raise DataError(
                f"column {key!a} holds text in {printable(found[TEXT].path)} and ids in {printable(found[IDS].path)}; "
                "one corpus holds one of them"
            )
        return next(iter(found))

    def texts(self, key: str) -> TextFiles:
        """Returns the files, of a column of text. Raises ``ConfigError`` where it holds ids."""
        if self.kind(key) == IDS:
            raise ConfigError(
                f"data.text_key={key}: the column holds ids already, and no tokenizer makes others of them; leave the "
                "tokenizer out, or name the column of the text"
            )

        def read(number: int, notes: Counter[str], at: At) -> Iterator[Texts]:
            return texts_of(self.tables[number], key, notes, at)

        paths = [table.path for table in self.tables]
        return TextFiles(self.root, paths, read, {"files": {f"{self.form} {TEXT}": len(paths)}})

    def open(self, config: DataConfig, vocab_size: int, check: Check) -> Corpus:
        """Returns the corpus of a column: bytes of text in memory, or ids from token files that are made once."""
        key = config.text_key
        if config.tokenizer is not None:
            return open_texts(self.texts(key), config, vocab_size, check, (key,))
        if self.kind(key) == TEXT:
            require_bytes(config.source, vocab_size)
            return open_texts(self.texts(key), config, vocab_size, check)
        how = asked(config, check)
        total, done, shards = sum(table.stamp.size for table in self.tables) >> 20, 0, []
        for table in self.tables:

            def documents(report: Report, table: TableFile = table, done: int = done) -> Iterator[Any]:
                what = f"MiB of {self.form} turned into ids, {printable(table.path.name)}"
                return ids_of(table, key, lambda at: report((done + at) >> 20, total, what))

            shards.append(kept_tokens(how.cache, f"{self.form} 1 {key}", table.stamp, documents, how.progress))
            done += table.stamp.size
        return joined(shards, str(config.path), vocab_size, self.form, config.max_documents, how)


@cache
def pyarrow() -> Any:
    """Returns the library. Raises ``NotAvailableError`` that names the extra."""
    try:
        import pyarrow.compute
        import pyarrow.ipc
        import pyarrow.parquet
    except ImportError as error:
        raise NotAvailableError(
            f"data=parquet and data=arrow need the package pyarrow ({error}); install longctx[formats]"
        ) from error
    return pyarrow


@contextmanager
def arrow_errors(path: Path, what: str) -> Iterator[None]:
    """Turns the library's errors into a ``DataError`` that names the file. ``what``: was being read."""
    try:
        yield
    except DataError:
        raise
    except (pyarrow().ArrowException, OSError, ValueError, MemoryError, OverflowError, KeyError) as error:
        said = printable(str(error).partition("\n")[0])[:300] or type(error).__name__
        raise DataError(f"{printable(path)}, {what}: damaged or cut: {said}; copy the file again") from error


def kind_of_column(table: TableFile, key: str) -> str:
    """Returns what a column holds. Raises ``ConfigError`` naming those that a file has, or what is not read."""
    names, where = list(table.schema.names), printable(table.path)
    if key in CONVERSATIONS and key in names:
        raise ConfigError(
            f"data.text_key={key}: conversations are not read; render them as text, or name another of {excerpt(names)}"
        )
    if names.count(key) != 1:
        said = "no" if key not in names else "more than one"
        advice = ", such as data.text_key=input_ids" if "input_ids" in names and key == "text" else ""
        raise ConfigError(
            f"{where}: {said} column {key!a} (data.text_key); it has {excerpt(names)}; set data.text_key to the one "
            f"that holds text or ids{advice}"
        )
    kind, types = table.schema.field(key).type, pyarrow().types
    inner = kind.value_type if types.is_dictionary(kind) else kind
    if any(getattr(types, f"is_{one}")(inner) for one in _STRINGS):
        return TEXT
    if any(getattr(types, f"is_{one}")(kind) for one in _LISTS) and types.is_integer(kind.value_type):
        return IDS
    raise ConfigError(
        f"data.text_key={key}: the column of {where} is {excerpt(str(kind))}; text is a string, ids are a list of "
        "whole numbers"
    )


def texts_of(table: TableFile, key: str, notes: Counter[str], at: At) -> Iterator[Texts]:
    """Yields the texts of a column, in order. Raises ``DataError`` naming file and row for what is no text."""
    arrow = pyarrow()
    for first, piece in _pieces(table, key, at):
        with arrow_errors(table.path, f"row {first}"):
            plain = piece.dictionary_decode() if arrow.types.is_dictionary(piece.type) else piece
            strings = plain.cast(arrow.large_binary()).to_pylist()
        if plain.null_count:
            notes[NULLS] += plain.null_count
            strings = [text or b"" for text in strings]
        for row, text in enumerate(strings, first):
            _require_text(table.path, row, text)
        yield Texts(table.path, array("q", range(first, first + len(strings))), strings, in_array=True)


def _require_text(path: Path, row: int, text: bytes) -> None:
    where = f"{printable(path)}, row {row}"
    if b"\0" in text:
        raise DataError(f"{where}: NUL at byte {text.index(0)} of the text; text holds none: remove it")
    if not text.isascii():
        try:
            text.decode("utf-8")
        except UnicodeDecodeError as error:
            found = excerpt(text[error.start :][:8])
            raise DataError(f"{where}: bad UTF-8 at byte {error.start} of the text: {found}") from error


def ids_of(table: TableFile, key: str, at: At) -> Iterator[Any]:
    """Yields the ids of each row of a column, as arrays. Raises ``DataError`` naming file and row."""
    for first, piece in _pieces(table, key, at):
        with arrow_errors(table.path, f"row {first}"):
            lengths = pyarrow().compute.list_value_length(piece).fill_null(0)
            bounds = np.concatenate([[0], np.cumsum(lengths.to_numpy(zero_copy_only=False), dtype=np.int64)])
            flat = piece.flatten()
            if len(flat) != bounds[-1]:
                raise DataError(f"{printable(table.path)}, row {first}: {len(flat)} ids in rows of {int(bounds[-1])}")
            if flat.null_count:
                place = int(np.argmax(flat.is_null().to_numpy(zero_copy_only=False)))
                raise DataError(_at_row(table.path, first, bounds, place) + " is null; every token has an id")
            ids = flat.to_numpy(zero_copy_only=False)
        if len(ids) and (int(ids.min()) < 0 or int(ids.max()) > LARGEST):
            place = int(np.argmax((ids < 0) | (ids > LARGEST)))
            where = _at_row(table.path, first, bounds, place)
            raise DataError(f"{where}: id {int(ids[place])} is no token; ids are 0 to {LARGEST}")
        yield from (ids[start:stop] for start, stop in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True))


def _at_row(path: Path, first: int, bounds: Int64, place: int) -> str:
    row = int(np.searchsorted(bounds, place, side="right")) - 1
    return f"{printable(path)}, row {first + row}, token {place - int(bounds[row])} of it"


def _pieces(table: TableFile, key: str, at: At) -> Iterator[tuple[int, Any]]:
    """Yields a column in pieces with their first rows; buffers that contradict one another are refused."""
    row = 0
    pieces = table.column(key, at)
    while True:
        with arrow_errors(table.path, f"row {row}"):
            piece = next(pieces, None)
            if piece is None:
                return
            piece.validate(full=True)
        yield row, piece
        row += len(piece)


def split_pieces(column: Any) -> Iterator[Any]:
    """Yields an array in pieces of about ``WHOLE_BATCH`` bytes, so that what is made of them stays small."""
    column.validate()
    rows = max(1, len(column) * WHOLE_BATCH // max(1, column.nbytes))
    for first in range(0, len(column), rows):
        yield column.slice(first, rows)
