"""Tensor parallelism: exact for any head counts, what it sends, and a loss whose logits no rank ever has whole."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from longctx.attention import StrategyAttention
from longctx.mesh import build_mesh
from longctx.model import Decoder, cross_entropy_sum
from longctx.parallel import apply, parallelize
from longctx.parallel.vocabulary import sharded_chunk_loss
from longctx.sequence import IGNORE
from longctx.sim import Cluster
from longctx.train.batch_sharder import BatchSharder
from tests.parallel.small_decoder import CPU, MODEL, batches, config_of, on_sim, worst

GROUPED = replace(MODEL, heads=4, kv_heads=2, head_dim=6, qk_norm=True, tie_embeddings=False)


@pytest.fixture(scope="module")
def single():
    """The gradients of one rank, of each model once."""
    found = {}

    def of(model):
        if model not in found:
            found[model] = on_sim(config_of(model=model))[0]
        return found[model]

    return of


@pytest.mark.parametrize(
    ("model", "mesh"),
    [
        (MODEL, {"tp": 2}),  # one key/value head for two ranks, tied embeddings
        (GROUPED, {"tp": 2}),
        (GROUPED, {"tp": 4}),  # two key/value heads for four ranks
        pytest.param(  # 31 tokens: the last part of the last shard is nothing but padding
            replace(MODEL, heads=6, kv_heads=3, vocab_size=33), {"tp": 3, "sp": 2}, marks=pytest.mark.matrix
        ),
    ],
    ids=["one head", "grouped", "shared heads", "three ranks"],
)
def test_gradients_are_those_of_one_rank(single, model, mesh):
    found, _ = on_sim(config_of(**mesh, model=model))
    assert found.loss == pytest.approx(single(model).loss, rel=1e-13)
    assert worst(found, single(model)) < 1e-12


def test_recompute_repeats_no_attention_and_full_repeats_three_collectives_per_block(single):
    sent = {}
    for recompute in ("selective", "full"):
        found, cluster = on_sim(config_of(tp=2, sp=2, recompute=recompute))
        assert worst(found, single(MODEL)) < 1e-12
        sent[recompute] = cluster.ledger.by_operation(rank=0)
    # A block's input and the sum of attention's output are [1, 16/2, 16] in fp64 here: a rank sends one such
    # part in each of two gathers and one scatter, in two blocks of two micro-batches.
    part, blocks = 8 * 16 * 8, 2 * 2
    assert sent["full"]["send"] == sent["selective"]["send"] > 0
    assert sent["full"]["all_gather"] - sent["selective"]["all_gather"] == 2 * part * blocks
    assert sent["full"]["reduce_scatter"] - sent["selective"]["reduce_scatter"] == part * blocks


@pytest.mark.matrix
def test_a_compiled_block_is_exact(single, monkeypatch):
    compile_blocks = apply.compile_blocks
    monkeypatch.setattr(apply, "compile_blocks", lambda model: compile_blocks(model, "aot_eager"))
    torch._dynamo.reset()
    found, _ = on_sim(config_of(tp=2, recompute="full", compile=True))
    assert worst(found, single(MODEL)) < 1e-12


def test_attention_sees_plain_tensors_of_its_own_heads(monkeypatch):
    seen = []
    start = StrategyAttention.start

    def recording(self, q, k, v, plan):
        seen.append((type(q), q.shape, k.shape, v.shape))
        return start(self, q, k, v, plan)

    def forward(config):
        mesh = build_mesh(config.parallel, "cpu")
        model = parallelize(Decoder(config.model).double(), config, mesh)
        batch = BatchSharder.of(config, mesh, CPU)(batches()[0])
        with torch.no_grad():
            return model(batch.tokens, batch.positions, batch.plan.handle)

    monkeypatch.setattr(StrategyAttention, "start", recording)
    ranks = Cluster(4).run(forward, config_of(tp=4, model=GROUPED))
    # 31 tokens on a shard of 32, a quarter of which lies on each rank between blocks.
    assert set(seen) == {(torch.Tensor, (1, 32, 1, 6), (1, 32, 1, 6), (1, 32, 1, 6))}
    assert all(logits.shape == (1, 32, 32) and torch.equal(logits, ranks[0]) for logits in ranks)


@pytest.mark.parametrize("world", [2, 3])
def test_the_sharded_loss_is_that_of_the_whole_vocabulary(world):
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(11, 5, generator=generator, dtype=torch.float64)
    hidden[4] = torch.inf  # ignored, so it may be anything
    weight = 40 * torch.randn(6 * world, 5, generator=generator, dtype=torch.float64)
    labels = torch.randint(6 * world, (11,), generator=generator)
    labels[[0, 4]] = IGNORE

    def of_rank():
        rank = dist.get_rank()
        own = weight[6 * rank : 6 * rank + 6].clone().requires_grad_()
        local = hidden.clone().requires_grad_()
        loss = cross_entropy_sum(
            local, own, labels, 4, lambda *chunk: sharded_chunk_loss(dist.group.WORLD, rank, *chunk)
        )
        (2 * loss).backward()
        return loss.detach(), local.grad, own.grad

    whole, head = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    expected = cross_entropy_sum(whole, head, labels, 4)
    (2 * expected).backward()
    ranks = Cluster(world).run(of_rank)
    assert all(torch.allclose(rank[0], expected, rtol=1e-13) for rank in ranks)
    rows = labels != IGNORE
    assert torch.allclose(sum(rank[1] for rank in ranks)[rows], whole.grad[rows], rtol=1e-12, atol=1e-12)
    assert torch.allclose(torch.cat([rank[2] for rank in ranks]), head.grad, rtol=1e-12, atol=1e-12, equal_nan=True)
