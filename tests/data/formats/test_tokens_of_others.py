"""Corpora of ids as other programs write them: read back equal, and nothing damaged is read as something else."""

from __future__ import annotations

import gzip
import json
import os
import random
import subprocess
import sys
from itertools import chain, pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longctx.config import DataConfig
from longctx.data import Corpus, open_corpus, verdicts, write_tokens
from longctx.data.checked import check_corpus
from longctx.data.formats import joined, numbers, raw
from longctx.data.packing import Packing
from longctx.errors import ConfigError, DataError
from tests.data.formats.writers import (
    DOCUMENTS,
    FORMATS,
    Format,
    documents_of,
    write_olmo,
)

each = pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)


@each
@settings(max_examples=25, deadline=None)
@given(documents=st.lists(st.lists(st.integers(0, 255), max_size=6), max_size=8), choice=st.integers(0, 3))
def test_round_trip(
    tmp_path_factory: pytest.TempPathFactory, form: Format, documents: list[list[int]], choice: int
) -> None:
    dtype = form.dtypes[choice % len(form.dtypes)]
    path = form.written(tmp_path_factory.mktemp("data"), "a", documents, dtype)
    full = [one for one in documents if one]
    if not full:
        with pytest.raises(DataError, match=f"0 tokens, {len(documents)} empty documents"):
            form.open(path, dtype)
        return
    found = form.open(path, dtype)
    assert documents_of(found) == full
    assert np.asarray(found.tokens).tolist() == list(chain.from_iterable(full))
    assert found.skipped_empty == len(documents) - len(full)


@each
def test_many_files_are_one_corpus_in_the_order_of_their_names(tmp_path: Path, form: Format) -> None:
    parts = {"b": [[1, 2], []], "a/z": [[], [3]], "a/b/c": [], "c": [[4, 5, 6], [7]], ".hidden": [[8]]}
    for stem, documents in parts.items():
        form.written(tmp_path, stem, documents)
    (tmp_path / "notes.txt").write_text("of the corpus")
    (tmp_path / "a" / "loop").symlink_to(tmp_path)
    wanted = [[3], [1, 2], [4, 5, 6], [7]]
    whole = form.open(str(tmp_path))
    assert documents_of(whole) == wanted
    assert whole.read(1, 6).tolist() == [1, 2, 4, 5, 6]
    assert whole.skipped_empty == 2
    assert [Path(whole.origin(i).partition(",")[0]).stem for i in range(4)] == ["z", "b", "c", "c"]
    assert whole.locate(5) == whole.origin(2) + ", token 2 of it"
    for pattern, some in {"?*": [[1, 2], [4, 5, 6], [7]], "**/[cz]*": [[3], [4, 5, 6], [7]], "a/*": [[3]]}.items():
        assert documents_of(form.open(f"{tmp_path}/{pattern}{form.end}")) == some
    assert documents_of(form.open(str(tmp_path), settings={"files": "a/* c*"})) == [[3], [4, 5, 6], [7]]
    for limit in range(1, 5):
        some = form.open(str(tmp_path), settings={"max_documents": limit})
        assert documents_of(some) == wanted[:limit] and len(some.tokens) == sum(map(len, wanted[:limit]))
        assert some.tokens[1:].tolist() == list(chain.from_iterable(wanted[:limit]))[1:]
    with pytest.raises(DataError, match="fits the pattern"):
        form.open(f"{tmp_path}/nothing-*")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"holds no \."):
        form.open(str(tmp_path / "empty"))


@each
def test_ids_outside_the_vocabulary_are_named_with_file_and_byte(tmp_path: Path, form: Format) -> None:
    path = form.written(tmp_path, "a", DOCUMENTS)
    form.open(path, vocab_size=251)
    size = np.dtype(form.dtypes[0]).itemsize
    with pytest.raises(DataError, match=rf"a\.\w+, document 3, token 0 of it: id 250 is outside .* byte {4 * size}$"):
        form.open(path, vocab_size=250)
    packing = Packing(form.open(path, vocab_size=250, verify=False), 1, 0)
    with pytest.raises(DataError, match="document 3, token 0 of it: id 250"):
        [packing.sample(index) for index in range(11)]


def attempt(form: Format, path: str) -> tuple[Corpus | None, str]:
    """Opens a corpus, or returns what is said against it."""
    try:
        return form.open(path, vocab_size=300), ""
    except DataError as error:
        return None, str(error)


@each
def test_damage_is_an_error_or_read_as_it_stands(tmp_path: Path, form: Format) -> None:
    """Where a change makes other files that obey the description, they are read by it: no token is lost."""
    path, paths = form.written(tmp_path, "a", DOCUMENTS), form.paths(tmp_path, "a")
    originals = {one: one.read_bytes() for one in paths}
    rng, refused, read = random.Random(form.name), 0, 0
    for number in range(250):
        place = rng.choice(paths)
        old = bytearray(originals[place])
        start = rng.randrange(len(old) + 1)
        stop = min(len(old), start + rng.choice([0, 1, 2, 8]))
        old[start:stop] = rng.randbytes(rng.choice([0, stop - start, stop - start, 1, 8]))
        place.write_bytes(old)
        found, message = attempt(form, path)
        if found is None:
            refused += 1
            assert str(tmp_path / "a") in message and message.isprintable(), number
        else:
            read += 1
            reference = form.read(Path(path))
            assert documents_of(found) == [one for one in reference if one], number
            assert all(0 <= one < 300 for one in chain.from_iterable(reference))
            assert found.total_tokens * found.tokens.dtype.itemsize == paths[0].stat().st_size
        place.write_bytes(originals[place])
    assert refused > 125 and read > 5


@each
def test_a_file_that_is_missing_cut_or_a_pipe_is_named(tmp_path: Path, form: Format) -> None:
    path, paths = form.written(tmp_path, "a", [list(range(200))] * 40), form.paths(tmp_path, "a")
    corpus = form.open(path)
    fingerprint = corpus.fingerprint
    packing = Packing(corpus, 50, 0)
    os.truncate(paths[0], 16)
    os.truncate(paths[1], 4)
    with pytest.raises(DataError, match=r"ends at byte \d+, and had \d+ bytes when it was opened: it was cut"):
        [packing.sample(index) for index in range(160)]
    assert corpus.fingerprint == fingerprint
    for one in paths:
        form.written(tmp_path, "a", DOCUMENTS)
        one.unlink()
        with pytest.raises(DataError, match=r"cannot read|holds no"):
            form.open(path)
        os.mkfifo(one)
        with pytest.raises(DataError, match="not a regular file"):
            form.open(path)
        one.unlink()


@each
def test_what_was_found_is_remembered_and_another_token_or_boundary_is_another_corpus(
    tmp_path: Path, form: Format, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verdicts, "TICK", -1000.0)
    passes = []
    read_through = joined.read_through
    monkeypatch.setattr(joined, "read_through", lambda *rest: (passes.append(1), read_through(*rest))[1])
    config = {"token_dtype": form.dtypes[0]} if form.reads_dtype else {}

    def checked(documents: list[list[int]], stem: str = "data") -> Corpus:
        path = form.written(tmp_path / stem, "a", documents)
        return check_corpus(DataConfig(source=form.name, path=path, **config), 300, cache=tmp_path / "cache")

    first = checked(DOCUMENTS)
    assert len(passes) == 1
    found = [check_corpus(DataConfig(source=form.name, path=first.source, **config), 300, cache=tmp_path / "cache")]
    assert len(passes) == 1 and found[0].fingerprint == first.fingerprint
    others = [[[5], [1, 2, 3], [250, 8], [9, 9, 9, 9, 1]], [[5, 1], [2, 3], [250, 7], [9, 9, 9, 9, 1]]]
    prints = {first.fingerprint, *(checked(one, f"other-{n}").fingerprint for n, one in enumerate(others))}
    assert len(prints) == 3
    assert form.open(first.source, verify=False).fingerprint == first.fingerprint


def open_files() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


@each
def test_more_files_than_a_process_holds_open(tmp_path: Path, form: Format, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(raw, "MOST_OPEN", 3)
    for number in range(9):
        form.written(tmp_path, f"{number}", [[number, number + 1]])
    before = open_files()
    corpus = form.open(str(tmp_path))
    assert open_files() <= before + 4
    assert documents_of(corpus) == [[number, number + 1] for number in range(9)]
    replaced = form.paths(tmp_path, "0")[0]
    replaced.rename(tmp_path / "old")
    replaced.write_bytes(b"x")
    with pytest.raises(DataError, match=r"was replaced while the run reads it"):
        corpus.read(0, 2)


@each
def test_boundaries_that_memory_should_not_hold(tmp_path: Path, form: Format, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numbers, "MOST_IN_MEMORY", 7)
    monkeypatch.setattr(numbers, "BLOCK", 3)
    documents = [[n % 200] * (n % 5) for n in range(60)]
    found = form.open(form.written(tmp_path, "a", documents))
    assert documents_of(found) == [one for one in documents if one]
    assert found.origin(len(found) - 1).endswith(" 59")


def test_tokens_that_no_index_knows_are_refused(tmp_path: Path) -> None:
    for form in FORMATS:
        path = form.written(tmp_path, form.name, DOCUMENTS)
        with form.paths(tmp_path, form.name)[0].open("ab") as file:
            file.write(b"\0" * 8)
        with pytest.raises(DataError, match=r"1[35] tokens.*must agree|holds 1[35]; the two must agree"):
            form.open(path)


def test_boundaries_are_kept_and_never_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verdicts, "TICK", -1000.0)
    path = write_olmo(tmp_path / "a.npy", DOCUMENTS)
    config, cache = DataConfig(source="olmo", path=path), tmp_path / "cache"
    first = check_corpus(config, 300, cache=cache)
    [kept] = (cache / "offsets").iterdir()
    for damage in (None, b"", kept.read_bytes()[:-8], b"\0" * kept.stat().st_size, kept.read_bytes() + b"x"):
        if damage is not None:
            kept.write_bytes(damage)
        assert documents_of(check_corpus(config, 300, cache=cache)) == documents_of(first)
    write_olmo(tmp_path / "a.npy", [[5, 1], *DOCUMENTS])
    assert check_corpus(config, 300, cache=cache).total_tokens == 13


def test_token_files_of_a_folder_are_one_corpus(tmp_path: Path) -> None:
    for name, documents in {"b": [[3], []], "a": [[1, 2]]}.items():
        write_tokens(tmp_path / f"{name}.bin", documents)
    found = open_corpus(DataConfig(source="tokens", path=str(tmp_path)), 10)
    assert documents_of(found) == [[1, 2], [3]]
    single = open_corpus(DataConfig(source="tokens", path=f"{tmp_path}/a*.bin"), 10)
    assert single.fingerprint == open_corpus(DataConfig(source="tokens", path=str(tmp_path / "a.bin")), 10).fingerprint
    raw_bytes = bytearray((tmp_path / "b.bin").read_bytes())
    raw_bytes[0] ^= 1
    (tmp_path / "b.bin").write_bytes(raw_bytes)
    with pytest.raises(DataError, match=r"b\.bin: the content has SHA-256"):
        open_corpus(DataConfig(source="tokens", path=str(tmp_path)), 10)


LARGE = """
import json, pathlib, sys, time
from longctx.config import DataConfig
from longctx.data import open_corpus
from longctx.data.packing import Packing
def peak():  # of this program: getrusage tells that of the one that started it, too
    return int(pathlib.Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) >> 10
found, first = {}, peak()
for source, settings in json.loads(sys.argv[1]).items():
    start = time.monotonic()
    corpus = open_corpus(DataConfig(source=source, **settings), 300, verify=False)
    seconds = time.monotonic() - start
    packing = Packing(corpus, 65536, 0)
    for index in (0, 1, 10**9):
        assert packing.sample(index)[0].max() == 0
    found[source] = [peak() - first, seconds, corpus.total_tokens * corpus.tokens.dtype.itemsize]
print(json.dumps(found))
"""


def test_a_hundred_gigabytes_open_in_seconds_and_little_memory(tmp_path: Path) -> None:
    """The tokens are a hole in the file, and the boundaries are of twenty thousand documents."""
    count, total = 20_000, 10**11
    asked = {"tokens": {"path": str(tmp_path / "tokens.bin"), "token_dtype": "uint16"}}
    write_tokens(tmp_path / "tokens.bin", [[0]] * count)
    os.truncate(tmp_path / "tokens.bin", total)
    ends = np.arange(count + 1, dtype="<i8") * (total // 2 // count)
    index = tmp_path / "tokens.idx"
    index.write_bytes(index.read_bytes()[:56] + ends.tobytes())
    for form in FORMATS:
        path = form.written(tmp_path, form.name, [[0]] * count)
        asked[form.name] = {"path": path, **({"token_dtype": form.dtypes[0]} if form.reads_dtype else {})}
        tokens, index = form.paths(tmp_path, form.name)
        os.truncate(tokens, total)
        if form.name == "megatron":
            lengths, begins = np.full(count, total // 4 // count, dtype="<i4"), ends[:-1] * 2
            content = lengths.tobytes() + begins.tobytes() + np.arange(count + 1, dtype="<i8").tobytes()
            index.write_bytes(index.read_bytes()[:34] + content)
        elif form.name == "datatrove":
            index.write_bytes(ends[1:].tobytes())
            (tmp_path / "datatrove.ds.metadata").unlink()
        else:
            table = "".join(f"{one},{other}\n" for one, other in pairwise(ends.tolist()))
            index.write_bytes(gzip.compress(table.encode(), 1))
    command, root = [sys.executable, "-c", LARGE, json.dumps(asked)], Path(__file__).parents[3]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=root)
    for name, (mebibytes, seconds, size) in json.loads(done.stdout).items():
        assert size == total and mebibytes < 200 and seconds < 10, (name, done.stdout)


@each
def test_addresses_are_paths_of_this_machine_or_refused_by_name(tmp_path: Path, form: Format) -> None:
    path = form.written(tmp_path / "with space", "a", DOCUMENTS)
    assert form.open(Path(path).as_uri()).total_tokens == 11
    for address in ("s3://bucket/a", "memory://a", "hf://datasets/a", "https://user:secret@host/a", "file://host/a"):
        with pytest.raises(ConfigError, match="are not read; nearest valid choice: mount or copy") as refusal:
            form.open(address)
        assert "secret" not in str(refusal.value)
