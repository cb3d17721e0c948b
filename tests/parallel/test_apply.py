"""What ``parallelize`` does to a decoder changes neither its numbers nor what attention sends."""

from dataclasses import dataclass

import pytest
import torch

from longctx.config import AttentionConfig, Config, ModelConfig, ParallelConfig, TrainConfig
from longctx.engines import NativeEngine
from longctx.mesh import build_mesh
from longctx.model import Decoder, initialize
from longctx.parallel import apply, parallelize
from longctx.parallel.data import master_dtype
from longctx.sequence import Batch, Documents
from longctx.sim import Cluster
from longctx.train.border import Border
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
    border = Border.of(config, mesh, CPU)
    mine = batches()[mesh.data_rank :: mesh.data_size]
    loss = engine.accumulate([border(batch) for batch in mine], 0.5)
    torch.distributed.all_reduce(loss, group=mesh.token_group)
    assert all(p.grad.dtype == p.dtype for p in model.parameters())
    return Outcome(float(loss), {n: p.grad.full_tensor() for n, p in model.named_parameters()})


def config_of(dp_shard=1, sp=1, dp_replicate=1, layout="zigzag", **train) -> Config:
    return Config(
        model=MODEL,
        attention=AttentionConfig(strategy="ring", layout=layout),
        parallel=ParallelConfig(dp_replicate=dp_replicate, dp_shard=dp_shard, sp=sp),
        train=TrainConfig(**{"dtype": "float64", **train}),
    )


def on_sim(config: Config) -> tuple[Outcome, Cluster]:
    parallel = config.parallel
    cluster = Cluster(parallel.dp_replicate * parallel.dp_shard * parallel.sp)
    return cluster.run(gradients, config)[0], cluster


@pytest.fixture(scope="module")
def single() -> Outcome:
    return on_sim(config_of())[0]


def worst(found: Outcome, expected: Outcome) -> float:
    assert found.gradients.keys() == expected.gradients.keys()
    return max(float((found.gradients[n] - g).norm() / g.norm()) for n, g in expected.gradients.items())


@pytest.mark.parametrize(
    "degrees", [{"dp_shard": 2}, {"sp": 3}, {"dp_replicate": 2}, {"dp_replicate": 2, "sp": 2}], ids=str
)
def test_gradients_are_sums_over_the_mesh(single, degrees):
    found, _ = on_sim(config_of(**degrees, layout="contiguous"))
    assert found.loss == pytest.approx(single.loss, rel=1e-13)
    assert worst(found, single) < 1e-12


def test_bfloat16_keeps_fp32_masters_and_sums(single):
    found, _ = on_sim(config_of(sp=2, dtype="bfloat16"))
    assert worst(found, single) < 5e-2


def test_recompute_neither_changes_gradients_nor_sends_anything_again(single):
    sent = {}
    for recompute in ("none", "selective", "full"):
        found, cluster = on_sim(config_of(sp=3, recompute=recompute))
        assert worst(found, single) < 1e-12
        sent[recompute] = cluster.ledger.by_operation()
    assert sent["none"] == sent["selective"] == sent["full"]
    assert sent["none"]["send"] > 0


def test_each_block_is_gathered_once_forward_and_once_backward_except_the_last():
    """Two micro-batches; the last block stays between forward and backward, so does the rest of the model."""
    _, cluster = on_sim(config_of(sp=2, recompute="full"))
    model = Decoder(MODEL).double()
    block = sum(p.numel() for p in model.blocks[0].parameters()) * 8
    rest = sum(p.numel() for p in model.parameters()) * 8 - 2 * block
    micro_batches, half = 2, 2  # the other rank sends the other half
    for_gradients = (2 * block + rest) // half  # full_tensor() in this test
    gathered = micro_batches * (2 * block + block + rest) // half
    assert cluster.ledger.by_operation(rank=0)["all_gather"] == gathered + for_gradients


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_a_compiled_block_is_one_graph_and_exact(single, monkeypatch, recompute):
    monkeypatch.setattr(
        apply, "compile_blocks", lambda model, compiled=apply.compile_blocks: compiled(model, "aot_eager")
    )
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    found, cluster = on_sim(config_of(sp=2, recompute=recompute, compile=True))
    assert worst(found, single) < 1e-12
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch._dynamo.utils.counters["graph_break"]
    _, eager = on_sim(config_of(sp=2))
    assert cluster.ledger.by_operation() == eager.ledger.by_operation()
