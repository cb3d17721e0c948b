"""What one rank does with a case, and how its share is judged; as a program, a rank of a Gloo group."""

from __future__ import annotations

import datetime
import sys

import torch
import torch.distributed as dist
from torch import Tensor

from longctx.attention import StrategyAttention
from longctx.comm import leave_world
from longctx.options import DEFAULT, StrategyOptions
from longctx.sequence import SequencePlan
from tests.equivalence.attention_cases import HEADS, LAYOUTS, MASKS, Case, inputs
from tests.equivalence.attention_definition import reference
from tests.equivalence.pairwise import pairwise
from tests.volume.measure import with_row

TOLERANCE = 1e-10
GLOO_WORLD = 2


def cut(whole: Tensor, plan: SequencePlan, rank: int) -> Tensor:
    """The rank's rows; what lies past them is noise that must not matter."""
    where = torch.from_numpy(plan.positions(rank))
    local = torch.full((whole.shape[0], plan.shard, *whole.shape[2:]), 7.25, dtype=whole.dtype)
    local[:, : len(where)] = whole[:, where]
    return local


def compute(
    case: Case, strategy: str = "ring", kernel: str = "auto", inner: int = 1, options: StrategyOptions = DEFAULT
) -> dict[str, Tensor]:
    """Forward and backward of the calling rank's share."""
    plan, whole = case.plan(), inputs(case.problem)
    q, k, v, dout = (cut(whole[name], plan, dist.get_rank()) for name in ("q", "k", "v", "dout"))
    for tensor in (q, k, v):
        tensor.requires_grad_()
    attention = StrategyAttention(strategy, dist.group.WORLD, kernel, options=with_row(strategy, inner, options))
    out = attention(q, k, v, plan.handle)
    dq, dk, dv = torch.autograd.grad(out, (q, k, v), dout)
    return {"out": out.detach(), "dq": dq, "dk": dk, "dv": dv}


def assert_exact(case: Case, rank: int, computed: dict[str, Tensor]) -> None:
    """Every tensor of the rank is the reference's share, and zero on padding rows."""
    plan, truth = case.plan(), reference(case.problem)
    where = torch.from_numpy(plan.positions(rank))
    upstream = inputs(case.problem)["dout"].norm()
    for name, local in computed.items():
        assert local.dtype == torch.float64 and local.shape[:2] == (len(case.problem.packing), plan.shard)
        error = (local[:, : len(where)] - truth[name][:, where]).norm()
        bound = TOLERANCE * (truth[name].norm() + 1e-3 * upstream)
        assert error <= bound, f"{case}: {name} of rank {rank} is off by {error:.2e}, at most {bound:.2e}"
        assert not local[:, len(where) :].any(), f"{case}: {name} of rank {rank} has padding rows that are not 0"


def gloo_cases() -> list[Case]:
    rows = pairwise((tuple(LAYOUTS), MASKS, tuple(HEADS), (31, 997, 1)))
    return [Case(*row, GLOO_WORLD) for row in rows]  # type: ignore[arg-type]


def main(store: str, rank: int) -> None:
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(store, GLOO_WORLD),
        rank=rank,
        world_size=GLOO_WORLD,
        timeout=datetime.timedelta(seconds=60),
    )
    cases = gloo_cases()
    for case in cases:
        assert_exact(case, rank, compute(case))
    dist.barrier()
    leave_world()
    print(f"exact: {len(cases)}")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
