"""Floors: exactly the strategy's own tiles and products, on every rank. Never a clock."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from longctx import catalog
from longctx.attention.runtime.registry import get_strategy
from longctx.bench.floor import NAME, BackwardCall, ForwardCall, KernelCall, floor_of, recorded
from longctx.catalog import KERNELS
from longctx.kernels.flash_cpu import FlashCpu
from longctx.sim import Cluster
from longctx.verify import VerifyCase
from longctx.verify.run import reference, run_rank

ASKING = [name for name in catalog.STRATEGIES if name not in ("local", "rsa")]


def case_of(strategy: str, world: int, **changes) -> VerifyCase:
    case = VerifyCase(strategy, get_strategy(strategy).layout, world, seq=101, heads=4, kv_heads=2, head_dim=8)
    return replace(case, **changes)


def calls_of(case: VerifyCase) -> list[list[KernelCall]]:
    return Cluster(case.world, trace=False).run(lambda: recorded(case, dist.group.WORLD)[1])


def work(calls: list[KernelCall], kind: type) -> int:
    """Visible cells times the query heads that compute them."""
    return sum(tiles.cells * call.q.shape[2] for call in calls if isinstance(call, kind) for tiles in call.tiles)


@pytest.mark.parametrize("strategy", ASKING)
@pytest.mark.parametrize("world", [1, 2, 4])
def test_a_floor_computes_every_visible_cell_of_every_head_once(strategy, world):
    case = case_of(strategy, world)
    whole = case.heads * case.seq * (case.seq + 1) // 2
    by_rank = calls_of(case)
    assert sum(work(calls, ForwardCall) for calls in by_rank) == whole
    assert sum(work(calls, BackwardCall) for calls in by_rank) == whole


@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "striped"])
def test_a_rank_of_the_ring_does_the_work_that_its_plan_says(layout):
    case = case_of("ring", 3, layout=layout)
    for rank, calls in enumerate(calls_of(case)):
        assert work(calls, ForwardCall) == work(calls, BackwardCall) == case.heads * case.plan().work(rank)


@pytest.mark.parametrize("strategy", ["ring", "burst", "tree", "token_ring", "ulysses", "gather"])
def test_a_floor_asks_the_kernel_what_the_strategy_asked_in_order(strategy, monkeypatch):
    case, seen = case_of(strategy, 2), []

    def counted(original):
        def run(kernel, *given):
            shapes = [part.shape for part in given if isinstance(part, torch.Tensor)]
            seen.append((original.__name__, shapes, next(part for part in given if isinstance(part, tuple)), given))
            return original(kernel, *given)

        return run

    for name in ("forward", "backward"):
        monkeypatch.setattr(FlashCpu, name, counted(getattr(FlashCpu, name)))

    def one_rank() -> None:
        floor = floor_of(case, dist.group.WORLD)
        dist.barrier()
        seen.clear()
        for rank in range(2):  # in turn, so that each rank's calls stand together
            if rank == dist.get_rank():
                floor()
                asked.append([entry[:3] for entry in seen])
                results.append([accumulated(entry[3]) for entry in seen])
                seen.clear()
            dist.barrier()

    def accumulated(given):
        return list(given[-1]) if isinstance(given[-1], tuple) else [given[-1].out]

    asked, results = [], []
    Cluster(2, trace=False).run(one_rank)
    monkeypatch.undo()
    for told, calls in zip(asked, calls_of(case), strict=True):
        wanted = [
            ("forward", [call.q.shape, call.k.shape, call.v.shape], call.tiles)
            if isinstance(call, ForwardCall)
            else ("backward", [part.shape for part in call.given], call.tiles)
            for call in calls
        ]
        assert told == wanted
    # What comes out is no waste: the kernel's own sums, as the strategy had them before others' were added.
    assert all(bool(part.isfinite().all()) and bool(part.any()) for rank in results for call in rank for part in call)


def test_users_do_not_meet_the_recorder():
    recorded(case_of("ring", 1), None)
    assert NAME not in KERNELS


def test_the_ring_s_floor_leaves_the_strategy_s_gradients():
    case = case_of("ring", 1)
    kernel, calls = recorded(case, None)
    [backward] = [call for call in calls if isinstance(call, BackwardCall)]
    again = [torch.zeros_like(grad) for grad in backward.grads]
    kernel.backward(*backward.given, backward.tiles, backward.scale, tuple(again))
    for name, grad in zip(("dq", "dk", "dv"), again, strict=True):
        assert torch.equal(grad, run_rank(case, None).tensors[name])


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_the_floor_of_rsa_is_its_whole_computation(world, kv_heads):
    case = case_of("rsa", world, kv_heads=kv_heads)
    floors = Cluster(world, trace=False).run(lambda: floor_of(case, dist.group.WORLD)())
    truth, plan = reference(case), case.plan()
    upstream = 1e-3 * case.inputs()[3].norm()
    summed = {name: torch.zeros_like(truth[name]) for name in ("dk", "dv")}
    for rank, (out, dq, *shares) in enumerate(floors):
        own = torch.from_numpy(plan.positions(rank))
        for name, computed in (("out", out), ("dq", dq)):
            error = (computed.flatten(2, 3) - truth[name][:, own]).norm()
            assert error <= 1e-10 * (truth[name].norm() + upstream)
        for name, parts in (("dk", shares[:world]), ("dv", shares[world:])):
            for hop, part in enumerate(parts):
                summed[name][:, torch.from_numpy(plan.positions((rank - hop) % world))] += part
    for name, total in summed.items():
        assert (total - truth[name]).norm() <= 1e-10 * (truth[name].norm() + upstream)
