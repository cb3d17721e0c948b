"""Every collective against the plain computation on the list of all ranks' tensors."""

import warnings

import pytest
import torch
import torch.distributed as dist

from longctx.sim import Cluster, MismatchError, RankFailed

WORLDS = (1, 2, 3, 4, 8)
DTYPES = (torch.int64, torch.float32, torch.bfloat16, torch.float64)
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def tensor_of(rank: int, size: int, dtype: torch.dtype, salt: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * salt + rank)
    return (torch.randn(size, generator=generator, dtype=torch.float64) * 8).to(dtype)


def sum_in_rank_order(tensors: list[torch.Tensor]) -> torch.Tensor:
    wide = torch.float32 if tensors[0].dtype == torch.bfloat16 else tensors[0].dtype
    total = torch.zeros_like(tensors[0], dtype=wide)
    for tensor in tensors:
        total += tensor.to(wide)
    return total.to(tensors[0].dtype)


def exercise(world: int, dtype: torch.dtype) -> dict[str, list[torch.Tensor]]:
    """One of each collective; the tensors that this rank ends up with, by name."""
    rank = dist.get_rank()
    root = world - 1
    got: dict[str, list[torch.Tensor]] = {}

    for name, op in (("sum", dist.ReduceOp.SUM), ("max", dist.ReduceOp.MAX), ("min", dist.ReduceOp.MIN)):
        tensor = tensor_of(rank, 5, dtype)
        dist.all_reduce(tensor, op=op)
        got[f"all_reduce {name}"] = [tensor]

    tensor = tensor_of(rank, 5, dtype)
    dist.reduce(tensor, dst=root)
    got["reduce"] = [tensor]

    tensor = tensor_of(rank, 5, dtype)
    dist.broadcast(tensor, src=root)
    got["broadcast"] = [tensor]

    out = torch.zeros(5 * world, dtype=dtype)
    dist.all_gather_single(out, tensor_of(rank, 5, dtype))
    got["all_gather_single"] = [out]

    blocks = [torch.zeros(source, dtype=dtype) for source in range(world)]
    dist.all_gather(blocks, tensor_of(rank, rank, dtype))
    got["all_gather uneven"] = blocks

    blocks = [torch.zeros(3, dtype=dtype) for _ in range(world)]
    dist.gather(tensor_of(rank, 3, dtype), blocks if rank == root else None, dst=root)
    got["gather"] = blocks

    out = torch.zeros(3, dtype=dtype)
    parts = [tensor_of(rank, 3, dtype, salt=part) for part in range(world)]
    dist.scatter(out, parts if rank == root else None, src=root)
    got["scatter"] = [out]

    out = torch.zeros(3, dtype=dtype)
    dist.reduce_scatter_single(out, tensor_of(rank, 3 * world, dtype))
    got["reduce_scatter_single"] = [out]

    out = torch.zeros(rank + 1, dtype=dtype)
    dist.reduce_scatter(out, [tensor_of(rank, part + 1, dtype, salt=part) for part in range(world)])
    got["reduce_scatter uneven"] = [out]

    out = torch.zeros(2 * world, dtype=dtype)
    dist.all_to_all_single(out, tensor_of(rank, 2 * world, dtype))
    got["all_to_all_single"] = [out]

    # Rank s sends (s + d) % 3 rows to rank d: uneven, and some of them empty.
    sends = [(rank + d) % 3 for d in range(world)]
    out = torch.zeros(sum(sends), 2, dtype=dtype)
    rows = tensor_of(rank, 2 * sum(sends), dtype).view(-1, 2)
    dist.all_to_all_single(out, rows, output_split_sizes=sends, input_split_sizes=sends)
    got["all_to_all_single uneven"] = [out]

    outs = [torch.zeros(source + 1, dtype=dtype) for source in range(world)]
    dist.all_to_all(outs, [tensor_of(rank, rank + 1, dtype, salt=d) for d in range(world)])
    got["all_to_all"] = outs

    empty = torch.zeros(0, dtype=dtype)
    dist.all_reduce(empty)
    dist.all_gather_single(torch.zeros(0, dtype=dtype), empty)
    dist.barrier()
    return got


def expected(rank: int, world: int, dtype: torch.dtype) -> dict[str, list[torch.Tensor]]:
    """What ``exercise`` must give, computed from all ranks' inputs at once."""
    ranks, root = range(world), world - 1
    fives = [tensor_of(r, 5, dtype) for r in ranks]
    wide = torch.stack(fives)
    sends = [[(s + d) % 3 for d in ranks] for s in ranks]
    rows = [tensor_of(s, 2 * sum(sends[s]), dtype).view(-1, 2).split(sends[s]) for s in ranks]
    pairs = [tensor_of(s, 2 * world, dtype).chunk(world) for s in ranks]
    threes = [tensor_of(r, 3, dtype) for r in ranks]
    return {
        "all_reduce sum": [sum_in_rank_order(fives)],
        "all_reduce max": [wide.amax(0)],
        "all_reduce min": [wide.amin(0)],
        "reduce": [sum_in_rank_order(fives) if rank == root else fives[rank]],
        "broadcast": [fives[root]],
        "all_gather_single": [torch.cat(fives)],
        "all_gather uneven": [tensor_of(r, r, dtype) for r in ranks],
        "gather": threes if rank == root else [torch.zeros(3, dtype=dtype)] * world,
        "scatter": [tensor_of(root, 3, dtype, salt=rank)],
        "reduce_scatter_single": [
            sum_in_rank_order([tensor_of(r, 3 * world, dtype) for r in ranks]).chunk(world)[rank]
        ],
        "reduce_scatter uneven": [sum_in_rank_order([tensor_of(r, rank + 1, dtype, salt=rank) for r in ranks])],
        "all_to_all_single": [torch.cat([pairs[s][rank] for s in ranks])],
        "all_to_all_single uneven": [torch.cat([rows[s][rank] for s in ranks])],
        "all_to_all": [tensor_of(s, s + 1, dtype, salt=rank) for s in ranks],
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("world", WORLDS)
def test_every_collective_equals_the_plain_computation(world: int, dtype: torch.dtype) -> None:
    for rank, got in enumerate(Cluster(world).run(exercise, world, dtype)):
        want = expected(rank, world, dtype)
        assert got.keys() == want.keys()
        for name in want:
            for got_tensor, want_tensor in zip(got[name], want[name], strict=True):
                assert torch.equal(got_tensor, want_tensor), f"{name} on rank {rank}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_summed_in_fp32_and_rounded_once(dtype: torch.dtype) -> None:
    # In bf16 256 + 1 is 256 again, so summing in bf16 would lose every one of the ones.
    def body() -> float:
        big = 256.0 if dtype == torch.bfloat16 else 2048.0
        tensor = torch.tensor([big if dist.get_rank() == 0 else 1.0], dtype=dtype)
        dist.all_reduce(tensor)
        return tensor.item()

    assert Cluster(5).run(body) == [260.0 if dtype == torch.bfloat16 else 2052.0] * 5


def test_average_product_bitwise_and_scaled_sum() -> None:
    def body() -> tuple[float, int, int, float]:
        rank = dist.get_rank()
        average = torch.tensor([float(rank)])
        dist.all_reduce(average, op=dist.ReduceOp.AVG)
        product = torch.tensor([rank + 1])
        dist.all_reduce(product, op=dist.ReduceOp.PRODUCT)
        bits = torch.tensor([1 << rank])
        dist.all_reduce(bits, op=dist.ReduceOp.BOR)
        scaled = torch.tensor([float(rank)])
        dist.all_reduce(scaled, op=torch._C._distributed_c10d._make_nccl_premul_sum(0.5))
        return average.item(), product.item(), bits.item(), scaled.item()

    assert Cluster(4).run(body) == [(1.5, 24, 15, 3.0)] * 4


def test_average_of_integers_is_refused() -> None:
    def body() -> None:
        dist.all_reduce(torch.tensor([1]), op=dist.ReduceOp.AVG)

    with pytest.raises(RankFailed, match=r"AVG of torch\.int64.*use SUM and divide"):
        Cluster(2).run(body)


def test_result_appears_only_when_awaited() -> None:
    def body() -> tuple[list[float], list[float], bool]:
        tensor = torch.tensor([1.0])
        work = dist.all_reduce(tensor, async_op=True)
        while not work.is_completed():
            pass
        before = tensor.tolist()
        work.wait()
        work.wait()
        return before, tensor.tolist(), work.is_completed()

    assert Cluster(3).run(body) == [([1.0], [3.0], True)] * 3


def test_async_handles_complete_in_any_order() -> None:
    def body() -> list[float]:
        tensors = [torch.tensor([float(i)]) for i in range(4)]
        works = [dist.all_reduce(tensor, async_op=True) for tensor in tensors]
        for work in reversed(works) if dist.get_rank() else works:
            work.wait()
        return [tensor.item() for tensor in tensors]

    assert Cluster(3).run(body) == [[0.0, 3.0, 6.0, 9.0]] * 3


def test_future_of_a_handle_holds_the_result() -> None:
    def body() -> float:
        work = dist.all_reduce(torch.tensor([2.0]), async_op=True)
        return work.get_future().wait()[0].item()

    assert Cluster(2).run(body) == [4.0, 4.0]


def test_in_place_collective_leaves_autograd_version_alone() -> None:
    def body() -> list[float]:
        x = torch.tensor([3.0], requires_grad=True)
        y = x * 1.0
        z = y * y
        dist.all_reduce(y.detach())
        z.backward()
        return x.grad.tolist()

    Cluster(2).run(body)


def test_non_contiguous_outputs_receive_their_data() -> None:
    def body() -> torch.Tensor:
        wide = torch.zeros(2, 6)
        dist.all_gather([wide[:, :3], wide[:, 3:]], torch.full((2, 3), float(dist.get_rank() + 1)))
        return wide

    for result in Cluster(2).run(body):
        assert torch.equal(result, torch.tensor([[1.0, 1, 1, 2, 2, 2]] * 2))


@pytest.mark.parametrize("how", ["without device", "with device"])
def test_coalescing_manager(how: str) -> None:
    device = torch.device("cpu") if how == "with device" else None

    def body() -> list[list[float]]:
        rank = dist.get_rank()
        reduced = [torch.full((2,), float(rank)), torch.full((3,), 1.0)]
        with dist._coalescing_manager(device=device):
            for tensor in reduced:
                dist.all_reduce(tensor)
        gathered = [torch.zeros(4), torch.zeros(2)]
        with dist._coalescing_manager(device=device, async_ops=True) as manager:
            dist.all_gather_single(gathered[0], torch.full((2,), float(rank)))
            dist.all_gather_single(gathered[1], torch.full((1,), float(rank)))
        manager.wait()
        scattered = [torch.zeros(1), torch.zeros(2)]
        with dist._coalescing_manager(device=device):
            dist.reduce_scatter_single(scattered[0], torch.tensor([1.0, 2.0]))
            dist.reduce_scatter_single(scattered[1], torch.tensor([1.0, 2.0, 3.0, 4.0]))
        return [tensor.tolist() for tensor in (*reduced, *gathered, *scattered)]

    common = [[1.0, 1.0], [2.0, 2.0, 2.0], [0.0, 0.0, 1.0, 1.0], [0.0, 1.0]]
    assert Cluster(2).run(body) == [[*common, [2.0], [2.0, 4.0]], [*common, [4.0], [6.0, 8.0]]]


def test_object_collectives() -> None:
    def body() -> tuple[list[object], list[object], list[object], object]:
        rank = dist.get_rank()
        everything: list[object] = [None] * 3
        dist.all_gather_object(everything, {"rank": rank, "pad": "x" * rank})
        told: list[object] = [f"from {rank}", rank]
        dist.broadcast_object_list(told, src=1)
        mine: list[object] = [None]
        dist.scatter_object_list(mine, ["a", "bb", "ccc"] if rank == 0 else [None] * 3, src=0)
        collected: list[object] = [None] * 3
        dist.gather_object(rank, collected if rank == 2 else None, dst=2)
        return everything, told, mine, collected if rank == 2 else None

    for rank, (everything, told, mine, collected) in enumerate(Cluster(3).run(body)):
        assert everything == [{"rank": r, "pad": "x" * r} for r in range(3)]
        assert told == ["from 1", 1]
        assert mine == ["abc"[rank] * (rank + 1)]
        assert collected == ([0, 1, 2] if rank == 2 else None)


def test_fake_tensors_move_without_numbers() -> None:
    def body() -> tuple[tuple[int, ...], bool]:
        rank, world = dist.get_rank(), dist.get_world_size()
        x = torch.empty(1 << 20, 1 << 20)  # 4 TiB, if it were real
        dist.all_reduce(x)
        out = torch.empty(world << 20, 1 << 20)
        dist.all_gather_single(out, x)
        received = torch.empty(8)
        work = dist.irecv(received, (rank - 1) % world)
        dist.send(torch.empty(8), (rank + 1) % world)
        work.wait()
        return tuple((out @ x.T).shape), isinstance(out, torch._subclasses.FakeTensor)

    cluster = Cluster(2, fake=True)
    assert cluster.run(body) == [((2 << 20, 1 << 20), True)] * 2
    assert cluster.ledger.by_operation(rank=0) == {"all_reduce": 4 << 40, "all_gather": 4 << 40, "send": 32}


MISMATCHES = {
    "operation": lambda rank, t: dist.all_reduce(t) if rank else dist.broadcast(t, 0),
    "size": lambda rank, t: dist.all_reduce(t[: rank + 1]),
    "dtype": lambda rank, t: dist.all_reduce(t.double() if rank else t),
    "reduction": lambda rank, t: dist.all_reduce(t, op=dist.ReduceOp.MAX if rank else dist.ReduceOp.SUM),
    "root": lambda rank, t: dist.broadcast(t, src=rank),
}


@pytest.mark.parametrize("what", MISMATCHES)
def test_mismatched_collectives_are_named(what: str) -> None:
    def body() -> None:
        dist.barrier()
        MISMATCHES[what](dist.get_rank(), torch.ones(4))

    with pytest.raises(RankFailed) as caught:
        Cluster(2).run(body)
    assert isinstance(caught.value.__cause__, MismatchError)
    message = str(caught.value.__cause__)
    assert "in group '0' (default_pg) of ranks [0, 1], sequence 1: rank " in message
    assert "rank 0 called " in message
    assert "rank 1 called " in message
    for part in {
        "operation": ("all_reduce (sum) of (4,) float32", "broadcast (from rank 0) of (4,) float32"),
        "size": ("(2,) float32", "(1,) float32"),
        "dtype": ("(4,) float64", "(4,) float32"),
        "reduction": ("(max)", "(sum)"),
        "root": ("from rank 1", "from rank 0"),
    }[what]:
        assert part in message


def test_all_to_all_splits_that_disagree_name_the_pair() -> None:
    def body() -> None:
        sends = [1, 1] if dist.get_rank() else [2, 0]
        dist.all_to_all_single(torch.zeros(2), torch.zeros(2), [1, 1], sends)

    with pytest.raises(RankFailed, match="group rank 0 sends 2 elements to group rank 0, which expects 1"):
        Cluster(2).run(body)


def test_wrong_output_size_says_what_is_needed() -> None:
    def body() -> None:
        dist.all_gather_single(torch.zeros(5), torch.zeros(2))

    with pytest.raises(RankFailed, match="in a group of 3 the output needs 6 elements"):
        Cluster(3).run(body)


def test_old_names_of_collectives_still_work() -> None:
    def body() -> tuple[list[float], list[float]]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            gathered, scattered = torch.zeros(2), torch.zeros(1)
            dist.all_gather_into_tensor(gathered, torch.ones(1))
            dist.reduce_scatter_tensor(scattered, torch.ones(2))
        return gathered.tolist(), scattered.tolist()

    assert Cluster(2).run(body) == [([1.0, 1.0], [2.0])] * 2
