"""Adds options that several benchmarks have."""

from __future__ import annotations

import argparse
import subprocess
import sys

from longctx.errors import ConfigError


def add_overrides(parser: argparse.ArgumentParser) -> None:
    """Adds Hydra's overrides, for benchmarks of a whole run."""
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="what differs from conf/train.yaml, as in Hydra"
    )


def add_peer_python(parser: argparse.ArgumentParser) -> None:
    """Adds the interpreter of other packages, for benchmarks that they take part in."""
    parser.add_argument(
        "--peer-python",
        default=sys.executable,
        help="interpreter in which the peers are installed; default: this one",
    )


def require_longctx(python: str) -> None:
    """Refuses an interpreter that cannot import what is compared."""
    if python == sys.executable:
        return
    try:
        subprocess.run([python, "-c", "import longctx"], check=True)
    except (OSError, subprocess.CalledProcessError):
        raise ConfigError(
            f"--peer-python {python} cannot import longctx; install it there, or set PYTHONPATH"
        ) from None
