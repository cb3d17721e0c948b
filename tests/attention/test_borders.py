"""What an operator is given is its rank's part of the plan, or is refused before any kernel or message."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import forward_ad
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.testing._internal.two_tensor import TwoTensor

from longctx.attention import StrategyAttention
from longctx.attention.decoding.cache import SequenceCache
from longctx.attention.decoding.tree_decoding import CachedAttention
from longctx.attention.strategies.disaggregated.ping_pong import PingPongAttention
from longctx.catalog import LINEAR_STRATEGIES, MIXERS, STRATEGIES
from longctx.comm import group_of
from longctx.errors import ConfigError
from longctx.linear import HeadDims, LinearAttention, get_mixer
from longctx.sequence import Documents, Mask, SequencePlan, make_layout
from longctx.sim import Cluster

Call = Callable[..., Tensor]  # (q, k, v, handle)
WIDTHS = HeadDims(8, 8)

MUTATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "of the whole sequence": lambda x: torch.cat((x, x), 1),
    "of a token fewer": lambda x: x[:, 1:],
    "of no token": lambda x: x[:, :0],
    "of another batch": lambda x: torch.cat((x, x)),
    "of no head": lambda x: x[:, :, :0],
    "of more channels": lambda x: torch.cat((x, x), -1),
    "in another dtype": lambda x: x.float(),
    "as whole numbers": lambda x: x.long(),
    "as complex numbers": lambda x: x.to(torch.complex128),
    "on another device": lambda x: x.to("meta"),
    "sparse": lambda x: x.to_sparse(),
    "without batch": lambda x: x[0],
    "hidden in a subclass": lambda x: TwoTensor(x, x),
    "as numbers of Python": lambda x: x.tolist(),
}


def plan_of(world: int, layout: str = "zigzag", documents: bool = True) -> SequencePlan:
    rows = [Documents.from_lengths([5, 11]) if documents else Documents.single(16)] * 2
    return SequencePlan(tuple(rows), Mask(), make_layout(layout, 1), 16, world)


def operands(plan: SequencePlan, heads: int = 4, kv_heads: int = 2) -> list[Tensor]:
    draw = torch.Generator().manual_seed(1)
    return [
        torch.randn(2, plan.shard, count, 8, generator=draw, dtype=torch.float64)
        for count in (heads, kv_heads, kv_heads)
    ]


def refuses_everything(call: Call, plan: SequencePlan, tensors: list[Tensor], fine: tuple[object, ...] = ()) -> None:
    for name, mutate in MUTATIONS.items():
        for places in ((1, 2), (2,), (0,), (1,)):
            if (name, places) == fine:
                continue
            wrong = [mutate(one) if place in places else one for place, one in enumerate(tensors)]
            with pytest.raises(ValueError) as refused:
                call(*wrong, plan.handle)
            assert isinstance(refused.value, ConfigError), (name, places)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_softmax_strategy_refuses_what_is_not_its_ranks(strategy):
    world = 1 if strategy == "local" else 2
    plan = plan_of(world, "striped" if strategy == "striped" else "zigzag", documents=strategy != "rsa")

    def rank_main() -> None:
        attention, tensors, other = StrategyAttention(strategy, dist.group.WORLD), operands(plan), plan_of(world + 1)
        refuses_everything(attention, plan, tensors)
        mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("sp",))
        whole = [DTensor.from_local(one, mesh, run_check=False) for one in tensors]
        with pytest.raises(ConfigError, match=r"q is a DTensor.*q\.to_local"):
            attention(*whole, plan.handle)
        with pytest.raises(ConfigError, match="query heads must be a multiple of the 3 key/value heads"):
            attention(*operands(plan, 4, 3), plan.handle)
        with pytest.raises(ConfigError, match="does not fit its sequence plan"):
            attention(*tensors, other.handle)
        _backward_refuses(attention, tensors, plan)
        of_mesh = StrategyAttention(strategy, mesh["sp"])(*tensors, plan.handle)
        assert torch.equal(of_mesh, attention(*tensors, plan.handle))

    Cluster(world, trace=False).run(rank_main)


def _backward_refuses(attention: Call, tensors: list[Tensor], plan: SequencePlan) -> None:
    leaves = [one.clone().requires_grad_() for one in tensors]
    out = attention(*leaves, plan.handle)
    for wrong in (out[:, 1:], out[..., 1:], torch.cat((out, out))):
        with pytest.raises(
            (ValueError, RuntimeError)
        ):  # autograd itself refuses them, and casts what is of another dtype
            torch.autograd.grad(out, leaves, wrong.detach(), retain_graph=True)


def test_gradients_and_layouts_of_memory_change_nothing():
    """Views, expanded and transposed tensors, some inputs without gradient: the same numbers."""
    plan = plan_of(2)

    def rank_main(strategy: str) -> None:
        attention, tensors = StrategyAttention(strategy, dist.group.WORLD), operands(plan)
        leaves = [one.clone().requires_grad_() for one in tensors]
        out = attention(*leaves, plan.handle)
        dout = torch.ones(()).double().expand(out.shape)
        expected = torch.autograd.grad(out, leaves, dout.contiguous())
        turned = [one.transpose(1, 3).contiguous().transpose(1, 3).requires_grad_() for one in tensors]
        strided = [torch.stack((one, one), -1)[..., 0].detach().requires_grad_() for one in tensors]
        for views in (turned, strided):
            again = attention(*views, plan.handle)
            assert torch.equal(again, out)
            for mine, right in zip(torch.autograd.grad(again, views, dout), expected, strict=True):
                assert torch.equal(mine, right)
        for asked in ((0,), (1,), (2,), (0, 2)):
            some = [one.clone().requires_grad_(place in asked) for place, one in enumerate(tensors)]
            found = torch.autograd.grad(attention(*some, plan.handle), [some[place] for place in asked], dout)
            for place, mine in zip(asked, found, strict=True):
                assert torch.equal(mine, expected[place])

    for strategy in STRATEGIES:
        if strategy not in ("local", "striped", "rsa"):
            Cluster(2, trace=False).run(rank_main, strategy)


def mixed(mixer: str, core: LinearAttention) -> Callable[..., Tensor]:
    """A mixer as a function of its inputs by token."""
    kind, draw = get_mixer(mixer), torch.Generator().manual_seed(2)
    shapes = kind.parameters(WIDTHS)
    others = {name: torch.rand((2, *shape), generator=draw, dtype=torch.float64) for name, shape in shapes.items()}
    others |= kind.constants(2, 0, 2)
    return lambda tokens, handle: kind.mix({**tokens, **others}, core, handle)


@pytest.mark.parametrize("mixer", MIXERS)
def test_a_mixer_refuses_what_is_not_its_ranks(mixer):
    plan, kind = plan_of(1), get_mixer(mixer)
    call = mixed(mixer, LinearAttention("lasp2"))
    tokens = {
        name: torch.randn(2, plan.shard, 2, channels, dtype=torch.float64)
        for name, channels in kind.tokens(WIDTHS).items()
    }
    assert call(tokens, plan.handle).shape == (2, plan.shard, 2, 8)
    for mutation in ("of a token fewer", "of another batch", "on another device", "in another dtype"):
        for name in tokens.keys() & {"q", "v"}:
            with pytest.raises(ConfigError):
                call({**tokens, name: MUTATIONS[mutation](tokens[name])}, plan.handle)


@pytest.mark.parametrize("strategy", LINEAR_STRATEGIES)
def test_a_linear_strategy_refuses_what_is_not_its_ranks(strategy):
    plan, core = plan_of(1), LinearAttention(strategy)
    tensors = [torch.randn(2, plan.shard, 2, 8, dtype=torch.float64) for _ in range(3)]
    refuses_everything(core.attend, plan, tensors, fine=("of more channels", (2,)))
    gate = -torch.rand(2, plan.shard, 2, dtype=torch.float64)
    for wrong in (gate[:, 1:], gate.long(), gate.to("meta"), gate[:, :, :1], gate[0], TwoTensor(gate, gate), 0.5):
        with pytest.raises(ConfigError):
            core.attend(*tensors, plan.handle, wrong)
        with pytest.raises(ConfigError):
            core.attend(*tensors, plan.handle, gate, wrong)
    taps = torch.randn(2, 8, 4, dtype=torch.float64)
    for xs, weights in (([tensors[0][:, 1:]], [taps]), ([tensors[0]], [taps[1:]]), ([tensors[0]], []), ([], []),
                        (tensors[:2], [taps, taps[..., 1:]]), ([tensors[0].long()], [taps])):  # fmt: skip
        with pytest.raises(ConfigError):
            core.convolve(xs, weights, plan.handle)


def test_decoding_and_ping_pong_refuse_what_is_not_theirs():
    plan, tensors = plan_of(1), operands(plan_of(1))
    ping_pong = PingPongAttention(group_of(None))
    refuses_everything(lambda *given: ping_pong.start(*given).link, plan, tensors)

    def decode(q: Tensor, k: Tensor, v: Tensor, handle: Tensor) -> Tensor:
        cache = SequenceCache(group_of(None), Mask(), 1)
        cache.expect(2, plan.shard)
        attention = CachedAttention(StrategyAttention("local"), cache, 0)
        return attention.finish(attention.start(q, k, v, handle))

    refuses_everything(decode, plan, tensors)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = decode(*tensors, plan.handle)
    assert torch.equal(inside, decode(*tensors, plan.handle))


@pytest.mark.parametrize("transform", ["grad", "vmap", "jvp", "hessian", "forward", "twice"])
def test_transforms_of_torch_func_are_refused(transform):
    plan, core = plan_of(1), LinearAttention("lasp2")
    q, k, v = operands(plan, 2, 2)

    def transformed(call: Callable[[Tensor], Tensor]) -> object:
        if transform in ("grad", "hessian"):
            return getattr(torch.func, transform)(lambda x: call(x).sum())(q)
        if transform == "vmap":
            return torch.func.vmap(call)(torch.stack((q, q)))
        if transform == "jvp":
            return torch.func.jvp(call, (q,), (q,))
        if transform == "forward":
            with forward_ad.dual_level():
                return call(forward_ad.make_dual(q, q))
        x = q.clone().requires_grad_()
        (once,) = torch.autograd.grad(call(x).square().sum(), x, create_graph=True)
        return torch.autograd.grad(once.sum(), x)

    for call in (
        lambda x: StrategyAttention("ring")(x, k, v, plan.handle),
        lambda x: StrategyAttention("ulysses")(x, k, v, plan.handle),
        lambda x: core.attend(x, k, v, plan.handle),
        lambda x: get_mixer("moba").mix({"q": x, "k": k, "v": v}, core, plan.handle),
    ):
        with pytest.raises(ConfigError, match=r"torch\.func|second derivatives"):
            transformed(call)
