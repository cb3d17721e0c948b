"""``data.tokenizer``: text is tokenized once, found again, and never mixed up with another tokenizer's."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from longctx.config import DataConfig
from longctx.config.sections.mixture import MixtureSource
from longctx.data import Corpus, open_corpus
from longctx.data.source import Check
from longctx.data.tokenizer import open_tokenizer
from longctx.data.tokenizing import build, cached
from longctx.errors import ConfigError, DataError, StorageError
from tests.data.test_tokenize import Inline
from tests.data.tokenizers_of_tests import END, parts_of, saved


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DataConfig:
    monkeypatch.setattr(build, "EncodingWorkers", Inline)
    place = tmp_path / "in"
    place.mkdir()
    (place / "a.txt").write_text(f"One text, with {END} in it.")
    (place / "b.jsonl").write_text('{"text": "two"}\n{"text": ""}\n{"text": "three, größer"}\n')
    return DataConfig(source="text", path=str(place), tokenizer=str(saved(tmp_path / "tokenizer")))


def opened(config: DataConfig, tmp_path: Path, vocab_size: int = 600, **how: Any) -> Corpus:
    return open_corpus(config, vocab_size, check=Check(cache=tmp_path / "cache"), **how)


def texts_of(corpus: Corpus, config: DataConfig) -> list[str]:
    assert config.tokenizer is not None
    tokenizer = open_tokenizer(config.tokenizer)
    spans = zip(corpus.bounds[:-1], corpus.bounds[1:], strict=True)
    return [tokenizer.decode(corpus.read(int(start), int(stop)).tolist()) for start, stop in spans]


def test_text_becomes_ids_once(config: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = opened(config, tmp_path)
    assert texts_of(first, config) == [f"One text, with {END} in it.", "two", "three, größer"]
    assert first.skipped_empty == 1 and first.tokens.dtype == np.uint16
    assert first.facts["tokenizer"]["digest"] == first.tokenizer == open_tokenizer(config.tokenizer).digest
    assert first.facts["files"] == {"text": 1, "json lines": 1}
    monkeypatch.setattr(build, "EncodingWorkers", None)  # nothing is encoded any more
    again = opened(config, tmp_path, verify=False)
    assert again.fingerprint == first.fingerprint
    place = Path(str(config.path)) / "a.txt"
    place.write_text("changed")
    os.utime(place, ns=(0, 0))
    monkeypatch.setattr(build, "EncodingWorkers", Inline)
    assert texts_of(opened(config, tmp_path), config)[0] == "changed"


def test_a_policy_is_another_file(config: DataConfig, tmp_path: Path) -> None:
    plain = opened(config, tmp_path)
    with_both = opened(replace(config, bos=True, eos=True), tmp_path)
    assert with_both.total_tokens == plain.total_tokens + 2 * len(plain)
    assert with_both.tokenizer == f"{plain.tokenizer}+bos=1+eos=0"
    special = opened(replace(config, special_tokens="ids"), tmp_path)
    assert 0 in special.read(0, special.total_tokens) and 0 not in plain.read(0, plain.total_tokens)


def test_a_few_documents_and_no_cache_are_held_in_memory(
    config: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = opened(config, tmp_path)
    memory = open_corpus(config, 600)
    assert texts_of(memory, config) == texts_of(whole, config) and memory.skipped_empty == 1
    assert memory.origin(2).endswith("b.jsonl:3") and memory.tokenizer == whole.tokenizer
    assert texts_of(opened(replace(config, max_documents=1), tmp_path), config) == texts_of(whole, config)[:1]
    monkeypatch.setattr(cached, "MOST_IN_MEMORY", 20)
    for some in (config, replace(config, max_documents=1)):
        with pytest.raises(StorageError, match=r"bytes of text are too many .* `longctx tokenize`"):
            open_corpus(some, 600)


def test_the_vocabulary_holds_the_ids(config: DataConfig, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.vocab_size=599 must be at least 600 .*nearest valid value: 600"):
        opened(config, tmp_path, 599)
    assert opened(config, tmp_path, 640).vocab_size == 640  # padded
    library = DataConfig(tokenizer=config.tokenizer, max_documents=2)
    assert open_corpus(library, 600).total_tokens
    with pytest.raises(ConfigError, match=r"data\.eos=true is of a tokenizer"):
        DataConfig(eos=True).check()
    with pytest.raises(ConfigError, match=r"data\.special_tokens"):
        replace(config, special_tokens="both").check()


def test_sources_of_a_mixture_have_the_tokenizer_of_the_run(config: DataConfig, tmp_path: Path) -> None:
    one = MixtureSource(path=config.path)
    mixture = DataConfig(source="mixture", mixture={"one": one, "two": replace(one, weight=2.0)})
    asked = replace(mixture, tokenizer=config.tokenizer, eos=True)
    asked.check()
    alone, found = opened(replace(config, eos=True), tmp_path), opened(asked, tmp_path)
    assert (found.tokenizer, found.total_tokens) == (alone.tokenizer, 2 * alone.total_tokens)


def test_bad_text_is_named(config: DataConfig, tmp_path: Path) -> None:
    (Path(str(config.path)) / "c.txt").write_bytes(b"abc\xff")
    for cache in (tmp_path / "cache", None):
        with pytest.raises(DataError, match=r"c\.txt: bad UTF-8 at byte 3"):
            open_corpus(config, 600, check=Check(cache=cache))


def test_a_token_file_knows_its_tokenizer(config: DataConfig, tmp_path: Path) -> None:
    opened(config, tmp_path)
    (made,) = (tmp_path / "cache/tokens").glob("*.bin")
    tokens = DataConfig(source="tokens", path=str(made))
    corpus = open_corpus(tokens, 600)
    assert corpus.tokenizer == open_tokenizer(config.tokenizer).digest
    same = replace(tokens, tokenizer=config.tokenizer)
    assert open_corpus(same, 600).facts["tokenizer"]["content"] == corpus.tokenizer
    parts = parts_of()
    parts["model"]["merges"].pop()
    other = replace(tokens, tokenizer=str(saved(tmp_path / "other", parts)))
    with pytest.raises(ConfigError, match=rf"was made by the tokenizer {corpus.tokenizer} .*other is [0-9a-f]+; name"):
        open_corpus(other, 600)
    with pytest.raises(ConfigError, match="must be at least 600"):
        open_corpus(same, 599)
    summary = made.with_suffix(".tokens.json")
    for damaged in ("{", "[]", '{"tokenizer": 3}', '{"tokenizer": {"digest": 3}}'):
        summary.write_text(damaged)
        with pytest.raises(DataError, match=r"tokens\.json is no token file's summary"):
            open_corpus(tokens, 600)
    summary.write_text(json.dumps({"tokenizer": {"digest": "bytes"}}))
    with pytest.raises(ConfigError, match=r"made by the tokenizer bytes \(bytes\)"):
        open_corpus(same, 600)
    summary.unlink()
    assert open_corpus(tokens, 600).tokenizer is None and open_corpus(same, 600).total_tokens
