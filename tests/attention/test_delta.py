"""The surrogate for an output that was not sent: the same delta, hence the same gradients, from every kernel."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from longctx.attention.runtime.delta import delta_of, surrogate_out
from longctx.attention.runtime.partial import Partial, accumulation_dtype
from longctx.kernels.dense import Dense
from longctx.kernels.flash_cpu import FlashCpu
from longctx.sequence import Tile, TileSet
from tests.kernels.tile_cases import tensors

EPSILON = {torch.float64: 2**-50, torch.float32: 2**-21, torch.bfloat16: 2**-8}


@given(st.integers(-140, 30), st.integers(-60, 60), st.integers(1, 129), st.sampled_from(tuple(EPSILON)))
def test_it_has_the_delta_of_the_output_and_is_no_longer(small, large, dim, dtype):
    """Whatever their sizes are, to the rounding of one number."""
    generator = torch.Generator().manual_seed(dim)
    dout, out = (torch.randn(2, 3, 4, dim, generator=generator, dtype=torch.float64) for _ in range(2))
    dout, out = (dout * 2.0**small).to(dtype), (out * 2.0**large).to(dtype)
    dout[0, 1] = 0
    delta = delta_of(dout, out)
    instead = surrogate_out(dout, delta)
    assert instead.dtype == dtype and delta.dtype == accumulation_dtype(dtype)
    assert not instead.isnan().any() and not instead[0, 1].any()
    normal = dout.abs().amax(-1) > 2.0**-120
    wrong = ((dout.double() * instead.double()).sum(-1) - delta.double()).abs()
    assert (wrong <= EPSILON[dtype] * delta.double().abs() + 1e-37)[normal].all()
    # Products under the smallest normal number of fp32 are rounded to multiples of 2^-149, and delta is their sum.
    rounding = dim * 2.0**-149 / dout.double().norm(dim=-1)
    assert (instead.double().norm(dim=-1) <= out.double().norm(dim=-1) * (1 + EPSILON[dtype]) + rounding)[normal].all()


def test_not_a_number_stays_to_be_noticed():
    dout = torch.ones(1, 1, 1, 4)
    for bad in (torch.nan, torch.inf):
        dout[..., 2] = bad
        assert surrogate_out(dout, delta_of(dout, torch.ones_like(dout))).isnan().any()


@pytest.mark.parametrize("kernel", [Dense(), FlashCpu()], ids=lambda kernel: kernel.name)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 1e-2)]
)
def test_kernels_use_an_output_for_its_delta_alone(kernel, dtype, tolerance):
    whole = tensors(dtype, 2, 40, 48, 4, 2, 16)
    tiles = [TileSet(0, 2, (Tile(0, 40, 0, 48, upper=True),))]
    partial = Partial(whole["q"])
    kernel.forward(whole["q"], whole["k"], whole["v"], tiles, 0.3, partial)
    out = partial.out.to(dtype)
    found = []
    for given_out in (out, surrogate_out(whole["dout"], delta_of(whole["dout"], out))):
        grads = tuple(torch.zeros(whole[n].shape, dtype=partial.out.dtype) for n in "qkv")
        inputs = (whole["dout"], whole["q"], whole["k"], whole["v"], given_out, partial.lse)
        kernel.backward(*inputs, tiles, 0.3, grads)
        found.append(grads)
    for true, instead in zip(*found, strict=True):
        assert (true - instead).norm() <= tolerance * true.norm()
    assert torch.equal(found[0][2], found[1][2]), "dv needs no delta"
