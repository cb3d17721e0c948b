"""A strategy as a custom operator: what autograd, torch.compile and selective recompute make of it."""

import functools

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from longctx.attention import StrategyAttention, dense_attention, get_strategy
from longctx.attention.runtime.operator import decoded, encoded
from longctx.catalog import STRATEGIES
from longctx.errors import ConfigError
from longctx.options import StrategyOptions
from longctx.sequence import Contiguous, Documents, Mask, SequencePlan, Striped, Zigzag, make_layout
from longctx.sim import Cluster, RankFailed

DOCUMENTS = (Documents.from_lengths((20, 1, 9)), Documents.from_lengths((31,)))


def plan_for(world: int, layout=None) -> SequencePlan:
    return SequencePlan(DOCUMENTS, Mask(window=12), layout or Zigzag(), 31, world)


def drawn(plan: SequencePlan, *heads: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(2, plan.shard, n, 8, generator=generator, dtype=torch.float64).requires_grad_() for n in heads]


@pytest.mark.parametrize("strategy", ["local", "ring", "burst", "token_ring"])
def test_opcheck(strategy):
    plan = plan_for(1)
    q, k, v = drawn(plan, 4, 2, 2)
    operator = get_strategy(strategy).operator
    assert operator is getattr(torch.ops.longctx, strategy).default
    torch.library.opcheck(operator, (q, k, v, plan.handle, "", "auto", 0.4))
    with torch.no_grad():
        out, lse = operator(q, k, v, plan.handle, "", "auto", 0.4)
    backward = getattr(torch.ops.longctx, f"{strategy}_backward").default
    arguments = [tensor.detach() for tensor in (torch.randn_like(out), q, k, v, out, lse)]
    torch.library.opcheck(backward, (*arguments, plan.handle, "", "auto", 0.4))


@pytest.mark.parametrize("strategy", ["local", "ring"])
def test_compiled_attention_is_one_graph_and_exact(strategy):
    plan, graphs = plan_for(1, Contiguous()), []
    attention = StrategyAttention(strategy)

    def model(q, k, v, handle):
        return (attention(q * 2, k, v, handle) ** 2).sum()

    def counting(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    q, k, v = drawn(plan, 4, 2, 2)
    eager = torch.autograd.grad(model(q, k, v, plan.handle), (q, k, v))
    compiled = torch.compile(model, fullgraph=True, backend=counting)
    torch._dynamo.reset()
    loss = compiled(q, k, v, plan.handle)
    assert torch.equal(loss, model(q, k, v, plan.handle))
    for mine, right in zip(torch.autograd.grad(loss, (q, k, v)), eager, strict=True):
        assert torch.equal(mine, right)
    other = SequencePlan(DOCUMENTS, Mask(), Contiguous(), 31, 1)
    assert torch.equal(compiled(q, k, v, other.handle), model(q, k, v, other.handle))
    assert len(graphs) == 1, "another plan is another value of the handle, not another graph"
    calls = [node for node in graphs[0].graph.nodes if node.target is getattr(torch.ops.longctx, strategy).default]
    assert len(calls) == 1


def test_a_compiler_that_left_its_graph_does_not_look_inside():
    """Dynamo watches the frames below one that it could not compile; plans and messages are none of its business."""
    plan, graphs = plan_for(1, Contiguous()), []
    operator = get_strategy("ring").operator

    def model(q, k, v, handle):
        for _ in [0]:  # a break inside a loop leaves the whole frame to Python
            torch._dynamo.graph_break()
            out = operator(q, k, v, handle, "", "auto", 0.4)[0]
        return out.cos()

    def counting(graph, inputs):
        graphs.append(graph)
        return graph.forward

    q, k, v = drawn(plan, 4, 2, 2)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=counting)(q, k, v, plan.handle)
    grads = torch.autograd.grad(compiled.sum(), (q, k, v))
    assert not any(
        "numpy" in str(node.target) or "wrapped" in str(node.target) for g in graphs for node in g.graph.nodes
    )
    expected = model(q, k, v, plan.handle)
    assert torch.equal(compiled, expected)
    for mine, eager in zip(grads, torch.autograd.grad(expected.sum(), (q, k, v)), strict=True):
        assert torch.equal(mine, eager)


class _Storages(TorchDispatchMode):
    """Notes operators of ours whose results lie in their arguments' memory."""

    def __init__(self):
        super().__init__()
        self.seen, self.shared = set(), set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.namespace == "longctx":
            self.seen.add(str(func))
            given, made = (
                [one.untyped_storage().data_ptr() for one in tree_leaves(part) if isinstance(one, torch.Tensor)]
                for part in (args, result)
            )
            made = [pointer for pointer in made if pointer]
            if set(given) & set(made) or len(set(made)) < len(made):
                self.shared.add(str(func))
        return result


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_results_share_no_memory_with_arguments_or_each_other(strategy):
    """What is written into a result in place would change an argument without a sign."""

    def run() -> _Storages:
        plan = SequencePlan((Documents.single(16),) * 2, Mask(), make_layout(get_strategy(strategy).layout), 16, world)
        attention = StrategyAttention(strategy, dist.group.WORLD)
        q, k, v = drawn(plan, 4, 2, 2)
        with _Storages() as storages:
            torch.autograd.grad(attention(q, k, v, plan.handle).sum(), (q, k, v))
        return storages

    world = 1 if get_strategy(strategy).one_rank else 2
    for storages in Cluster(world).run(run):
        assert len(storages.seen) == 2 and not storages.shared


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (StrategyOptions(), ""),
        (StrategyOptions(grad_dtype="compute"), '{"grad_dtype": "compute"}'),
        (StrategyOptions("compute", "kv", 2, 4), None),
    ],
)
def test_options_travel_as_one_string(options, text):
    assert decoded(encoded(options)) == options
    assert text is None or encoded(options) == text


def test_the_log_sum_exp_has_no_gradient():
    plan = plan_for(1)
    q, k, v = drawn(plan, 4, 2, 2)
    out, lse = get_strategy("ring").operator(q, k, v, plan.handle, "", "auto", 0.4)
    assert out.requires_grad and not lse.requires_grad
    assert lse.shape == (2, 31, 4) and lse.dtype == torch.float64
    with pytest.raises(RuntimeError, match="does not require grad"):
        lse.sum().backward()


def test_a_scale_of_one_s_own():
    plan = plan_for(1)
    q, k, v = drawn(plan, 4, 2, 2)
    for scale in (None, 0.05):
        out = StrategyAttention("ring", scale=scale)(q, k, v, plan.handle)
        torch.testing.assert_close(out, dense_attention(q, k, v, DOCUMENTS, plan.mask, scale))


def test_start_and_finish_are_the_call_in_two_halves():
    plan, attention = plan_for(1), StrategyAttention("ring")
    q, k, v = drawn(plan, 4, 2, 2)
    assert torch.equal(attention.finish(attention.start(q, k, v, plan.handle)), attention(q, k, v, plan.handle))


@pytest.mark.parametrize("shape", [(2, 30, 4, 8), (1, 31, 4, 8), (2, 32, 4, 8)])
def test_tensors_that_do_not_fit_the_plan_are_refused(shape):
    plan = plan_for(1)
    q = torch.zeros(shape)
    with pytest.raises(ConfigError, match=r"does not fit its sequence plan, which is for \[2, 31, H, D\] on 1 ranks"):
        StrategyAttention("ring")(q, q, q, plan.handle)


def test_a_plan_for_another_world_is_refused():
    plan = plan_for(3)

    def body():
        q, k, v = drawn(plan, 2, 1, 1)
        StrategyAttention("ring", dist.group.WORLD)(q, k, v, plan.handle)

    with pytest.raises(RankFailed) as caught:
        Cluster(2).run(body)
    assert isinstance(caught.value.__cause__, ConfigError)
    assert "on 2 ranks does not fit its sequence plan" in str(caught.value.__cause__)


def test_a_plan_that_died_before_backward_is_named():
    plan = plan_for(1)
    q, k, v = drawn(plan, 4, 2, 2)
    out, number = StrategyAttention("ring")(q, k, v, plan.handle), plan.id
    del plan
    with pytest.raises(ConfigError, match=f"sequence plan {number} is gone; hold the LocalBatch"):
        out.sum().backward()


def keep_ring(_context, operator, *_args, **_kwargs):
    kept = operator is torch.ops.longctx.ring.default
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def run_block(plan, recompute: str):
    """Loss and gradients of a little block on the calling rank."""
    attention = StrategyAttention("ring", dist.group.WORLD)
    generator = torch.Generator().manual_seed(dist.get_rank())
    x = torch.randn(2, plan.shard, 16, generator=generator, dtype=torch.float64).requires_grad_()
    weight = torch.linspace(-1, 1, 16 * 32, dtype=torch.float64).reshape(16, 32).requires_grad_()

    def block(x):
        q, k, v = (x @ weight).unflatten(2, (4, 8)).split((2, 1, 1), dim=2)
        return torch.tanh(attention(q, k, v, plan.handle)).flatten(2) @ weight[:, :16].T

    if recompute == "none":
        out = block(x)
    else:
        context = functools.partial(create_selective_checkpoint_contexts, keep_ring)
        extra = {"context_fn": context} if recompute == "selective" else {}
        out = checkpoint(block, x, use_reentrant=False, **extra)
    return torch.autograd.grad((out**2).sum(), (x, weight))


@pytest.mark.parametrize("layout", [Contiguous(), Zigzag(), Striped()])
def test_selective_recompute_never_communicates_again(layout):
    plan, sent, results = plan_for(3, layout), {}, {}
    for recompute in ("none", "selective", "everything"):
        cluster = Cluster(3, trace_compute=recompute != "everything")
        results[recompute] = cluster.run(run_block, plan, recompute)
        sent[recompute] = [cluster.ledger.sent(rank) for rank in range(3)]
    assert sent["none"] == sent["selective"]
    assert sum(sent["everything"]) > sum(sent["none"]), "the test would notice a second forward pass"
    for mine, right in zip(results["selective"], results["none"], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, right, strict=True))


def test_selective_recompute_runs_the_kernel_once():
    plan, calls = plan_for(2), {}
    for recompute in ("none", "selective"):
        cluster = Cluster(2, trace_compute=True)
        cluster.run(run_block, plan, recompute)
        forward = "aten._scaled_dot_product_flash_attention_for_cpu"
        calls[recompute] = [sum(event.operation == forward for event in events) for events in cluster.trace]
    assert calls["selective"] == calls["none"] and min(calls["none"]) > 0
