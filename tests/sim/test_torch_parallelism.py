"""What PyTorch itself builds on process groups, against the same computation in one process."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn as nn
from torch.distributed._functional_collectives import (
    all_gather_single_autograd,
    all_reduce,
    all_to_all_single_autograd,
    permute_tensor,
    reduce_scatter_single_autograd,
)
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

from longctx.sim import Cluster

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
STEPS = 4


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 3 * width)
        self.down = nn.Linear(3 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


def make_model(width: int = 6, layers: int = 2) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(Block(width) for _ in range(layers)), nn.Linear(width, 5)).double()


def batches(world: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(2 * world, 6, generator=generator, dtype=torch.float64) for _ in range(STEPS)]


def train(model: nn.Module, data: list[torch.Tensor]) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for batch in data:
        optimizer.zero_grad()
        model(batch).square().mean().backward()
        optimizer.step()


def reference(world: int) -> dict[str, torch.Tensor]:
    model = make_model()
    train(model, batches(world))
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def my_part(world: int) -> list[torch.Tensor]:
    return [batch.chunk(world)[dist.get_rank()] for batch in batches(world)]


def full(model: nn.Module) -> dict[str, torch.Tensor]:
    return {
        name.removeprefix("module."): (p.full_tensor() if isinstance(p, DTensor) else p).detach()
        for name, p in model.named_parameters()
    }


def assert_same(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        torch.testing.assert_close(got[name], tensor, rtol=1e-10, atol=1e-12, msg=name)


@pytest.mark.parametrize(("world", "reshard"), [(2, True), (4, True), (4, False)])
def test_fsdp2_equals_a_single_process(world: int, reshard: bool) -> None:
    def body() -> dict[str, torch.Tensor]:
        mesh = init_device_mesh("cpu", (world,))
        model = make_model()
        for layer in model:
            fully_shard(layer, mesh=mesh, reshard_after_forward=reshard)
        fully_shard(model, mesh=mesh, reshard_after_forward=reshard)
        train(model, my_part(world))
        return full(model)

    for got in Cluster(world).run(body):
        assert_same(got, reference(world))


def test_fsdp2_with_summed_gradients_and_accumulation() -> None:
    world = 2

    def body() -> dict[str, torch.Tensor]:
        model = make_model()
        fully_shard(model, mesh=init_device_mesh("cpu", (world,)))
        model.set_gradient_divide_factor(1.0)
        model.set_force_sum_reduction_for_comms(True)
        first, second = my_part(world)[:2]
        model.set_requires_gradient_sync(False)
        model(first).square().sum().backward()
        model.set_requires_gradient_sync(True)
        model(second).square().sum().backward()
        return {name: p.grad.full_tensor() for name, p in model.named_parameters()}

    model = make_model()
    for batch in batches(world)[:2]:
        model(batch).square().sum().backward()
    for got in Cluster(world).run(body):
        assert_same(got, {name: p.grad for name, p in model.named_parameters()})


def test_hsdp_on_an_unflattened_mesh() -> None:
    def body() -> dict[str, torch.Tensor]:
        mesh = init_device_mesh("cpu", (4,), mesh_dim_names=("dp",))._unflatten(0, (2, 2), ("replicate", "shard"))
        assert mesh.shape == (2, 2)
        model = make_model()
        for layer in model:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        train(model, my_part(4))
        return full(model)

    cluster = Cluster(4, seed=3)
    for got in cluster.run(body):
        assert_same(got, reference(4))
    # Reduction over replicas joins ranks 0 and 2, 1 and 3 only.
    assert set(cluster.ledger.by_edge("all_reduce")) == {(0, 2), (2, 0), (1, 3), (3, 1)}


def test_ddp_equals_a_single_process() -> None:
    def body() -> dict[str, torch.Tensor]:
        model = DistributedDataParallel(make_model())
        train(model, my_part(2))
        return full(model)

    for got in Cluster(2).run(body):
        assert_same(got, reference(2))


@pytest.mark.parametrize("world", [2, 3])
def test_tensor_parallel_with_sequence_parallel_norm(world: int) -> None:
    def body() -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("tp",))
        model = make_model(layers=1)
        plan = {
            "0.norm": SequenceParallel(sequence_dim=0),
            "0.up": ColwiseParallel(input_layouts=Shard(0)),
            "0.down": RowwiseParallel(output_layouts=Shard(0)),
            "1": ColwiseParallel(input_layouts=Shard(0), output_layouts=Replicate()),
        }
        parallelize_module(model, mesh, plan)
        x = distribute_tensor(batches(3)[0], mesh, [Shard(0)]).to_local()
        out = model(x)
        out.square().sum().backward()
        gradients = {name: p.grad.full_tensor() for name, p in model.named_parameters()}
        return gradients, out.detach()

    model = make_model(layers=1)
    want = model(batches(3)[0])
    want.square().sum().backward()
    for gradients, out in Cluster(world).run(body):
        torch.testing.assert_close(out, want, rtol=1e-10, atol=1e-12)
        assert_same(gradients, {name: p.grad for name, p in model.named_parameters()})


def test_fsdp2_over_tensor_parallel() -> None:
    def body() -> dict[str, torch.Tensor]:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
        model = make_model()
        for name in ("0", "1"):
            parallelize_module(model, mesh["tp"], {f"{name}.up": ColwiseParallel(), f"{name}.down": RowwiseParallel()})
        for layer in model:
            fully_shard(layer, mesh=mesh["dp"])
        fully_shard(model, mesh=mesh["dp"])
        data = [batch.chunk(2)[mesh.get_local_rank("dp")] for batch in batches(2)]
        train(model, data)
        return full(model)

    for got in Cluster(4).run(body):
        assert_same(got, reference(2))


def test_dtensor_redistribution_round_trip() -> None:
    def body() -> bool:
        mesh = init_device_mesh("cpu", (4,))
        whole = torch.arange(36.0).view(6, 6)  # 6 rows over 4 ranks: uneven shards
        rows = distribute_tensor(whole, mesh, [Shard(0)])
        columns = rows.redistribute(mesh, [Shard(1)])
        return torch.equal(columns.full_tensor(), whole) and columns.to_local().shape[0] == 6

    assert Cluster(4).run(body) == [True] * 4


def test_functional_collectives_and_their_gradients() -> None:
    def body() -> list[torch.Tensor]:
        rank, world, group = dist.get_rank(), dist.get_world_size(), dist.group.WORLD
        x = torch.full((world,), float(rank + 1), requires_grad=True)
        gathered = all_gather_single_autograd(x, 0, group)
        (gathered * (rank + 1)).sum().backward()
        y = torch.arange(float(world), requires_grad=True)
        scattered = reduce_scatter_single_autograd(y, "sum", 0, group)
        (scattered * (rank + 1)).sum().backward()
        z = torch.arange(float(world), requires_grad=True)
        swapped = all_to_all_single_autograd(z + 10 * rank, None, None, group)
        (swapped * (rank + 1)).sum().backward()
        moved = permute_tensor(torch.full((1,), float(rank)), [(r + 1) % world for r in range(world)], group)
        summed = all_reduce(torch.ones(1), "sum", group)
        return [x.grad, scattered.detach() + 0, y.grad, swapped.detach() + 0, z.grad, moved + 0, summed + 0]

    for rank, got in enumerate(Cluster(3).run(body)):
        want = [[6.0] * 3, [3.0 * rank], [1, 2, 3], [rank, 10 + rank, 20 + rank], [1, 2, 3], [(rank - 1) % 3], [3.0]]
        for got_tensor, want_list in zip(got, want, strict=True):
            assert got_tensor.tolist() == want_list


def test_nested_groups_and_meshes() -> None:
    def body() -> tuple[list[float], list[str], int]:
        rank = dist.get_rank()
        mesh = init_device_mesh("cpu", (2, 2, 2), mesh_dim_names=("a", "b", "c"))
        totals = []
        for name in ("a", "b", "c"):
            total = torch.tensor([float(rank)])
            dist.all_reduce(total, group=mesh.get_group(name))
            totals.append(total.item())
        flat = torch.tensor([float(rank)])
        dist.all_reduce(flat, group=mesh["b", "c"]._flatten("bc").get_group())
        local = dist.new_group([0, 1, 2, 3] if rank < 4 else [4, 5, 6, 7], use_local_synchronization=True)
        own, _ = dist.new_subgroups(group_size=4)
        dist.barrier(local)
        backends = [dist.get_backend(group) for group in (local, own, mesh.get_group("a"))]
        return [*totals, flat.item()], backends, dist.get_rank(own)

    for rank, (totals, backends, position) in enumerate(Cluster(8).run(body)):
        half = [r for r in range(8) if r // 4 == rank // 4]
        assert totals == [rank + (rank ^ 4), rank + (rank ^ 2), rank + (rank ^ 1), sum(half)]
        assert backends == ["sim"] * 3
        assert position == rank % 4


def test_checkpoint_saved_on_four_ranks_loads_on_two(tmp_path: Path) -> None:
    def make(world: int) -> tuple[nn.Module, torch.optim.Optimizer]:
        model = make_model()
        mesh = init_device_mesh("cpu", (world,))
        for layer in model:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        return model, torch.optim.AdamW(model.parameters(), lr=1e-2)

    def save() -> None:
        model, optimizer = make(4)
        for batch in my_part(4):
            optimizer.zero_grad()
            model(batch).square().mean().backward()
            optimizer.step()
        model_state, optimizer_state = get_state_dict(model, optimizer)
        dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=tmp_path)

    def load() -> tuple[dict[str, torch.Tensor], float]:
        model, optimizer = make(2)
        model_state, optimizer_state = get_state_dict(model, optimizer)
        state = {"model": model_state, "optimizer": optimizer_state}
        dcp.load(state, checkpoint_id=tmp_path)
        set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        first = next(iter(model.parameters()))
        return full(model), optimizer.state[first]["step"].item()

    Cluster(4).run(save)
    for got, step in Cluster(2).run(load):
        assert_same(got, reference(4))
        assert step == STEPS


def test_fsdp2_traffic_is_what_its_design_says() -> None:
    world = 4

    def body() -> int:
        model = make_model(width=8)[:2]
        mesh = init_device_mesh("cpu", (world,))
        for layer in model:
            fully_shard(layer, mesh=mesh, reshard_after_forward=True)
        model(torch.ones(2, 8, dtype=torch.float64)).sum().backward()
        return sum(p.numel() * 8 for p in model.parameters())

    cluster = Cluster(world)
    nbytes = cluster.run(body)[0]
    # All parameters divide by the world. They are gathered for forward and for backward, gradients scattered.
    per_pass = nbytes * (world - 1) // world
    assert cluster.ledger.by_operation(rank=1) == {"all_gather": 2 * per_pass, "reduce_scatter": per_pass}
