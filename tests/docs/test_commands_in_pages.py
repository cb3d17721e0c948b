"""Every command that README and the site show can be typed as it stands: options parse, configurations compose."""

from __future__ import annotations

import argparse
import importlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

import benchmarks.__main__ as benchmarks
from longctx.config import Config, resolve, simulated_world_size
from longctx.errors import ConfigError
from longctx.launcher import build
from longctx.launcher.cli import COMMANDS, parser_of
from longctx.launcher.commands import submit, verify
from longctx.launcher.compose import compose
from longctx.launcher.hydra import flags
from longctx.launcher.resuming import spelled_out

ROOT = Path(__file__).parents[2]
PAGES = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md")))
BLOCK = re.compile(r"^ *```\w*\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
STARTS = ("longctx ", "torchrun ", "srun longctx ", "python -m benchmarks", "make ")
INLINE = re.compile(r"`((?:longctx|python -m benchmarks|make) [^`\n]*)`")


def shown(page: Path) -> Iterator[str]:
    """Each command line of a page, from its code blocks and from single words of code in its text."""
    text = page.read_text(encoding="utf-8")
    for block in BLOCK.findall(text):
        yield from re.sub(r"\\\n\s*", "", block).splitlines()
    yield from INLINE.findall(BLOCK.sub("", text))
    yield from re.findall(r"^    (longctx .*)$", text, re.MULTILINE)


def commands(first: str) -> list[pytest.param]:
    """Those that begin with ``first``; words in capitals stand for the reader's own, so such a line is a form."""
    lines = [(page.name, line) for page in PAGES for line in shown(page)]
    lines += [(f"longctx {command.name} --help", line) for command in COMMANDS for line in command.examples]
    found = {}
    for place, line in lines:
        words = started_by_hand(shlex.split(line, comments=True)) if line.startswith(STARTS) else []
        text = " ".join(words)
        if text.startswith(first) and "…" not in line and not any(word.isupper() and len(word) > 2 for word in words):
            found.setdefault(text, pytest.param(words, id=f"{place}: {text}"))
    return list(found.values())


def started_by_hand(words: list[str]) -> list[str]:
    """What a line of torchrun or srun starts, as ``longctx launch`` or as the command itself."""
    if words[0] == "srun":
        return words[1:]
    if words[0] != "torchrun":
        return words
    module = words.index("-m") + 1
    if words[module] == "longctx.train":
        return ["longctx", "launch", "--nproc", words[words.index("--nproc-per-node") + 1], *words[module + 1 :]]
    assert words[module] == "longctx.launcher.cli"
    return ["longctx", *words[module + 1 :]]


def parsed(words: list[str]) -> argparse.Namespace:
    [command] = [one for one in COMMANDS if words[1 : 1 + len(one.name.split())] == one.name.split()]
    parser = parser_of(command)
    importlib.import_module(command.module).add_arguments(parser)
    arguments = parser.parse_intermixed_args(spelled_out(words[1 + len(command.name.split()) :]))
    if command.overrides:
        arguments.overrides = flags.with_own_folder(arguments)
    return arguments


@pytest.fixture(scope="module")
def readers_folder(tmp_path_factory) -> Path:
    """A folder with the files of the reader's own that pages name."""
    folder = tmp_path_factory.mktemp("reader")
    for name, text in {
        "own/model/mine.yaml": "dim: 64\n",
        "own/recipe/long.yaml": "# @package _global_\ndata:\n  seq_len: 4096\n",
        "try.yaml": "train:\n  seed: 1\n",
        "models/llama/config.json": (ROOT / "tests/huggingface/fixtures/llama-tiny/config.json").read_text(),
        "models/qwen3.5/config.json": (ROOT / "tests/huggingface/fixtures/qwen3.5-tiny/config.json").read_text(),
        "runs/imported/config.yaml": yaml.safe_dump(Config().to_dict()),
        "runs/mine/config.yaml": yaml.safe_dump(Config().to_dict()),
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    return folder


@pytest.mark.parametrize("words", commands("longctx "))
def test_a_command_of_longctx_parses_and_composes(words, readers_folder, monkeypatch):
    monkeypatch.chdir(readers_folder)
    arguments = parsed(words)
    if words[1] == "submit":
        submit.prepare(compose(arguments.overrides))
    elif words[1] == "verify" and not (arguments.mesh or arguments.hf):
        assert not arguments.overrides
    elif "overrides" in vars(arguments):
        config = compose(arguments.overrides)
        sim = config.comm.backend == "sim" or words[1] in ("verify", "bench", "generate")
        world = simulated_world_size(config) if sim else getattr(arguments, "nproc", 1)
        build.preflight_attention(resolve(config, world))


@pytest.mark.parametrize("words", commands("python -m benchmarks"))
def test_a_benchmark_parses(words, monkeypatch):
    if words[2] != "benchmarks":
        assert importlib.util.find_spec(words[2])
        return
    called = []
    module = importlib.import_module(f"benchmarks.commands.{words[3]}")
    monkeypatch.setattr(module, "run", lambda arguments: called.append(arguments) or 0)
    assert benchmarks.main(words[3:]) == 0
    fixed = ["train.recompute=full"] if words[3] == "context" else []
    compose([*fixed, *getattr(called[0], "overrides", [])])


@pytest.mark.parametrize("words", commands("make "))
def test_a_target_of_make_exists(words):
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in words[1:]:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_every_example_of_the_help_is_among_them():
    tested = {" ".join(parameter.values[0]) for parameter in commands("longctx ")}
    examples = [example for command in COMMANDS for example in command.examples]
    assert [one for one in examples if " ".join(started_by_hand(shlex.split(one))) not in tested] == []


def test_commands_are_found_and_a_wrong_one_would_be_seen():
    assert len(commands("longctx ")) > 30 and commands("make ") and commands("python -m benchmarks")
    with pytest.raises(ConfigError, match="did you mean"):
        compose(parsed(["longctx", "train", "parallel.spp=2"]).overrides)
    assert vars(parsed(["longctx", "verify"])).keys() >= verify.CASE.keys()
