"""Manifests that lie are refused, however well their hashes match."""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import math
import shutil
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longctx.checkpoint.checkpointer import Checkpointer
from longctx.checkpoint.files import FileRecord
from longctx.checkpoint.manifest import (
    Chunk,
    Commit,
    check_coverage,
    decode,
    decode_commit,
    decode_manifest,
    encode,
    encode_commit,
    encode_manifest,
    plain,
)
from longctx.errors import ConfigError, StorageError
from tests.checkpoint.checkpoint_run import digest, make, saved

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    directory = tmp_path_factory.mktemp("manifests") / "checkpoints"
    saved(directory, 1)
    return directory


@pytest.fixture
def forge(original, tmp_path):
    """Rewrites a JSON file of the checkpoint and makes the commit record agree with it."""
    shutil.copytree(original, tmp_path / "run")
    step = tmp_path / "run" / "step-1"

    def rewrite(name, change):
        data = change((step / name).read_bytes())
        (step / name).write_bytes(data)
        commit = decode_commit((step / "commit.json").read_bytes(), "", 1)
        commit.files[name] = FileRecord(hashlib.sha256(data).hexdigest(), len(data))
        (step / "commit.json").write_bytes(encode_commit(commit))
        state = make(None, seed=5)
        before = digest(state)
        try:
            Checkpointer(tmp_path / "run").load(state)
        finally:
            found = digest(state)
            assert all(torch.equal(before.weights[key], found.weights[key]) for key in before.weights)
            assert found.optimizer == {}

    return rewrite


def edited(change):
    """A change of the parsed value, written back in the one accepted form."""

    def apply(data):
        value = json.loads(data)
        change(value)
        return encode(value)

    return apply


def first(change):
    """A change of the largest shard in the manifest."""
    return edited(lambda value: change(max(value["chunks"], key=lambda chunk: chunk["bytes"])))


MANIFESTS = {
    "a path for a name": first(lambda c: c.update(name="model/../../etc/passwd")),
    "a name that climbs": first(lambda c: c.update(name="model...weight")),
    "a backslash": first(lambda c: c.update(name="model\\weight")),
    "a NUL": first(lambda c: c.update(name="model\0weight")),
    "an empty name": first(lambda c: c.update(name="")),
    "a long name": first(lambda c: c.update(name="x" * 100_000)),
    "a name that is a number": first(lambda c: c.update(name=7)),
    "an unknown dtype": first(lambda c: c.update(dtype="object")),
    "a list for a dtype": first(lambda c: c.update(dtype=["F32"])),
    "a wider dtype": first(lambda c: c.update(dtype="F64")),
    "a huge shape": first(lambda c: c.update(shape=[1 << 40, 1 << 40])),
    "a shape beyond 64 bits": first(lambda c: c.update(shape=[1 << 80, 6])),
    "a huge shard": first(lambda c: c.update(shape=[1 << 40, 6], sizes=[1 << 40, 6])),
    "a shape that overflows to the right size": first(lambda c: c.update(shape=[1 << 32, 1 << 32], sizes=[0, 0])),
    "a negative size": first(lambda c: c.update(sizes=[-13, -6])),
    "a negative offset": first(lambda c: c.update(offsets=[-1, 0])),
    "a fraction": first(lambda c: c.update(start=8.0)),
    "a truth value": first(lambda c: c.update(start=True)),
    "an offset outside": first(lambda c: c.update(offsets=[1, 0])),
    "bytes before the file": first(lambda c: c.update(start=-8)),
    "bytes behind the file": first(lambda c: c.update(start=1 << 30)),
    "bytes across the end": first(lambda c: c.update(start=c["start"] + 4000)),
    "another shard's bytes": first(lambda c: c.update(start=c["start"] - 4)),
    "fewer dimensions": first(lambda c: c.update(shape=[78], offsets=[0])),
    "too many dimensions": first(lambda c: c.update(shape=[1] * 99, sizes=[1] * 99, offsets=[0] * 99)),
    "no dimensions": first(lambda c: c.update(shape=None)),
    "an unknown key": first(lambda c: c.update(file="../../../etc/passwd")),
    "a missing key": first(lambda c: c.pop("offsets")),
    "a shard twice": edited(lambda v: v["chunks"].append(copy.deepcopy(v["chunks"][0]))),
    "a shard twice elsewhere": edited(lambda v: v["chunks"].append({**v["chunks"][0], "start": 0})),
    "a missing shard": edited(lambda v: v["chunks"].pop()),
    "no shards": edited(lambda v: v.update(chunks=[])),
    "no list": edited(lambda v: v.update(chunks={})),
    "another rank": edited(lambda v: v.update(rank=1)),
    "another version": edited(lambda v: v.update(version=2)),
    "a list": lambda data: b"[]",
    "nothing": lambda data: b"",
    "no UTF-8": lambda data: b"\xff\xfe" + data,
    "trailing bytes": lambda data: data + b" ",
    "a duplicate key": lambda data: data.replace(b'"rank":0', b'"rank":0,"rank":0'),
    "not a number": lambda data: data.replace(b'"rank":0', b'"rank":NaN'),
    "another spelling": lambda data: data.replace(b'"rank":0', b'"rank":0.0e0'),
    "a number of a million digits": lambda data: data.replace(b'"rank":0', b'"rank":' + b"9" * 1_000_000),
    "deep nesting": lambda data: b"[" * 200_000 + b"]" * 200_000,
    "deeper than allowed": lambda data: b"[" * 40 + b"]" * 40,
}


@pytest.mark.parametrize("name", MANIFESTS)
def test_manifests_that_lie(forge, name):
    kind = ConfigError if name == "no shards" else StorageError
    with pytest.raises(kind, match=r"damaged|holds another model"):
        forge("rank-00000.json", MANIFESTS[name])


STATES = {
    "another step": edited(lambda v: v.update(step=2)),
    "a missing part": edited(lambda v: v.pop("scheduler")),
    "an unknown part": edited(lambda v: v.update(code="print()")),
    "no optimizer": edited(lambda v: v.update(optimizer=None)),
    "groups of numbers": edited(lambda v: v["optimizer"].update(groups=[1, 2])),
    "unknown parameters": edited(lambda v: v["optimizer"]["state"].update(nobody={"step": None})),
    "options of another type": edited(lambda v: v["optimizer"]["groups"][0].update(options=[])),
    "missing tensors": edited(lambda v: v["optimizer"]["state"]["gain"].update(extra=None)),
    "deep nesting": lambda data: b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
    "a scheduler without its keys": edited(lambda v: v.update(scheduler=[1])),
    "a loader without its keys": edited(lambda v: v.update(loader={})),
}


@pytest.mark.parametrize("name", STATES)
def test_states_that_lie(forge, name):
    with pytest.raises(StorageError, match=r"damaged|does not fit"):
        forge("state.json", STATES[name])


def commit_of(world=1):
    names = ["state.json"]
    names += [f"rank-{rank:05d}.{kind}" for rank in range(world) for kind in ("json", "safetensors")]
    return Commit(4, world, {name: FileRecord("0" * 64, 5) for name in names})


@pytest.mark.parametrize(
    "change",
    [
        lambda r: r.update(step=5),
        lambda r: r.update(step=True),
        lambda r: r.update(world=2),
        lambda r: r.update(world=0),
        lambda r: r.update(world=1 << 60),
        lambda r: r.update(version=9),
        lambda r: r["files"].update({"../../etc/passwd": {"sha256": "0" * 64, "bytes": 5}}),
        lambda r: r["files"].pop("state.json"),
        lambda r: r["files"]["state.json"].update(sha256="0" * 63 + "G"),
        lambda r: r["files"]["state.json"].update(sha256=None),
        lambda r: r["files"]["state.json"].update(bytes=-1),
        lambda r: r["files"].update({"state.json": None}),
    ],
)
def test_commit_records_that_lie(change):
    assert decode_commit(encode_commit(commit_of()), "commit.json", 4) == commit_of()
    record = json.loads(encode_commit(commit_of()))["record"]
    change(record)
    data = encode({"record": record, "sha256": hashlib.sha256(encode(record)).hexdigest()})
    with pytest.raises(StorageError, match=r"commit\.json"):
        decode_commit(data, "commit.json", 4)


@given(JSON)
def test_plain_values_survive(value):
    assert decode(encode(value), "here") == plain(value, "here") == value


@given(st.data())
@settings(max_examples=300)
def test_any_change_of_a_byte_in_a_record_is_noticed(data):
    whole = encode_commit(commit_of(2))
    place = data.draw(st.integers(0, len(whole) - 1))
    value = data.draw(st.integers(0, 255).filter(lambda v: v != whole[place]))
    with pytest.raises(StorageError):
        decode_commit(whole[:place] + bytes([value]) + whole[place + 1 :], "commit.json", 4)


@given(st.binary(max_size=200) | JSON.map(encode))
def test_anything_else_is_refused_without_another_error(data):
    for read in (lambda: decode_commit(data, "x", 1), lambda: decode_manifest(data, "x", 0, 100)):
        with pytest.raises(StorageError):
            read()


@st.composite
def tilings(draw):
    """A tensor cut along each dimension; one shard per cell."""
    dims = draw(st.integers(1, 3))
    borders = []
    for _ in range(dims):
        size = draw(st.integers(1, 12))
        cuts = draw(st.sets(st.integers(1, size), max_size=3)) | {0, size}
        borders.append(sorted(cuts))
    shape = tuple(border[-1] for border in borders)
    cells = itertools.product(*(list(itertools.pairwise(border)) for border in borders))
    chunks = []
    for cell in cells:
        sizes = tuple(high - low for low, high in cell)
        size = math.prod(sizes)
        chunks.append(Chunk("w", "U8", shape, tuple(low for low, _ in cell), sizes, 0, size))
    return draw(st.permutations(chunks))


@given(tilings(), st.data())
def test_exact_covers_and_nothing_else(chunks, data):
    check_coverage(chunks, "here")
    victim = data.draw(st.sampled_from(range(len(chunks))))
    chunk = chunks[victim]
    with pytest.raises(StorageError, match="elements, its shards hold"):
        check_coverage([*chunks, chunk], "here")
    if len(chunks) > 1:
        with pytest.raises(StorageError):
            check_coverage(chunks[:victim] + chunks[victim + 1 :], "here")
    other = data.draw(st.sampled_from(range(len(chunks))))
    if chunks[other].sizes == chunk.sizes and other != victim:
        # As many elements as before, one place covered twice and one not at all.
        moved = [replace(c, offsets=chunks[other].offsets) if c is chunk else c for c in chunks]
        with pytest.raises(StorageError, match="overlap or leave gaps"):
            check_coverage(moved, "here")


def test_manifests_are_what_was_written():
    chunks = [Chunk("a.b", "BF16", (4, 2), (2, 0), (2, 2), 8, 8), Chunk("s", "I64", (), (), (), 16, 8)]
    data = encode_manifest(3, chunks)
    assert decode_manifest(data, "m", 3, 24) == chunks
    with pytest.raises(StorageError, match="no integer from 0"):
        decode_manifest(data, "m", 3, 23)


def test_a_scattered_tensor_costs_no_memory():
    """4,000 shards with borders of their own would span a grid of 16 million cells."""
    chunks = [Chunk("w", "U8", (8000, 8000), (2 * i, 2 * i), (1, 1), i, 1) for i in range(3999)]
    rest = 8000 * 8000 - len(chunks)
    chunks.append(Chunk("w", "U8", (8000, 8000), (0, 0), (1, rest), 0, rest))
    with pytest.raises(StorageError, match="overlap or leave gaps"):
        check_coverage(chunks, "here")
