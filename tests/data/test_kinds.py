"""What is text by name and content, and which files of a folder are read: each once, nothing dropped in silence."""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import re
from pathlib import Path

import pytest

from longctx.config import DataConfig
from longctx.data import Corpus, kinds, open_corpus
from longctx.data.kinds import JSON_LINES, UNPACKED, Kind, kind_of, looks_like_json
from longctx.errors import ConfigError, DataError

LINES = b'{"text": "one"}\n{"text": "two"}\n'


def open_text(path: Path, **settings: object) -> Corpus:
    return open_corpus(DataConfig(source="text", path=str(path), **settings), 256)  # type: ignore[arg-type]


def contents(corpus: Corpus) -> list[bytes]:
    return [bytes(corpus.tokens[start:stop]) for start, stop in zip(corpus.bounds, corpus.bounds[1:], strict=False)]


PACKERS = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}


@pytest.mark.parametrize("packing", PACKERS)
@pytest.mark.parametrize("end", [*JSON_LINES, ".JSONL", ".json", ".Json"])
def test_json_lines_by_every_name(tmp_path: Path, end: str, packing: str) -> None:
    path = tmp_path / f"corpus{end}{packing.upper() if end.isupper() else packing}"
    path.write_bytes(PACKERS[packing](LINES))
    found = open_text(path)
    assert contents(found) == [b"one", b"two"]
    assert found.origin(1) == f"{path}:2"
    assert contents(open_text(tmp_path)) == [b"one", b"two"]


@pytest.mark.parametrize(
    "name", ["corpus", "corpus.txt", "corpus.jsonl.bak", "part-00000", "a.jsonl.txt", "x.gz", "a.md"]
)
@pytest.mark.parametrize(
    "content", [LINES, b"\n \n" + LINES, b'[\n  {"text": "one"}\n]', b'{\n "a": 1}', b"#\n" + LINES]
)
def test_json_under_another_name_is_not_learnt_as_markup(tmp_path: Path, name: str, content: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(gzip.compress(content, mtime=0) if name.endswith(".gz") else content)
    for place in (path, tmp_path):
        with pytest.raises(DataError, match=r"holds JSON, which would be learnt as markup; JSON Lines end in \.jsonl"):
            open_text(place)


@pytest.mark.parametrize(
    "text", [b"", b"{}", b"{x}", b"[1]", b"a {\n", b'"a": 1', b'words\n{"a": 1}\nwords', b"{{name}}: x"]
)
def test_text_with_braces_is_text(text: bytes) -> None:
    assert not looks_like_json(text)


@pytest.mark.parametrize("name", ["a.txt", "a.py", "a", "README", "a.rst", "a.html", "a.1", "a.toml", "a.unknown"])
def test_any_other_name_is_raw_text(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\xef\xbb\xbfwords\r\n")
    found = open_text(tmp_path)
    assert contents(found) == [b"words\r\n"]  # the mark says how it is encoded and is no part of it
    assert found.facts == {
        "files": {"text": 1},
        "first_document": {"from": str(tmp_path / name), "begins": "words\r\n"},
    }


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("a.csv", "JSON Lines, a document per line"),
        ("a.PARQUET", "data=parquet reads it"),
        ("a.arrow", "data=arrow reads it"),
        ("a.ds", "data=datatrove"),
        ("a.npy", "data=olmo"),
        ("a.csv.gz", "JSON Lines"),
        ("a.jsonl.lz4", "lz4 -d"),
        ("a.tar.gz", "tar xf"),
        ("a.zip", "unzip"),
        ("a.pdf", "export it as text"),
        ("a.bin", "data=tokens"),
    ],
)
def test_what_may_be_the_corpus_but_is_no_text_is_refused_by_name(tmp_path: Path, name: str, advice: str) -> None:
    (tmp_path / name).write_bytes(b"words")
    (tmp_path / "README.md").write_bytes(b"About this corpus.")
    with pytest.raises(DataError, match=rf"{name}: \.\w+ is not text and data=text does not read it; .*{advice}"):
        open_text(tmp_path / name)
    with pytest.raises(DataError, match=rf"{advice}.*, or take it out of data.path, or name .* data.files="):
        open_text(tmp_path)
    assert contents(open_text(tmp_path, files="*.md *.txt")) == [b"About this corpus."]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("words".encode("utf-16"), r"begins as UTF-16, not as text in UTF-8.*iconv -f UTF-16 -t UTF-8"),
        ("words".encode("utf-32"), r"begins as UTF-32"),
        ("words".encode("utf-16-le"), r"NUL at byte 1.*binary file, or UTF-16"),
        (gzip.compress(b"words", mtime=0), r"begins as gzip"),
        (b"PK\3\4", r"begins as a zip archive"),
        (b"PAR1", r"begins as Parquet"),
        (b"%PDF-1.4\nwords", r"begins as PDF"),
        (b"\1\2\0", r"NUL at byte 2"),
    ],
)
def test_content_that_is_no_text_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(DataError, match=rf"a\.txt: {message}"):
        open_text(tmp_path)


@pytest.mark.parametrize("packing", [".gz", ".bz2", ".xz"])
def test_damaged_compression_is_named(tmp_path: Path, packing: str) -> None:
    path, whole = tmp_path / f"a.jsonl{packing}", PACKERS[packing](LINES * 500)
    for bad in (whole[:-9], whole[:5], b"words", whole[:20] + b"\xff\xff" + whole[22:]):
        path.write_bytes(bad)
        with pytest.raises(DataError, match=rf"a\.jsonl{packing}: the compressed content is damaged or cut"):
            open_text(path)


def test_what_is_left_out_of_a_folder_is_counted(tmp_path: Path) -> None:
    for name in (
        "a.txt",
        ".hidden",
        ".git/config",
        "b/.DS_Store",
        "b/pic.PNG",
        "b/film.mp4",
        "b/c.txt",
        "b/d.jsonl.gz",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        content = gzip.compress(b'\n{"text": "d"}\n') if name.endswith("gz") else name.encode()
        (tmp_path / name).write_bytes(content)
    (tmp_path / "latin.txt").write_bytes("für".encode("latin-1"))
    found = open_text(tmp_path)
    assert contents(found) == [b"a.txt", b"b/c.txt", b"d", b"f\xfcr"]
    assert found.facts["files"] == {"text": 3, "json lines in .gz": 1}
    assert found.facts["left_out"] == {"hidden": 3, "pictures, sound, programs": 2}
    assert found.facts["noted"] == {"blank lines": 1, "texts that are not UTF-8": 1}
    with pytest.raises(DataError, match=r"pic\.PNG: \.png is not text"):
        open_text(tmp_path / "b" / "pic.PNG")
    some = open_text(tmp_path, files="b/*.txt")
    assert contents(some) == [b"b/c.txt"]
    assert some.facts["left_out"]["not in data.files=b/*.txt"] == 3 + 2
    with pytest.raises(DataError, match=r"holds no file to read \(left out: .* not in data.files"):
        open_text(tmp_path, files="*.rst")
    with pytest.raises(ConfigError, match=r"data.files=.* is not read by data=python_stdlib"):
        DataConfig(files="*.py").check()


def test_every_file_is_read_once_whatever_its_names(tmp_path: Path) -> None:
    blobs, root = tmp_path / "blobs", tmp_path / "root"
    (root / "z").mkdir(parents=True)
    blobs.mkdir()
    (blobs / "1f").write_bytes(LINES)
    (blobs / "deep").mkdir()
    (blobs / "deep" / "e.txt").write_bytes(b"deep")
    (root / "z" / "real.txt").write_bytes(b"real")
    (root / "train.jsonl").symlink_to("../blobs/1f")  # the name that the user gave says what it is
    (root / "again.jsonl").symlink_to(blobs / "1f")
    (root / "a-link.txt").symlink_to("z/real.txt")
    os.link(root / "z" / "real.txt", root / "z" / "same.txt")
    (root / "more").symlink_to(blobs / "deep")
    (root / "more-of-it").symlink_to(blobs / "deep")
    (root / "loop").symlink_to(root)
    (root / "z" / "up").symlink_to("..")
    (root / "above").symlink_to(tmp_path)
    found = open_text(root)
    assert contents(found) == [b"one", b"two", b"deep", b"real"]
    assert [found.origin(number) for number in (0, 2, 3)] == [
        f"{root}/again.jsonl:1",
        f"{root}/more/e.txt",
        f"{root}/z/real.txt",
    ]
    assert found.facts["left_out"] == {
        "links to a folder that is read": 4,
        "other names of a file that is read": 3,
    }
    (tmp_path / "door").symlink_to(root)  # what the user names may be a link
    assert contents(open_text(tmp_path / "door")) == contents(found)


def test_what_a_run_writes_is_no_data(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"words")
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "config.yaml").write_bytes(b"a: 1")
    before = open_text(tmp_path).fingerprint
    for name in ("1/.lock", "1/config.yaml", "1/wandb/x.log", "0/config.yaml", "0/metrics.jsonl"):
        path = tmp_path / "runs" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b'{"step": 1}\n')
    found = open_text(tmp_path)
    assert contents(found) == [b"words", b"a: 1"]
    assert found.fingerprint == before
    assert found.facts["left_out"] == {"folders of runs": 2}


@pytest.mark.parametrize("target", ["nowhere", "itself.txt"])
def test_a_link_to_nothing_is_refused(tmp_path: Path, target: str) -> None:
    (tmp_path / "a.txt").write_bytes(b"words")
    (tmp_path / "itself.txt").symlink_to(target)
    with pytest.raises(DataError, match=r"itself\.txt"):
        open_text(tmp_path)


@pytest.mark.parametrize("place", [Path(kinds.__file__), Path(__file__).parents[2] / "docs" / "data.md"])
def test_the_rule_is_told_as_it_is(place: Path) -> None:
    told = place.read_text(encoding="utf-8").replace("``", "`")
    rules = {int(number): text for number, text in re.findall(r"^(\d)\. ((?:.|\n(?! *\n|\d\.))+)", told, re.MULTILINE)}
    assert len(rules) == 6
    assert set(re.findall(r"`(\.\w+)`", rules[1])) == set(UNPACKED)
    assert set(re.findall(r"`(\.\w+)`", rules[2])) == set(JSON_LINES)
    for end in re.findall(r"`(\.\w+)`", rules[5]):
        assert kind_of(f"a{end}").refused, end
    for end in re.findall(r"`(\.\w+)`", rules[6]):
        assert kind_of(f"a{end}") == Kind(kinds.TEXT, end)
