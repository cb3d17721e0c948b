"""A decoder of two layers on any mesh: the gradients of two hard sequences, and how far they are from others."""

from dataclasses import dataclass

import torch

from longctx.config import AttentionConfig, Config, ModelConfig, ParallelConfig, TrainConfig, simulated_world_size
from longctx.engines.native import NativeEngine
from longctx.mesh import build_mesh
from longctx.model import Decoder, initialize
from longctx.parallel import parallelize
from longctx.parallel.data import full_tensor, master_dtype
from longctx.sequence import Batch, Documents
from longctx.sim import Cluster
from longctx.train.batch_sharder import BatchSharder
from longctx.train.optimizer import build_optimizer

MODEL = ModelConfig(vocab_size=32, dim=16, layers=2, heads=2, kv_heads=1, head_dim=8, hidden_dim=24, init_std=0.3)
CPU = torch.device("cpu")


def batches() -> list[Batch]:
    """Two sequences; the first third of the second has no labels at all."""
    generator = torch.Generator().manual_seed(4)
    made = []
    for lengths in ([29, 2], [1, 11, 1, 18]):
        tokens = torch.randint(32, (1, 31), generator=generator)
        labels = torch.randint(32, (1, 31), generator=generator)
        labels[0, 30] = -100
        made.append(Batch(tokens, labels, (Documents.from_lengths(lengths),)))
    made[1].labels[0, :11] = -100
    return made


@dataclass
class Outcome:
    loss: float
    gradients: dict[str, torch.Tensor]


def gradients(config: Config) -> Outcome:
    """Both sequences, each where the mesh puts it; gradients of the global sum."""
    mesh = build_mesh(config.parallel, "cpu")
    model = Decoder(config.model, loss_chunk=7).to(master_dtype(config.train.dtype))
    initialize(model, 0)
    parallelize(model, config, mesh)
    engine = NativeEngine(model, build_optimizer(model, config.optim))
    border = BatchSharder.of(config, mesh, CPU)
    mine = batches()[mesh.data_rank :: mesh.data_size]
    loss = engine.accumulate([border(batch) for batch in mine], 0.5)
    torch.distributed.all_reduce(loss, group=mesh.token_group)
    assert all(p.grad.dtype == p.dtype for p in model.parameters())
    return Outcome(float(loss), {n: full_tensor(p.grad) for n, p in model.named_parameters()})


def config_of(dp_shard=1, sp=1, dp_replicate=1, tp=1, layout="zigzag", model=MODEL, **train) -> Config:
    return Config(
        model=model,
        attention=AttentionConfig(strategy="ring", layout=layout),
        parallel=ParallelConfig(dp_replicate=dp_replicate, dp_shard=dp_shard, sp=sp, tp=tp),
        train=TrainConfig(**{"dtype": "float64", **train}),
    )


def on_sim(config: Config) -> tuple[Outcome, Cluster]:
    cluster = Cluster(simulated_world_size(config))
    return cluster.run(gradients, config)[0], cluster


def worst(found: Outcome, expected: Outcome) -> float:
    assert found.gradients.keys() == expected.gradients.keys()
    return max(float((found.gradients[n] - g).norm() / g.norm()) for n, g in expected.gradients.items())
