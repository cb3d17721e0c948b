"""The lowering of tiles to FlashAttention's variable-length launches, on an emulation of that operator.

The emulation is written from the operator's documented semantics: with n queries and m keys of one sequence,
query i sees keys ``i + m - n - left <= j <= i + m - n + right`` where an end of -1 is open; the log-sum-exp
is ``[H, total_q]``; the backward pass takes any (out, lse).
"""

import pytest
import torch

from longctx.attention.runtime.local_kernel import KernelProblem
from longctx.kernels import flash_cuda
from longctx.kernels.flash_cuda import FlashCuda, launches_of
from longctx.sequence import Contiguous, Mask, Striped, Tile, TileSet, Zigzag
from tests.kernels.tile_cases import KINDS, assert_close, expected, run_kernel, seen_cells, tensors
from tests.sequence.brute_force import Example


class Emulation:
    """Both operators; counts launches and checks what the real ones demand of their arguments."""

    def __init__(self) -> None:
        self.launches = 0

    def sequences(self, q, k, offsets_q, offsets_k, max_q, max_k, left, right):
        """Per sequence: its queries, its keys, and which of them are seen."""
        assert q.stride(-1) == k.stride(-1) == 1
        assert offsets_q.dtype == offsets_k.dtype == torch.int32
        starts_q, starts_k = offsets_q.tolist(), offsets_k.tolist()
        assert len(starts_q) == len(starts_k) and (starts_q[0], starts_k[0]) == (0, 0)
        assert (starts_q[-1], starts_k[-1]) == (len(q), len(k))
        sizes_q, sizes_k = offsets_q.diff(), offsets_k.diff()
        assert (max_q, max_k) == (int(sizes_q.max()), int(sizes_k.max()))
        assert min(left, right) >= -1
        for i in range(len(starts_q) - 1):
            n, m = int(sizes_q[i]), int(sizes_k[i])
            aligned = torch.arange(m) - torch.arange(n)[:, None] - (m - n)
            seen = torch.ones(n, m, dtype=torch.bool)
            seen &= (aligned >= -left) if left >= 0 else True
            seen &= (aligned <= right) if right >= 0 else True
            assert seen.any(1).all(), "FlashAttention's lse of a blind query is +inf"
            yield slice(starts_q[i], starts_q[i + 1]), slice(starts_k[i], starts_k[i + 1]), seen

    def forward(
        self, q, k, v, offsets_q, offsets_k, max_q, max_k, dropout, causal, debug,
        *, scale, window_size_left, window_size_right,
    ):  # fmt: skip
        assert (dropout, causal, debug) == (0.0, False, False)
        self.launches += 1
        out, lse = torch.zeros_like(q), torch.zeros(q.shape[1], len(q), dtype=q.dtype)
        window = (window_size_left, window_size_right)
        for rows, keys, seen in self.sequences(q, k, offsets_q, offsets_k, max_q, max_k, *window):
            whole = {name: part.unsqueeze(0) for name, part in (("q", q[rows]), ("k", k[keys]), ("v", v[keys]))}
            truth = expected({**whole, "dout": whole["q"]}, seen[None], scale)
            out[rows], lse[:, rows] = truth["out"][0].to(q.dtype), truth["lse"][0].T.to(q.dtype)
        return out, lse, None, None, None

    def backward(
        self, dout, q, k, v, out, lse, offsets_q, offsets_k, max_q, max_k, dropout, causal, rng_state, unused,
        *, scale, window_size_left, window_size_right,
    ):  # fmt: skip
        assert (dropout, causal) == (0.0, False)
        assert dout.is_contiguous() and lse.is_contiguous() and lse.shape == (q.shape[1], len(q))
        assert rng_state.dtype == torch.uint64 and rng_state.numel() == 2
        self.launches += 1
        group = q.shape[1] // k.shape[1]
        grads = tuple(torch.zeros_like(tensor) for tensor in (q, k, v))
        window = (window_size_left, window_size_right)
        for rows, keys, seen in self.sequences(q, k, offsets_q, offsets_k, max_q, max_k, *window):
            for head in range(q.shape[1]):
                mine, its = (rows, head), (keys, head // group)
                weights = torch.exp(scale * q[mine] @ k[its].T - lse[head, rows, None]) * seen
                delta = (dout[mine] * out[mine]).sum(1, keepdim=True)
                upstream = scale * weights * (dout[mine] @ v[its].T - delta)
                grads[0][mine] += upstream @ k[its]
                grads[1][its] += upstream.T @ q[mine]
                grads[2][its] += weights.T @ dout[mine]
        return grads


@pytest.fixture
def emulation(monkeypatch):
    emulated = Emulation()
    monkeypatch.setattr(flash_cuda, "_forward", emulated.forward)
    monkeypatch.setattr(flash_cuda, "_backward", emulated.backward)
    return emulated


def check(tile_sets, whole) -> None:
    seen = seen_cells(tile_sets, whole["q"].shape[0], whole["q"].shape[1], whole["k"].shape[1])
    assert_close(run_kernel(FlashCuda(), whole, tile_sets, 0.3), expected(whole, seen, 0.3), 1e-13)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (8, 2), (4, 1)])
def test_each_kind_of_tile_is_one_launch(emulation, kind, heads, kv_heads):
    check([TileSet(1, 3, (KINDS[kind],))], tensors(torch.float64, 3, 11, 16, heads, kv_heads, 8))
    assert emulation.launches == 2  # forward and backward, for both batch rows together


def test_tiles_of_one_window_share_a_launch(emulation):
    first = TileSet(0, 1, (KINDS["causal square"], Tile(0, 1, 15, 16)))
    second = TileSet(1, 2, (Tile(9, 11, 0, 2), KINDS["causal, more keys"]))
    check([first, second], tensors(torch.float64, 2, 11, 16, 4, 2, 8))
    assert emulation.launches == 2 * 2
    windows = [(launch.left, launch.right) for launch in launches_of((TileSet(0, 1, tuple(KINDS.values())),))]
    assert len(windows) == len(set(windows))
    assert set(windows) == {(-1, -1), (-1, 0), (0, -1), (5, -1), (0, 0), (3, 0), (10, 0)}


@pytest.mark.parametrize("layout", [Contiguous(), Zigzag(), Striped(), Striped(4)])
@pytest.mark.parametrize("mask", [Mask(), Mask(False), Mask(window=9), Mask(False, 30)])
def test_tiles_between_ranks(emulation, layout, mask):
    plan = Example(((50, 1, 30), (81,), ()), mask, layout, 81, 3).plan()
    for q_rank, k_rank in ((0, 0), (1, 0), (2, 1), (0, 2)):
        queries, keys = len(plan.positions(q_rank)), len(plan.positions(k_rank))
        check(list(plan.tiles(q_rank, k_rank)), tensors(torch.float64, 3, queries, keys, 4, 2, 8))


def test_views_and_expanded_gradients_are_packed_as_the_operator_wants(emulation):
    whole = tensors(torch.float64, 2, 11, 16, 4, 2, 8)
    whole["q"] = whole["q"].transpose(1, 2).contiguous().transpose(1, 2)
    whole["dout"] = torch.ones((), dtype=torch.float64).expand_as(whole["q"])
    for kind in KINDS.values():
        check([TileSet(0, 1, (kind,))], whole)
        check([TileSet(0, 2, (kind,))], whole)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"device": "cpu"}, "device cpu: it runs on cuda"),
        ({"dtype": torch.float32}, "dtype torch.float32: it takes float16 and bfloat16"),
        ({"head_dim": 60}, "head_dim 60: it takes multiples of 8 up to 256"),
        ({"head_dim": 264}, "head_dim 264: it takes multiples of 8 up to 256"),
    ],
)
def test_refusals(change, reason):
    fields = {"device": "cuda", "dtype": torch.bfloat16, "heads": 8, "kv_heads": 2, "head_dim": 64}
    assert FlashCuda().refuses(KernelProblem(**{**fields, **change})) == reason


@pytest.mark.parametrize(("capability", "reason"), [((7, 5), "compute capability 7.5: it needs 8.0"), ((9, 0), None)])
def test_old_devices_are_refused(monkeypatch, capability, reason):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert FlashCuda().refuses(KernelProblem("cuda", torch.bfloat16, 8, 2, 64)) == reason


def test_the_operators_take_the_arguments_that_the_kernel_passes():
    """The emulation's signatures are those of the real operators, by name and order."""
    for operator, emulated in ((flash_cuda._forward, Emulation.forward), (flash_cuda._backward, Emulation.backward)):
        names = [argument.name for argument in operator.default._schema.arguments]
        positional = emulated.__code__.co_argcount - 1
        assert positional == sum(not argument.kwarg_only for argument in operator.default._schema.arguments)
        keywords = emulated.__code__.co_varnames[positional + 1 : positional + 4]
        assert set(keywords) <= set(names)
