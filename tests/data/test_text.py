"""Text sources: what is read, in which order, and how bad input is refused."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from longctx.config import DataConfig
from longctx.data import Corpus, open_corpus, preflight, text
from longctx.data.folders import Found
from longctx.errors import ConfigError, DataError


def open_text(path: Path, **settings_: object) -> Corpus:
    return open_corpus(DataConfig(source="text", path=str(path), **settings_), 256)  # type: ignore[arg-type]


def contents(corpus: Corpus) -> list[bytes]:
    return [
        corpus.tokens[start:stop].tobytes() for start, stop in zip(corpus.bounds[:-1], corpus.bounds[1:], strict=True)
    ]


def test_the_standard_library_is_a_corpus() -> None:
    corpus = open_corpus(DataConfig(), 256)
    assert len(corpus) > 300
    assert corpus.total_tokens > 5_000_000
    assert corpus.tokens.max() < 256
    number = next(i for i in range(len(corpus)) if corpus.origin(i).endswith("/argparse.py"))
    assert contents(corpus)[number] == Path(corpus.origin(number)).read_bytes()
    origins = [corpus.origin(i) for i in range(len(corpus))]
    assert not [name for name in origins if "/site-packages/" in name or "/test/" in name]
    assert corpus.fingerprint == open_corpus(DataConfig(), 300).fingerprint


def test_a_vanished_file_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(text, "find_files", lambda *_, **__: Found([tmp_path / "gone.py"]))
    with pytest.raises(DataError, match=r"cannot read .*gone\.py: No such file or directory"):
        open_corpus(DataConfig(), 256)


def test_a_folder_holds_one_document_per_file_in_order(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "z.md").write_bytes(b"last \xff")
    (tmp_path / "a.txt").write_bytes(b"first")
    (tmp_path / "c.jsonl").write_text('{"text": "one"}\n{"text": ""}\r\n{"text": "tw\\u00f6"}')
    (tmp_path / "empty.txt").touch()
    (tmp_path / ".hidden").write_bytes(b"no")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "config").write_bytes(b"no")
    corpus = open_text(tmp_path)
    assert contents(corpus) == [b"first", b"last \xff", b"one", "twö".encode()]
    assert corpus.skipped_empty == 2
    assert corpus.origin(0) == str(tmp_path / "a.txt")
    assert corpus.origin(3) == f"{tmp_path / 'c.jsonl'}:3"
    assert corpus.locate(7) == f"{tmp_path / 'b' / 'z.md'}, token 2 of it"


def test_max_documents_takes_the_first_that_hold_anything(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": ""}\n{"text": "a"}\n{"text": ""}\n{"text": "b"}\n{"text": ""}\nnever read')
    corpus = open_text(path, max_documents=2)
    assert contents(corpus) == [b"a", b"b"]
    assert corpus.skipped_empty == 2


@pytest.mark.parametrize("limit", [0, -3])
def test_max_documents_below_one_is_refused(limit: int) -> None:
    with pytest.raises(ConfigError, match=f"data.max_documents={limit}.*at least 1"):
        preflight(DataConfig(max_documents=limit), 256)


def test_a_pipe_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(DataError, match="pipe is not a regular file"):
            open_text(path)


def test_names_are_escaped_in_messages(tmp_path: Path) -> None:
    (tmp_path / "a\n\x1b[31m.txt").write_bytes(b"\0")
    with pytest.raises(DataError) as refusal:
        open_text(tmp_path)
    assert "\\n\\x1b[31m.txt" in str(refusal.value)
    assert str(refusal.value).isprintable()


@pytest.mark.parametrize("path", ["/nowhere/at all", "bad\0name", "lone\ud800"])
@pytest.mark.parametrize("source", ["text", "tokens"])
def test_a_path_without_a_file_is_refused(source: str, path: str) -> None:
    with pytest.raises(DataError, match=r"cannot read .*must exist and be readable") as refusal:
        preflight(DataConfig(source=source, path=path), 256)
    assert str(refusal.value).isprintable()


@contextmanager
def without_privileges() -> Iterator[None]:
    """Root reads everything; meanwhile it is nobody."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


def test_an_unreadable_file_is_refused() -> None:
    # Not in pytest's own folder, which nobody but its user may enter.
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        (folder / "a.txt").write_bytes(b"x")
        assert len(open_text(folder)) == 1  # whatever is imported late is here now
        (folder / "a.txt").chmod(0)
        with without_privileges(), pytest.raises(DataError, match=r"cannot read .*a\.txt: Permission denied"):
            open_text(folder)


def test_an_unreadable_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def scandir(path: str) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(DataError, match=r"cannot read .*: Permission denied"):
        open_text(tmp_path)


@pytest.mark.parametrize("source", ["text", "tokens"])
@pytest.mark.parametrize("path", [None, ""])
def test_a_missing_setting_is_the_configurations_fault(source: str, path: str | None) -> None:
    with pytest.raises(ConfigError, match=rf"data.path=.*data={source} needs a path.*python_stdlib"):
        preflight(DataConfig(source=source, path=path), 256)


def test_an_empty_corpus_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").touch()
    (tmp_path / "b.jsonl").write_text('{"text": ""}\n')
    with pytest.raises(DataError, match="is empty: 0 tokens, 2 empty documents skipped"):
        open_text(tmp_path)


@pytest.mark.parametrize("source", ["python_stdlib", "text"])
def test_bytes_need_256_ids(source: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model.vocab_size=255.*at least 256.*nearest valid value: 256"):
        preflight(DataConfig(source=source, path=str(tmp_path)), 255)


def test_an_unknown_source_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"data.source=token is.*mean tokens.*python_stdlib, text, tokens"):
        preflight(DataConfig(source="token"), 256)
