"""What CONTRIBUTING's "Adding things" says, done: one toy of each kind, as new files and lines of existing ones."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

STRATEGY = '''"""A toy: what gather does, with so many key/value heads at one time as the user says."""

import torch
from torch import Tensor

from longctx.attention.runtime.operator import AttentionContext, Saved, define_strategy
from longctx.attention.runtime.registry import Strategy
from longctx.attention.strategies import gather


def _slices(k: Tensor, q: Tensor, context: AttentionContext):
    count, per_key = k.shape[2], q.shape[2] // k.shape[2]
    some = context.options.toy_heads or count
    for first in range(0, count, some):
        keys = slice(first, min(first + some, count))
        yield slice(keys.start * per_key, keys.stop * per_key), keys


def forward(q: Tensor, k: Tensor, v: Tensor, context: AttentionContext) -> tuple[Tensor, Tensor]:
    slices = _slices(k, q, context)
    parts = [gather.forward(q[:, :, own], k[:, :, keys], v[:, :, keys], context) for own, keys in slices]
    out, lse = (torch.cat(tensors, dim=2) for tensors in zip(*parts, strict=True))
    return out, lse


def backward(dout: Tensor, saved: Saved, context: AttentionContext) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v, out, lse = saved
    parts = []
    for own, keys in _slices(k, q, context):
        given = (q[:, :, own], k[:, :, keys], v[:, :, keys], out[:, :, own], lse[:, :, own])
        parts.append(gather.backward(dout[:, :, own], given, context))
    dq, dk, dv = (torch.cat(tensors, dim=2) for tensors in zip(*parts, strict=True))
    return dq, dk, dv


TOY = Strategy("toy", define_strategy("toy", forward, backward), options=frozenset({"toy_heads"}))
'''

LINEAR_STRATEGY = '''"""A toy: the gather of LASP-2, for causal layers."""

from longctx.linear.registry import LinearStrategy, causal_only
from longctx.linear.strategies import lasp2

TOY = LinearStrategy("toy_linear", lasp2.enter, lasp2.leave, "contiguous", causal_only)
'''

MIXER = '''"""A toy: sums of values, weighted by squares of products."""

from collections.abc import Sequence

import torch
from torch import Tensor

from longctx.linear.mixer import (
    Inputs, LinearCore, Mixer, no_constants, no_parameters, nothing_to_fill, plain_tokens, scan_flops,
)
from longctx.linear.reference import decayed_sums
from longctx.sequence import Documents


def mix(x: Inputs, core: LinearCore, plan: Tensor) -> Tensor:
    return core.attend(x["q"].square(), x["k"].square(), x["v"], plan)


def recurrence(x: Inputs, documents: Sequence[Documents]) -> Tensor:
    q, k = x["q"].square(), x["k"].square()
    return decayed_sums(q, k, x["v"], torch.ones_like(q[..., :1]), documents)


MIXER = Mixer(
    "toy_mixer", plain_tokens, no_parameters, no_constants, nothing_to_fill, mix, recurrence, False, scan_flops, "none"
)
'''

LAYOUT = '''"""A toy: consecutive chunks, the last on the first rank."""

from dataclasses import dataclass

import numpy as np

from longctx.sequence.documents import Int64


@dataclass(frozen=True)
class Backwards:
    name = "backwards"

    def positions(self, length: int, world: int, rank: int) -> Int64:
        place = world - 1 - rank
        return np.arange(place * length // world, (place + 1) * length // world, dtype=np.int64)
'''

KERNEL = '''"""A toy: the dense kernel, under another name."""

from longctx.kernels.dense import Dense


class Toy(Dense):
    name = "toy_kernel"
'''

SOURCE = '''"""A toy: a hundred documents of a few bytes each."""

import numpy as np

from longctx.data.corpus import Corpus
from longctx.data.source import Source


def _open(config, vocab_size, verify):
    lengths = 20 + np.arange(config.max_documents or 100) % 7
    tokens = (np.arange(lengths.sum()) % 251).astype(np.uint8)
    bounds = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return Corpus(tokens, bounds, lambda document: f"toy {document}", 256, "toy")


TOY = Source("toy_source", _open, ids=256)
'''

ENGINE = '''"""A toy: the native engine, on one pipeline stage."""

from longctx.engines.contract import EngineKind
from longctx.engines.native import NativeEngine


class ToyEngine(NativeEngine):
    def update(self, lr, coefficient):
        super().update(lr, coefficient)
        print("the toy engine stepped")


def _refuses(config):
    return None if config.parallel.pp == 1 else f"parallel.pp={config.parallel.pp}; nearest valid: parallel.pp=1"


TOY = EngineKind("toy_engine", lambda model, optimizer, config, mesh: ToyEngine(model, optimizer), _refuses)
'''

OPTIMIZER = '''"""A toy: plain gradient descent."""

import torch


def toy_sgd(model, config):
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=config.lr)
'''

SCHEDULE = '''"""A toy: half the rate in every second step."""

from longctx.train.schedules.schedule import Schedule

TOY = Schedule(
    "toy_schedule",
    lambda step, terms: 1.0 if step % 2 else 0.5,
    falls=lambda terms: None,
    settle=lambda decay, steps: (None, steps),
    extends="it goes on as it is",
)
'''

COMMAND = '''"""A toy: says its word."""


def add_arguments(parser):
    parser.add_argument("--word", default="toy")


def run(arguments):
    print(arguments.word)
    return 0
'''

RECIPE = """# @package _global_
# A toy.
defaults:
  - override /attention: toy
  - override /data: toy_source

train:
  steps: 2
"""


@dataclass(frozen=True)
class Extension:
    """One addition. ``files``: new ones. ``lines``: of existing files, after which line comes which."""

    files: dict[str, str] = field(default_factory=dict)
    lines: dict[str, list[tuple[str, str]]] = field(default_factory=dict)

    def apply(self, root: Path) -> None:
        for name, text in self.files.items():
            assert not (root / name).exists(), name
            (root / name).write_text(text, encoding="utf-8")
        for name, additions in self.lines.items():
            text = (root / name).read_text(encoding="utf-8")
            for after, line in additions:
                assert text.count(f"{after}\n") == 1, f"{name} has {text.count(after)} lines {after!r}"
                text = text.replace(f"{after}\n", f"{after}\n{line}\n")
            (root / name).write_text(text, encoding="utf-8")


def catalog(after: str, name: str, where: str) -> dict[str, list[tuple[str, str]]]:
    return {"longctx/catalog.py": [(after, f'        "{name}": "{where}",')]}


EXTENSIONS = {
    "attention option": Extension(
        lines={
            "longctx/options.py": [
                (
                    "    inner_ring: int | None = count()  # ranks of burst's inner ring; null: all, one ring",
                    "    toy_heads: int | None = count()  # key/value heads that toy brings at one time; null: all",
                )
            ]
        }
    ),
    "strategy": Extension(
        {"longctx/attention/strategies/toy.py": STRATEGY},
        catalog('        "rsa": f"{_STRATEGIES}.rsa:RSA",', "toy", "longctx.attention.strategies.toy:TOY"),
    ),
    "linear strategy": Extension(
        {"longctx/linear/strategies/toy.py": LINEAR_STRATEGY},
        catalog(
            '        "headwise": "longctx.linear.strategies.headwise:HEADWISE",',
            "toy_linear",
            "longctx.linear.strategies.toy:TOY",
        ),
    ),
    "mixer": Extension(
        {"longctx/linear/mixers/toy.py": MIXER},
        catalog('        "rat": "longctx.sparse.rat:MIXER",', "toy_mixer", "longctx.linear.mixers.toy:MIXER"),
    ),
    "layout": Extension(
        {"longctx/sequence/backwards.py": LAYOUT},
        catalog(
            '        "striped": "longctx.sequence.layout:Striped",',
            "backwards",
            "longctx.sequence.backwards:Backwards",
        ),
    ),
    "kernel": Extension(
        {"kernels/toy.py": KERNEL},
        catalog('        "dense": "longctx.kernels.dense:Dense",', "toy_kernel", "longctx.kernels.toy:Toy"),
    ),
    "source": Extension(
        {"longctx/data/toy.py": SOURCE},
        catalog('        "tokens": "longctx.data.tokens:TOKENS",', "toy_source", "longctx.data.toy:TOY"),
    ),
    "engine": Extension(
        {"longctx/engines/toy.py": ENGINE},
        catalog('        "native": "longctx.engines.choose:NATIVE",', "toy_engine", "longctx.engines.toy:TOY"),
    ),
    "optimizer": Extension(
        {"longctx/train/toy.py": OPTIMIZER},
        catalog('        "adamw": "longctx.train.optimizer:adamw",', "toy_sgd", "longctx.train.toy:toy_sgd"),
    ),
    "schedule": Extension(
        {"longctx/train/schedules/toy.py": SCHEDULE},
        catalog(
            '        "constant": "longctx.train.schedules.constant:SCHEDULE",',
            "toy_schedule",
            "longctx.train.schedules.toy:TOY",
        ),
    ),
    "model option": Extension(
        lines={
            "longctx/config/sections/model.py": [
                (
                    "    mixer: str | None = None  # what linear layers compute",
                    "    toy_scale: float = 1.0  # of embeddings",
                )
            ],
            "longctx/model/decoder.py": [
                ("            x = self.embedding(x)", "            x = x * self.config.toy_scale")
            ],
        }
    ),
    "recipe": Extension({"conf/recipe/toy.yaml": RECIPE}),
    "command": Extension(
        {"launcher/commands/toy.py": COMMAND},
        {
            "launcher/cli.py": [
                (
                    "COMMANDS = (",
                    '    Command("toy", "say a word", (), "longctx.launcher.commands.toy", overrides=False),',
                )
            ]
        },
    ),
}
