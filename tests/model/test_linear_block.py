"""A linear layer with heads, norms and a filter of its own, and what is fixed of its heads."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from longctx.config import Config, ModelConfig, simulated_world_size
from longctx.config.sections.linear import LinearConfig
from longctx.launcher import build
from longctx.mesh import build_mesh
from longctx.model import Decoder, LayerFlops, initialize
from longctx.model.norms import PlusOneNorm
from longctx.parallel import parallelize
from longctx.parallel.pipeline import decoders
from longctx.sim import Cluster
from tests.train.small_run import CPU, small_config

SIZES = ModelConfig(
    vocab_size=40, dim=24, layers=2, heads=4, kv_heads=2, head_dim=6, hidden_dim=20, pattern="LS",
    mixer="gated_deltanet", norm="post", norm_plus_one=True, attention_bias="all",
    linear=LinearConfig(key_heads=2, value_heads=6, key_head_dim=5, value_head_dim=3, conv_taps=3, norm="pre"),
)  # fmt: skip


def test_shapes_norms_and_first_values() -> None:
    model = Decoder(SIZES)
    initialize(model, 1)
    linear, softmax = model.layers
    shapes = {name: tuple(p.shape) for name, p in linear.named_parameters()}
    assert shapes["projections.q.weight"] == (10, 24) and shapes["projections.v.weight"] == (18, 24)
    assert shapes["learned.q_conv"] == (2, 5, 3) and shapes["learned.v_conv"] == (6, 3, 3)
    assert shapes["attention_out.weight"] == (24, 18) and "attention_out.bias" not in shapes
    assert "attention_norm.weight" in shapes and "attention_post_norm.weight" not in shapes
    assert isinstance(softmax.attention_post_norm, PlusOneNorm) and softmax.attention_out.bias is not None
    # What is stored whole begins at 1, also where other norms are stored as what they exceed 1 by.
    assert (linear.out_norm.weight == 1).all() and not linear.attention_norm.weight.any()
    rates, steps = linear.learned["A_log"].exp(), torch.nn.functional.softplus(linear.learned["dt_bias"])
    assert ((rates >= 1) & (rates <= 16)).all() and ((steps >= 0.99e-3) & (steps <= 0.101)).all()
    assert linear.learned["q_conv"].abs().max() <= 3**-0.5


def test_flops_are_twice_the_weights_of_matrices() -> None:
    linear, softmax = Decoder(replace(SIZES, output_gate=True)).layers
    flops = LayerFlops.of(replace(SIZES, output_gate=True), 64)
    for block, found in ((linear, flops.linear_weights), (softmax, flops.softmax_weights)):
        assert found == 2 * sum(p.numel() for n, p in block.named_parameters() if n.endswith("weight") and p.ndim == 2)


@pytest.mark.parametrize("parallel", [{}, {"tp": 2}, {"pp": 2}])
@pytest.mark.parametrize("mixer", ["retnet", "lightning"])
def test_what_is_fixed_survives_building_without_storage(mixer: str, parallel: dict[str, int], tmp_path) -> None:  # type: ignore[no-untyped-def]
    config = small_config(
        tmp_path,
        model={"pattern": "LL", "mixer": mixer},
        parallel={**parallel, "pp_schedule": "gpipe"} if "pp" in parallel else parallel,
        attention={"strategy": "lasp2"},
    )

    def compare(config: Config) -> int:
        mesh = build_mesh(config.parallel, "cpu")
        with torch.device("meta"):
            bare = Decoder(config.model).double()
        bare, whole = (decoders(parallelize(one, config, mesh)) for one in (bare, Decoder(config.model).double()))
        count = 0
        for part, expected in zip(bare, whole, strict=True):
            part.make_room(CPU)
            buffers = dict(part.named_buffers())
            for name, value in expected.named_buffers():
                assert torch.equal(buffers[name], value), name
                count += 1
        return count

    world = simulated_world_size(config)
    assert all(Cluster(world).run(build.run_with_nodes, config, compare, config))
