"""RAT over a shared sequence against its recurrence, token by token."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longctx.errors import ConfigError
from longctx.linear.mixer import HeadDims
from longctx.sparse.rat import MIXER, attend_chunks, definition, rat, volume
from tests.equivalence.pairwise import pairwise
from tests.sparse.sparse_cases import LAYOUTS, PACKINGS, WORLDS, check, draw, plan_for, run, whole

HEADS, WIDTH = 2, 4
CHUNKS = (1, 3, 4, 16, 64)


def inputs_of(plan, seed=0):
    q, k, v, gate, dout = draw(plan, 4, HEADS, WIDTH, seed)
    return [q, k, v, torch.sigmoid(gate)], dout


def exact(rows, world, layout, block=1, chunk=4, length=None):
    plan = plan_for(rows, world, layout, block, length)
    tensors, dout = inputs_of(plan)
    sent, ledger = check(
        lambda *local: attend_chunks(*local, chunk), lambda *asked: definition(*asked, chunk), plan, tensors, dout
    )
    for rank in range(world):
        assert sent[rank] == volume(plan, rank, chunk, (HEADS, WIDTH, 8))
        assert ledger[rank] == sum(sent[rank])


AXES = (WORLDS, LAYOUTS, tuple(PACKINGS), CHUNKS)


@pytest.mark.parametrize(("world", "layout", "packing", "chunk"), pairwise(AXES))
def test_every_layout_equals_the_definition(world, layout, packing, chunk):
    rows, length = PACKINGS[packing]
    exact(rows, world, *layout, chunk, length)


@pytest.mark.matrix
@pytest.mark.parametrize(("world", "layout", "packing", "chunk"), list(itertools.product(*AXES)))
def test_the_whole_product(world, layout, packing, chunk):
    rows, length = PACKINGS[packing]
    exact(rows, world, *layout, chunk, length)


@settings(max_examples=40)
@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=5),
    st.integers(1, 5),
    st.sampled_from(["contiguous", "zigzag", "striped"]),
    st.integers(1, 6),
)
def test_any_packing(lengths, world, layout, chunk):
    exact([lengths], world, layout, chunk=chunk)


def test_empty_ranks():
    for length in (1, 2, 5):
        exact([[length]], 8, "contiguous")
        exact([[1] * length], 4, "zigzag")


def outputs(plan, tensors, dout, chunk=4):
    found, *_ = run(lambda *local: attend_chunks(*local, chunk), plan, tensors, dout)
    return whole(found, plan)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_document_sees_another_and_no_token_a_later_one(layout):
    plan = plan_for([[13, 1, 18]], 3, *layout)
    tensors, dout = inputs_of(plan)
    before = outputs(plan, tensors, dout)[0]
    for place in (0, 6, 12, 13, 20):
        end = next(stop for stop in (13, 14, 32) if place < stop)
        changed = [one.clone() for one in tensors]
        for one in changed:
            one[:, place] = 0.3
        after = outputs(plan, changed, dout)[0]
        assert torch.equal(after[:, :place], before[:, :place])
        assert torch.equal(after[:, end:], before[:, end:])
        assert not torch.equal(after[:, place], before[:, place])


def test_a_chunk_as_long_as_the_document_is_the_recurrence_alone():
    plan = plan_for([[11]], 2, "contiguous")
    (q, k, v, gate), dout = inputs_of(plan)
    found = outputs(plan, [q, k, v, gate], dout, chunk=11)[0]
    state = torch.zeros_like(v[:, 0])
    for t in range(11):
        state = gate[:, t] * state + (1 - gate[:, t]) * v[:, t]
        torch.testing.assert_close(found[:, t], state, rtol=0, atol=1e-13)


def test_gates_at_0_and_chunks_of_1_are_causal_attention():
    plan = plan_for([[23]], 4, "zigzag")
    (q, k, v, gate), dout = inputs_of(plan)
    found = outputs(plan, [q, k, v, torch.zeros_like(gate)], dout, chunk=1)[0]
    dense = torch.nn.functional.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True
    )
    torch.testing.assert_close(found, dense.transpose(1, 2), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 3e-2)])
def test_low_precision_accumulates_wide(dtype, tolerance):
    """Against the definition in fp64 on the inputs as rounded, by the kernel that such inputs get."""
    plan = plan_for([[40, 9]], 2, "zigzag")
    q, k, v, gate, dout = draw(plan, 4, HEADS, 16)
    tensors = [q, k, v, torch.sigmoid(gate)]
    tensors, dout = [one.to(dtype) for one in tensors], dout.to(dtype)
    asked = [one.double().requires_grad_() for one in tensors]
    expected = definition(*asked, plan.documents, 8)
    gradients = torch.autograd.grad(expected, asked, dout.double())
    for found, reference in zip(outputs(plan, tensors, dout, 8), [expected, *gradients], strict=True):
        assert found.dtype == dtype
        assert (found.double() - reference).norm() <= tolerance * reference.norm()


def test_ends_are_as_many_times_fewer_than_tokens_as_a_chunk_is_long():
    for chunk in (4, 16):
        plan = plan_for([[256]], 4, "contiguous")
        forward, _ = volume(plan, 0, chunk, (HEADS, WIDTH, 8))
        assert forward == 3 * (64 // chunk) * 2 * HEADS * WIDTH * 8  # no chunk is cut; three later ranks read


def test_the_operator_keeps_the_rules_of_torch():
    plan = plan_for([[9, 4]], 1, "contiguous")
    tensors, _ = inputs_of(plan)
    tensors = [one.requires_grad_() for one in tensors]
    torch.library.opcheck(torch.ops.longctx.rat.default, (*tensors, plan.handle, "", 4))


def test_the_mixer_mixes_as_its_recurrence():
    class Core:
        group_name = ""

    plan = plan_for([[21, 12]], 1, "contiguous")
    *tensors, _ = draw(plan, 4, HEADS, WIDTH)
    named = dict(zip(MIXER.tokens(HeadDims(WIDTH, WIDTH)), tensors, strict=True))
    assert list(named) == ["q", "k", "v", "g"]
    found, expected = MIXER.mix(named, Core(), plan.handle), MIXER.recurrence(named, plan.documents)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_what_it_cannot_do_it_says():
    with pytest.raises(ConfigError, match="chunk 0 of rat must be at least 1"):
        rat(chunk=0)
    with pytest.raises(ConfigError, match="widths 4 and 8 must be equal"):
        MIXER.tokens(HeadDims(4, 8))
