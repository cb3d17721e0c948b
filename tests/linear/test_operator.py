"""The cores as custom operators: what autograd, torch.compile and selective recompute make of them."""

import functools

import pytest
import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from longctx.errors import ConfigError
from longctx.linear import LinearAttention
from longctx.sequence import Contiguous, Documents, Mask, SequencePlan, Striped, Zigzag
from longctx.sim import Cluster

DOCUMENTS = (Documents.from_lengths((20, 1, 9)), Documents.from_lengths((31,)))
KINDS = ("none", "constant", "scalar", "diagonal", "dense")
CONTEXT = ("", "lasp2", 8)


def plan_for(world: int, layout=None, mask: Mask = Mask()) -> SequencePlan:  # noqa: B008 - frozen
    return SequencePlan(DOCUMENTS, mask, layout or Zigzag(), 31, world)


def drawn(kind: str, tokens: int, heads: int = 2) -> list[torch.Tensor]:
    """q, k, v, and the gates."""
    generator = torch.Generator().manual_seed(5)
    shape = (2, tokens, heads)

    def draw(*sizes):
        return torch.randn(sizes, generator=generator, dtype=torch.float64)

    shapes = {
        "none": (),
        "constant": ((heads,),),
        "scalar": (shape,),
        "diagonal": ((*shape, 4),),
        "dense": (shape, shape),
    }
    gates = [draw(*gate) for gate in shapes[kind]]
    gates[:1] = [-gate.exp() for gate in gates[:1]]
    gates[1:] = [gate.sigmoid() for gate in gates[1:]]
    tensors = [draw(*shape, 4), torch.nn.functional.normalize(draw(*shape, 4), dim=-1), draw(*shape, 3), *gates]
    return [tensor.requires_grad_() for tensor in tensors]


@pytest.mark.parametrize("kind", KINDS)
def test_opcheck(kind):
    plan = plan_for(1)
    q, k, v, *gates = drawn(kind, plan.shard)
    name = "linear_delta" if kind == "dense" else "linear_diagonal"
    operator = getattr(torch.ops.longctx, name).default
    arguments = (q, k, v, gates, plan.handle, *CONTEXT)
    torch.library.opcheck(operator, arguments)
    with torch.no_grad():
        out, entered = operator(*arguments)
    plain = [tensor.detach() for tensor in (torch.randn_like(out), q, k, v)]
    gates = [gate.detach() for gate in gates]
    backward = getattr(torch.ops.longctx, f"{name}_backward").default
    torch.library.opcheck(backward, (*plain, gates, entered, plan.handle, *CONTEXT))


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_it_is_one_graph_and_exact(kind):
    plan, graphs, core = plan_for(1, Contiguous()), [], LinearAttention("lasp2", None, 8)

    def model(handle, q, k, v, *gates):
        decay, beta = (*gates, None, None)[:2]
        return (core.attend(q * 2, k, v, handle, decay, beta) ** 2).sum()

    def counting(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    tensors = drawn(kind, plan.shard)
    eager = torch.autograd.grad(model(plan.handle, *tensors), tensors)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=counting)
    loss = compiled(plan.handle, *tensors)
    assert torch.equal(loss, model(plan.handle, *tensors))
    for mine, right in zip(torch.autograd.grad(loss, tensors), eager, strict=True):
        assert torch.equal(mine, right)
    other = SequencePlan(DOCUMENTS[:1] * 2, Mask(), Contiguous(), 31, 1)
    assert torch.equal(compiled(other.handle, *tensors), model(other.handle, *tensors))
    assert len(graphs) == 1, "another plan is another value of the handle, not another graph"


def run_block(plan: SequencePlan, strategy: str, recompute: str):
    """Gradients of a little block on the calling rank; the delta rule, whose transitions travel."""
    core = LinearAttention(strategy, dist.group.WORLD, 8)
    tensors = drawn("dense", plan.shard)

    def block(q, k, v, decay, beta):
        return torch.tanh(core.attend(2 * q, k, v, plan.handle, decay, beta))

    if recompute == "none":
        out = block(*tensors)
    else:
        contexts = functools.partial(create_selective_checkpoint_contexts, [torch.ops.longctx.linear_delta.default])
        extra = {"context_fn": contexts} if recompute == "selective" else {}
        out = checkpoint(block, *tensors, use_reentrant=False, **extra)
    return torch.autograd.grad((out**2).sum(), tensors)


@pytest.mark.parametrize("strategy", ["lasp2", "lasp", "headwise"])
def test_selective_recompute_neither_communicates_nor_computes_again(strategy):
    plan, sent, results, solved = plan_for(3), {}, {}, {}
    for recompute in ("none", "selective", "everything"):
        cluster = Cluster(3, trace_compute=recompute != "everything")
        results[recompute] = cluster.run(run_block, plan, strategy, recompute)
        sent[recompute] = [cluster.ledger.sent(rank) for rank in range(3)]
        solved[recompute] = [sum("solve_triangular" in event.operation for event in events) for events in cluster.trace]
    assert sent["none"] == sent["selective"]
    assert sum(sent["everything"]) > sum(sent["none"]), "the test would notice a second forward pass"
    assert solved["selective"] == solved["none"] and min(solved["none"]) > 0
    for mine, right in zip(results["selective"], results["none"], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, right, strict=True))


def test_the_entered_states_have_no_gradient():
    plan = plan_for(1)
    q, k, v = drawn("none", plan.shard)
    out, entered = torch.ops.longctx.linear_diagonal(q, k, v, [], plan.handle, *CONTEXT)
    assert out.requires_grad and not entered.requires_grad
    assert entered.shape == (2, 1, 2, 4, 3) and entered.dtype == torch.float64


def test_what_does_not_fit_is_refused():
    plan, core = plan_for(1), LinearAttention("lasp2")
    q = torch.zeros(2, 30, 2, 4)
    with pytest.raises(ConfigError, match=r"does not fit its sequence plan, which is for \[2, 31, H, K\] on 1 ranks"):
        core.attend(q, q, q, plan.handle)
    q = torch.zeros(2, 31, 2, 4)
    with pytest.raises(ConfigError, match="as many key/value heads as query heads"):
        core.attend(q, q[:, :, :1], q, plan.handle)
    with pytest.raises(ConfigError, match=r"log_decay \(2, 31\) must be \(2,\) or \(2, 31, 2\) or \(2, 31, 2, 4\)"):
        core.attend(q, q, q, plan.handle, q[..., 0, 0])
    with pytest.raises(ConfigError, match="delta rule wants log_decay and beta"):
        core.attend(q, q, q, plan.handle, beta=q[..., 0])
    with pytest.raises(ConfigError, match="valid: lasp2, lasp, headwise"):
        LinearAttention("lasp3")
    with pytest.raises(ConfigError, match="chunk=0 must be at least 1"):
        LinearAttention("lasp", chunk=0)


@pytest.mark.parametrize("kind", KINDS)
def test_low_precision_accumulates_in_fp32(kind):
    plan, core = plan_for(1), LinearAttention("lasp2", None, 8)
    exact = drawn(kind, plan.shard)
    rounded = [tensor.detach().bfloat16().requires_grad_() for tensor in exact]
    exact = [tensor.detach().double().requires_grad_() for tensor in rounded]
    outs = []
    for q, k, v, *gates in (exact, rounded):
        outs.append(core.attend(q, k, v, plan.handle, *gates))
    assert outs[1].dtype == torch.bfloat16
    assert (outs[1].double() - outs[0]).norm() <= 2**-8 * outs[0].norm(), "only the output is rounded"
    grads = [
        torch.autograd.grad((out.double() * 3).sum(), leaves)
        for out, leaves in zip(outs, (exact, rounded), strict=True)
    ]
    for right, mine, leaf in zip(*grads, rounded, strict=True):
        assert mine.dtype == leaf.dtype and (mine.double() - right).norm() <= 2**-7 * right.norm() + 1e-3


@pytest.mark.parametrize("layout", [Contiguous(), Zigzag(), Striped(8)], ids=lambda layout: layout.name)
@pytest.mark.parametrize("strategy", ["lasp2", "lasp", "headwise"])
def test_no_order_of_hand_overs_changes_a_bit(strategy, layout):
    plan = plan_for(4, layout)
    expected = Cluster(4).run(run_block, plan, strategy, "none")
    for seed in (0, 1, 2):
        for mine, right in zip(Cluster(4, seed=seed).run(run_block, plan, strategy, "none"), expected, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(mine, right, strict=True))
