"""Ring self-attention: exactness, what is in flight when, and what it refuses."""

import pytest
import torch
import torch.distributed as dist

from longctx.attention import AttentionCase, StrategyAttention, get_strategy, refusal, require
from longctx.catalog import LAYOUTS
from longctx.config import AttentionConfig, Config
from longctx.errors import ConfigError
from longctx.parallel.core import attention_case
from longctx.sequence import Documents, Mask, SequencePlan, Striped, Zigzag
from longctx.sim import Cluster
from longctx.verify import VerifyCase, judge, run_rank
from tests.equivalence.attention_cases import LAYOUTS as CASE_LAYOUTS
from tests.equivalence.attention_cases import Case, all_cases
from tests.equivalence.attention_rank import assert_exact, compute
from tests.equivalence.pairwise import pairwise

WORLD = 4
MASKS = ("causal", "full")


def check(case: Case) -> None:
    for rank, computed in enumerate(Cluster(case.world, trace=False).run(compute, case, "rsa")):
        assert_exact(case, rank, computed)


@pytest.mark.parametrize(
    "case",
    [Case(*row) for row in pairwise((tuple(CASE_LAYOUTS), MASKS, ("mha", "gqa4", "mqa"), (31, 3, 1), (2, 3, 4, 8, 1)))],
    ids=str,
)
def test_sampled_cases_are_exact(case):
    check(case)


@pytest.mark.matrix
@pytest.mark.parametrize("case", [case for case in all_cases() if case.mask in MASKS and case.length < 1000], ids=str)
def test_every_case_is_exact(case):
    check(case)


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_the_judge_passes_it(dtype):
    case = VerifyCase("rsa", "zigzag", 4, seq=100, heads=4, kv_heads=2, head_dim=16, dtype=dtype)
    verdict, _ = judge(case, Cluster(4).run(lambda: run_rank(case, dist.group.WORLD)))
    assert verdict.passed, verdict.errors


def test_padding_sees_nothing_and_is_seen_by_nothing():
    """A sequence that ends before its batch does: rows of scores without any visible column."""
    plan = SequencePlan([Documents.single(20), Documents.single(3)], Mask(), Striped(), 20, 3)
    whole = torch.randn(2, 20, 4, 8, dtype=torch.float64)

    def run(noise: float):
        local = torch.full((2, plan.shard, 4, 8), noise, dtype=torch.float64)
        where = torch.from_numpy(plan.positions(dist.get_rank()))
        local[:, : len(where)] = whole[:, where]
        local[1, : len(where)][where >= 3] = noise
        q, k, v = (local.clone().requires_grad_() for _ in range(3))
        out = StrategyAttention("rsa", dist.group.WORLD)(q, k, v, plan.handle)
        (out**2).sum().backward()
        return [out.detach(), q.grad, k.grad, v.grad]

    for mine, other in zip(Cluster(3).run(run, 1.0), Cluster(3).run(run, -3.0), strict=True):
        assert all(torch.equal(a, b) and bool(a.isfinite().all()) for a, b in zip(mine, other, strict=True))


def attend(plan: SequencePlan, dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(dist.get_rank())
    q, k, v, dout = (
        torch.randn(1, plan.shard, n, 8, generator=generator).to(dtype).requires_grad_() for n in (4, 2, 2, 4)
    )
    out = StrategyAttention("rsa", dist.group.WORLD)(q, k, v, plan.handle)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), dout.detach())]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_no_order_of_hand_overs_changes_a_bit(dtype):
    plan = SequencePlan([Documents.single(33)], Mask(), Zigzag(), 33, WORLD)
    expected = Cluster(WORLD).run(attend, plan, dtype)
    for seed in (0, 1, 2):
        for mine, right in zip(Cluster(WORLD, seed=seed).run(attend, plan, dtype), expected, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(mine, right, strict=True))


def test_opcheck():
    plan = SequencePlan([Documents.single(31)] * 2, Mask(), Zigzag(), 31, 1)
    q, k, v = (torch.randn(2, 31, n, 8, dtype=torch.float64, requires_grad=True) for n in (4, 2, 2))
    operator = get_strategy("rsa").operator
    torch.library.opcheck(operator, (q, k, v, plan.handle, "", "auto", 0.4))
    out, lse = (tensor.detach() for tensor in operator(q, k, v, plan.handle, "", "auto", 0.4))
    arguments = [tensor.detach() for tensor in (torch.randn_like(out), q, k, v, out, lse)]
    torch.library.opcheck(torch.ops.longctx.rsa_backward.default, (*arguments, plan.handle, "", "auto", 0.4))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("causal", [True, False])
def test_it_takes_any_layout_and_refuses_windows_and_documents_by_name(layout, causal):
    def said(window=None, documents=False):
        case = AttentionCase(4, 8, 2, layout, Mask(causal, window), documents=documents)
        return refusal(get_strategy("rsa"), case)

    assert said() is None
    assert said(window=5).startswith("attention.window=5: ") and "use attention.window=null" in said(window=5)
    assert said(documents=True).startswith("attention.document_mask=true")
    assert "use attention.document_mask=false, or attention=ring" in said(documents=True)


def test_configuration_and_verify_tell_it_of_documents():
    for document_mask in (True, False):
        config = Config(attention=AttentionConfig(strategy="rsa", document_mask=document_mask))
        assert attention_case(config).documents == document_mask
    with pytest.raises(ConfigError, match=r"attention\.strategy=rsa refuses: attention\.document_mask=true"):
        require(get_strategy("rsa"), attention_case(Config(attention=AttentionConfig(strategy="rsa"))))
    assert VerifyCase("rsa", "zigzag", 2, seq=9, documents=(9,)).refused() is None
    reason = VerifyCase("rsa", "zigzag", 2, seq=9, documents=(4, 5)).refused()
    assert reason is not None and "several documents" in reason
