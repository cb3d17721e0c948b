"""Writes corpora byte by byte as other programs do, and reads them back by the description of their bytes alone."""

from __future__ import annotations

import gzip
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from longctx.config import DataConfig
from longctx.data import Corpus, open_corpus

Documents = Sequence[Sequence[int]]
DOCUMENTS = [[5], [], [1, 2, 3], [250, 7], [], [9, 9, 9, 9, 1]]
MEGATRON_CODES = {"uint8": 1, "int8": 2, "int16": 3, "int32": 4, "int64": 5, "float64": 6, "float32": 7, "uint16": 8}


def write_megatron(
    prefix: Path, documents: Sequence[Documents], dtype: str = "int32", modes: Sequence[int] | None = None
) -> str:
    """Writes documents, each of any number of sequences."""
    sequences = [sequence for document in documents for sequence in document]
    lengths = [len(sequence) for sequence in sequences]
    size = np.dtype(dtype).itemsize
    bounds = [0, *accumulate(len(document) for document in documents)]
    begins = [0, *accumulate(length * size for length in lengths)][: len(lengths)]
    with Path(f"{prefix}.bin").open("wb") as file:
        for sequence in sequences:
            file.write(np.array(sequence, dtype=dtype).tobytes())
    with Path(f"{prefix}.idx").open("wb") as file:
        file.write(b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, MEGATRON_CODES[dtype], len(lengths), len(bounds)))
        file.write(struct.pack(f"<{len(lengths)}i", *lengths) + struct.pack(f"<{len(begins)}q", *begins))
        file.write(struct.pack(f"<{len(bounds)}q", *bounds))
        file.write(bytes(modes or []))
    return str(prefix)


def read_megatron(prefix: Path) -> list[list[int]]:
    """Reads the documents of a pair that obeys its description."""
    raw = Path(f"{prefix}.idx").read_bytes()
    _, code, count, bounds = struct.unpack_from("<QBQQ", raw, 9)
    dtype = next(name for name, one in MEGATRON_CODES.items() if one == code)
    lengths = struct.unpack_from(f"<{count}i", raw, 34)
    at = struct.unpack_from(f"<{bounds}q", raw, 34 + 12 * count)
    tokens = np.fromfile(f"{prefix}.bin", dtype=dtype).tolist()
    ends = [0, *accumulate(lengths)]
    return [tokens[ends[one] : ends[other]] for one, other in pairwise(at)]


def write_datatrove(path: Path, documents: Documents, dtype: str = "uint16", metadata: bool = True) -> str:
    """Writes a file of tokens, its index and its metadata."""
    size = np.dtype(dtype).itemsize
    ends = list(accumulate(map(len, documents)))
    path.write_bytes(b"".join(struct.pack(f"<{len(one)}{'HI'[size == 4]}", *one) for one in documents))
    path.with_name(f"{path.name}.index").write_bytes(struct.pack(f"<{len(ends)}Q", *ends))
    if metadata:
        total = ends[-1] if ends else 0
        path.with_name(f"{path.name}.metadata").write_text(f"some/tokenizer|{size}\n{total}\n{total} T")
    return str(path)


def read_datatrove(path: Path, dtype: str = "uint16") -> list[list[int]]:
    """Reads the documents of a file and its index."""
    tokens = np.fromfile(path, dtype=dtype).tolist()
    ends = [0, *np.fromfile(f"{path}.index", dtype="<u8").tolist()]
    return [tokens[one:other] for one, other in pairwise(ends)]


def write_olmo(path: Path, documents: Documents, dtype: str = "uint16", more: str = ",id-{0},x.jsonl.gz,{0}") -> str:
    """Writes raw tokens and the table of boundaries. ``more``: what stands behind the two numbers."""
    path.write_bytes(b"".join(np.array(one, dtype=dtype).tobytes() for one in documents))
    ends = [0, *accumulate(map(len, documents))]
    lines = [f"{one},{other}{more.format(n)}\r\n" for n, (one, other) in enumerate(pairwise(ends))]
    path.with_name(path.name.replace(".npy", ".csv.gz")).write_bytes(gzip.compress("".join(lines).encode()))
    return str(path)


def read_olmo(path: Path, dtype: str = "uint16") -> list[list[int]]:
    """Reads the documents that the table names."""
    tokens = np.fromfile(path, dtype=dtype).tolist()
    lines = gzip.decompress(path.with_name(path.name.replace(".npy", ".csv.gz")).read_bytes()).decode().splitlines()
    pairs = [[int(number) for number in line.split(",")[:2]] for line in lines]
    return [tokens[one:other] for one, other in pairs]


@dataclass(frozen=True)
class Format:
    """Writes and reads one format. ``files``: what stands beside the first, by ending; ``reads_dtype``: it has none."""

    name: str
    end: str
    write: Callable[..., Any]
    read: Callable[..., list[list[int]]]
    files: tuple[str, ...]
    dtypes: tuple[str, ...]
    reads_dtype: bool = True

    def written(self, folder: Path, stem: str, documents: Documents, dtype: str = "") -> str:
        """Writes documents of one sequence each and returns what ``data.path`` says."""
        path = folder / f"{stem}{self.end}"
        path.parent.mkdir(parents=True, exist_ok=True)
        whole = [[one] for one in documents] if self.name == "megatron" else documents
        found: str = self.write(path, whole, dtype or self.dtypes[0])
        return found

    def open(self, path: str, dtype: str = "", vocab_size: int = 1 << 31, **rest: Any) -> Corpus:
        """Opens what was written."""
        settings = {"token_dtype": dtype or self.dtypes[0]} if self.reads_dtype else {}
        config = DataConfig(source=self.name, path=path, **settings, **rest.pop("settings", {}))
        config.check()
        return open_corpus(config, vocab_size, **rest)

    def paths(self, folder: Path, stem: str) -> list[Path]:
        """Returns the files of a corpus."""
        return [folder / f"{stem}{end}" for end in self.files]


FORMATS = [
    Format(
        "megatron", "", write_megatron, read_megatron, (".bin", ".idx"), ("int32", "uint16", "int64", "uint8"), False
    ),
    Format("datatrove", ".ds", write_datatrove, read_datatrove, (".ds", ".ds.index"), ("uint16", "uint32")),
    Format("olmo", ".npy", write_olmo, read_olmo, (".npy", ".csv.gz"), ("uint16", "uint32")),
]


def documents_of(corpus: Corpus) -> list[list[int]]:
    """Returns the documents of a corpus, as it reads them."""
    bounds = corpus.bounds.tolist()
    return [corpus.read(one, other).tolist() for one, other in pairwise(bounds)]
