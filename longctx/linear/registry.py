"""What strategies of linear layers exist, and what each of them executes exactly."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

from longctx.errors import ConfigError

MODULES = {"lasp2": "longctx.linear.lasp2"}

def get_linear(name: str) -> Any:
    return importlib.import_module(MODULES[name])
