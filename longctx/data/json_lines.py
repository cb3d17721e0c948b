"""Reads documents from JSON Lines, and from ``.json`` files that hold one object or an array of objects."""

from __future__ import annotations

import json
import re
from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, NoReturn

from longctx.data.files import excerpt, open_unpacked, printable
from longctx.data.kinds import UTF8_MARK, foreign
from longctx.errors import DataError

LINE_LIMIT = 1 << 27  # bytes of one line; a file without line ends would be read into memory whole
BLOCK = 1 << 20  # bytes read in one go
BLANK_LINES = "blank lines"

_SPACE = b" \t\r\n"
_PLAIN_KEY = re.compile(r"[A-Za-z0-9_]+")


class Texts(NamedTuple):
    """Documents of one file, in order. ``places``: their lines, from 1; numbers of array elements; 0: the file."""

    path: Path
    places: array[int]
    contents: list[bytes]
    in_array: bool = False


def name_of(path: Path, place: int, in_array: bool) -> str:
    """Names a document by its file and place, as ``Texts`` has them, for messages."""
    return printable(path) + (f", element {place}" if in_array else f":{place}" if place else "")


def read_lines(
    path: Path, packing: str, key: str, left_out: Counter[str], at: Callable[[int], None]
) -> Iterator[Texts]:
    """Yields the documents of a JSON Lines file, some at a time.

    Blank lines are counted in ``left_out``. ``at``: told how many bytes of the file have been read. Documents before
    a bad line are yielded before it raises.
    """
    parse = LineParser(key)
    with open_unpacked(path, packing) as (file, position):
        for first, lines in _line_batches(path, file):
            places, contents = array("q"), list[bytes]()
            try:
                for number, line in enumerate(lines, first):
                    stripped = line.strip(_SPACE)
                    if not stripped:
                        left_out[BLANK_LINES] += 1
                        continue
                    contents.append(parse(stripped))
                    places.append(number)
            except ValueError as error:
                yield Texts(path, places, contents)
                raise DataError(f"{printable(path)}:{number}: {error}") from error
            yield Texts(path, places, contents)
            at(position())


def read_json(path: Path, packing: str, key: str, left_out: Counter[str], at: Callable[[int], None]) -> Iterator[Texts]:
    """Yields the documents of a ``.json`` file: JSON Lines if its first line is an object, else read as a whole."""
    whole = _not_lines(path, packing)
    if whole is None:
        yield from read_lines(path, packing, key, left_out, at)
        return
    where = printable(path)
    if len(whole) > LINE_LIMIT:
        raise DataError(
            f"{where}: more than {LINE_LIMIT} bytes in one piece; write an object per line (`jq -c '.[]'`), which is "
            "read line by line"
        )
    found = _whole_json(whole, where)
    parse = LineParser(key)
    elements = found if isinstance(found, list) else [found]
    contents = []
    for number, element in enumerate(elements):
        try:
            contents.append(parse.text_of(element))
        except ValueError as error:
            place = f", element {number}" if isinstance(found, list) else ""
            raise DataError(f"{where}{place}: {error}") from error
    numbers = array("q", range(len(contents)) if isinstance(found, list) else [0])
    yield Texts(path, numbers, contents, isinstance(found, list))


def _not_lines(path: Path, packing: str) -> bytes | None:
    """Returns the content of a file that is not JSON Lines, or its first ``LINE_LIMIT`` bytes and one; else None."""
    with open_unpacked(path, packing) as (file, _):
        whole = file.read(BLOCK)
        if b"\n" not in whole.lstrip(_SPACE):
            whole += file.read(LINE_LIMIT + 1 - len(whole))
        beginning = whole.removeprefix(UTF8_MARK).lstrip(_SPACE)
        line = beginning.partition(b"\n")[0]
        if not beginning or (line.startswith(b"{") and _is_json(line)):
            return None
        return whole + file.read(LINE_LIMIT + 1 - len(whole))


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _whole_json(whole: bytes, where: str) -> Any:
    try:
        return json.loads(
            whole.removeprefix(UTF8_MARK).decode("utf-8"), object_pairs_hook=_object, parse_constant=_no_constant
        )
    except (ValueError, RecursionError) as error:
        problem = f"{foreign(whole)}, not UTF-8" if foreign(whole) else printable(str(error))
        found = excerpt(whole[:200].strip())
        raise DataError(
            f"{where}: bad JSON: {problem}, found {found}; a .json file holds an object per line, "
            "one object, or one array of objects"
        ) from error


def _line_batches(path: Path, file: BinaryIO) -> Iterator[tuple[int, list[bytes]]]:
    """Yields lines without their ends, with the number of the first; no more is held than one line and a block."""
    number, unfinished = 1, bytearray()
    while block := file.read(BLOCK):
        end = block.rfind(b"\n")
        first_end = block.find(b"\n") if end >= 0 else len(block)
        if len(unfinished) + first_end > LINE_LIMIT:
            raise DataError(
                f"{printable(path)}:{number}: the line is longer than {LINE_LIMIT} bytes; a JSON Lines file holds one "
                "document per line, larger ones belong in files of their own"
            )
        if end < 0:
            unfinished += block
            continue
        lines: list[Any] = block[:end].split(b"\n")
        if unfinished:
            unfinished += lines[0]
            lines[0] = unfinished
        yield number, lines
        number += len(lines)
        unfinished = bytearray(block[end + 1 :])
    if unfinished:
        yield number, [bytes(unfinished)]


class LineParser:
    """Takes the text out of lines that are objects; ``key`` names the field that holds it.

    Calling it with a line returns the text in UTF-8. It raises ``ValueError`` with what is wrong.
    """

    def __init__(self, key: str) -> None:
        self.key = key
        self._quoted = json.dumps(key).encode() if _PLAIN_KEY.fullmatch(key) else None
        self._fast = json.JSONDecoder(parse_constant=_no_constant)
        self._strict = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_no_constant)

    def __call__(self, line: bytes) -> bytes:
        try:
            return self.text_of(self._parse(line))
        except UnicodeDecodeError as error:
            kind = foreign(line)
            if kind is not None:
                raise DataError(
                    f"begins as {kind}, not as text in UTF-8; save it as UTF-8, or name it for what it is"
                ) from error
            found = excerpt(line[error.start :][:8])
            raise DataError(f"bad UTF-8 at byte {error.start}: {found}; save the file as UTF-8") from error
        except DataError:
            raise
        except (ValueError, RecursionError) as error:
            found = excerpt(bytes(line[:200]))
            raise DataError(
                f"bad JSON: {printable(str(error))}, found {found}; every line must be one JSON object"
            ) from error

    def _parse(self, line: bytes) -> Any:
        if line.startswith(UTF8_MARK):  # of this file, or of one that was appended
            line = line[len(UTF8_MARK) :]
        text = line.decode("utf-8")
        # A key that stands there twice would lose a text in silence. Looking for that in Python costs as much as
        # all else; so only lines are looked at where it can be: with the key, or an escape that may spell it, again.
        if self._quoted is None or line.count(self._quoted) != 1 or b"\\u00" in line or not text.startswith("{"):
            return self._strict.decode(text)
        record, end = self._fast.raw_decode(text)
        if end != len(text):
            return self._strict.decode(text)  # refuses it with its own words
        return record

    def text_of(self, record: Any) -> bytes:
        """Returns the text of a parsed object."""
        if not isinstance(record, dict):
            raise DataError(f"found {excerpt(record)}; every document must be one JSON object")
        if self.key not in record:
            raise DataError(
                f"no field {self.key!a} (data.text_key); the line has {excerpt(sorted(record))}; set data.text_key to "
                "the one that holds the text, or data.files to the files that are meant"
            )
        text = record[self.key]
        if not isinstance(text, str):
            raise DataError(f"field {self.key!a} is {excerpt(text)}; it must be a string")
        if "\0" in text:
            raise DataError(f"{self.key!a} has a NUL at character {text.index(chr(0))}; remove it")
        try:
            return text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise DataError(
                f"field {self.key!a} has the lone surrogate {excerpt(text[error.start])} at character "
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
