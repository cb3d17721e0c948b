"""MoBA over a shared sequence against its definition; block-local and dense at its two ends."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longctx.errors import ConfigError
from longctx.linear.mixer import HeadDims
from longctx.sparse import grouped_queries as grouped
from longctx.sparse import moba as module
from longctx.sparse.document_blocks import blocks_of
from longctx.sparse.moba import MIXER, attend_blocks, definition, moba, volume
from tests.equivalence.pairwise import pairwise
from tests.sparse.sparse_cases import LAYOUTS, PACKINGS, WORLDS, check, draw, plan_for, run, whole

HEADS, WIDTH = 2, 4
SIZES = ((4, 1), (4, 2), (4, 3), (3, 4), (1, 3), (16, 2), (64, 2), (5, 40))


def picked_by(plan, q, k, block, top_k):
    """What queries of each rank chose, ``[P, blocks]``, from the definition of the gate."""
    if top_k == 1:
        return None
    blocks = blocks_of(plan.documents, plan.length, block)
    keys = k.flatten(0, 1)
    means = [keys[start:stop].mean(0) for start, stop in zip(blocks.starts, blocks.stops, strict=True)]
    picked = np.zeros((plan.world, len(means)), dtype=bool)
    for rank, (row, packed) in itertools.product(range(plan.world), enumerate(plan.documents)):
        for t in plan.positions(rank)[plan.positions(rank) < packed.length]:
            own = int(blocks.of(np.array([row * plan.length + t]))[0])
            first = int(blocks.first[own])
            for head in range(HEADS):
                scores = [float(q[row, t, head] @ mean[head]) for mean in means[first:own]]
                best = sorted(range(own - first), key=lambda j: (-scores[j], -j))[: top_k - 1]
                picked[rank, [first + j for j in best]] = True
    return picked


def exact(rows, world, layout, layout_block=1, sizes=(4, 2), length=None):
    plan = plan_for(rows, world, layout, layout_block, length)
    *tensors, dout = draw(plan, 3, HEADS, WIDTH)
    sent, ledger = check(
        lambda *local: attend_blocks(*local, *sizes), lambda *asked: definition(*asked, *sizes), plan, tensors, dout
    )
    picked = picked_by(plan, *tensors[:2], *sizes)
    for rank in range(world):
        assert sent[rank] == volume(plan, rank, sizes[0], picked, (HEADS, WIDTH, 8))
        assert ledger[rank] == sum(sent[rank])


AXES = (WORLDS, LAYOUTS, tuple(PACKINGS), SIZES)


@pytest.mark.parametrize(("world", "layout", "packing", "sizes"), pairwise(AXES))
def test_every_layout_equals_the_definition(world, layout, packing, sizes):
    rows, length = PACKINGS[packing]
    exact(rows, world, *layout, sizes, length)


@pytest.mark.matrix
@pytest.mark.parametrize(("world", "layout", "packing", "sizes"), list(itertools.product(*AXES)))
def test_the_whole_product(world, layout, packing, sizes):
    rows, length = PACKINGS[packing]
    exact(rows, world, *layout, sizes, length)


@settings(max_examples=40)
@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=5),
    st.integers(1, 5),
    st.sampled_from(["contiguous", "zigzag", "striped"]),
    st.integers(1, 6),
    st.integers(1, 4),
)
def test_any_packing(lengths, world, layout, block, top_k):
    exact([lengths], world, layout, sizes=(block, top_k))


def test_many_small_pieces_are_the_same(monkeypatch):
    """Routing and groups of queries in pieces: nothing depends on where they are cut."""
    monkeypatch.setattr(module, "MAX_SCORES", 24)
    monkeypatch.setattr(grouped, "MAX_SCORES", 24)
    monkeypatch.setattr(grouped, "TILE", 3)
    exact([[30, 1, 9]], 3, "zigzag", sizes=(4, 3))
    exact([[37]], 2, "striped", sizes=(4, 3))


def outputs(plan, tensors, dout, block, top_k):
    found, *_ = run(lambda *local: attend_blocks(*local, block, top_k), plan, tensors, dout)
    return whole(found, plan)


def dense(tensors, dout, block=None):
    """Causal attention, within blocks if they have a size, and its gradients."""
    q, k, v = (one.clone().requires_grad_() for one in tensors)
    place = torch.arange(q.shape[1])
    seen = place <= place[:, None]
    if block:
        seen &= place // block == (place // block)[:, None]
    heads_first = (one.transpose(1, 2) for one in (q, k, v))
    out = torch.nn.functional.scaled_dot_product_attention(*heads_first, attn_mask=seen).transpose(1, 2)
    return [out, *torch.autograd.grad(out, (q, k, v), dout)]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_choice_is_block_local_and_enough_of_them_are_dense(layout):
    plan = plan_for([[37]], 4, *layout)
    *tensors, dout = draw(plan, 3, HEADS, WIDTH)
    for found, expected in zip(outputs(plan, tensors, dout, 5, 1), dense(tensors, dout, 5), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    for found, expected in zip(outputs(plan, tensors, dout, 5, 8), dense(tensors, dout), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    assert (outputs(plan, tensors, dout, 5, 7)[0] - dense(tensors, dout)[0]).abs().max() > 1e-3


@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_document_sees_another_and_no_token_a_later_one(layout):
    plan = plan_for([[13, 1, 18]], 3, *layout)
    *tensors, dout = draw(plan, 3, HEADS, WIDTH)
    before = outputs(plan, tensors, dout, 4, 2)[0]
    for place in (0, 6, 12, 13, 20):
        end = next(stop for stop in (13, 14, 32) if place < stop)
        changed = [one.clone() for one in tensors]
        for one in changed:
            one[:, place] = 0.3
        after = outputs(plan, changed, dout, 4, 2)[0]
        assert torch.equal(after[:, :place], before[:, :place])
        assert torch.equal(after[:, end:], before[:, end:])
        assert not torch.equal(after[:, place], before[:, place])


@pytest.mark.parametrize("world", WORLDS)
def test_of_equal_scores_the_later_block_wins(world):
    """All keys are one: a query sees its own block and the one before, wherever they lie. (Queries are whole numbers:
    a product of matrices may round equal columns apart.)"""
    plan = plan_for([[32]], world, "zigzag")
    q, k, v, dout = draw(plan, 3, HEADS, WIDTH)
    q, k = q.round(), torch.ones_like(k)
    found = outputs(plan, [q, k, v], dout, 4, 2)[0]
    for t in range(32):
        first = max(0, t // 4 - 1) * 4
        torch.testing.assert_close(found[:, t], v[:, first : t + 1].mean(1), rtol=0, atol=1e-13)


def test_scores_far_beyond_the_exponent():
    plan = plan_for([[24]], 3, "contiguous")
    *tensors, dout = draw(plan, 3, HEADS, WIDTH)
    tensors[0] *= 1e4
    found = outputs(plan, tensors, dout, 4, 3)
    assert all(torch.isfinite(one).all() for one in found)
    torch.testing.assert_close(found[0], definition(*tensors, plan.documents, 4, 3), rtol=0, atol=1e-9)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 3e-2)])
def test_low_precision_accumulates_wide(dtype, tolerance):
    """Against the definition in fp64 on the inputs as rounded, by the kernel that such inputs get."""
    plan = plan_for([[40, 9]], 2, "zigzag")
    *tensors, dout = draw(plan, 3, HEADS, 16)
    tensors, dout = [one.to(dtype) for one in tensors], dout.to(dtype)
    asked = [one.double().requires_grad_() for one in tensors]
    expected = definition(*asked, plan.documents, 8, 2)
    gradients = torch.autograd.grad(expected, asked, dout.double())
    for found, reference in zip(outputs(plan, tensors, dout, 8, 2), [expected, *gradients], strict=True):
        assert found.dtype == dtype
        assert (found.double() - reference).norm() <= tolerance * reference.norm()


def test_only_chosen_blocks_travel():
    """Queries that all look the same way choose the same blocks: far fewer bytes than all keys and values."""
    plan = plan_for([[256]], 4, "contiguous")
    q, k, v, dout = draw(plan, 3, HEADS, WIDTH)
    q[:], k[:, 16:32] = 1.0, 5.0
    _, sent, _ = run(lambda *local: attend_blocks(*local, 16, 2), plan, [q, k, v], dout)
    everything = 2 * HEADS * WIDTH * 8 * 64 * 3
    assert sent[0][0] < everything / 2
    assert sent[2][0] < everything / 8  # sums of its blocks and choices alone


def test_the_operator_keeps_the_rules_of_torch():
    plan = plan_for([[9, 4]], 1, "contiguous")
    tensors = [one.requires_grad_() for one in draw(plan, 3, HEADS, WIDTH)[:3]]
    torch.library.opcheck(torch.ops.longctx.moba.default, (*tensors, plan.handle, "", 4, 2))
    torch.library.opcheck(torch.ops.longctx.moba.default, (*tensors, plan.handle, "", 4, 1))


def test_the_mixer_mixes_as_its_recurrence():
    class Core:
        group_name = ""

    plan = plan_for([[21, 12]], 1, "contiguous")
    *tensors, _ = draw(plan, 3, HEADS, WIDTH)
    for mixer in (moba(block=4, top_k=2), MIXER):
        named = dict(zip(mixer.tokens(HeadDims(WIDTH, WIDTH)), tensors, strict=True))
        assert list(named) == ["q", "k", "v"]
        found, expected = mixer.mix(named, Core(), plan.handle), mixer.recurrence(named, plan.documents)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_what_it_cannot_do_it_says():
    with pytest.raises(ConfigError, match="block 4 and top_k 0 of moba must be at least 1"):
        moba(block=4, top_k=0)
    with pytest.raises(ConfigError, match="widths 4 of keys and 8 of values must be equal"):
        MIXER.tokens(HeadDims(4, 8))
