"""Reads text as bytes: a token is a byte, 0 to 255, so any text trains without a tokenizer or a download.

What a file of ``data=text`` holds is decided by the rule in ``longctx.data.kinds``.
"""

from __future__ import annotations

import sysconfig
from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from longctx.config import DataConfig
from longctx.data.corpus import Corpus
from longctx.data.files import data_path, open_regular, open_unpacked, printable
from longctx.data.folders import Found, find_files
from longctx.data.formats.shards import fits
from longctx.data.json_lines import Texts, name_of, read_json, read_lines
from longctx.data.kinds import JSON, LINES, MEDIA, UTF8_MARK, Kind, foreign, kind_of, looks_like_json
from longctx.data.source import Check, Report, Source, TextFiles, unreported
from longctx.data.tokenizer import BYTES as BYTE_TOKENIZER
from longctx.errors import DataError

BYTES = 256  # size of the byte vocabulary
TOKENIZING = frozenset({"tokenizer", "bos", "eos", "special_tokens"})  # what says how text becomes ids
NOT_STDLIB = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"})
SAMPLE = 80  # characters of the first document that a run shows
MOST_UNPACKED = 1 << 30  # bytes of one document
_MIB = 1 << 20

NOT_UTF8 = "texts that are not UTF-8"


def stdlib_files() -> TextFiles:
    """Finds the standard library of the running interpreter, one document per ``.py`` file, tests left out."""
    root = Path(sysconfig.get_paths()["stdlib"])
    # Some installations are farms of links, and nobody hides foreign files in the standard library.
    found = find_files(root, NOT_STDLIB, once=False)
    paths = [path for path in found.paths if path.suffix == ".py"]

    def read(number: int, notes: Counter[str], at: Callable[[int], None]) -> Iterator[Texts]:
        with open_regular(paths[number]) as file:
            yield _whole(paths[number], file.read())

    return TextFiles(root, paths, read, {})


def text_files(path: str | None, text_key: str, files: str | None = None) -> TextFiles:
    """Finds the text of a file or folder, by the rule of ``longctx.data.kinds``.

    Reading is strict: what is no text, bad JSON, a missing or non-string ``text_key``, bad UTF-8 in JSON or a NUL
    raises ``DataError`` with file and line. ``files``: patterns with spaces between them; only files of a folder that
    fit one of them are read.
    """
    root = data_path(path, "text")
    found = find_files(root) if root.is_dir() else Found([root])
    kinds = _chosen(found, root, files)
    if not found.paths:
        told = ", ".join(f"{count} {reason}" for reason, count in found.left_out.items())
        raise DataError(
            f"the folder {printable(root)} holds no file to read{f' (left out: {told})' if told else ''}; "
            "set data.path to one that holds text or JSON Lines"
        )

    def read(number: int, notes: Counter[str], at: Callable[[int], None]) -> Iterator[Texts]:
        return _texts(found.paths[number], kinds[number], text_key, notes, at)

    forms = Counter(kind.form + (f" in {kind.packing}" if kind.packing else "") for kind in kinds)
    left_out = {"left_out": dict(found.left_out)} if found.left_out else {}
    return TextFiles(root, found.paths, read, {"files": dict(forms), **left_out})


def collect(texts: TextFiles, max_documents: int | None = None, progress: Report = unreported) -> Corpus:
    """Reads documents as bytes into memory. With ``max_documents``, nothing past the last document taken is read."""
    collected, notes = _Collected(max_documents), Counter[str]()
    sizes = [path.stat().st_size if path.exists() else 0 for path in texts.paths]
    for number, path in enumerate(texts.paths):
        if not collected.wants_more:
            break

        def at(position: int, before: int = sum(sizes[:number]), name: str = path.name) -> None:
            done = (before + position) // _MIB
            progress(done, -(-sum(sizes) // _MIB), f"MiB of text read, {printable(name)}")

        at(0)
        for found in texts.read(number, notes, at):
            collected.add(found)
            if not collected.wants_more:
                break
    return collected.corpus(texts.root, {**texts.facts, **({"noted": dict(notes)} if notes else {})})


def _chosen(found: Found, root: Path, patterns: str | None) -> list[Kind]:
    """Returns the kinds of the files to read, and takes from ``found`` what is not read."""
    single = found.paths == [root]
    paths, kinds = [], []
    for path in found.paths:
        kind = kind_of(path.name)
        if patterns and not fits(path.name if single else path.relative_to(root).as_posix(), patterns):
            found.left_out[f"not in data.files={patterns}"] += 1
        elif kind.refused:
            raise DataError(
                f"{printable(path)}: {kind.end} is not text and data=text does not read it; {kind.refused}"
                + (
                    ""
                    if single
                    else ", or take it out of data.path, or name what is meant with data.files='*.jsonl *.txt'"
                )
            )
        elif kind.form == MEDIA and not single:
            found.left_out["pictures, sound, programs"] += 1
        elif kind.form == MEDIA:
            raise DataError(f"{printable(path)}: {kind.end} is not text; set data.path to text or JSON Lines")
        else:
            paths.append(path)
            kinds.append(kind)
    found.paths = paths
    return kinds


def _texts(path: Path, kind: Kind, text_key: str, notes: Counter[str], at: Callable[[int], None]) -> Iterator[Texts]:
    """Yields the documents of a file; an empty one, where it holds nothing."""
    if kind.form not in (LINES, JSON):
        yield _whole(path, _raw(path, kind.packing, notes))
        return
    read = read_lines if kind.form == LINES else read_json
    empty = True
    for texts in read(path, kind.packing, text_key, notes, at):
        empty = empty and not texts.contents
        yield texts
    if empty:
        yield _whole(path, b"")


def _raw(path: Path, packing: str, notes: Counter[str]) -> bytes:
    with open_unpacked(path, packing) as (file, _):
        content = file.read(MOST_UNPACKED + 1 if packing else -1)
    where = printable(path)
    if packing and len(content) > MOST_UNPACKED:
        raise DataError(
            f"{where}: more than {MOST_UNPACKED} bytes in one document when it is unpacked; write a document per line "
            "of JSON Lines, which is read line by line"
        )
    kind = foreign(content)
    if kind is not None:
        raise DataError(
            f"{where}: begins as {kind}, not as text in UTF-8; take it out of data.path, or save it as UTF-8 text"
            + (f" (`iconv -f {kind} -t UTF-8`)" if kind.startswith("UTF") else "")
        )
    if b"\0" in content:
        raise DataError(
            f"{where}: NUL at byte {content.index(0)}: text holds none, is this a binary file, or UTF-16? Take it "
            "out of data.path, or turn it into tokens for data=tokens"
        )
    content = content.removeprefix(UTF8_MARK)
    if looks_like_json(content):
        raise DataError(
            f"{where}: holds JSON, which would be learnt as markup; JSON Lines end in .jsonl (or .ndjson, "
            ".jsonlines, .jl, .json, also with .gz .bz2 .xz .zst): rename or link it, or leave it out with data.files"
        )
    try:
        content.decode("utf-8")
    except UnicodeDecodeError:
        notes[NOT_UTF8] += 1
    return content


def _whole(path: Path, content: bytes) -> Texts:
    return Texts(path, array("q", [0]), [content])


class _Collected:
    """Joins the first ``max_documents`` documents that hold anything."""

    def __init__(self, max_documents: int | None) -> None:
        self.skipped = 0
        self._max_documents = max_documents
        self._flat, self._lengths = bytearray(), array("q")
        self._files: list[tuple[Path, bool]] = []
        self._file_of, self._places = array("q"), array("q")

    @property
    def wants_more(self) -> bool:
        return self._max_documents is None or len(self._lengths) < self._max_documents

    def add(self, texts: Texts) -> None:
        """Takes documents of a file; empty ones are counted and left out."""
        file = (texts.path, texts.in_array)
        if not self._files or self._files[-1] != file:
            self._files.append(file)
        places, contents = texts.places, texts.contents
        if not all(contents) or self._max_documents is not None:
            places, contents = self._first(texts)
        self._flat += b"".join(contents)
        self._lengths.extend(map(len, contents))
        self._places.extend(places)
        self._file_of.extend([len(self._files) - 1] * len(contents))

    def _first(self, texts: Texts) -> tuple[array[int], list[bytes]]:
        """Returns those that hold anything, up to the last one that is wanted."""
        places, contents = array("q"), list[bytes]()
        for place, content in zip(texts.places, texts.contents, strict=True):
            if self._max_documents is not None and len(self._lengths) + len(contents) >= self._max_documents:
                break
            if content:
                places.append(place)
                contents.append(content)
            else:
                self.skipped += 1
        return places, contents

    def corpus(self, root: Path, facts: dict[str, Any]) -> Corpus:
        """Returns the corpus of what was taken; ``facts``: what else a run tells about it."""
        files, file_of, places = self._files, self._file_of, self._places

        def origin(document: int) -> str:
            path, in_array = files[file_of[document]]
            return name_of(path, places[document], in_array)

        tokens = np.frombuffer(self._flat, dtype=np.uint8)
        tokens.flags.writeable = False
        bounds = np.concatenate([[0], np.cumsum(self._lengths, dtype=np.int64)]).astype(np.int64)
        if len(tokens):
            first = bytes(tokens[: min(4 * SAMPLE, int(bounds[1]))]).decode("utf-8", "replace")
            facts["first_document"] = {"from": origin(0), "begins": first[:SAMPLE]}
        return Corpus(tokens, bounds, origin, BYTES, str(root), self.skipped, facts=facts)


def require_bytes(source: str, vocab_size: int) -> None:
    """Refuses a vocabulary that lacks bytes, where a source turned out to hold text. Raises ``ConfigError``."""
    replace(TEXT, name=source).require_vocabulary(vocab_size)


def open_texts(
    texts: TextFiles, config: DataConfig, vocab_size: int, check: Check, settings: tuple[Any, ...] = ()
) -> Corpus:
    """Opens text as bytes, or as ids of ``data.tokenizer``.

    ``settings``: what besides the files determines the documents, such as the key of their text.
    """
    if config.tokenizer is not None:
        from longctx.data.tokenizing.cached import open_tokenized  # which reads token files, and those text

        return open_tokenized(texts, config, vocab_size, check, (config.source, *settings))
    return replace(collect(texts, config.max_documents, check.progress), tokenizer=BYTE_TOKENIZER)


def _stdlib(config: DataConfig) -> TextFiles:
    return stdlib_files()


def _text(config: DataConfig) -> TextFiles:
    return text_files(config.path, config.text_key, config.files)


PYTHON_STDLIB = Source(
    "python_stdlib",
    lambda config, vocab_size, check: open_texts(_stdlib(config), config, vocab_size, check),
    reads=TOKENIZING,
    ids=BYTES,
    texts=_stdlib,
)
TEXT = Source(
    "text",
    lambda config, vocab_size, check: open_texts(_text(config), config, vocab_size, check, (config.text_key,)),
    reads=TOKENIZING | {"path", "text_key", "files"},
    ids=BYTES,
    texts=_text,
)
