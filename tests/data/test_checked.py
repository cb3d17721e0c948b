"""The check before a run: all that is wrong with a corpus is found by it, and what it found holds while files do."""

from __future__ import annotations

from pathlib import Path

import pytest

from longctx.config import DataConfig
from longctx.data import open_corpus, write_tokens
from longctx.data.checked import check_corpus
from longctx.errors import DataError


def tokens_of(path: Path) -> DataConfig:
    return DataConfig(source="tokens", path=str(path))


def test_the_digest_is_that_of_the_corpus(tmp_path: Path) -> None:
    write_tokens(tmp_path / "a.bin", [[1, 2, 3], [4]])
    found = check_corpus(tokens_of(tmp_path / "a.bin"), 100)
    assert found.fingerprint == open_corpus(tokens_of(tmp_path / "a.bin"), 100).fingerprint


@pytest.mark.parametrize("source", ["text", "tokens"])
def test_documents_of_one_token_teach_nothing(tmp_path: Path, source: str) -> None:
    path = tmp_path / ("a.bin" if source == "tokens" else "a.jsonl")
    if source == "tokens":
        write_tokens(path, [[1], [2], [3]])
    else:
        path.write_text('{"text": "x"}\n' * 3)
    with pytest.raises(DataError, match=r"nothing to learn in .*: each of the 3 documents has one"):
        check_corpus(DataConfig(source=source, path=str(path)), 256)


def test_one_label_is_enough(tmp_path: Path) -> None:
    write_tokens(tmp_path / "a.bin", [[1], [2, 3], [4]])
    assert len(check_corpus(tokens_of(tmp_path / "a.bin"), 100)) == 3
