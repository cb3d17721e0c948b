"""Parquet and Arrow as their own libraries write them: text and ids, every type of column, and damage."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from longctx.config import DataConfig
from longctx.data import Corpus, open_corpus, verdicts
from longctx.data.checked import check_corpus
from longctx.data.formats import columns, kept
from longctx.errors import ConfigError, DataError
from tests.data.formats.writers import documents_of

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

TEXTS = ["Hello", "", None, "ü" * 50, "a", None, "line\nline", "z"]
IDS = [[5], [], None, [1, 2, 3], [300, 70_000], [0], [], [9] * 40]
FULL_TEXTS = [text.encode() for text in TEXTS if text]
FULL_IDS = [ids for ids in IDS if ids]
TEXT_TYPES = [
    pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.large_binary(),
    pa.dictionary(pa.int8(), pa.string()), pa.dictionary(pa.int32(), pa.large_string()),
]  # fmt: skip
ID_TYPES = [pa.list_(pa.int32()), pa.large_list(pa.int64()), pa.list_(pa.uint32()), pa.large_list(pa.uint64())]


def column(values: list[Any], kind: Any) -> Any:
    if pa.types.is_dictionary(kind):
        return pa.array(values, kind.value_type).dictionary_encode().cast(kind)
    if kind == pa.string_view():
        return pa.array(values, pa.string()).cast(kind)
    raw = pa.types.is_binary(kind) or pa.types.is_large_binary(kind)
    return pa.array([one.encode() if raw and one is not None else one for one in values], kind)


def write_parquet(path: Path, table: Any, **rest: Any) -> None:
    pq.write_table(table, path.with_suffix(".parquet"), **{"row_group_size": 3, **rest})


def write_stream(path: Path, table: Any, **rest: Any) -> None:
    with pa.ipc.new_stream(str(path.with_suffix(".arrow")), table.schema) as writer:
        writer.write_table(table, max_chunksize=3)


def write_file(path: Path, table: Any, **rest: Any) -> None:
    with pa.ipc.new_file(str(path.with_suffix(".arrow")), table.schema) as writer:
        writer.write_table(table, max_chunksize=3)


WRITERS = {"parquet": ("parquet", write_parquet), "stream": ("arrow", write_stream), "file": ("arrow", write_file)}
each = pytest.mark.parametrize("name", list(WRITERS))


def opened(source: str, path: Path, key: str = "text", vocab_size: int = 1 << 20, **rest: Any) -> Corpus:
    config = DataConfig(source=source, path=str(path), text_key=key, **rest)
    config.check()
    return check_corpus(config, vocab_size)


def texts(corpus: Corpus) -> list[bytes]:
    return [bytes(one) for one in documents_of(corpus)]


@each
def test_text_and_ids_of_every_type_of_column(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(columns, "WHOLE_BATCH", 64)
    source, write = WRITERS[name]
    for number, kind in enumerate(TEXT_TYPES):
        table = pa.table({"other": list(range(8)), "text": column(TEXTS, kind)})
        write(tmp_path / f"{number}", table)
    for number, kind in enumerate(ID_TYPES):
        write(tmp_path / f"ids-{number}", pa.table({"input_ids": pa.array(IDS, kind)}))
    for number, kind in enumerate(TEXT_TYPES):
        found = opened(source, tmp_path / f"{number}.{source}")
        assert texts(found) == FULL_TEXTS, kind
        assert found.skipped_empty == 3
        assert found.facts["noted"] == {columns.NULLS: 2}
        assert found.origin(3).endswith(", element 6")
    for number in range(len(ID_TYPES)):
        found = opened(source, tmp_path / f"ids-{number}.{source}", "input_ids")
        assert documents_of(found) == FULL_IDS
        assert found.skipped_empty == 3
        assert found.origin(1) == f"{tmp_path}/ids-{number}.{source}, row 3"
        with pytest.raises(DataError, match=rf"ids-{number}\.{source}, row 4, token 1 of it: id 70000 is outside"):
            opened(source, tmp_path / f"ids-{number}.{source}", "input_ids", vocab_size=70_000)
    fixed = pa.table({"ids": pa.array([[1, 2], None, [3, 4]], pa.list_(pa.int16(), 2))})
    write(tmp_path / "fixed", fixed)
    assert documents_of(opened(source, tmp_path / f"fixed.{source}", "ids")) == [[1, 2], [3, 4]]


@each
def test_many_files_nested_and_empty_are_one_corpus(tmp_path: Path, name: str) -> None:
    source, write = WRITERS[name]
    (tmp_path / "a").mkdir()
    for place, values in {"b": [[1], [2, 3]], "a/z": [[4, 5]], "c": [[]], "d": []}.items():
        write(tmp_path / place, pa.table({"ids": pa.array(values, pa.list_(pa.int32()))}))
    assert documents_of(opened(source, tmp_path, "ids")) == [[4, 5], [1], [2, 3]]
    assert documents_of(opened(source, tmp_path / f"[bc].{source}", "ids")) == [[1], [2, 3]]
    assert documents_of(opened(source, tmp_path, "ids", max_documents=2)) == [[4, 5], [1]]
    with pytest.raises(DataError, match="0 tokens"):
        opened(source, tmp_path / f"[cd].{source}", "ids")


@each
@pytest.mark.parametrize(
    ("values", "message"),
    [
        (pa.array(["a", "b\0c"]), "row 1: NUL at byte 1"),
        (pa.array([b"a", b"\xffb"]), "row 1: bad UTF-8 at byte 0"),
        (pa.array([[1], [2, -1]]), "row 1, token 1 of it: id -1 is no token"),
        (pa.array([[1], [2, 1 << 40]]), "row 1, token 1 of it: id 1099511627776 is no token"),
        (pa.array([[1], [2, None]]), "row 1, token 1 of it is null"),
        (pa.array([1.5, 2.5]), "is 'double'; text is a string"),
        (pa.array([["a"]]), r"is 'list<.*string>'; text is a string"),
        (pa.array([[[1]]]), "text is a string"),
    ],
)
def test_what_a_column_must_not_hold_is_named(tmp_path: Path, name: str, values: Any, message: str) -> None:
    source, write = WRITERS[name]
    write(tmp_path / "a", pa.table({"text": values}))
    with pytest.raises((DataError, ConfigError), match=message) as refusal:
        opened(source, tmp_path / f"a.{source}")
    assert str(refusal.value).isprintable()


@each
def test_columns_are_named(tmp_path: Path, name: str) -> None:
    source, write = WRITERS[name]
    conversation = pa.array([[{"role": "user", "content": "hi"}]])
    write(tmp_path / "a", pa.table({"input_ids": pa.array([[1, 2]]), "messages": conversation}))
    path = tmp_path / f"a.{source}"
    for key, message in {
        "text": r"no column 'text' \(data.text_key\); .* such as data.text_key=input_ids",
        "messages": "data.text_key=messages: conversations are not read",
        "body": r"no column 'body'.*\['input_ids', 'messages'\]",
    }.items():
        with pytest.raises(ConfigError, match=message):
            opened(source, path, key)
    write(tmp_path / "b", pa.table({"text": ["a"]}))
    with pytest.raises(ConfigError, match="at least 256"):
        opened(source, tmp_path / f"b.{source}", vocab_size=100)
    write(tmp_path / "b", pa.table({"input_ids": ["text"]}))
    with pytest.raises(DataError, match=r"text in .*b.* and ids in .*a"):
        opened(source, tmp_path, "input_ids")


@each
def test_damage_is_an_error_or_read_as_it_stands(tmp_path: Path, name: str) -> None:
    """A changed value that no checksum covers reads as it was written; nothing is lost, and nothing crashes."""
    source, write = WRITERS[name]
    ids = [[n % 7] * (n % 5 + 1) for n in range(40)]
    write(tmp_path / "a", pa.table({"ids": pa.array(ids, pa.list_(pa.int32()))}), write_page_checksum=True)
    path = tmp_path / f"a.{source}"
    original, rng, refused = path.read_bytes(), random.Random(name), 0
    config = DataConfig(source=source, path=str(path), text_key="ids")
    for number in range(100):
        damaged = bytearray(original)
        start = rng.randrange(len(damaged) + 1)
        stop = min(len(damaged), start + rng.choice([0, 1, 1, 8]))
        damaged[start:stop] = rng.randbytes(rng.choice([stop - start, stop - start, 0, 1, 8]))
        path.write_bytes(damaged)
        found, message = attempt(config)
        if found is None:
            refused += 1
            assert "/a." in message and message.isprintable(), number
        else:
            assert [len(found) + found.skipped_empty, found.total_tokens] == [40, sum(map(len, ids))], number
    assert refused > 30, refused
    for size in range(0, len(original), 97):
        path.write_bytes(original[:size])
        with pytest.raises(DataError, match=rf"a\.{source}"):
            open_corpus(config, 300)


def attempt(config: DataConfig) -> tuple[Corpus | None, str]:
    """Opens a corpus, or returns what is said against it."""
    try:
        return open_corpus(config, 300), ""
    except (DataError, ConfigError) as error:
        return None, str(error)


def test_a_dataset_that_datasets_saved(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = {"text": [f"number {n}" for n in range(50)], "input_ids": [[n, n + 1] for n in range(50)]}
    whole = datasets.Dataset.from_dict(rows)
    whole.save_to_disk(str(tmp_path / "one"), num_shards=3)
    (tmp_path / "one" / "cache-123.arrow").write_bytes(b"what map() left")
    assert texts(opened("arrow", tmp_path / "one")) == [text.encode() for text in rows["text"]]
    assert documents_of(opened("arrow", tmp_path / "one", "input_ids")) == rows["input_ids"]
    chosen = whole.filter(lambda row: row["input_ids"][0] % 7 == 0).shuffle(seed=1)
    datasets.DatasetDict({"train": chosen, "test": whole.select([3])}).save_to_disk(str(tmp_path / "two"))
    found = opened("arrow", tmp_path / "two", "input_ids", split="train")
    assert documents_of(found) == chosen["input_ids"][:]
    assert documents_of(opened("arrow", tmp_path / "two", "input_ids", split="test")) == [[3, 4]]
    with pytest.raises(ConfigError, match=r"data.split=null: .* set data.split to one of train, test"):
        opened("arrow", tmp_path / "two")
    with pytest.raises(ConfigError, match=r"data.split=dev: .* has train, test"):
        opened("arrow", tmp_path / "two", split="dev")
    with pytest.raises(ConfigError, match="has no dataset_dict"):
        opened("arrow", tmp_path / "one", split="train")
    with pytest.raises(DataError, match="several datasets lies below"):
        opened("arrow", tmp_path)
    shutil.rmtree(tmp_path / "two" / "test")
    with pytest.raises(DataError, match=r"test/state\.json is missing"):
        opened("arrow", tmp_path / "two", split="test")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.update(_data_files=[{"filename": "../a.arrow"}]), "each of a file beside it"),
        (lambda state: state.update(_data_files=[{"filename": ".."}]), "each of a file beside it"),
        (lambda state: state.update(_data_files=[{"filename": "a.arrow"}] * 2), "none twice"),
        (lambda state: state.update(_data_files="a.arrow"), "_data_files are 'a.arrow'"),
        (lambda state: state.update(_data_files=[{"filename": "b.arrow"}]), r"b\.arrow: No such file"),
        (lambda state: state.update(_data_files=[]), "names no Arrow file"),
        (lambda state: state.update(_indices_data_files=[{"filename": "i.arrow"}]), "chosen by an index"),
    ],
)
def test_the_state_of_a_dataset_is_checked(tmp_path: Path, change: Callable[[Any], None], message: str) -> None:
    write_stream(tmp_path / "a", pa.table({"text": ["hello"]}))
    state = {"_data_files": [{"filename": "a.arrow"}], "_fingerprint": "1"}
    (tmp_path / "state.json").write_text(json.dumps(state))
    assert texts(opened("arrow", tmp_path)) == [b"hello"]
    change(state)
    (tmp_path / "state.json").write_text(json.dumps(state))
    with pytest.raises(DataError, match=message):
        opened("arrow", tmp_path)
    for broken in (b"", b"[1]", b"\xff", b"[" * 100_000):
        (tmp_path / "state.json").write_bytes(broken)
        with pytest.raises(DataError, match=r"state\.json"):
            opened("arrow", tmp_path)


def test_a_stream_that_was_cut_at_a_batch_or_goes_on_is_refused(tmp_path: Path) -> None:
    write_stream(tmp_path / "a", pa.table({"text": ["one", "two", "three", "four"]}))
    path = tmp_path / "a.arrow"
    whole = path.read_bytes()
    path.write_bytes(whole[:-8])
    with pytest.raises(DataError, match="it was cut, or its writer was not closed"):
        opened("arrow", path)
    path.write_bytes(whole + whole)
    with pytest.raises(DataError, match=rf"byte {len(whole)}: the stream ends here"):
        opened("arrow", path)


def test_ids_are_made_into_a_token_file_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verdicts, "TICK", -1000.0)
    made: list[str] = []
    write_tokens = kept.write_tokens
    monkeypatch.setattr(kept, "write_tokens", lambda *rest: (made.append(str(rest[0])), write_tokens(*rest)))
    (tmp_path / "data").mkdir()
    for name in ("a", "b"):
        write_parquet(tmp_path / "data" / name, pa.table({"ids": pa.array(IDS, pa.list_(pa.int32()))}))
    config = DataConfig(source="parquet", path=str(tmp_path / "data"), text_key="ids")
    prints = [check_corpus(config, 1 << 20, cache=tmp_path / "cache").fingerprint for _ in range(2)]
    assert len(made) == 2 and len(set(prints)) == 1
    for place in (tmp_path / "cache" / "tokens").iterdir():
        place.write_bytes(place.read_bytes()[:-2])
    assert check_corpus(config, 1 << 20, cache=tmp_path / "cache").fingerprint == prints[0]
    assert len(made) == 4
    write_parquet(tmp_path / "data" / "b", pa.table({"ids": pa.array([[8]], pa.list_(pa.int32()))}))
    assert documents_of(check_corpus(config, 1 << 20, cache=tmp_path / "cache")) == [*FULL_IDS, [8]]
    assert len(made) == 5
    unwritable = check_corpus(config, 1 << 20, cache=Path("/proc/none"))
    assert np.asarray(unwritable.tokens).tolist() == [one for ids in [*FULL_IDS, [8]] for one in ids]
