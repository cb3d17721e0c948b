"""Token files: what is written is read, and nothing damaged is."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longctx.config import DataConfig
from longctx.data import Corpus, corpus, open_corpus, tokens, write_tokens
from longctx.data.packing import Packing
from longctx.errors import ConfigError, DataError, LongctxError, StorageError

DOCUMENTS = [[1, 2, 3], [], [4], [5, 6, 7, 8], []]


def opened(path: Path, vocab_size: int = 100, dtype: str = "uint16", **rest: Any) -> Corpus:
    return open_corpus(
        DataConfig(source="tokens", path=str(path), token_dtype=dtype, max_documents=rest.pop("limit", None)),
        vocab_size,
        **rest,
    )


@pytest.fixture
def written(tmp_path: Path) -> Path:
    path = tmp_path / "a.bin"
    write_tokens(path, DOCUMENTS)
    return path


@settings(max_examples=60, deadline=None)
@given(
    documents=st.lists(st.lists(st.integers(0, 2**16 - 1), max_size=8), max_size=12),
    dtype=st.sampled_from(["uint16", "uint32"]),
)
def test_round_trip(tmp_path_factory: pytest.TempPathFactory, documents: list[list[int]], dtype: str) -> None:
    path = tmp_path_factory.mktemp("tokens") / "a.bin"
    write_tokens(path, (np.array(document, dtype=np.int64) for document in documents), dtype)
    assert sorted(each.name for each in path.parent.iterdir()) == ["a.bin", "a.idx"]
    full = [document for document in documents if document]
    if not full:
        with pytest.raises(DataError, match=f"0 tokens, {len(documents)} empty documents"):
            opened(path, 2**16, dtype)
        return
    found = opened(path, 2**16, dtype)
    assert found.lengths.tolist() == [len(document) for document in full]
    assert found.tokens.tolist() == list(chain.from_iterable(full))
    assert found.skipped_empty == len(documents) - len(full)
    assert not found.tokens.flags.writeable


def test_max_documents(written: Path) -> None:
    some = opened(written, limit=2)
    assert some.tokens.tolist() == [1, 2, 3, 4]
    assert some.skipped_empty == 1
    assert some.origin(1) == f"{written}, document 2"
    assert some.fingerprint != opened(written).fingerprint
    assert opened(written, limit=9).fingerprint == opened(written).fingerprint


def test_ids_outside_the_vocabulary_are_named(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "CHUNK", 3)
    opened(written, 9)
    message = r"a\.bin, document 3, token 2 of it: id 7 is outside the vocabulary of 7 \(valid: 0 to 6\).* 8 or"
    with pytest.raises(DataError, match=message):
        opened(written, 7)
    packing = Packing(opened(written, 7, verify=False), 8, 0)
    with pytest.raises(DataError, match=message):  # what the start left out is still checked per sample
        packing.sample(0)


@pytest.mark.parametrize("position", range(8))
def test_an_injected_id_is_named(written: Path, position: int) -> None:
    raw = np.fromfile(written, dtype="<u2")
    raw[position] = 40_000
    raw.tofile(written)
    document, start = [(0, 0), (2, 3), (3, 4)][np.searchsorted([3, 4], position, side="right")]
    with pytest.raises(DataError, match=f"document {document}, token {position - start} of it: id 40000"):
        opened(written)
    packing = Packing(opened(written, verify=False), 1, 0)
    with pytest.raises(DataError, match="id 40000"):  # as the last label it comes from the next sample
        [packing.sample(index) for index in range(8)]


def put(at: int, new: bytes) -> Callable[[bytes], bytes]:
    return lambda old: old[:at] + new + old[at + len(new) :]


@pytest.mark.parametrize(
    ("suffix", "damage", "message"),
    [
        (".bin", lambda old: old[:-2], r"a\.bin holds 7 tokens of uint16, its \.idx ends at 8"),
        (".bin", lambda old: old + b"\0\0", r"holds 9 tokens of uint16, its \.idx ends at 8"),
        (".bin", lambda old: old[:-1], r"15 bytes is not a multiple of the 2 bytes"),
        (".bin", lambda _: b"", r"holds 0 tokens of uint16, its \.idx ends at 8"),
        (".bin", put(0, b"\x02"), r"SHA-256.*changed or damaged"),
        (".idx", put(0, b"\x1b"), r"104 bytes that begin with b'\\x1bCTXIDX1'.*begins with b'LCTXIDX1'"),
        (".idx", lambda old: old[:50], r"50 bytes.*at least 56"),
        (".idx", put(8, b"\x04"), r"4 bytes per token.*uint16 has 2; set data.token_dtype=uint32"),
        (".idx", put(8, b"\x03"), r"3 bytes per token.*damaged"),
        (".idx", put(12, b"\x01"), r"reserved field 1.*damaged"),
        (".idx", put(16, b"\xff" * 8), r"104 bytes, but 18446744073709551615 documents make"),
        (".idx", lambda old: old[:-8], r"96 bytes, but 5 documents make 104"),
        (".idx", lambda old: old + b"\0", r"105 bytes, but 5 documents make 104"),
        (".idx", put(24, b"\0" * 8), r"SHA-256.*changed or damaged"),
        (".idx", put(56, b"\x01"), r"the first offset is 1 \(byte 56\); it must be 0"),
        (".idx", put(64, b"\x07"), r"document 1 runs from 7 to 3 \(byte 64\)"),
        (".idx", put(71, b"\x80"), r"document 0 runs from 0 to -"),
        (".idx", put(96, b"\x09"), r"holds 8 tokens of uint16, its \.idx ends at 9"),
        (".idx", put(64, b"\x02"), r"SHA-256.*changed or damaged"),
    ],
)
def test_damage_is_named(written: Path, suffix: str, damage: Callable[[bytes], bytes], message: str) -> None:
    path = written.with_suffix(suffix)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=message) as refusal:
        opened(written)
    assert str(written.with_suffix("")) in str(refusal.value)
    assert str(refusal.value).isprintable()


def test_random_damage_gives_a_typed_error(written: Path) -> None:
    originals = {suffix: written.with_suffix(suffix).read_bytes() for suffix in (".bin", ".idx")}
    rng = random.Random(0)
    for number in range(600):
        suffix = rng.choice(list(originals))
        old = bytearray(originals[suffix])
        start = rng.randrange(len(old) + 1)
        stop = min(len(old), start + rng.choice([0, 1, 8]))
        old[start:stop] = rng.randbytes(rng.choice([0, 1, stop - start, 8, 64]))
        path = written.with_suffix(suffix)
        path.write_bytes(old)
        if bytes(old) != originals[suffix]:
            with pytest.raises(DataError) as refusal:
                opened(written, rng.choice([9, 2**16]), rng.choice(["uint16", "uint32"]))
            assert str(refusal.value).isprintable(), number
        path.write_bytes(originals[suffix])
    assert opened(written).total_tokens == 8


def test_the_wrong_dtype_is_refused(written: Path) -> None:
    with pytest.raises(DataError, match=r"2 bytes per token.*uint32 has 4; set data.token_dtype=uint16"):
        opened(written, dtype="uint32")
    with pytest.raises(ConfigError, match=r"data.token_dtype='int8'.*uint16 or uint32"):
        opened(written, dtype="int8")


def test_the_path_is_a_bin_file_with_its_idx(written: Path) -> None:
    with pytest.raises(ConfigError, match=r"data.path=.*a token file ends in \.bin"):
        opened(written.with_suffix(".idx"))
    with pytest.raises(ConfigError, match=r"a token file ends in \.bin"):
        write_tokens(written.with_suffix(".txt"), [])
    written.with_suffix(".idx").unlink()
    with pytest.raises(DataError, match=r"cannot read .*a\.idx: No such file"):
        opened(written)


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ([1, -1], r"document 1, token 1: id -1 does not fit uint16 \(0 to 65535\)"),
        ([65536], r"document 1, token 0: id 65536 does not fit uint16"),
        ([1.5], r"document 1: float64 of shape \(1,\); it must be a row of integer ids"),
        ([[1]], r"document 1: int64 of shape \(1, 1\)"),
        (b"text", r"document 1: \|S4 of shape \(\)"),
    ],
)
def test_what_cannot_be_written_is_refused_and_leaves_the_old_files(written: Path, document: Any, message: str) -> None:
    before = opened(written).fingerprint
    with pytest.raises(DataError, match=message):
        write_tokens(written, [[9], document])
    assert opened(written).fingerprint == before
    assert len(list(written.parent.iterdir())) == 2


def test_a_full_disk_is_a_storage_error(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    before = opened(written).fingerprint
    monkeypatch.setattr(tokens.os, "fsync", full)
    with pytest.raises(StorageError, match=r"cannot write .*No space left on device"):
        write_tokens(written, [[1]])
    assert opened(written).fingerprint == before
    assert len(list(written.parent.iterdir())) == 2
    with pytest.raises(StorageError, match=r"cannot write .*nowhere"):
        write_tokens(written.parent / "nowhere" / "a.bin", [])


def test_a_mix_of_an_old_and_a_new_pair_is_refused(written: Path) -> None:
    old = written.with_suffix(".idx").read_bytes()
    write_tokens(written, [[3, 2, 1], [], [4], [5, 6, 7, 8], []])
    written.with_suffix(".idx").write_bytes(old)
    with pytest.raises(LongctxError, match="SHA-256"):
        opened(written)
