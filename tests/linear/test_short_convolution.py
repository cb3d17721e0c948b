"""Short convolutions over a shared sequence against their definition, halos included."""

import itertools

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from longctx.comm import group_of
from longctx.linear.short_convolution import convolve
from longctx.sequence import Documents, Mask, SequencePlan, halo_of, make_layout, unshard
from longctx.sim import Cluster
from longctx.verify import VerifyCase
from longctx.verify.run import cut, local_inputs

CPU = torch.device("cpu")
HEADS, CHANNELS, WIDTH = 2, 3, 4
WIDTHS = (1, 2)  # of what shares a halo


def halo_rows_sent(plan, rank, reach):
    """Rows that ``rank`` sends forward, and of gradients backward, where it sends those of forward once more."""
    forward = sum(len(halo_of(plan, reader, reach, CPU).rows[rank]) for reader in range(plan.world))
    return forward, halo_of(plan, rank, reach, CPU).length


def definition(x, weight, documents):
    """Token by token, ``[B, S, H, C]``."""
    out = torch.zeros_like(x)
    for row, packed in enumerate(documents):
        for start, stop in itertools.pairwise(packed.cu_seqlens.tolist()):
            for t in range(start, stop):
                for back in range(min(WIDTH, t - start + 1)):
                    out[row, t] = out[row, t] + weight[..., WIDTH - 1 - back] * x[row, t - back]
    return out


def on_ranks(plan, x, weight, dout, dtype=torch.float64):
    def rank_main():
        ranks = group_of(dist.group.WORLD)
        local, upstream = (cut(whole, plan, ranks.rank).to(dtype) for whole in (x, dout))
        taps = weight.clone().to(dtype)
        local.requires_grad_()
        taps.requires_grad_()
        before = ranks.traffic.bytes
        parts = convolve(local.split(WIDTHS, -1), taps.split(WIDTHS, 1), plan.handle, ranks.name)
        out = torch.cat(parts, -1)
        between = ranks.traffic.bytes
        grads = torch.autograd.grad(out, (local, taps), upstream)
        return out.detach(), *grads, (between - before, ranks.traffic.bytes - between)

    return Cluster(plan.world).run(rank_main)


def check(rows, world, layout, block=1, length=None):
    documents = tuple(Documents.from_lengths(lengths) for lengths in rows)
    length = length or max(packed.length for packed in documents)
    plan = SequencePlan(documents, Mask(True, None), make_layout(layout, block), length, world)
    generator = torch.Generator().manual_seed(world)
    x, dout = (
        torch.randn(len(rows), length, HEADS, CHANNELS, generator=generator, dtype=torch.float64) for _ in range(2)
    )
    weight = torch.randn(HEADS, CHANNELS, WIDTH, generator=generator, dtype=torch.float64)
    for row, packed in enumerate(documents):
        dout[row, packed.length :] = 0.0  # nothing is asked of padding
    x.requires_grad_()
    weight.requires_grad_()
    expected = definition(x, weight, documents)
    dx, dweight = torch.autograd.grad(expected, (x, weight), dout)
    found = on_ranks(plan, x.detach(), weight.detach(), dout)
    out = unshard([one[0] for one in found], plan)
    for row, packed in enumerate(documents):
        torch.testing.assert_close(out[row, : packed.length], expected[row, : packed.length], rtol=0, atol=1e-12)
    torch.testing.assert_close(unshard([one[1] for one in found], plan), dx, rtol=0, atol=1e-12)
    torch.testing.assert_close(sum(one[2] for one in found), dweight, rtol=0, atol=1e-11)
    for rank, (*_, sent) in enumerate(found):
        forward, gradients = halo_rows_sent(plan, rank, WIDTH - 1)
        row_bytes = len(rows) * HEADS * CHANNELS * 8
        assert sent == (forward * row_bytes, (forward + gradients) * row_bytes)


@pytest.mark.parametrize("world", [1, 2, 3, 4, 8])
@pytest.mark.parametrize(("layout", "block"), [("contiguous", 1), ("zigzag", 1), ("striped", 1), ("striped", 5)])
def test_every_layout_equals_the_definition(world, layout, block):
    check([[37]], world, layout, block)
    check([[12, 1, 1, 17, 6], [1, 1, 33]], world, layout, block, length=40)


def test_shards_shorter_than_the_reach_and_empty_ranks():
    for length in (1, 2, 3, 5, 9):
        check([[length]], 8, "contiguous")
        check([[1] * length], 4, "zigzag")


@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=6),
    st.integers(1, 5),
    st.sampled_from(["contiguous", "zigzag", "striped"]),
)
def test_any_packing(lengths, world, layout):
    check([lengths], world, layout)


def test_no_row_is_sent_that_no_document_sees():
    plan = SequencePlan((Documents.from_lengths([8, 8]),), Mask(True, None), make_layout("contiguous", 1), 16, 2)
    assert halo_rows_sent(plan, 0, 3) == (0, 0)
    plan = SequencePlan((Documents.from_lengths([9, 7]),), Mask(True, None), make_layout("contiguous", 1), 16, 2)
    assert halo_rows_sent(plan, 0, 3) == (3, 0)


def test_the_operator_keeps_the_rules_of_torch():
    plan = SequencePlan((Documents.single(9),), Mask(True, None), make_layout("contiguous", 1), 9, 1)
    x = torch.randn(1, 9, HEADS, CHANNELS, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(HEADS, CHANNELS, WIDTH, dtype=torch.float64, requires_grad=True)
    given = ([*x.split(WIDTHS, -1)], [*weight.split(WIDTHS, 1)], plan.handle, "")
    torch.library.opcheck(torch.ops.longctx.short_convolution.default, given)


def test_queries_keys_and_values_of_gated_deltanet_share_one_halo():
    case = VerifyCase("lasp2", "contiguous", 2, seq=9, heads=2, kv_heads=2, head_dim=5, mixer="gated_deltanet")

    def rank_main():
        ranks = group_of(dist.group.WORLD)
        plan, x, _ = local_inputs(case, ranks.rank)
        given = [[x[name] for name in "qkv"], [x[f"{name}_conv"] for name in "qkv"]]
        parts = convolve(*given, plan.handle, ranks.name)
        forward = ranks.traffic.messages
        torch.autograd.grad(sum(part.sum() for part in parts), given[0])
        return forward, ranks.traffic.messages - forward

    # The first rank's rows are fetched in either pass, and their gradients come home.
    assert Cluster(2).run(rank_main) == [(1, 1), (0, 1)]
