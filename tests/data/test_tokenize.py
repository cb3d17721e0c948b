"""Token files of text: the text comes back, and whatever kills the making, the bytes are the same."""

from __future__ import annotations

import gzip
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from longctx.config import DataConfig
from longctx.data import Corpus, open_corpus
from longctx.data.text import text_files
from longctx.data.tokenizer import Policy, open_tokenizer
from longctx.data.tokenizing import build, partial, units
from longctx.data.tokenizing.build import Tokenizing
from longctx.data.tokenizing.frames import Encoded
from longctx.data.tokenizing.long_text import encode_long
from longctx.errors import ConfigError, DataError, LongctxError, StorageError
from longctx.launcher import cli
from tests.data.tokenizers_of_tests import END, parts_of, saved, tokenizers, trained

ROOT = Path(__file__).parents[2]
SETTINGS = ("text", "text")  # as the command has them


opened_once = cache(open_tokenizer)


class Inline:
    """Stands for ``EncodingWorkers``, in this process."""

    count = 1

    def __init__(self, path: str | None, policy: Policy, count: int) -> None:
        self._tokenizer = opened_once(path, policy)

    def __enter__(self) -> Inline:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def encode(self, texts: list[bytes], name: Callable[[int], str]) -> Future[Encoded]:
        found = self._tokenizer.encode_documents(texts, name)
        future: Future[Encoded] = Future()
        lengths = np.array([len(ids) for ids in found], dtype=np.int64)
        future.set_result(Encoded(lengths, np.concatenate(found), 0))
        return future


class Killed(BaseException):
    """Stands for the end of the process."""


def texts_of_test() -> list[str]:
    draw = random.Random(0)
    words = ["word", "größer", "尺八", "🎋", " ", "\n", "\t", END, "  ", "def f(x):", "e\u0301", "\u00a0", "0123456789"]
    return ["".join(draw.choices(words, k=draw.choice([0, 1, 7, 90]))) for _ in range(120)]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of texts in three files, with blank lines and empty documents; beside it lies a tokenizer."""
    folder = tmp_path_factory.mktemp("corpus")
    saved(folder / "tokenizer")
    texts, place = texts_of_test(), folder / "in"
    place.mkdir()
    lines = [json.dumps({"text": text}) + "\n" for text in texts]
    (place / "a.jsonl").write_text("\n".join(lines[:50]))
    (place / "b.jsonl.gz").write_bytes(gzip.compress("".join(lines[50:110]).encode()))
    (place / "c.json").write_text(json.dumps([{"text": text} for text in texts[110:]]))
    return folder


def job_of(corpus: Path, out: Path, **changes: Any) -> Tokenizing:
    job = Tokenizing(text_files(str(corpus / "in"), "text"), out, str(corpus / "tokenizer"), Policy(eos=True), SETTINGS)
    return replace(job, **changes)


def opened(path: Path, **settings: Any) -> Corpus:
    return open_corpus(DataConfig(source="tokens", path=str(path), **settings), 600)


def contents(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.parent.iterdir())}


@pytest.fixture(scope="module")
def made(corpus: Path) -> tuple[dict[str, bytes], dict[str, Any]]:
    out = corpus / "made" / "x.bin"
    summary, there = build.build(job_of(corpus, out))
    assert not there
    return contents(out), summary


def test_the_text_comes_back(corpus: Path, made: tuple[dict[str, bytes], dict[str, Any]]) -> None:
    found, tokenizer = opened(corpus / "made/x.bin"), open_tokenizer(corpus / "tokenizer")
    full = [text for text in texts_of_test() if text]
    assert len(found) == len(full) and found.skipped_empty == 120 - len(full) > 0
    for number, text in enumerate(full):
        ids = found.tokens[found.bounds[number] : found.bounds[number + 1]].tolist()
        assert ids.pop() == 0 and tokenizer.decode(ids) == text
    files, summary = made
    assert sorted(files) == ["x.bin", "x.idx", "x.tokens.json"]
    assert summary["documents"] == 120 and summary["empty_documents"] == found.skipped_empty
    assert summary["read"]["noted"] == {"blank lines": 49} and summary["tokens"] == found.total_tokens
    histogram = summary["lengths"]["histogram"]
    assert sum(one["documents"] for one in histogram) == len(full)
    assert sum(one["tokens"] for one in histogram) == found.total_tokens
    for one in histogram:
        inside = (found.lengths >= one["from"]) & (found.lengths <= one["to"])
        assert (one["documents"], one["tokens"]) == (inside.sum(), found.lengths[inside].sum())


def test_the_number_of_workers_changes_nothing(
    corpus: Path, made: tuple[dict[str, bytes], dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(units, "UNIT", 200)  # a batch of one or a few documents
    build.build(job_of(corpus, tmp_path / "x.bin", workers=3))
    assert contents(tmp_path / "x.bin") == made[0]


def points(monkeypatch: pytest.MonkeyPatch, fatal: int) -> Callable[[], int]:
    """Kills at the ``fatal``-th moment at which what lies on disk changes; returns how many there were so far."""
    passed = 0

    def pass_point() -> None:
        nonlocal passed
        passed += 1
        if passed == fatal:
            raise Killed

    def with_point(function: Any) -> Any:
        def called(*words: Any, **named: Any) -> Any:
            pass_point()
            return function(*words, **named)

        return called

    monkeypatch.setattr(os, "fsync", with_point(os.fsync))
    monkeypatch.setattr(Path, "replace", with_point(Path.replace))
    monkeypatch.setattr(Path, "unlink", with_point(Path.unlink))
    monkeypatch.setattr(partial.PartialFile, "add", with_point(partial.PartialFile.add))
    return lambda: passed


def test_a_kill_at_any_point_changes_nothing(
    corpus: Path, made: tuple[dict[str, bytes], dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "EncodingWorkers", Inline)
    monkeypatch.setattr(build, "open_tokenizer", opened_once)
    monkeypatch.setattr(units, "UNIT", 2000)
    draw = random.Random(1)
    for seconds, name in ((0.0, "always"), (1e9, "never")):
        monkeypatch.setattr(partial, "COMMIT_SECONDS", seconds)
        fatal, whole = 1, False
        while not whole:
            out = tmp_path / name / str(fatal) / "x.bin"
            for one in (fatal, draw.randrange(1, 60), 0):  # killed, killed once more, left alone
                with monkeypatch.context() as patch:
                    passed = points(patch, one)
                    try:
                        build.build(job_of(corpus, out))
                    except Killed:
                        continue
                whole = whole or (one == fatal and passed() < fatal)
            assert contents(out) == made[0], f"killed at point {fatal}"
            fatal += 1 if fatal < 8 else 7


@pytest.mark.parametrize("damage", ["cut", "changed", "note", "lengths"])
def test_what_a_crash_of_the_machine_left_is_made_again(
    corpus: Path, made: tuple[dict[str, bytes], dict[str, Any]], tmp_path: Path, monkeypatch: Any, damage: str
) -> None:
    monkeypatch.setattr(build, "EncodingWorkers", Inline)
    monkeypatch.setattr(units, "UNIT", 2000)
    monkeypatch.setattr(partial, "COMMIT_SECONDS", 0.0)
    out = tmp_path / "x.bin"
    with monkeypatch.context() as patch:
        points(patch, 40)
        with pytest.raises(Killed):
            build.build(job_of(corpus, out))
    names = partial.PartialFiles(out)
    left = {"note": names.note, "lengths": names.lengths}.get(damage, names.hidden(out))
    content = left.read_bytes()
    left.write_bytes(content[:-9] if damage != "changed" else content[:20] + b"\xff\xff" + content[22:])
    build.build(job_of(corpus, out))
    assert contents(out) == made[0]


def test_processes_that_are_killed(corpus: Path, made: tuple[dict[str, bytes], dict[str, Any]], tmp_path: Path) -> None:
    out, draw = tmp_path / "x.bin", random.Random(2)
    place, source = str(corpus / "tokenizer"), str(corpus / "in")
    words = ["tokenize", "--tokenizer", place, "--in", source, "--out", str(out), "--eos", "--workers", "2"]
    script = (
        "import sys; from longctx.data.tokenizing import partial, units; from longctx.launcher.cli import main\n"
        f"partial.COMMIT_SECONDS = 0; units.UNIT = 2000; sys.exit(main({words!r}))"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for _ in range(3):
        process = subprocess.Popen([sys.executable, "-c", script], env=environment, stderr=subprocess.DEVNULL)
        while process.poll() is None and not partial.PartialFiles(out).note.exists():
            time.sleep(0.001)
        time.sleep(draw.random() * 0.03)
        process.send_signal(signal.SIGKILL)
        process.wait()
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert contents(out) == made[0]
    assert "120 documents" in done.stdout and "data.token_dtype=uint16" in done.stdout


def test_a_worker_that_dies_is_told_and_nothing_is_lost(
    corpus: Path, made: tuple[dict[str, bytes], dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killing(self: Any, *words: Any) -> Any:
        for process in self._started:
            process.kill()
        return encode(self, *words)

    encode = build.EncodingWorkers._encode
    with monkeypatch.context() as patch:
        patch.setattr(build.EncodingWorkers, "_encode", killing)
        with pytest.raises(LongctxError, match=r"a\.jsonl:\d+ and what follows was killed"):
            build.build(job_of(corpus, tmp_path / "x.bin"))
    monkeypatch.setattr(build, "EncodingWorkers", Inline)
    build.build(job_of(corpus, tmp_path / "x.bin"))
    assert contents(tmp_path / "x.bin") == made[0]


def test_what_is_there_is_not_made_again_nor_overwritten(corpus: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(build, "EncodingWorkers", Inline)
    out = tmp_path / "x.bin"
    first, there = build.build(job_of(corpus, out))
    assert not there and build.build(job_of(corpus, out)) == (first, True)
    for changes in ({"policy": Policy()}, {"settings": ("other",)}, {"dtype": "uint32"}):
        with pytest.raises(ConfigError, match=r"x\.bin is there already, and was not made of this text"):
            build.build(job_of(corpus, out, **changes))
    other = tmp_path / "y.bin"
    with partial.claimed(partial.PartialFiles(other)), pytest.raises(StorageError, match="written by another process"):
        build.build(job_of(corpus, other))


def run(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str]:
    status = cli.main(["tokenize", *map(str, words)])
    told = capsys.readouterr()
    return status, told.out + told.err


def test_refusals_name_the_option(corpus: Path, tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(build, "EncodingWorkers", Inline)
    bad = tmp_path / "in"
    bad.mkdir()
    (bad / "a.txt").write_bytes(b"fine")
    (bad / "b.txt").write_bytes(b"not \xff fine")
    (bad / "c.jsonl").write_bytes(b'{"body": "x"}\n')
    place, out = corpus / "tokenizer", tmp_path / "x.bin"

    def refused(code: int, message: str, *words: object, source: Path = corpus / "in", target: Path = out) -> None:
        status, told = run(capsys, "--tokenizer", place, "--in", source, "--out", target, *words)
        assert status == code and message in told, told
        assert not list(tmp_path.glob(".x*")), "nothing is left of what failed"

    refused(65, "b.txt: bad UTF-8 at byte 4: b'\\xff fi'", "--files", "*.txt", source=bad)
    refused(65, "no field 'text' (--text-key)", "--files", "*.jsonl", source=bad)
    refused(65, "nowhere", source=tmp_path / "nowhere")
    refused(78, "x.idx: a token file ends in .bin, its boundaries in .idx; nearest:", target=tmp_path / "x.idx")
    refused(78, "--dtype=uint8", "--dtype", "uint8")
    refused(78, "--workers=0: at least 1", "--workers", 0)
    refused(78, "--format=tokens", "--format", "tokens")
    status, told = run(capsys, "--tokenizer", "bytes", "--in", bad, "--out", out, "--files", "*.txt", "--json")
    assert status == 0 and json.loads(told)["read"]["noted"] == {"texts that are not UTF-8": 1}
    assert bytes(opened(out).tokens.astype(np.uint8)) == b"finenot \xff fine"
    status, told = run(capsys, "--tokenizer", "bytes", "--in", bad, "--out", tmp_path / "y.bin", "--eos")
    assert status == 78 and "--eos --no-bos" not in told and "bytes have no special tokens" in told


def without_regex() -> Any:
    """A tokenizer that merges over the whole text, as those made of SentencePiece do."""
    library = tokenizers.Tokenizer(tokenizers.models.BPE(byte_fallback=True, unk_token="<0x00>"))
    library.normalizer = tokenizers.normalizers.Replace(" ", "▁")
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=700, special_tokens=[f"<0x{byte:02X}>" for byte in range(256)], show_progress=False
    )
    library.train_from_iterator([(ROOT / "docs/data.md").read_text(encoding="utf-8")], trainer)
    return library


@pytest.fixture(scope="module")
def libraries() -> list[Any]:
    spaces = parts_of()
    spaces["pre_tokenizer"]["add_prefix_space"] = True
    return [
        tokenizers.Tokenizer.from_str(trained()),
        tokenizers.Tokenizer.from_str(json.dumps(spaces)),
        without_regex(),
    ]


words = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
    st.sampled_from(
        ["the rows of a file ", "data.path=", "\n\n", " " * 30, "tokens" * 9, "尺八", "a" * 40, "12345" * 5]
    ),
)


@given(st.lists(words, min_size=20, max_size=60).map("".join))
def test_a_long_text_in_pieces_has_the_ids_of_the_whole(libraries: list[Any], text: str) -> None:
    for library in libraries:
        found = encode_long(library, text, piece=150, overlap=70)
        if found is not None:
            assert found.tolist() == library.encode(text, add_special_tokens=False).ids


def test_pieces_of_real_text_fit_together(libraries: list[Any]) -> None:
    text = "".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md")))
    for library in libraries:
        found = encode_long(library, text, piece=3000, overlap=400)
        assert found is not None
        assert found.tolist() == library.encode(text, add_special_tokens=False).ids


def test_a_document_that_is_longer_than_all_that_may_be_held(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(units, "UNIT", 100)
    monkeypatch.setattr(build, "UNIT", 100)
    for number, size in enumerate((10, 5000, 3, 7000)):
        (tmp_path / f"{number}.txt").write_text("x" * size)
    summary, _ = build.build(Tokenizing(text_files(str(tmp_path), "text"), tmp_path / "out/x.bin", workers=2))
    assert summary["lengths"]["longest"] == 7000 and summary["tokens"] == 12013
    (tmp_path / "empty.jsonl").write_text('{"text": ""}\n')
    with pytest.raises(DataError, match="give no token"):
        build.build(Tokenizing(text_files(str(tmp_path / "empty.jsonl"), "text"), tmp_path / "out/y.bin"))
