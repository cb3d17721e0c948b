"""What ``parallelize`` does to a decoder changes neither its numbers nor what attention sends."""

from dataclasses import replace

import pytest
import torch

from longctx.engines import native
from longctx.model import Decoder
from longctx.parallel import apply
from tests.parallel import small_decoder
from tests.parallel.small_decoder import MODEL, Outcome, config_of, on_sim, worst


@pytest.fixture(scope="module")
def single() -> Outcome:
    return on_sim(config_of())[0]


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


def test_replicas_are_reduced_once_a_step(single, monkeypatch):
    """Two micro-batches each, whose gradients do not fit unsharded: shards are reduced twice, replicas once."""
    twice = [*small_decoder.batches(), *small_decoder.batches()]
    monkeypatch.setattr(small_decoder, "batches", lambda: twice)
    sent = {}
    for limit in (0, 2**30):
        monkeypatch.setattr(native, "UNSHARDED_BYTES", limit)
        found, cluster = on_sim(config_of(dp_replicate=2, sp=2, layout="contiguous"))
        assert worst(found, Outcome(0.0, {n: 2 * g for n, g in single.gradients.items()})) < 1e-12
        sent[limit] = cluster.ledger.by_operation(rank=0)
    assert sent[0]["reduce_scatter"] == 2 * sent[2**30]["reduce_scatter"]
    assert sent[0]["all_reduce"] == sent[2**30]["all_reduce"]


def test_what_fits_unsharded_is_gathered_once_a_step(monkeypatch):
    """Two micro-batches. Else each gathers a block for the forward pass and again for the backward pass; the last
    block stays in between, and so does the rest of the model."""
    monkeypatch.setattr(native, "UNSHARDED_BYTES", 0)
    _, cluster = on_sim(config_of(sp=2, recompute="full"))
    model = Decoder(MODEL).double()
    block = sum(p.numel() for p in model.blocks[0].parameters()) * 8
    rest = sum(p.numel() for p in model.parameters()) * 8 - 2 * block
    micro_batches, half = 2, 2  # the other rank sends the other half
    for_gradients = (2 * block + rest) // half  # gathered whole by this test
    gathered = micro_batches * (2 * block + block + rest) // half
    assert cluster.ledger.by_operation(rank=0)["all_gather"] == gathered + for_gradients
    monkeypatch.setattr(native, "UNSHARDED_BYTES", 2**30)
    _, cluster = on_sim(config_of(sp=2, recompute="full"))
    assert cluster.ledger.by_operation(rank=0)["all_gather"] == (2 * block + rest) // half + for_gradients


@pytest.mark.parametrize(
    ("recompute", "strategy"), [("none", "ring"), ("full", "ring"), ("full", "usp"), ("none", "ulysses")]
)
def test_a_compiled_block_is_one_graph_and_exact(single, monkeypatch, recompute, strategy):
    monkeypatch.setattr(
        apply, "compile_blocks", lambda model, compiled=apply.compile_blocks: compiled(model, "aot_eager")
    )
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()

    def over_two_ranks(**train):
        config = config_of(sp=2, **train)
        return replace(config, attention=replace(config.attention, strategy=strategy))

    found, cluster = on_sim(over_two_ranks(recompute=recompute, compile=True))
    assert worst(found, single) < 1e-12
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch._dynamo.utils.counters["graph_break"]
    _, eager = on_sim(over_two_ranks())
    assert cluster.ledger.by_operation() == eager.ledger.by_operation()


def test_an_untied_head_is_whole_only_around_its_loss():
    """The table of the embedding is gathered for the lookup alone, the head from the loss to its gradient."""
    untied = replace(MODEL, tie_embeddings=False)
    single, _ = on_sim(config_of(model=untied))
    found, cluster = on_sim(config_of(sp=2, model=untied))
    assert worst(found, single) < 1e-12
    table = untied.vocab_size * untied.dim * 8
    tied = on_sim(config_of(sp=2))[1].ledger.by_operation(rank=0)["all_gather"]
    # One more table is gathered once a step, as the other one, and once more by this test.
    assert cluster.ledger.by_operation(rank=0)["all_gather"] == tied + 2 * table // 2
