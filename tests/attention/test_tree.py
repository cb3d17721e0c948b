"""Tree attention: exactness, what is in flight when, and that no order of hand-overs matters."""

import dataclasses

import pytest
import torch
import torch.distributed as dist

from longctx.attention import StrategyAttention, get_strategy
from longctx.attention.runtime.operator import encoded
from longctx.attention.runtime.partial import Partial
from longctx.options import StrategyOptions
from longctx.sequence import Contiguous, Documents, Mask, Rows, SequencePlan, Striped, Zigzag
from longctx.sim import Cluster, Fault
from longctx.verify import VerifyCase, judge, run_rank
from tests.equivalence.attention_cases import LAYOUTS as CASE_LAYOUTS
from tests.equivalence.attention_cases import MASKS, Case, all_cases
from tests.equivalence.attention_rank import assert_exact, compute
from tests.equivalence.pairwise import pairwise

WORLD = 4
LAYOUTS = {"contiguous": Contiguous(), "zigzag": Zigzag(), "striped": Striped()}


def check(case: Case) -> None:
    for rank, computed in enumerate(Cluster(case.world, trace=False).run(compute, case, "tree")):
        assert_exact(case, rank, computed)


@pytest.mark.parametrize(
    "case",
    [Case(*row) for row in pairwise((tuple(CASE_LAYOUTS), MASKS, ("mha", "gqa4", "mqa"), (31, 3, 1), (2, 3, 4, 8, 1)))],
    ids=str,
)
def test_sampled_cases_are_exact(case):
    check(case)


@pytest.mark.matrix
@pytest.mark.parametrize("case", [case for case in all_cases() if case.length < 1000], ids=str)
def test_every_case_is_exact(case):
    check(case)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_documents_and_windows_pass_the_judge(layout):
    case = VerifyCase("tree", layout, 3, seq=61, documents=(20, 1, 1, 39), heads=4, kv_heads=2, head_dim=8, window=17)
    verdict, _ = judge(case, Cluster(3).run(lambda: run_rank(case, dist.group.WORLD)))
    assert verdict.passed and max(verdict.errors.values()) < 1e-13


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rounding_is_within_the_judge_s_limits(dtype):
    case = VerifyCase("tree", "zigzag", 4, seq=200, heads=4, kv_heads=2, head_dim=16, dtype=dtype)
    verdict, _ = judge(case, Cluster(4).run(lambda: run_rank(case, dist.group.WORLD)))
    assert verdict.passed, verdict.errors


def attend(
    plan: SequencePlan, dtype: torch.dtype, grad_dtype: str = "fp32", kernel: str = "auto"
) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(dist.get_rank())
    q, k, v, dout = (
        torch.randn(len(plan.documents), plan.shard, n, 8, generator=generator).to(dtype).requires_grad_()
        for n in (4, 2, 2, 4)
    )
    attention = StrategyAttention("tree", dist.group.WORLD, kernel, options=StrategyOptions(grad_dtype=grad_dtype))
    out = attention(q, k, v, plan.handle)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), dout.detach())]


def test_gradients_that_travel_in_bf16_are_summed_in_fp32():
    """In bf16, dq of shares that were rounded on their way is not far off, and all else is the same.

    Of the dense kernel: the fused one rounds shares itself.
    """
    plan = SequencePlan([Documents.single(64)], Mask(), Zigzag(), 64, WORLD)
    fp32, bf16 = (Cluster(WORLD).run(attend, plan, torch.bfloat16, one, "dense") for one in ("fp32", "compute"))
    for (out, dq, dk, dv), (its_out, its_dq, its_dk, its_dv) in zip(fp32, bf16, strict=True):
        assert torch.equal(out, its_out) and torch.equal(dk, its_dk) and torch.equal(dv, its_dv)
        assert 0 < (dq - its_dq).norm() < 5e-3 * dq.norm()


def test_partials_merge_where_either_or_both_have_seen_nothing():
    """Rows: seen by both, here only, there only, by neither; the last in a second interval of the packed rows."""
    q = torch.zeros(1, 6, 1, 2, dtype=torch.float64)
    here, there = Partial(q), Partial(q)
    for partial, seen in ((here, (0, 1)), (there, (0, 2))):
        for row in seen:
            out = torch.full((1, 1, 1, 2), 1.0 + row + 5 * (partial is there), dtype=torch.float64)
            partial.merge(slice(0, 1), slice(row, row + 1), out, torch.full((1, 1, 1), 0.5, dtype=torch.float64))
    rows = Rows(((0, 3), (5, 6)))
    here.merge_packed(rows, rows.take(there.out), rows.take(there.lse))
    assert here.out[0, :, 0, 0].tolist() == [3.5, 2.0, 8.0, 0.0, 0.0, 0.0]
    assert here.lse[0, :3, 0].tolist() == pytest.approx([0.5 + torch.log(torch.tensor(2.0)).item(), 0.5, 0.5])
    assert here.lse[0, 3:, 0].tolist() == [-torch.inf] * 3
    here.merge(slice(0, 1), slice(5, 6), torch.ones(1, 1, 1, 2).double(), torch.zeros(1, 1, 1).double())
    assert here.out[0, 5].tolist() == [[1.0, 1.0]] and here.lse[0, 5].tolist() == [0.0]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_no_order_of_hand_overs_changes_a_bit(layout, dtype):
    documents = [Documents.from_lengths((20, 1, 40)), Documents.single(67)]
    plan = SequencePlan(documents, Mask(window=30), LAYOUTS[layout], 67, WORLD)
    expected = Cluster(WORLD).run(attend, plan, dtype)
    for seed in (0, 1, 2):
        for mine, right in zip(Cluster(WORLD, seed=seed).run(attend, plan, dtype), expected, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(mine, right, strict=True))


def test_a_corrupted_message_is_noticed():
    case = VerifyCase("tree", "zigzag", 3, seq=24, heads=2, kv_heads=1, head_dim=4)
    cluster = Cluster(3)
    cluster.run(lambda: run_rank(case, dist.group.WORLD))
    sends = sum((event.phase, event.operation) == ("post", "send") for event in cluster.trace[1])
    assert sends == 2 * (1 + 2) + 2 * (4 + 1)
    for occurrence in range(sends):
        fault = Fault("corrupt", rank=1, operation="send", occurrence=occurrence, bit=45)
        cluster = Cluster(3, faults=[fault])
        verdict, _ = judge(case, cluster.run(lambda: run_rank(case, dist.group.WORLD)))
        assert cluster.fired == [fault] and not verdict.passed, occurrence


def test_opcheck():
    documents = [Documents.from_lengths((20, 1, 9)), Documents.single(31)]
    plan = SequencePlan(documents, Mask(window=12), Zigzag(), 31, 1)
    q, k, v = (torch.randn(2, 31, n, 8, dtype=torch.float64, requires_grad=True) for n in (4, 2, 2))
    operator = get_strategy("tree").operator
    torch.library.opcheck(
        operator, (q, k, v, plan.handle, "", "auto", 0.4, encoded(StrategyOptions(grad_dtype="compute")))
    )
    out, lse = (tensor.detach() for tensor in operator(q, k, v, plan.handle, "", "auto", 0.4))
    arguments = [tensor.detach() for tensor in (torch.randn_like(out), q, k, v, out, lse)]
    torch.library.opcheck(torch.ops.longctx.tree_backward.default, (*arguments, plan.handle, "", "auto", 0.4))


def test_it_refuses_nothing_but_options_that_it_does_not_read():
    case = VerifyCase("tree", "striped", 5, seq=9, documents=(4, 5), window=2)
    assert case.refused() is None
    assert dataclasses.replace(case, heads=7, kv_heads=2).refused()
