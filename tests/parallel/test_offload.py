"""What recompute keeps goes to host memory and comes back the same, each storage once, into buffers used again."""

import gc

import pytest
import torch

from longctx.parallel.host_memory import HostMemory, host_buffers
from tests.parallel import small_decoder
from tests.parallel.small_decoder import CPU, Outcome, config_of, on_sim, worst

KEEPS = [("attention",), (), ("attention", "products", "collectives")]


@pytest.fixture(scope="module")
def single() -> Outcome:
    return on_sim(config_of())[0]


@pytest.mark.parametrize("degrees", [{}, {"sp": 2}, {"tp": 2}, {"dp_shard": 2, "tp": 2}], ids=str)
@pytest.mark.parametrize("keep", KEEPS, ids=str)
def test_offload_is_exact_and_sends_nothing_again(single, degrees, keep):
    levers = {"recompute": "full", "recompute_keep": keep, "mlp_chunk": 6}
    found, cluster = on_sim(config_of(**degrees, **levers, offload=True))
    assert found.loss == pytest.approx(single.loss, rel=1e-13)
    assert worst(found, single) < 1e-12
    _, without = on_sim(config_of(**degrees, **levers))
    assert cluster.ledger.by_operation() == without.ledger.by_operation()


def test_buffers_hold_inputs_and_attention_and_are_used_again(monkeypatch):
    """Two micro-batches of two layers: x [31, 16] and out [31, 2, 8] of each layer, and no buffer for the second."""
    models = []
    real = small_decoder.parallelize

    def remembered(model, *rest):
        models.append(model)
        return real(model, *rest)

    monkeypatch.setattr(small_decoder, "parallelize", remembered)
    on_sim(config_of(recompute="full", offload=True))
    (model,) = models
    assert [buffer.numel() for buffer in host_buffers(model)] == [31 * 16 * 8] * 4


def test_a_storage_goes_once_and_views_come_back_as_they_were():
    memory = HostMemory(CPU)
    stay = memory.enter_block()
    whole = torch.randn(40, 30)
    packed = [memory.pack(stay, view) for view in (whole, whole.t(), whole[5:35])]
    assert len(memory.buffers) == 1
    for view, away in zip((whole, whole.t(), whole[5:35]), packed, strict=True):
        back = memory.unpack(away)
        assert torch.equal(back, view) and back.stride() == view.stride()
        assert back.untyped_storage()._cdata != whole.untyped_storage()._cdata
    del packed, away, view
    gc.collect()
    assert memory.pack(stay, torch.randn(30, 40)) is not None and len(memory.buffers) == 1


def test_parameters_small_tensors_and_small_views_stay():
    memory = HostMemory(CPU)
    stay = memory.enter_block()
    for tensor in (torch.nn.Parameter(torch.zeros(1000)), torch.zeros(3), torch.zeros(1000)[:400]):
        assert memory.pack(stay, tensor) is tensor
    assert not memory.buffers


def test_a_block_comes_back_one_ahead():
    memory = HostMemory(CPU)
    packed = [memory.pack(memory.enter_block(), torch.full((1000,), float(number))) for number in range(3)]
    assert memory.unpack(packed[2])[0] == 2
    assert [bool(p.storage.incoming) for p in packed] == [False, True, False]
    assert memory.unpack(packed[1])[0] == 1
    assert [bool(p.storage.incoming) for p in packed] == [True, False, False]
