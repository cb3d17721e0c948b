"""The gated delta rule as released models have it: fewer heads of keys than of values, other filters, other signs."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from longctx.errors import ConfigError
from longctx.linear import HeadDims, LinearAttention, get_mixer
from longctx.sequence import Documents, Mask, make_plan
from longctx.sim import Cluster
from tests.linear.cases import LAYOUTS, TOLERANCE, cut

WIDTHS, KEY_HEADS, VALUE_HEADS, TAPS = HeadDims(5, 3), 2, 6, 7
PACKINGS = {"long": (61, 1, 1, 37), "short": (3, 1, 2), "few": (1, 1)}


def inputs(length: int) -> dict[str, Tensor]:
    mixer, generator = get_mixer("gated_deltanet", conv_taps=TAPS), torch.Generator().manual_seed(length)

    def draw(name: str, *shape: int, batch: tuple[int, ...] = ()) -> Tensor:
        heads = KEY_HEADS if name in mixer.grouped else VALUE_HEADS
        return torch.randn(*batch, heads, *shape, generator=generator, dtype=torch.float64)

    tokens = {name: draw(name, channels, batch=(2, length)) for name, channels in mixer.tokens(WIDTHS).items()}
    return tokens | {name: draw(name, *shape) for name, shape in mixer.parameters(WIDTHS).items()}


def gradients(out: Tensor, leaves: dict[str, Tensor], dout: Tensor) -> dict[str, Tensor]:
    return {
        "out": out.detach(),
        **dict(zip(leaves, torch.autograd.grad(out, list(leaves.values()), dout), strict=True)),
    }


@pytest.mark.parametrize("negative", [False, True])
@pytest.mark.parametrize("packing", PACKINGS)
def test_every_layout_gives_the_recurrence(packing: str, negative: bool) -> None:
    """Filters reach over several ranks, and over none of another document."""
    lengths = PACKINGS[packing]
    mixer = get_mixer("gated_deltanet", conv_taps=TAPS, negative_eigenvalues=negative)
    documents, length = (Documents.from_lengths(lengths),) * 2, sum(lengths)
    whole = {name: value.requires_grad_() for name, value in inputs(length).items()}
    dout = torch.randn(2, length, VALUE_HEADS, WIDTHS.value, dtype=torch.float64)
    expected = gradients(mixer.recurrence(whole, documents), whole, dout)
    by_token = {*mixer.tokens(WIDTHS), "out"}

    def compute(layout: str, world: int) -> dict[str, Tensor]:
        plan = make_plan(documents, Mask(), LAYOUTS[layout], length, world)
        local = {
            name: (cut(value, plan, dist.get_rank()) if name in by_token else value).detach().requires_grad_()
            for name, value in whole.items()
        }
        core = LinearAttention("lasp2", dist.group.WORLD, 5)
        return gradients(mixer.mix(local, core, plan.handle), local, cut(dout, plan, dist.get_rank()))

    for layout, world in (("contiguous", 1), ("contiguous", 4), ("zigzag", 4), ("striped", 3)):
        ranks = Cluster(world).run(compute, layout, world)
        plan = make_plan(documents, Mask(), LAYOUTS[layout], length, world)
        for name, value in expected.items():
            scale = TOLERANCE * (value.norm() + 1e-3 * dout.norm())
            if name not in by_token:
                assert (sum(rank[name] for rank in ranks) - value).norm() <= scale, (layout, world, name)
                continue
            for number, rank in enumerate(ranks):
                where = torch.from_numpy(plan.positions(number))
                assert (rank[name][:, : len(where)] - value[:, where]).norm() <= scale, (layout, world, name)


def test_heads_that_do_not_fit_are_refused() -> None:
    mixer, plan = (
        get_mixer("gated_deltanet"),
        make_plan((Documents.from_lengths((4,)),), Mask(), LAYOUTS["zigzag"], 4, 1),
    )
    given = {name: torch.zeros(1, 4, 3 if name in "qk" else 4, 2) for name in mixer.tokens(WIDTHS)}
    with pytest.raises(ConfigError, match="k, q may have a divisor of the heads"):
        mixer.mix(given, LinearAttention("lasp2"), plan.handle)
