"""A run small enough for many of them: a decoder of two layers on documents that no rank's share fits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from longctx.comm.rank_numbers import gather_numbers
from longctx.config import (
    AttentionConfig,
    CheckpointConfig,
    CommConfig,
    Config,
    DataConfig,
    LoggerConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    RunConfig,
    TrainConfig,
    resolve,
    simulated_world_size,
)
from longctx.data import Corpus
from longctx.launcher import build
from longctx.mesh import build_mesh
from longctx.parallel.pipeline import Pipeline
from longctx.reporting.meter import Meter
from longctx.sim import Cluster
from longctx.train.trainer import Trainer

MODEL = ModelConfig(vocab_size=256, dim=32, layers=2, heads=4, kv_heads=2, head_dim=8, hidden_dim=48, qk_norm=True)
CPU = torch.device("cpu")
# Long ones that span all ranks, and runs of one token each: a rank that holds only those has no valid token.
LENGTHS = [90, *[1] * 34, 7, 23, 1, 64, 3, *[1] * 21, 40, 11]


def corpus() -> Corpus:
    """Documents whose bytes follow one another by a rule with a little noise, so that there is something to learn."""
    generator = np.random.default_rng(7)
    bounds = np.concatenate([[0], np.cumsum(LENGTHS)]).astype(np.int64)
    steps = generator.choice([1, 5], size=int(bounds[-1]), p=[0.9, 0.1])
    tokens = (np.cumsum(steps) % 200).astype(np.uint8)
    return Corpus(tokens, bounds, lambda i: f"document {i}", 256, "small run")


def small_config(directory: Path | str, **sections: dict[str, Any]) -> Config:
    """The default of these tests with fields replaced: ``small_config(path, parallel={"sp": 2})``."""
    config = Config(
        model=MODEL,
        attention=AttentionConfig(strategy="ring", layout="zigzag"),
        parallel=ParallelConfig(dp_shard=1),
        comm=CommConfig(backend="sim"),
        data=DataConfig(seq_len=61),
        optim=OptimConfig(lr=1e-2, warmup_steps=3),
        train=TrainConfig(steps=20, seed=5, dtype="float64", global_batch=2, loss_chunk=9, canary=False),
        checkpoint=CheckpointConfig(at_end=False),
        # Measuring memory costs as much as five steps; tests of it ask for it, and the matrix measures every mesh.
        logger=LoggerConfig(progress=False, wandb="disabled", report=False, memory=False),
        run=RunConfig(dir=str(directory)),
    )
    Path(directory).mkdir(parents=True, exist_ok=True)
    for name, fields in sections.items():
        config = replace(config, **{name: replace(getattr(config, name), **fields)})
    return resolve(config, simulated_world_size(config))


class Recorder:
    """A sink that keeps what it is told."""

    def __init__(self) -> None:
        self.records: list[dict[str, Any]] = []
        self.summary: dict[str, Any] = {}

    def step(self, record: dict[str, Any]) -> None:
        self.records.append(record)

    def close(self, summary: dict[str, Any]) -> None:
        self.summary = summary


def ran(config: Config, source: Corpus, meter: Meter) -> tuple[Trainer, list[dict[str, Any]]]:
    """One rank's trainer at the end of its run, and what it told of each step."""
    trainer = build.build_trainer(config, None, source, meter)
    trainer.sink.close({})
    trainer.sink = recorder = Recorder()
    trainer.run()
    return trainer, recorder.records


def train_rank(config: Config, source: Corpus) -> list[tuple[float, float, float, float]]:
    """What one rank records of each step: loss, gradient norm, learning rate, bytes of attention.

    The last entry holds sums over all weights instead, as a fingerprint.
    """
    meter = Meter(build_mesh(config.parallel, "cpu"), CPU)
    trainer, records = ran(config, source, meter)
    seen = [(r["loss"], r["grad_norm"], r["lr"], float(r["comm_bytes"])) for r in records]
    model = trainer.state.model
    own = model.own_parameters() if isinstance(model, Pipeline) else model.named_parameters()
    weights = [p.full_tensor().detach().double() for _, p in own]  # type: ignore[attr-defined]
    sums = [sum(float(w.sum()) for w in weights), sum(float(w.norm()) for w in weights)]
    total, norms = (sum(column) for column in zip(*gather_numbers(sums, meter.mesh.pipeline_group, CPU)))
    return [*seen, (total, norms, 0.0, 0.0)]


def train_on_sim(config: Config) -> tuple[list[tuple[float, float, float, float]], Cluster]:
    """``train_rank`` of rank 0 in a simulated world, and the world with its ledger."""
    cluster = Cluster(simulated_world_size(config), seed=config.comm.shuffle_seed)
    results = cluster.run(build.run_with_nodes, config, train_rank, config, corpus())
    assert all(result == results[0] for result in results), "ranks disagree about the run"
    return results[0], cluster
