"""Every kernel that runs on this CPU, on every kind of tile, against explicit cells."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longctx.kernels import dense, flash_cpu
from longctx.kernels.dense import Dense
from longctx.kernels.flash_cpu import FlashCpu
from longctx.sequence import Contiguous, Mask, Striped, Tile, TileSet, Zigzag
from tests.kernels.tile_cases import KINDS, assert_close, expected, run_kernel, seen_cells, tensors
from tests.sequence.brute_force import Example

KERNELS = {"dense": Dense(), "flash_cpu": FlashCpu()}
# bf16: eight bits of mantissa in inputs' products and in the rounded output that the backward pass receives.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 1.5e-2}
HEADS = ((2, 2), (8, 2), (4, 1))


def check(kernel, whole, tile_sets, scale: float = 0.3) -> None:
    batch, queries = whole["q"].shape[:2]
    seen = seen_cells(tile_sets, batch, queries, whole["k"].shape[1])
    assert_close(run_kernel(kernel, whole, tile_sets, scale), expected(whole, seen, scale), TOLERANCE[whole["q"].dtype])


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
def test_each_kind_of_tile(kernel, kind, dtype, heads, kv_heads):
    whole = tensors(dtype, 3, 11, 16, heads, kv_heads, 8)
    check(KERNELS[kernel], whole, [TileSet(1, 3, (KINDS[kind],))])


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_rows_that_several_tiles_share_are_merged(kernel, dtype):
    tiles = (Tile(0, 8, 0, 8, upper=True), Tile(2, 8, 8, 16), Tile(0, 1, 12, 13), Tile(3, 7, 16, 20, lower=True))
    whole = tensors(dtype, 2, 9, 20, 4, 2, 8)
    check(KERNELS[kernel], whole, [TileSet(0, 2, tiles)])
    check(KERNELS[kernel], whole, [TileSet(0, 1, tiles[:2]), TileSet(1, 2, tiles)])


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_strided_views_are_read_in_place(kernel, dtype):
    """Heads before tokens, tokens of a longer buffer, and keys and values interleaved, as models produce them."""
    whole = tensors(dtype, 2, 11, 16, 4, 2, 8)
    views = {
        "q": whole["q"].transpose(1, 2).contiguous().transpose(1, 2),
        "k": torch.stack((whole["k"], whole["v"]), dim=3)[:, :, :, 0],
        "v": torch.cat((whole["v"], whole["v"]), dim=1)[:, :16],
        "dout": torch.stack((whole["dout"],) * 3, dim=-1)[..., 1],
    }
    assert all(torch.equal(views[name], whole[name]) for name in whole)
    assert not any(views[name].is_contiguous() for name in whole)
    for kind in KINDS.values():
        check(KERNELS[kernel], views, [TileSet(0, 2, (kind,))])


@pytest.mark.parametrize("kernel", KERNELS)
def test_an_upstream_gradient_may_be_an_expanded_scalar(kernel):
    whole = tensors(torch.float64, 2, 11, 16, 4, 2, 8)
    whole["dout"] = torch.ones((), dtype=torch.float64).expand_as(whole["q"])
    check(KERNELS[kernel], whole, [TileSet(0, 2, (KINDS["causal, more keys"],))])


@pytest.mark.parametrize("window", [1, 2, 127, 128, 129, 280, 1000])
@pytest.mark.parametrize("causal", [True, False])
def test_windows_around_the_width_that_changes_the_path(window, causal):
    plan = Example(((280,),), Mask(causal, window), Contiguous(), 280, 1).plan()
    whole, tile_sets = tensors(torch.float64, 1, 280, 280, 2, 1, 8), list(plan.tiles(0, 0))
    truth = expected(whole, seen_cells(tile_sets, 1, 280, 280), 0.3)
    for kernel in KERNELS.values():
        assert_close(run_kernel(kernel, whole, tile_sets, 0.3), truth, TOLERANCE[torch.float64])


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("layout", [Contiguous(), Zigzag(), Striped(), Striped(4)])
def test_tiles_between_two_ranks(kernel, layout):
    plan = Example(((50, 1, 30), (81,)), Mask(window=40), layout, 81, 3).plan()
    for q_rank, k_rank in ((0, 0), (1, 0), (2, 1), (0, 2)):
        queries, keys = len(plan.positions(q_rank)), len(plan.positions(k_rank))
        check(KERNELS[kernel], tensors(torch.float64, 2, queries, keys, 4, 2, 8), list(plan.tiles(q_rank, k_rank)))


@pytest.mark.parametrize("kernel", KERNELS)
def test_no_tiles_and_no_rows_change_nothing(kernel):
    whole = tensors(torch.float32, 1, 4, 4, 2, 1, 8)
    computed = run_kernel(KERNELS[kernel], whole, [], 1.0)
    assert (computed.pop("lse") == -torch.inf).all()
    assert not any(tensor.any() for tensor in computed.values())
    run_kernel(KERNELS[kernel], tensors(torch.float32, 1, 0, 0, 2, 1, 8), [], 1.0)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_scores_far_from_zero_neither_overflow_nor_vanish(kernel, dtype):
    whole = tensors(dtype, 1, 11, 16, 2, 1, 8)
    whole["q"] = whole["q"] * 30
    tiles = (KINDS["causal square"], Tile(1, 9, 10, 16))
    seen = seen_cells([TileSet(0, 1, tiles)], 1, 11, 16)
    truth = expected(whole, seen, 1.0)
    computed = run_kernel(KERNELS[kernel], whole, [TileSet(0, 1, tiles)], 1.0)
    assert not any(tensor.isnan().any() for tensor in computed.values())
    assert_close({"out": computed["out"]}, {"out": truth["out"]}, 3 * TOLERANCE[dtype])


def test_the_dense_kernel_cuts_long_tiles_to_its_memory(monkeypatch):
    monkeypatch.setattr(dense, "MAX_SCORES", 40)
    whole = tensors(torch.float64, 2, 11, 16, 4, 2, 8)
    for kind in KINDS.values():
        check(Dense(), whole, [TileSet(0, 2, (kind,))])


@settings(max_examples=40)
@given(st.data())
def test_any_tile(data):
    n, first = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 40))
    lower, upper = data.draw(st.booleans()), data.draw(st.booleans())
    keys = first + n - 1 if upper else first
    if lower and not upper:
        keys = max(keys, n)
    tile = Tile(2, 2 + n, 3, 3 + keys, lower and n > 1, upper and n > 1)
    whole = tensors(torch.float64, 1, n + 3, keys + 4, 2, 1, 8)
    for kernel in KERNELS.values():
        check(kernel, whole, [TileSet(0, 1, (tile,))])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_large_squares_are_halved(monkeypatch, kind, dtype):
    monkeypatch.setattr(flash_cpu, "LARGEST_SQUARE", 2)
    whole = tensors(dtype, 3, 11, 16, 4, 2, 8)
    check(FlashCpu(), whole, [TileSet(1, 3, (KINDS[kind],))])
