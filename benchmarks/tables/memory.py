"""Measures the table of docs/memory.md: peak bytes of one training step by category, adding one memory lever at a time.

One rank, made-up tokens: ``python -m benchmarks.tables.memory``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from longctx.config import AttentionConfig, Config, ModelConfig, ParallelConfig, TrainConfig
from longctx.engines import engine_of
from longctx.launcher.build import build_model
from longctx.mesh import build_mesh
from longctx.parallel.pipeline import decoders
from longctx.reporting.memory import CATEGORIES, StepMemory
from longctx.sequence import Batch, Documents
from longctx.sim import Cluster
from longctx.train.batch_sharder import BatchSharder
from longctx.train.optimizer import build_optimizer
from longctx.train.step import TrainStep

CPU = torch.device("cpu")
# Each row adds to what the rows before it have set.
ROWS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("nothing", {}),
    ("recompute=full", {"recompute": "full"}),
    ("loss_chunk=256", {"loss_chunk": 256}),
    ("mlp_chunk=256", {"mlp_chunk": 256}),
    ("recompute_keep=[attention_half]", {"recompute_keep": ("attention_half",)}),
    ("recompute_keep=[]", {"recompute_keep": ()}),
    ("recompute_keep=null offload=true", {"recompute_keep": None, "offload": True}),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table as Markdown."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tables.memory", description=__doc__)
    for name, default in (("seq", 4096), ("dim", 256), ("hidden", 768), ("layers", 4), ("vocab", 8192)):
        parser.add_argument(f"--{name}", type=int, default=default)
    arguments = parser.parse_args(argv)
    model = ModelConfig(
        vocab_size=arguments.vocab,
        dim=arguments.dim,
        layers=arguments.layers,
        heads=arguments.dim // 64,
        kv_heads=arguments.dim // 64,
        head_dim=64,
        hidden_dim=arguments.hidden,
    )
    config = Config(model, AttentionConfig(strategy="local"), ParallelConfig(dp_shard=1), train=TrainConfig())
    print(f"| MiB | peak | {' | '.join(CATEGORIES)} |\n|---|---{'|---' * len(CATEGORIES)}|")
    train = config.train
    for name, levers in ROWS:
        train = replace(train, **levers)
        found: dict[str, int] = Cluster(1).run(measure, replace(config, train=train), arguments.seq)[0]
        cells = (f"{found[key] / 2**20:.0f}" for key in ("peak", *CATEGORIES))
        print(f"| {name} | {' | '.join(cells)} |", flush=True)
    return 0


def measure(config: Config, length: int) -> dict[str, int]:
    """Measures bytes by category at the peak of the second step."""
    mesh = build_mesh(config.parallel, CPU.type)
    model = build_model(config, mesh, CPU)
    optimizer = build_optimizer(model, config.optim)
    step = TrainStep(engine_of(model, optimizer, config, mesh), mesh, CPU, config.optim.grad_clip)
    border = BatchSharder.of(config, mesh, CPU)
    # The first makes the optimizer's state, for which a few tokens do.
    step([border(_batch(config, min(length, 64)))], config.optim.lr, 1)
    local = [border(_batch(config, length))]
    with StepMemory(decoders(model), optimizer, CPU).measured(step) as found:
        step(local, config.optim.lr, 2)
    return found


def _batch(config: Config, length: int) -> Batch:
    tokens = torch.randint(config.model.vocab_size, (1, length + 1), generator=torch.Generator().manual_seed(0))
    return Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), (Documents.single(length),))


if __name__ == "__main__":
    sys.exit(main())
