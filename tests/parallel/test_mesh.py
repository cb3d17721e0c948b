"""Where the axes of the mesh lie."""

import pytest
import torch.distributed as dist

from longctx.config import ParallelConfig
from longctx.mesh import build_mesh
from longctx.sim import Cluster


def describe(parallel: ParallelConfig):
    mesh = build_mesh(parallel, "cpu")
    return (
        dist.get_process_group_ranks(mesh.sequence_group),
        mesh.sequence_rank,
        mesh.data_rank,
        mesh.data_size,
        len(dist.get_process_group_ranks(mesh.token_group)),
        mesh.parameters.shape,
    )


def test_a_sequence_group_is_made_of_neighbours():
    ranks = Cluster(6).run(describe, ParallelConfig(dp_shard=2, sp=3))
    assert [r[0] for r in ranks] == [[0, 1, 2]] * 3 + [[3, 4, 5]] * 3
    assert [r[1] for r in ranks] == [0, 1, 2, 0, 1, 2]
    assert [r[2] for r in ranks] == [0, 0, 0, 1, 1, 1]
    assert all(r[3:] == (2, 6, (6,)) for r in ranks)


@pytest.mark.parametrize("replicas", [1, 2])
def test_replicas_are_outermost_and_take_sequences_of_their_own(replicas):
    ranks = Cluster(4 * replicas).run(describe, ParallelConfig(dp_replicate=replicas, dp_shard=2, sp=2))
    assert [r[2] for r in ranks] == [rank // 2 for rank in range(4 * replicas)]
    assert {r[5] for r in ranks} == ({(4,)} if replicas == 1 else {(2, 4)})


def test_a_world_of_one_is_the_same_code():
    assert Cluster(1).run(describe, ParallelConfig(dp_shard=1)) == [([0], 0, 0, 1, 1, (1,))]
