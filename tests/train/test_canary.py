"""The canary passes what is right, and no planted mistake gets past it."""

from dataclasses import replace

import pytest
import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import Partial

from longctx.attention import StrategyAttention
from longctx.config import simulated_world_size
from longctx.engines import pipeline as pipeline_engine
from longctx.errors import DataError, NumericsError
from longctx.linear import operator as linear_operator
from longctx.linear import short_convolution
from longctx.mesh import build_mesh
from longctx.parallel import apply, tensor
from longctx.parallel.pipeline import Pipeline
from longctx.sequence import SequencePlan, TileSet
from longctx.sim import Cluster, RankFailed
from longctx.train import batch_sharder as border_module
from longctx.train.canary.check import run_canary
from tests.train.small_run import CPU, small_config


def canary(config):
    torch.manual_seed(1)
    verdict = run_canary(config, build_mesh(config.parallel, "cpu"), CPU)
    return verdict, torch.rand(1).item()


def run(config):
    return Cluster(simulated_world_size(config)).run(canary, config)


RIGHT = [
    {"attention": {"strategy": "local", "layout": None}, "train": {"micro_batch": 2}},
    {"parallel": {"sp": 2}, "attention": {"strategy": "striped", "layout": None, "layout_block": 64}},
    {"parallel": {"dp_shard": 2, "sp": 2}, "attention": {"window": 20}, "train": {"recompute": "full"}},
    {"parallel": {"sp": 5}, "attention": {"layout": "contiguous"}, "train": {"dtype": "float32"}},
    {"parallel": {"sp": 2}, "attention": {"document_mask": False}, "train": {"dtype": "bfloat16"}},
    {"parallel": {"tp": 2, "dp_replicate": 2}, "train": {"dtype": "float32", "recompute": "selective"}},
    {"parallel": {"pp": 2, "sp": 2}, "train": {"micro_batch": 1}},
    {"parallel": {"pp": 2, "pp_schedule": "zbv"}, "model": {"layers": 4}, "train": {"dtype": "bfloat16"}},
    {"parallel": {"sp": 2}, "train": {"recompute": "full", "mlp_chunk": 4096, "offload": True}},
    {"parallel": {"sp": 2}, "attention": {"strategy": "disaggregated", "ping_pong": True}, "train": {"micro_batch": 2}},
    {
        "parallel": {"pp": 2, "sp": 2, "pp_schedule": "gpipe"},
        "model": {"layers": 3},
        "attention": {"strategy": "disaggregated", "layout": None, "server_pool": "pipeline"},
        "train": {"dtype": "bfloat16", "recompute": "selective", "offload": True},
    },
    {
        "parallel": {"sp": 2, "tp": 2},
        "model": {"pattern": "LS", "mixer": "gated_deltanet"},
        "train": {"dtype": "float32"},
    },
    {
        "parallel": {"sp": 3},
        "model": {"pattern": "L", "mixer": "moba", "mixer_block": 512, "mixer_top_k": 2},
        "attention": {"strategy": "lasp2"},
    },
]


@pytest.mark.parametrize("sections", RIGHT, ids=str)
def test_what_is_right_passes_and_random_numbers_go_on(tmp_path, sections):
    results = run(small_config(tmp_path, **sections))
    torch.manual_seed(1)
    assert all(drawn == torch.rand(1, generator=torch.Generator().manual_seed(1)).item() for _, drawn in results)
    assert len({str({**verdict, "seconds": 0}) for verdict, _ in results}) == 1
    verdict = results[0][0]
    assert verdict["passed"] and verdict["error"] <= verdict["tolerance"] / 1.5
    assert verdict["gradient_scale"] == pytest.approx(1.0, abs=verdict["tolerance"])


def averaged_gradients(patch):
    patch.setattr(FSDPModule, "set_gradient_divide_factor", lambda self, factor: None)


def dropped_tiles(patch):
    right = SequencePlan.packed_tiles

    def without(plan: SequencePlan, q_rank, k_rank, rows) -> tuple[TileSet, ...]:
        return () if (q_rank, k_rank) == (1, 0) else right(plan, q_rank, k_rank, rows)

    patch.setattr(SequencePlan, "packed_tiles", without)


def wrong_scale(patch):
    right = StrategyAttention.start

    def start(self, q, k, v, plan):
        self._scale = 1.25 * q.shape[-1] ** -0.5
        return right(self, q, k, v, plan)

    patch.setattr(StrategyAttention, "start", start)


def window_off_by_one(patch):
    right = border_module.mask_of

    def mask_of(config):
        mask = right(config)
        return replace(mask, window=mask.window + 1)

    patch.setattr(border_module, "mask_of", mask_of)


def forgotten_documents(patch):
    right = SequencePlan.__init__

    def init(self, documents, *arguments):
        right(self, tuple(type(d).single(d.length) for d in documents), *arguments)

    patch.setattr(SequencePlan, "__init__", init)


def local_mean(patch):
    from longctx.engines.native import NativeEngine

    right = NativeEngine.accumulate

    def accumulate(self, batches, scale):
        valid = sum(batch.valid_tokens for batch in batches)
        return right(self, batches, 1.0 / max(valid, 1))

    patch.setattr(NativeEngine, "accumulate", accumulate)


MISTAKES = [averaged_gradients, dropped_tiles, wrong_scale, window_off_by_one, forgotten_documents, local_mean]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("mistake", MISTAKES)
def test_planted_mistakes_are_caught(tmp_path, monkeypatch, mistake, dtype):
    from longctx.sequence.plan import known_plan

    mistake(monkeypatch)
    known_plan.cache_clear()
    config = small_config(tmp_path, parallel={"sp": 2}, attention={"window": 12}, train={"dtype": dtype})
    try:
        with pytest.raises(RankFailed) as failure:
            run(config)
    finally:
        known_plan.cache_clear()
    error = failure.value.__cause__
    if mistake is forgotten_documents:  # that is seen where the batch is cut, before anything is computed
        assert isinstance(error, DataError) and "the plan of other documents" in str(error)
        return
    assert isinstance(error, NumericsError) and error.exit_code == 70
    assert "canary: " in str(error) and "tolerance" in str(error)


def lost_states(patch):
    right = linear_operator.forward

    def forward(core, tensors, chunks, call, strategy):
        nothing = replace(strategy, enter=lambda summary, call: lambda: torch.zeros_like(summary.states))
        return right(core, tensors, chunks, call, nothing)

    patch.setattr(linear_operator, "forward", forward)


def lost_halos(patch):
    fetch = short_convolution._fetch
    patch.setattr(short_convolution, "_fetch", lambda *given: [torch.zeros_like(rows) for rows in fetch(*given)])


@pytest.mark.parametrize("mistake", [lost_states, lost_halos])
def test_planted_mistakes_of_linear_layers_are_caught(tmp_path, monkeypatch, mistake):
    mistake(monkeypatch)
    model = {"pattern": "LS", "mixer": "gated_deltanet"}
    with pytest.raises(RankFailed, match="canary: "):
        run(small_config(tmp_path, parallel={"sp": 2}, model=model, train={"dtype": "float32"}))


def test_one_plan_for_all_microbatches_of_a_pipeline_is_caught(tmp_path, monkeypatch):
    """What torch does to arguments that are no tensors: every microbatch would get the first one's mask."""
    stack = torch.stack

    def first_one_for_all(given, *options, **named):
        same = [given[0]] * len(given) if given[0].dtype == torch.int64 else given
        return stack(same, *options, **named)

    monkeypatch.setattr(pipeline_engine.torch, "stack", first_one_for_all)
    with pytest.raises(RankFailed, match="canary: "):
        run(small_config(tmp_path, parallel={"pp": 2}))


def test_tied_gradients_that_are_not_summed_are_caught(tmp_path, monkeypatch):
    monkeypatch.setattr(Pipeline, "sum_tied_gradients", lambda self, group: None)
    with pytest.raises(RankFailed, match=r"canary: embedding\.weight differs"):
        run(small_config(tmp_path, parallel={"pp": 2}))


def test_a_mean_in_place_of_a_sum_shows_as_the_gradient_scale(tmp_path, monkeypatch):
    averaged_gradients(monkeypatch)
    with pytest.raises(RankFailed, match=r"gradient scale 0\.5000"):
        run(small_config(tmp_path, parallel={"sp": 2}))


def test_gradients_of_shared_heads_that_are_not_summed_are_caught(tmp_path, monkeypatch):
    def project(module, rows, x):
        return torch.nn.functional.linear(x.to_local(grad_placements=[Partial()]), module.weight.to_local()[rows])

    monkeypatch.setattr(tensor, "_project_rows", project)
    with pytest.raises(RankFailed, match=r"blocks\.0\.[kv]\.weight differs .* tp=4"):
        run(small_config(tmp_path, parallel={"tp": 4}))


def test_compile_is_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(apply, "compile_blocks", lambda model: pytest.fail("compiled"))
    run(small_config(tmp_path, train={"compile": True}))
