"""Reads a column of what Hugging Face ``datasets`` saves with ``save_to_disk``: text, or ids.

A folder with ``state.json`` is a dataset: the file names its Arrow files, in order. A folder with ``dataset_dict.json``
holds several, of which ``data.split`` names one. Arrow files that no ``state.json`` stands beside are read by name.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from longctx.config import DataConfig
from longctx.data.files import data_path, excerpt, open_regular, printable
from longctx.data.folders import find_files
from longctx.data.formats.columns import At, Tables, arrow_errors, pyarrow, split_pieces
from longctx.data.formats.raw import RawFile
from longctx.data.formats.shards import find_shards, is_pattern
from longctx.data.source import Source
from longctx.data.text import TOKENIZING
from longctx.errors import ConfigError, DataError

STATE, SPLITS = "state.json", "dataset_dict.json"
RULE = "an Arrow file ends in .arrow; set data.path to what save_to_disk wrote, a file, or a pattern of files"
FILE_MAGIC = b"ARROW1"
END = b"\xff\xff\xff\xff\0\0\0\0"  # of a stream that was closed
LONGEST = 1 << 26  # bytes of a JSON file


class ArrowTable:
    """Holds one Arrow file, a stream as ``datasets`` writes it or one with a footer."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._arrow = pyarrow()
        self._raw = RawFile(path)
        self.stamp = self._raw.stamp
        size = self._raw.size
        self._is_stream = self._raw.read(0, min(size, len(FILE_MAGIC))) != FILE_MAGIC
        tail = self._raw.read(max(0, size - len(END)), min(size, len(END)))
        if self._is_stream and tail != END:
            raise DataError(
                f"{printable(path)}, byte {max(0, size - len(END))}: ends in {tail!a}, and an Arrow stream in {END!a}; "
                "it was cut, or its writer was not closed"
            )
        with arrow_errors(path, "byte 0"):
            self.schema = self._opened()[0].schema

    def column(self, name: str, at: At) -> Iterator[Any]:
        """Yields a column, batch by batch."""
        reader, stream = self._opened()
        place = self.schema.get_field_index(name)
        for batch in self._batches(reader):
            batch.validate()
            at(stream.tell())
            self._require_all(batch.column(place), stream.tell())
            yield from split_pieces(batch.column(place))
        if self._is_stream and stream.tell() != self._raw.size:
            raise DataError(
                f"{printable(self.path)}, byte {stream.tell()}: the stream ends here, and the file at byte "
                f"{self._raw.size}; what follows would be lost"
            )

    def _require_all(self, column: Any, end: int) -> None:
        """Refuses a batch of lists in which some values belong to no row."""
        types = self._arrow.types
        if not (types.is_list(column.type) or types.is_large_list(column.type)) or not len(column):
            return
        first, last = (column.offsets[at].as_py() for at in (0, len(column)))
        if (first, last) != (0, len(column.values)):
            raise DataError(
                f"{printable(self.path)}, the batch before byte {end}: its rows hold values {first} to {last} of "
                f"{len(column.values)}; the others would be lost"
            )

    def _batches(self, reader: Any) -> Iterator[Any]:
        if self._is_stream:
            yield from reader
        else:
            yield from (reader.get_batch(number) for number in range(reader.num_record_batches))

    def _opened(self) -> tuple[Any, Any]:
        stream = self._raw.stream()
        ipc = self._arrow.ipc
        return ipc.open_stream(stream) if self._is_stream else ipc.open_file(stream), stream


def _tables(config: DataConfig) -> Tables:
    path = str(config.path)
    folder = None if is_pattern(path) else data_path(config.path, "arrow")
    if config.split is not None and (folder is None or not (folder / SPLITS).is_file()):
        raise ConfigError(f"data.split={config.split}: {printable(path)} has no {SPLITS}; leave data.split at null")
    if folder is not None and folder.is_dir():
        places = _in_folder(folder, config.split)
    else:
        places = find_shards(path, "arrow", (".arrow",), RULE)
    return Tables(Path(path), [ArrowTable(place) for place in places], "arrow")


def _in_folder(root: Path, split: str | None) -> list[Path]:
    """Returns the Arrow files of a folder, in order."""
    if (root / SPLITS).exists():
        root = root / _split_of(root, split)
        if not (root / STATE).is_file():
            raise DataError(f"{printable(root / STATE)} is missing, and {SPLITS} names the folder; copy it again")
    files = find_files(root).paths
    nested = next((one for one in files if one.name == SPLITS), None)
    if nested is not None:
        raise DataError(
            f"{printable(nested)}: a folder of several datasets lies below data.path; set data.path to it, and "
            "data.split to one of them"
        )
    datasets = {one.parent for one in files if one.name == STATE}
    found: list[Path] = []
    for one in files:
        if one.name == STATE:
            found += _data_files(one)
        elif one.suffix == ".arrow" and one.parent not in datasets:
            found.append(one)
    if not found:
        raise DataError(f"the folder {printable(root)} names no Arrow file; {RULE}")
    return found


def _split_of(root: Path, split: str | None) -> str:
    said = _json(root / SPLITS).get("splits")
    names = said if isinstance(said, list) and all(_is_name(one) for one in said) else []
    if not names:
        raise DataError(f"{printable(root / SPLITS)}: splits are {excerpt(said)}; they are names of folders beside it")
    if split is None and len(names) > 1:
        raise ConfigError(
            f"data.split=null: {printable(root)} holds several datasets; set data.split to one of {', '.join(names)}"
        )
    if split is not None and split not in names:
        raise ConfigError(f"data.split={split}: {printable(root)} has {', '.join(names)}; set it to one of them")
    return split or str(names[0])


def _data_files(state: Path) -> list[Path]:
    """Returns the files that the state of a dataset names."""
    said, where = _json(state), printable(state)
    if said.get("_indices_data_files") or said.get("_indices_files"):
        raise DataError(f"{where}: rows are chosen by an index of their own; save the dataset anew with save_to_disk")
    files = said.get("_data_files")
    names = [one.get("filename") if isinstance(one, dict) else None for one in files] if isinstance(files, list) else []
    if not isinstance(files, list) or not all(_is_name(one) for one in names) or len(set(names)) != len(names):
        raise DataError(
            f"{where}: _data_files are {excerpt(files)}; they are a list of {{'filename': NAME}}, each of a file "
            "beside it, and none twice"
        )
    return [state.parent / str(one) for one in names]


def _is_name(said: Any) -> bool:
    """Tells whether something is the name of what lies in the same folder, and leads nowhere else."""
    return isinstance(said, str) and said not in ("", ".", "..") and Path(said).name == said and "\0" not in said


def _json(path: Path) -> dict[str, Any]:
    with open_regular(path) as file:
        content = file.read(LONGEST)
    try:
        found = json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{printable(path)}: is no JSON: {printable(str(error))}; copy the folder again") from None
    if not isinstance(found, dict):
        raise DataError(f"{printable(path)}: holds {excerpt(found)}; it is an object")
    return found


ARROW = Source(
    "arrow",
    lambda config, vocab_size, check: _tables(config).open(config, vocab_size, check),
    reads=TOKENIZING | {"path", "text_key", "split", "recheck"},
    texts=lambda config: _tables(config).texts(config.text_key),
)
