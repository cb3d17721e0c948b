"""What Megatron, datatrove and OLMo each say in files of their own beside the tokens: checked field by field."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest

from longctx.data.packing import Packing
from longctx.errors import ConfigError, DataError
from longctx.sequence import IGNORE
from tests.data.formats.writers import (
    DOCUMENTS,
    FORMATS,
    documents_of,
    write_datatrove,
    write_megatron,
    write_olmo,
)


def test_a_document_of_megatron_may_have_several_sequences(tmp_path: Path) -> None:
    documents = [[[1, 2], [3]], [], [[4]], [[], [5, 6], [7]], [[]]]
    path = write_megatron(tmp_path / "a_text_document", documents)
    found = FORMATS[0].open(path)
    assert documents_of(found) == [[1, 2, 3], [4], [5, 6, 7]]
    assert found.skipped_empty == 2
    assert found.origin(2) == f"{path}.bin, document 3"
    with_modes = write_megatron(tmp_path / "b", documents, modes=[0] * 7)
    assert documents_of(FORMATS[0].open(with_modes)) == documents_of(found)
    with pytest.raises(DataError, match=r"b\.idx, byte 168: sequence 2 is of kind 1, no text"):
        FORMATS[0].open(write_megatron(tmp_path / "b", documents, modes=[0, 0, 1, 0, 0, 0, 0]))
    assert documents_of(FORMATS[0].open(f"{tmp_path}/*_document")) == documents_of(found)


def test_signed_ids_of_megatron(tmp_path: Path) -> None:
    for dtype in ("int8", "int16", "int32", "int64"):
        path = write_megatron(tmp_path / dtype, [[[1, -2, 3]]], dtype)
        with pytest.raises(DataError, match=r"document 0, token 1 of it: id -2 is outside the vocabulary"):
            FORMATS[0].open(path, vocab_size=100)
        packing = Packing(FORMATS[0].open(path, vocab_size=100, verify=False), 3, 0)
        with pytest.raises(DataError, match="id -2"):
            packing.sample(0)
    path = write_megatron(tmp_path / "float", [[[1, 2]]], "float32")
    with pytest.raises(DataError, match=r"float\.idx, byte 17: type 7 is float32, which holds no ids"):
        FORMATS[0].open(path)
    with pytest.raises(ConfigError, match=rf"nearest valid value: {path}$"):
        FORMATS[0].open(f"{path}.bin")


def put(old: bytes, at: int, kind: str, *values: int) -> bytes:
    new = struct.pack(f"<{kind}", *values)
    return old[:at] + new + old[at + len(new) :]


@pytest.mark.parametrize(
    ("at", "kind", "value", "message"),
    [
        (0, "B", 0, r"byte 0: \d+ bytes that begin with"),
        (9, "Q", 2, "byte 9: version 2; only version 1"),
        (17, "B", 9, "byte 17: type 9 is unknown"),
        (17, "B", 5, r"11 tokens|not a multiple|begins at byte"),
        (18, "Q", 2**60, r"4 sequences|sequences \(byte 18\)"),
        (26, "Q", 0, "bytes, but"),
        (34, "i", -1, "byte 34: sequence 0 has -1 tokens"),
        (34, "i", 2, r"byte 66: sequence 1 begins at byte 4, but those before it end at 8"),
        (58, "q", 4, r"byte 58: sequence 0 begins at byte 4, but those before it end at 0"),
        (106, "q", 1, "byte 106: documents begin at sequence 1; it must be 0"),
        (114, "q", 7, r"document 1 runs from 7 to 2 \(byte 114\)"),
        (154, "q", 5, "byte 154: documents end at sequence 5, and there are 6; the tokens of the others would be lost"),
        (154, "q", 7, "byte 154: a document ends at sequence 7, of 6"),
    ],
)
def test_an_index_of_megatron_is_checked_field_by_field(
    tmp_path: Path, at: int, kind: str, value: int, message: str
) -> None:
    path = write_megatron(tmp_path / "a", [[one] for one in DOCUMENTS])
    index = tmp_path / "a.idx"
    index.write_bytes(put(index.read_bytes(), at, kind, value))
    with pytest.raises(DataError, match=message) as refusal:
        FORMATS[0].open(path)
    assert str(tmp_path / "a.") in str(refusal.value)


def test_the_metadata_of_datatrove_must_agree(tmp_path: Path) -> None:
    path = write_datatrove(tmp_path / "a.ds", DOCUMENTS)
    with pytest.raises(DataError, match="22 bytes is not a multiple of the 4 bytes of a token"):
        FORMATS[1].open(path, "uint32")
    place = tmp_path / "a.ds.metadata"
    for text, message in {
        "a/b|4\n11\n": "byte 0: .* says '4' bytes per token, .*set data.token_dtype=uint32",
        "a/b|2\n12\n": "byte 6: says '12' tokens, and the file has 11",
        "a|b|8": "it has 2 or 4",
    }.items():
        place.write_text(text)
        with pytest.raises(DataError, match=message):
            FORMATS[1].open(path)
    for text in ("gpt2\n11\n11 T", "gpt2", "", "other|2\n11"):
        place.write_text(text)
        assert FORMATS[1].open(path).total_tokens == 11


# Tokens of DOCUMENTS with their labels, where the loss file of the test leaves out 0s.
LABELS = {(1, 2), (250, 7), (9, 9)} | {(token, IGNORE) for token in (5, 1, 2, 3, 7, 9)}


def test_what_a_loss_file_leaves_out_is_no_label(tmp_path: Path) -> None:
    path = Path(write_datatrove(tmp_path / "b.ds", DOCUMENTS))
    write_datatrove(tmp_path / "a.ds", [[8, 8]])
    plain = FORMATS[1].open(str(path)).fingerprint
    (tmp_path / "b.ds.loss").write_bytes(bytes([1, 0, 1, 0, 1, 1, 0, 0, 1, 1, 0]))
    found = FORMATS[1].open(str(path))
    assert found.fingerprint != plain
    for seq_len in (1, 3, 11):
        packing = Packing(found, seq_len, 3)
        met = set()
        for index in range(11):
            tokens, labels, _ = packing.sample(index)
            met |= set(zip(tokens.tolist(), labels.tolist(), strict=True))
        assert met == LABELS
    whole = FORMATS[1].open(str(tmp_path))  # of which one has a mask and one has none
    assert whole.learned is not None
    assert whole.learned(0, 13).tolist() == [True] * 2 + [bool(one) for one in (1, 0, 1, 0, 1, 1, 0, 0, 1, 1, 0)]
    (tmp_path / "b.ds.loss").write_bytes(bytes([1] * 5 + [2] + [1] * 5))
    with pytest.raises(DataError, match=r"b\.ds\.loss, byte 5: 2, of .*document 3, token 1"):
        FORMATS[1].open(str(path))
    (tmp_path / "b.ds.loss").write_bytes(bytes(10))
    with pytest.raises(DataError, match="10 bytes for 11 tokens"):
        FORMATS[1].open(str(path))


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("0,5\n5,10\n", "ends at token 10, and .* holds 11"),
        ("0,5\n6,11\n", "line 2: a document from 6 to 11; the one before it ends at 5"),
        ("0,5\n5,12\n", "line 2: a document from 5 to 12"),
        ("0,7\n7,5\n5,11\n", "line 2: a document from 7 to 5"),
        ("1,11\n", "line 1: a document from 1 to 11"),
        ("start,end\n0,11\n", "line 1: b'start,end'; a line begins with start,end in tokens"),
        ("0,5\n\n5,11\n", "line 2: b''"),
        ("0,5\n5 ,11", "line 2"),
        ("0,5\n5,1_1\n", "line 2"),
        ("0\n", "line 1"),
        ("0," + "1" * 19, "line 1"),
        ("", "ends at token 0"),
        ("0,0\n" * 5000 + "0,11", "line 1: more documents than the 11 tokens"),
        ("0" * (3 << 20), "longer than 1048576 bytes"),
    ],
)
def test_a_table_of_olmo_covers_its_file(tmp_path: Path, table: str, message: str) -> None:
    path = write_olmo(tmp_path / "a.npy", [[1] * 11])
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress(table.encode()))
    with pytest.raises(DataError, match=message) as refusal:
        FORMATS[2].open(path)
    assert str(tmp_path / "a.csv.gz") in str(refusal.value)


def test_boundaries_of_olmo_are_never_guessed(tmp_path: Path) -> None:
    path = write_olmo(tmp_path / "a.npy", [[1, 0], [2, 0]], more="")
    assert documents_of(FORMATS[2].open(path)) == [[1, 0], [2, 0]]
    (tmp_path / "a.csv.gz").unlink()
    with pytest.raises(DataError, match=r"a\.csv\.gz: No such file"):
        FORMATS[2].open(path)
    np.save(tmp_path / "b.npy", np.arange(4, dtype=np.uint16))
    with pytest.raises(DataError, match=r"b\.npy, byte 0: begins with the header of numpy.save"):
        FORMATS[2].open(str(tmp_path / "b.npy"))
