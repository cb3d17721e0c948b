"""Lists every named thing of the package, one line each: its name, and where the object behind it is.

This is the only list of these names. The configuration refuses unknown ones by it, the command line shows it, and
Hydra's options come from it. What a name stands for is imported when it is first asked for. So reading a configuration
needs neither torch nor an accelerator. The object says itself what it takes and refuses.
"""

from __future__ import annotations

import importlib
from typing import Any

from longctx.rules import one_of


class Registry(dict[str, str]):
    """Maps names to ``module:attribute``, in the order in which they are shown.

    ``key``: the configuration key that holds such a name, for messages.
    """

    def __init__(self, key: str, lines: dict[str, str]) -> None:
        super().__init__(lines)
        self.key = key

    def load(self, name: str) -> Any:
        """Imports what ``name`` stands for. Raises ``ConfigError`` for an unknown name, with the nearest valid one."""
        self.require(name)
        module, _, attribute = self[name].partition(":")
        return getattr(importlib.import_module(module), attribute)

    def require(self, name: str) -> None:
        """Refuses a name that is not in the registry, without loading anything."""
        one_of(self.key, name, tuple(self))


_STRATEGIES = "longctx.attention.strategies"
_MIXERS = "longctx.linear.mixers"

# Softmax attention over a shared sequence: objects of longctx.attention.runtime.registry.Strategy.
STRATEGIES = Registry(
    "attention.strategy",
    {
        "local": f"{_STRATEGIES}.local:LOCAL",
        "ring": f"{_STRATEGIES}.ring:RING",
        "striped": f"{_STRATEGIES}.ring:STRIPED",
        "burst": f"{_STRATEGIES}.burst:BURST",
        "token_ring": f"{_STRATEGIES}.token_ring:TOKEN_RING",
        "ulysses": f"{_STRATEGIES}.ulysses:ULYSSES",
        "usp": f"{_STRATEGIES}.usp:USP",
        "gather": f"{_STRATEGIES}.gather:GATHER",
        "tree": f"{_STRATEGIES}.tree:TREE",
        "rsa": f"{_STRATEGIES}.rsa:RSA",
        "disaggregated": f"{_STRATEGIES}.disaggregated.execute:DISAGGREGATED",
        "zeppelin": f"{_STRATEGIES}.disaggregated.execute:ZEPPELIN",
    },
)

# Who moves the states of linear layers: objects of longctx.linear.registry.LinearStrategy. The first is the default.
LINEAR_STRATEGIES = Registry(
    "attention.linear",
    {
        "lasp2": "longctx.linear.strategies.lasp2:LASP2",
        "lasp": "longctx.linear.strategies.lasp:LASP",
        "headwise": "longctx.linear.strategies.headwise:HEADWISE",
    },
)

# What linear layers compute: objects of longctx.linear.mixer.Mixer.
MIXERS = Registry(
    "model.mixer",
    {
        "basic": f"{_MIXERS}.basic:MIXER",
        "retnet": f"{_MIXERS}.retnet:MIXER",
        "lightning": f"{_MIXERS}.lightning:MIXER",
        "simple_gla": f"{_MIXERS}.simple_gla:MIXER",
        "gla": f"{_MIXERS}.gla:MIXER",
        "hgrn2": f"{_MIXERS}.hgrn2:MIXER",
        "gated_deltanet": f"{_MIXERS}.gated_deltanet:MIXER",
        "based": f"{_MIXERS}.based:MIXER",
        "hedgehog": f"{_MIXERS}.hedgehog:MIXER",
        "moba": "longctx.sparse.moba:MIXER",
        "rat": "longctx.sparse.rat:MIXER",
    },
)

# How a sequence is cut: classes that keep longctx.sequence.layout.Layout.
LAYOUTS = Registry(
    "attention.layout",
    {
        "contiguous": "longctx.sequence.layout:Contiguous",
        "zigzag": "longctx.sequence.layout:Zigzag",
        "striped": "longctx.sequence.layout:Striped",
    },
)

# Local attention kernels: classes that keep longctx.attention.runtime.local_kernel.LocalKernel. "auto" takes the first
# that does not refuse the device, dtype and heads.
KERNELS = Registry(
    "attention.kernel",
    {
        "flash_cuda": "longctx.kernels.flash_cuda:FlashCuda",
        "flash_cpu": "longctx.kernels.flash_cpu:FlashCpu",
        "dense": "longctx.kernels.dense:Dense",
    },
)

# Where documents come from: objects of longctx.data.source.Source.
SOURCES = Registry(
    "data.source",
    {
        "python_stdlib": "longctx.data.text:PYTHON_STDLIB",
        "text": "longctx.data.text:TEXT",
        "tokens": "longctx.data.tokens:TOKENS",
        "parquet": "longctx.data.formats.parquet:PARQUET",
        "arrow": "longctx.data.formats.arrow:ARROW",
        "megatron": "longctx.data.formats.megatron:MEGATRON",
        "datatrove": "longctx.data.formats.datatrove:DATATROVE",
        "olmo": "longctx.data.formats.olmo:OLMO",
        "mixture": "longctx.data.mixing.source:MIXTURE",
    },
)

# Who owns the step: objects of longctx.engines.contract.EngineKind.
ENGINES = Registry(
    "engine",
    {
        "native": "longctx.engines.choose:NATIVE",
    },
)

# Functions from a model and its optim section to a torch optimizer.
OPTIMIZERS = Registry(
    "optim.name",
    {
        "adamw": "longctx.train.optimizer:adamw",
    },
)

# What the learning rate does after warm-up: objects of longctx.train.schedules.schedule.Schedule.
SCHEDULES = Registry(
    "optim.schedule",
    {
        "cosine": "longctx.train.schedules.cosine:SCHEDULE",
        "wsd": "longctx.train.schedules.wsd:SCHEDULE",
        "constant": "longctx.train.schedules.constant:SCHEDULE",
    },
)
