"""What strategies of linear layers send: the ledger of sim, comm's count and the closed forms agree."""

import itertools

import pytest
import torch
import torch.distributed as dist

from longctx.attention import StrategyAttention
from longctx.attention.costs.estimate import Volume
from longctx.comm import group_of
from longctx.linear import LinearAttention, get_linear, get_mixer
from longctx.linear.registry import LinearSizes
from longctx.sequence import Contiguous, Documents, Layout, Mask, SequencePlan, Striped, Zigzag
from longctx.sim import Cluster

LAYOUTS: dict[str, Layout] = {"contiguous": Contiguous(), "zigzag": Zigzag(), "striped": Striped(8)}
KEYS, VALUES = 5, 4
# Numbers of a segment's transition, for each head, that ranks must tell each other.
TOLD = {"none": 0, "constant": 0, "scalar": 1, "diagonal": KEYS, "dense": KEYS * KEYS}
WIDE = {torch.float64: 8, torch.float32: 4, torch.bfloat16: 4}
TRANSITIONS = {
    "none": "basic",
    "constant": "retnet",
    "scalar": "simple_gla",
    "diagonal": "gla",
    "dense": "gated_deltanet",
}


def gates(transition: str, batch: int, tokens: int, heads: int) -> tuple:
    """(log decay, beta)."""
    shapes = {
        "constant": (heads,),
        "scalar": (batch, tokens, heads),
        "diagonal": (batch, tokens, heads, KEYS),
        "dense": (batch, tokens, heads),
    }
    decay = -torch.rand(shapes[transition]) if transition != "none" else None
    return decay, (torch.rand(batch, tokens, heads) if transition == "dense" else None)


def measured(strategy: str, transition: str, plan: SequencePlan, heads: int, dtype=torch.float64) -> list[Volume]:
    batch, ranks = len(plan.documents), range(plan.world)

    def run(with_backward: bool) -> tuple[int, int]:
        shape = (batch, plan.shard, heads)
        q, k, v = (torch.randn(*shape, width).to(dtype).requires_grad_() for width in (KEYS, KEYS, VALUES))
        decay, beta = (gate.to(dtype) if gate is not None else None for gate in gates(transition, *shape))
        out = LinearAttention(strategy, dist.group.WORLD, 8).attend(q, k / 9, v, plan.handle, decay, beta)
        if with_backward:
            out.backward(torch.randn_like(out))
        traffic = group_of(dist.group.WORLD).traffic
        return traffic.bytes, traffic.messages

    cluster, passes = Cluster(plan.world, trace=False), []
    for with_backward in (False, True):
        counted = cluster.run(run, with_backward)
        assert [sent for sent, _ in counted] == [cluster.ledger.sent(rank) for rank in ranks]
        passes.append(counted)
    return [
        Volume(forward, both - forward, messages, all_messages - messages)
        for (forward, messages), (both, all_messages) in zip(*passes, strict=True)
    ]


def closed(strategy: str, transition: str, plan: SequencePlan, heads: int, dtype=torch.float64) -> list[Volume]:
    sizes = LinearSizes(len(plan.documents), heads, KEYS, VALUES, TOLD[transition], WIDE[dtype])
    return [get_linear(strategy).volume(plan, rank, sizes) for rank in range(plan.world)]


def plan_of(layout: str, world: int, packing=((64,), (64,)), length: int = 64, causal: bool = True) -> SequencePlan:
    return SequencePlan([Documents.from_lengths(row) for row in packing], Mask(causal), LAYOUTS[layout], length, world)


PACKED = ((9, 1, 6, 1, 30, 17), (16, 16, 1, 20))


@pytest.mark.parametrize("strategy", ["lasp2", "lasp", "headwise"])
@pytest.mark.parametrize(("layout", "transition"), list(itertools.product(LAYOUTS, TRANSITIONS)))
def test_ledger_counts_and_closed_forms_agree(strategy, layout, transition):
    assert get_mixer(TRANSITIONS[transition]).transition == transition
    world = {"contiguous": 4, "zigzag": 3, "striped": 2}[layout]
    for packing in (((64,), (64,)), PACKED):
        plan = plan_of(layout, world, packing)
        assert measured(strategy, transition, plan, 3) == closed(strategy, transition, plan, 3)


@pytest.mark.parametrize("strategy", ["lasp2", "lasp", "headwise"])
@pytest.mark.parametrize(("world", "length"), [(1, 64), (8, 64), (8, 3), (4, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_worlds_lengths_and_dtypes(strategy, world, length, dtype):
    plan = plan_of("zigzag", world, ((length,),), length)
    assert measured(strategy, "scalar", plan, 2, dtype) == closed(strategy, "scalar", plan, 2, dtype)


def test_by_hand():
    """Contiguous, one document: r later ranks read rank's summary, r earlier ones get its gradient."""
    plan, world, state, gates_ = plan_of("contiguous", 4), 4, 2 * 3 * KEYS * VALUES * 8, 2 * 3 * KEYS * 8
    for rank, volume in enumerate(measured("lasp2", "diagonal", plan, 3)):
        assert volume.forward == (world - 1 - rank) * (state + gates_)
        assert volume.backward == rank * (state + gates_)
    for rank, volume in enumerate(measured("lasp", "dense", plan, 3)):
        assert (volume.forward, volume.backward) == (state * (rank < 3), state * (rank > 0))


@pytest.mark.parametrize("strategy", ["lasp2", "lasp", "headwise"])
@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
def test_bytes_do_not_depend_on_the_length(strategy, layout):
    short, long = (
        measured(strategy, "scalar", plan_of(layout, 4, ((length,),), length), 2) for length in (64, 64 * 16)
    )
    assert short == long


def test_documents_that_end_on_shard_edges_send_nothing():
    plan = plan_of("contiguous", 4, ((16, 10, 6, 16, 1, 15),) * 2)
    for strategy in ("lasp2", "lasp", "headwise"):
        assert measured(strategy, "dense", plan, 3) == [Volume(0, 0, 0, 0)] * 4


@pytest.mark.parametrize("world", [1, 2, 3, 8])
@pytest.mark.parametrize("packing", [((64,), (64,)), PACKED, ((8,) * 8,) * 2])
def test_the_non_causal_form_reduces_what_crosses(world, packing):
    plan = plan_of("contiguous", world, packing, causal=False)
    found = measured("lasp2", "none", plan, 3)
    assert found == closed("lasp2", "none", plan, 3)
    if packing == ((8,) * 8,) * 2 and world in (1, 2, 8):
        assert found == [Volume(0, 0, 0, 0)] * world


def test_above_p_k_tokens_a_rank_states_are_less_than_ulysses_swaps():
    """From the ledger, on 8 ranks, in fp32 where ``P K`` tokens of a rank (K = V) is the crossing of an all-gather."""
    world, heads, width = 8, 8, 4

    def sent(attend, tokens: int) -> int:
        plan = plan_of("contiguous", world, ((world * tokens,),), world * tokens)

        def run() -> None:
            q, k, v = (torch.randn(1, tokens, heads, width).requires_grad_() for _ in range(3))
            attend(q, k, v, plan.handle).sum().backward()

        cluster = Cluster(world, trace=False)
        cluster.run(run)
        return sum(cluster.ledger.sent(rank) for rank in range(world))

    def lasp2(*tensors):
        return LinearAttention("lasp2", dist.group.WORLD, 16).attend(*tensors)

    def ulysses(*tensors):
        return StrategyAttention("ulysses", dist.group.WORLD)(*tensors)

    above, below = world * width, 1
    assert sent(lasp2, above) == sent(lasp2, below) < sent(ulysses, above)
    assert sent(lasp2, below) > sent(ulysses, below)
    assert sent(ulysses, above) == above * sent(ulysses, below)
