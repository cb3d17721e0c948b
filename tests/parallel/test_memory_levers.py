"""Tiled MLP, recompute by a list of names, offload: none of them changes a number."""

from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from longctx.model import SoftmaxBlock
from longctx.parallel import tiled_mlp
from longctx.sim import Cluster
from tests.parallel import small_decoder
from tests.parallel.small_decoder import MODEL, Outcome, config_of, on_sim, worst
from tests.train.small_run import small_config, train_on_sim

RECOMPUTES = [{}, {"recompute": "full"}, {"recompute": "selective"}, {"recompute": "full", "recompute_keep": ()}]


@pytest.fixture(scope="module")
def single() -> Outcome:
    return on_sim(config_of())[0]


def exact(single: Outcome, **options) -> None:
    found, _ = on_sim(config_of(**options))
    assert found.loss == pytest.approx(single.loss, rel=1e-13)
    assert worst(found, single) < 1e-12


@pytest.mark.parametrize("chunk", [1, 5, 31, 1000])
@pytest.mark.parametrize("recompute", RECOMPUTES, ids=str)
def test_tiles_of_any_size_are_exact(single, chunk, recompute):
    exact(single, mlp_chunk=chunk, **recompute)


@pytest.mark.parametrize("degrees", [{"sp": 2}, {"tp": 2}, {"dp_shard": 2}, {"sp": 2, "tp": 2}], ids=str)
@pytest.mark.parametrize("recompute", RECOMPUTES, ids=str)
def test_tiles_on_meshes(single, degrees, recompute):
    exact(single, mlp_chunk=6, **degrees, **recompute)


@pytest.mark.parametrize(
    ("parallel", "levers"),
    [
        ({"pp": 2}, {"recompute": "full", "offload": True}),
        (
            {"pp": 2, "sp": 2, "pp_schedule": "interleaved_1f1b"},
            {"recompute": "selective", "offload": True, "mlp_chunk": 7},
        ),
    ],
    ids=str,
)
def test_levers_in_the_stages_of_a_pipeline(tmp_path, parallel, levers):
    """Several microbatches are in flight, and come back in the order of the schedule."""

    def run(name, parallel, levers):
        config = small_config(
            tmp_path / name,
            model={"layers": 4},
            data={"seq_len": 37},
            parallel=parallel,
            train={"global_batch": 4, "steps": 3, **levers},
        )
        return [number for step in train_on_sim(config)[0][:3] for number in step[:2]]

    assert run("levers", parallel, levers) == pytest.approx(run("one", {}, {}), rel=1e-9)


class Calls(TorchDispatchMode):
    """Elements that silu computed, its largest call, and how often attention ran forward."""

    def __init__(self):
        super().__init__()
        self.silu, self.largest, self.attention = 0, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.silu.default:
            self.silu += out.numel()
            self.largest = max(self.largest, out.numel())
        self.attention += str(func) == "longctx.ring.default"
        return out


def calls_of(**options) -> Calls:
    def counted(config):
        with Calls() as calls:
            small_decoder.gradients(config)
        return calls

    return Cluster(1).run(counted, config_of(**options))[0]


ONCE = 2 * 2 * 31 * MODEL.hidden_dim  # layers, sequences, tokens


@pytest.mark.parametrize("recompute", RECOMPUTES, ids=str)
def test_an_mlp_in_tiles_is_run_twice_and_never_whole(recompute):
    calls = calls_of(mlp_chunk=4, **recompute)
    assert calls.largest == 4 * MODEL.hidden_dim
    assert calls.silu == 2 * ONCE
    assert calls_of(**recompute).silu == (2 * ONCE if recompute else ONCE)


@pytest.mark.parametrize("recompute", RECOMPUTES, ids=str)
def test_attention_is_run_again_only_where_it_is_not_kept(recompute):
    again = recompute.get("recompute_keep") == ()
    assert calls_of(**recompute).attention == (2 if again else 1) * 2 * 2


def test_attention_that_is_not_kept_sends_again():
    sent = {}
    for keep in (("attention",), ()):
        _, cluster = on_sim(config_of(sp=3, recompute="full", recompute_keep=keep))
        sent[keep] = cluster.ledger.by_operation()["send"]
    assert sent[()] > sent["attention",]


@pytest.mark.parametrize("keep", [("collectives",), ("attention", "collectives"), ("products",)], ids=str)
def test_any_list_of_names_is_exact(single, keep):
    exact(single, sp=2, tp=2, recompute="full", recompute_keep=keep)


def test_collectives_that_are_kept_are_not_repeated():
    sent = {}
    for keep in (("attention",), ("attention", "collectives")):
        _, cluster = on_sim(config_of(tp=2, recompute="full", recompute_keep=keep))
        sent[keep] = sum(cluster.ledger.by_operation().values())
    _, cluster = on_sim(config_of(tp=2))
    assert sent["attention", "collectives"] == sum(cluster.ledger.by_operation().values()) < sent["attention",]


def test_sums_over_tiles_are_wide():
    """Two hundred tiles of bf16: gradients as good as those of one tile."""
    torch.manual_seed(0)
    found = {}
    for tokens in (1, 200):
        block = SoftmaxBlock(replace(MODEL, hidden_dim=8)).bfloat16()
        torch.nn.init.constant_(block.mlp_norm.weight, 1.0)
        for name in ("gate", "up", "mlp_out"):
            generator = torch.Generator().manual_seed(1)
            torch.nn.init.normal_(getattr(block, name).weight, generator=generator)
        x = torch.ones(1, 200, MODEL.dim, dtype=torch.bfloat16)
        _, gradients = tiled_mlp.TiledMlp(block, tokens).backward(x, torch.ones_like(x))
        found[tokens] = gradients
    for narrow, whole in zip(found[1], found[200], strict=True):
        assert narrow.dtype == torch.bfloat16
        assert (narrow - whole).norm() <= 1e-2 * whole.norm()
