"""Says by its name and its first bytes what a file holds: text, JSON Lines, JSON, or nothing that is text.

The rule, for any name in upper or lower case:

1. ``.gz``, ``.bz2``, ``.xz``, ``.lzma``, ``.zst`` and ``.zstd`` are unpacked while they are read;
   the name before that ending counts.
2. ``.jsonl``, ``.ndjson``, ``.jsonlines``, ``.jl`` and ``.ldjson`` are JSON Lines: a document per line.
3. ``.json`` is JSON Lines as well, or else one object or one array of objects: a document per object.
4. Pictures, sound, films, fonts and compiled programs are left out of a folder, and counted.
5. Tables, tensors, archives and office files are refused: they may be what was meant to be read.
6. Everything else is raw text, whatever its ending: a document per file. It is refused where it holds a NUL, or
   begins as UTF-16, as a known binary format or as JSON does.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import PurePath

UNPACKED = (".gz", ".bz2", ".xz", ".lzma", ".zst", ".zstd")
JSON_LINES = (".jsonl", ".ndjson", ".jsonlines", ".jl", ".ldjson")
TEXT, LINES, JSON, MEDIA = "text", "json lines", "json", "media"


def _ends(words: str) -> list[str]:
    return [f".{word}" for word in words.split()]


_MEDIA = frozenset(
    _ends(
        "png jpg jpeg gif webp bmp tif tiff ico heic psd mp3 wav flac ogg m4a aac mp4 mkv avi mov webm ttf otf woff "
        "woff2 eot pyc pyo pyd so o a dll dylib exe class wasm"
    )
)
_TABLES = _ends("csv tsv feather orc avro xls xlsx ods db sqlite sqlite3 tfrecord tfrecords msgpack mdb lmdb")
_OFFICE = _ends("pdf doc docx odt rtf ppt pptx odp epub mobi djvu ps")
_NUMBERS = _ends("bin idx ds npy npz pt pth ckpt safetensors gguf h5 hdf5 pkl pickle joblib mat onnx")
_PROGRAMS = {
    "tar xf": _ends("tar tgz tbz tbz2 txz wds"),
    "lz4 -d": _ends("lz4"),
    "brotli -d": _ends("br"),
    "unzip": _ends("zip"),
    "uncompress": _ends("z"),
    "7z x": _ends("7z"),
    "unrar x": _ends("rar"),
}
_REFUSED = {
    **{end: f"unpack it first with `{program}`" for program, ends in _PROGRAMS.items() for end in ends},
    **dict.fromkeys(_TABLES, "turn its rows into JSON Lines, a document per line"),
    **dict.fromkeys(_OFFICE, "export it as text"),
    **dict.fromkeys(_NUMBERS, "it holds numbers; files of tokens are read by data=tokens, megatron, datatrove or olmo"),
    **dict.fromkeys((".parquet", ".pq"), "data=parquet reads it"),
    ".arrow": "data=arrow reads it",
    ".ds": "it holds tokens; data=datatrove reads it",
    ".npy": "it holds numbers; data=olmo reads files of tokens by that name",
}

# How files of other kinds begin.
_BEGINNINGS = {
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "Zstandard",
    b"\xfd7zXZ\0": "xz",
    b"PK\x03\x04": "a zip archive",
    b"PAR1": "Parquet",
    b"ARROW1": "Arrow",
    b"%PDF-": "PDF",
    b"\x89PNG": "a PNG picture",
    b"\x89HDF": "HDF5",
    b"\x93NUMPY": "NumPy",
    b"\x7fELF": "a program",
    b"SQLite format 3": "SQLite",
    **{f"BZh{level}1AY&SY".encode(): "bzip2" for level in range(1, 10)},
}
UTF8_MARK = b"\xef\xbb\xbf"
_OTHER_MARKS = {
    b"\xff\xfe\0\0": "UTF-32",
    b"\0\0\xfe\xff": "UTF-32",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}

_OPENING = re.compile(rb'\s*\[?\s*\{\s*"(?:[^"\\\n]|\\.)*"\s*:')
_OBJECT_LINE = re.compile(rb'[ \t]*\{\s*"(?:[^"\\]|\\.)*"\s*:.*\}[ \t\r]*')
_LOOKED_AT = 1 << 16  # bytes of a text that are searched for JSON
_LINES_LOOKED_AT = 10


@dataclass(frozen=True)
class Kind:
    """How a file is read: as ``form`` after ``packing`` was undone. ``refused``: what to do where it is not read.

    ``end``: the ending that says so, in lower case.
    """

    form: str
    end: str
    packing: str = ""
    refused: str = ""


def kind_of(name: str) -> Kind:
    """Returns how a file of that name is read."""
    path = PurePath(name.lower())
    packing = path.suffix if path.suffix in UNPACKED else ""
    inner = PurePath(path.stem) if packing else path
    end = inner.suffix
    if end in _REFUSED:
        return Kind(TEXT, end, packing, _REFUSED[end])
    form = LINES if end in JSON_LINES else JSON if end == ".json" else MEDIA if end in _MEDIA else TEXT
    return Kind(form, end, packing)


def foreign(beginning: bytes) -> str | None:
    """Returns what begins with these bytes and is not text in UTF-8, or None."""
    for table in (_OTHER_MARKS, _BEGINNINGS):
        for mark, name in table.items():
            if beginning.startswith(mark):
                return name
    return None


def looks_like_json(text: bytes) -> bool:
    """Tells whether a text begins as an object or an array of objects, or has objects as two of its first lines."""
    head = text[:_LOOKED_AT]
    if _OPENING.match(head):
        return True
    lines = [line for line in head.split(b"\n") if line.strip()][:_LINES_LOOKED_AT]
    return sum(_OBJECT_LINE.fullmatch(line) is not None for line in lines) >= 2
