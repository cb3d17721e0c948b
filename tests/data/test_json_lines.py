"""JSON Lines and JSON: each document once, blank lines and marks are nothing, and bad lines are named."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longctx.data import json_lines
from longctx.data.json_lines import BLANK_LINES, LineParser, read_json, read_lines
from longctx.errors import DataError

MARK = b"\xef\xbb\xbf"


def read(path: Path, packing: str = "") -> tuple[list[tuple[int, bytes]], int]:
    """The documents with their places, and how many blank lines there were."""
    left_out: Counter[str] = Counter()
    reader = read_json if path.suffix == ".json" else read_lines
    found = list(reader(path, packing, "text", left_out, lambda position: None))
    return [one for each in found for one in zip(each.places, each.contents, strict=True)], left_out[BLANK_LINES]


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("block", [1, 7, 1 << 20])
@pytest.mark.parametrize(
    ("content", "places", "blank"),
    [
        (b'{"text": "a"}\n{"text": "b"}\n', [1, 2], 0),
        (b'{"text": "a"}\n{"text": "b"}', [1, 2], 0),
        (b'{"text": "a"}\r\n{"text": "b"}\r\n', [1, 2], 0),
        (b'\n\r\n{"text": "a"}\n  \t\n{"text": "b"}\n\n\n', [3, 5], 5),
        (MARK + b'{"text": "a"}\n' + MARK + b'{"text": "b"}\n', [1, 2], 0),
        (b' {"id": {"text": "z"}, "text": "a"} \n\t{"n": NaN_, "text": "b"}'.replace(b"NaN_", b"1e9"), [1, 2], 0),
        (b'{"\\u0074ext": "a"}\n{"other": "\\"text\\"", "text": "b"}\n', [1, 2], 0),
    ],
)
def test_lines_are_documents(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, places: list[int], blank: int, block: int
) -> None:
    monkeypatch.setattr(json_lines, "BLOCK", block)
    assert read(written(tmp_path / "a.jsonl", content)) == (list(zip(places, (b"a", b"b"), strict=True)), blank)
    assert read(written(tmp_path / "a.json", content)) == (list(zip(places, (b"a", b"b"), strict=True)), blank)


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b'[{"text": "a"}, {"text": "b"}]', [(0, b"a"), (1, b"b")]),
        (MARK + b'[\n  {\n    "text": "a"\n  }\n]\n', [(0, b"a")]),
        (b'{\n  "text": "a",\n  "id": 3\n}\n', [(0, b"a")]),
        (b'{"text": "a"}', [(1, b"a")]),
        (b"[]", []),
        (b" \n", []),
    ],
)
def test_json_is_read_as_objects(tmp_path: Path, content: bytes, found: list[tuple[int, bytes]]) -> None:
    assert read(written(tmp_path / "a.json", content))[0] == found


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            b'{"text": "a"},\n{"text": "b"}\n',
            r"a\.json: bad JSON: Extra data.*an object per line, one object, or one arr",
        ),
        (b'[{"text": "a"}, {"body": "b"}]', r"a\.json, element 1: no field 'text'"),
        (b'["a", "b"]', r"a\.json, element 0: found 'a'"),
        (b'{\n"text": 3}', r"a\.json: field 'text' is 3"),
        (b'[{"text": "a", "text": "b"}]', r"key 'text' appears twice"),
        ('{"text": "a"}'.encode("utf-16"), r"bad JSON: UTF-16, not UTF-8"),
        (b"just words", r"bad JSON"),
    ],
)
def test_other_json_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(DataError, match=message) as refusal:
        read(written(tmp_path / "a.json", content))
    assert str(refusal.value).isprintable()


def test_lines_in_utf16_are_named_as_such(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a\.jsonl:1: begins as UTF-16, not as text in UTF-8; save"):
        read(written(tmp_path / "a.jsonl", '{"text": "a"}\n'.encode("utf-16")))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"not json", r"bad JSON.*found b'not json'.*one JSON object"),
        (b'{"text": "cut', r"bad JSON"),
        (b'"text"', r"found 'text'.*one JSON object"),
        (b"[1, 2]", r"found \[1, 2\]"),
        (b'{"body": "x"}', r"no field 'text' \(data.text_key\); the line has \['body'\]"),
        (b'{"text": 3}', r"field 'text' is 3; it must be a string"),
        (b'{"text": null}', r"field 'text' is None"),
        (b'{"text": "a\xff\xfe"}', r"bad UTF-8 at byte 11: b'\\xff\\xfe"),
        (b'{"text": "a\\u0000"}', r"'text' has a NUL at character 1"),
        (b'{"text": "a\x00"}', r"bad JSON"),
        (b'{"text": "\\ud800"}', r"lone surrogate '\\ud800' at character 0"),
        (b'{"text": "a", "text": "b"}', r"key 'text' appears twice"),
        (b'{"text": "a", "x": NaN}', r"NaN is not JSON"),
        (b"[" * 100_000, r"bad JSON.*recursion"),
        (b'{"x": ' + b"9" * 5000 + b"}", r"bad JSON"),
        (b"\xef\xbb\xbf{}", r"no field 'text'"),
        (b'{"text": "a"} x', r"bad JSON: Extra data"),
        (b'{"te\\u0078t": "a", "text": "b"}', r"key 'text' appears twice"),
        (b'{"text": "a"}\x0c', r"bad JSON: Extra data"),
        (b'{"text": "\x1b[31m"}', r"found b'.*\\x1b\[31m"),
    ],
)
def test_a_bad_line_is_refused_with_its_number(tmp_path: Path, line: bytes, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "fine"}\n' + line + b'\n{"text": "fine"}\n')
    with pytest.raises(DataError, match=message) as refusal:
        read(path)
    said = str(refusal.value)
    assert said.startswith(f"{path}:2: ")
    assert said.isprintable()
    assert len(said) < 400 + len(str(path))


@pytest.mark.parametrize("block", [1, 8, 30])
def test_an_overlong_line_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(json_lines, "BLOCK", block)
    monkeypatch.setattr(json_lines, "LINE_LIMIT", 30)
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "short"}\n{"text": "much longer than that"}\n')
    with pytest.raises(DataError, match=r"a\.jsonl:2: the line is longer than 30 bytes"):
        read(path)


@settings(max_examples=200, deadline=None)
@given(line=st.binary(max_size=60) | st.text(max_size=30).map(lambda s: json.dumps({"text": s}).encode()))
def test_any_line_gives_its_text_or_a_typed_error(line: bytes) -> None:
    try:
        found = LineParser("text")(line)
    except DataError:
        return
    assert found == json.loads(line.removeprefix(b"\xef\xbb\xbf"))["text"].encode()
