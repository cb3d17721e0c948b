"""Every command that README and the site show can be typed as it stands: options parse, configurations compose."""

from __future__ import annotations

import argparse
import importlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

import benchmarks.__main__ as benchmarks
from longctx.config import resolve, simulated_world_size
from longctx.errors import ConfigError
from longctx.launcher import build
from longctx.launcher.cli import COMMANDS, parser_of
from longctx.launcher.commands import submit, verify
from longctx.launcher.compose import compose

ROOT = Path(__file__).parents[2]
PAGES = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md")))
BLOCK = re.compile(r"^ *```\w*\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
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
    found = {}
    for page in PAGES:
        for line in shown(page):
            words = shlex.split(line, comments=True) if line.startswith(first) else []
            if words and "…" not in line and not any(word.isupper() and len(word) > 2 for word in words):
                found[" ".join(words)] = pytest.param(words, id=f"{page.name}: {' '.join(words)}")
    return list(found.values())


def parsed(words: list[str]) -> argparse.Namespace:
    [command] = [command for command in COMMANDS if command.name == words[1]]
    parser = parser_of(command)
    importlib.import_module(command.module).add_arguments(parser)
    return parser.parse_intermixed_args(words[2:])


@pytest.mark.parametrize("words", commands("longctx "))
def test_a_command_of_longctx_parses_and_composes(words):
    arguments = parsed(words)
    if words[1] == "submit":
        submit.prepare(compose(arguments.overrides))
    elif words[1] == "verify" and not arguments.mesh:
        assert not arguments.overrides
    elif "overrides" in vars(arguments):
        config = compose(arguments.overrides)
        sim = config.comm.backend == "sim" or words[1] in ("verify", "bench")
        world = simulated_world_size(config) if sim else getattr(arguments, "nproc", 1)
        build.preflight_attention(resolve(config, world))


@pytest.mark.parametrize("words", commands("python -m benchmarks"))
def test_a_benchmark_parses(words):
    module = words[2]
    if module != "benchmarks":
        assert importlib.util.find_spec(module)
        return
    parser = argparse.ArgumentParser(allow_abbrev=False)
    benchmarks.add_arguments(parser)
    arguments = parser.parse_intermixed_args(words[3:])
    assert arguments.bench in benchmarks.BENCHES
    compose(arguments.overrides)


@pytest.mark.parametrize("words", commands("make "))
def test_a_target_of_make_exists(words):
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in words[1:]:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_commands_are_found_and_a_wrong_one_would_be_seen():
    assert len(commands("longctx ")) > 30 and commands("make ") and commands("python -m benchmarks")
    with pytest.raises(ConfigError, match="nearest valid"):
        compose(parsed(["longctx", "train", "parallel.spp=2"]).overrides)
    assert vars(parsed(["longctx", "verify"])).keys() >= verify.CASE.keys()
