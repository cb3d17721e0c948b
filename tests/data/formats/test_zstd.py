"""Text that Zstandard packed: read frame after frame, and nothing of a damaged one."""

from __future__ import annotations

import json
import random
from itertools import pairwise
from pathlib import Path

import pytest

from longctx.data import text
from longctx.data.text import collect, text_files
from longctx.errors import DataError

zstandard = pytest.importorskip("zstandard")

LINES = [f"document {n} " + "x" * (n % 90) for n in range(3000)]
JSONL = "".join(json.dumps({"text": line}) + "\n" for line in LINES).encode()


def packed(content: bytes, *frames: int) -> bytes:
    cuts = [0, *frames, len(content)]
    parts = (content[one:other] for one, other in pairwise(cuts))
    return b"".join(zstandard.ZstdCompressor().compress(part) for part in parts)


def read(path: Path) -> list[bytes]:
    corpus = collect(text_files(str(path), "text"))
    bounds = corpus.bounds.tolist()
    return [bytes(corpus.tokens[one:other]) for one, other in pairwise(bounds)]


@pytest.mark.parametrize("name", ["a.jsonl.zst", "a.JSONL.ZSTD", "a.json.zst"])
def test_frames_follow_one_another(tmp_path: Path, name: str) -> None:
    skippable = b"\x50\x2a\x4d\x18" + (5).to_bytes(4, "little") + b"12345"
    empty = packed(b"")
    for content in (packed(JSONL), packed(JSONL, 10, 5000), skippable + packed(JSONL, 77) + empty + skippable):
        (tmp_path / name).write_bytes(content)
        assert read(tmp_path / name) == [line.encode() for line in LINES]
    (tmp_path / "b.txt.zst").write_bytes(packed(b"raw\ntext"))
    assert read(tmp_path / "b.txt.zst") == [b"raw\ntext"]


def test_damage_never_drops_a_line(tmp_path: Path) -> None:
    path, whole, rng = tmp_path / "a.jsonl.zst", packed(JSONL, 4000), random.Random(0)
    for size in [*rng.sample(range(1, len(whole)), 40), len(whole) - 1]:
        path.write_bytes(whole[:size])
        if size != len(packed(JSONL[:4000])):
            with pytest.raises(DataError, match=r"a\.jsonl\.zst: the compressed content is damaged or cut"):
                read(path)
    path.write_bytes(whole + b"trailing")
    with pytest.raises(DataError, match="damaged or cut"):
        read(path)
    checked = zstandard.ZstdCompressor(write_checksum=True).compress(JSONL)
    for _ in range(60):
        damaged = bytearray(checked)
        damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        try:
            assert read(path) == [line.encode() for line in LINES]  # a bit that says nothing
        except DataError as error:
            assert "a.jsonl.zst" in str(error)  # noqa: PT017


def test_what_unpacks_without_end_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bomb = zstandard.ZstdCompressor().compress(b"x" * (300 << 20))
    (tmp_path / "a.jsonl.zst").write_bytes(bomb)
    with pytest.raises(DataError, match=r"a\.jsonl\.zst:1: the line is longer than"):
        read(tmp_path / "a.jsonl.zst")
    monkeypatch.setattr(text, "MOST_UNPACKED", 1 << 20)
    (tmp_path / "a.txt.zst").write_bytes(bomb)
    with pytest.raises(DataError, match="more than 1048576 bytes in one document"):
        read(tmp_path / "a.txt.zst")
