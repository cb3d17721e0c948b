"""``make docs``: the reference of commands and configuration keys, written from the code itself."""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from longctx.config import Config
from longctx.launcher.cli import COMMANDS, parser_of
from longctx.launcher.compose import groups


def reference() -> str:
    """The whole reference as Markdown."""
    return "\n".join([*_commands(), *_configuration()]) + "\n"


def _commands() -> list[str]:
    lines = ["# Reference", "", "Made by `make docs`; do not edit.", "", "## Commands"]
    for command in COMMANDS:
        parser = parser_of(command)
        importlib.import_module(command.module).add_arguments(parser)
        # The width of a terminal must not decide what the file says.
        parser.formatter_class = lambda prog: argparse.RawDescriptionHelpFormatter(prog, width=100)
        lines += [
            "",
            f"### longctx {command.name}",
            "",
            "```text",
            parser.format_help().rstrip(),
            "```",
        ]
    return lines


def _configuration() -> list[str]:
    lines = ["", "## Configuration", "", "Options of each group, chosen by `group=option`:", ""]
    lines += [f"- `{group}`: {', '.join(options)}" for group, options in groups().items()]
    config = Config()
    for section in fields(config):
        lines += ["", f"### {section.name}", "", *_section(section.name, getattr(config, section.name))]
    return lines


def _section(name: str, values: Any) -> list[str]:
    source = "".join(inspect.getsource(one) for one in type(values).__mro__ if one is not object)
    remarks = dict(re.findall(r"^    (\w+): .*?  # (.*)$", source, re.MULTILINE))
    lines = [f"{type(values).__doc__}", "", "| key | type | default | |", "|---|---|---|---|"]
    for field in fields(values):
        default = json.dumps(getattr(values, field.name)).strip('"')
        cells = (f"`{name}.{field.name}`", str(field.type), default, remarks.get(field.name, ""))
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    """Write the reference to the given file."""
    parser = argparse.ArgumentParser(prog="python -m longctx.launcher.reference", description=__doc__)
    parser.add_argument("file", type=Path)
    parser.parse_args(argv).file.write_text(reference(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
