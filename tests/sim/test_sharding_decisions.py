"""Decisions of DTensor that ranks and runs share are those that each would have made, on meshes of its own."""

import gc
import weakref

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from longctx.sim import Cluster, sharding_decisions


@pytest.fixture(autouse=True)
def nothing_decided(monkeypatch):
    monkeypatch.setattr(sharding_decisions, "_decisions", {})


def worked(shape: tuple[int, ...] = (2, 2)) -> tuple[list[torch.Tensor], list[bool]]:
    """Numbers that need decisions of every kind, and whether each result is on a mesh of this rank and this run.

    Five rows on two ranks: shards differ in size; a product redistributes; views and sums are placed anew.
    """
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=tuple("ab"[: len(shape)]))
    whole = torch.arange(30.0).reshape(5, 6)
    placements = [Shard(0), Replicate()][: len(shape)]
    x = distribute_tensor(whole, mesh, placements)
    y = distribute_tensor(whole.T.contiguous(), mesh, placements)
    results = [
        x + 1, x @ y, x.sum(), x.reshape(5, 2, 3), x.new_zeros(5, 6), x[:, 1:3], torch.stack([x, 2 * x]),
        *torch._foreach_mul([x, x], [2.0, 3.0]), *torch.split(x, 2, 1),
    ]  # fmt: skip
    own = [result.device_mesh is mesh for result in results]
    return [result.full_tensor() for result in results if isinstance(result, DTensor)], own


def test_shared_decisions_are_those_that_each_rank_would_make():
    alone = [worked_alone for worked_alone, _ in Cluster(4).run(worked)]
    decided = len(sharding_decisions._decisions)
    assert decided > 5
    for seed in (None, 3):
        ranks = Cluster(4, seed=seed).run(worked)
        assert len(sharding_decisions._decisions) == decided, "the second run decides nothing"
        for (found, own), expected in zip(ranks, alone, strict=True):
            assert all(own)
            assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    plain = torch.arange(30.0).reshape(5, 6)
    assert torch.equal(alone[0][1], plain @ plain.T)


def test_meshes_of_another_shape_decide_for_themselves():
    Cluster(4).run(worked)
    decided = len(sharding_decisions._decisions)
    for found, own in Cluster(2).run(worked, (2,)):
        assert all(own)
        assert torch.equal(found[0], torch.arange(30.0).reshape(5, 6) + 1)
    assert len(sharding_decisions._decisions) > decided


def test_no_decision_keeps_a_group_alive():
    def group() -> weakref.ref:
        worked()
        return weakref.ref(dist.group.WORLD)

    groups = Cluster(4).run(group)
    gc.collect()
    assert sharding_decisions._decisions
    assert not any(reference() for reference in groups)


def test_afterwards_decisions_are_torch_s_own_again():
    propagator = DTensor._op_dispatcher.sharding_propagator
    Cluster(1).run(lambda: None)
    assert "propagate_op_sharding_non_cached" not in vars(propagator)
