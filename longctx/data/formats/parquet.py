"""Reads a column of Parquet files: text, or ids.

A file is read a row group at a time, and of that a few pages; the checksums of pages are checked where it has them.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from longctx.config import DataConfig
from longctx.data.files import printable
from longctx.data.formats.columns import WHOLE_BATCH, At, Tables, arrow_errors, pyarrow, split_pieces
from longctx.data.formats.raw import RawFile
from longctx.data.formats.shards import find_shards
from longctx.data.source import Source
from longctx.data.text import TOKENIZING
from longctx.errors import DataError

ENDS = (".parquet", ".pq")
RULE = "a Parquet file ends in .parquet or .pq; set data.path to one, a folder, or a pattern of them"
MAGIC = b"PAR1"
BUFFER = 1 << 20  # bytes of a column that are read ahead
MOST_ROWS = 1 << 16  # of a piece


class ParquetTable:
    """Holds one Parquet file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._arrow = pyarrow()
        self._raw = RawFile(path)
        self.stamp = self._raw.stamp
        size = self._raw.size
        for at in (0, max(0, size - len(MAGIC))):
            found = self._raw.read(at, min(len(MAGIC), size))
            if found != MAGIC:
                raise DataError(
                    f"{printable(path)}, byte {at}: {found!a}; a Parquet file begins and ends with {MAGIC!a}: it is "
                    "cut, or is none"
                )
        with arrow_errors(path, f"the footer before byte {size}"):
            self.schema = self._opened()[0].schema_arrow

    def column(self, name: str, at: At) -> Iterator[Any]:
        """Yields a column, row group by row group."""
        file, stream = self._opened()
        rows = 0
        for number in range(file.metadata.num_row_groups):
            group, before = file.metadata.row_group(number), rows
            for batch in file.iter_batches(_rows_at_once(group, name), row_groups=[number], columns=[name]):
                at(stream.tell())
                rows += len(batch)
                yield from split_pieces(batch.column(0))
            if rows - before != group.num_rows:
                raise DataError(
                    f"{printable(self.path)}, row group {number}: {rows - before} rows of {group.num_rows}; the file "
                    "is damaged: copy it again"
                )
        if rows != file.metadata.num_rows:
            raise DataError(
                f"{printable(self.path)}, the footer: says {file.metadata.num_rows} rows, row groups have {rows}"
            )

    def _opened(self) -> tuple[Any, Any]:
        stream = self._raw.stream()
        opened = self._arrow.parquet.ParquetFile(
            stream, buffer_size=BUFFER, pre_buffer=False, page_checksum_verification=True
        )
        return opened, stream


def _rows_at_once(group: Any, name: str) -> int:
    columns = (group.column(number) for number in range(group.num_columns))
    size = sum(one.total_uncompressed_size for one in columns if one.path_in_schema.partition(".")[0] == name)
    return max(1, min(MOST_ROWS, int(group.num_rows * WHOLE_BATCH // max(1, size))))


def _tables(config: DataConfig) -> Tables:
    places = find_shards(config.path, "parquet", ENDS, RULE, config.files)
    return Tables(Path(str(config.path)), [ParquetTable(place) for place in places], "parquet")


PARQUET = Source(
    "parquet",
    lambda config, vocab_size, check: _tables(config).open(config, vocab_size, check),
    reads=TOKENIZING | {"path", "files", "text_key", "recheck"},
    texts=lambda config: _tables(config).texts(config.text_key),
)
