"""``longctx tokenize`` turns text into a token file: parallel, resumable, the same to the byte however it was made."""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import time
from pathlib import Path
from typing import Any

from longctx.catalog import SOURCES
from longctx.config import DataConfig
from longctx.data.source import Source
from longctx.data.tokenizer import BYTES, Policy
from longctx.data.tokenizing import summary as summaries
from longctx.data.tokenizing.build import AUTO, Tokenizing, available_cores, build
from longctx.errors import ConfigError, DataError, LongctxError
from longctx.launcher.progress import progress
from longctx.rules import one_of

TEXT = "text"
_PARQUET, _DATASETS = (".parquet", ".pq"), ("state.json", "dataset_dict.json")
# What the keys of a run's configuration are called here, for messages.
_FLAGS = {
    "data.bos=true": "--bos", "data.bos=false": "--no-bos", "data.eos=true": "--eos", "data.eos=false": "--no-eos",
    "data.path": "--in", "data.text_key": "--text-key", "data.files": "--files", "data.tokenizer": "--tokenizer",
    "data.special_tokens": "--special-tokens", "data.bos": "--bos", "data.eos": "--eos",
}  # fmt: skip
_KEY = re.compile("|".join(map(re.escape, _FLAGS)))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--tokenizer", required=True, metavar="DIR", help=f"a folder with tokenizer.json, or that file, or {BYTES}"
    )
    parser.add_argument("--in", dest="source", required=True, metavar="PATH", help="a file or folder of text")
    parser.add_argument("--out", required=True, type=Path, metavar="FILE", help="the token file, X.bin")
    parser.add_argument(
        "--format", help="how the text is kept: a source of data= that holds text; default: by its name"
    )
    parser.add_argument("--text-key", default=DataConfig.text_key, help="field of a line or row that holds the text")
    parser.add_argument("--files", help='patterns of a folder\'s files to read, such as "*.md *.txt"')
    for name in ("bos", "eos"):
        parser.add_argument(
            f"--{name}",
            action=argparse.BooleanOptionalAction,
            default=False,
            help=f"put the tokenizer's {name.upper()} {'before' if name == 'bos' else 'after'} each document",
        )
    parser.add_argument(
        "--special-tokens",
        default=Policy.special_tokens,
        choices=("text", "ids"),
        help="how special tokens that stand written in a text are read; default: text, as any other characters",
    )
    parser.add_argument("--dtype", default=AUTO, help="uint16 or uint32; default: the smaller one that holds the ids")
    parser.add_argument("--workers", type=int, help="processes that tokenize; default: one a core")
    parser.add_argument("--json", action="store_true", help="print the summary as one JSON object")


def run(arguments: argparse.Namespace) -> int:
    """Makes the token file and prints its summary."""
    started = time.monotonic()
    try:
        job = _job(arguments)
        with progress("longctx tokenize") as report:
            summary, there = build(job, report)
    except (ConfigError, DataError) as error:
        raise _in_flags(error) from error
    _tell(arguments, summary, there, time.monotonic() - started)
    return 0


def _job(arguments: argparse.Namespace) -> Tokenizing:
    name = arguments.format or _format_of(Path(arguments.source))
    with_text = [one for one in SOURCES if SOURCES.load(one).texts is not None]
    one_of("--format", name, with_text)
    source: Source = SOURCES.load(name)
    assert source.texts is not None, "it was just chosen for that"
    config = DataConfig(source=name, path=arguments.source, text_key=arguments.text_key, files=arguments.files)
    return Tokenizing(
        texts=source.texts(config),
        out=arguments.out,
        tokenizer=arguments.tokenizer,
        policy=Policy(arguments.bos, arguments.eos, arguments.special_tokens),
        settings=(name, arguments.text_key),
        dtype=arguments.dtype,
        workers=arguments.workers if arguments.workers is not None else available_cores(),
    )


def _format_of(path: Path) -> str:
    """Returns the source that reads a path, by its name and by what a folder of datasets holds; else text."""
    if path.suffix.lower() in _PARQUET:
        return "parquet"
    if any((path / name).is_file() for name in _DATASETS):
        return "arrow"
    with contextlib.suppress(OSError):
        names = [one.suffix.lower() for one in path.iterdir() if not one.name.startswith(".")] if path.is_dir() else []
        if names and all(end in _PARQUET for end in names):
            return "parquet"
    return TEXT


def _in_flags(error: LongctxError) -> LongctxError:
    """Returns the error in the words of this command's options."""
    return type(error)(_KEY.sub(lambda found: _FLAGS[found[0]], str(error)))


def _tell(arguments: argparse.Namespace, summary: dict[str, Any], there: bool, seconds: float) -> None:
    if arguments.json:
        print(json.dumps(summary, ensure_ascii=False))
        return
    from longctx.launcher.tables import print_table

    megabytes = summary["text_bytes"] / 1e6
    how = (
        "was there already, of this very text" if there else f"made in {seconds:.1f} s, {megabytes / seconds:.1f} MB/s"
    )
    print_table(
        f"{arguments.out}: {how}",
        ("tokens of a document", "documents", "tokens", "share of the tokens"),
        summaries.table(summary),
        summaries.lines(summary),
    )
    dtype = summary["dtype"]
    print(f"longctx train data=tokens data.path={arguments.out} data.token_dtype={dtype}")
