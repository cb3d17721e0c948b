"""The reference of commands and of configuration keys, written from the code itself when the site is built."""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import re
from dataclasses import fields, is_dataclass
from typing import Any

from longctx.config import Config
from longctx.config.parsing import key_of
from longctx.launcher.cli import COMMANDS, parser_of
from longctx.launcher.hydra.groups import groups


def commands() -> str:
    """The page of commands as Markdown: what ``longctx COMMAND --help`` prints."""
    lines = ["# Commands", "", "What `longctx COMMAND --help` prints, one section a command."]
    for command in COMMANDS:
        parser = parser_of(command)
        importlib.import_module(command.module).add_arguments(parser)
        # The width of a terminal must not decide what the page says.
        parser.formatter_class = lambda prog: argparse.RawDescriptionHelpFormatter(prog, width=100)
        lines += ["", f"## longctx {command.name}", "", "```text", parser.format_help().rstrip(), "```"]
    return "\n".join(lines) + "\n"


def configuration() -> str:
    """The page of configuration keys as Markdown: every key with its type, default and remark."""
    lines = ["# Configuration", "", "Every key is set by `section.key=value` on the command line.", ""]
    lines += ["## Options of each group", "", "An option is chosen by `group=option`.", ""]
    lines += [f"- `{group}`: {', '.join(f'`{option}`' for option in options)}" for group, options in groups().items()]
    config = Config()
    for section in fields(config):
        lines += ["", f"## {section.name}", "", *_section(section.name, getattr(config, section.name))]
    return "\n".join(lines) + "\n"


def _section(name: str, values: Any) -> list[str]:
    source = "".join(inspect.getsource(one) for one in type(values).__mro__ if one is not object)
    remarks = dict(re.findall(r"^    (\w+): .*?  # (.*)$", source, re.MULTILINE))
    lines = [f"{type(values).__doc__}", "", "| key | type | default | |", "|---|---|---|---|"]
    inner: list[str] = []
    for field in fields(values):
        if is_dataclass(getattr(values, field.name)):
            path = f"{name}.{field.name}"
            inner += ["", f"### {path}", "", *_section(path, getattr(values, field.name))]
            continue
        default = json.dumps(getattr(values, field.name)).strip('"')
        cells = (f"`{name}.{key_of(field.name)}`", str(field.type), default, remarks.get(field.name, ""))
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return lines + inner
