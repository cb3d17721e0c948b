"""Linear layers whose queries see later tokens: exact against the definition, refused where a state decays."""

import itertools

import pytest
import torch
import torch.distributed as dist

from longctx.errors import ConfigError
from longctx.linear import LinearAttention, LinearCase, get_linear, get_mixer, refusal, require_linear
from longctx.sequence import Contiguous, Documents, Mask, Striped, Zigzag, make_plan, unshard
from longctx.sim import Cluster, RankFailed
from tests.linear.cases import cut

LENGTH, HEADS = 61, 2
PACKINGS = (((61,), (61,)), ((20, 1, 1, 8, 1, 30), (29, 2, 1, 9, 15)), ((1,) * 61, (61,)))


def definition(x, documents):
    """Queries of a document times the sum of its keys and values, features and normaliser of the basic mixer."""
    q, k = (torch.nn.functional.elu(x[name]) + 1 for name in "qk")
    out = torch.zeros_like(x["v"])
    for row, packing in enumerate(documents):
        for start, stop in itertools.pairwise(packing.cu_seqlens.tolist()):
            own = (row, slice(start, stop))
            weights = torch.einsum("ihk,jhk->hij", q[own], k[own])
            weights = weights / weights.sum(-1, keepdim=True)
            out[own] = torch.einsum("hij,jhv->ihv", weights, x["v"][own])
    return out


@pytest.mark.parametrize("layout", [Contiguous(), Zigzag(), Striped(8)], ids=lambda layout: layout.name)
@pytest.mark.parametrize(("world", "chunk"), [(1, 16), (2, 64), (3, 4), (8, 5)])
def test_every_query_sees_its_whole_document(layout, world, chunk):
    for packing in PACKINGS:
        documents = tuple(Documents.from_lengths(row) for row in packing)
        plan = make_plan(documents, Mask(False), layout, LENGTH, world)
        whole = {
            name: torch.randn(2, LENGTH, HEADS, n, dtype=torch.float64)
            for name, n in zip("qkv", (5, 5, 3), strict=True)
        }
        dout = torch.randn_like(whole["v"])
        leaves = {name: value.clone().requires_grad_() for name, value in whole.items()}
        out = definition(leaves, documents)
        truth = (out.detach(), *torch.autograd.grad(out, list(leaves.values()), dout))

        def run(plan=plan, whole=whole, dout=dout):
            local = {name: cut(value, plan, dist.get_rank()).requires_grad_() for name, value in whole.items()}
            core = LinearAttention("lasp2", dist.group.WORLD, chunk)
            out = get_mixer("basic").mix(local, core, plan.handle)
            grads = torch.autograd.grad(out, list(local.values()), cut(dout, plan, dist.get_rank()))
            return (out.detach(), *grads)

        ranks = Cluster(world, trace=False).run(run)
        for expected, *parts in zip(truth, *ranks, strict=True):
            bound = 1e-10 * (expected.norm() + 1e-3 * dout.norm())
            assert (unshard(parts, plan) - expected).norm() <= bound
            for rank, part in enumerate(parts):
                assert not part[:, len(plan.positions(rank)) :].any()


@pytest.mark.parametrize("mixer", ["retnet", "simple_gla", "gla", "gated_deltanet"])
def test_states_that_decay_are_refused_by_name(mixer):
    case = LinearCase(2, 4, mixer, "contiguous", causal=False)
    reason = refusal(get_linear("lasp2"), case)
    assert reason is not None and mixer in reason and "mixer=basic" in reason


@pytest.mark.parametrize("strategy", ["lasp", "headwise"])
def test_other_strategies_have_no_such_form(strategy):
    case = LinearCase(2, 4, "basic", "contiguous", causal=False)
    with pytest.raises(ConfigError, match=f"{strategy} refuses.*lasp2"):
        require_linear(get_linear(strategy), case)


def test_the_operator_refuses_too():
    plan = make_plan((Documents.single(8),), Mask(False), Contiguous(), 8, 2)

    def run():
        q, k, v = (torch.randn(1, 4, 2, 3) for _ in range(3))
        LinearAttention("lasp2", dist.group.WORLD).attend(q, k, v, plan.handle, -torch.rand(2))

    with pytest.raises(RankFailed, match="can't let queries see later tokens"):
        Cluster(2, trace=False).run(run)
